"""From a container as the agent wants it to an OCI runtime spec. Pure: no file is read, nothing is mounted.

What depends on the machine (user ids, device numbers, locked mount flags) comes in as `HostLayout`. The golden test
tests/unit/test_oci_spec.py shows the whole result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from fal_runtime.driver import (
    MODELS_DIR_ENV,
    MODELS_DIR_INSIDE,
    SOCKET_DIR_ENV,
    SOCKET_DIR_INSIDE,
    ContainerSpec,
)
from fal_runtime.oci.seccomp import profile

OCI_VERSION: Final = "1.0.2"
CPU_PERIOD_US: Final = 100_000
CPU_SHARES: Final = 1024  # the weight of one CPU's worth
CPU_SHARES_MAX: Final = 262_144
TMP_BYTES_DEFAULT: Final = 1 << 30
OOM_SCORE_ADJ: Final = 500  # the node's own daemons go last

MASKED_PATHS: Final = (
    *("/proc/acpi", "/proc/asound", "/proc/bus", "/proc/fs", "/proc/interrupts", "/proc/kcore", "/proc/keys"),
    *("/proc/kallsyms", "/proc/kmsg", "/proc/latency_stats", "/proc/modules", "/proc/sched_debug", "/proc/scsi"),
    *("/proc/sysrq-trigger", "/proc/timer_list", "/proc/timer_stats"),
    *("/sys/devices/virtual/powercap", "/sys/firmware", "/sys/fs/cgroup", "/sys/kernel"),
)
READONLY_PATHS: Final = ("/proc/irq", "/proc/sys")


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device node of the host."""

    path: str
    kind: Literal["c", "b"]
    major: int
    minor: int


@dataclass(frozen=True, slots=True)
class Bind:
    """A prepared bind mount: `options` repeat the locked flags of its source (a user namespace may not drop them)."""

    source: Path
    target: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostLayout:
    """What the machine contributes to a spec. `uid_start` is the host id of the container's root.

    With `user_namespace` ids 0 to 65,535 map to `uid_start` and up; without, the command runs as host id `uid_start`.
    """

    rootfs: Path
    cgroup_path: str
    uid_start: int
    uid_count: int
    user_namespace: bool
    cgroup_v2: bool
    open_files_max: int  # the agent's own hard limit, which needs CAP_SYS_RESOURCE to exceed
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    binds: tuple[Bind, ...] = ()
    devices: tuple[DeviceNode, ...] = ()


def build(spec: ContainerSpec, host: HostLayout) -> dict[str, Any]:
    """The `config.json` of a container."""
    return {
        "ociVersion": OCI_VERSION,
        "hostname": "runner",
        "root": {"path": str(host.rootfs), "readonly": True},
        "process": _process(spec, host),
        "mounts": _mounts(spec, host),
        "linux": _linux(spec, host),
    }


def _process(spec: ContainerSpec, host: HostLayout) -> dict[str, Any]:
    env = dict(host.env) | dict(spec.env)
    if spec.socket_dir is not None:
        env[SOCKET_DIR_ENV] = SOCKET_DIR_INSIDE
    if spec.models_dir is not None:
        env[MODELS_DIR_ENV] = MODELS_DIR_INSIDE
    user = 0 if host.user_namespace else host.uid_start
    rlimits = [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]
    if spec.resources.open_files_max:
        files = min(spec.resources.open_files_max, host.open_files_max)
        rlimits.append({"type": "RLIMIT_NOFILE", "soft": files, "hard": files})
    return {
        "terminal": False,
        "user": {"uid": user, "gid": user, "umask": 0o077},
        "args": list(spec.command),
        "env": [f"{name}={value}" for name, value in sorted(env.items())],
        "cwd": "/tmp",
        "capabilities": {kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")},
        "rlimits": rlimits,
        "noNewPrivileges": True,
        "oomScoreAdj": OOM_SCORE_ADJ,
    }


def _mount(target: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": list(options)}


def _mounts(spec: ContainerSpec, host: HostLayout) -> list[dict[str, Any]]:
    limits = spec.resources
    tmp_bytes = limits.memory_bytes or TMP_BYTES_DEFAULT
    mounts = [
        _mount("/proc", "proc", "nosuid", "nodev", "noexec"),
        _mount("/dev", "tmpfs", "nosuid", "noexec", "strictatime", "mode=755", "size=65536"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
        _mount("/dev/shm", "tmpfs", "nosuid", "nodev", "noexec", "mode=1777", f"size={limits.shm_bytes or tmp_bytes}"),
        _mount("/dev/mqueue", "mqueue", "nosuid", "nodev", "noexec"),
        _mount("/tmp", "tmpfs", "nosuid", "nodev", "mode=1777", f"size={tmp_bytes}"),
    ]
    # sysfs shows the network namespace's owner; with the host's network a user namespace may not mount it.
    if spec.network == "none":
        mounts.append(_mount("/sys", "sysfs", "nosuid", "nodev", "noexec", "ro"))
    for bind in host.binds:
        mounts.append(
            {"destination": bind.target, "type": "bind", "source": str(bind.source), "options": list(bind.options)}
        )
    return mounts


def _linux(spec: ContainerSpec, host: HostLayout) -> dict[str, Any]:
    kinds = ["pid", "ipc", "uts", "mount"]
    if spec.network == "none":
        kinds.append("network")
    linux: dict[str, Any] = {
        "resources": _resources(spec, host),
        "cgroupsPath": host.cgroup_path,
        "seccomp": profile(),
        "maskedPaths": list(MASKED_PATHS),
        "readonlyPaths": list(READONLY_PATHS),
        "rootfsPropagation": "rslave",
    }
    if host.user_namespace:
        kinds.append("user")
        mapping = {"containerID": 0, "hostID": host.uid_start, "size": host.uid_count}
        linux["uidMappings"] = [mapping]
        linux["gidMappings"] = [dict(mapping)]
    if host.cgroup_v2:
        kinds.append("cgroup")
    if host.devices:
        linux["devices"] = [
            {"path": d.path, "type": d.kind, "major": d.major, "minor": d.minor, "fileMode": 0o666, "uid": 0, "gid": 0}
            for d in host.devices
        ]
    linux["namespaces"] = [{"type": kind} for kind in kinds]
    return linux


def _resources(spec: ContainerSpec, host: HostLayout) -> dict[str, Any]:
    limits = spec.resources
    devices: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for device in host.devices:
        devices.append(
            {"allow": True, "type": device.kind, "major": device.major, "minor": device.minor, "access": "rw"}
        )
    resources: dict[str, Any] = {"devices": devices}
    if limits.cpu_milli:
        resources["cpu"] = {
            "quota": limits.cpu_milli * CPU_PERIOD_US // 1000,
            "period": CPU_PERIOD_US,
            "shares": min(max(limits.cpu_milli * CPU_SHARES // 1000, 2), CPU_SHARES_MAX),
        }
    if limits.memory_bytes:
        resources["memory"] = {"limit": limits.memory_bytes}
        if host.cgroup_v2:
            resources["memory"]["swap"] = limits.memory_bytes
            resources["unified"] = {"memory.oom.group": "1"}  # one death is the container's death
    if limits.pids_max:
        resources["pids"] = {"limit": limits.pids_max}
    return resources
