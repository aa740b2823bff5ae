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

from fal_contract.errors import invalid
from fal_runtime.cdi.model import NO_EDITS, Edits
from fal_runtime.driver import (
    MODELS_DIR_ENV,
    MODELS_DIR_INSIDE,
    SECRETS_DIR_ENV,
    SECRETS_DIR_INSIDE,
    SOCKET_DIR_ENV,
    SOCKET_DIR_INSIDE,
    ContainerSpec,
)
from fal_runtime.oci import edits
from fal_runtime.oci.seccomp import profile

OCI_VERSION: Final = "1.0.2"
HOSTNAME: Final = "runner"
CPU_PERIOD_US: Final = 100_000
CPU_SHARES: Final = 1024  # the weight of one CPU's worth
CPU_SHARES_MAX: Final = 262_144
TMP_BYTES_DEFAULT: Final = 1 << 30
OOM_SCORE_ADJ: Final = 500  # the node's own daemons go last
UNBOUNDED: Final = 1 << 62
LOCKED_BYTES_DEFAULT: Final = 8 << 20  # the kernel's own since 5.16; the agent's may be anything
# What the kernel counts for all users of a machine, or for whoever made a user namespace, so that one container could
# take all of it: signals that wait (and timers, which need one each), and terminals.
SIGNALS_PENDING_MAX: Final = 2048
TERMINALS_MAX: Final = 128
_PTS_OPTIONS: Final = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", f"max={TERMINALS_MAX}")

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
class HostLimits:
    """What the machine can limit. `locked_memory_max` is the agent's own hard limit in bytes.

    `swap`: whether v1 can limit memory and swap together (v2 always can). `disks`: (major, minor) of the whole disks
    whose speed is bounded.
    """

    locked_memory_max: int = UNBOUNDED
    swap: bool = False
    disks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class HostLayout:
    """What the machine contributes to a spec. `uid_start` is the host id of the container's root.

    With `user_namespace` ids 0 to 65,535 map to `uid_start` and up; without, an id of the container is that much above
    `uid_start` on the host. `uid`, `gid` and `gids` are the container's ids of its command, `cwd` its first directory.
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
    netns: str = ""  # a network namespace to join, made before; empty: as `ContainerSpec.network` says
    devices: tuple[DeviceNode, ...] = ()
    limits: HostLimits = HostLimits()
    edits: Edits = NO_EDITS
    cwd: str = "/tmp"
    uid: int = 0
    gid: int = 0
    gids: tuple[int, ...] = ()
    root_read_only: bool = True  # False: what is written over the root is bounded elsewhere


def build(spec: ContainerSpec, host: HostLayout) -> dict[str, Any]:
    """The `config.json` of a container. INVALID for privileges without a user namespace."""
    config = {
        "ociVersion": OCI_VERSION,
        "hostname": HOSTNAME,
        "root": {"path": str(host.rootfs), "readonly": host.root_read_only},
        "process": _process(spec, host),
        "mounts": _mounts(spec, host),
        "linux": _linux(spec, host),
    }
    return edits.apply(config, host.edits, user_namespace=host.user_namespace) if host.edits else config


def _capabilities(spec: ContainerSpec, host: HostLayout) -> dict[str, list[str]]:
    """None, but for the agent's own tasks: theirs reach no further than their own user namespace."""
    names = sorted({f"CAP_{name.removeprefix('CAP_')}" for name in spec.privileges})
    if names and not host.user_namespace:
        raise invalid(
            "privileges", names, "need a user namespace, and this node has none", remedy="Run it on another node."
        )
    return dict.fromkeys(("bounding", "effective", "inheritable", "permitted"), names) | {"ambient": []}


def _rlimits(spec: ContainerSpec, host: HostLayout) -> list[dict[str, Any]]:
    limits = {"RLIMIT_CORE": 0, "RLIMIT_SIGPENDING": SIGNALS_PENDING_MAX}
    if spec.resources.open_files_max:
        limits["RLIMIT_NOFILE"] = min(spec.resources.open_files_max, host.open_files_max)
    locked = spec.resources.locked_memory_bytes or LOCKED_BYTES_DEFAULT
    limits["RLIMIT_MEMLOCK"] = min(locked, host.limits.locked_memory_max)
    return [{"type": name, "soft": value, "hard": value} for name, value in limits.items()]


def environment(spec: ContainerSpec, host_env: Mapping[str, str]) -> dict[str, str]:
    """What the command finds in its environment; `host_env` is the image's."""
    env = dict(host_env) | dict(spec.env)
    if spec.socket_dir is not None:
        env[SOCKET_DIR_ENV] = SOCKET_DIR_INSIDE
    if spec.models_dir is not None:
        env[MODELS_DIR_ENV] = MODELS_DIR_INSIDE
    if spec.secrets:
        env[SECRETS_DIR_ENV] = SECRETS_DIR_INSIDE
    return env


def _process(spec: ContainerSpec, host: HostLayout) -> dict[str, Any]:
    env = environment(spec, host.env)
    base = 0 if host.user_namespace else host.uid_start
    user: dict[str, Any] = {"uid": base + host.uid, "gid": base + host.gid, "umask": 0o077}
    if host.gids:
        user["additionalGids"] = [base + gid for gid in host.gids]
    return {
        "terminal": False,
        "user": user,
        "args": list(spec.command),
        "env": [f"{name}={value}" for name, value in sorted(env.items())],
        "cwd": host.cwd,
        "capabilities": _capabilities(spec, host),
        "rlimits": _rlimits(spec, host),
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
        _mount("/dev/pts", "devpts", *_PTS_OPTIONS),
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
    if spec.network != "host" and not host.netns:
        kinds.append("network")
    linux: dict[str, Any] = {
        "resources": _resources(spec, host),
        "cgroupsPath": host.cgroup_path,
        "seccomp": profile(spec.privileges),
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
    if spec.network == "none":
        linux["sysctl"] = {"net.ipv4.ip_unprivileged_port_start": "0"}  # any port of its own namespace
    if host.netns:
        linux["namespaces"].append({"type": "network", "path": host.netns})
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
        elif host.limits.swap:
            resources["memory"]["swap"] = limits.memory_bytes  # memory and swap together: none
    if limits.pids_max:
        resources["pids"] = {"limit": limits.pids_max}
    if limits.io_bytes_s and host.limits.disks:
        rates = [{"major": major, "minor": minor, "rate": limits.io_bytes_s} for major, minor in host.limits.disks]
        resources["blockIO"] = {"throttleReadBpsDevice": rates, "throttleWriteBpsDevice": [dict(one) for one in rates]}
    return resources
