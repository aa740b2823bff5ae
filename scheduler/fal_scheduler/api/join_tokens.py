"""Join tokens. The secret is drawn here, shown once and never kept."""

from __future__ import annotations

from random import SystemRandom

from fal_contract.join_token import new_token
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api.views import token_view
from fal_scheduler.core import tokens
from fal_scheduler.core.events import CreateToken, RevokeToken
from fal_scheduler.leadership import Leadership


async def create_token(
    leader: Leadership, request: cluster_pb2.CreateTokenRequest, actor: str
) -> cluster_pb2.CreateTokenReply:
    """A token with which machines join a pool. Raises INVALID, NOT_FOUND (pool)."""
    shown = new_token(SystemRandom(), leader.ca.fingerprint)
    now_s = leader.clock.wall_s()
    token = tokens.create(
        shown.id,
        shown.secret,
        pool=request.pool,
        ttl_s=request.ttl_s,
        uses=request.uses,
        created_by=actor,
        now_s=now_s,
    )
    await leader.engine.submit(CreateToken(token, actor))
    return cluster_pb2.CreateTokenReply(token=str(shown), view=token_view(token, now_s))


def list_tokens(leader: Leadership, request: cluster_pb2.ListTokensRequest) -> cluster_pb2.ListTokensReply:
    """All tokens, in order of expiry, then id."""
    now_s = leader.clock.wall_s()
    kept = sorted(leader.view.tokens.values(), key=lambda token: (token.expires_at_s, token.id))
    return cluster_pb2.ListTokensReply(tokens=[token_view(token, now_s) for token in kept])


async def revoke_token(
    leader: Leadership, request: cluster_pb2.RevokeTokenRequest, actor: str
) -> cluster_pb2.TokenView:
    """Refuse a token from now on."""
    await leader.engine.submit(RevokeToken(request.id, actor))
    return token_view(leader.view.tokens[request.id], leader.clock.wall_s())
