"""The inventory as the scheduler is told it. Pure but for protobuf.

Invariant: a GPU that nothing holds but whose memory is in use (a container just ended, or a process that we do
not know) is told as quarantined, so that nothing is placed on it before it is really free.
"""

from __future__ import annotations

from collections.abc import Set

from fal_agent.core.admission import in_use
from fal_agent.ports import MachineView
from fal_contract.v1 import agent_pb2


def inventory_told(view: MachineView, held: Set[str]) -> agent_pb2.Inventory:
    """A copy of the inventory; `held` are GPUs of live runners."""
    told = agent_pb2.Inventory()
    told.CopyFrom(view.inventory)
    for gpu in told.gpus:
        seen = view.gpus.get(gpu.id)
        if seen is None or gpu.id in held:
            continue
        if gpu.health != agent_pb2.GPU_HEALTH_QUARANTINED and (busy := in_use(seen)) is not None:
            gpu.health = agent_pb2.GPU_HEALTH_QUARANTINED
            gpu.health_reason = busy
    return told
