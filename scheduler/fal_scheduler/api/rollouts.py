"""Rollouts: steer one, choose a kept revision, list them."""

from __future__ import annotations

from collections import Counter

from fal_contract.errors import not_found
from fal_contract.ids import check_customer
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api.views import app_view
from fal_scheduler.codec import revision_to_pb
from fal_scheduler.core.records import App, Goal, Runner
from fal_scheduler.core.rollout_events import SetRevision, SetRollout
from fal_scheduler.core.state import State
from fal_scheduler.leadership import Leadership


async def steer_rollout(
    leader: Leadership, request: cluster_pb2.SteerRolloutRequest, actor: str
) -> cluster_pb2.AppView:
    """Raises NOT_FOUND, INVALID (action), FAILED_PRECONDITION (none under way)."""
    check_customer(request.id, field="id")
    await leader.engine.submit(SetRollout(request.id, request.action, actor))
    return app_view(leader.view, _app(leader.view, request.id))


async def set_revision(leader: Leadership, request: cluster_pb2.SetRevisionRequest, actor: str) -> cluster_pb2.AppView:
    """Raises NOT_FOUND, INVALID (a revision that is not kept)."""
    check_customer(request.id, field="id")
    await leader.engine.submit(SetRevision(request.id, request.revision, actor))
    return app_view(leader.view, _app(leader.view, request.id))


def list_revisions(leader: Leadership, request: cluster_pb2.ListRevisionsRequest) -> cluster_pb2.ListRevisionsReply:
    """The kept ones, the newest first."""
    state = leader.view
    app = _app(state, request.id)
    runners = [state.runners[id_] for id_ in state.runners_by_app.get(app.id, ())]
    running = [one for one in runners if one.goal is Goal.RUN]
    counts = Counter(one.revision_for(app.id) for one in running)
    ready = Counter(one.revision_for(app.id) for one in running if _ready(state, one))
    found = sorted((one for (owner, _), one in state.revisions.items() if owner == app.id), key=lambda one: -one.number)
    return cluster_pb2.ListRevisionsReply(
        revisions=[
            cluster_pb2.RevisionView(
                revision=revision_to_pb(one),
                runners=counts[one.number],
                ready=ready[one.number],
                current=one.number == app.revision,
            )
            for one in found
        ]
    )


def _ready(state: State, runner: Runner) -> bool:
    status = state.status_of(runner)
    return status is not None and status.serves


def _app(state: State, app_id: str) -> App:
    app = state.apps.get(app_id)
    if app is None:
        raise not_found("app", app_id, remedy="List apps with `falctl app list`.")
    return app


__all__ = ["list_revisions", "set_revision", "steer_rollout"]
