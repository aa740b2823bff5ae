"""What this machine can limit: swap, locked memory, open files, and the disks whose speed is bounded.

Read from the kernel, cheaply; the limits themselves are written by the runtime from the config (`spec`).
"""

from __future__ import annotations

import resource
from functools import cache
from pathlib import Path
from typing import Final

from fal_runtime.oci import cgroups
from fal_runtime.oci.spec import UNBOUNDED, HostLimits

_CAP_SYS_RESOURCE: Final = 24
_DISKS_MAX: Final = 32
# Loop devices, ram disks and compressed ram: what they read and write is charged below, or is memory.
_NO_DISKS: Final = ("loop", "ram", "zram")
_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_SYS_BLOCK: Final = Path("/sys/dev/block")


def read(*, io: bool) -> HostLimits:
    """This machine's; `io`: whether the disks are wanted."""
    return HostLimits(_locked_memory_max(), _swap(), disks() if io else ())


def _locked_memory_max() -> int:
    """The agent's own hard limit, unless it may exceed that."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAP_SYS_RESOURCE & 1:
            return UNBOUNDED
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return UNBOUNDED if hard == resource.RLIM_INFINITY else hard


@cache
def _swap() -> bool:
    """v1 kernels have the file only with swap accounting on."""
    return any((hierarchy / "memory.memsw.limit_in_bytes").exists() for hierarchy in cgroups.hierarchies())


def io_trouble() -> str:
    """Why disks cannot be bounded here; empty: they can."""
    throttle, controllers = "blkio.throttle.read_bps_device", "cgroup.controllers"
    for hierarchy in cgroups.hierarchies():
        if (hierarchy / throttle).exists():
            break
        if (hierarchy / controllers).exists() and "io" in (hierarchy / controllers).read_text().split():
            break
    else:
        return "no cgroup controller for disks (blkio or io)"
    return "" if disks() else "no mounted file system names a disk whose speed could be bounded"


def disks(*, mountinfo: Path = _MOUNTINFO, sys_block: Path = _SYS_BLOCK) -> tuple[tuple[int, int], ...]:
    """Whole disks that hold a mounted file system: state, weight cache and images lie on some of them.

    File systems with an anonymous device number (overlayfs, btrfs) name their disk in no way that the block layer's
    limits take; they are left out.
    """
    found: set[tuple[int, int]] = set()
    for line in mountinfo.read_text().splitlines():
        numbers = line.split(" ", 3)[2]
        link = sys_block / numbers
        if numbers.startswith("0:") or not link.exists():
            continue
        device = link.resolve()
        if (device / "partition").exists():
            device = device.parent  # limits belong to the disk
        if device.name.rstrip("0123456789") in _NO_DISKS:
            continue
        major, _, minor = (device / "dev").read_text().strip().partition(":")
        found.add((int(major), int(minor)))
    return tuple(sorted(found)[:_DISKS_MAX])
