"""fsd's side of the holder process: start it, hand descriptors to it, take them back.

Invariant: the holder lives in a session and, where cgroups can be made, in a cgroup of its own, so that killing all of
fsd's cgroup misses it. Its death harms nobody while fsd lives, which has the descriptors too: `Keeper.put` gives them
to the next one. Every call connects anew and ends within `CALL_TIMEOUT_S`; they block and are made in threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger
from fal_fsd.mount import holder

CALL_TIMEOUT_S: Final = 5.0
START_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 0.02
_LOG_BYTES_MAX: Final = 1 << 20
_log = get_logger("fal.mount")


@dataclass(frozen=True, slots=True)
class About:
    """What is remembered of a kept descriptor. `mounted`: its mount is still in its place.

    `key` is its name at the holder: unlike a connection's number it never comes again.
    """

    artifact_id: str
    connection: int
    key: str
    mounted: bool = True


class Keeper:
    """The holder of `folder`. Thread-safe but for `ensure` and `end`."""

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        orphan_s: float = holder.ORPHAN_S,
        keep_s: float = holder.KEEP_S,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._times = (orphan_s, keep_s)
        self._child: int | None = None  # a holder that we started and have not reaped
        self.pid = 0

    def ensure(self) -> socket.socket:
        """A holder that answers, started if there is none; the open lease. It reads as ended when the holder dies."""
        until_s = self._clock.monotonic_s() + START_TIMEOUT_S
        why = "it does not answer"
        while self._clock.monotonic_s() < until_s:
            self.reap()
            try:
                self.pid = int(self._call({"op": "hello"})[0]["pid"])
                return self._take_lease()
            except (FileNotFoundError, ConnectionRefusedError):
                if self._child is None:
                    self._start()
            except OSError as exc:  # it dies this moment
                why = exc.strerror or type(exc).__name__
            except FalError as exc:  # or a fsd that was killed just now has the lease
                why = exc.what
            self._pause()
        raise FalError(Code.UNAVAILABLE, f"the holder of mounts: {why}", remedy=f"See {self._folder}/holder.log.")

    def put(self, about: About, fd: int) -> None:
        """Keep this descriptor."""
        self._call({"op": "put", "key": about.key, "about": asdict(about)}, fd)

    def note(self, about: About) -> None:
        """Remember something else about it."""
        self._call({"op": "note", "key": about.key, "about": asdict(about)})

    def held(self) -> list[About]:
        """All that it keeps; what we cannot read is dropped."""
        found = []
        for key, raw in self._call({"op": "list"})[0]["held"].items():
            try:
                found.append(About(str(raw["artifact_id"]), int(raw["connection"]), key, bool(raw["mounted"])))
            except (KeyError, TypeError, ValueError):
                self._call({"op": "drop", "key": key})
        return found

    def take(self, about: About) -> int:
        """A copy of the descriptor."""
        fd = self._call({"op": "take", "key": about.key})[1]
        if fd is None:
            raise FalError(Code.INTERNAL, "the holder gave no descriptor", remedy="Restart fal-fsd.")
        return fd

    def drop(self, about: About) -> None:
        """Close it; what is unknown or a holder that is away are fine."""
        with contextlib.suppress(OSError, FalError):
            self._call({"op": "drop", "key": about.key})

    def end(self) -> None:
        """End the holder, with all that it keeps, and wait for it."""
        with contextlib.suppress(OSError, FalError):
            pid = int(self._call({"op": "hello"})[0]["pid"])
            self._call({"op": "end"})
            _wait(pid, CALL_TIMEOUT_S)
        self.reap()
        for path in _cgroups_of("self"):
            with contextlib.suppress(OSError):
                _beside(path).rmdir()

    def reap(self) -> None:
        """Collect a holder of ours that ended."""
        if self._child is not None:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._child, os.WNOHANG)[0] == 0:
                    return
            self._child = None

    def _start(self) -> None:
        log_file = self._folder / "holder.log"
        if log_file.exists() and log_file.stat().st_size > _LOG_BYTES_MAX:
            log_file.replace(log_file.with_suffix(".log.1"))
        orphan_s, keep_s = self._times
        argv = [sys.executable, "-I", "-S", holder.__file__, str(self._folder), str(orphan_s), str(keep_s)]
        self._child = os.posix_spawn(
            argv[0],
            argv,
            {"PATH": os.defpath, "LANG": "C.UTF-8"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, str(log_file), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            ],
            setsid=True,
        )
        _leave_our_cgroup(self._child)
        _log.info("holder_started", pid=self._child)

    def _take_lease(self) -> socket.socket:
        lease = self._connect()
        try:
            _ask(lease, {"op": "lease"})
        except BaseException:
            lease.close()
            raise
        return lease

    def _pause(self) -> None:
        select.select([], [], [], _POLL_S)

    def _connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            made.settimeout(CALL_TIMEOUT_S)
            with _folder_fd(self._folder) as fd:  # a path of any length fits into a socket's address this way
                made.connect(f"/proc/self/fd/{fd}/{holder.SOCKET_NAME}")
        except BaseException:
            made.close()
            raise
        return made

    def _call(self, message: dict[str, Any], fd: int | None = None) -> tuple[dict[str, Any], int | None]:
        with self._connect() as connection:
            return _ask(connection, message, fd)


def _ask(
    connection: socket.socket, message: dict[str, Any], fd: int | None = None
) -> tuple[dict[str, Any], int | None]:
    socket.send_fds(connection, [json.dumps(message).encode()], [fd] if fd is not None else [])
    raw, fds, _, _ = socket.recv_fds(connection, holder.MESSAGE_BYTES_MAX * 8, 1, socket.MSG_CMSG_CLOEXEC)
    answer = json.loads(raw) if raw else {"ok": False, "why": "it hung up"}
    if not answer.get("ok"):
        for given in fds:
            os.close(given)
        raise FalError(Code.UNAVAILABLE, f"the holder of mounts: {answer.get('why')}", remedy="Restart fal-fsd.")
    return answer, fds[0] if fds else None


@contextlib.contextmanager
def _folder_fd(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _wait(pid: int, timeout_s: float) -> None:
    """Until that process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([fd], [], [], timeout_s)
    finally:
        os.close(fd)


def _leave_our_cgroup(pid: int) -> None:
    """Beside our own cgroup, in every hierarchy in which we are not at the top and which lets us."""
    for path in _cgroups_of("self"):
        try:
            beside = _beside(path)
            if not beside.exists():
                beside.mkdir()
                for name in ("cpuset.cpus", "cpuset.mems"):  # of v1: admits nobody while they are empty
                    if (path / name).exists() and not (beside / name).read_text().strip():
                        (beside / name).write_text((path / name).read_text())
            (beside / "cgroup.procs").write_text(str(pid))
        except OSError as exc:
            _log.warning("holder_shares_cgroup", cgroup=str(path), why=exc.strerror)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}-holder")


def _cgroups_of(process: str) -> list[Path]:
    """Directories of a process's cgroups, the tops of hierarchies left out."""
    mounts: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _source, target, fs_type, options, *_ = line.split(" ")
        if fs_type == "cgroup2":
            mounts.setdefault("", Path(target))
        elif fs_type == "cgroup":
            for option in options.split(","):
                mounts.setdefault(option, Path(target))
    found = []
    for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        mounted = mounts.get(controllers.split(",")[0])
        if mounted is not None and path != "/":
            found.append(mounted / path.lstrip("/"))
    return list(dict.fromkeys(found))


__all__ = ["CALL_TIMEOUT_S", "About", "Keeper"]
