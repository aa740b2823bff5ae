"""Swap before start: an app that wants a runner may get a place in a live one of its share group. Pure.

    join    = stage + load + evicted        files that its node lacks; what is not loaded there; what has to go for it
    start   = ready_at of the best place    a container, where there is a place at all

The cheaper wins, in milliseconds. `evicted` is what bringing those back costs, as likely as they are asked for within
the time that they would have been kept: the least valuable for each GiB go first (`keep_warm.value`), and only where
device memory is short. A runner is a candidate while it serves, has no request, and each app bound to it has runners to
spare; where there is no place for a container at all, also one that its apps keep for themselves, if nothing has to go
from it. How long loads take is learnt (family "load") from what nodes tell of each.

When an app needs its place no more, its binding goes and what nobody else needs is let go; with the last binding the
runner ends as any other. A model that does not load costs its binding, and its app shares no runner for a while.
Called by `starts`, `stops` and `news`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from fal_contract.ids import team_of
from fal_contract.limits import RESIDENTS_MAX
from fal_scheduler.core import quotas
from fal_scheduler.core.bindings import (
    LOADED,
    failure_of,
    needs_of,
    residencies_of,
    same_engine,
    serves_app,
    shareable,
)
from fal_scheduler.core.explain import model_awaited
from fal_scheduler.core.gpu_faults import faulty
from fal_scheduler.core.place import Placer
from fal_scheduler.core.ranking import READY_MAX_MS, Ask
from fal_scheduler.core.ready_at import NEVER_MS, predict, ready_ms
from fal_scheduler.core.records import App, Binding, Goal, Residency, Revision, Runner
from fal_scheduler.core.scaling import needed
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health, Resident, RunnerStatus
from fal_scheduler.core.work import Work

ROOM_PERC: Final = 80  # of device memory for weights; the rest is for what requests need
BARRED_S: Final = 300.0  # after a model did not load in a runner, its app gets containers of its own
CANDIDATES_MAX: Final = 64
UNREACHED_MS: Final = READY_MAX_MS // 2  # files that nobody is known to reach: no worse than in a container
GIB: Final = 1 << 30
_MINUTE_PPM: Final = 60_000_000  # a request a second, in millionths of a request per minute


@dataclass(frozen=True, slots=True)
class Option:
    """A place in a live runner, with what it costs in ms. `evicted`: ids of residencies that have to go."""

    runner: Runner
    stage_ms: int
    load_ms: int
    evicted_ms: int
    evicted: tuple[str, ...] = ()
    spare: bool = True

    @property
    def total_ms(self) -> int:
        """What the choice is made by."""
        return self.stage_ms + self.load_ms + self.evicted_ms

    @property
    def order(self) -> tuple[int, int, str]:
        """The cheapest first, of equals the one that loses least."""
        return self.total_ms, len(self.evicted), self.runner.id


# --- choosing -------------------------------------------------------------------------------------------------------


def join(work: Work, placer: Placer, app: App, revision: Revision, ask: Ask) -> bool:
    """Bind the app to a live runner of its group, where that is sooner than a container of its own. True: done."""
    state, spec = work.state, revision.spec
    if not shareable(spec) or state.hold_all or not state.settled or work.full or model_awaited(state, spec):
        return False
    if state.sharing_barred_s.get(app.id, 0.0) > work.moment.now_s:
        return False
    found = sorted(options(work, app.id, revision), key=lambda one: one.order)
    if not found:
        return False
    start_ms = _start_ms(state, placer, app.id, revision, ask)
    best = next((one for one in found if one.spare), None)
    if best is None and start_ms >= NEVER_MS:
        best = next((one for one in found if not one.evicted), None)
    if best is None or best.total_ms >= start_ms:
        return False
    _bind(work, app.id, revision, best, start_ms)
    return True


def options(work: Work, app_id: str, revision: Revision) -> Iterable[Option]:
    """Every place in a live runner that the app could have now."""
    state = work.state
    team, group = team_of(app_id), revision.spec.share_group
    looked = 0
    for runner_id in state.runners_by_group.get((team, group), ()):
        runner = state.runners[runner_id]
        if app_id in runner.apps or not _open(state, runner, revision):
            continue
        looked += 1
        if looked > CANDIDATES_MAX:
            return
        if (option := _option(work, app_id, revision, runner)) is not None:
            yield option


def _open(state: State, runner: Runner, revision: Revision) -> bool:
    status, live = state.status_of(runner), state.live.get(runner.node)
    if status is None or live is None or not status.serves or status.in_flight or status.wounded:
        return False
    if runner.goal is not Goal.RUN or live.hold or state.health_of(runner.node) is not Health.READY:
        return False
    node = state.nodes.get(runner.node)
    if runner.id in state.frozen or runner.id in state.abandoned or node is None or node.drain is not None:
        return False
    if faulty(state, runner) or len(runner.bindings) >= RESIDENTS_MAX or (runner.residencies and not status.residents):
        return False
    first = state.revisions.get((runner.app, runner.revision))
    if first is None or not same_engine(revision.spec, first.spec):
        return False
    return all(serves_app(state, runner, app_id) for app_id in runner.apps)  # one change at a time


def _option(work: Work, app_id: str, revision: Revision, runner: Runner) -> Option | None:
    state = work.state
    status = state.status_of(runner)
    assert status is not None
    here = {one.id: one for one in status.residents if one.state == LOADED}
    missing = [one for one in residencies_of(state, revision.spec) if one.id not in here]
    evicted = _evicted(work, runner, here, sum(_bytes(state, one) for one in missing))
    if evicted is None or len(runner.residencies) + len(missing) - len(evicted) > RESIDENTS_MAX:
        return None
    stage_ms = predict(state, runner.node, revision.spec, app=app_id).ms("weights") if missing else 0
    stage_ms = min(stage_ms, UNREACHED_MS)
    return Option(
        runner,
        stage_ms,
        sum(load_ms(state, runner, one) for one in missing),
        sum(_loss_ms(work, runner, id_) for id_ in evicted),
        tuple(evicted),
        all(_spares(work, one) for one in runner.apps),
    )


def _spares(work: Work, app_id: str) -> bool:
    """Whether an app has more runners ready than it asks for."""
    state, moment = work.state, work.moment
    app = state.apps.get(app_id)
    if app is None:
        return True
    mine = (state.runners[id_] for id_ in state.runners_by_app.get(app_id, ()))
    ready = sum(1 for one in mine if one.goal is Goal.RUN and serves_app(state, one, app_id))
    return ready > needed(state, app, state.scaling_of(app), moment.now_s, moment.wall_s).runners


def _start_ms(state: State, placer: Placer, app_id: str, revision: Revision, ask: Ask) -> int:
    """When a container of its own would be ready; NEVER_MS where it may not have one now."""
    if quotas.refusal(state, team_of(app_id), revision.spec):
        return NEVER_MS
    found = placer.place(revision.spec, ask, lambda spec, nodes: ready_ms(state, spec, nodes, app=app_id))
    return found.ready_ms if found is not None else NEVER_MS


# --- room on the device ---------------------------------------------------------------------------------------------


def room_bytes(state: State, runner: Runner) -> int:
    """Bytes of weights that a runner may hold: a share of its GPUs' memory, else of its own; 0: no bound is known."""
    facts = state.fleet.facts.get(runner.node)
    sizes = {gpu.id: gpu.memory_bytes for gpu in facts.gpus} if facts is not None else {}
    device = sum(sizes.get(gpu, 0) for gpu in runner.gpus) * (runner.gpu_milli or 1000) // 1000
    return (device or runner.memory_bytes) * ROOM_PERC // 100


def _bytes(state: State, one: Residency) -> int:
    model = state.models.get(one.model)
    return model.bytes if model is not None else 0


def _evicted(work: Work, runner: Runner, here: dict[str, Resident], size: int) -> list[str] | None:
    """What has to go, the least valuable first, so that `size` bytes find room; None where they never would."""
    state = work.state
    room = room_bytes(state, runner)
    held = {one.id: max(_bytes(state, one), here[one.id].bytes if one.id in here else 0) for one in runner.residencies}
    if not room or sum(held.values()) + size <= room:
        return []
    if size > room:
        return None
    models = [one for one in runner.residencies if not one.base]  # their LoRAs go with them
    order = sorted(models, key=lambda one: (_value(work, runner, one, held[one.id]), one.id))
    gone: list[str] = []
    left = sum(held.values())
    for one in order:
        with_it = [other.id for other in runner.residencies if other.id == one.id or other.base == one.model]
        gone += with_it
        left -= sum(held[id_] for id_ in with_it)
        if left + size <= room:
            return gone
    return None


def _users(state: State, runner: Runner, residency_id: str) -> list[str]:
    return [app_id for app_id in runner.apps if residency_id in needs_of(state, runner, app_id)]


def _value(work: Work, runner: Runner, one: Residency, size: int) -> int:
    """(Arrivals x time to bring it back) for each GiB, as `keep_warm` has it."""
    state = work.state
    rate = sum(state.demand.rate(app_id, work.moment.wall_s) for app_id in _users(state, runner, one.id))
    return rate * max(1, load_ms(state, runner, one)) * GIB // max(1, size)


def _loss_ms(work: Work, runner: Runner, residency_id: str) -> int:
    """What it costs to have let one go: its load, as likely as it is asked for while it would have been kept."""
    state = work.state
    one = next(one for one in runner.residencies if one.id == residency_id)
    loss = 0
    for app_id in _users(state, runner, residency_id):
        kept_s = int(state.scaling_of(state.apps[app_id]).keep_alive_s) if app_id in state.apps else 0
        expected_ppm = min(1_000_000, state.demand.rate(app_id, work.moment.wall_s) * kept_s // 60)
        loss = max(loss, expected_ppm * load_ms(state, runner, one) // 1_000_000)
    return loss


# --- how long a load takes ------------------------------------------------------------------------------------------


def load_ms(state: State, runner: Runner, one: Residency) -> int:
    """What loading one into a live worker takes, its files being there."""
    return state.learning.at(_family(state, runner), _bytes(state, one) >> 10, (f"model/{one.model}",))


def _family(state: State, runner: Runner) -> str:
    facts = state.fleet.facts.get(runner.node)
    return f"load/{facts.gpus[0].model if facts is not None and facts.gpus and runner.gpus else ''}"


def note_residents(work: Work, runner: Runner, before: RunnerStatus | None, status: RunnerStatus) -> None:
    """A node told what a runner has loaded: learn, and let go of bindings whose models cannot be loaded."""
    state = work.state
    old = {one.id: one.state for one in before.residents} if before is not None else {}
    by_id = {one.id: one for one in runner.residencies}
    for told in status.residents:
        one = by_id.get(told.id)
        if one is not None and told.state == LOADED and old.get(told.id) != LOADED and told.load_seconds > 0.0:
            took_ms = round(told.load_seconds * 1000)
            subjects = (f"model/{one.model}",)
            kib = _bytes(state, one) >> 10
            state.learning.learn(_family(state, runner), kib, took_ms, subjects, wall_s=int(work.moment.wall_s))
            facts = {"load_ms": str(took_ms), "stage_ms": str(round(told.stage_seconds * 1000))}
            work.log("MODEL_LOADED", runner.id, f"{one.model} is loaded", **facts)
    for app_id in runner.apps:
        _unless_failed(work, runner.id, app_id)
    state.dirty.update(dict.fromkeys(runner.apps))


def _unless_failed(work: Work, runner_id: str, app_id: str) -> None:
    state = work.state
    runner = state.runners[runner_id]
    why = failure_of(state, runner, app_id) if app_id in runner.apps else ""
    if not why:
        return
    state.sharing_barred_s[app_id] = work.moment.now_s + BARRED_S
    work.log("MODEL_NOT_LOADED", runner_id, f"{app_id} gets a container of its own: {why}")
    if len(runner.bindings) > 1:
        unbind(work, runner, app_id, f"its model was not loaded: {why}")
    elif not work.full:  # the runner is sound, and serves nobody: its app makes another
        work.put(replace(runner, goal=Goal.DRAIN, goal_reason=f"serves no app: {why}"), runner)


# --- bindings -------------------------------------------------------------------------------------------------------


def _bind(work: Work, app_id: str, revision: Revision, option: Option, start_ms: int) -> None:
    state, runner = work.state, option.runner
    gone = set(option.evicted)
    left = [one for one in runner.bindings if gone.isdisjoint(needs_of(state, runner, one.app))]
    fresh = residencies_of(state, revision.spec)
    kept = [one for one in runner.residencies if one.id not in gone]
    ids = {one.id for one in kept}
    binding = Binding(app_id, revision.number, fresh[0].id if fresh else "")
    after = replace(
        runner,
        bindings=(*left, binding),
        residencies=(*kept, *(one for one in fresh if one.id not in ids)),
    )
    work.put(_trimmed(state, after), runner)
    state.demand.begin_binding(runner.id, app_id, work.moment.now_s)
    known = start_ms < READY_MAX_MS
    against = f"a container would take {start_ms / 1000:.1f} s" if known else "when a container would is not known"
    facts = {
        "stage_ms": str(option.stage_ms), "load_ms": str(option.load_ms), "evicted_ms": str(option.evicted_ms),
        "start_ms": str(min(start_ms, NEVER_MS)), "node": runner.node, "app": app_id,
    }  # fmt: skip
    if gone:
        facts["evicted"] = ",".join(option.evicted)
    when = f"in {option.total_ms / 1000:.1f} s" if option.stage_ms < UNREACHED_MS else "once its files are there"
    work.log("RUNNER_SHARED", runner.id, f"serves {app_id} {when}; {against}", **facts)


def unbind(work: Work, runner: Runner, app_id: str, why: str) -> None:
    """An app gives its place in a shared runner up; what nobody else needs there is let go. Not its last binding."""
    left = tuple(one for one in runner.bindings if one.app != app_id)
    assert left, f"{runner.id} would serve nobody"
    work.put(_trimmed(work.state, replace(runner, bindings=left)), runner)
    work.state.demand.end_binding(runner.id, app_id)
    work.log("RUNNER_UNSHARED", runner.id, f"serves {app_id} no more: {why}", app=app_id)


def _trimmed(state: State, runner: Runner) -> Runner:
    """Without residencies that no binding needs."""
    needed_ids = {id_ for app_id in runner.apps for id_ in needs_of(state, runner, app_id)}
    return replace(runner, residencies=tuple(one for one in runner.residencies if one.id in needed_ids))


__all__ = [
    "BARRED_S",
    "ROOM_PERC",
    "Option",
    "join",
    "load_ms",
    "note_residents",
    "options",
    "room_bytes",
    "unbind",
]
