"""From what should run to runners: too few are made and placed, too many drain, old revisions give way.

Pure. `reconcile` looks at one app, does at most what one step may change, and leaves the app dirty when there is more.
Rules it keeps:
- A new revision's runners come first; an old runner drains when a new one is ready in its place. A revision that
  cannot be placed therefore never takes down the one that serves.
- A runner whose container's monitor died is replaced first and drained then: one more than wanted is made, at most one
  at a time for each app, and only where a place for it is free. Where fewer are wanted it is the first to go.
- Stops that no operator asked for wait in a leader's first minutes, and wait for a confirm when they are many.
- Nothing is started or stopped by itself while the store is suspected, or on objects that broke an invariant.
Called by `step` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from fal_contract.limits import FAILOVER_GRACE_S, MASS_STOP_RUNNERS_MIN, MASS_STOP_SHARE
from fal_scheduler.core.builds import end_of_task
from fal_scheduler.core.events import AppChanged
from fal_scheduler.core.explain import model_awaited, why_pending
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import (
    App,
    AssignmentRef,
    Binding,
    Goal,
    ModelState,
    Residency,
    Revision,
    Runner,
    Spec,
)
from fal_scheduler.core.state import Pending, State
from fal_scheduler.core.told import Backoff, Health
from fal_scheduler.core.work import Work

PENDING_TEXT_AGE_S: Final = 1.0  # how often the reason of a pending runner is worked out anew
STOPS_WINDOW_S: Final = 60.0


@dataclass(slots=True)
class _Runners:
    """An app's runners that should serve, by what is to be done with them."""

    unplaced: list[Runner] = field(default_factory=list)  # no node: can go without anybody's notice
    starting: list[Runner] = field(default_factory=list)  # on a node, not ready yet
    ready: list[Runner] = field(default_factory=list)  # ready, or was when its node fell silent

    @property
    def count(self) -> int:
        return len(self.unplaced) + len(self.starting) + len(self.ready)


def reconcile(work: Work, placer: Placer, app_id: str) -> None:
    """Bring one app nearer to what it should be; it stays dirty where there is more to do."""
    state = work.state
    app = state.apps.get(app_id)
    if app is None or app_id in state.frozen:
        state.waiting.pop(app_id, None)
        return
    if app.deleting:
        _delete(work, app)
        return
    if state.hold_all and app_id not in work.state.asked:
        return
    revision = state.revision_of(app)
    if revision.spec.build is not None:
        _run_once(work, placer, app, revision)
        return
    _stop_withdrawn(work, app)
    current, old = _sort(work, app)
    wanted = desired(work, app)
    _replace_crashed(work, current)
    _roll(work, app, current, old, wanted)
    more = _relieve(work, app, current, wanted)
    if current.count <= wanted and state.stops_held.pop(app_id, "") is None and not state.stops_held:
        work.settle("MASS_STOP", "cluster")
    if current.count > wanted + more:
        _shrink(work, app, current, wanted + more)
    elif current.count < wanted:
        _grow(work, placer, app, revision, wanted - current.count)
    if not work.full:
        state.asked.pop(app_id, None)
    _place_waiting(work, placer, app, revision, current.unplaced)
    if more and current.count <= wanted:
        _replace_wounded(work, placer, app, revision)


def _run_once(work: Work, placer: Placer, app: App, revision: Revision) -> None:
    """A build task's one runner gets a node once; nothing replaces it."""
    assert revision.spec.build is not None
    if end_of_task(work, app, revision.spec.build):
        _delete(work, work.state.apps[app.id])
        return
    unplaced = [work.state.runners[id_] for id_ in work.state.runners_by_app.get(app.id, ())]
    _place_waiting(work, placer, app, revision, [runner for runner in unplaced if not runner.node])


def desired(work: Work, app: App) -> int:
    """How many runners should serve: the least in force, up to the most. Demand is added here by BRAIN."""
    scaling = work.state.scaling_of(app)
    return min(scaling.min_concurrency, scaling.max_concurrency)


def backoff_of(work: Work, app_id: str) -> Backoff | None:
    """The app's backoff while it lasts."""
    backoff = work.state.backoffs.get(app_id)
    return backoff if backoff is not None and work.moment.now_s < backoff.until_s else None


def _stop_withdrawn(work: Work, app: App) -> None:
    """Runners with a refused or revoked model end, serving or not; an operator's word or a proof asked for it.

    Those without a node stay and say what they wait for.
    """
    state = work.state
    reasons: dict[int, str] = {}
    for runner_id in list(state.runners_by_app.get(app.id, ())):
        runner = state.runners[runner_id]
        if runner.goal is not Goal.RUN or not runner.node:
            continue
        if runner.revision not in reasons:
            revision = state.revisions.get((app.id, runner.revision))
            reasons[runner.revision] = _withdrawn(state, revision.spec) if revision is not None else ""
        if why := reasons[runner.revision]:
            stop(work, runner, Goal.STOP, why)


def _withdrawn(state: State, spec: Spec) -> str:
    for name in spec.artifacts:
        model = state.models.get(name)
        if model is not None and model.withdrawn:
            word = "refused" if model.state is ModelState.REFUSED else "withdrawn"
            return f"{'image' if name == spec.image else 'model'} {name} was {word}: {model.reason}"
    return ""


def _sort(work: Work, app: App) -> tuple[_Runners, _Runners]:
    """Runners with goal RUN, of the current revision and of older ones. Those of lost nodes do not count."""
    state = work.state
    current, old = _Runners(), _Runners()
    for runner_id in state.runners_by_app.get(app.id, ()):
        runner = state.runners[runner_id]
        if runner.goal is not Goal.RUN or runner_id in state.abandoned:
            continue
        group = current if runner.revision == app.revision else old
        if not runner.node:
            group.unplaced.append(runner)
            continue
        status = state.status_of(runner)
        live = state.live.get(runner.node)
        # Of a node that this leader has not heard yet nothing is known: its runners may well serve.
        unheard = live is None or not live.session_id
        ready = unheard or (status is not None and status.serves)
        (group.ready if ready else group.starting).append(runner)
    return current, old


def _replace_crashed(work: Work, current: _Runners) -> None:
    """A crashed runner that has waited long enough is forgotten; growing makes a fresh one."""
    for runner in list(current.unplaced):
        if runner.id in work.state.failures and backoff_of(work, runner.app) is None and not work.full:
            work.drop(runner)
            current.unplaced.remove(runner)


def _roll(work: Work, app: App, current: _Runners, old: _Runners, wanted: int) -> None:
    """Old runners go as new ones become ready. Drained for an operator's apply, so never held back."""
    needed = max(0, wanted - len(current.ready))  # old runners that must go on
    surplus = [(runner, Goal.DRAIN) for runner in old.ready[needed:]]
    surplus += [(runner, Goal.STOP) for runner in old.starting[max(0, needed - len(old.ready)) :]]
    for runner in old.unplaced:
        stop(work, runner, Goal.STOP, "")
    for runner, goal in surplus:
        stop(work, runner, goal, f"replaced by revision {app.revision}")


def _shrink(work: Work, app: App, current: _Runners, wanted: int) -> None:
    """Too many of the current revision: first those without a node, then those that start, then the youngest."""
    surplus = current.count - wanted
    for runner in _youngest_first(current.unplaced)[:surplus]:
        if work.full:
            return
        work.drop(runner)
        current.unplaced.remove(runner)
        surplus -= 1
    victims = [(runner, Goal.STOP) for runner in _youngest_first(current.starting)]
    victims += [(runner, Goal.DRAIN) for runner in _youngest_first(current.ready)]
    victims = victims[:surplus]
    if victims and _may_stop(work, app, len(victims)):
        for runner, goal in victims:
            stop(work, runner, goal, f"{app.id} should have {wanted} runner{'' if wanted == 1 else 's'} now")


def _relieve(work: Work, app: App, current: _Runners, wanted: int) -> int:
    """Drain wounded runners that are not needed any more; how many more than wanted there may be for those that are.

    Runners on silent nodes count as little: a replacement that nobody can reach replaces nobody.
    """
    state = work.state
    wounded = [runner for runner in current.ready if _wounded(state, runner)]
    if not wounded:
        return 0
    sound = sum(1 for runner in current.ready if runner not in wounded and state.health_of(runner.node) is Health.READY)
    needed = max(0, wanted - sound)
    victims = wounded[needed:]
    if victims and _may_stop(work, app, len(victims)):
        for runner in victims:
            status = state.status_of(runner)
            why = status.reason if status is not None else ""
            stop(work, runner, Goal.DRAIN, f"replaced: {why or 'its container is wounded'}")
        current.ready = [runner for runner in current.ready if state.runners[runner.id].goal is Goal.RUN]
    return int(any(runner in current.ready for runner in wounded))


def _wounded(state: State, runner: Runner) -> bool:
    status = state.status_of(runner)
    return status is not None and status.serves and status.wounded


def _replace_wounded(work: Work, placer: Placer, app: App, revision: Revision) -> None:
    """One runner more than wanted, where a place is free; without one, nothing waits for it but this app."""
    state = work.state
    unplaced = any(not state.runners[id_].node for id_ in state.runners_by_app.get(app.id, ()))
    if work.full or unplaced or backoff_of(work, app.id) is not None:
        return
    runner = _new(work, app, revision)
    placed = _placed(work, placer, runner, revision)
    if placed is None:
        state.waiting[app.id] = None  # looked at again when something becomes free
    else:
        work.put(placed, None)


def _youngest_first(runners: list[Runner]) -> list[Runner]:
    return sorted(runners, key=lambda runner: (-runner.created_at_s, runner.id))


def _may_stop(work: Work, app: App, count: int) -> bool:
    """Whether `count` runners may be stopped now; a stop that an operator asked for always may."""
    state, now_s = work.state, work.moment.now_s
    if app.id in state.asked:
        state.stops_held.pop(app.id, None)
        return True
    if now_s - state.term_began_s < FAILOVER_GRACE_S:
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


def stop(work: Work, runner: Runner, goal: Goal, why: str) -> None:
    """Raise a runner's goal; one without a node is forgotten."""
    live = work.state.live.get(runner.node)
    held = live is not None and live.hold and runner.app not in work.state.asked
    if held or runner.id in work.state.frozen:
        return
    if work.full:
        work.state.dirty[runner.app] = None
    elif not runner.node:
        work.drop(runner)
    elif runner.goal < goal:
        work.put(replace(runner, goal=goal, goal_reason=why), runner)
        kind = {Goal.DRAIN: "RUNNER_DRAINING", Goal.STOP: "RUNNER_STOPPING", Goal.KILL: "RUNNER_STOPPING"}[goal]
        work.log(kind, runner.id, why)


def _grow(work: Work, placer: Placer, app: App, revision: Revision, missing: int) -> None:
    """Make runners, placed where a node can be found: one commit then holds wish, reservation and assignment."""
    if backoff_of(work, app.id) is not None:
        return
    for _ in range(missing):
        if work.full:
            work.state.dirty[app.id] = None
            return
        runner = _new(work, app, revision)
        placed = _placed(work, placer, runner, revision)
        work.put(placed or runner, None)
        if placed is None:
            _note_pending(work, runner, revision)


def _new(work: Work, app: App, revision: Revision) -> Runner:
    spec = revision.spec
    return Runner(
        id=f"{app.id}-{work.ids.suffix()}",
        share_group=spec.share_group or app.id,
        bindings=(Binding(app.id, revision.number, "main" if spec.model else ""),),
        created_at_s=work.moment.wall_s,
        residencies=_residencies(work, spec),
    )


def _place_waiting(work: Work, placer: Placer, app: App, revision: Revision, unplaced: list[Runner]) -> None:
    """Try again for runners without a node; all of an app want the same, so the first failure ends it."""
    if backoff_of(work, app.id) is None:
        for runner in unplaced:
            if work.full:
                work.state.dirty[app.id] = None
                break
            placed = _placed(work, placer, runner, revision)
            if placed is None:
                _note_pending(work, runner, revision)
                break
            work.put(placed, runner)
    state = work.state
    unplaced_left = any(not state.runners[id_].node for id_ in state.runners_by_app.get(app.id, ()))
    if unplaced_left or backoff_of(work, app.id) is not None:  # the tick that ends the backoff looks at it again
        state.waiting[app.id] = None
    else:
        state.waiting.pop(app.id, None)
        state.pending.pop((app.id, app.revision), None)


def _placed(work: Work, placer: Placer, runner: Runner, revision: Revision) -> Runner | None:
    """The runner on the best node, assigned; None where there is none, or a model may not be used."""
    state, spec = work.state, revision.spec
    if state.hold_all or not state.settled or model_awaited(state, spec):
        return None
    found = placer.place(spec)
    if found is None:
        return None
    work.log("RUNNER_PLACED", runner.id, f"placed on {found.node_id}", node=found.node_id)
    return replace(
        runner,
        node=found.node_id,
        gpus=found.gpus,
        assignment=AssignmentRef(work.ids.suffix(), state.term),
        residencies=_residencies(work, spec),
        memory_bytes=found.memory_bytes,
        cpu_milli=found.cpu_milli,
    )


def _note_pending(work: Work, runner: Runner, revision: Revision) -> None:
    """Keep why it has no node; worked out anew once a second at most, and once for all of one revision."""
    state, now_s = work.state, work.moment.now_s
    state.waiting[runner.app] = None
    key = (revision.app, revision.number)
    have = state.pending.get(key)
    if have is not None and now_s - have.found_at_s < PENDING_TEXT_AGE_S:
        return
    if awaited := model_awaited(state, revision.spec):
        state.pending[key] = Pending(awaited, found_at_s=now_s)
        if have is None or have.reason != awaited:
            work.emit(AppChanged(revision.app))
    elif state.explanations_left > 0:
        state.explanations_left -= 1
        state.pending[key] = replace(why_pending(state, revision.spec), found_at_s=now_s)
        work.emit(AppChanged(revision.app))
    elif have is None:  # the next tick works it out
        state.pending[key] = Pending("no node can take it now", found_at_s=float("-inf"))


def _residencies(work: Work, spec: Spec) -> tuple[Residency, ...]:
    """What the runner loads. The digest is empty where the model is staged before it is attested."""
    if not spec.model:
        return ()
    model = work.state.models.get(spec.model)
    return (Residency("main", spec.model, model.manifest_digest if model is not None else ""),)


def _delete(work: Work, app: App) -> None:
    """Stop all runners, then forget revisions, then the app, over as many steps as it takes."""
    state = work.state
    for runner_id in list(state.runners_by_app.get(app.id, ())):
        runner = state.runners[runner_id]
        if not runner.node or runner.goal < Goal.STOP:
            stop(work, runner, Goal.STOP, f"{app.id} is deleted")
    if app.id in state.runners_by_app:
        return
    revisions = [revision for (owner, _), revision in state.revisions.items() if owner == app.id]
    for revision in revisions:
        if revision.number != app.revision and not work.full:
            work.drop(revision)
    if work.full:
        state.dirty[app.id] = None
        return
    work.drop(state.revision_of(app))
    work.drop(app)
    state.pending.pop((app.id, app.revision), None)
    for table in (state.backoffs, state.waiting, state.stops_held, state.dirty, state.asked):
        table.pop(app.id, None)
    work.log("APP_DELETED", app.id, "its runners are gone; the app is forgotten")
