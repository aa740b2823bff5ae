"""Messages for operators from the engine's view. Everything listed is complete and in a stable order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from fal_contract.errors import not_found
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2
from fal_scheduler import wire
from fal_scheduler.codec import (
    app_to_pb,
    revision_to_pb,
    runner_to_pb,
)
from fal_scheduler.codec_nodes import node_to_pb, pool_to_pb
from fal_scheduler.codec_spec import scaling_to_pb
from fal_scheduler.core.gpu_faults import as_placed
from fal_scheduler.core.records import App, Node, Pool, Runner
from fal_scheduler.core.serving import last_words
from fal_scheduler.core.state import Pending, State
from fal_scheduler.core.tokens import JoinToken
from fal_scheduler.core.told import Health, RunnerStatus
from fal_scheduler.core.views import app_reason, pending_of, runner_phase, wanted
from fal_scheduler.leadership import Leadership


def pool_view(state: State, pool: Pool) -> cluster_pb2.PoolView:
    """A pool and what is in it."""
    nodes = [node for node in state.nodes.values() if node.pool == pool.name and not node.revoked]
    return cluster_pb2.PoolView(
        pool=pool_to_pb(pool),
        nodes=len(nodes),
        nodes_ready=sum(1 for node in nodes if state.health_of(node.id) is Health.READY),
        gpus=sum(len(gpu_ids(state, node.id)) for node in nodes),
        gpus_free=sum(len(state.fleet.free_gpus(node.id)) for node in nodes),
    )


def gpu_ids(state: State, node_id: str) -> list[str]:
    """GPUs that the node has told of."""
    live = state.live.get(node_id)
    inventory = live.inventory if live is not None else None
    return [gpu.id for gpu in inventory.gpus] if inventory is not None else []


def node_view(leader: Leadership, node: Node) -> cluster_pb2.NodeView:
    """A node with what it told."""
    state = leader.view
    live = state.live.get(node.id)
    view = cluster_pb2.NodeView(
        node=node_to_pb(node),
        health=state.health_of(node.id),
        reason=_node_reason(leader, node),
        heard_age_s=-1.0,
        gpus_free=state.fleet.free_gpus(node.id),
        paths=leader.dispatcher.tunnels.paths(node.id),
    )
    runners = set(state.runners_by_node.get(node.id, ()))
    pool = state.pools.get(node.pool)
    view.labels.update({**(pool.labels if pool is not None else {}), **node.labels})
    if live is not None and live.session_id:
        runners.update(live.orphans)
        view.heard_age_s = max(0.0, leader.clock.monotonic_s() - live.heard_at_s)
        view.software = live.software
        view.connected = live.connected
        view.capabilities.CopyFrom(wire.fill(agent_pb2.Capabilities(), live.capabilities))
        view.endpoints.extend(wire.endpoint_to(endpoint) for endpoint in live.endpoints)
        if live.inventory is not None:
            gpus = as_placed(live.inventory.gpus, node.quarantined_gpus)
            view.inventory.CopyFrom(wire.inventory_to(replace(live.inventory, gpus=gpus)))
    view.runners.extend(sorted(runners))
    return view


def _node_reason(leader: Leadership, node: Node) -> str:
    """Why nothing new is placed on it; empty when it is ready and open."""
    state = leader.view
    live = state.live.get(node.id)
    health = state.health_of(node.id)
    if health is Health.REVOKED:
        reasons = [x.reason for x in state.revocations.values() if x.subject == f"node/{node.id}" and x.reason]
        return f"revoked: {reasons[-1]}" if reasons else "revoked"
    if live is None or not live.session_id:
        return "not heard since this scheduler took over"
    if live.hold:
        return f"waits for `falctl operator confirm`: {live.hold_reason}"
    if health is not Health.READY:
        return f"silent for {leader.clock.monotonic_s() - live.heard_at_s:.0f} s"
    if node.cordoned:
        return f"cordoned: {node.cordon_reason}" if node.cordon_reason else "cordoned"
    return ""


def find_node(state: State, name: str) -> Node:
    """A node by id, or by a name that only one has. Raises NOT_FOUND."""
    node = state.find_node(name)
    if node is None:
        twins = sorted(x.id for x in state.nodes.values() if x.name == name)
        remedy = f"Name one of {', '.join(twins)}." if twins else "List nodes with `falctl node list`."
        raise not_found("node", name, remedy=remedy)
    return node


def runner_view(state: State, runner: Runner) -> cluster_pb2.RunnerView:
    """A runner of the store."""
    phase = runner_phase(state, runner)
    status = last_words(state, runner)
    node = state.nodes.get(runner.node)
    view = cluster_pb2.RunnerView(
        runner=runner_to_pb(runner),
        state=int(phase.state),  # type: ignore[arg-type]  # the numbers are the wire's
        reason=phase.reason,
        failures=phase.failures,
        backoff_until_s=phase.backoff_until_wall_s,
        status=wire.status_to(status) if status is not None else None,
        node_name=node.name if node is not None else "",
    )
    pending = pending_of(state, runner)
    if pending is not None:
        view.placement.CopyFrom(placement_view(pending))
    return view


def orphan_view(state: State, node_id: str, status: RunnerStatus) -> cluster_pb2.RunnerView:
    """A container that the store does not know, told as a runner."""
    node = state.nodes.get(node_id)
    runner = state_pb2.Runner(
        id=status.runner_id,
        share_group=status.share_group,
        node=node_id,
        gpus=status.gpus,
        assignment=state_pb2.AssignmentRef(id=status.assignment_id, term=status.term),
        bindings=[state_pb2.Binding(app=status.app, revision=status.revision)],
        memory_bytes=status.memory_bytes,
        cpu_milli=status.cpu_milli,
        gpu_milli=status.gpu_milli,
    )
    return cluster_pb2.RunnerView(
        runner=runner,
        state=int(status.state),  # type: ignore[arg-type]
        reason="an orphan: kept until `falctl operator confirm adopt` or `stop`",
        status=wire.status_to(status),
        node_name=node.name if node is not None else "",
        orphan=True,
    )


def app_view(state: State, app: App) -> cluster_pb2.AppView:
    """An app with its current revision and runners."""
    scaling = state.scaling_of(app)
    return cluster_pb2.AppView(
        app=app_to_pb(app),
        revision=revision_to_pb(state.revision_of(app)),
        scaling=scaling_to_pb(scaling),
        wanted=wanted(state, app),
        runners=[runner_view(state, state.runners[i]) for i in sorted(state.runners_by_app.get(app.id, ()))],
        reason=app_reason(state, app),
    )


def token_view(token: JoinToken, now_s: float) -> cluster_pb2.TokenView:
    """A token without its secret."""
    return cluster_pb2.TokenView(
        id=token.id,
        pool=token.pool,
        expires_at_s=token.expires_at_s,
        uses_left=token.uses_left,
        state=token.state(now_s),
        created_by=token.created_by,
    )


def placement_view(pending: Pending) -> cluster_pb2.PlacementView:
    """What placement found."""
    return cluster_pb2.PlacementView(
        feasible=pending.feasible, refused=dict(pending.refused), nearest_miss=pending.nearest_miss
    )


def counts(names: Iterable[str]) -> dict[str, int]:
    """How many of each."""
    return dict(sorted(Counter(names).items()))
