"""Pools."""

from __future__ import annotations

from fal_contract.manifest import PoolManifest
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api.views import pool_view
from fal_scheduler.codec_nodes import pool_from_pb, pool_to_pb
from fal_scheduler.core.events import ApplyPool
from fal_scheduler.leadership import Leadership


async def apply_pool(
    leader: Leadership, request: cluster_pb2.ApplyPoolRequest, actor: str
) -> cluster_pb2.ApplyPoolReply:
    """Make or change a pool. Raises INVALID, CONFLICT."""
    pool = PoolManifest.from_proto(request.pool).to_proto()
    expected = request.expected_generation if request.HasField("expected_generation") else None
    reply = await leader.engine.submit(ApplyPool(pool_from_pb(pool), expected, actor))
    return cluster_pb2.ApplyPoolReply(pool=pool_to_pb(leader.view.pools[reply.subject]), outcome=reply.outcome)


def list_pools(leader: Leadership, request: cluster_pb2.ListPoolsRequest) -> cluster_pb2.ListPoolsReply:
    """All pools, in order of name."""
    state = leader.view
    return cluster_pb2.ListPoolsReply(pools=[pool_view(state, state.pools[name]) for name in sorted(state.pools)])
