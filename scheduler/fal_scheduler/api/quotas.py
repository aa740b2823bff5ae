"""Quotas: what teams may hold, and what they do."""

from __future__ import annotations

from fal_contract.errors import not_found
from fal_contract.ids import team_of
from fal_contract.v1 import cluster_pb2
from fal_scheduler.codec_nodes import quota_to_pb
from fal_scheduler.core.quota_events import SetQuota, UnsetQuota
from fal_scheduler.core.quotas import borrowed_milli
from fal_scheduler.core.state import State
from fal_scheduler.leadership import Leadership


async def set_quota(leader: Leadership, request: cluster_pb2.SetQuotaRequest, actor: str) -> cluster_pb2.QuotaView:
    """Give a team a quota. Raises INVALID (team, gpus)."""
    await leader.engine.submit(SetQuota(request.team, request.gpu_milli, not request.no_borrowing, actor))
    return _view(leader.view, request.team)


async def unset_quota(leader: Leadership, request: cluster_pb2.UnsetQuotaRequest, actor: str) -> cluster_pb2.QuotaView:
    """Take it away. Raises NOT_FOUND."""
    await leader.engine.submit(UnsetQuota(request.team, actor))
    return _view(leader.view, request.team)


def list_quotas(leader: Leadership, request: cluster_pb2.ListQuotasRequest) -> cluster_pb2.ListQuotasReply:
    """Every team that has a quota, holds GPUs or waits, in order; one team, where it is named. Raises NOT_FOUND."""
    state = leader.view
    teams = {*state.quotas, *state.held_milli, *(team_of(app_id) for app_id in state.waiting)}
    if request.team and request.team not in teams:
        raise not_found("quota", request.team, remedy="Set one with `falctl quota set TEAM --gpus N`.")
    chosen = [request.team] if request.team else sorted(teams)
    return cluster_pb2.ListQuotasReply(quotas=[_view(state, team) for team in chosen])


def _view(state: State, team: str) -> cluster_pb2.QuotaView:
    quota = state.quotas.get(team)
    return cluster_pb2.QuotaView(
        quota=quota_to_pb(quota) if quota is not None else None,
        team=team,
        held_gpu_milli=state.held_milli.get(team, 0),
        borrowed_gpu_milli=borrowed_milli(state, team) if quota is not None else 0,
        waiting=sum(1 for app_id in state.waiting if team_of(app_id) == team),
    )


__all__ = ["list_quotas", "set_quota", "unset_quota"]
