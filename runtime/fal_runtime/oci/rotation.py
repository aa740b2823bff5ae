"""Keeps the last two parts of each container's log, because conmon keeps one.

At its limit conmon makes an empty file and renames it over the log (2.1.6: ctr_logging.c, reopen_k8s_file): everything
written so far is gone, the newest lines too. So the log has a second name, a hard link. When the log becomes another
file, what the second name still has is the part before: it becomes NAME.1, and the new log gets the second name.

    log (conmon writes)   log.held (the same file, until conmon rotates)   log.1 (the part before)

Invariant: at most three parts exist at a time, each at most a third of the container's bound. Parts are exact; when a
container writes whole parts faster than this process looks, or while no agent runs, parts between the newest and NAME.1
are missing. Watches by inotify, so that lines cost nothing here, only rotations do. Called by the oci driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
from pathlib import Path
from typing import Final

_IN_MOVED_TO: Final = 0x80
_IN_ONLYDIR: Final = 0x01000000
_EVENT_HEAD: Final = struct.Struct("iIII")  # watch, mask, cookie, length of the name
_READ_BYTES: Final = 64 << 10
_PARTS: Final = 3
_libc: Final = ctypes.CDLL(None, use_errno=True)


def part_bytes(log_bytes_max: int) -> int:
    """How large conmon may let one part grow."""
    return log_bytes_max // _PARTS


def settle(log: Path) -> None:
    """Take notice of a rotation, if there was one; never raises."""
    held, older = log.with_name(log.name + ".held"), log.with_name(log.name + ".1")
    with contextlib.suppress(OSError):
        try:
            if held.stat().st_ino == log.stat().st_ino:
                return
            held.rename(older)
        except FileNotFoundError:
            if held.exists():  # no log: it is being replaced; its new file is an event
                return
        os.link(log, held)


class Rotations:
    """Watches the logs of one driver's containers, for one event loop."""

    def __init__(self) -> None:
        self._fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._logs: dict[int, Path] = {}
        self._watches: dict[Path, int] = {}

    def watch(self, log: Path) -> None:
        """Keep the parts of `log` from now on; twice is like once."""
        if log not in self._watches and self._open():
            mask = ctypes.c_uint32(_IN_MOVED_TO | _IN_ONLYDIR)
            wd: int = _libc.inotify_add_watch(self._fd, os.fsencode(log.parent), mask)
            if wd >= 0:
                self._logs[wd], self._watches[log] = log, wd
        settle(log)

    def drop(self, log: Path) -> None:
        """Its container is going; what was rotated so far is settled."""
        wd = self._watches.pop(log, -1)
        if wd >= 0:
            self._logs.pop(wd, None)
            _libc.inotify_rm_watch(self._fd, wd)
        settle(log)
        if not self._watches:
            self.close()

    def close(self) -> None:
        """Watch nothing any more."""
        if self._fd >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
        self._fd, self._loop = -1, None
        self._logs.clear()
        self._watches.clear()

    def _open(self) -> bool:
        loop = asyncio.get_running_loop()
        if self._fd >= 0 and self._loop is not loop:
            self.close()
        if self._fd < 0:
            self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._fd < 0:
                return False  # the user's bound of instances: rotations are noticed when a log is read
            self._loop = loop
            loop.add_reader(self._fd, self._readable)
        return True

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        at, logs = 0, set[Path]()
        while at + _EVENT_HEAD.size <= len(data):
            wd, _mask, _cookie, name_bytes = _EVENT_HEAD.unpack_from(data, at)
            at += _EVENT_HEAD.size + name_bytes
            # -1: the kernel's queue overflowed, so any may have been rotated.
            logs.update([self._logs[wd]] if wd in self._logs else self._logs.values() if wd < 0 else ())
        for log in logs:
            settle(log)
