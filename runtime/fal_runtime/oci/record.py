"""What the oci driver knows of its containers, as files: the only state, shared by a driver and its successor.

    STATE/containers/ID/  record.json   what removal needs; written first
                          created.json  pids with start times and the boot; written last by create
                          started.json  written just before the runtime is told to start it
                          ended.json    the last word, once the exit was seen: OOM is read while the cgroup exists
                          exits/ID      the exit code, by conmon;  log/log  the output, by conmon

`exits` and `persist` are links into the container's run directory, which lasts until the next boot: conmon writes the
exit code to both and gives up at the first that fails, so that on STATE a full disk would lose it. What we told it (for
the reason of its end) is kept there, too. An end that was seen is in ended.json, and outlives the boot.
Invariant: `status` looks and never changes what runs. Called by the oci driver only.
"""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from fal_runtime import endings
from fal_runtime.driver import ContainerStatus, Phase
from fal_runtime.log_file import tail
from fal_runtime.oci import cgroups, kernel_messages
from fal_runtime.oci.conmon import Paths
from fal_runtime.process_supervisor import start_ticks, state_and_ticks, write_whole

LOG_LOST: Final = "log and exit code lost: conmon died"
_HINT_LINES: Final = 20
_ENDING: Final = threading.Lock()
REBOOTED: Final = "the node was rebooted"


@cache
def boot_id() -> str:
    """Names this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class Record:
    """What `remove` must take away, known before anything is made."""

    id: str
    runtime: str
    run_dir: str
    cgroup_path: str
    uid_start: int
    user_namespace: bool
    etc: str
    skeleton: str
    socket_dir: str = ""
    models_dir: str = ""
    start_by_program: bool = True  # this runtime, or a hook, wants `RUNTIME start` to be executed
    image: str = ""  # its id; empty: the node's own system
    fifo: str = ""  # where it waits for its message when it was made ahead (see `prepared`)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Created:
    """The processes of a created container; pid and start ticks, so that a reused pid is not taken for it."""

    pid: int
    pid_ticks: int
    conmon: int
    conmon_ticks: int
    boot: str


def alive(pid: int, ticks: int) -> bool:
    """Does this very process still run? A zombie does not."""
    if pid <= 0 or not ticks:
        return False
    state, began = state_and_ticks(pid)
    return began == ticks and state not in ("Z", "X")


class EndUnread(Exception):
    """A container has ended, and nobody has found out how yet."""


class ContainerFiles:
    """The files of one container."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.id = directory.name

    @property
    def runtime_id(self) -> str:
        """How conmon and the runtime know it: another name when it was made before it had this one."""
        return self.directory.resolve().name

    def paths(self) -> Paths:
        """Where conmon reads and writes."""
        d = self.directory
        return Paths(
            bundle=d / "bundle",
            log=d / "log" / "log",
            pidfile=d / "pid",
            conmon_pidfile=d / "conmon.pid",
            exits=d / "exits",
            persist=d / "persist",
            attach=d / "attach",
        )

    def make(self, record: Record) -> None:
        """All directories, then the record."""
        paths = self.paths()
        for path in (self.directory, paths.bundle, paths.log.parent, paths.attach):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        run_dir = Path(record.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        for link in (paths.exits, paths.persist):
            (run_dir / link.name).mkdir(exist_ok=True, mode=0o700)
            link.symlink_to(run_dir / link.name)
        write_whole(self.directory / "record.json", record.as_json())

    def record(self) -> Record | None:
        value = _read(self.directory / "record.json")
        return Record(**value) if value else None

    def created(self) -> Created | None:
        """None until `create` has finished."""
        value = _read(self.directory / "created.json")
        return Created(**value) if value else None

    def mark_created(self, pid: int) -> None:
        conmon = int(self.paths().conmon_pidfile.read_text())
        value = Created(pid, start_ticks(pid), conmon, start_ticks(conmon), boot_id())
        write_whole(self.directory / "created.json", asdict(value))

    def mark_started(self, now_s: float) -> None:
        write_whole(self.directory / "started.json", {"started_at_s": now_s})

    def mark_told(self, signal_name: str, grace_s: float = 0.0) -> None:
        """We are about to send it this signal. Best effort: a full disk must not keep it alive."""
        with contextlib.suppress(OSError):
            told = _read(self.paths().persist / "told.json")
            signals = [*told.get("signals", ()), signal_name]
            grace_s = told.get("grace_s", grace_s)
            write_whole(self.paths().persist / "told.json", {"signals": signals, "grace_s": grace_s})

    def status(self, runtime_root: Path, *, may_end: bool = True) -> ContainerStatus | None:
        """None when it was never wholly created.

        The first look at an end reads more than a few files; without `may_end` it raises EndUnread instead.
        """
        record, created = self.record(), self.created()
        if record is None or created is None:
            return None
        started_at_s = _read(self.directory / "started.json").get("started_at_s")
        if ended := _read(self.directory / "ended.json"):
            return ContainerStatus(**{**ended, "phase": Phase.EXITED})
        same_boot = created.boot == boot_id()
        # Looked at before the exit file: conmon writes that one last.
        init = same_boot and alive(created.pid, created.pid_ticks)
        conmon = same_boot and alive(created.conmon, created.conmon_ticks)
        exit_file = self.paths().exits / record.id
        if exit_file.exists():
            if not may_end:
                raise EndUnread
            with _ENDING:  # of several threads one finds it out
                if ended := _read(self.directory / "ended.json"):
                    return ContainerStatus(**{**ended, "phase": Phase.EXITED})
                return self._ended(record, started_at_s, exit_file)
        reason = "" if conmon else LOG_LOST
        if init or conmon:
            fifo = Path(record.fifo) if record.fifo else runtime_root / record.id / "exec.fifo"
            cgroup = Path(record.cgroup_path).name
            if started_at_s is None or fifo.exists():
                return ContainerStatus(self.id, Phase.CREATED, created.pid, reason=reason, cgroup=cgroup)
            oom = cgroups.oom_kills(record.cgroup_path) > 0
            return ContainerStatus(
                self.id, Phase.RUNNING, created.pid, started_at_s, oom_killed=oom, reason=reason, cgroup=cgroup
            )
        reason = LOG_LOST if same_boot else REBOOTED
        oom = cgroups.oom_kills(record.cgroup_path) > 0
        return self._keep(ContainerStatus(self.id, Phase.EXITED, None, started_at_s, oom_killed=oom, reason=reason))

    def _ended(self, record: Record, started_at_s: float | None, exit_file: Path) -> ContainerStatus:
        text = exit_file.read_text().strip()
        code = int(text) if text.lstrip("-").isdigit() else None
        memory = self._memory(record)
        if started_at_s is None:
            reason = "killed before it started"
        else:
            told = _read(self.paths().persist / "told.json")
            last = [line.text for line in tail(self.paths().log, _HINT_LINES)] if code in (126, 127) else []
            asked = endings.Told(tuple(told.get("signals", ())), told.get("grace_s", 0.0))
            reason = endings.reason(code, told=asked, memory=memory, last_lines=last)
        return self._keep(
            ContainerStatus(
                *(self.id, Phase.EXITED, None, started_at_s, exit_file.stat().st_mtime, code),
                oom_killed=memory.kills > 0,
                reason=reason,
            )
        )

    def _memory(self, record: Record) -> endings.Memory:
        """What the kernel did to it for memory; asked once, when it has ended."""
        kills = cgroups.oom_kills(record.cgroup_path)
        if not kills:
            return endings.Memory()
        limits = _read(self.paths().bundle / "config.json").get("linux", {}).get("resources", {})
        limit_bytes = limits.get("memory", {}).get("limit", 0)
        return endings.Memory(kills, limit_bytes, endings.victim_in(kernel_messages.recent(), record.cgroup_path))

    def _keep(self, status: ContainerStatus) -> ContainerStatus:
        with contextlib.suppress(OSError):  # a full disk: it is found out again, as far as it can be
            write_whole(self.directory / "ended.json", asdict(status))
        return status


def _read(path: Path) -> dict[str, Any]:
    # Unbuffered: a status reads four such files, and somebody asks for it at each step of a start.
    try:
        with open(path, "rb", buffering=0) as file:
            value: dict[str, Any] = json.loads(file.readall())
    except FileNotFoundError:
        return {}
    return value
