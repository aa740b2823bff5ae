"""What a container uses and which processes it has: the values, and how the kernel's texts become them. Pure.

Texts are those of proc(5): /proc/PID/stat, status and cmdline. Reading them is the drivers' (`proc_table`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

COMMAND_BYTES_MAX: Final = 256
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """One process: ids on the host and inside, user id inside, state letter, CPU seconds, resident bytes, threads."""

    pid: int
    pid_inside: int
    uid: int
    state: str
    cpu_s: float
    memory_bytes: int
    threads: int
    command: str


@dataclass(frozen=True, slots=True)
class ContainerUse:
    """What a whole container uses. 0 where a limit is none or the machine does not count it.

    `processes` are at most 256, those with the most CPU time first; `pids` counts threads, as the limit does.
    """

    time_s: float
    cpu_s: float = 0.0
    memory_bytes: int = 0
    memory_bytes_max: int = 0
    pids: int = 0
    pids_max: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    oom_kills: int = 0
    processes: tuple[ProcessUse, ...] = ()


def process_use(
    pid: int, stat: str, status: str, cmdline: bytes, *, ticks_per_s: int, page_bytes: int, uid_start: int = 0
) -> ProcessUse | None:
    """One row from the three texts of a process; None when they make no sense (it ended meanwhile)."""
    try:
        fields = stat.rpartition(")")[2].split()
        facts = _status_facts(status)
        uid = int(facts["Uid"].split()[0])
        words = cmdline.rstrip(b"\0").replace(b"\0", b" ")[:COMMAND_BYTES_MAX].decode("utf-8", "replace")
        name = stat.partition("(")[2].rpartition(")")[0]
        return ProcessUse(
            pid=pid,
            pid_inside=int(facts.get("NSpid", str(pid)).split()[-1]),
            uid=uid - uid_start if uid >= uid_start else uid,
            state=fields[0],
            cpu_s=(int(fields[11]) + int(fields[12])) / ticks_per_s,
            memory_bytes=int(fields[21]) * page_bytes,
            threads=int(fields[17]),
            command=_CONTROL.sub(" ", words) or f"[{_CONTROL.sub(' ', name)}]",
        )
    except (IndexError, KeyError, ValueError):
        return None


def _status_facts(status: str) -> Mapping[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in status.splitlines())}


def parent_of(stat: str) -> int:
    """Its parent's pid; 0 when the text makes no sense."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else 0


def descendants(parents: Mapping[int, int], roots: tuple[int, ...]) -> set[int]:
    """`roots` and everything below them, given each process's parent."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting.extend(children.get(pid, ()))
    return found


def busiest(rows: list[ProcessUse], count: int) -> tuple[ProcessUse, ...]:
    """The `count` rows with the most CPU time, then in order of pid."""
    return tuple(sorted(rows, key=lambda row: (-row.cpu_s, row.pid))[:count])


def sum_of_io(text: str) -> tuple[int, int]:
    """(bytes read, bytes written) of io.stat (v2) or blkio.throttle.io_service_bytes_recursive (v1)."""
    read = written = 0
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[1] in ("Read", "Write") and words[2].isdigit():
            read, written = (read + int(words[2]), written) if words[1] == "Read" else (read, written + int(words[2]))
            continue
        for word in words[1:]:
            name, _, value = word.partition("=")
            if name == "rbytes" and value.isdigit():
                read += int(value)
            elif name == "wbytes" and value.isdigit():
                written += int(value)
    return read, written
