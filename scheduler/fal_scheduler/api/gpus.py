"""Single GPUs: an operator takes them out, gives them back, cuts them."""

from __future__ import annotations

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import GPU_MIG_INSTANCES_MAX, GPU_MIG_TIMEOUT_S, GPU_ORDER_TIMEOUT_S
from fal_contract.v1 import cluster_pb2
from fal_scheduler import wire
from fal_scheduler.api.views import find_node
from fal_scheduler.core.events import Logged
from fal_scheduler.core.gpu_commands import gpu_named, told_gpus
from fal_scheduler.core.gpu_events import QuarantineGpu, ReleaseGpu
from fal_scheduler.core.records import Node
from fal_scheduler.core.state import State
from fal_scheduler.leadership import Leadership

# Beyond what its node may take, so that the node's own answer is heard.
_MARGIN_S = 5.0


async def quarantine(leader: Leadership, request: cluster_pb2.QuarantineGpuRequest, actor: str) -> cluster_pb2.GpuReply:
    """Take one out. NOT_FOUND, INVALID (its name fits several)."""
    node = find_node(leader.view, request.node)
    gpu = gpu_named(leader.view, node, request.gpu)
    await leader.engine.submit(QuarantineGpu(node.id, gpu, request.reason, actor))
    return _reply(leader.view, node, gpu)


async def release(leader: Leadership, request: cluster_pb2.ReleaseGpuRequest, actor: str) -> cluster_pb2.GpuReply:
    """Give one back, once its node has looked at it. FAILED_PRECONDITION: it did not pass, or is in use.

    With `force` it is not looked at, and a silent node keeps nobody from it.
    """
    node = find_node(leader.view, request.node)
    gpu = gpu_named(leader.view, node, request.gpu)
    lines: list[str] = []
    for instance in _instances(leader.view, node, gpu):
        try:
            action = "clear" if request.force else "release"
            lines += await leader.sessions.gpu_orders.give(
                node.id, instance, action, timeout_s=GPU_ORDER_TIMEOUT_S + _MARGIN_S
            )
        except FalError as error:
            if not (request.force and error.code in (Code.UNAVAILABLE, Code.TIMEOUT)):
                raise
            lines.append(f"its node was not told: {error.what}")
    await leader.engine.submit(ReleaseGpu(node.id, gpu, actor))
    return _reply(leader.view, node, gpu, lines)


async def set_mig(leader: Leadership, request: cluster_pb2.SetMigRequest, actor: str) -> cluster_pb2.GpuReply:
    """Cut one, or make it whole. FAILED_PRECONDITION: it is held, or cannot be cut so."""
    if len(request.layout) > GPU_MIG_INSTANCES_MAX:
        most = f"A device has at most {GPU_MIG_INSTANCES_MAX}."
        raise invalid("layout", "+".join(request.layout), "has too many instances", remedy=most)
    state = leader.view
    node = find_node(state, request.node)
    gpu = gpu_named(state, node, request.gpu)
    gpu = next((one.parent_id for one in told_gpus(state, node) if one.id == gpu and one.parent_id), gpu)
    if holders := _holders(state, node, gpu):
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"GPU {gpu} of node {node.name} is held by {', '.join(holders)}",
            remedy=f"`falctl gpu quarantine {node.name} {gpu}` moves them elsewhere; cut it when they are gone.",
            field="gpu",
        )
    lines = await leader.sessions.gpu_orders.give(
        node.id, gpu, "mig", list(request.layout), timeout_s=GPU_MIG_TIMEOUT_S + _MARGIN_S
    )
    text = f"MIG layout {'+'.join(request.layout) or 'off'}"
    leader.feed.note(Logged("GPU_CUT", gpu, text, leader.clock.wall_s(), actor, {"node": node.id}))
    return _reply(leader.view, node, gpu, lines)


def _instances(state: State, node: Node, gpu: str) -> list[str]:
    """The GPU itself, or the instances of a device that is cut."""
    return [one.id for one in told_gpus(state, node) if one.parent_id == gpu] or [gpu]


def _holders(state: State, node: Node, gpu: str) -> list[str]:
    ids = {gpu, *_instances(state, node, gpu)}
    held = state.fleet.occupancy.get(node.id)
    return sorted({runner for one, runner in held.gpus.items() if one in ids}) if held is not None else []


def _reply(state: State, node: Node, gpu: str, lines: list[str] | None = None) -> cluster_pb2.GpuReply:
    reply = cluster_pb2.GpuReply(node=node.id, gpu=gpu, lines=lines or (), runners=_holders(state, node, gpu))
    now = next((one for one in told_gpus(state, node) if one.id == gpu), None)
    if now is not None:
        reply.now.CopyFrom(wire.gpu_to(now))
    return reply
