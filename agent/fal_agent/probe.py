"""Health probes: one HTTP GET over a worker's unix socket, or on a port in its network namespace.

Invariant: a probe is bounded in time and bytes whatever the worker does, and never follows a symbolic link that a
container planted. Called by fal_agent.runner, many times a second on a full node, so it is written on bare streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from fal_runtime.network.reach import Port, connect

_ANSWER_BYTES_MAX: Final = 4096
_REST_S: Final = 1.0  # for the rest of an answer; a server may keep the connection although told to close it
_SHOWN_CHARS_MAX: Final = 200
_NOT_THERE: Final = "the worker's socket is not there yet"


class UnixProber:
    """See fal_agent.ports.Prober."""

    async def ask(self, socket: Path | Port, path: str, timeout_s: float) -> str:
        if isinstance(socket, Path) and not os.path.lexists(socket):
            return _NOT_THERE  # most probes of a runner in set-up: no timer, no exception
        try:
            async with asyncio.timeout(timeout_s):
                return await _get(socket, path)
        except TimeoutError:
            return f"{path} did not answer in {timeout_s:g} s"
        except FileNotFoundError:
            return _NOT_THERE
        except ConnectionRefusedError:
            where = f"port {socket.port}" if isinstance(socket, Port) else "its socket"
            return f"{path}: nothing listens on {where} yet"
        except (OSError, ValueError) as exc:
            return f"{path}: {exc}"


async def _get(socket: Path | Port, path: str) -> str:
    if isinstance(socket, Port):
        reader, writer = await asyncio.open_connection(sock=await connect(socket), limit=_ANSWER_BYTES_MAX)
    elif not stat.S_ISSOCK(socket.lstat().st_mode):
        return f"{socket.name} is not a socket"
    else:
        reader, writer = await asyncio.open_unix_connection(str(socket), limit=_ANSWER_BYTES_MAX)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        if not line.startswith(b"HTTP/1."):
            return f"{path}: the answer is not HTTP"
        status = line.split(b" ", 2)[1]
        rest = await _rest(reader)  # of a good answer, too: a simple server logs a traceback when its body is cut off
        if status == b"200":
            return ""
        body = (b"\r\n" + rest).partition(b"\r\n\r\n")[2].decode(errors="replace").strip()
        return f"{path}: HTTP {status.decode(errors='replace')} {body}"[:_SHOWN_CHARS_MAX].rstrip()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the end of the answer, within bounds."""
    rest = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REST_S):
            while len(rest) < _ANSWER_BYTES_MAX and (more := await reader.read(_ANSWER_BYTES_MAX)):
                rest += more
    return rest
