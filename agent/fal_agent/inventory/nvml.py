"""GPUs through NVIDIA's management library (nvidia-ml-py, module pynvml).

What a device or driver does not support is left unknown; a device that fails in the middle of a look counts as
gone for that look, and `model.advance` keeps it listed as degraded. A machine without a driver is a node without
GPUs, not an error: `Found.problem` says why. All calls are made in one thread with a deadline; the driver's events are
waited for in another (`nvml_events`). While a device is reset or cut, this process lets go of the library, as the
driver demands, and looks show what was seen last.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from fal_agent.inventory import checking
from fal_agent.inventory.catalog import mig_model, normalise
from fal_agent.inventory.driver_thread import DriverThread
from fal_agent.inventory.mig import MigCutter, check_layout
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
from fal_agent.inventory.nvml_events import WAIT_MS, NvmlEvents
from fal_contract.limits import GPU_MIG_TIMEOUT_S

T = TypeVar("T")

LOOK_TIMEOUT_S: Final = 15.0
_PIDS_MAX: Final = 64
_MIG_NAME: Final = re.compile(r"\bMIG (\S+)")
_CAPABILITIES: Final = Path("/proc/driver/nvidia/capabilities")
_CAP_MINOR: Final = re.compile(r"^DeviceFileMinor:\s*(\d+)", re.MULTILINE)
_LINKS_EVERY: Final = 12  # looks; NVLinks that went down are seen within a minute
_CONTROL_NODES: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")


class NvmlInventory:
    """`library` is pynvml, or in tests a module-like object that behaves as it does."""

    def __init__(
        self,
        *,
        read_host: Callable[[], Host],
        library: Any = None,
        timeout_s: float = LOOK_TIMEOUT_S,
        sys_pci: Path = Path("/sys/bus/pci/devices"),
        capabilities: Path = _CAPABILITIES,
        check: Callable[[str], Awaitable[Checked]] = checking.check,
        reset: Callable[[str], Awaitable[None]] = checking.reset,
        event_wait_ms: int = WAIT_MS,
    ) -> None:
        self._read_host = read_host
        self._library = library
        self._check = check
        self._reset = reset
        self._event_wait_ms = event_wait_ms
        self._on_event: Callable[[DeviceEvent], None] | None = None
        self._events: NvmlEvents | None = None
        self._away = asyncio.Lock()  # held while the library is let go of
        self._cutter = DriverThread("nvml-mig", timeout_s=GPU_MIG_TIMEOUT_S)
        self._sys_pci = sys_pci
        self._capabilities = capabilities
        self._thread = DriverThread("nvml", timeout_s=timeout_s)
        self._reader: _Reader | None = None
        self._last: Snapshot | None = None

    async def snapshot(self) -> Snapshot:
        if self._away.locked() and self._last is not None:
            return self._last
        found = await self._thread.call(self._look)
        self._last = advance(self._last, found, self._read_host())
        if found.gpus or not found.problem:
            self._hear()
        return self._last

    async def close(self) -> None:
        self._on_event = None
        if self._events is not None:
            await self._events.close()
            self._events = None
        self._thread.close()
        self._cutter.close()

    def listen(self, on_event: Callable[[DeviceEvent], None]) -> None:
        self._on_event = on_event  # heard from the next look on that finds a driver

    def _hear(self) -> None:
        if self._on_event is not None and self._events is None and self._reader is not None:
            self._events = NvmlEvents(self._reader.library, self._on_event, wait_ms=self._event_wait_ms)
            self._events.start()

    async def check(self, gpu_id: str) -> Checked:
        return await self._check(gpu_id)

    async def reset(self, gpu_id: str) -> None:
        async with self._let_go():
            await self._reset(gpu_id)

    async def set_mig(self, gpu_id: str, layout: Sequence[str]) -> None:
        check_layout(layout)
        async with self._let_go():
            await self._cutter.call(lambda: self._cut(gpu_id, layout))
        if self._last is not None:  # what is gone was meant to go
            left = tuple(gpu for gpu in self._last.gpus if gpu_id not in (gpu.id, gpu.parent_id))
            self._last = replace(self._last, gpus=left, generation=self._last.generation + 1)

    @contextlib.asynccontextmanager
    async def _let_go(self) -> AsyncIterator[None]:
        """No event thread, no open library of this process: the driver resets no device that somebody watches."""
        async with self._away:
            events, self._events = self._events, None
            if events is not None:
                await events.close()
            if self._reader is not None:
                await self._thread.call(self._reader.shut)
            yield

    def _cut(self, gpu_id: str, layout: Sequence[str]) -> None:
        library = self._library or importlib.import_module("pynvml")
        library.nvmlInit()
        try:
            MigCutter(library).set_layout(gpu_id, layout)
        finally:
            library.nvmlShutdown()

    def _look(self) -> Found:
        if self._reader is None:
            library = self._library or importlib.import_module("pynvml")
            self._reader = _Reader(library, self._sys_pci, self._capabilities)
        return self._reader.look()


class _Reader:
    """Everything that runs in the driver's thread."""

    def __init__(self, library: Any, sys_pci: Path, capabilities: Path) -> None:
        self._n = self.library = library
        self._looks = 0
        self._sys_pci = sys_pci
        self._capabilities = capabilities
        self._initialised = False
        self._links: tuple[frozenset[str], dict[str, tuple[Link, ...]]] = (frozenset(), {})
        unsupported = (
            "NOT_SUPPORTED",
            "NO_PERMISSION",
            "FUNCTION_NOT_FOUND",
            "INVALID_ARGUMENT",
            "NO_DATA",
            "NOT_FOUND",
            "NOT_READY",
            "ARGUMENT_VERSION_MISMATCH",
            "DEPRECATED",
        )
        values = (getattr(library, f"NVML_ERROR_{word}", None) for word in unsupported)
        self._absent = frozenset(value for value in values if value is not None)

    def shut(self) -> None:
        """Let go of the library; the next look opens it anew."""
        if self._initialised:
            self._initialised = False
            with contextlib.suppress(self._n.NVMLError):
                self._n.nvmlShutdown()

    def look(self) -> Found:
        n = self._n
        try:
            count = self._count()
        except n.NVMLError as exc:
            return Found(problem=self._driver_problem(exc), answers=False)
        handles: dict[str, Any] = {}
        gpus: list[Gpu] = []
        answering = 0
        for index in range(count):
            try:
                handle = n.nvmlDeviceGetHandleByIndex(index)
                gpu = self._device(handle, index)
                instances = self._instances(handle, gpu)
            except n.NVMLError:  # lost or hung: absent in this look
                continue
            answering += 1
            if instances is None:
                gpus.append(gpu)
                handles[gpu.id] = handle
            else:  # in MIG mode it has no peer access
                gpus += instances or [replace(gpu, degraded="MIG mode is on but it has no instances; make some")]
        links = self._links_of(handles)
        gpus = [replace(gpu, links=links.get(gpu.id, ())) for gpu in gpus]
        cuda = int(self._try(n.nvmlSystemGetCudaDriverVersion_v2, 0))
        return Found(
            gpus=tuple(gpus),
            driver_version=_text(self._try(n.nvmlSystemGetDriverVersion, "")),
            cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
            problem="" if answering == count else f"{count - answering} of {count} GPUs do not answer",
        )

    def _count(self) -> int:
        """How many devices there are; initialises the library, again when a driver was reloaded under it."""
        n = self._n
        if self._initialised:
            try:
                return int(n.nvmlDeviceGetCount())
            except n.NVMLError:
                self._initialised = False
        n.nvmlInit()
        self._initialised = True
        return int(n.nvmlDeviceGetCount())

    def _driver_problem(self, exc: Exception) -> str:
        n, value = self._n, getattr(exc, "value", None)
        if value == n.NVML_ERROR_LIBRARY_NOT_FOUND:
            return "no NVIDIA driver library (libnvidia-ml.so.1)"
        if value == n.NVML_ERROR_DRIVER_NOT_LOADED:
            return "the NVIDIA kernel driver is not loaded"
        if value == n.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return "the NVIDIA library and kernel driver have different versions; reboot"
        return f"the NVIDIA driver says: {exc}"

    def _try(self, question: Callable[..., T], default: T, *args: object) -> T:
        """The answer, or `default` where the device or driver has no such thing. Other errors pass."""
        try:
            return question(*args)
        except self._n.NVMLError as exc:
            if getattr(exc, "value", None) in self._absent:
                return default
            raise

    def _device(self, handle: Any, index: int) -> Gpu:
        n = self._n
        product = _text(n.nvmlDeviceGetName(handle))
        total, used = self._memory(handle)
        bus_id = _text(n.nvmlDeviceGetPciInfo(handle).busId)
        minor = self._try(n.nvmlDeviceGetMinorNumber, None, handle)
        power_mw = self._try(n.nvmlDeviceGetPowerUsage, None, handle)
        rates = self._try(n.nvmlDeviceGetUtilizationRates, None, handle)
        temperature = self._try(n.nvmlDeviceGetTemperature, -1, handle, n.NVML_TEMPERATURE_GPU)
        return Gpu(
            id=_text(n.nvmlDeviceGetUUID(handle)),
            index=index,
            model=normalise(product, total),
            product=product,
            memory_bytes=total,
            memory_used_bytes=used,
            pci_bus_id=bus_id,
            numa_node=self._numa_node(bus_id),
            ecc=self._ecc(handle),
            temperature_c=int(temperature),
            power_w=-1 if power_mw is None else int(power_mw) // 1000,
            utilisation_percent=-1 if rates is None else int(rates.gpu),
            throttled=self._throttled(handle),
            clock_mhz=int(self._try(n.nvmlDeviceGetClockInfo, -1, handle, n.NVML_CLOCK_SM)),
            pcie_width=int(self._try(n.nvmlDeviceGetCurrPcieLinkWidth, -1, handle)),
            pcie_width_max=int(self._try(n.nvmlDeviceGetMaxPcieLinkWidth, -1, handle)),
            pids=self._pids(handle),
            device_nodes=() if minor is None else (f"/dev/nvidia{minor}", *_CONTROL_NODES),
        )

    def _throttled(self, handle: Any) -> tuple[str, ...]:
        """Why its clocks are held down, of what is no ordinary power cap."""
        n = self._n
        bits = int(self._try(n.nvmlDeviceGetCurrentClocksThrottleReasons, 0, handle))
        reasons = {
            n.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
            n.nvmlClocksThrottleReasonHwThermalSlowdown: "heat, by the hardware",
            n.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
            n.nvmlClocksThrottleReasonSwThermalSlowdown: "heat",
        }
        return tuple(text for bit, text in reasons.items() if bits & bit)

    def _memory(self, handle: Any) -> tuple[int, int]:
        """Total and used bytes. Version 2 counts what the driver keeps for itself apart from what is used."""
        n = self._n
        version = getattr(n, "nvmlMemory_v2", None)
        info = self._try(n.nvmlDeviceGetMemoryInfo, None, handle, version) if version is not None else None
        if info is None:
            info = n.nvmlDeviceGetMemoryInfo(handle)
        return int(info.total), int(info.used)

    def _ecc(self, handle: Any) -> Ecc:
        n, uncorrected = self._n, self._n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        total = n.nvmlDeviceGetTotalEccErrors
        remapped = self._try(n.nvmlDeviceGetRemappedRows, (0, 0, 0, 0), handle)
        return Ecc(
            volatile_uncorrected=int(self._try(total, 0, handle, uncorrected, n.NVML_VOLATILE_ECC)),
            aggregate_uncorrected=int(self._try(total, 0, handle, uncorrected, n.NVML_AGGREGATE_ECC)),
            remapped_rows=int(remapped[0]) + int(remapped[1]),
            remap_pending=bool(remapped[2]),
            remap_failed=bool(remapped[3]),
        )

    def _pids(self, handle: Any) -> tuple[int, ...]:
        processes: list[Any] = self._try(self._n.nvmlDeviceGetComputeRunningProcesses, [], handle)
        return tuple(sorted(int(process.pid) for process in processes)[:_PIDS_MAX])

    def _numa_node(self, bus_id: str) -> int:
        """From the kernel; NVML writes the PCI domain with eight digits, the kernel with four."""
        domain, _, rest = bus_id.lower().partition(":")
        try:
            return int((self._sys_pci / f"{domain[-4:]}:{rest}" / "numa_node").read_text())
        except (OSError, ValueError):
            return -1

    def _instances(self, handle: Any, gpu: Gpu) -> list[Gpu] | None:
        """The MIG instances of a device; None when it is not in MIG mode."""
        n = self._n
        mode: Any = self._try(n.nvmlDeviceGetMigMode, None, handle)
        if mode is None or mode[0] != n.NVML_DEVICE_MIG_ENABLE:
            return None
        instances = []
        for position in range(int(self._try(n.nvmlDeviceGetMaxMigDeviceCount, 0, handle))):
            instance = self._try(n.nvmlDeviceGetMigDeviceHandleByIndex, None, handle, position)
            if instance is None:  # positions may have gaps
                continue
            instances.append(self._instance(instance, gpu))
        return instances

    def _instance(self, handle: Any, gpu: Gpu) -> Gpu:
        product = _text(self._n.nvmlDeviceGetName(handle))
        total, used = self._memory(handle)
        named = _MIG_NAME.search(product)
        profile = named.group(1) if named else f"{round(total / 1e9)}gb"
        return Gpu(
            id=_text(self._n.nvmlDeviceGetUUID(handle)),
            index=gpu.index,
            model=mig_model(gpu.model, profile),
            product=product,
            memory_bytes=total,
            memory_used_bytes=used,
            pci_bus_id=gpu.pci_bus_id,
            numa_node=gpu.numa_node,
            parent_id=gpu.id,
            mig_profile=profile,
            ecc=gpu.ecc,
            temperature_c=gpu.temperature_c,
            throttled=gpu.throttled,
            clock_mhz=gpu.clock_mhz,
            pcie_width=gpu.pcie_width,
            pcie_width_max=gpu.pcie_width_max,
            pids=self._pids(handle),
            device_nodes=self._instance_nodes(handle, gpu),
        )

    def _instance_nodes(self, handle: Any, gpu: Gpu) -> tuple[str, ...]:
        """The device's nodes, and the two capabilities that open this instance alone; none where one is not told."""
        if not gpu.device_nodes:
            return ()
        at, inside = (
            self._try(ask, None, handle)
            for ask in (self._n.nvmlDeviceGetGpuInstanceId, self._n.nvmlDeviceGetComputeInstanceId)
        )
        if at is None or inside is None:
            return ()
        minor = gpu.device_nodes[0].removeprefix("/dev/nvidia")
        instance = self._capabilities / f"gpu{minor}" / "mig" / f"gi{int(at)}"
        caps = []
        for access in (instance / "access", instance / f"ci{int(inside)}" / "access"):
            try:
                found = _CAP_MINOR.search(access.read_text())
            except OSError:
                return ()
            if found is None:
                return ()
            caps.append(f"/dev/nvidia-caps/nvidia-cap{found[1]}")
        return (*gpu.device_nodes, *caps)

    def _links_of(self, handles: Mapping[str, Any]) -> dict[str, tuple[Link, ...]]:
        """Links of every device to every other; asked again when the set of devices changes, and now and then."""
        known, links = self._links
        self._looks += 1
        if known == handles.keys() and self._looks % _LINKS_EVERY:
            return links
        n = self._n
        by_bus = {_bus_key(n.nvmlDeviceGetPciInfo(handle).busId): gpu_id for gpu_id, handle in handles.items()}
        nvlinks = {gpu_id: self._nvlinks(handle, by_bus) for gpu_id, handle in handles.items()}
        links = {}
        for gpu_id, handle in handles.items():
            direct, switched = nvlinks[gpu_id]
            mine = []
            for peer_id, peer in handles.items():
                if peer_id == gpu_id:
                    continue
                # Switches join those that have links to them.
                count = direct.get(peer_id, 0) or min(switched, nvlinks[peer_id][1])
                if count:
                    mine.append(Link(peer_id, LinkKind.NVLINK, count))
                else:
                    mine.append(Link(peer_id, self._pcie(handle, peer)))
            links[gpu_id] = tuple(mine)
        self._links = (frozenset(handles), links)
        return links

    def _nvlinks(self, handle: Any, by_bus: Mapping[str, str]) -> tuple[dict[str, int], int]:
        """Active NVLinks: how many straight to each peer, and how many to switches (which reach all peers)."""
        n = self._n
        direct: dict[str, int] = {}
        switched = 0
        for link in range(int(n.NVML_NVLINK_MAX_LINKS)):
            if self._try(n.nvmlDeviceGetNvLinkState, 0, handle, link) != n.NVML_FEATURE_ENABLED:
                continue
            kind = self._try(n.nvmlDeviceGetNvLinkRemoteDeviceType, None, handle, link)
            if kind == n.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                switched += 1
                continue
            remote = self._try(n.nvmlDeviceGetNvLinkRemotePciInfo, None, handle, link)
            peer_id = by_bus.get(_bus_key(remote.busId)) if remote is not None else None
            if peer_id is not None:
                direct[peer_id] = direct.get(peer_id, 0) + 1
        return direct, switched

    def _pcie(self, handle: Any, peer: Any) -> LinkKind:
        n = self._n
        level = int(self._try(n.nvmlDeviceGetTopologyCommonAncestor, n.NVML_TOPOLOGY_SYSTEM, handle, peer))
        if level <= n.NVML_TOPOLOGY_MULTIPLE:
            return LinkKind.PCIE_SWITCH
        return LinkKind.PCIE_HOST if level <= n.NVML_TOPOLOGY_NODE else LinkKind.SYSTEM


def _bus_key(bus_id: str | bytes) -> str:
    """Comparable form: NVML writes the domain with four or eight digits."""
    domain, _, rest = _text(bus_id).lower().partition(":")
    return f"{int(domain or '0', 16):x}:{rest}"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
