"""GPUs and host as one snapshot, and the rules that every provider shares. Pure.

Invariants: a GPU that was seen once stays in the snapshots of this process, as DEGRADED when it is gone, because a
runner may hold it; `generation` rises with every change that placement could care about, and not with
temperature, power or memory in use. A device in MIG mode is listed as its instances, never beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Protocol

from fal_contract.limits import GPU_HOT_C

TEMPERATURE_MAX_C: Final = GPU_HOT_C


class LinkKind(StrEnum):
    """How two GPUs are joined, best first."""

    NVLINK = "NVLINK"
    PCIE_SWITCH = "PCIE_SWITCH"  # one or more switches, no host bridge between
    PCIE_HOST = "PCIE_HOST"  # through the host bridges of one NUMA node
    SYSTEM = "SYSTEM"  # between NUMA nodes


@dataclass(frozen=True, slots=True)
class Link:
    """A way to another GPU of the node; `count` links of that kind (1 for PCIe)."""

    peer_id: str
    kind: LinkKind
    count: int = 1


@dataclass(frozen=True, slots=True)
class Ecc:
    """Memory errors; zeros where the device does not count them."""

    volatile_uncorrected: int = 0  # since the last reset
    aggregate_uncorrected: int = 0  # in its life
    remapped_rows: int = 0
    remap_pending: bool = False  # takes effect at the next reset
    remap_failed: bool = False  # no spare rows left


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG instance. -1: the device does not tell."""

    id: str  # UUID, `GPU-…` or `MIG-…`
    index: int
    model: str  # normalised: "H100-80GB", "A100-80GB-MIG-1g.10gb"
    product: str  # as the driver says it
    memory_bytes: int
    memory_used_bytes: int = 0
    pci_bus_id: str = ""
    numa_node: int = -1
    links: tuple[Link, ...] = ()
    parent_id: str = ""  # of a MIG instance
    mig_profile: str = ""
    ecc: Ecc = field(default_factory=Ecc)
    temperature_c: int = -1
    power_w: int = -1
    utilisation_percent: int = -1
    throttled: tuple[str, ...] = ()  # slowed down by its hardware or for heat; a power cap is none
    clock_mhz: int = -1  # of its multiprocessors
    pcie_width: int = -1  # lanes in use
    pcie_width_max: int = -1  # that device and slot have
    pids: tuple[int, ...] = ()  # compute processes, in the host's numbering
    device_nodes: tuple[str, ...] = ()  # what a container needs; empty for simulated ones
    degraded: str = ""  # why it may not be given to new runners; empty when it may
    present: bool = True  # the driver lists it, and it answers

    @property
    def ok(self) -> bool:
        """True when it may be given to new runners."""
        return not self.degraded


@dataclass(frozen=True, slots=True)
class Host:
    """The machine around the GPUs."""

    cpu_cores: int
    memory_bytes: int
    disk_bytes: int  # of the file system that holds the state directory
    disk_free_bytes: int
    kernel: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a provider saw in one look, before the shared rules."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    problem: str = ""  # why GPUs may be missing, such as a driver that is not loaded
    answers: bool = True  # False: it is the driver that is away, and nothing is known of single GPUs


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The machine at one moment."""

    generation: int
    gpus: tuple[Gpu, ...]
    driver_version: str
    cuda_version: str
    host: Host
    problem: str = ""
    answers: bool = True  # see Found


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """What a driver tells by itself. `kind`: "xid", "ecc", or "lost" (it may be any device: look).

    `gpu_id` is the device's, of MIG instances too; empty where the driver does not say which.
    """

    gpu_id: str
    kind: str
    code: int = 0  # of an XID


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check of one GPU found; `text` is for operators."""

    passed: bool
    text: str


class Inventory(Protocol):
    """A source of snapshots."""

    async def snapshot(self) -> Snapshot:
        """Look now. Raises FalError(TIMEOUT) when the driver does not answer; never blocks the loop."""
        ...

    async def close(self) -> None:
        """Let go of the driver; idempotent."""
        ...


class Devices(Inventory, Protocol):
    """An inventory whose devices can be listened to, checked, reset and cut. All of it may take its time."""

    def listen(self, on_event: Callable[[DeviceEvent], None]) -> None:
        """Have `on_event` called, on this loop, for what the driver tells by itself, until `close`."""
        ...

    async def check(self, gpu_id: str) -> Checked:
        """Compute and write memory on an idle GPU, in a process of its own. Never raises for what it finds."""
        ...

    async def reset(self, gpu_id: str) -> None:
        """Reset an idle device. FAILED_PRECONDITION: that is not possible here, NOT_FOUND."""
        ...

    async def set_mig(self, gpu_id: str, layout: Sequence[str]) -> None:
        """Cut an idle device into instances of these profiles, or make it whole. INVALID, FAILED_PRECONDITION."""
        ...


def advance(previous: Snapshot | None, found: Found, host: Host) -> Snapshot:
    """The next snapshot: health judged, vanished GPUs kept as degraded, generation raised on a real change."""
    present = {gpu.id for gpu in found.gpus}
    missing = [gpu for gpu in previous.gpus if gpu.id not in present] if previous else []
    why = found.problem or "it fell off the bus, or its MIG layout was changed"
    lost = [
        replace(
            gpu,
            degraded=f"not found any more: {why}",
            present=False,
            memory_used_bytes=0,
            pids=(),
            temperature_c=-1,
            power_w=-1,
        )
        for gpu in missing
    ]
    judged = [replace(gpu, degraded=gpu.degraded or fault_of(gpu)) for gpu in found.gpus]
    snapshot = Snapshot(
        generation=previous.generation if previous else 1,
        gpus=tuple(sorted([*judged, *lost], key=lambda gpu: (gpu.index, gpu.id))),
        driver_version=found.driver_version or (previous.driver_version if previous else ""),
        cuda_version=found.cuda_version or (previous.cuda_version if previous else ""),
        host=host,
        problem=found.problem,
        answers=found.answers,
    )
    if previous is None or _material(previous) == _material(snapshot):
        return snapshot
    return replace(snapshot, generation=previous.generation + 1)


def fault_of(gpu: Gpu) -> str:
    """Why a GPU that answers may still not be used; empty when it may."""
    ecc = gpu.ecc
    if ecc.remap_failed:
        return "its memory has no spare rows left; replace it"
    if ecc.remap_pending:
        return "a memory row waits to be remapped; reset it"
    if ecc.volatile_uncorrected > 0:
        return f"{ecc.volatile_uncorrected} uncorrected memory errors since the last reset; reset it"
    if gpu.temperature_c >= TEMPERATURE_MAX_C:
        return f"{gpu.temperature_c} °C; check its cooling"
    return ""


def _material(snapshot: Snapshot) -> tuple[object, ...]:
    """What placement could care about."""
    still = tuple(
        replace(
            gpu,
            memory_used_bytes=0,
            pids=(),
            temperature_c=-1,
            power_w=-1,
            utilisation_percent=-1,
            throttled=(),
            clock_mhz=-1,
            pcie_width=-1,
            pcie_width_max=-1,
            # "96 °C" and "97 °C" are one fault; an ECC count has a field of its own.
            degraded="hot" if gpu.degraded and gpu.degraded.startswith(f"{gpu.temperature_c} °C") else gpu.degraded,
        )
        for gpu in snapshot.gpus
    )
    host = snapshot.host
    return (still, snapshot.driver_version, snapshot.cuda_version, snapshot.problem, host.cpu_cores, host.memory_bytes)
