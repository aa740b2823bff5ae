"""The machine around the GPUs, read from the kernel. Microseconds; may be called on the loop."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from fal_agent.inventory.model import Host


def read_host(state_dir: Path) -> Host:
    """CPU cores that this process may use, memory, and the disk under `state_dir`."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    disk = os.statvfs(state_dir)
    return Host(
        cpu_cores=cores,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_bytes=disk.f_frsize * disk.f_blocks,
        disk_free_bytes=disk.f_frsize * disk.f_bavail,
        kernel=platform.release(),
    )
