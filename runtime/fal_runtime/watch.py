"""Waiting for changes in directories without polling (inotify), for one event loop.

Invariant: `changed` returns soon after the directory changed or after its timeout; callers check their condition
again each time, so a lost event costs one timeout and nothing else. Used by the drivers for exit files and logs.
One inotify instance per Watcher, open only while somebody waits; without inotify (bound reached) it only times out.
"""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

_IN_MODIFY: Final = 0x2
_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVED_TO: Final = 0x80
_IN_CREATE: Final = 0x100
_IN_DELETE: Final = 0x200
_IN_ONLYDIR: Final = 0x01000000
_EVENTS: Final = _IN_MODIFY | _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR
_EVENT_HEAD: Final = struct.Struct("iIII")  # wd, mask, cookie, length of the name
_READ_BYTES: Final = 64 << 10
RECHECK_S: Final = 30.0  # without events, how long `changed` waits at most

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Subscription:
    """One waiter's view of one directory."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def changed(self, timeout_s: float = RECHECK_S) -> None:
        """Wait until something changed since the last call returned, at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return
        self._event.clear()

    def notify(self) -> None:
        self._event.set()


class Watcher:
    """Shares one inotify instance among all subscriptions of a driver."""

    def __init__(self) -> None:
        self._fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._by_wd: dict[int, set[Subscription]] = {}

    @contextmanager
    def subscribe(self, directory: Path, pids: tuple[int, ...] = ()) -> Iterator[Subscription]:
        """Watch `directory` and the end of the processes `pids` while the context lasts.

        Check the condition after entering, then wait.
        """
        subscription = Subscription()
        wd = self._add(directory)
        if wd >= 0:
            self._by_wd.setdefault(wd, set()).add(subscription)
        with ExitStack() as stack:
            stack.callback(self._drop, wd, subscription)
            for pid in pids:
                stack.enter_context(_notified_of_end(pid, subscription))
            yield subscription

    def _add(self, directory: Path) -> int:
        if self._fd < 0:
            fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if fd < 0:
                return -1
            self._fd = fd
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(fd, self._readable)
        wd: int = _libc.inotify_add_watch(self._fd, os.fsencode(directory), ctypes.c_uint32(_EVENTS))
        if wd < 0:
            self._close_if_idle()
        return wd

    def _drop(self, wd: int, subscription: Subscription) -> None:
        waiting = self._by_wd.get(wd)
        if waiting is None:
            return
        waiting.discard(subscription)
        if not waiting:
            del self._by_wd[wd]
            _libc.inotify_rm_watch(self._fd, wd)
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._by_wd or self._fd < 0:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd, self._loop = -1, None

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        at = 0
        while at + _EVENT_HEAD.size <= len(data):
            wd, _mask, _cookie, name_bytes = _EVENT_HEAD.unpack_from(data, at)
            at += _EVENT_HEAD.size + name_bytes
            # wd is -1 when the kernel's queue overflowed: then everybody looks.
            targets = self._by_wd.get(wd, ()) if wd >= 0 else [s for group in self._by_wd.values() for s in group]
            for subscription in targets:
                subscription.notify()


@contextmanager
def _notified_of_end(pid: int, subscription: Subscription) -> Iterator[None]:
    """Notify once when process `pid` ends; at once when it is gone already."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        subscription.notify()
        yield
        return
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(fd)
        subscription.notify()

    loop.add_reader(fd, ended)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # the loop may be closed by now
            loop.remove_reader(fd)
        os.close(fd)
