"""A revision takes over from another: in steps, health-gated, with a canary, a pause, and a way back. Pure.

`App.revision` is the revision that should run; while `App.rollout` is set, runners of `from_revision` still serve.

- "rolling": a step of new runners (the app's disturbed share, at least one) starts; as each serves, an old one drains.
- "canary": the canary's share of runners is of the new revision, the rest stays, is scaled and is replaced, until it is
  promoted by an operator or by `canary_hold_s` seconds without a failure.
- "recreating": old runners drain first; only where the new revision could be placed at all.
- "rolling-back": a revision failed (too many ends, or not serving in time) or was aborted; the one before takes over.
  Its time counts from the last of its runners that became ready, so that a large app has as long as it needs.

A revision that cannot be placed never takes down the one that serves: old runners leave only for new ones that serve,
and a recreate begins only where a place for the new revision can be named. Everything is in the app's record, so that
a rollout goes on, and goes back, whoever leads and whether or not anybody watches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from fal_contract.errors import Code, FalError, invalid, not_found
from fal_contract.ids import team_of
from fal_contract.limits import ROLLOUT_FAILURES_MAX
from fal_scheduler.core.disruption import allowed
from fal_scheduler.core.events import Reply
from fal_scheduler.core.explain import FREED_BY_STOPPING, explain, model_awaited, summarise, takes_without
from fal_scheduler.core.model_commands import check_image, check_models
from fal_scheduler.core.ranking import Ask
from fal_scheduler.core.records import App, Goal, Rollout, RolloutPolicy, Runner, Spec
from fal_scheduler.core.rollout_events import RolloutCommand, SetRevision, SetRollout
from fal_scheduler.core.runner_groups import Runners
from fal_scheduler.core.secrets import check_secrets
from fal_scheduler.core.state import Pending, State
from fal_scheduler.core.stops import stop
from fal_scheduler.core.waiting import reserved_for_others
from fal_scheduler.core.work import Work

CANARY: Final = "canary"
ROLLING: Final = "rolling"
RECREATING: Final = "recreating"
ROLLING_BACK: Final = "rolling-back"
CAPACITY_NEW_S: Final = 5.0  # a recreate that was not begun is looked at again, where something became free so lately
ACTIONS: Final = ("pause", "resume", "promote", "abort")


@dataclass(frozen=True, slots=True)
class Targets:
    """Runners that may be of the new revision, and old ones that go on. `keep_old`: old ones are made, too."""

    new: int
    old: int
    keep_old: bool = False


# --- commands -------------------------------------------------------------------------------------------------------


def command(work: Work, event: RolloutCommand) -> Reply:
    """Carry out an operator's command. Raises NOT_FOUND, INVALID, FAILED_PRECONDITION."""
    app = work.state.apps.get(event.id)
    if app is None:
        raise not_found("app", event.id, remedy="List them with `falctl app list`.")
    if app.deleting:
        what = f"app {app.id!r} is being deleted"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Wait until its runners are gone.")
    after = _set_revision(work, app, event) if isinstance(event, SetRevision) else _steer(work, app, event)
    if after == app:
        return Reply("unchanged", app.id, app.generation)
    work.state.dirty[app.id] = None
    work.state.asked[app.id] = None
    return Reply("changed", app.id, after.generation)


def _steer(work: Work, app: App, event: SetRollout) -> App:
    rollout = app.rollout
    if event.action not in ACTIONS:
        raise invalid("action", event.action, "is no action", remedy=f"Use one of {', '.join(ACTIONS)}.")
    if rollout is None:
        what = f"app {app.id!r} has no rollout under way: revision {app.revision} serves"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="`falctl app apply` or `falctl app set-rev` begins one.")
    match event.action:
        case "abort":
            if rollout.phase == ROLLING_BACK:
                return app
            return _roll_back(work, app, rollout, f"aborted by {event.actor or 'an operator'}")
        case "promote":
            if rollout.phase != CANARY:
                what = f"the rollout of {app.id!r} is {rollout.phase}, no canary"
                raise FalError(Code.FAILED_PRECONDITION, what, remedy="See `falctl app rollout status`.")
            return _promote(work, app, rollout, f"promoted by {event.actor or 'an operator'}")
        case action:
            paused = action == "pause"
            if rollout.paused == paused:
                return app
            work.log("ROLLOUT_PAUSED" if paused else "ROLLOUT_RESUMED", app.id, f"at phase {rollout.phase}")
            # What was paused has its whole time again: else one that rested for long would go back at once.
            began_at_s = rollout.began_at_s if paused else work.moment.wall_s
            return _put(work, app, replace(rollout, paused=paused, began_at_s=began_at_s))


def _set_revision(work: Work, app: App, event: SetRevision) -> App:
    kept = sorted(number for owner, number in work.state.revisions if owner == app.id)
    number = event.revision or max((one for one in kept if one < app.revision), default=0)
    if (app.id, number) not in work.state.revisions:
        have = ", ".join(map(str, kept))
        raise invalid("revision", event.revision or "the one before", "is not kept", remedy=f"Kept are: {have}.")
    if number == app.revision:
        return app
    spec = work.state.revisions[app.id, number].spec  # what it names may be gone since
    check_models(work.state, spec)
    check_image(work.state, spec)
    check_secrets(work.state, team_of(app.id), spec)
    after = replace(app, revision=number, generation=app.generation + 1)
    after = begun(work, after, app)
    work.put(after, app)
    work.state.backoffs.pop(app.id, None)
    work.log("APP_REVISION_SET", app.id, f"revision {number} should run", revision=str(number))
    return after


def begun(work: Work, after: App, before: App) -> App:
    """`after` with the rollout that its new revision begins; from the revision that serves."""
    was = before.rollout
    # One that had not finished is no base; where it went back, its aim is.
    base = was.from_revision if was is not None and was.phase != ROLLING_BACK else before.revision
    if (after.id, base) not in work.state.revisions or base == after.revision:
        base = before.revision
    policy = work.state.revisions[after.id, after.revision].spec.rollout
    phase = RECREATING if policy.recreate else CANARY if policy.canary_perc else ROLLING
    work.settle("ROLLED_BACK", after.id)
    return replace(
        after,
        rollout=Rollout(base, after.revision, phase, began_at_s=work.moment.wall_s, canary_perc=policy.canary_perc),
    )


# --- what happens by itself -----------------------------------------------------------------------------------------


def note_failure(work: Work, runner: Runner, why: str) -> None:
    """A container that should run has ended: counted against the revision that is taking over."""
    app = work.state.apps.get(runner.app)
    if app is None or app.rollout is None or app.rollout.phase == ROLLING_BACK:
        return
    if runner.revision == app.rollout.to_revision:
        _put(work, app, replace(app.rollout, failures=app.rollout.failures + 1, reason=why))


def note_ready(work: Work, runner: Runner) -> None:
    """A runner serves for the first time: where it is of the revision that takes over, its deadline counts anew."""
    for app_id in runner.apps:
        app = work.state.apps.get(app_id)
        if app is None or app.rollout is None or app.rollout.phase == ROLLING_BACK or work.full:
            continue
        wall_s = work.moment.wall_s
        if runner.revision_for(app_id) == app.rollout.to_revision and app.rollout.progress_at_s < wall_s:
            _put(work, app, replace(app.rollout, progress_at_s=wall_s))


def deadline_at_s(rollout: Rollout, policy: RolloutPolicy) -> float:
    """When the revision counts as failed (wall clock) if no other runner of it becomes ready before."""
    return max(rollout.began_at_s, rollout.progress_at_s) + policy.serves_within_s


def tick(work: Work) -> None:
    """Apps whose rollout has something to do with the time now are looked at."""
    state, wall_s = work.state, work.moment.wall_s
    for app_id in state.rolling:
        app = state.apps[app_id]
        rollout = app.rollout
        if rollout is None or rollout.paused or rollout.phase == ROLLING_BACK:
            continue
        policy = state.revision_of(app).spec.rollout
        late = wall_s >= deadline_at_s(rollout, policy)
        held = rollout.phase == CANARY and rollout.phase_at_s and wall_s >= rollout.phase_at_s + policy.canary_hold_s
        freed = rollout.phase == RECREATING and work.moment.now_s - state.capacity_at_s <= CAPACITY_NEW_S
        if late or held or (freed and not_begun(state, app_id, app.revision)):
            state.dirty[app_id] = None


def advance(work: Work, app: App, current: Runners, old: Runners, wanted: int) -> App:
    """Bring a rollout to its next phase where it is due. The revision that should run may be another then."""
    rollout = app.rollout
    if rollout is None or work.full:
        return app
    policy = work.state.revision_of(app).spec.rollout
    why = "" if rollout.paused else _failed(work, app, rollout, policy, current, wanted)
    if why:
        if policy.rollback and (app.id, rollout.from_revision) in work.state.revisions:
            return _roll_back(work, app, rollout, why)
        work.alarm("ROLLOUT_FAILED", app.id, why, f"`falctl app rollout abort {app.id}`, or apply a better revision.")
    if rollout.phase == CANARY:
        return _canary(work, app, rollout, policy, current, wanted)
    return app


def finish(work: Work, app: App, current: Runners, old: Runners, wanted: int) -> None:
    """The end of a rollout: nothing of another revision should serve, and as many of this one do as are wanted."""
    rollout = app.rollout
    if rollout is None or rollout.paused or rollout.phase == CANARY or work.full:
        return
    if not old.count and len(current.ready) >= wanted:
        work.settle("ROLLOUT_FAILED", app.id)
        work.log("ROLLOUT_DONE", app.id, f"revision {app.revision} serves", revision=str(app.revision))
        _put(work, app, None)


def _failed(work: Work, app: App, rollout: Rollout, policy: RolloutPolicy, current: Runners, wanted: int) -> str:
    """Why the new revision counts as failed; empty while it does not."""
    if rollout.phase == ROLLING_BACK:
        return ""
    if rollout.failures >= ROLLOUT_FAILURES_MAX:
        return f"revision {app.revision} failed {rollout.failures} times, last: {rollout.reason}"
    late = work.moment.wall_s >= deadline_at_s(rollout, policy)
    if late and rollout.phase != CANARY and len(current.ready) < wanted:
        what = f"revision {app.revision} does not serve"
        if rollout.progress_at_s > rollout.began_at_s:
            return f"{what}: {len(current.ready)} of {wanted} runners, and no other in {policy.serves_within_s:g} s"
        return f"{what} after {policy.serves_within_s:g} s"
    if late and rollout.phase == CANARY and len(current.ready) < canaries(wanted, rollout.canary_perc):
        return f"the canary of revision {app.revision} does not serve after {policy.serves_within_s:g} s"
    return ""


def _canary(work: Work, app: App, rollout: Rollout, policy: RolloutPolicy, current: Runners, wanted: int) -> App:
    if len(current.ready) < canaries(wanted, rollout.canary_perc):
        return app
    wall_s = work.moment.wall_s
    if not rollout.phase_at_s:
        work.log("ROLLOUT_CANARY", app.id, f"{len(current.ready)} of {wanted} runners serve revision {app.revision}")
        return _put(work, app, replace(rollout, phase_at_s=wall_s))
    if policy.canary_hold_s and not rollout.paused and wall_s >= rollout.phase_at_s + policy.canary_hold_s:
        return _promote(work, app, rollout, f"{policy.canary_hold_s:g} s without a failure")
    return app


def _promote(work: Work, app: App, rollout: Rollout, why: str) -> App:
    work.log("ROLLOUT_PROMOTED", app.id, f"revision {app.revision}: {why}", revision=str(app.revision))
    wall_s = work.moment.wall_s
    return _put(work, app, replace(rollout, phase=ROLLING, paused=False, began_at_s=wall_s, phase_at_s=wall_s))


def _roll_back(work: Work, app: App, rollout: Rollout, why: str) -> App:
    """The revision before should run again. Nobody needs to watch: it is the app's record that says so."""
    number = rollout.from_revision
    back = replace(
        rollout,
        from_revision=app.revision,
        to_revision=number,
        phase=ROLLING_BACK,
        paused=False,
        reason=why,
        phase_at_s=work.moment.wall_s,
    )
    after = replace(app, revision=number, rollout=back, generation=app.generation + 1)
    work.put(after, app)
    work.state.backoffs.pop(app.id, None)
    work.settle("ROLLOUT_FAILED", app.id)
    message = f"{why}; revision {number} should run again"
    work.log("ROLLED_BACK", app.id, message, revision=str(number))
    remedy = "See `falctl runner logs` of its runners, which `falctl events` names; mend it, apply again."
    work.alarm("ROLLED_BACK", app.id, message, remedy)
    return after


def _put(work: Work, app: App, rollout: Rollout | None) -> App:
    after = replace(app, rollout=rollout)
    work.put(after, app)
    return after


# --- how many -------------------------------------------------------------------------------------------------------


def canaries(wanted: int, perc: int) -> int:
    """Runners of a canary: its share rounded up, at least one where any is wanted."""
    return min(wanted, max(1, -(-wanted * perc // 100))) if wanted else 0


def targets(work: Work, app: App, current: Runners, old: Runners, wanted: int) -> Targets:
    """How many runners of each side there should be now."""
    rollout, ready = app.rollout, len(current.ready)
    rest = max(0, wanted - ready)
    if rollout is None:
        return Targets(wanted, rest)
    if rollout.paused:
        new = min(wanted, current.count)
        return Targets(new, wanted - min(new, ready), keep_old=True)
    spec = work.state.revision_of(app).spec
    if rollout.phase == CANARY:
        new = canaries(wanted, rollout.canary_perc)
        return Targets(new, wanted - min(new, ready), keep_old=True)
    if rollout.phase == RECREATING:
        why = blocked(work.state, app.id, spec) if old.count else ""
        key = (app.id, app.revision)
        if why:
            work.state.pending[key] = Pending(f"revision {app.revision} is not begun: {why}", found_at_s=math.inf)
        elif not_begun(work.state, *key):
            del work.state.pending[key]
        if old.count or _leaving(work.state, app):
            return Targets(0, wanted if why else 0, keep_old=bool(why))
    if rollout.phase == ROLLING_BACK:  # what failed is no help: all that is missing at once
        return Targets(wanted, rest)
    step = max(1, wanted * spec.rollout.disturbed_perc // 100)
    return Targets(min(wanted, max(ready + step, wanted - old.count)), rest)


def blocked(state: State, app_id: str, spec: Spec) -> str:
    """Why a recreate must not begin: no node could take the new revision even without the app's own runners."""
    if awaited := model_awaited(state, spec):
        return awaited
    ask = Ask(app_id, team_of(app_id), avoid=reserved_for_others(state, app_id))
    verdicts = explain(state, spec, ask)
    own: dict[str, list[str]] = {}
    for runner_id in state.runners_by_app.get(app_id, ()):
        own.setdefault(state.runners[runner_id].node, []).append(runner_id)
    for verdict in verdicts:
        if verdict.feasible:
            return ""
        mine = tuple(own.get(verdict.node_id, ()))
        if mine and verdict.filter in FREED_BY_STOPPING and takes_without(state, verdict.node_id, spec, ask, mine):
            return ""
    return summarise(verdicts, spec).reason


def not_begun(state: State, app_id: str, revision: int) -> bool:
    """Whether a recreate of the revision is held back, and `State.pending` says why; no runner of it waits."""
    app, found = state.apps.get(app_id), state.pending.get((app_id, revision))
    if app is None or app.rollout is None or found is None or found.found_at_s < math.inf:
        return False
    return app.rollout.phase == RECREATING and app.revision == revision


def _leaving(state: State, app: App) -> bool:
    """Whether containers of another revision are still there."""
    runners = (state.runners[id_] for id_ in state.runners_by_app.get(app.id, ()))
    return any(one.node and one.revision_for(app.id) != app.revision for one in runners)


def give_way(work: Work, app: App, old: Runners, keep: int, wanted: int) -> None:
    """Old runners beyond `keep` go: never held back as a mass, an operator's apply asked; but so many at once."""
    rollout = app.rollout
    base = rollout.from_revision if rollout is not None else 0
    old.ready.sort(key=lambda runner: runner.revision_for(app.id) != base)  # what served before stays longest
    surplus = [(runner, Goal.DRAIN) for runner in old.ready[keep:]]
    if rollout is not None and rollout.phase != RECREATING:
        surplus = surplus[: allowed(work.state, app.id, wanted)]
    surplus += [(runner, Goal.STOP) for runner in old.starting[max(0, keep - len(old.ready)) :]]
    for runner in old.unplaced:
        stop(work, runner, Goal.STOP, "")
    for runner, goal in surplus:
        stop(work, runner, goal, f"replaced by revision {app.revision}", app=app.id)
    if rollout is not None and rollout.phase == RECREATING:  # those without a node are gone at once, and tell nothing
        work.state.demand.look(app.id, work.moment.now_s)
