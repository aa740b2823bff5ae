"""What a container uses, from its control groups (v1 and v2) and /proc. Changes nothing. Called by the oci driver."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final

from fal_runtime.container_use import ContainerUse, sum_of_io
from fal_runtime.oci import cgroups
from fal_runtime.oci.record import Record
from fal_runtime.proc_table import rows

_NO_LIMIT: Final = 1 << 62  # v1 writes about this where there is none


def use(record: Record, now_s: float) -> ContainerUse:
    """One look; takes milliseconds of file reads, so not on the loop."""
    texts = _texts(record.cgroup_path)
    read, written = sum_of_io(texts.get("io.stat") or texts.get("blkio.throttle.io_service_bytes_recursive", ""))
    return ContainerUse(
        time_s=now_s,
        cpu_s=_cpu_s(texts),
        memory_bytes=_number(texts, "memory.current", "memory.usage_in_bytes"),
        memory_bytes_max=_limit(texts, "memory.max", "memory.limit_in_bytes"),
        pids=_number(texts, "pids.current"),
        pids_max=_limit(texts, "pids.max"),
        read_bytes=read,
        written_bytes=written,
        oom_kills=cgroups.oom_kills(record.cgroup_path),
        processes=rows(sorted(members(record.cgroup_path)), uid_start=record.uid_start),
    )


_FILES: Final = (
    *("cpu.stat", "cpuacct.usage", "memory.current", "memory.usage_in_bytes", "memory.max", "memory.limit_in_bytes"),
    *("pids.current", "pids.max", "io.stat", "blkio.throttle.io_service_bytes_recursive"),
)


def _texts(path: str) -> Mapping[str, str]:
    """File name → text, of whichever hierarchy has it."""
    found: dict[str, str] = {}
    for hierarchy in cgroups.hierarchies():
        for name in _FILES:
            if not found.get(name):
                with contextlib.suppress(OSError):
                    found[name] = (hierarchy / path.lstrip("/") / name).read_text()
    return found


def members(path: str) -> set[int]:
    """The processes of a control group, those of groups below it too, in any hierarchy."""
    pids: set[int] = set()
    for hierarchy in cgroups.hierarchies():
        directory = hierarchy / path.lstrip("/")
        for file in (directory / "cgroup.procs", *directory.glob("*/cgroup.procs")):
            with contextlib.suppress(OSError):
                pids.update(int(word) for word in file.read_text().split())
    return pids - {0}


def _cpu_s(texts: Mapping[str, str]) -> float:
    if (nanoseconds := texts.get("cpuacct.usage", "").strip()).isdigit():
        return int(nanoseconds) / 1e9
    for line in texts.get("cpu.stat", "").splitlines():
        name, _, value = line.partition(" ")
        if name == "usage_usec":
            return int(value) / 1e6
    return 0.0


def _number(texts: Mapping[str, str], *names: str) -> int:
    values = (texts.get(name, "").strip() for name in names)
    return next((int(value) for value in values if value.isdigit()), 0)


def _limit(texts: Mapping[str, str], *names: str) -> int:
    """0: none, which is written as "max" or as a number near 2^63."""
    number = _number(texts, *names)
    return number if number < _NO_LIMIT else 0
