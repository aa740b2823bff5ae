"""Why something is as it is: an app, a runner or a node."""

from __future__ import annotations

from fal_contract.errors import FalError, not_found
from fal_contract.ids import team_of
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2
from fal_scheduler.api.runners import find_runner
from fal_scheduler.api.views import app_view, node_view, placement_view
from fal_scheduler.core.explain import explain as explain_nodes
from fal_scheduler.core.explain import summarise
from fal_scheduler.core.fleet_fragments import fragments_of
from fal_scheduler.core.place import Ask
from fal_scheduler.core.records import Node, Spec
from fal_scheduler.core.starts import times_of
from fal_scheduler.core.told import Health
from fal_scheduler.core.views import failed_text
from fal_scheduler.leadership import Leadership


def explain(leader: Leadership, request: cluster_pb2.ExplainRequest) -> cluster_pb2.ExplainReply:
    """An app by `team/name`, a runner by its id, a node by id or name. Raises NOT_FOUND."""
    state, subject = leader.view, request.subject
    if subject in state.apps:
        return _app(leader, subject)
    node = state.find_node(subject)
    if node is not None:
        return _node(leader, node)
    try:
        view = find_runner(state, subject)
    except FalError:
        raise not_found(
            "subject", subject, remedy="Give an app (team/name), a runner's id, or a node's id or name."
        ) from None
    return _runner(leader, view)


def _app(leader: Leadership, app_id: str) -> cluster_pb2.ExplainReply:
    state = leader.view
    app = state.apps[app_id]
    view = app_view(state, app)
    ready = sum(1 for runner in view.runners if _is_ready(runner.state))
    summary = f"{app_id}, revision {app.revision}: {ready} ready, {view.wanted} wanted"
    summary += f". {view.reason}" if view.reason else "."
    reply = cluster_pb2.ExplainReply(kind="app", subject=app_id, summary=summary)
    for runner in view.runners:
        reply.lines.append(_runner_line(runner))
    backoff = state.backoffs.get(app_id)
    if backoff is not None:
        left_s = backoff.until_s - leader.clock.monotonic_s()
        when = f"in {left_s:.0f} s" if left_s >= 0.5 else "now"
        reply.lines.append(f"{failed_text(backoff.failures, backoff.last)}; tried again {when}")
        reply.lines.extend(f"  | {line}" for line in backoff.last.log_tail)
    _consider(reply, leader, app_id, state.revision_of(app).spec)
    return reply


def _runner(leader: Leadership, view: cluster_pb2.RunnerView) -> cluster_pb2.ExplainReply:
    state = leader.view
    name = state_pb2.RunnerState.Name(view.state).removeprefix("RUNNER_STATE_")
    where = f" on node {view.node_name or view.runner.node}" if view.runner.node else ""
    summary = f"{view.runner.id} is {name}{where}" + (f": {view.reason}" if view.reason else ".")
    reply = cluster_pb2.ExplainReply(kind="runner", subject=view.runner.id, summary=summary)
    if view.runner.goal_reason:
        reply.lines.append(f"goal: {view.runner.goal_reason}")
    if view.status.wounded:
        reply.lines.append(_wounded_text(view.status))
    for phase in view.status.phases:
        reply.lines.append(f"{phase.name}: {phase.seconds:.3f} s")
    if view.status.HasField("exit_code"):
        killed = " (killed for memory)" if view.status.oom_killed else ""
        reply.lines.append(f"exit code {view.status.exit_code}{killed}")
    reply.lines.extend(f"  | {line}" for line in view.status.log_tail)
    binding = view.runner.bindings[0]
    revision = state.revisions.get((binding.app, binding.revision))
    if not view.runner.node and revision is not None:
        _consider(reply, leader, binding.app, revision.spec)
    return reply


def _node(leader: Leadership, node: Node) -> cluster_pb2.ExplainReply:
    view = node_view(leader, node)
    but = ", but " if view.health == Health.READY else ": "  # cordoned, or held
    summary = f"{node.name} is {view.health}" + (f"{but}{view.reason}" if view.reason else ".")
    reply = cluster_pb2.ExplainReply(kind="node", subject=node.id, summary=summary)
    reply.lines.append(f"{len(view.gpus_free)} of {len(view.inventory.gpus)} GPUs are free")
    for gpu in view.inventory.gpus:
        if gpu.health_reason:
            reply.lines.append(f"{gpu.id} ({gpu.model}): {gpu.health_reason}")
    for runner_id in view.runners:
        reply.lines.append(_runner_line(find_runner(leader.view, runner_id)))
    for gateway, path in sorted(view.paths.items()):
        reply.lines.append(f"gateway {gateway} reaches it: {path}")
    return reply


def _runner_line(view: cluster_pb2.RunnerView) -> str:
    name = state_pb2.RunnerState.Name(view.state).removeprefix("RUNNER_STATE_")
    reason = view.reason or (_wounded_text(view.status) if view.status.wounded else "")
    return f"{view.runner.id}: {name}" + (f": {reason}" if reason else "")


def _wounded_text(status: agent_pb2.RunnerStatus) -> str:
    return f"wounded: {status.reason}; it serves on, another starts where a place is free, then it is drained"


def _is_ready(state: int) -> bool:
    return state in (state_pb2.RUNNER_STATE_IDLE, state_pb2.RUNNER_STATE_RUNNING)


def _consider(reply: cluster_pb2.ExplainReply, leader: Leadership, app_id: str, spec: Spec) -> None:
    """What placement would find for one more runner now."""
    state = leader.view
    ask = Ask(app_id, team_of(app_id), hold_s=state.lifetimes.get(app_id, 0))
    verdicts = explain_nodes(state, spec, ask, times_of(state, app_id), fragments_of(state).score)
    reply.placement.CopyFrom(placement_view(summarise(verdicts, spec)))
    for verdict in verdicts:
        reply.verdicts.add(
            node_id=verdict.node_id,
            node_name=verdict.node_name,
            feasible=verdict.feasible,
            filter=verdict.filter,
            detail=verdict.detail,
            score=verdict.score,
        )
