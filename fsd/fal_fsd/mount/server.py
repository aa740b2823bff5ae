"""A few threads that take requests from all FUSE connections and answer them.

Invariants: a thread never touches a path below a mount (it would ask itself) and holds nothing while a read waits: so a
few threads serve any number of readers. Whoever adds or ends a connection does so from any thread. Time is looked at
every `_TICK_S` while a read waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from fal_contract.clock import Clock
from fal_contract.telemetry import get_logger
from fal_fsd.mount.connection import Connection, Gone, Scratch
from fal_fsd.mount.wire import WireError

THREADS: Final = 3
_TICK_S: Final = 0.25
_IDLE_S: Final = 5.0
_EVENTS_MAX: Final = 8
_JOIN_TIMEOUT_S: Final = 30.0
_log = get_logger("fal.mount")


class Server:
    """See the module. `on_gone(connection)` is called by a thread when a connection is over by itself."""

    def __init__(self, clock: Clock, on_gone: Callable[[Connection], None], *, threads: int = THREADS) -> None:
        self._clock = clock
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._connections: dict[int, Connection] = {}
        self._woken: deque[Connection] = deque()
        self._stopping = False
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._threads = [threading.Thread(target=self._run, name=f"mount-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def add(self, connection: Connection) -> None:
        """Serve it."""
        with self._lock:
            self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, select.EPOLLIN)

    def remove(self, connection: Connection) -> bool:
        """Serve it no more and let go of the descriptor; False when that was done before."""
        with self._lock:
            known = self._connections.get(connection.fd) is connection
            if known:
                del self._connections[connection.fd]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(connection.fd)
        connection.end()
        return known

    def wake(self, connection: Connection) -> None:
        """It has reads that can be answered."""
        self._woken.append(connection)
        self._ring()

    def close(self) -> None:
        """End the threads and let go of all connections. Blocks until no request is being answered."""
        self._stopping = True
        self._ring()
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT_S)
        for connection in list(self._connections.values()):
            self.remove(connection)
        if any(thread.is_alive() for thread in self._threads):
            _log.error("a_thread_hangs")  # in the disk; its descriptors stay open until the process ends
            return
        self._epoll.close()
        os.close(self._bell)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        scratch = Scratch()
        while not self._stopping:
            waits = any(connection.waits for connection in list(self._connections.values()))
            for fd, _ in self._epoll.poll(_TICK_S if waits else _IDLE_S, _EVENTS_MAX):
                if fd == self._bell:
                    self._answer_woken(scratch)
                else:
                    self._serve(fd, scratch)
            if waits:
                now_s = self._clock.monotonic_s()
                for connection in list(self._connections.values()):
                    self._with(connection, lambda x: x.expire(now_s))  # noqa: B023  (called at once)

    def _answer_woken(self, scratch: Scratch) -> None:
        if not self._stopping:  # else the bell goes on ringing, for the other threads
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        while self._woken:
            try:
                connection = self._woken.popleft()
            except IndexError:
                return
            self._with(connection, lambda x: x.answer_ready(scratch))

    def _serve(self, fd: int, scratch: Scratch) -> None:
        with self._lock:
            connection = self._connections.get(fd)
        if connection is not None:
            self._with(connection, lambda x: x.serve_one(scratch, self._clock.monotonic_s()))

    def _with(self, connection: Connection, act: Callable[[Connection], object]) -> None:
        """`act` while the descriptor is surely that connection's. No failure ends the thread."""
        if not connection.enter():
            return
        over = False
        try:
            act(connection)
        except Gone:
            over = True
        except WireError as exc:
            _log.error("not_a_request", artifact=connection.artifact_id, why=str(exc))
        except Exception:
            _log.exception("request_failed", artifact=connection.artifact_id)
        finally:
            connection.leave()
        if over and self.remove(connection):
            self._on_gone(connection)
