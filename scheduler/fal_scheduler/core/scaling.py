"""How many runners of an app should serve. Pure. Called by `reconcile`."""

from __future__ import annotations

from fal_scheduler.core.records import App
from fal_scheduler.core.work import Work


def desired(work: Work, app: App) -> int:
    """How many runners should serve: the least in force, up to the most. Demand is added here by BRAIN."""
    scaling = work.state.scaling_of(app)
    return min(scaling.min_concurrency, scaling.max_concurrency)
