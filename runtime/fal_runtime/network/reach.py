"""TCP sockets inside a runner's own network namespace, so that its port needs no bridge and no address.

A socket belongs to the namespace of the thread that makes it and stays there; connecting and everything after is done
by whoever has it. One thread does nothing else: it enters the namespace, makes the socket, and goes home, so that it
never keeps a namespace alive. Which namespace is decided by a process that is known by pid and start time, checked
before and after its namespace was opened: a pid that was given to another process leads nowhere.

Called by fal-proxy for requests and by fal-agent for probes. Needs CAP_SYS_ADMIN.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from fal_runtime.network.namespaces import enter
from fal_runtime.process_supervisor import start_ticks

HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Port:
    """Where a runner's server listens: on loopback, in the namespace of process `pid` that began at `ticks` (field 22
    of /proc/PID/stat). `pid` 0: on the node's own loopback (a driver that does not isolate)."""

    port: int
    pid: int = 0
    ticks: int = 0


class _Home(threading.local):
    fd: int = -1


_home = _Home()
_rooms: dict[int, ThreadPoolExecutor] = {}  # by process: a fork has none of its parent's threads


async def connect(to: Port) -> socket.socket:
    """A connected, non-blocking socket. Raises OSError (ProcessLookupError: that process has ended).

    It has no timeout of its own; it may be cancelled.
    """
    sock = _socket() if not to.pid else await _fetch(to)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (HOST, to.port))
    except BaseException:
        sock.close()
        raise
    return sock


async def _fetch(to: Port) -> socket.socket:
    making = _room().submit(_socket_inside, to.pid, to.ticks)
    try:
        return await asyncio.wrap_future(making)
    except asyncio.CancelledError:
        making.add_done_callback(_throw_away)  # the room may be at it
        raise


def _throw_away(making: Future[socket.socket]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()


def _room() -> ThreadPoolExecutor:
    room = _rooms.get(os.getpid())
    if room is None:
        _rooms.clear()
        room = _rooms[os.getpid()] = ThreadPoolExecutor(1, "netns-sockets")
    return room


def close() -> None:
    """End the thread; the next connect starts another."""
    room = _rooms.pop(os.getpid(), None)
    if room is not None:
        room.submit(_leave)
        room.shutdown(wait=True)


def _leave() -> None:
    if _home.fd >= 0:
        os.close(_home.fd)
        _home.fd = -1


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _socket_inside(pid: int, ticks: int) -> socket.socket:
    """In the room's thread only."""
    if _home.fd < 0:
        _home.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    namespace = _namespace(pid, ticks)
    try:
        enter(namespace)
        try:
            return _socket()
        finally:
            _go_home()
    finally:
        os.close(namespace)


def _go_home() -> None:
    try:
        enter(_home.fd)
    except OSError:
        # A thread in a foreign namespace must make no more sockets. The next one begins at home, as threads do.
        room = _rooms.pop(os.getpid(), None)
        os.close(_home.fd)
        _home.fd = -1
        if room is not None:
            room.shutdown(wait=False, cancel_futures=True)
        raise


def _namespace(pid: int, ticks: int) -> int:
    if not ticks or start_ticks(pid) != ticks:
        raise ProcessLookupError(3, "its process has ended")
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if start_ticks(pid) != ticks:
        os.close(fd)
        raise ProcessLookupError(3, "its process has ended")
    return fd
