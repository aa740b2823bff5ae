"""Tells at once when the process that serves a unix socket ends, whoever started it.

The kernel says who listens (SO_PEERCRED of a connection: the process that called listen) and a pidfd becomes readable
when that process ends. Where there is no pidfd (no Linux, a sandbox that forbids it), only the time limit counts.
Called by fal_agent.supervise.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path
from typing import Final

_CONNECT_TIMEOUT_S: Final = 2.0
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid


async def departed(path: Path, *, within_s: float) -> bool:
    """True as soon as nobody serves `path` any more (at once when nobody did); False when still served after so long.

    Without a pidfd it is False after `within_s`, whatever happened meanwhile: the caller looks for itself then.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + within_s
    try:
        pidfd = await asyncio.to_thread(_pidfd_of, path)
    except (FileNotFoundError, ConnectionRefusedError, ProcessLookupError):
        return True
    except OSError:  # what we may not watch
        pidfd = None
    if pidfd is None:
        await asyncio.sleep(max(until_s - loop.time(), 0.0))
        return False
    ended = asyncio.Event()
    try:
        loop.add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout_at(until_s):
                await ended.wait()
            return True
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(pidfd)
    finally:
        os.close(pidfd)


def _pidfd_of(path: Path) -> int | None:
    """Of the listener; None where the kernel has no such thing. Raises OSError when nobody listens."""
    if not hasattr(os, "pidfd_open") or not hasattr(socket, "SO_PEERCRED"):
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_CONNECT_TIMEOUT_S)
        connection.connect(str(path))
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid: int = _UCRED.unpack(raw)[0]
        return os.pidfd_open(pid) if pid > 0 else None  # 0: a process of another pid namespace


__all__ = ["departed"]
