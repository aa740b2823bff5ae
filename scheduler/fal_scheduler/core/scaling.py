"""How many runners of an app should be there, by fal's rules. Pure. Called by `reconcile`, and by `step` at each tick.

    demand  = requests that wait or are under way, by what one runner handles at once (`max_multiplexing`), rounded up
    buffer  = max(concurrency_buffer, concurrency_buffer_perc % of these requests, rounded up), in runners
    desired = max(min_concurrency, demand + buffer, what the forecast asks for), never above max_concurrency

Runners beyond that are kept for a while: one that served for `keep_alive` after its last request, one that never had a
request for 10 s after it was ready, one that starts until it is ready. A request that waits counts once it has waited
`scaling_delay`; where no runner serves at all, one is started at once. Idleness is what nodes tell, so it survives a
failover; in a leader's first minutes nothing is judged by it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fal_contract.limits import FAILOVER_GRACE_S
from fal_scheduler.core.bindings import serves_app, shared
from fal_scheduler.core.forecast import BRING_BACK_MS, FORECAST_LOOK_S, foretold_runners
from fal_scheduler.core.records import App, Goal, Runner, Scaling
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health
from fal_scheduler.core.work import Work

CONTENDED_S: Final = 2.0  # that a request waits for a runner which its app shares, before another is asked for
UNUSED_S: Final = 10.0  # fal's: a new runner that never gets a request


@dataclass(frozen=True, slots=True)
class Need:
    """What demand asks for: runners, and when time alone may change it (monotonic; infinite: never)."""

    runners: int
    queued: int
    under_way: int
    again_at_s: float = math.inf


def runners_for(scaling: Scaling, requests: int, forecast: int = 0) -> int:
    """Runners for so many requests under way or waiting: the formulas above."""
    demand = -(-requests // max(1, scaling.max_multiplexing))
    buffer = max(scaling.concurrency_buffer, -(-requests * scaling.concurrency_buffer_perc // 100))
    return min(scaling.max_concurrency, max(scaling.min_concurrency, demand + buffer, forecast))


def desired(work: Work, app: App) -> int:
    """How many runners should be there now, those that are kept among them; looks again when time changes it.

    What is kept never raises the number: where more runners are there than were wanted (one that replaces another and
    the other, in a rollout) keep_alive is no reason for both.
    """
    state, now_s = work.state, work.moment.now_s
    scaling = state.scaling_of(app)
    need = needed(state, app, scaling, now_s, work.moment.wall_s)
    stay = _staying(state, app, scaling, now_s)
    starting = 0 if app.id in state.asked else stay.starting  # an operator's word needs no patience with these
    held = starting + max(stay.kept, min(need.runners, stay.ready))
    before = state.demand.wanted.get(app.id, stay.of_one_revision)
    wanted = min(scaling.max_concurrency, max(need.runners, min(held, before)))
    again_at_s = min(need.again_at_s, stay.again_at_s)
    if again_at_s < math.inf:
        state.demand.look(app.id, again_at_s)
    state.demand.wanted[app.id] = wanted
    return wanted


@dataclass(slots=True)
class _Staying:
    """An app's runners on nodes. `kept`: of the ready ones; `of_one_revision`: most that one revision has."""

    starting: int = 0
    ready: int = 0
    kept: int = 0
    of_one_revision: int = 0
    again_at_s: float = math.inf


def _staying(state: State, app: App, scaling: Scaling, now_s: float) -> _Staying:
    found, by_revision = _Staying(), Counter[int]()
    for runner in _running(state, app.id):
        if not runner.node:
            continue
        by_revision[runner.revision_for(app.id)] += 1
        if not _serves(state, runner, app.id):
            found.starting += 1
            continue
        found.ready += 1
        until_s = kept_until_s(state, scaling, runner, now_s, app.id)
        found.kept += until_s > now_s
        if until_s > now_s:
            found.again_at_s = min(found.again_at_s, until_s)
    found.of_one_revision = max(by_revision.values(), default=0)
    return found


def needed(state: State, app: App, scaling: Scaling, now_s: float, wall_s: float) -> Need:
    """What demand and forecast ask for."""
    queued, again_at_s = _queued(state, app, scaling, now_s)
    slots = state.demand.slots(app.id)
    under_way = min(slots, _under_way(state, app.id)) if slots else 0
    forecast = _foretold(state, app, scaling, queued + under_way, wall_s)
    if scaling.forecast_concurrency and app.id in state.demand.arrivals:
        again_at_s = min(again_at_s, now_s + FORECAST_LOOK_S)
    runners = runners_for(scaling, queued + under_way, forecast)
    if queued and (taken := _taken_by_others(state, app, now_s)):
        runners = min(scaling.max_concurrency, runners + taken)
    return Need(runners, queued, under_way, again_at_s)


def _taken_by_others(state: State, app: App, now_s: float) -> int:
    """Shared runners that other apps use while requests of this one have waited for a while: they are no help."""
    since_s = min((one.since_s for one in state.demand.loads.get(app.id, {}).values() if one.queued), default=now_s)
    if now_s - since_s < CONTENDED_S or state.demand.slots(app.id):
        return 0
    mine = [one for one in _running(state, app.id) if shared(one) and len(one.bindings) > 1]
    return sum(1 for one in mine if (status := state.status_of(one)) is not None and status.in_flight)


def _queued(state: State, app: App, scaling: Scaling, now_s: float) -> tuple[int, float]:
    """Waiting requests that count now, and when more of them will."""
    counted, waiting, again_at_s = 0, 0, math.inf
    for load in state.demand.loads.get(app.id, {}).values():
        waiting += load.queued
        due_s = load.since_s + scaling.scaling_delay_s
        if due_s <= now_s:
            counted += load.queued
        elif load.queued:
            again_at_s = min(again_at_s, due_s)
    if waiting and not counted and not any(_serves(state, one, app.id) for one in _running(state, app.id)):
        counted = 1  # nobody is there to pick it up
    return counted, again_at_s


def _under_way(state: State, app_id: str) -> int:
    statuses = (state.status_of(runner) for runner in _running(state, app_id) if runner.node)
    return sum(status.in_flight for status in statuses if status is not None)


def _running(state: State, app_id: str) -> Iterable[Runner]:
    """Runners that should serve. Those of lost nodes do not count."""
    runners = (state.runners[runner_id] for runner_id in state.runners_by_app.get(app_id, ()))
    return [one for one in runners if one.goal is Goal.RUN and one.id not in state.abandoned]


def _serves(state: State, runner: Runner, app_id: str) -> bool:
    """Ready when last heard; of a node that this leader has not heard yet its runners may well serve."""
    if not runner.node:
        return False
    live = state.live.get(runner.node)
    return live is None or not live.session_id or serves_app(state, runner, app_id)


def kept_until_s(state: State, scaling: Scaling, runner: Runner, now_s: float, app_id: str) -> float:
    """Until when a ready runner stays for an app that does not ask for it (monotonic; infinite: as things are now)."""
    status = state.status_of(runner)
    unheard = in_grace(state, now_s) and app_id not in state.asked  # an operator's word counts at any time
    if status is None or state.health_of(runner.node) is not Health.READY or unheard:
        return math.inf  # nobody knows whether it is idle
    if status.in_flight and (len(runner.bindings) == 1 or state.demand.slots(app_id)):
        return math.inf
    usage = state.demand.usage_of(runner.id, now_s, app_id)
    if usage.unused:
        return now_s if app_id in state.asked else usage.ready_at_s + UNUSED_S
    return usage.used_at_s + scaling.keep_alive_s


def in_grace(state: State, now_s: float) -> bool:
    """Whether this leader may not have heard yet what is in use."""
    return not state.grace_over and now_s - state.term_began_s < FAILOVER_GRACE_S


def tick(work: Work) -> None:
    """Apps for which time alone may have changed something are looked at."""
    demand, now_s = work.state.demand, work.moment.now_s
    due = [app_id for app_id, at_s in demand.look_at_s.items() if at_s <= now_s]
    for app_id in due:
        del demand.look_at_s[app_id]
        if app_id in work.state.apps:
            work.state.dirty[app_id] = None


# --- the forecast ---------------------------------------------------------------------------------------------------


def _foretold(state: State, app: App, scaling: Scaling, requests: int, wall_s: float) -> int:
    """Runners that the forecast asks for: at most `forecast_concurrency` more than demand alone."""
    arrivals = state.demand.arrivals.get(app.id)
    if not scaling.forecast_concurrency or arrivals is None:
        return 0
    arrivals.advance(wall_s)
    ahead_ms = state.demand.bring_back_ms.get(app.id, BRING_BACK_MS)
    expected = foretold_runners(
        arrivals.rate_at(wall_s + ahead_ms / 1000),
        ahead_ms,
        state.demand.request_ms(app.id),
        scaling.max_multiplexing,
    )
    return min(expected, runners_for(scaling, requests) + scaling.forecast_concurrency)


__all__ = [
    "UNUSED_S",
    "Need",
    "desired",
    "in_grace",
    "kept_until_s",
    "needed",
    "runners_for",
    "tick",
]
