"""GPUs that are not there: for laptops, demonstrations and tests. Same protocol and contract suite as NVML.

UUIDs derive from the node's name and the position, so a restarted agent has the same GPUs. SXM parts are joined all to
all by NVLink, others over PCIe: half of the devices on each of two NUMA nodes. Faults are set by tests.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fal_agent.inventory.catalog import mig_model
from fal_agent.inventory.model import Ecc, Found, Gpu, Host, Link, LinkKind, Snapshot, advance
from fal_agent.inventory.spec import Group
from fal_contract.errors import not_found

_IDLE_TEMPERATURE_C: Final = 34
_NUMA_NODES: Final = 2
# What a driver of today says, so that apps which ask for a version can be tried out.
DRIVER_VERSION: Final = "570.86.15-simulated"
CUDA_VERSION: Final = "12.8"


@dataclass(slots=True)
class _Fault:
    """What a test has set for one GPU."""

    temperature_c: int | None = None
    ecc: Ecc | None = None
    memory_used_bytes: int = 0
    pids: tuple[int, ...] = ()
    gone: bool = False


class SimulatedInventory:
    """`groups` come from `spec.parse_sim_gpus`; `read_host` is called for every snapshot."""

    def __init__(self, groups: Sequence[Group], *, node_name: str, read_host: Callable[[], Host]) -> None:
        self._gpus = _devices(groups, node_name)
        self._read_host = read_host
        self._faults = {gpu.id: _Fault() for gpu in self._gpus}
        self._last: Snapshot | None = None

    async def snapshot(self) -> Snapshot:
        seen = tuple(self._seen(gpu) for gpu in self._gpus if not self._faults[gpu.id].gone)
        self._last = advance(self._last, _found(seen), self._read_host())
        return self._last

    async def close(self) -> None:
        return

    def set_temperature(self, gpu_id: str, temperature_c: int | None) -> None:
        """None: back to idle."""
        self._fault(gpu_id).temperature_c = temperature_c

    def set_ecc(self, gpu_id: str, ecc: Ecc | None) -> None:
        """None: back to no errors."""
        self._fault(gpu_id).ecc = ecc

    def use(self, gpu_id: str, *, memory_bytes: int, pids: Sequence[int] = ()) -> None:
        """Somebody's processes on the device; 0 and none free it."""
        fault = self._fault(gpu_id)
        fault.memory_used_bytes, fault.pids = memory_bytes, tuple(pids)

    def vanish(self, gpu_id: str) -> None:
        """It falls off the bus."""
        self._fault(gpu_id).gone = True

    def restore(self, gpu_id: str) -> None:
        """It is back."""
        self._fault(gpu_id).gone = False

    def _fault(self, gpu_id: str) -> _Fault:
        fault = self._faults.get(gpu_id)
        if fault is None:
            raise not_found("simulated GPU", gpu_id, remedy="Use an id of the inventory.")
        return fault

    def _seen(self, gpu: Gpu) -> Gpu:
        fault = self._faults[gpu.id]
        return replace(
            gpu,
            temperature_c=_IDLE_TEMPERATURE_C if fault.temperature_c is None else fault.temperature_c,
            ecc=fault.ecc or Ecc(),
            memory_used_bytes=fault.memory_used_bytes,
            pids=fault.pids,
            utilisation_percent=100 if fault.pids else 0,
        )


def _found(gpus: tuple[Gpu, ...]) -> Found:
    return Found(gpus=gpus, driver_version=DRIVER_VERSION, cuda_version=CUDA_VERSION)


def _devices(groups: Sequence[Group], node_name: str) -> tuple[Gpu, ...]:
    whole: list[tuple[Group, Gpu]] = []
    total = sum(group.count for group in groups)
    for group in groups:
        for _ in range(group.count):
            index = len(whole)
            gpu = Gpu(
                id=f"GPU-{_uuid(node_name, str(index))}",
                index=index,
                model=group.model.name,
                product=group.model.product,
                memory_bytes=group.model.memory_bytes,
                pci_bus_id=f"00000000:{0x10 + index:02X}:00.0",
                numa_node=index * _NUMA_NODES // total,
                power_w=group.model.power_idle_w,
            )
            whole.append((group, gpu))
    devices: list[Gpu] = []
    for group, gpu in whole:
        if group.instances:
            devices += _instances(group, gpu, node_name)
        else:
            # A device in MIG mode has no peer access.
            peers = [(near, other) for near, other in whole if other is not gpu and not near.instances]
            links = tuple(_link(group, gpu, near, other) for near, other in peers)
            devices.append(replace(gpu, links=links))
    return tuple(devices)


def _link(group: Group, gpu: Gpu, other_group: Group, other: Gpu) -> Link:
    if group.model is other_group.model and group.model.nvlinks:
        return Link(other.id, LinkKind.NVLINK, group.model.nvlinks)
    return Link(other.id, LinkKind.PCIE_HOST if gpu.numa_node == other.numa_node else LinkKind.SYSTEM)


def _instances(group: Group, gpu: Gpu, node_name: str) -> list[Gpu]:
    """MIG instances have no NVLink and share their device's place."""
    return [
        replace(
            gpu,
            id=f"MIG-{_uuid(node_name, f'{gpu.index}/{position}')}",
            model=mig_model(gpu.model, instance.profile),
            product=f"{gpu.product} MIG {instance.profile}",
            memory_bytes=instance.memory_bytes,
            parent_id=gpu.id,
            mig_profile=instance.profile,
            power_w=-1,
        )
        for position, instance in enumerate(group.instances)
    ]


def _uuid(node_name: str, position: str) -> uuid.UUID:
    return uuid.UUID(bytes=hashlib.sha256(f"{node_name}/{position}".encode()).digest()[:16])
