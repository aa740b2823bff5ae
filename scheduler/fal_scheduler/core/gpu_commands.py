"""What operators command about single GPUs, and how they name them. Pure.

An operator's quarantine is part of the node's record: it outlives scheduler, agent and machine. What a node finds for
itself is told, and not kept here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fal_contract.errors import Code, FalError, invalid, not_found
from fal_scheduler.core import gpu_faults
from fal_scheduler.core.events import Reply
from fal_scheduler.core.gpu_events import GpuCommand, QuarantineGpu, ReleaseGpu
from fal_scheduler.core.records import Node
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Gpu
from fal_scheduler.core.work import Work

QUARANTINED_PER_NODE_MAX: Final = 256
REASON_CHARS_MAX: Final = 512


def command(work: Work, event: GpuCommand) -> Reply:
    """Do one of this module's commands."""
    node = work.state.find_node(event.node)
    if node is None:
        raise not_found("node", event.node, remedy="List them with `falctl node list`.")
    match event:
        case QuarantineGpu():
            return _quarantine(work, node, event)
        case ReleaseGpu():
            return _release(work, node, event)


def _quarantine(work: Work, node: Node, event: QuarantineGpu) -> Reply:
    if len(event.reason) > REASON_CHARS_MAX:
        remedy = f"Use at most {REASON_CHARS_MAX} characters."
        raise invalid("reason", event.reason[:40] + "…", "is too long", remedy=remedy)
    if event.gpu not in {id_ for gpu in told_gpus(work.state, node) for id_ in (gpu.id, gpu.parent_id) if id_}:
        raise not_found("GPU", event.gpu, remedy=f"falctl gpu list shows those of node {node.name}.")
    have = node.quarantined_gpus.get(event.gpu)
    if have == event.reason:
        return Reply("unchanged", node.id)
    if have is None and len(node.quarantined_gpus) >= QUARANTINED_PER_NODE_MAX:
        what = f"{QUARANTINED_PER_NODE_MAX} GPUs of node {node.name} are taken out"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Cordon the node.", field="gpu")
    _put(work, node, {**node.quarantined_gpus, event.gpu: event.reason})
    work.log("GPU_TAKEN_OUT", event.gpu, event.reason or "by an operator", node=node.id)
    return Reply("changed", node.id)


def _release(work: Work, node: Node, event: ReleaseGpu) -> Reply:
    if event.gpu not in node.quarantined_gpus:
        return Reply("unchanged", node.id)
    _put(work, node, {id_: why for id_, why in node.quarantined_gpus.items() if id_ != event.gpu})
    work.capacity_grew()
    work.log("GPU_GIVEN_BACK", event.gpu, "by an operator", node=node.id)
    return Reply("changed", node.id)


def _put(work: Work, node: Node, quarantined: dict[str, str]) -> None:
    after = replace(node, quarantined_gpus=dict(sorted(quarantined.items())))
    work.put(after, node)
    gpu_faults.tell(work, after)


def told_gpus(state: State, node: Node) -> tuple[Gpu, ...]:
    """GPUs that a node has told of, as placement sees them."""
    facts = state.fleet.facts.get(node.id)
    return facts.gpus if facts is not None else ()


def gpu_named(state: State, node: Node, name: str) -> str:
    """The id of a GPU named by id, by the beginning of it, or by its index; of a device cut by MIG the device's.

    NOT_FOUND, and INVALID where several begin so, both naming what there is. One that an operator took out is found
    also while its node does not tell of it.
    """
    gpus = told_gpus(state, node)
    devices = list(dict.fromkeys([gpu.parent_id or gpu.id for gpu in gpus]))
    ids = list(dict.fromkeys([*devices, *(gpu.id for gpu in gpus), *node.quarantined_gpus]))
    if name in ids:
        return name
    if name.isdecimal():
        at = [gpu.parent_id or gpu.id for gpu in gpus if gpu.index == int(name)]
        if at:
            return at[0]
    found = [id_ for id_ in ids if name and id_.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        remedy = f"Write more of one of {', '.join(found[:8])}."
        raise invalid("gpu", name, f"begins the ids of {len(found)} GPUs of node {node.name}", remedy=remedy)
    raise not_found("GPU", name, remedy=f"Node {node.name} has {', '.join(devices[:8]) or 'told of none'}.")


__all__ = ["command", "gpu_named", "told_gpus"]
