"""GPUs that are not there: for laptops, demonstrations and tests. Same protocol and contract suite as NVML.

UUIDs derive from the node's name and the position, so a restarted agent has the same GPUs. SXM parts are joined all to
all by NVLink, others over PCIe: half of the devices on each of two NUMA nodes. Faults are set by tests, or by a file
that is read at every look (`sim_faults`), so that a demonstration can break a GPU of a running agent. Resets, checks
and MIG layouts work, as far as nothing real is needed for them.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fal_agent.inventory.catalog import mig_model
from fal_agent.inventory.mig import check_layout
from fal_agent.inventory.model import (
    Checked,
    DeviceEvent,
    Ecc,
    Found,
    Gpu,
    Host,
    Link,
    LinkKind,
    Snapshot,
    advance,
)
from fal_agent.inventory.sim_faults import Fault, FaultFile
from fal_agent.inventory.spec import Group, cut
from fal_contract.errors import Code, FalError, not_found

_IDLE_TEMPERATURE_C: Final = 34
_NUMA_NODES: Final = 2
_PCIE_LANES: Final = 16
NO_FAULT: Final = Fault()
# What a driver of today says, so that apps which ask for a version can be tried out.
DRIVER_VERSION: Final = "570.86.15-simulated"
CUDA_VERSION: Final = "12.8"


class SimulatedInventory:
    """`groups` come from `spec.parse_sim_gpus`; `read_host` is called for every snapshot."""

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        node_name: str,
        read_host: Callable[[], Host],
        fault_file: Path | None = None,
    ) -> None:
        self._groups = [group for group in groups for _ in range(group.count)]  # one a device
        self._node_name = node_name
        self._read_host = read_host
        self._gpus = _devices(self._groups, node_name)
        self._faults: dict[str, Fault] = {}
        self._file = FaultFile(fault_file) if fault_file is not None else None
        self._on_event: Callable[[DeviceEvent], None] | None = None
        self._last: Snapshot | None = None

    async def snapshot(self) -> Snapshot:
        if self._file is not None:
            self._take_file(self._file)
        seen = tuple(self._seen(gpu) for gpu in self._gpus if not self._faults.get(gpu.id, NO_FAULT).gone)
        self._last = advance(self._last, _found(seen), self._read_host())
        return self._last

    async def close(self) -> None:
        self._on_event = None

    # ---- what can be done to a GPU

    def listen(self, on_event: Callable[[DeviceEvent], None]) -> None:
        self._on_event = on_event

    async def check(self, gpu_id: str) -> Checked:
        fault = self._faults.get(gpu_id, NO_FAULT)
        if fault.gone or gpu_id not in {gpu.id for gpu in self._gpus}:
            return Checked(False, "there is no such GPU")
        return Checked(not fault.check, fault.check or "simulated: nothing wrong was found")

    async def reset(self, gpu_id: str) -> None:
        fault = self._fault(gpu_id)
        if fault.no_reset or fault.gone:
            what = f"GPU {gpu_id} could not be reset: simulated"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Take the fault back.")
        # What a reset clears; the life's count stays.
        if fault.ecc is not None and not fault.ecc.remap_failed:
            self._faults[gpu_id] = replace(
                fault,
                ecc=Ecc(aggregate_uncorrected=fault.ecc.aggregate_uncorrected, remapped_rows=fault.ecc.remapped_rows),
            )

    async def set_mig(self, gpu_id: str, layout: Sequence[str]) -> None:
        wanted = check_layout(layout)
        devices = list(dict.fromkeys(gpu.parent_id or gpu.id for gpu in self._gpus))
        if gpu_id not in devices:
            raise not_found("simulated GPU", gpu_id, remedy="Use a device's id of the inventory.")
        at = devices.index(gpu_id)
        group = self._groups[at]
        self._groups[at] = replace(
            group, instances=cut("+".join(wanted), group.model, field="layout") if wanted else ()
        )
        self._gpus = _devices(self._groups, self._node_name)
        if self._last is not None:
            left = tuple(gpu for gpu in self._last.gpus if gpu_id not in (gpu.id, gpu.parent_id))
            self._last = replace(self._last, gpus=left, generation=self._last.generation + 1)

    # ---- faults

    def set_temperature(self, gpu_id: str, temperature_c: int | None) -> None:
        """None: back to idle."""
        self.break_gpu(gpu_id, temperature_c=temperature_c)

    def set_ecc(self, gpu_id: str, ecc: Ecc | None) -> None:
        """None: back to no errors."""
        self.break_gpu(gpu_id, ecc=ecc)

    def use(self, gpu_id: str, *, memory_bytes: int, pids: Sequence[int] = ()) -> None:
        """Somebody's processes on the device; 0 and none free it."""
        self.break_gpu(gpu_id, memory_used_bytes=memory_bytes, pids=tuple(pids))

    def vanish(self, gpu_id: str) -> None:
        """It falls off the bus."""
        self.break_gpu(gpu_id, gone=True)

    def restore(self, gpu_id: str) -> None:
        """It is back."""
        self.break_gpu(gpu_id, gone=False)

    def break_gpu(self, gpu_id: str, **changes: Any) -> None:
        """Set fields of its `sim_faults.Fault`; the others stay."""
        self._faults[gpu_id] = replace(self._fault(gpu_id), **changes)

    def xid(self, gpu_id: str, code: int) -> None:
        """The driver tells of an XID, if somebody listens."""
        device = next((gpu.parent_id or gpu.id for gpu in self._gpus if gpu.id == gpu_id), gpu_id)
        if self._on_event is not None:
            self._on_event(DeviceEvent(device, "xid", code))

    def _take_file(self, file: FaultFile) -> None:
        names = {gpu.id: gpu.id for gpu in self._gpus} | {
            str(gpu.index): gpu.id for gpu in self._gpus if not gpu.parent_id
        }
        read = file.read(names)
        if read is not None:
            self._faults, xids = read
            for gpu_id, code in xids:
                self.xid(gpu_id, code)

    def _fault(self, gpu_id: str) -> Fault:
        if all(gpu.id != gpu_id for gpu in self._gpus):
            raise not_found("simulated GPU", gpu_id, remedy="Use an id of the inventory.")
        return self._faults.get(gpu_id, NO_FAULT)

    def _seen(self, gpu: Gpu) -> Gpu:
        fault = self._faults.get(gpu.id, NO_FAULT)
        return replace(
            gpu,
            temperature_c=_IDLE_TEMPERATURE_C if fault.temperature_c is None else fault.temperature_c,
            ecc=fault.ecc or Ecc(),
            memory_used_bytes=fault.memory_used_bytes,
            pids=fault.pids,
            utilisation_percent=fault.utilisation_percent if fault.utilisation_percent >= 0 else 100 * bool(fault.pids),
            throttled=fault.throttled,
            clock_mhz=fault.clock_mhz,
            pcie_width=fault.pcie_width,
            pcie_width_max=_PCIE_LANES if fault.pcie_width >= 0 else -1,
            links=gpu.links if fault.nvlinks < 0 else _links_left(gpu.links, fault.nvlinks),
        )


def _links_left(links: tuple[Link, ...], count: int) -> tuple[Link, ...]:
    """With so many NVLinks to each peer as are still up."""
    return tuple(
        replace(link, count=min(link.count, count)) if link.kind is LinkKind.NVLINK else link for link in links
    )


def _found(gpus: tuple[Gpu, ...]) -> Found:
    return Found(gpus=gpus, driver_version=DRIVER_VERSION, cuda_version=CUDA_VERSION)


def _devices(groups: Sequence[Group], node_name: str) -> tuple[Gpu, ...]:
    """`groups`: one for each device."""
    whole: list[tuple[Group, Gpu]] = []
    for index, group in enumerate(groups):
        gpu = Gpu(
            id=f"GPU-{_uuid(node_name, str(index))}",
            index=index,
            model=group.model.name,
            product=group.model.product,
            memory_bytes=group.model.memory_bytes,
            pci_bus_id=f"00000000:{0x10 + index:02X}:00.0",
            numa_node=index * _NUMA_NODES // len(groups),
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
            id=f"MIG-{_uuid(node_name, f'{gpu.index}/{position}/{instance.profile}')}",
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
