"""Runners are made and placed: the one place where a record gets its node, its GPUs and its assignment. Pure.

Called by `reconcile`. Nothing is placed while the store is suspected or a new leader has not heard its nodes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from fal_contract.ids import team_of
from fal_scheduler.core import quotas, waiting
from fal_scheduler.core.bindings import residencies_of
from fal_scheduler.core.events import AppChanged
from fal_scheduler.core.explain import model_awaited, why_pending
from fal_scheduler.core.fleet_fragments import fragments_of
from fal_scheduler.core.gpu_faults import generation_of
from fal_scheduler.core.place import Ask, Placer
from fal_scheduler.core.preemption import keep_free_no_more, preempt
from fal_scheduler.core.ranking import ReadyFn
from fal_scheduler.core.ready_at import ready_ms
from fal_scheduler.core.records import App, AssignmentRef, Binding, Revision, Runner
from fal_scheduler.core.rollout import not_begun
from fal_scheduler.core.scaling import in_grace
from fal_scheduler.core.sharing import join
from fal_scheduler.core.state import Pending, State
from fal_scheduler.core.told import Backoff
from fal_scheduler.core.waiting import enter, first_able, reserved_for_others
from fal_scheduler.core.waiting_line import PLACE, QUOTA, affinity_of, need_of
from fal_scheduler.core.work import Work

PENDING_TEXT_AGE_S: Final = 1.0  # how often the reason of a pending runner is worked out anew


def backoff_of(work: Work, app_id: str, revision: int) -> Backoff | None:
    """The app's backoff while it lasts, see `waiting.backoff_of`."""
    return waiting.backoff_of(work.state, app_id, revision, work.moment.now_s)


def grow(work: Work, placer: Placer, app: App, revision: Revision, missing: int) -> None:
    """Make runners, placed where a node can be found: one commit then holds wish, reservation and assignment."""
    if backoff_of(work, app.id, revision.number) is not None:
        return
    for _ in range(missing):
        if work.full:
            work.state.dirty[app.id] = None
            return
        if join(work, placer, app, revision, ask_of(work, app.id)):
            _wake_company(work.state, app.id)
            continue
        runner = new_runner(work, app, revision)
        assigned = placed(work, placer, runner, revision)
        work.put(assigned or runner, None)
        if assigned is None:
            note_pending(work, runner, revision)


def new_runner(work: Work, app: App, revision: Revision) -> Runner:
    """A runner of `revision` without a node, not stored yet."""
    spec = revision.spec
    residencies = residencies_of(work.state, spec)
    return Runner(
        id=f"{app.id}-{work.ids.suffix()}",
        share_group=spec.share_group or app.id,
        bindings=(Binding(app.id, revision.number, residencies[0].id if residencies else ""),),
        created_at_s=work.moment.wall_s,
        residencies=residencies,
    )


def place_waiting(work: Work, placer: Placer, app: App, revision: Revision, unplaced: list[Runner]) -> None:
    """Try again for runners without a node; all of an app want the same, so the first failure ends it."""
    if backoff_of(work, app.id, revision.number) is None:
        for runner in unplaced:
            if work.full:
                work.state.dirty[app.id] = None
                break
            if join(work, placer, app, revision, ask_of(work, app.id)):
                work.drop(runner)
                continue
            assigned = placed(work, placer, runner, revision)
            if assigned is None:
                note_pending(work, runner, revision)
                break
            work.put(assigned, runner)
            keep_free_no_more(work, app.id)
    state = work.state
    mine = (state.runners[id_] for id_ in state.runners_by_app.get(app.id, ()))
    left = [runner.created_at_s for runner in mine if not runner.node]
    if left or backoff_of(work, app.id, revision.number) is not None:  # the tick that ends the backoff looks again
        enter(state, app.id, revision.spec, min(left, default=work.moment.wall_s))
    else:
        state.waiting.pop(app.id)
        if not not_begun(state, app.id, revision.number):
            state.pending.pop((app.id, revision.number), None)


def take_room(work: Work, app: App, revision: Revision) -> None:
    """Who waits in front of all others that could start now may take a place from what has less right to it.

    Idle runners give way before anything is taken from those that are used (`keep_warm.make_room`).
    """
    state, need = work.state, need_of(revision.spec, team_of(app.id))
    if state.waiting.asleep.get(need) != PLACE or first_able(state, need, work.moment.now_s) != app.id:
        return
    if state.hold_all or not state.settled or in_grace(state, work.moment.now_s) or model_awaited(state, revision.spec):
        return
    if app.id not in state.demand.gave_way.values():
        preempt(work, app, revision.spec)


def placed(
    work: Work,
    placer: Placer,
    runner: Runner,
    revision: Revision,
    *,
    urgent: bool | None = None,
    avoid: frozenset[str] = frozenset(),
) -> Runner | None:
    """The runner on the best node, assigned; None where there is none, or a model may not be used.

    `urgent`: somebody waits for it (None: where requests of the app wait), else price decides before time. `avoid`: ids
    of nodes that will not do.
    """
    state, spec = work.state, revision.spec
    if state.hold_all or not state.settled or model_awaited(state, spec):
        return None
    need = need_of(spec, team_of(runner.app))
    if need in state.waiting.asleep and not avoid and runner.app not in state.reserved.values():
        return None  # nothing has changed that could admit one of its class
    if quotas.refusal(state, team_of(runner.app), spec):
        enter(state, runner.app, spec, runner.created_at_s)
        state.waiting.sleep(need, QUOTA)
        return None
    if urgent is None:
        urgent = state.demand.queued(runner.app) > 0
    ask = ask_of(work, runner.app, urgent=urgent, avoid=avoid)
    found = placer.place(
        spec, ask, times_of(state, runner.app), lambda spec, rows: fragments_of(state).score(spec, rows)
    )
    if found is None:
        if not avoid:
            enter(state, runner.app, spec, runner.created_at_s)
            state.waiting.sleep(need, PLACE)
        return None
    terms = {name: str(value) for name, value in found.why}
    share = {"gpu_milli": str(found.gpu_milli)} if found.gpu_milli else {}
    held = {"node": found.node_id, "gpus": ",".join(found.gpus), **share}
    work.log("RUNNER_PLACED", runner.id, f"placed on {found.node_id}", **held, **terms)
    _wake_company(state, runner.app)
    return replace(
        runner,
        node=found.node_id,
        gpus=found.gpus,
        assignment=AssignmentRef(work.ids.suffix(), state.term, generation_of(state, found.node_id)),
        residencies=residencies_of(state, spec),
        memory_bytes=found.memory_bytes,
        cpu_milli=found.cpu_milli,
        gpu_milli=found.gpu_milli,
        priority=spec.priority,
    )


def _wake_company(state: State, app_id: str) -> None:
    """Apps that wait to be beside this one are tried again."""
    for need in list(state.waiting.asleep):
        if app_id in affinity_of(need):
            del state.waiting.asleep[need]
            state.awake[need] = None


def _wake_borrowers(state: State) -> None:
    """Who waits for its quota is tried again: nobody may be left who has a better right to what is free."""
    for need, why in list(state.waiting.asleep.items()):
        if why == QUOTA:
            del state.waiting.asleep[need]
            state.awake[need] = None


def times_of(state: State, app_id: str) -> ReadyFn:
    """When a runner of the app would be ready on each node, as placement wants to know it."""
    return lambda spec, node_ids: ready_ms(state, spec, node_ids, app=app_id)


def ask_of(work: Work, app_id: str, *, urgent: bool = True, avoid: frozenset[str] = frozenset()) -> Ask:
    """Who asks for a place, as placement wants to know it."""
    hold_s = work.state.lifetimes.get(app_id, 0)
    kept = reserved_for_others(work.state, app_id)
    return Ask(app_id, team_of(app_id), urgent, avoid | kept, work.moment.now_s, hold_s)


def note_pending(work: Work, runner: Runner, revision: Revision) -> None:
    """Keep why it has no node; worked out anew once a second at most, and once for all of one revision."""
    state, now_s = work.state, work.moment.now_s
    enter(state, runner.app, revision.spec, runner.created_at_s)
    key = (revision.app, revision.number)
    have = state.pending.get(key)
    if have is not None and now_s - have.found_at_s < PENDING_TEXT_AGE_S:
        return
    refused = quotas.refusal(state, team_of(runner.app), revision.spec)
    if awaited := model_awaited(state, revision.spec) or refused:
        counts = ((quotas.FILTER, 1),) if awaited == refused else ()
        state.pending[key] = Pending(awaited, refused=counts, found_at_s=now_s)
        if have is None or have.reason != awaited:
            work.emit(AppChanged(revision.app))
    elif state.explanations_left > 0:
        state.explanations_left -= 1
        found = replace(why_pending(state, revision.spec, ask_of(work, runner.app)), found_at_s=now_s)
        state.pending[key] = found
        if have is None or have.refused != found.refused:
            _wake_borrowers(state)
        work.emit(AppChanged(revision.app))
    elif have is None:  # the next tick works it out
        state.pending[key] = Pending("no node can take it now", found_at_s=float("-inf"))


def refresh_reasons(work: Work) -> None:
    """Work out anew, a few at a tick, why runners wait, where something has changed since."""
    state = work.state
    for app_id, number in list(state.pending):
        if not state.explanations_left:
            return
        revision, pending = state.revisions.get((app_id, number)), state.pending[app_id, number]
        if not_begun(state, app_id, number):
            continue
        if revision is None or app_id not in state.waiting or pending.found_at_s == math.inf:
            del state.pending[app_id, number]  # nobody waits with it any more
            continue
        if pending.found_at_s >= state.capacity_at_s:
            continue
        mine = (state.runners[id_] for id_ in state.runners_by_app.get(app_id, ()))
        runner = next((one for one in mine if not one.node and one.revision == number), None)
        if runner is not None:
            note_pending(work, runner, revision)
