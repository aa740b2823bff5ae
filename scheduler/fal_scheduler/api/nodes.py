"""Nodes."""

from __future__ import annotations

from fal_contract.errors import not_found
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api.views import find_node, node_view
from fal_scheduler.core.events import CordonNode, RevokeNode
from fal_scheduler.leadership import Leadership


def list_nodes(leader: Leadership, request: cluster_pb2.ListNodesRequest) -> cluster_pb2.ListNodesReply:
    """Nodes in order of name, then id; of one pool, or one node by id or name. Raises NOT_FOUND for either."""
    state = leader.view
    if request.pool and request.pool not in state.pools:
        raise not_found("pool", request.pool, remedy="List pools with `falctl pool list`.")
    nodes = [find_node(state, request.node)] if request.node else list(state.nodes.values())
    chosen = [node for node in nodes if request.pool in ("", node.pool)]
    chosen.sort(key=lambda node: (node.name, node.id))
    return cluster_pb2.ListNodesReply(nodes=[node_view(leader, node) for node in chosen])


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
