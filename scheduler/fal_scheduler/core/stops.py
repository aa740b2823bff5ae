"""Runners are drained and stopped: which, in what order, and how many at once without an operator's word. Pure.

Called by `reconcile` and by commands. Stops that no operator asked for wait in a leader's first minutes, and wait for
a confirm when they are many.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fal_contract.limits import MASS_STOP_RUNNERS_MIN, MASS_STOP_SHARE
from fal_scheduler.core.disruption import allowed, leaving
from fal_scheduler.core.gpu_faults import dead, faulty
from fal_scheduler.core.records import App, Goal, Runner
from fal_scheduler.core.runner_groups import Runners
from fal_scheduler.core.scaling import in_grace, kept_until_s
from fal_scheduler.core.sharing import unbind
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health
from fal_scheduler.core.work import Work

STOPS_WINDOW_S: Final = 60.0


def shrink(work: Work, app: App, current: Runners, wanted: int) -> None:
    """Too many of one revision: first those without a node, then those that nobody uses, then those that start.

    Of idle ones the longest idle goes first; one with requests under way goes last, and drains. A runner that goes
    because its node says that nobody used it for the time that the app itself sets needs no confirm, however many.
    """
    surplus = current.count - wanted
    for runner in _youngest_first(current.unplaced)[:surplus]:
        if work.full:
            return
        work.drop(runner)
        current.unplaced.remove(runner)
        surplus -= 1
    doubles = _end_doubles(work, app, current, surplus)
    if doubles is None:
        return  # a confirm is waited for: until then nobody is chosen in their place
    surplus -= doubles
    unused, others = _by_use(work, app, current)
    for runner, why in unused[:surplus]:
        stop(work, runner, Goal.DRAIN, why, app=app.id)
    victims = others[: max(0, surplus - len(unused))]
    if victims and may_stop(work, app, len(victims)):
        for runner, goal in victims:
            why = f"{app.id} should have {wanted} runner{'' if wanted == 1 else 's'} now"
            stop(work, runner, goal, why, app=app.id)


def settle_returned(state: State, current: Runners) -> None:
    """No more run than should: whatever was replaced and came back has its place."""
    if state.returned:
        for runner in (*current.ready, *current.starting):
            state.returned.pop(runner.id, None)


def _end_doubles(work: Work, app: App, current: Runners, surplus: int) -> int | None:
    """Nodes came back whose runners were replaced: what only starts is stopped, else the newer one drains.

    So what served all the time stays, with its caches and its requests. Returns how many have ended; None: they wait.
    """
    state = work.state
    back = [runner for runner in (*current.ready, *current.starting) if runner.id in state.returned]
    serving = [runner for runner in current.ready if state.health_of(runner.node) is Health.READY]
    if not back or not serving or surplus <= 0:
        return 0
    since_s = min(runner.created_at_s for runner in back)
    newer = [one for one in current.ready if one.created_at_s > since_s and one.id not in state.returned]
    doubles = [(one, Goal.STOP) for one in _youngest_first(current.starting)]
    doubles += [(one, Goal.DRAIN) for one in _youngest_first(newer)]
    doubles = doubles[: min(surplus, len(back))]
    if not doubles:
        return 0
    if not may_stop(work, app, len(doubles)):
        return None
    for runner, goal in doubles:
        stop(work, runner, goal, "the runner that it stood in for is back", app=app.id)
    for group in (current.starting, current.ready):
        group[:] = [runner for runner in group if state.runners[runner.id].goal is Goal.RUN]
    return len(doubles)


def _by_use(work: Work, app: App, current: Runners) -> tuple[list[tuple[Runner, str]], list[tuple[Runner, Goal]]]:
    """Runners that nobody used for long enough, with why they go; the others, with how they would."""
    state, now_s = work.state, work.moment.now_s
    scaling = state.scaling_of(app)
    idle, busy, unused = [], [], []
    for runner in current.ready:
        status, usage = state.status_of(runner), state.demand.usage_of(runner.id, now_s, app.id)
        if kept_until_s(state, scaling, runner, now_s, app.id) <= now_s and app.id not in state.asked:
            unused.append((usage.idle_since_s, runner.id, runner, usage.unused))
        elif status is not None and not status.in_flight:
            since_s = -runner.created_at_s if usage.unused else usage.used_at_s
            idle.append((not usage.unused, since_s, runner.id, runner))
        else:
            busy.append(runner)
    gone = [
        (runner, f"no request came in {now_s - since_s:.0f} s" if never else f"idle for {now_s - since_s:.0f} s")
        for since_s, _, runner, never in sorted(unused, key=lambda one: one[:2])
    ]
    others = [(runner, Goal.STOP) for runner in _youngest_first(current.starting)]
    others += [(runner, Goal.DRAIN) for *_, runner in sorted(idle, key=lambda one: one[:3])]
    others += [(runner, Goal.DRAIN) for runner in _youngest_first(busy)]
    return gone, others


def relieve(work: Work, app: App, current: Runners, wanted: int) -> int:
    """Drain runners whose place others have taken; how many more than wanted there may be for those that must go yet.

    They must go because they are wounded (one at a time), hold a quarantined GPU, or leave a node that is drained (as
    many at once as the app's disturbed share allows). Runners on silent nodes count as little: a replacement that
    nobody can reach replaces nobody.
    """
    state = work.state
    _stop_useless(work, app, current)
    going = {runner.id: why for runner in current.ready if (why := leaving(state, runner) or _wounded(state, runner))}
    if not going:
        return 0
    sound = sum(1 for one in current.ready if one.id not in going and state.health_of(one.node) is Health.READY)
    replaced = [runner for runner in current.ready if runner.id in going][max(0, wanted - sound) :]
    drained = [runner for runner in replaced if leaving(state, runner)]
    for runner in drained[: allowed(state, app.id, wanted)]:  # an operator or the cloud asked
        stop(work, runner, Goal.DRAIN, f"replaced: {going[runner.id]}", app=app.id)
    others = [runner for runner in replaced if not leaving(state, runner)]
    if others and may_stop(work, app, len(others)):
        for runner in others:
            stop(work, runner, Goal.DRAIN, f"replaced: {going[runner.id]}", app=app.id)
    current.ready = [runner for runner in current.ready if _serves_on(state, runner, app.id)]
    left = [runner for runner in current.ready if runner.id in going]
    drains = sum(1 for runner in left if leaving(state, runner))
    return max(min(1, len(left)), min(drains, allowed(state, app.id, wanted)))


def _wounded(state: State, runner: Runner) -> str:
    """Why another should take its place while it serves; empty: none should."""
    if fault := faulty(state, runner):
        return fault
    status = state.status_of(runner)
    if status is None or not (status.serves and status.wounded):
        return ""
    return status.reason or "its container is wounded"


def _stop_useless(work: Work, app: App, current: Runners) -> None:
    """Stop at once what a quarantined GPU lets never serve: runners of a dead one, and those that only start.

    A node's word about its own hardware is no guess of a new leader's, so it does not wait for the end of its grace.
    """
    state = work.state
    for runner in [one for one in current.starting if leaving(state, one)]:
        stop(work, runner, Goal.STOP, f"started elsewhere: {leaving(state, runner)}")
    current.starting = [runner for runner in current.starting if state.runners[runner.id].goal is Goal.RUN]
    useless = [runner for runner in current.starting if faulty(state, runner)]
    useless += [runner for runner in current.ready if dead(state, runner)]
    if not useless or not may_stop(work, app, len(useless), grace=False):
        return
    for runner in useless:
        stop(work, runner, Goal.STOP, f"replaced: {faulty(state, runner)}")
    for group in (current.starting, current.ready):
        group[:] = [runner for runner in group if state.runners[runner.id].goal is Goal.RUN]


def _youngest_first(runners: list[Runner]) -> list[Runner]:
    return sorted(runners, key=lambda runner: (-runner.created_at_s, runner.id))


def may_stop(work: Work, app: App, count: int, *, grace: bool = True) -> bool:
    """Whether `count` runners may be stopped now; a stop that an operator asked for always may.

    `grace`: not in a leader's first minutes.
    """
    state, now_s = work.state, work.moment.now_s
    if app.id in state.asked:
        state.stops_held.pop(app.id, None)
        return True
    if grace and in_grace(state, now_s):
        return False  # the tick that ends the grace makes every app dirty
    recent = state.stops_recent
    while recent and now_s - recent[0] > STOPS_WINDOW_S:
        recent.popleft()
    allowed = max(MASS_STOP_RUNNERS_MIN, int(len(state.runners) * MASS_STOP_SHARE))
    if len(recent) + count > allowed:
        state.stops_held[app.id] = None
        work.alarm(
            "MASS_STOP",
            "cluster",
            f"{count} runners of {app.id} would be stopped, {len(recent)} were in the last minute; {allowed} may be",
            "Look at `falctl app show`, then `falctl operator confirm stops`.",
        )
        return False
    recent.extend([now_s] * count)
    state.stops_held.pop(app.id, None)
    return True


def _serves_on(state: State, runner: Runner, app_id: str) -> bool:
    have = state.runners[runner.id]
    return have.goal is Goal.RUN and app_id in have.apps


def stop(work: Work, runner: Runner, goal: Goal, why: str, *, app: str = "") -> None:
    """Raise a runner's goal; one without a node is forgotten.

    `app`: it ends for this app only; where it serves others, too, it serves on, or drains on.
    """
    live = work.state.live.get(runner.node)
    held = live is not None and live.hold and runner.app not in work.state.asked
    if held or runner.id in work.state.frozen:
        return
    if work.full:
        work.state.dirty[app or runner.app] = None
    elif app and len(runner.bindings) > 1:
        if runner.goal is Goal.RUN:  # one that leaves already ends by itself, and its bindings stay as they are
            unbind(work, runner, app, why)
    elif not runner.node:
        work.drop(runner)
    elif runner.goal < goal:
        work.put(replace(runner, goal=goal, goal_reason=why), runner)
        kind = {Goal.DRAIN: "RUNNER_DRAINING", Goal.STOP: "RUNNER_STOPPING", Goal.KILL: "RUNNER_STOPPING"}[goal]
        work.log(kind, runner.id, why)
