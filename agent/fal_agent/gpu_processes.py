"""Which processes on a GPU belong to the container that holds it, and why one of its processes cannot be killed.

A process belongs to a container when it is in the same control group as the container's first process, or below it in
the tree. What cannot be read is left out: nobody is accused for want of a right to look. Blocks for milliseconds; call
it in a thread. Called by fal_agent.gpu_care.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fal_agent.arrivals import processes_of

_PROC: Final = Path("/proc")
# Where a process waits for weights, a network file or a disk: a D state there is no word about the GPU (pitfall 8).
_FILE_WAITS: Final = (
    "request_wait_answer", "fuse", "folio_wait", "wait_on_page", "io_schedule", "blk_", "submit_bio", "rpc_", "nfs",
    "ext4", "xfs", "btrfs", "jbd2", "erofs", "squashfs", "overlay", "ovl_", "filemap", "do_read_fault", "page_cache",
    "wb_wait", "balance_dirty", "swap", "throttle_direct_reclaim", "mem_cgroup",
)  # fmt: skip


def strangers(pids: Sequence[int], containers: Sequence[int | None], *, proc: Path = _PROC) -> tuple[int, ...]:
    """Those of `pids` that belong to none of `containers`, each named by its first process."""
    for container in containers:
        home = _cgroup(container, proc) if container is not None else None
        if not home:  # it has just ended, or is kept apart from nothing: nobody can say
            return ()
        family = set(processes_of(container, proc=proc))
        pids = [pid for pid in pids if pid not in family and not _same(_cgroup(pid, proc), home)]
    return tuple(pids) if containers else ()


def _same(cgroup: frozenset[str] | None, home: frozenset[str]) -> bool:
    """Whether a process's groups are the container's, or inside them; one whose groups cannot be read is let be."""
    if cgroup is None:
        return True
    return any(mine != "/" and (one == mine or one.startswith(mine + "/")) for one in cgroup for mine in home)


def _cgroup(pid: int, proc: Path) -> frozenset[str] | None:
    """Paths of its control groups that are its own, without the root's; None: there is no such process to be read."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return None
    return frozenset(path for path in (line.split(":", 2)[-1] for line in lines) if path not in ("", "/"))


def unkillable(container: int | None, on_gpu: Sequence[int], *, proc: Path = _PROC) -> str:
    """Why a container that was killed has not ended, where it is the GPU's fault; empty: it is not, or nobody can say.

    `on_gpu`: processes that the driver still lists. A wait whose place the kernel does not tell counts only for those.
    """
    accused = ""
    for pid in processes_of(container, proc=proc):
        for thread in _threads(pid, proc):
            if _state(thread) != "D":
                continue
            where = _wait(thread)
            if any(word in where for word in _FILE_WAITS):
                return ""  # one that waits for a file holds the others, too
            if where or pid in on_gpu:
                accused = f"process {pid} was killed and does not end: it waits in {where or 'the driver'}"
    return accused


def _threads(pid: int, proc: Path) -> list[Path]:
    try:
        return sorted((proc / str(pid) / "task").iterdir())
    except OSError:
        return []


def _state(thread: Path) -> str:
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _wait(thread: Path) -> str:
    """The kernel's function in which it waits; empty where that is not told."""
    try:
        name = (thread / "wchan").read_text().strip()
    except OSError:
        return ""
    return "" if name == "0" else name


__all__ = ["strangers", "unkillable"]
