"""Background processes of a development cluster: start, recognise again, end. Never ends a process it did not start."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError

_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Process:
    """A process that we started; pid and start time together name it, because pids come round again."""

    name: str
    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat
    argv: tuple[str, ...]

    @property
    def alive(self) -> bool:
        """True while this very process runs."""
        return start_ticks(self.pid) == self.start_ticks


def start_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None when there is none or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def start(name: str, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Process:
    """Start a process in a session of its own, its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out, open(os.devnull, "rb") as nothing:
        # Not subprocess.Popen: the process is meant to outlive this one, and Popen objects warn about that.
        pid = os.posix_spawnp(
            argv[0],
            list(argv),
            dict(os.environ if env is None else env),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, nothing.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, out.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, out.fileno(), 2),
            ],
            setsid=True,
        )
    ticks = start_ticks(pid)
    if ticks is None:
        raise died(name, log)
    return Process(name, pid, ticks, tuple(argv))


def died(name: str, log: Path) -> FalError:
    """What a daemon that ended at once said last."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "nothing")
    return FalError(Code.UNAVAILABLE, f"{name} ended; it said: {said.removeprefix('error: ')}", remedy=f"See {log}.")


def wait_for_file(path: Path, process: Process, *, log: Path, timeout_s: float) -> None:
    """Wait until `path` exists. Raises FalError when the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        reap(process)
        if not process.alive:
            raise died(process.name, log)
        if time.monotonic() > deadline:
            raise FalError(Code.TIMEOUT, f"{process.name} is not up after {timeout_s:g} s", remedy=f"See {log}.")
        time.sleep(_POLL_S)


def reap(process: Process) -> None:
    """Collect the exit status of a child of ours; of others init does it."""
    try:
        os.waitpid(process.pid, os.WNOHANG)
    except ChildProcessError:
        return


def end(process: Process, *, grace_s: float) -> bool:
    """SIGTERM, grace, SIGKILL. True when it ran."""
    if not process.alive:
        return False
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while process.alive:
        reap(process)
        if time.monotonic() > deadline:
            os.kill(process.pid, signal.SIGKILL)
            deadline = time.monotonic() + grace_s
        time.sleep(_POLL_S)
    return True
