"""Which runners requests may be sent to, and why an app has none. Pure. Used by routes, refusals and the API."""

from __future__ import annotations

from fal_scheduler.core.records import Goal, Runner
from fal_scheduler.core.state import State
from fal_scheduler.core.told import RunnerStatus
from fal_scheduler.core.views import app_reason


def serves(state: State, runner: Runner) -> bool:
    """Whether requests may be sent to it: ready when last heard, and not asked to end. Silence does not change it."""
    if runner.goal is not Goal.RUN:
        return False
    status = state.status_of(runner)
    return status is not None and status.serves


def last_words(state: State, runner: Runner) -> RunnerStatus | None:
    """What its node told last; of a runner that crashed, its failure with exit code and log tail."""
    return state.failures.get(runner.id) or state.status_of(runner)


def why_not_serving(state: State, app_id: str) -> str:
    """Why no runner of an app serves; never empty."""
    app = state.apps.get(app_id)
    if app is None:
        return "the app does not exist"
    reason = app_reason(state, app)
    if reason:
        return reason
    if not state.runners_by_app.get(app_id):
        if not state.scaling_of(app).max_concurrency:
            return "it is scaled to 0 runners at most; raise max_concurrency (`falctl app scale --max`)"
        return "it is scaled to 0 runners; this request starts one"
    return "its runners are not ready yet"


__all__ = ["last_words", "serves", "why_not_serving"]
