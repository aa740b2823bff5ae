"""Holds one process of the process driver: its log, its exit code, its descendants.

Runs as a script of its own (`python -I -S process_supervisor.py DIRECTORY`), standard library only, so that it starts
in milliseconds and needs nothing from whoever started it. Invariant: it lives in a session of its own and does not care
whether the agent lives; what it knows is in files of DIRECTORY, each written whole (write, rename):

    spec.json     read: argv, env, cwd, log_bytes_max, open_files_max
    pids.json     supervisor and child: pid and start time (clock ticks since boot, so that a reused pid is recognised)
    log, log.1    the output, k8s-file lines, each at most log_bytes_max / 2
    exit.json     exit_code, finished_at_s: the child and all its descendants are gone

Exits 0 once the child runs (the supervision goes on in a forked process); else 1 with one line on stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
PART_BYTES_MAX = 8 << 10
READ_BYTES = 64 << 10
DRAIN_S = 1.0  # how long output of vanished descendants is waited for


def wall_s() -> float:
    return time.time()  # noqa: TID251  (standard library only: fal_contract.clock cannot be imported here)


def write_whole(path: Path, value: dict[str, Any]) -> None:
    """Readers see the old file or the new one, never half of it. Not synced: no process outlives a power cut."""
    temporary = os.path.splitext(path)[0] + ".tmp"
    with open(temporary, "wb", buffering=0) as file:
        write_all(file, json.dumps(value).encode())
    os.rename(temporary, path)


def write_all(file: io.FileIO, data: bytes) -> None:
    """All of it, or OSError."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat: when this pid's process began; 0 when there is none."""
    return state_and_ticks(pid)[1]


def state_and_ticks(pid: int) -> tuple[str, int]:
    """Fields 3 and 22 of /proc/PID/stat, from one look: the process's state, such as R, and when it began."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(4096)
    except OSError:
        return "", 0
    fields = text.rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19])


class Log:
    """A bounded log: `path` and one older part, each at most half of `bytes_max`."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._half = bytes_max // 2
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._rest = {"stdout": b"", "stderr": b""}

    def feed(self, stream: str, data: bytes, *, end: bool = False) -> None:
        *lines, rest = (self._rest[stream] + data).split(b"\n")
        stamp = self._stamp()
        records = [b"%s %s F %s\n" % (stamp, stream.encode(), line) for line in lines]
        if len(rest) > PART_BYTES_MAX or (end and rest):
            records.append(b"%s %s %s %s\n" % (stamp, stream.encode(), b"F" if end else b"P", rest))
            rest = b""
        self._rest[stream] = rest
        for record in records:
            self._write(record)

    def close(self) -> None:
        self._file.close()

    def _write(self, record: bytes) -> None:
        if self._size + len(record) > self._half and self._size:
            self._file.close()
            self._path.rename(self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("ab", buffering=0)
            self._size = 0
        # A full disk costs log lines, never the process.
        with contextlib.suppress(OSError):
            self._size += self._file.write(record[: self._half]) or 0

    @staticmethod
    def _stamp() -> bytes:
        now_ns = time.time_ns()
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_ns // 10**9))
        return b"%s.%09d+00:00" % (whole.encode(), now_ns % 10**9)


def start_child(spec: dict[str, Any]) -> subprocess.Popen[bytes]:
    def limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = spec["open_files_max"]
        if wanted:
            value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (value, value))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return subprocess.Popen(
        spec["argv"],
        env=spec["env"],
        cwd=spec["cwd"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=limit,
    )


def pump(child: subprocess.Popen[bytes], log: Log) -> None:
    """Copy output to the log until the child has exited and its pipes are empty, or `DRAIN_S` after its exit."""
    with selectors.DefaultSelector() as selector, open(os.pidfd_open(child.pid), "rb", buffering=0) as child_fd:
        assert child.stdout is not None
        assert child.stderr is not None
        selector.register(child.stdout, selectors.EVENT_READ, "stdout")
        selector.register(child.stderr, selectors.EVENT_READ, "stderr")
        selector.register(child_fd, selectors.EVENT_READ, "exit")
        deadline_s: float | None = None  # known once the child has exited
        while selector.get_map():
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                break
            for key, _events in selector.select(left_s):
                if key.data == "exit":
                    selector.unregister(child_fd)
                    end_descendants(child.pid)
                    deadline_s = time.monotonic() + DRAIN_S
                    continue
                data = os.read(key.fd, READ_BYTES)
                log.feed(key.data, data, end=not data)
                if not data:
                    selector.unregister(key.fileobj)
    for stream in ("stdout", "stderr"):
        log.feed(stream, b"", end=True)


def end_descendants(leader: int) -> None:
    """Kill what is left of the child's process group and whatever was re-parented to us."""
    for _ in range(1000):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        others = [pid for pid in children() if pid != leader]
        if not others:
            return
        for pid in others:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in others:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def children() -> list[int]:
    """Our direct children, from /proc (they are few)."""
    me = os.getpid()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                if int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]) == me:
                    found.append(int(name))
    return found


def supervise(directory: Path, report: int) -> None:
    """Start the child, tell the parent through `report`, then hold on until everything has ended."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    spec = json.loads((directory / "spec.json").read_text())
    log = Log(directory / "log", spec["log_bytes_max"])
    try:
        child = start_child(spec)
    except (OSError, subprocess.SubprocessError) as error:
        write_whole(directory / "exit.json", {"exit_code": 127, "finished_at_s": wall_s(), "reason": str(error)})
        os.write(report, str(error).encode())
        return
    pids = {
        "supervisor": [os.getpid(), start_ticks(os.getpid())],
        "child": [child.pid, start_ticks(child.pid)],
        "started_at_s": wall_s(),
    }
    write_whole(directory / "pids.json", pids)
    os.close(report)
    pump(child, log)
    end_descendants(child.pid)
    code = child.wait()
    exit_code = 128 - code if code < 0 else code
    write_whole(directory / "exit.json", {"exit_code": exit_code, "finished_at_s": wall_s(), "reason": ""})


def main() -> int:
    directory = Path(sys.argv[1])
    readable, report = os.pipe()
    if os.fork() == 0:
        status = 1
        try:
            os.close(readable)
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            supervise(directory, report)
            status = 0
        finally:
            os._exit(status)
    os.close(report)
    error = b""
    while data := os.read(readable, 4096):
        error += data
    if error or not ((directory / "pids.json").exists() or (directory / "exit.json").exists()):
        sys.stderr.write((error or b"the supervisor ended early").decode("utf-8", "replace") + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
