"""MIG layouts: how they are written, and what NVML must do for one.

`set_layout` runs in the driver's thread. It destroys what is there, from the inside out, and makes what is asked for,
largest first, because the driver places instances where they fit. One that fails leaves the device without instances:
nothing is placed on it then, and the error says what the driver refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from ctypes import byref, c_uint
from typing import Any, Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import GPU_MIG_INSTANCES_MAX

_PROFILE: Final = re.compile(r"([1-7])g\.(\d{1,3})gb((?:\+\w+)*)")


def check_layout(layout: Sequence[str]) -> tuple[str, ...]:
    """The profiles, largest first. INVALID for what is no profile's name."""
    if len(layout) > GPU_MIG_INSTANCES_MAX:
        remedy = f"A device has at most {GPU_MIG_INSTANCES_MAX} instances."
        raise invalid("layout", "+".join(layout), "has too many instances", remedy=remedy)
    for profile in layout:
        if _PROFILE.fullmatch(profile) is None:
            raise invalid("layout", profile, "is no MIG profile", remedy="Write it as nvidia-smi does: 1g.10gb.")
    return tuple(sorted(layout, key=lambda name: (-int(name[0]), name)))


class MigCutter:
    """NVML's calls for one device; `library` is pynvml or a stand-in, and initialised."""

    def __init__(self, library: Any) -> None:
        self._n = library

    def set_layout(self, gpu_id: str, layout: Sequence[str]) -> None:
        """Cut the device so, or make it whole. INVALID: a profile that it has not; FAILED_PRECONDITION."""
        n = self._n
        wanted = check_layout(layout)
        try:
            handle = n.nvmlDeviceGetHandleByUUID(gpu_id)
            current, _ = n.nvmlDeviceGetMigMode(handle)
        except n.NVMLError as exc:
            raise self._refused(gpu_id, "cannot be cut", exc) from None
        profiles = self._profiles(handle)
        if current != n.NVML_DEVICE_MIG_ENABLE and wanted:
            self._set_mode(gpu_id, handle, n.NVML_DEVICE_MIG_ENABLE)
            handle = n.nvmlDeviceGetHandleByUUID(gpu_id)
            profiles = self._profiles(handle)
        for name in wanted:
            if name not in profiles:
                offered = ", ".join(sorted(profiles)) or "none"
                raise invalid("layout", name, f"is no profile of GPU {gpu_id}", remedy=f"It has {offered}.")
        try:
            if current == n.NVML_DEVICE_MIG_ENABLE:
                self._destroy(handle, profiles.values())
            for name in wanted:
                self._create(handle, profiles[name])
        except n.NVMLError as exc:
            raise self._refused(gpu_id, f"could not be cut into {'+'.join(wanted) or 'nothing'}", exc) from None
        if not wanted and current == n.NVML_DEVICE_MIG_ENABLE:
            self._set_mode(gpu_id, handle, n.NVML_DEVICE_MIG_DISABLE)

    def _set_mode(self, gpu_id: str, handle: Any, mode: int) -> None:
        n = self._n
        word = "on" if mode == n.NVML_DEVICE_MIG_ENABLE else "off"
        try:
            pending = n.nvmlDeviceSetMigMode(handle, mode)
        except n.NVMLError as exc:
            raise self._refused(gpu_id, f"MIG mode could not be switched {word}", exc) from None
        if pending != n.NVML_SUCCESS:
            what = f"MIG mode of GPU {gpu_id} is {word} after its next reset only"
            remedy = "End what monitors it (such as DCGM), then reset it or restart the machine."
            raise FalError(Code.FAILED_PRECONDITION, what, remedy=remedy)

    def _profiles(self, handle: Any) -> dict[str, Any]:
        """What the device can be cut into, by name."""
        n = self._n
        found = {}
        for number in range(int(n.NVML_GPU_INSTANCE_PROFILE_COUNT)):
            try:
                info = n.nvmlDeviceGetGpuInstanceProfileInfo(handle, number, 2)
            except n.NVMLError:
                continue
            name = info.name.decode() if isinstance(info.name, bytes) else str(info.name)
            found[name.removeprefix("MIG ").strip()] = info
        return found

    def _destroy(self, handle: Any, profiles: Iterable[Any]) -> None:
        n = self._n
        for info in profiles:
            for instance in self._listed(n.c_nvmlGpuInstance_t, n.nvmlDeviceGetGpuInstances, handle, info):
                for inside in self._compute_profiles(instance):
                    ask = n.nvmlGpuInstanceGetComputeInstances
                    for compute in self._listed(n.c_nvmlComputeInstance_t, ask, instance, inside):
                        n.nvmlComputeInstanceDestroy(compute)
                n.nvmlGpuInstanceDestroy(instance)

    def _listed(self, kind: Any, ask: Any, owner: Any, info: Any) -> list[Any]:
        """Instances of a profile: NVML fills an array that we make."""
        most = max(1, int(info.instanceCount))
        array, count = (kind * most)(), c_uint(0)
        ask(owner, info.id, array, byref(count))
        return [array[at] for at in range(min(most, count.value))]

    def _create(self, handle: Any, info: Any) -> None:
        """An instance with one compute instance over all of it."""
        n = self._n
        instance = n.nvmlDeviceCreateGpuInstance(handle, info.id)
        whole = [inside for inside in self._compute_profiles(instance) if inside.sliceCount == info.sliceCount]
        if not whole:
            raise n.NVMLError(n.NVML_ERROR_NOT_SUPPORTED)
        n.nvmlGpuInstanceCreateComputeInstance(instance, whole[-1].id)

    def _compute_profiles(self, instance: Any) -> Iterator[Any]:
        """Those that the instance has; NVML answers a number that it lacks with an error."""
        n = self._n
        for number in range(int(n.NVML_COMPUTE_INSTANCE_PROFILE_COUNT)):
            with suppress(n.NVMLError):
                yield n.nvmlGpuInstanceGetComputeInstanceProfileInfo(
                    instance, number, n.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
                )

    def _refused(self, gpu_id: str, what: str, exc: Exception) -> FalError:
        remedy = "Only idle GPUs whose part has MIG can be cut, and by root."
        return FalError(Code.FAILED_PRECONDITION, f"GPU {gpu_id} {what}: {exc}", remedy=remedy)


__all__ = ["MigCutter", "check_layout"]
