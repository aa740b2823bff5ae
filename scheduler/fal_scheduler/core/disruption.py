"""How many runners of an app may be disturbed at once, whoever disturbs them. Pure.

Rollouts, drains, preemption and quarantined GPUs ask here before they take a runner away that serves. A runner is
disturbed while it leaves (its goal is above RUN and its container is not gone) or while its node is silent. Failures
ask nobody, but what they took counts: a second disturbance waits until the app has recovered.
"""

from __future__ import annotations

from fal_scheduler.core.records import Goal, Runner
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health


def disturbed(state: State, app_id: str) -> int:
    """Runners of the app that are leaving or cannot be heard."""
    count = 0
    for runner_id in state.runners_by_app.get(app_id, ()):
        runner = state.runners[runner_id]
        if runner.node and (runner.goal is not Goal.RUN or _silent(state, runner.node)):
            count += 1
    return count


def _silent(state: State, node_id: str) -> bool:
    live = state.live.get(node_id)
    return live is not None and live.health in (Health.UNKNOWN, Health.LOST)


def allowed(state: State, app_id: str, wanted: int) -> int:
    """How many more may be disturbed now: the app's share of `wanted`, at least one, less those that are."""
    app = state.apps.get(app_id)
    if app is None:
        return 0
    perc = state.revision_of(app).spec.rollout.disturbed_perc
    return max(0, max(1, wanted * perc // 100) - disturbed(state, app_id))


def leaving(state: State, runner: Runner) -> str:
    """Why another should take a runner's place: its node is drained. Empty: none should."""
    node = state.nodes.get(runner.node)
    if node is None or node.drain is None:
        return ""
    return f"{node.name} is drained ({node.drain.reason or node.drain.kind})"
