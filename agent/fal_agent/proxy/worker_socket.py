"""Connecting to a worker: to its socket, or to its port.

The container owns the folder that its socket lies in, so nothing there is trusted: opened without following a symbolic
link, checked to be a socket, and connected through the very descriptor that was checked, so that it cannot be exchanged
in between; then SO_PEERCRED must name a process of the runner. The tmpfs that the driver mounts `nosymfollow` is a
second wall, not the only one. A port is reached inside the network namespace of the runner's first process, where
nobody else can listen.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Final

from fal_agent.proxy.messages import RunnerEntry
from fal_contract.errors import Code, FalError
from fal_runtime.network.reach import Port, connect
from fal_runtime.socket_dir import peer_in_cgroup, peer_pid

_BACKLOG_RETRY_S: Final = 0.005
_ANCESTORS_MAX: Final = 64


async def connect_worker(entry: RunnerEntry, timeout_s: float) -> socket.socket:
    """A connected, checked, non-blocking socket. FalError(UNAVAILABLE): nothing was sent, the request did not run."""
    if entry.port:
        return await _connect_port(entry, timeout_s)
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while True:
        sock = _try_connect(entry)
        if sock is not None:
            return sock
        # The worker's backlog is full; it accepts when its loop comes round.
        if asyncio.get_running_loop().time() >= deadline_s:
            raise _unavailable(entry, f"accepted nothing for {timeout_s:g} s")
        await asyncio.sleep(_BACKLOG_RETRY_S)


async def attach(sock: socket.socket, protocol: asyncio.BufferedProtocol) -> None:
    """Give a socket of `connect_worker` to the loop."""
    loop = asyncio.get_running_loop()
    if sock.family == socket.AF_UNIX:
        await loop.create_unix_connection(lambda: protocol, sock=sock)
    else:
        await loop.create_connection(lambda: protocol, sock=sock)


async def _connect_port(entry: RunnerEntry, timeout_s: float) -> socket.socket:
    # Only an entry without any process is the node's own: one whose process has ended must never lead to the node.
    to = Port(entry.port, entry.pid, entry.pid_ticks)
    try:
        async with asyncio.timeout(timeout_s):
            return await connect(to)
    except TimeoutError:
        raise _unavailable(entry, f"accepted nothing for {timeout_s:g} s") from None
    except OSError as exc:
        raise _unavailable(entry, f"does not answer on port {entry.port}: {exc.strerror}") from None


def _try_connect(entry: RunnerEntry) -> socket.socket | None:
    """None: the backlog is full."""
    try:
        handle = os.open(entry.socket_path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        raise _unavailable(entry, f"has no socket at {entry.socket_path}: {exc.strerror}") from None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if not stat.S_ISSOCK(os.fstat(handle).st_mode):
            raise _unavailable(entry, f"put something else than a socket at {entry.socket_path}")
        sock.connect(f"/proc/self/fd/{handle}")
        _check_peer(entry, peer_pid(sock))
    except BlockingIOError:
        sock.close()
        return None
    except OSError as exc:
        sock.close()
        raise _unavailable(entry, f"does not answer on its socket: {exc.strerror}") from None
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(handle)
    return sock


def _check_peer(entry: RunnerEntry, pid: int) -> None:
    if entry.cgroup and not peer_in_cgroup(pid, entry.cgroup):
        raise _unavailable(entry, f"is answered for by process {pid} of another cgroup")
    if entry.pid and not descends_from(pid, entry.pid):
        raise _unavailable(entry, f"is answered for by process {pid}, which is none of its own")


def descends_from(pid: int, ancestor: int) -> bool:
    """Whether `pid` is `ancestor`, or a child, grandchild … of it that still runs."""
    for _ in range(_ANCESTORS_MAX):
        if pid == ancestor:
            return True
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(status.rpartition(")")[2].split()[1])
        if pid <= 1:
            return False
    return False


def _unavailable(entry: RunnerEntry, why: str) -> FalError:
    return FalError(Code.UNAVAILABLE, f"runner {entry.runner_id} {why}", remedy="Try another runner.")
