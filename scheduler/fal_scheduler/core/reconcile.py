"""From what should run to runners: too few are made and placed, too many drain, old revisions give way.

Pure. `reconcile` looks at one app, does at most what one step may change, and leaves the app dirty when there is more.
Rules it keeps:
- How a new revision takes over is `rollout`'s; a revision that cannot be placed never takes down the one that serves.
- A runner whose container's monitor died, or that must leave its GPU or node, is replaced first and drained then: one
  more than wanted is made, more of them only for a drain, and only where a place is free. Where fewer are wanted it is
  the first to go.
- Stops that no operator asked for wait in a leader's first minutes, and wait for a confirm when they are many.
- Nothing is started or stopped by itself while the store is suspected, or on objects that broke an invariant.
Called by `step` only.
"""

from __future__ import annotations

from fal_scheduler.core.bindings import serves_app
from fal_scheduler.core.builds import end_of_task
from fal_scheduler.core.keep_warm import make_room
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import App, Goal, ModelState, Revision, Spec
from fal_scheduler.core.rollout import advance, finish, give_way, targets
from fal_scheduler.core.runner_groups import Runners
from fal_scheduler.core.scaling import desired
from fal_scheduler.core.starts import backoff_of, grow, new_runner, place_waiting, placed, take_room
from fal_scheduler.core.state import State
from fal_scheduler.core.stops import relieve, settle_returned, shrink, stop
from fal_scheduler.core.waiting import enter
from fal_scheduler.core.work import Work


def reconcile(work: Work, placer: Placer, app_id: str) -> None:
    """Bring one app nearer to what it should be; it stays dirty where there is more to do."""
    state = work.state
    app = state.apps.get(app_id)
    if app is None or app_id in state.frozen:
        state.waiting.pop(app_id)
        return
    if app.deleting:
        _delete(work, app)
        return
    if state.hold_all and app_id not in work.state.asked:
        return
    if state.revision_of(app).spec.build is not None:
        _run_once(work, placer, app, state.revision_of(app))
        return
    _stop_withdrawn(work, app)
    wanted = desired(work, app)
    current, old = _sort(work, app)
    advanced = advance(work, app, current, old, wanted)
    if advanced.revision != app.revision:
        current, old = _sort(work, advanced)
    app, revision = advanced, state.revision_of(advanced)
    share = targets(work, app, current, old, wanted)
    _replace_crashed(work, current)
    if share.keep_old:
        _keep_old(work, placer, app, old, share.old, wanted)
    else:
        give_way(work, app, old, share.old, wanted)
    more = relieve(work, app, current, share.new)
    if current.count <= share.new and state.stops_held.pop(app_id, "") is None and not state.stops_held:
        work.settle("MASS_STOP", "cluster")
    if current.count <= share.new:
        settle_returned(state, current)
    if current.count > share.new + more:
        shrink(work, app, current, share.new + more)
    elif current.count < share.new:
        grow(work, placer, app, revision, share.new - current.count)
    if not work.full:
        state.asked.pop(app_id, None)
    place_waiting(work, placer, app, revision, current.unplaced)
    make_room(work, placer, app, revision)
    take_room(work, app, revision)
    for _ in range(share.new + more - max(share.new, current.count)):
        if not _replace_ahead(work, placer, app, revision):
            break
    if app.rollout is not None:
        finish(work, app, *_sort(work, app), wanted)


def _keep_old(work: Work, placer: Placer, app: App, old: Runners, target: int, wanted: int) -> None:
    """While a canary or a pause lasts, the revision that served is kept at its share like any other."""
    assert app.rollout is not None
    revision = work.state.revisions.get((app.id, app.rollout.from_revision))
    if revision is None:
        give_way(work, app, old, target, wanted)
        return
    for runner in list(old.unplaced):
        if runner.revision != revision.number:  # of one that never finished its own rollout
            stop(work, runner, Goal.STOP, "")
            old.unplaced.remove(runner)
    _replace_crashed(work, old)
    more = relieve(work, app, old, target)
    if old.count > wanted:
        shrink(work, app, old, wanted)
    elif old.count > target + more:
        give_way(work, app, old, target + more, wanted)
    elif old.count < target:
        grow(work, placer, app, revision, target - old.count)
    for _ in range(target + more - max(target, old.count)):
        if not _replace_ahead(work, placer, app, revision):
            break
    place_waiting(work, placer, app, revision, old.unplaced)


def _run_once(work: Work, placer: Placer, app: App, revision: Revision) -> None:
    """A build task's one runner gets a node once; nothing replaces it."""
    assert revision.spec.build is not None
    if end_of_task(work, app, revision.spec.build):
        _delete(work, work.state.apps[app.id])
        return
    unplaced = [work.state.runners[id_] for id_ in work.state.runners_by_app.get(app.id, ())]
    place_waiting(work, placer, app, revision, [runner for runner in unplaced if not runner.node])


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
        number = runner.revision_for(app.id)
        if number not in reasons:
            revision = state.revisions.get((app.id, number))
            reasons[number] = _withdrawn(state, revision.spec) if revision is not None else ""
        if why := reasons[number]:
            stop(work, runner, Goal.STOP, why, app=app.id)


def _withdrawn(state: State, spec: Spec) -> str:
    for name in spec.artifacts:
        model = state.models.get(name)
        if model is not None and model.withdrawn:
            word = "refused" if model.state is ModelState.REFUSED else "withdrawn"
            return f"{'image' if name == spec.image else 'model'} {name} was {word}: {model.reason}"
    return ""


def _sort(work: Work, app: App) -> tuple[Runners, Runners]:
    """Runners with goal RUN, of the current revision and of older ones. Those of lost nodes do not count."""
    state = work.state
    current, old = Runners(), Runners()
    for runner_id in state.runners_by_app.get(app.id, ()):
        runner = state.runners[runner_id]
        if runner.goal is not Goal.RUN or runner_id in state.abandoned:
            continue
        group = current if runner.revision_for(app.id) == app.revision else old
        if not runner.node:
            group.unplaced.append(runner)
            continue
        live = state.live.get(runner.node)
        # Of a node that this leader has not heard yet nothing is known: its runners may well serve.
        unheard = live is None or not live.session_id
        ready = unheard or serves_app(state, runner, app.id)
        (group.ready if ready else group.starting).append(runner)
    return current, old


def _replace_crashed(work: Work, current: Runners) -> None:
    """A crashed runner that has waited long enough is forgotten; growing makes a fresh one."""
    for runner in list(current.unplaced):
        over = backoff_of(work, runner.app, runner.revision) is None
        if runner.id in work.state.failures and over and not work.full:
            work.drop(runner)
            current.unplaced.remove(runner)


def _replace_ahead(work: Work, placer: Placer, app: App, revision: Revision) -> bool:
    """One runner more than wanted, where a place is free; without one, nothing waits for it but this app."""
    state = work.state
    unplaced = any(not state.runners[id_].node for id_ in state.runners_by_app.get(app.id, ()))
    if work.full or unplaced or backoff_of(work, app.id, revision.number) is not None:
        return False
    runner = new_runner(work, app, revision)
    assigned = placed(work, placer, runner, revision, urgent=False)
    if assigned is None:
        enter(state, app.id, revision.spec, work.moment.wall_s)  # looked at again when something becomes free
        return False
    work.put(assigned, None)
    return True


def _delete(work: Work, app: App) -> None:
    """Stop all runners, then forget revisions, then the app, over as many steps as it takes."""
    state = work.state
    for runner_id in list(state.runners_by_app.get(app.id, ())):
        runner = state.runners[runner_id]
        if not runner.node or runner.goal < Goal.STOP:
            stop(work, runner, Goal.STOP, f"{app.id} is deleted", app=app.id)
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
    for key in [key for key in state.pending if key[0] == app.id]:
        del state.pending[key]
    for kind in ("ROLLED_BACK", "ROLLOUT_FAILED"):
        work.settle(kind, app.id)
    if app.id in state.stops_held and len(state.stops_held) == 1:
        work.settle("MASS_STOP", "cluster")
    state.sharing_barred_s.pop(app.id, None)
    state.demand.forget_app(app.id)
    state.waiting.pop(app.id)
    for table in (state.backoffs, state.refusals, state.stops_held, state.dirty, state.asked, state.preempt_at_s):
        table.pop(app.id, None)
    state.lifetimes.pop(app.id, None)
    work.log("APP_DELETED", app.id, "its runners are gone; the app is forgotten")
