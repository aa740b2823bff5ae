"""Why something is as it is: an app, a runner or a node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fal_contract.errors import FalError, invalid, not_found
from fal_contract.ids import team_of
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2
from fal_scheduler.api.runners import find_runner
from fal_scheduler.api.views import app_view, node_view, placement_view
from fal_scheduler.core.admit import smallest_changes
from fal_scheduler.core.explain import explain as explain_nodes
from fal_scheduler.core.explain import summarise
from fal_scheduler.core.fleet_fragments import fragments_of
from fal_scheduler.core.place import Ask
from fal_scheduler.core.quotas import refusal as refusal_of_quota
from fal_scheduler.core.ready_at import NEVER_MS
from fal_scheduler.core.records import Node, Spec
from fal_scheduler.core.scaling import needed
from fal_scheduler.core.starts import times_of
from fal_scheduler.core.told import Health
from fal_scheduler.core.views import failed_text
from fal_scheduler.leadership import Leadership

KINDS: Final = ("", "app", "runner", "node", "request")


def explain(leader: Leadership, request: cluster_pb2.ExplainRequest) -> cluster_pb2.ExplainReply:
    """An app by `team/name`, a runner by its id, a node by id or name. Raises NOT_FOUND, INVALID (kind)."""
    state, subject, kind = leader.view, request.subject, request.kind
    if kind not in KINDS:
        raise invalid("kind", kind, "is none", remedy=f"Use one of {', '.join(KINDS[1:])}.")
    if kind in ("app", "request") and subject not in state.apps:
        raise not_found("app", subject, remedy="List apps with `falctl app list`.")
    if kind == "request":
        return _requests(leader, subject)
    if kind in ("", "app") and subject in state.apps:
        return _app(leader, subject)
    node = state.find_node(subject) if kind in ("", "node") else None
    if node is not None:
        return _node(leader, node)
    if kind == "node":
        raise not_found("node", subject, remedy="List nodes with `falctl node list`.")
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
    reply.lines.extend(_wants(leader, app_id))
    _consider(reply, leader, app_id, state.revision_of(app).spec)
    return reply


def _wants(leader: Leadership, app_id: str) -> Iterator[str]:
    """Why so many runners are wanted, and what holds up the rest."""
    state = leader.view
    app, now_s = state.apps[app_id], leader.clock.monotonic_s()
    scaling = state.scaling_of(app)
    need = needed(state, app, scaling, now_s, leader.clock.wall_s())
    yield (
        f"wants {need.runners}: {need.under_way} requests under way and {need.queued} waiting at "
        f"{scaling.max_multiplexing} a runner, at least {scaling.min_concurrency}, buffer "
        f"{max(scaling.concurrency_buffer, 0)}, at most {scaling.max_concurrency}"
    )
    if (rollout := app.rollout) is not None:
        paused = ", paused" if rollout.paused else ""
        why = f": {rollout.reason}" if rollout.reason else ""
        yield f"rollout {rollout.phase}{paused} from revision {rollout.from_revision} to {rollout.to_revision}{why}"
    if app_id in state.waiting:
        need_class, order = state.waiting.apps[app_id]
        ahead = [one for one in state.waiting.by_need[need_class] if one < order]
        kept = next((node for node, owner in state.reserved.items() if owner == app_id), "")
        yield f"waits for a place with {len(ahead)} apps of the same needs before it" + (
            f"; {kept} is kept free for it" if kept else ""
        )
    if refusal := refusal_of_quota(state, team_of(app_id), state.revision_of(app).spec):
        yield refusal


def _requests(leader: Leadership, app_id: str) -> cluster_pb2.ExplainReply:
    """The line of an app's requests, as its gateways told it, and the slots that could take them."""
    state, book = leader.view, leader.dispatcher.book
    demand = state.demand
    reply = cluster_pb2.ExplainReply(kind="request", subject=app_id)
    runners = [state.runners[id_] for id_ in state.runners_by_app.get(app_id, ())]
    slots = [(one.id, book.runner(one.id)) for one in runners]
    capacity = sum(known.capacity for _, known in slots if known is not None)
    leased = sum(book.leased(id_) for id_, known in slots if known is not None)
    reply.summary = (
        f"{app_id}: {demand.queued(app_id)} requests wait at gateways; {leased} of {capacity} slots of "
        f"{sum(1 for _, known in slots if known is not None)} runners are leased"
    )
    for gateway, loads in sorted(demand.loads.get(app_id, {}).items()):
        reply.lines.append(f"gateway {gateway}: {loads}")
    for id_, known in slots:
        free = known.capacity - book.leased(id_) if known is not None else 0
        reply.lines.append(f"{id_}: {free} free slots" if known is not None else f"{id_}: takes no requests now")
    if not capacity:
        reply.lines.extend(_wants(leader, app_id))
    return reply


def _runner(leader: Leadership, view: cluster_pb2.RunnerView) -> cluster_pb2.ExplainReply:
    state = leader.view
    name = state_pb2.RunnerState.Name(view.state).removeprefix("RUNNER_STATE_")
    where = f" on node {view.node_name or view.runner.node}" if view.runner.node else ""
    summary = f"{view.runner.id} is {name}{where}" + (f": {view.reason}" if view.reason else ".")
    reply = cluster_pb2.ExplainReply(kind="runner", subject=view.runner.id, summary=summary)
    if view.runner.goal_reason:
        reply.lines.append(f"goal: {view.runner.goal_reason}")
    placed = leader.feed.latest("RUNNER_PLACED", view.runner.id)
    if placed is not None and view.runner.node:
        terms = ", ".join(f"{name} {value}" for name, value in placed.facts.items() if name not in ("node", "gpus"))
        reply.lines.append(f"{placed.message}: {terms}" if terms else placed.message)
    _parts(reply, leader, view.runner.id)
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


def _parts(reply: cluster_pb2.ExplainReply, leader: Leadership, runner_id: str) -> None:
    """What was predicted when it was placed, and what came of it."""
    state = leader.view
    made = state.outcomes.get(runner_id) or state.predictions.get(runner_id)
    if made is None:
        return
    actual = dict(made.actual)
    for term in made.prediction.terms:
        if term.ms or term.name in actual:
            reply.parts.add(
                name=term.name, predicted_ms=term.ms, actual_ms=actual.pop(term.name, -1), because=term.because
            )
    for name, ms in actual.items():
        reply.parts.add(name=name, predicted_ms=-1, actual_ms=ms)
    total_ms = made.prediction.total_ms
    reply.parts.add(
        name="total", predicted_ms=total_ms if total_ms < NEVER_MS else -1, actual_ms=made.ready_ms,
        because=f"weights from {made.prediction.tier}" if made.prediction.tier else "",
    )  # fmt: skip


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
            why=dict(verdict.why),
        )
    for change in smallest_changes(state, app_id, spec):
        reply.admissions.add(text=change.text, command=change.command, disturbs=change.disturbs)
