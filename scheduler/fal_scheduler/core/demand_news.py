"""What gateways ask for, taken in. Pure. Called by `step`.

A gateway tells everything that it asks for each time; what it leaves out is over. Demand for apps that do not exist
is not kept: their gateways are refused.
"""

from __future__ import annotations

from typing import Final

from fal_contract.ids import team_of
from fal_scheduler.core.bindings import shared
from fal_scheduler.core.demand import GatewayLoad
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.forecast import Arrivals
from fal_scheduler.core.records import Runner
from fal_scheduler.core.told import RunnerStatus
from fal_scheduler.core.work import Work

# Ages are told with every word; a start of waiting that moved by less is the same.
_SAME_S: Final = 0.5


def told(work: Work, event: DemandTold) -> None:
    """A gateway tells its demand."""
    state, demand = work.state, work.state.demand
    groups: dict[str, list[AppDemand]] = {}
    for one in event.demands:
        if one.app in state.apps:
            groups.setdefault(one.app, []).append(one)
    for app_id in list(demand.apps_of.get(event.gateway_id, ())):
        if app_id not in groups and demand.set_load(app_id, event.gateway_id, None):
            state.dirty[app_id] = None
    for app_id, group in groups.items():
        _note_arrivals(work, app_id, sum(one.arrived for one in group))
        load = _load(group, event.arrived_s)
        have = demand.loads.get(app_id, {}).get(event.gateway_id)
        if have is not None and abs(have.since_s - load.since_s) < _SAME_S:
            load.since_s = have.since_s
        if not load.slots and not load.queued:
            if have is not None and demand.set_load(app_id, event.gateway_id, None):
                state.dirty[app_id] = None
        elif demand.set_load(app_id, event.gateway_id, load):
            state.dirty[app_id] = None


def _load(group: list[AppDemand], arrived_s: float) -> GatewayLoad:
    waiting = [one for one in group if one.queued]
    return GatewayLoad(
        slots=sum(one.in_flight for one in group),
        queued=sum(one.queued for one in waiting),
        since_s=min((arrived_s - one.oldest_age_ms / 1000 for one in waiting), default=0.0),
        priority=max((one.priority for one in waiting), default=0),
    )


def _note_arrivals(work: Work, app_id: str, count: int) -> None:
    if count > 0:
        arrivals = work.state.demand.arrivals.setdefault(app_id, Arrivals())
        arrivals.note(count, work.moment.wall_s)


def note_status(work: Work, runner: Runner, before: RunnerStatus | None, status: RunnerStatus) -> None:
    """A node told of a runner: where requests began or ended, its app is looked at with the next tick.

    Not at once: a busy fleet tells of requests all the time, and nothing that scales is in a hurry when one ends.
    """
    demand, now_s = work.state.demand, work.moment.now_s
    demand.note_status(runner.app, status, now_s)
    demand.note_shared(runner.apps, status, before.served if before is not None else status.served, now_s)
    if status.serves and before is not None and not before.serves:
        took_s = sum(seconds for _, seconds in status.phases) or work.moment.wall_s - runner.created_at_s
        demand.note_ready(runner.app, max(0, round(took_s * 1000)))
    if before is None or (before.in_flight, before.serves) != (status.in_flight, status.serves):
        for app_id in runner.apps:
            demand.look(app_id, now_s)
        if shared(runner):
            _wake_group(work, runner)


def _wake_group(work: Work, runner: Runner) -> None:
    """A shared runner became ready or idle: apps of its group that wait for a place may get one in it."""
    state = work.state
    for runner_id in state.runners_by_group.get((team_of(runner.id), runner.share_group), ()):
        one = state.runners[runner_id]
        if not one.node:
            state.demand.look(one.app, work.moment.now_s)


__all__ = ["note_status", "told"]
