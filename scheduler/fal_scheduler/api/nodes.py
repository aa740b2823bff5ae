"""Nodes."""

from __future__ import annotations

from fal_contract.errors import not_found
from fal_contract.ids import check_label
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api.paging import page
from fal_scheduler.api.views import find_node, node_view
from fal_scheduler.core.events import CordonNode, RevokeNode
from fal_scheduler.core.node_events import CancelDrain, DeclareLost, DrainNode, LabelNode, RemoveNode
from fal_scheduler.core.told import Health
from fal_scheduler.leadership import Leadership


def list_nodes(leader: Leadership, request: cluster_pb2.ListNodesRequest) -> cluster_pb2.ListNodesReply:
    """A page of nodes in order of name, then id; of one pool, or one node by id or name. NOT_FOUND for either."""
    state = leader.view
    if request.pool and request.pool not in state.pools:
        raise not_found("pool", request.pool, remedy="List pools with `falctl pool list`.")
    nodes = [find_node(state, request.node)] if request.node else list(state.nodes.values())
    keys = sorted((node.name, node.id) for node in nodes if request.pool in ("", node.pool))
    views, following = page(
        keys, lambda key: node_view(leader, state.nodes[key[1]]), limit=request.limit, after=request.after
    )
    return cluster_pb2.ListNodesReply(nodes=views, next=following, total=len(keys))


async def cordon_node(leader: Leadership, request: cluster_pb2.CordonNodeRequest, actor: str) -> cluster_pb2.NodeView:
    """Stop or allow new placements."""
    node = find_node(leader.view, request.node)
    await leader.engine.submit(CordonNode(node.id, request.cordon, request.reason, actor))
    return node_view(leader, leader.view.nodes[node.id])


async def revoke_node(leader: Leadership, request: cluster_pb2.RevokeNodeRequest, actor: str) -> cluster_pb2.NodeView:
    """Refuse a node from now on; its streams are cut."""
    node = find_node(leader.view, request.node)
    await leader.engine.submit(RevokeNode(node.id, request.reason, actor=actor))
    return node_view(leader, leader.view.nodes[node.id])


async def drain_node(leader: Leadership, request: cluster_pb2.DrainNodeRequest, actor: str) -> cluster_pb2.NodeView:
    """Let a node's runners leave it, or end that. Raises NOT_FOUND, INVALID (kind, deadline), FAILED_PRECONDITION."""
    node = find_node(leader.view, request.node)
    if request.cancel:
        await leader.engine.submit(CancelDrain(node.id, actor))
    else:
        event = DrainNode(
            node.id,
            request.kind or "drain",
            request.deadline_s if request.HasField("deadline_s") else None,
            request.force,
            request.uncordon,
            request.reason,
            actor,
        )
        await leader.engine.submit(event)
    return node_view(leader, leader.view.nodes[node.id])


async def label_node(leader: Leadership, request: cluster_pb2.LabelNodeRequest, actor: str) -> cluster_pb2.NodeView:
    """Set and remove labels. Raises NOT_FOUND, INVALID."""
    node = find_node(leader.view, request.node)
    for name in request.put:
        check_label(name, field="labels")
    await leader.engine.submit(LabelNode(node.id, dict(request.put), tuple(request.drop), actor))
    return node_view(leader, leader.view.nodes[node.id])


async def remove_node(
    leader: Leadership, request: cluster_pb2.RemoveNodeRequest, actor: str
) -> cluster_pb2.RemoveNodeReply:
    """Forget a node. Raises NOT_FOUND, FAILED_PRECONDITION (in use)."""
    node = find_node(leader.view, request.node)
    runners = len(leader.view.runners_by_node.get(node.id, ()))
    await leader.engine.submit(RemoveNode(node.id, request.force, actor))
    return cluster_pb2.RemoveNodeReply(node=node.id, runners=runners)


async def declare_lost(
    leader: Leadership, request: cluster_pb2.DeclareLostRequest, actor: str
) -> cluster_pb2.DeclareLostReply:
    """Say that silent nodes are gone. Raises NOT_FOUND, FAILED_PRECONDITION (none is silent)."""
    state = leader.view
    await leader.engine.submit(DeclareLost(request.pool, actor))
    silent = [
        node.id
        for node in state.nodes.values()
        if node.pool == request.pool and state.health_of(node.id) in (Health.UNKNOWN, Health.LOST)
    ]
    runners = sum(len(state.runners_by_node.get(node_id, ())) for node_id in silent)
    return cluster_pb2.DeclareLostReply(nodes=len(silent), runners=runners)
