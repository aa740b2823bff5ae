"""A module-like stand-in for pynvml, over the real module's constants and exceptions; no driver needed.

It answers as the library does on the parts it plays: names as text, PCI bus ids with eight-digit domains, power in
milliwatts, ECC counters that raise NOT_SUPPORTED where the part has none, lost devices that raise GPU_IS_LOST. Events
come from `tell`; a wait for them blocks its thread, as the library's does. MIG layouts can be changed by a device's
slices; while somebody has the library open or waits for events, the mode cannot be switched (Ampere's rule).
"""

from __future__ import annotations

import ctypes
import queue
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml


@dataclass
class FakeInstance:
    """A MIG instance."""

    product: str
    memory_bytes: int
    uuid: str = ""
    gpu_instance: int = 0
    compute_instance: int = 0
    profile: int = -1
    compute: bool = True


@dataclass
class FakeDevice:
    """A GPU of the fake; tests change it between looks."""

    product: str
    memory_bytes: int
    index: int = 0
    numa: int = 0
    nvlinks_to_switch: int = 0
    nvlinks_to: dict[int, int] = field(default_factory=dict)  # index of a peer → straight links
    ecc: bool = True
    volatile: int = 0
    aggregate: int = 0
    remapped: tuple[int, int, int, int] = (0, 0, 0, 0)
    temperature_c: int = 40
    used_bytes: int = 0
    pids: tuple[int, ...] = ()
    lost: bool = False
    mig: list[FakeInstance] = field(default_factory=list)
    mig_enabled: bool = False
    uuid: str = ""
    throttle: int = 0  # bits
    clock_mhz: int = 1980
    pcie_width: int = 16

    @property
    def bus_id(self) -> str:
        return f"00000000:{0x18 + self.index:02X}:00.0"


# NVML's number → name, slices, at most, MiB: of an 80 GB part.
PROFILES = {
    0: ("1g.10gb", 1, 7, 9728),
    1: ("2g.20gb", 2, 3, 19968),
    2: ("3g.40gb", 3, 2, 40192),
    4: ("7g.80gb", 7, 1, 80896),
}


def _fill(array: Any, count: Any, found: list[FakeInstance]) -> None:
    for at, one in enumerate(found):
        array[at] = one
    count._obj.value = len(found)


class FakeNvml:
    """`FakeNvml([FakeDevice(…), …])`; unknown attributes are the real module's (constants, NVMLError)."""

    def __init__(self, devices: Sequence[FakeDevice], *, init_error: int | None = None, memory_v2: bool = True) -> None:
        self.devices = list(devices)
        self.init_error = init_error
        self.memory_v2 = memory_v2
        self.initialised = 0
        self.calls: list[str] = []
        self.events: queue.Queue[SimpleNamespace | int] = queue.Queue()
        self.sets_open = 0
        self.registered: list[str] = []
        self.mig_pending = False  # the mode is switched by a reset only
        self.made = 0
        for index, device in enumerate(self.devices):
            device.index = index
            device.uuid = device.uuid or f"GPU-{uuid.UUID(int=index + 1)}"
            for position, instance in enumerate(device.mig):
                instance.gpu_instance = instance.gpu_instance or position + 7  # the driver's numbers have gaps
                instance.uuid = instance.uuid or f"MIG-{uuid.UUID(int=1000 * (index + 1) + position)}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml") and callable(getattr(pynvml, name, None)) and name != "nvmlMemory_v2":
            raise AssertionError(f"the fake does not play {name}")
        return getattr(pynvml, name)

    def _alive(self, handle: Any) -> Any:
        device = handle[0] if isinstance(handle, tuple) else handle
        if device.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return handle

    def nvmlInit(self) -> None:
        self.calls.append("nvmlInit")
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        self.calls.append("nvmlShutdown")
        self.initialised -= 1

    # ---- events

    def tell(self, device: FakeDevice, kind: int, data: int = 0) -> None:
        """The driver has an event of this device."""
        self.events.put(SimpleNamespace(device=device, eventType=kind, eventData=data))

    def tell_error(self, error: int) -> None:
        """The wait for events ends with an error."""
        self.events.put(error)

    def nvmlEventSetCreate(self) -> object:
        self.sets_open += 1
        self.registered = []
        return object()

    def nvmlEventSetFree(self, eventSet: object) -> None:
        self.sets_open -= 1

    def nvmlDeviceGetSupportedEventTypes(self, handle: FakeDevice) -> int:
        self._alive(handle)
        return int(pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeDoubleBitEccError) if handle.ecc else 0

    def nvmlDeviceRegisterEvents(self, handle: FakeDevice, eventTypes: int, eventSet: object) -> None:
        self._alive(handle)
        self.registered.append(handle.uuid)

    def nvmlEventSetWait_v2(self, eventSet: object, timeoutms: int) -> SimpleNamespace:
        try:
            event = self.events.get(timeout=timeoutms / 1000)
        except queue.Empty:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT) from None
        if isinstance(event, int):
            raise pynvml.NVMLError(event)
        return event

    # ---- devices

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: FakeDevice) -> int:
        return int(self._alive(handle).throttle)

    def nvmlDeviceGetClockInfo(self, handle: FakeDevice, type: int) -> int:
        assert type == pynvml.NVML_CLOCK_SM
        return int(self._alive(handle).clock_mhz)

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: FakeDevice) -> int:
        return int(self._alive(handle).pcie_width)

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: FakeDevice) -> int:
        self._alive(handle)
        return 16

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeDevice:
        found = next((device for device in self.devices if device.uuid == uuid), None)
        if found is None or not self.initialised:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self._alive(found)  # type: ignore[no-any-return]

    # ---- MIG

    @property
    def c_nvmlGpuInstance_t(self) -> type:
        return ctypes.py_object

    @property
    def c_nvmlComputeInstance_t(self) -> type:
        return ctypes.py_object

    def nvmlDeviceSetMigMode(self, device: FakeDevice, mode: int) -> int:
        self._alive(device)
        if self.initialised > 1 or self.sets_open:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
        if device.mig and not mode:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
        if self.mig_pending:
            return int(pynvml.NVML_ERROR_RESET_REQUIRED)
        device.mig_enabled = bool(mode)
        return int(pynvml.NVML_SUCCESS)

    def nvmlDeviceGetGpuInstanceProfileInfo(self, device: FakeDevice, profile: int, version: int) -> SimpleNamespace:
        self._alive(device)
        if profile not in PROFILES:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        name, slices, most, mib = PROFILES[profile]
        return SimpleNamespace(
            id=profile + 100, name=f"MIG {name}".encode(), sliceCount=slices, instanceCount=most, memorySizeMB=mib
        )

    def nvmlDeviceCreateGpuInstance(self, device: FakeDevice, profileId: int) -> FakeInstance:
        self.calls.append("nvmlDeviceCreateGpuInstance")
        name, slices, _, mib = PROFILES[profileId - 100]
        if sum(PROFILES[one.profile][1] for one in device.mig) + slices > 7:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
        self.made += 1
        made = FakeInstance(
            f"{device.product} MIG {name}", mib << 20, f"MIG-{uuid.UUID(int=10_000 + self.made)}",
            gpu_instance=self.made, profile=profileId - 100, compute=False,
        )  # fmt: skip
        device.mig.append(made)
        return made

    def nvmlGpuInstanceGetComputeInstanceProfileInfo(
        self, device: FakeInstance, profile: int, engProfile: int
    ) -> SimpleNamespace:
        slices = PROFILES[device.profile][1]
        if profile not in PROFILES or PROFILES[profile][1] > slices:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(id=profile + 200, sliceCount=PROFILES[profile][1], instanceCount=7)

    def nvmlGpuInstanceCreateComputeInstance(self, gpuInstance: FakeInstance, profileId: int) -> object:
        assert PROFILES[profileId - 200][1] == PROFILES[gpuInstance.profile][1], "all of it"
        gpuInstance.compute = True
        return gpuInstance

    def nvmlDeviceGetGpuInstances(
        self, device: FakeDevice, profileId: int, gpuInstancesRef: Any, countRef: Any
    ) -> None:
        _fill(gpuInstancesRef, countRef, [one for one in device.mig if one.profile == profileId - 100])

    def nvmlGpuInstanceGetComputeInstances(
        self, gpuInstance: FakeInstance, profileId: int, computeInstancesRef: Any, countRef: Any
    ) -> None:
        whole = PROFILES[profileId - 200][1] == PROFILES[gpuInstance.profile][1]
        _fill(computeInstancesRef, countRef, [gpuInstance] if whole and gpuInstance.compute else [])

    def nvmlComputeInstanceDestroy(self, computeInstance: FakeInstance) -> None:
        computeInstance.compute = False

    def nvmlGpuInstanceDestroy(self, gpuInstance: FakeInstance) -> None:
        if gpuInstance.compute:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
        for device in self.devices:
            if gpuInstance in device.mig:
                device.mig.remove(gpuInstance)

    def nvmlDeviceGetCount(self) -> int:
        if not self.initialised:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        return len(self.devices)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "575.57.08"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12090

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeDevice:
        device = self.devices[index]
        self._alive(device)
        return device

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return str(self._alive(handle).product if not isinstance(handle, tuple) else handle[1].product)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return str(self._alive(handle).uuid if not isinstance(handle, tuple) else handle[1].uuid)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, version: int | None = None) -> SimpleNamespace:
        self._alive(handle)
        if version is not None and not self.memory_v2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        if isinstance(handle, tuple):
            return SimpleNamespace(total=handle[1].memory_bytes, used=0)
        reserved = 0 if version is not None else 500 << 20
        return SimpleNamespace(total=handle.memory_bytes, used=handle.used_bytes + reserved)

    def nvmlDeviceGetPciInfo(self, handle: FakeDevice) -> SimpleNamespace:
        return SimpleNamespace(busId=self._alive(handle).bus_id)

    def nvmlDeviceGetMinorNumber(self, handle: FakeDevice) -> int:
        return int(self._alive(handle).index)

    def nvmlDeviceGetPowerUsage(self, handle: FakeDevice) -> int:
        self._alive(handle)
        return 71_900

    def nvmlDeviceGetUtilizationRates(self, handle: FakeDevice) -> SimpleNamespace:
        self._alive(handle)
        if handle.mig_enabled:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=7, memory=1)

    def nvmlDeviceGetTemperature(self, handle: FakeDevice, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return int(self._alive(handle).temperature_c)

    def nvmlDeviceGetTotalEccErrors(self, handle: FakeDevice, kind: int, counter: int) -> int:
        self._alive(handle)
        assert kind == pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        if not handle.ecc:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return handle.volatile if counter == pynvml.NVML_VOLATILE_ECC else handle.aggregate

    def nvmlDeviceGetRemappedRows(self, handle: FakeDevice) -> tuple[int, int, int, int]:
        self._alive(handle)
        if not handle.ecc:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return handle.remapped

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[SimpleNamespace]:
        self._alive(handle)
        return [] if isinstance(handle, tuple) else [SimpleNamespace(pid=pid) for pid in handle.pids]

    def nvmlDeviceGetMigMode(self, handle: FakeDevice) -> list[int]:
        if "A100" not in self._alive(handle).product and "H100" not in handle.product:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(handle.mig_enabled), int(handle.mig_enabled)]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: FakeDevice) -> int:
        self._alive(handle)
        return 7

    def nvmlDeviceGetGpuInstanceId(self, handle: Any) -> int:
        self._alive(handle)
        return int(handle[1].gpu_instance)

    def nvmlDeviceGetComputeInstanceId(self, handle: Any) -> int:
        self._alive(handle)
        return int(handle[1].compute_instance)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: FakeDevice, index: int) -> Any:
        self._alive(device)
        if index >= len(device.mig):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return (device, device.mig[index])

    def nvmlDeviceGetNvLinkState(self, handle: FakeDevice, link: int) -> int:
        self.calls.append("nvmlDeviceGetNvLinkState")
        total = self._alive(handle).nvlinks_to_switch + sum(handle.nvlinks_to.values())
        if total == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return int(link < total)

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: FakeDevice, link: int) -> int:
        self._alive(handle)
        if link < handle.nvlinks_to_switch:
            return int(pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH)
        return int(pynvml.NVML_NVLINK_DEVICE_TYPE_GPU)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: FakeDevice, link: int) -> SimpleNamespace:
        peers = [peer for peer, count in handle.nvlinks_to.items() for _ in range(count)]
        return SimpleNamespace(busId=self.devices[peers[link - handle.nvlinks_to_switch]].bus_id.encode())

    def nvmlDeviceGetTopologyCommonAncestor(self, device1: FakeDevice, device2: FakeDevice) -> int:
        self._alive(device1)
        return int(pynvml.NVML_TOPOLOGY_NODE if device1.numa == device2.numa else pynvml.NVML_TOPOLOGY_SYSTEM)
