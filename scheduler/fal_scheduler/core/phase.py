"""Where a runner is in its life and why, from its record, what its node told, and how the node is. Pure.

The one answer for operators (`runner list`), for routes and for counts. Rule 5 of the design: a runner that is not
running has a reason that an operator can read, so no state but IDLE and RUNNING comes with an empty one.
"""

from __future__ import annotations

from fal_scheduler.core.records import Goal, Runner, RunnerState
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health, RunnerStatus


def phase_of(state: State, runner: Runner) -> tuple[RunnerState, str]:
    """State and reason."""
    if runner.id in state.frozen:
        return _told_state(state, runner), f"frozen: {state.frozen[runner.id]}"
    if not runner.node:
        return _without_node(state, runner)
    live = state.live.get(runner.node)
    node = state.nodes.get(runner.node)
    name = node.name if node is not None else runner.node
    if live is None or not live.session_id:
        return RunnerState.UNKNOWN, f"node {name} has not been heard since this scheduler took over"
    if live.health in (Health.UNKNOWN, Health.LOST):
        return RunnerState.UNKNOWN, f"node {name} is {live.health}; the runner may well be serving"
    status = state.status_of(runner)
    phase = _told_state(state, runner)
    if phase in (RunnerState.IDLE, RunnerState.RUNNING):
        return phase, ""
    if phase in (RunnerState.DRAINING, RunnerState.TERMINATING) and runner.goal is not Goal.RUN:
        return phase, runner.goal_reason or "asked to end"
    if status is None:
        if live.hold:
            return phase, f"node {name} waits for `falctl operator confirm`: {live.hold_reason}"
        return phase, f"assigned to node {name}, which has not answered yet"
    return phase, status.reason or _DEFAULT_REASONS.get(phase, "")


_DEFAULT_REASONS = {
    RunnerState.PENDING: "its node has not begun",
    RunnerState.STAGING: "weights and image are on their way",
    RunnerState.SETUP: "the container is up; the model is loading",
    RunnerState.DRAINING: "it finishes its requests",
    RunnerState.TERMINATING: "it is being stopped",
    RunnerState.TERMINATED: "the container is gone",
    RunnerState.CRASH_BACKOFF: "it failed and waits",
    RunnerState.UNKNOWN: "its node does not know its state",
}


def _told_state(state: State, runner: Runner) -> RunnerState:
    """What the node told, under what was asked since."""
    if not runner.node:
        return RunnerState.PENDING
    status = state.status_of(runner)
    told = status.state if status is not None else RunnerState.STAGING
    if told in (RunnerState.TERMINATED, RunnerState.TERMINATING):
        return told
    if runner.goal in (Goal.STOP, Goal.KILL):
        return RunnerState.TERMINATING
    return RunnerState.DRAINING if runner.goal is Goal.DRAIN else told


def _without_node(state: State, runner: Runner) -> tuple[RunnerState, str]:
    backoff = state.backoffs.get(runner.app)
    failure = state.failures.get(runner.id)
    if failure is not None:
        row = f" ({backoff.failures} in a row)" if backoff is not None and backoff.failures > 1 else ""
        return RunnerState.CRASH_BACKOFF, f"{failure.reason or 'it failed'}{row}"
    if state.hold_all:
        return RunnerState.PENDING, f"nothing is started: {state.hold_all}"
    if not state.settled:
        return RunnerState.PENDING, "a new leader waits for its nodes to tell what they run"
    pending = state.pending.get((runner.app, runner.revision))
    return RunnerState.PENDING, pending.reason if pending is not None else "it waits for its first placement"


def last_words(state: State, runner: Runner) -> RunnerStatus | None:
    """What its node told last; of a runner that crashed, its failure with exit code and log tail."""
    return state.failures.get(runner.id) or state.status_of(runner)


def serves(state: State, runner: Runner) -> bool:
    """Whether requests may be sent to it: ready when last heard, and not asked to end. Silence does not change it."""
    if runner.goal is not Goal.RUN:
        return False
    status = state.status_of(runner)
    return status is not None and status.serves


def why_not_serving(state: State, app_id: str) -> str:
    """Why no, or not every wanted, runner of an app serves; empty when nothing is wanted or all serve."""
    app = state.apps.get(app_id)
    if app is None:
        return "the app does not exist"
    if app.deleting:
        return "the app is being deleted"
    runners = [state.runners[i] for i in sorted(state.runners_by_app.get(app_id, ()))]
    waiting = [runner for runner in runners if runner.goal is Goal.RUN and not serves(state, runner)]
    if waiting:
        first = min(waiting, key=lambda runner: (runner.revision != app.revision, -runner.created_at_s, runner.id))
        phase, reason = phase_of(state, first)
        return f"{first.id} is {phase.name}: {reason}"
    scaling = state.scaling_of(app)
    wanted = min(scaling.min_concurrency, scaling.max_concurrency)
    ready = sum(1 for runner in runners if serves(state, runner))
    if ready >= wanted:
        return "" if ready else "it is scaled to 0 runners; raise min_concurrency"
    backoff = state.backoffs.get(app_id)
    if backoff is not None:
        return f"its last runner failed: {backoff.last.reason}"
    if state.hold_all:
        return f"nothing is started: {state.hold_all}"
    return f"{ready} of {wanted} runners are there"


__all__ = ["last_words", "phase_of", "serves", "why_not_serving"]
