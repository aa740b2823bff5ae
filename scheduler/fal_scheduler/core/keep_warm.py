"""What is worth keeping: (arrivals x time to bring it back) for each GiB that it takes. Pure.

`value` is the one formula for all tiers: a runner that idles (the GiB of its GPUs), a model in memory or on disk (the
GiB of its files). `make_room` uses it where GPUs are scarce: while a request waits for an app that finds no place,
runners that idle and that nothing asks for (no floor, no buffer, no demand) end before their keep_alive, the least
valuable first, as many of one node as the waiting runner needs there, and no more before these are gone. Called by
`reconcile`. Without such a request keep_alive is what the operator set it to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from fal_scheduler.core.explain import model_awaited
from fal_scheduler.core.forecast import BRING_BACK_MS
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import App, Goal, Revision, Runner, Spec
from fal_scheduler.core.scaling import in_grace, needed
from fal_scheduler.core.starts import ask_of, backoff_of, times_of
from fal_scheduler.core.state import State
from fal_scheduler.core.stops import stop
from fal_scheduler.core.told import Health, Hold
from fal_scheduler.core.work import Work

IDLE_S: Final = 2.0  # a pause between two requests is no idleness
LOOK_S: Final = 1.0
LOOKS_PER_S: Final = 8  # of all apps that wait
LOOKED_AT_PER_S: Final = 20_000  # runners, by all of them: each look is at every runner
NODES_TRIED_MAX: Final = 16
GIB: Final = 1 << 30


class Idle(NamedTuple):
    """A runner that nothing asks for. `value`: what keeping it is worth, a number to compare."""

    runner: Runner
    value: int
    since_s: float


def value(rate: int, bring_back_ms: int, size_bytes: int) -> int:
    """Seconds of waiting that keeping it saves, by GiB and time, as an integer to compare.

    `rate`: millionths of a request per minute. What takes no room is worth keeping above everything that does.
    """
    return rate * max(1, bring_back_ms) * GIB // max(1, size_bytes)


class _Worth:
    """What runners are worth now; what many of them have in common is looked up once."""

    def __init__(self, state: State, wall_s: float) -> None:
        self._state, self._wall_s = state, wall_s
        self._sizes: dict[str, dict[str, int]] = {}  # node -> GPU -> bytes
        self._apps: dict[str, tuple[int, int]] = {}  # arrivals and time to bring back
        self._known: dict[tuple[tuple[str, ...], int], int] = {}  # apps and bytes -> worth

    def of(self, runner: Runner) -> int:
        """See `value_of`."""
        sizes = self._sizes.get(runner.node)
        if sizes is None:
            facts = self._state.fleet.facts.get(runner.node)
            sizes = {gpu.id: gpu.memory_bytes for gpu in facts.gpus} if facts is not None else {}
            self._sizes[runner.node] = sizes
        held_bytes = 0
        for gpu in runner.gpus:
            held_bytes += sizes.get(gpu, 0)
        size_bytes = held_bytes * (runner.gpu_milli or 1000) // 1000 or runner.memory_bytes
        key = runner.apps, size_bytes
        have = self._known.get(key)
        if have is None:
            have = self._known[key] = sum(value(*self._of_app(app_id), size_bytes) for app_id in runner.apps)
        return have

    def _of_app(self, app_id: str) -> tuple[int, int]:
        have = self._apps.get(app_id)
        if have is None:
            demand = self._state.demand
            have = demand.rate(app_id, self._wall_s), demand.bring_back_ms.get(app_id, BRING_BACK_MS)
            self._apps[app_id] = have
        return have


def value_of(state: State, runner: Runner, wall_s: float) -> int:
    """What keeping an idle runner is worth: by the device memory that it holds, else its memory."""
    return _Worth(state, wall_s).of(runner)


def make_room(work: Work, placer: Placer, app: App, revision: Revision) -> None:
    """Let idle runners of others end for an app for which a request waits and no place is free."""
    state, now_s = work.state, work.moment.now_s
    demand = state.demand
    unplaced = any(not state.runners[id_].node for id_ in state.runners_by_app.get(app.id, ()))
    if not unplaced or not demand.queued(app.id) or work.full or state.hold_all or not state.settled:
        return
    if backoff_of(work, app.id, revision.number) is not None or model_awaited(state, revision.spec):
        return
    pause_s = pause_of(len(state.waiting), len(state.runners))
    demand.look(app.id, now_s + pause_s)
    if now_s - demand.room_sought_s.get(app.id, -pause_s) < pause_s:
        return
    if others_looked(demand.room_sought_s.values(), len(state.runners), now_s):
        demand.look(app.id, now_s + LOOK_S)
        return
    demand.room_sought_s[app.id] = now_s
    if app.id in demand.gave_way.values() or in_grace(state, now_s):
        return  # those that give way already have to end first
    victims = _cheapest(work, placer, app.id, revision.spec, idle_runners(work, but=app.id))
    for one in victims:
        stop(work, one.runner, Goal.DRAIN, f"idle for {now_s - one.since_s:.0f} s; gives way to {app.id}")
        if state.runners[one.runner.id].goal is Goal.DRAIN:
            demand.gave_way[one.runner.id] = app.id


def pause_of(waiting: int, runners: int) -> float:
    """Seconds between two looks of one of so many waiting apps: twice what all their looks may take, so that none that
    is put off by `others_looked` is put off for ever."""
    return max(LOOK_S, waiting / LOOKS_PER_S, 2 * waiting * runners / LOOKED_AT_PER_S)


def others_looked(sought_s: Iterable[float], runners: int, now_s: float) -> bool:
    """Whether late looks were at so many runners that one more has to wait. One is always possible after a while."""
    late_s = max(LOOK_S, runners / LOOKED_AT_PER_S)
    late = sum(1 for at_s in sought_s if now_s - at_s < late_s)
    return late > 0 and (late + 1) * runners > LOOKED_AT_PER_S * late_s


def idle_runners(work: Work, *, but: str = "") -> list[Idle]:
    """Runners without a request that nothing asks for, the least valuable first.

    Looks at every runner, some microseconds each, so `make_room` asks the less often the more there are.
    """
    state, now_s, wall_s = work.state, work.moment.now_s, work.moment.wall_s
    found: list[Idle] = []
    times: Counter[str] = Counter()  # of a runner that several apps share all must have others
    worth, heard = _Worth(state, wall_s), dict[str, bool]()
    for app_id in sorted(state.demand.wanted):
        app = state.apps.get(app_id)
        if app is None or app_id == but or app.deleting or app.rollout is not None or app_id in state.frozen:
            continue
        ready, unused = _ready(state, app_id)
        spare = ready - needed(state, app, state.scaling_of(app), now_s, wall_s).runners if unused else 0
        if spare <= 0:
            continue
        idle = [one for runner in unused if (one := _idle(work, runner, worth, heard)) is not None]
        for one in sorted(idle, key=_order)[:spare]:
            times[one.runner.id] += 1
            if times[one.runner.id] == len(one.runner.apps):
                found.append(one)
    return sorted(found, key=_order)


def _order(one: Idle) -> tuple[int, float, str]:
    """The least valuable first, of equals the longest idle."""
    return one.value, one.since_s, one.runner.id


def _ready(state: State, app_id: str) -> tuple[int, list[Runner]]:
    """How many runners of the app serve, and those of them without a request."""
    ready, unused = 0, []
    for runner_id in state.runners_by_app.get(app_id, ()):
        runner = state.runners[runner_id]
        live = state.live.get(runner.node) if runner.goal is Goal.RUN else None
        status = live.statuses.get(runner_id) if live is not None else None
        if status is not None and status.serves:
            ready += 1
            if not status.in_flight:
                unused.append(runner)
    return ready, unused


def _idle(work: Work, runner: Runner, worth: _Worth, heard: dict[str, bool]) -> Idle | None:
    """`heard`: of nodes seen before whether they say what goes on there."""
    state, now_s = work.state, work.moment.now_s
    if runner.node not in heard:
        live = state.live.get(runner.node)
        held = live is not None and live.hold is not Hold.NONE
        heard[runner.node] = not held and state.health_of(runner.node) is Health.READY
    if not heard[runner.node] or runner.id in state.frozen:
        return None
    since_s = state.demand.usage_of(runner.id, now_s).idle_since_s
    return Idle(runner, worth.of(runner), since_s) if now_s - since_s >= IDLE_S else None


def _cheapest(work: Work, placer: Placer, app_id: str, spec: Spec, idle: list[Idle]) -> list[Idle]:
    """Of one node those whose end makes a place for `spec`, of least value together; none where no node would do."""
    by_node: dict[str, list[Idle]] = {}
    for one in idle:  # in order of value, so the nodes are in order of their least
        by_node.setdefault(one.runner.node, []).append(one)
    best: tuple[int, int, str] | None = None
    found: list[Idle] = []
    for node_id in list(by_node)[:NODES_TRIED_MAX]:
        victims = _enough(work, placer, app_id, spec, by_node[node_id])
        cost = (sum(one.value for one in victims), len(victims), node_id)
        if victims and (best is None or cost < best):
            best, found = cost, victims
    return found


def _enough(work: Work, placer: Placer, app_id: str, spec: Spec, idle: list[Idle]) -> list[Idle]:
    """The first of `idle`, all on one node, without which placement finds a place there; found out by trying."""
    fleet = work.state.fleet
    gone: list[Idle] = []
    placed = False
    for one in idle:
        runner = one.runner
        fleet.release(runner.node, runner.id, runner.gpus, runner.memory_bytes, runner.cpu_milli, runner.apps)
        gone.append(one)
        if placer.place(spec, ask_of(work, app_id), times_of(work.state, app_id)) is not None:
            placed = True
            break
    for one in reversed(gone):
        runner = one.runner
        holds = runner.gpus, runner.memory_bytes, runner.cpu_milli, runner.gpu_milli
        fleet.hold(runner.node, runner.id, *holds, runner.apps)
    if not placed:
        return []
    return gone


__all__ = ["Idle", "idle_runners", "make_room", "others_looked", "pause_of", "value", "value_of"]
