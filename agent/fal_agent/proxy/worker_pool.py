"""Connections to workers that are kept for the next request, because connecting costs more than a small request.

A connection is kept after a clean exchange only, a second at most: a server that takes one connection at a time is
asked by its prober, too. It is used again only when the worker is known to keep connections: one of them must have
been idle for a while and still be open. Many servers close after an answer without saying so, and a request that met
that close would be lost. A runner that closed one under a request is never trusted again.

Every connection was checked by `worker_socket` when it was made. Single-threaded, like everything of the data path.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, cast

from fal_agent.proxy import pumping
from fal_agent.proxy.messages import RunnerEntry

KEPT_MAX_S: Final = 1.0  # from the connect; below the keep-alive of the servers that people use
TRUSTED_AFTER_S: Final = 0.5  # who closes after an answer does so within this, unless its loop stands still for longer
KEPT_PER_RUNNER_MAX: Final = 64
_PEEK: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
WRITE_BUFFER_BYTES_MAX: Final = 256 << 10


class User(Protocol):
    """Who has the connection: one exchange."""

    def answer_received(self, data: memoryview) -> None:
        """Bytes of the worker's answer, good until this returns."""
        ...

    def worker_ready(self, worker: WorkerConnection) -> None:
        """The connection stands."""
        ...

    def worker_lost(self, exc: Exception | None) -> None:
        """The connection ended; `exc` None: in order."""
        ...

    def worker_full(self) -> None:
        """It takes no more for now."""
        ...

    def worker_takes(self) -> None:
        """It takes more."""
        ...


class WorkerConnection(asyncio.BufferedProtocol):
    """One connection to a worker; `user` None: nobody uses it."""

    def __init__(self, entry: RunnerEntry, sock: socket.socket, user: User, pool: WorkerPool, now_s: float) -> None:
        self.entry = entry
        self.user: User | None = user
        self.reused = False
        self.born_s = now_s
        self.idle_since_s = now_s
        self.transport: asyncio.Transport | None = None
        self._sock = sock
        self._pool = pool

    @property
    def clean(self) -> bool:
        """Everything that was written has left."""
        transport = self.transport
        return transport is not None and not transport.is_closing() and transport.get_write_buffer_size() == 0

    def still_open(self) -> bool:
        """Open, and nothing came that nobody asked for. Asks the kernel, whose news may not be here yet."""
        if self.transport is None or self.transport.is_closing():
            return False
        try:
            self._sock.recv(1, _PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # the end, or bytes

    def abort(self) -> None:
        """Cut it: a worker that still works for it sees that."""
        if self.transport is not None:
            self.transport.abort()

    def write(self, data: bytes | memoryview) -> None:
        """Bytes of the request."""
        if self.transport is not None:
            pumping.write(self.transport, self._sock.send, data)

    def pause_reading(self) -> None:
        """The client takes no more for now."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """The client takes more."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        if self.user is None:  # nobody waits any more
            self.abort()
        else:
            self.user.worker_ready(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._pool.lost(self)
        if self.user is not None:
            user, self.user = self.user, None
            user.worker_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        return pumping.VIEW

    def buffer_updated(self, nbytes: int) -> None:
        if self.user is None:
            self.abort()  # nobody asked
        else:
            self.user.answer_received(pumping.VIEW[:nbytes])

    def pause_writing(self) -> None:
        if self.user is not None:
            self.user.worker_full()

    def resume_writing(self) -> None:
        if self.user is not None:
            self.user.worker_takes()


@dataclass(slots=True)
class _Kept:
    """Of one runner."""

    entry: RunnerEntry
    idle: list[WorkerConnection] = field(default_factory=list)
    keeps: bool = False  # it was seen to keep connections
    closes: bool = False  # it closed one under a request


class WorkerPool:
    """Idle connections, by runner; `now_s` is monotonic."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._timer: asyncio.TimerHandle | None = None

    def take(self, entry: RunnerEntry, now_s: float) -> WorkerConnection | None:
        """A connection to exactly this worker that can carry a request, or None."""
        kept = self._kept.get(entry.runner_id)
        if kept is None:
            return None
        if not _same_worker(kept.entry, entry):
            self.drop(entry.runner_id)
            return None
        if not kept.keeps and not self._keeps(kept, now_s):
            return None
        while kept.idle:
            connection = kept.idle.pop()
            if now_s - connection.born_s < KEPT_MAX_S and connection.still_open():
                connection.resume_reading()  # a client that was slow to take its answer may have stopped it
                connection.reused = True
                return connection
            connection.abort()
        return None

    def _keeps(self, kept: _Kept, now_s: float) -> bool:
        """The connection that has been idle for longest shows whether the worker keeps them."""
        if kept.idle and now_s - kept.idle[0].idle_since_s >= TRUSTED_AFTER_S:
            kept.keeps = kept.idle[0].still_open()
        return kept.keeps

    def give(self, connection: WorkerConnection, now_s: float) -> None:
        """Its exchange ended cleanly."""
        connection.user = None
        entry = connection.entry
        kept = self._kept.get(entry.runner_id)
        if kept is None or not _same_worker(kept.entry, entry):
            self.drop(entry.runner_id)
            kept = self._kept[entry.runner_id] = _Kept(entry)
        if kept.closes or len(kept.idle) >= KEPT_PER_RUNNER_MAX or now_s - connection.born_s >= KEPT_MAX_S:
            connection.abort()
            return
        connection.idle_since_s = now_s
        kept.idle.append(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(KEPT_MAX_S, self._sweep)

    def closed_under_request(self, entry: RunnerEntry) -> None:
        """A kept connection ended without an answer: this worker's are not kept any more."""
        kept = self._kept.get(entry.runner_id)
        if kept is not None and _same_worker(kept.entry, entry):
            kept.closes = True
            _cut(kept)

    def lost(self, connection: WorkerConnection) -> None:
        """It ended."""
        kept = self._kept.get(connection.entry.runner_id)
        if kept is not None and connection in kept.idle:
            kept.idle.remove(connection)

    def drop(self, runner_id: str) -> None:
        """The runner is gone, or another."""
        kept = self._kept.pop(runner_id, None)
        if kept is not None:
            _cut(kept)

    def close(self) -> None:
        """Cut all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for runner_id in list(self._kept):
            self.drop(runner_id)

    def _sweep(self) -> None:
        """Cut what is too old; come again while there is any."""
        self._timer = None
        loop = asyncio.get_running_loop()
        oldest_s = loop.time() - KEPT_MAX_S
        for kept in self._kept.values():
            old = [connection for connection in kept.idle if connection.born_s <= oldest_s]
            for connection in old:
                kept.idle.remove(connection)
                connection.abort()
        if any(kept.idle for kept in self._kept.values()):
            self._timer = loop.call_later(KEPT_MAX_S, self._sweep)


def _same_worker(one: RunnerEntry, other: RunnerEntry) -> bool:
    """Whether a connection made for `one` is right for `other`: only what concerns admission may differ."""
    if one is other:
        return True
    admission = {"max_multiplexing": 1, "request_timeout_s": 1.0, "draining": False}
    return replace(one, **admission) == replace(other, **admission)  # type: ignore[arg-type]


def _cut(kept: _Kept) -> None:
    connections, kept.idle = kept.idle, []
    for connection in connections:
        connection.abort()
