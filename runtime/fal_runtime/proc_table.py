"""Reads /proc for `container_use`: rows of some processes, and who is whose child. Changes nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fal_contract.limits import TOP_PROCESSES_MAX
from fal_runtime.container_use import COMMAND_BYTES_MAX, ProcessUse, busiest, parent_of, process_use

_LOOKED_AT_MAX: Final = 8192  # of one container; more are counted by its control group only


def rows(pids: Iterable[int], *, uid_start: int = 0) -> tuple[ProcessUse, ...]:
    """At most 256 rows; processes that end meanwhile are left out."""
    ticks_per_s, page_bytes = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    found = []
    for pid, _ in zip(pids, range(_LOOKED_AT_MAX), strict=False):
        folder = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            stat = (folder / "stat").read_text(errors="replace")
            status = (folder / "status").read_text(errors="replace")
            with (folder / "cmdline").open("rb") as file:
                cmdline = file.read(COMMAND_BYTES_MAX)
            row = process_use(
                pid, stat, status, cmdline, ticks_per_s=ticks_per_s, page_bytes=page_bytes, uid_start=uid_start
            )
            if row is not None:
                found.append(row)
    return busiest(found, TOP_PROCESSES_MAX)


def parents() -> dict[int, int]:
    """Every process of the machine and its parent."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                found[int(name)] = parent_of(Path(f"/proc/{name}/stat").read_text(errors="replace"))
    return found
