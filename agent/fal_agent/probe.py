"""Health probes: one HTTP GET over a worker's unix socket.

Invariant: a probe is bounded in time and bytes whatever the worker does, and never follows a symbolic link that a
container planted. Called by fal_agent.runner, many times a second on a full node, so it is written on bare streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import stat
from pathlib import Path
from typing import Final

_ANSWER_BYTES_MAX: Final = 4096
_SHOWN_CHARS_MAX: Final = 200


class UnixProber:
    """See fal_agent.ports.Prober."""

    async def ask(self, socket: Path, path: str, timeout_s: float) -> str:
        try:
            async with asyncio.timeout(timeout_s):
                return await _get(socket, path)
        except TimeoutError:
            return f"{path} did not answer in {timeout_s:g} s"
        except FileNotFoundError:
            return "the worker's socket is not there yet"
        except (OSError, ValueError) as exc:
            return f"{path}: {exc}"


async def _get(socket: Path, path: str) -> str:
    if not stat.S_ISSOCK(socket.lstat().st_mode):
        return f"{socket.name} is not a socket"
    reader, writer = await asyncio.open_unix_connection(str(socket), limit=_ANSWER_BYTES_MAX)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        if not line.startswith(b"HTTP/1."):
            return f"{path}: the answer is not HTTP"
        status = line.split(b" ", 2)[1]
        if status == b"200":
            return ""
        rest = await reader.read(_ANSWER_BYTES_MAX)
        body = rest.partition(b"\r\n\r\n")[2].decode(errors="replace").strip()
        return f"{path}: HTTP {status.decode(errors='replace')} {body}"[:_SHOWN_CHARS_MAX].rstrip()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
