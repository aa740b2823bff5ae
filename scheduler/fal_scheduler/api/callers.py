"""People and gateways: refusing the certificates that they hold."""

from __future__ import annotations

from fal_contract.v1 import cluster_pb2
from fal_scheduler.core.events import RevokeCaller
from fal_scheduler.leadership import Leadership


async def revoke(leader: Leadership, request: cluster_pb2.RevokeRequest, actor: str) -> cluster_pb2.RevokeReply:
    """Refuse a subject's present certificates everywhere; its streams are cut. Raises INVALID."""
    await leader.engine.submit(RevokeCaller(request.subject, request.reason, actor=actor))
    made = max(
        (one for one in leader.view.revocations.values() if one.subject == request.subject),
        key=lambda one: one.revoked_at_s,
    )
    return cluster_pb2.RevokeReply(subject=made.subject, revoked_at_s=made.revoked_at_s)
