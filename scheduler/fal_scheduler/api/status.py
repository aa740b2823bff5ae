"""The cluster in one message, events, and what waits for an operator."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fal_contract.errors import invalid
from fal_contract.v1 import cluster_pb2
from fal_contract.versions import software
from fal_scheduler.api.views import counts, gpu_ids
from fal_scheduler.core.events import Confirm, Logged
from fal_scheduler.core.state import State
from fal_scheduler.core.views import runner_phase
from fal_scheduler.leadership import Leadership
from fal_scheduler.wire import alarm_to

CONFIRMS = ("adopt", "stop", "stops", "store", "node")


def get_status(leader: Leadership, request: cluster_pb2.GetStatusRequest) -> cluster_pb2.ClusterStatus:
    """Leader, store, counts, alarms."""
    state = leader.view
    assert state.meta is not None, "a leader has loaded its store"
    alarms = [state.alarms[key] for key in sorted(state.alarms)] + list(leader.alarms.all())
    open_nodes = [node.id for node in state.nodes.values() if not node.revoked]
    return cluster_pb2.ClusterStatus(
        cluster_id=state.meta.cluster_id,
        epoch=state.meta.epoch,
        incarnation=state.meta.incarnation,
        term=state.term,
        store=leader.store,
        store_revision=state.store_revision,
        software=software(),
        uptime_s=leader.clock.monotonic_s() - state.term_began_s,
        nodes=_node_counts(state),
        runners=counts(runner_phase(state, runner).state.name for runner in state.runners.values()),
        gpus=sum(len(gpu_ids(state, node_id)) for node_id in open_nodes),
        gpus_free=sum(len(state.fleet.free_gpus(node_id)) for node_id in open_nodes),
        apps=len(state.apps),
        models=len(state.models),
        alarms=[alarm_to(alarm) for alarm in alarms],
        commits=leader.commits(),
    )


def _node_counts(state: State) -> dict[str, int]:
    """By health; a cordoned node that is ready counts as cordoned, so that the sum is the number of nodes."""
    names = []
    for node in state.nodes.values():
        health = str(state.health_of(node.id))
        names.append("cordoned" if node.cordoned and health == "ready" else health)
    return counts(names)


async def events(leader: Leadership, request: cluster_pb2.EventsRequest) -> AsyncIterator[cluster_pb2.Event]:
    """What happened, oldest first; with follow also what happens."""
    node = leader.view.find_node(request.subject) if request.subject else None
    subject = node.id if node is not None else request.subject
    async for event in leader.feed.follow(after=request.after, subject=subject, follow=request.follow):
        yield event_to(event)


def event_to(event: Logged) -> cluster_pb2.Event:
    """An event for an operator."""
    return cluster_pb2.Event(
        number=event.number,
        time_s=event.wall_s,
        kind=event.kind,
        subject=event.subject,
        message=event.message,
        actor=event.actor,
        facts=event.facts,
    )


async def confirm(leader: Leadership, request: cluster_pb2.ConfirmRequest, actor: str) -> cluster_pb2.ConfirmReply:
    """Settle what waits. Raises INVALID for a word that is none of the five."""
    if request.what not in CONFIRMS:
        raise invalid("what", request.what, "cannot be confirmed", remedy=f"Use one of {', '.join(CONFIRMS)}.")
    node = leader.view.find_node(request.subject) if request.subject else None
    subject = node.id if node is not None else request.subject
    reply = await leader.engine.submit(Confirm(request.what, subject, actor))
    return cluster_pb2.ConfirmReply(settled=reply.lines)
