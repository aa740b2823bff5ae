"""A new revision takes over: old runners give way as new ones become ready. Pure. Called by `reconcile`."""

from __future__ import annotations

from fal_scheduler.core.records import App, Goal
from fal_scheduler.core.runner_groups import Runners
from fal_scheduler.core.stops import stop
from fal_scheduler.core.work import Work


def roll(work: Work, app: App, current: Runners, old: Runners, wanted: int) -> None:
    """Old runners go as new ones become ready. Drained for an operator's apply, so never held back."""
    needed = max(0, wanted - len(current.ready))  # old runners that must go on
    surplus = [(runner, Goal.DRAIN) for runner in old.ready[needed:]]
    surplus += [(runner, Goal.STOP) for runner in old.starting[max(0, needed - len(old.ready)) :]]
    for runner in old.unplaced:
        stop(work, runner, Goal.STOP, "")
    for runner, goal in surplus:
        stop(work, runner, goal, f"replaced by revision {app.revision}")
