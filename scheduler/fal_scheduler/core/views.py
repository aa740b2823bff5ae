"""What operators and routes see of a runner and an app: the state derived from record, node and status.

Pure. Rule 5: every runner that is not running has a reason. Called by the APIs and by tests; changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fal_scheduler.core.records import App, Goal, Runner, RunnerState
from fal_scheduler.core.rollout import not_begun
from fal_scheduler.core.state import Pending, State
from fal_scheduler.core.told import Backoff, Health, RunnerStatus

NODES_NAMED_MAX: Final = 3
# Of an app whose runners wait for different things, the first of these is told: what does not end by itself.
_TELLING: Final = {RunnerState.CRASH_BACKOFF: 0, RunnerState.PENDING: 1, RunnerState.UNKNOWN: 2}
_ENDING = {
    Goal.DRAIN: RunnerState.DRAINING,
    Goal.STOP: RunnerState.TERMINATING,
    Goal.KILL: RunnerState.TERMINATING,
}


@dataclass(frozen=True, slots=True)
class RunnerPhase:
    """Where a runner is and why; `reason` is empty only where it serves."""

    state: RunnerState
    reason: str
    failures: int = 0
    backoff_until_wall_s: float = 0.0


def runner_phase(state: State, runner: Runner) -> RunnerPhase:
    """The state of a runner as everybody should see it."""
    backoff = state.backoffs.get(runner.app)
    if not runner.node:
        return _unplaced(state, runner, backoff)
    failures = backoff.failures if backoff is not None else 0
    status = state.status_of(runner)
    health = state.health_of(runner.node)
    if health is not Health.READY:
        return RunnerPhase(RunnerState.UNKNOWN, _out_of_sight(state, runner, health), failures)
    if status is not None and status.ended:
        return RunnerPhase(RunnerState.TERMINATED, status.reason or "its container is gone", failures)
    if runner.goal is not Goal.RUN:
        left = status.in_flight if status is not None and runner.goal is Goal.DRAIN else 0
        requests = f"finishes {left} request{'' if left == 1 else 's'}; " if left else ""
        return RunnerPhase(_ENDING[runner.goal], requests + runner.goal_reason, failures)
    if status is None:
        return RunnerPhase(RunnerState.STAGING, f"assigned to {_name(state, runner.node)}, which has not answered yet")
    reason = "" if status.serves else status.reason or f"{status.state.name.lower()} on {_name(state, runner.node)}"
    return RunnerPhase(status.state, reason, failures)


def _out_of_sight(state: State, runner: Runner, health: Health) -> str:
    """What is known of a runner whose node is silent, and what ends the wait."""
    name = _name(state, runner.node)
    if runner.goal is Goal.RUN:
        return f"its node {name} {health.text}"
    revoke = f"`falctl node revoke {name}` releases it" if health is Health.LOST else "it is told when it comes back"
    silent = "is lost" if health is Health.LOST else "is silent"
    return f"is to stop ({runner.goal_reason}), but its node {name} {silent} and must say that it did: {revoke}"


def _unplaced(state: State, runner: Runner, backoff: Backoff | None) -> RunnerPhase:
    if runner.id in state.failures:
        count = backoff.failures if backoff is not None else 1
        until = backoff.until_wall_s if backoff is not None else 0.0
        reason = failed_text(count, state.failures[runner.id])
        return RunnerPhase(RunnerState.CRASH_BACKOFF, reason, count, until)
    if state.hold_all:
        return RunnerPhase(RunnerState.PENDING, f"the store is suspected: {state.hold_all}")
    if not state.settled:
        return RunnerPhase(RunnerState.PENDING, "waits until the nodes have told a new leader what they run")
    if backoff is not None and runner.app in state.waiting:
        return RunnerPhase(
            RunnerState.PENDING, "waits for its app's crash backoff", backoff.failures, backoff.until_wall_s
        )
    pending = pending_of(state, runner)
    return RunnerPhase(RunnerState.PENDING, pending.reason if pending is not None else "waits for its turn")


def failed_text(count: int, last: RunnerStatus) -> str:
    """How often an app's runners failed, and how the last one did."""
    why = last.reason or (f"exit code {last.exit_code}" if last.exit_code is not None else "it ended")
    return f"failed {count} times in a row; last: {why}" if count > 1 else f"failed: {why}"


def pending_of(state: State, runner: Runner) -> Pending | None:
    """What placement found for a runner without a node."""
    return state.pending.get((runner.app, runner.revision)) if not runner.node else None


def wanted(state: State, app: App) -> int:
    """Runners that should be there."""
    if app.deleting:
        return 0
    if (found := state.demand.wanted.get(app.id)) is not None:
        return found
    scaling = state.scaling_of(app)
    return min(scaling.min_concurrency, scaling.max_concurrency)


def app_reason(state: State, app: App) -> str:
    """Why fewer are ready than wanted; empty when all are."""
    if app.deleting:
        return _why_not_gone(state, app)
    if app.id in state.stops_held:
        return "has more runners than wanted; the stops wait for `falctl operator confirm stops`"
    phases = [
        runner_phase(state, runner)
        for runner_id in state.runners_by_app.get(app.id, ())
        if (runner := state.runners[runner_id]).goal is Goal.RUN and runner.revision_for(app.id) == app.revision
    ]
    ready = sum(1 for phase in phases if not phase.reason)
    if ready >= wanted(state, app):
        return ""
    if not_begun(state, app.id, app.revision):
        return state.pending[app.id, app.revision].reason
    backoff = state.backoffs.get(app.id)
    if backoff is not None and not phases:
        return failed_text(backoff.failures, backoff.last)
    waiting = [phase for phase in phases if phase.reason]
    if not waiting and (blocked := state.pending.get((app.id, app.revision))) is not None:
        return blocked.reason
    if not waiting:
        return "its runners are being made"
    return min(waiting, key=lambda phase: _TELLING.get(phase.state, len(_TELLING))).reason


def _why_not_gone(state: State, app: App) -> str:
    """What the deletion of an app waits for: nodes out of sight by name, as they may take for ever."""
    nodes = {state.runners[runner_id].node for runner_id in state.runners_by_app.get(app.id, ())}
    silent = sorted(
        (_name(state, node_id), state.health_of(node_id))
        for node_id in nodes
        if node_id and state.health_of(node_id) is not Health.READY
    )
    if not silent:
        return "its runners are being stopped"
    names = ", ".join(f"{name} ({health})" for name, health in silent[:NODES_NAMED_MAX])
    more = f" and {len(silent) - NODES_NAMED_MAX} more" if len(silent) > NODES_NAMED_MAX else ""
    return (
        f"waits for {names}{more} to say that its runners ended; "
        f"if a node is gone for good, `falctl node revoke {silent[0][0]}` releases them"
    )


def _name(state: State, node_id: str) -> str:
    node = state.nodes.get(node_id)
    return node.name if node is not None else node_id
