"""The agent's word to a worker: which models it has loaded, load one, let one go. HTTP over its socket or port.

Invariants: bounded in time and bytes whatever the worker does; never follows a link that a container planted. The
header `x-fal-control` is what tells the agent's word from a request's: the proxy takes it out of all that passes.
Called by fal_agent.residents.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import Code, FalError
from fal_runtime.network.reach import Port, connect

Address = Path | Port

ANSWER_BYTES_MAX: Final = 64 << 10
_WHAT_CHARS_MAX: Final = 400


async def ask(address: Address, path: str, body: Mapping[str, object] | None, timeout_s: float) -> Mapping[str, Any]:
    """What the worker answered with 200; GET without a body. Raises UNAVAILABLE, TIMEOUT, or what the worker says."""
    try:
        async with asyncio.timeout(timeout_s):
            status, answer = await _exchange(address, path, body)
    except TimeoutError:
        what = f"the worker did not answer {path} in {timeout_s:g} s"
        raise FalError(Code.TIMEOUT, what, remedy="Look at the runner's log.") from None
    except (OSError, ValueError) as exc:
        what = f"the worker cannot be asked for {path}: {exc}"
        raise FalError(Code.UNAVAILABLE, what, remedy="It is tried again.") from None
    if status == 200:
        return answer
    raise _error(path, status, answer)


async def _exchange(address: Address, path: str, body: Mapping[str, object] | None) -> tuple[int, Mapping[str, Any]]:
    if isinstance(address, Port):
        reader, writer = await asyncio.open_connection(sock=await connect(address), limit=ANSWER_BYTES_MAX)
    elif not stat.S_ISSOCK(address.lstat().st_mode):
        raise ValueError(f"{address.name} is not a socket")
    else:
        reader, writer = await asyncio.open_unix_connection(str(address), limit=ANSWER_BYTES_MAX)
    try:
        payload = json.dumps(body).encode() if body is not None else b""
        head = [f"{'POST' if body is not None else 'GET'} {path} HTTP/1.1", "host: worker", "connection: close"]
        head += ["x-fal-control: 1", "content-type: application/json", f"content-length: {len(payload)}"]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + payload)
        line = await reader.readline()
        if not line.startswith(b"HTTP/1."):
            raise ValueError("the answer is not HTTP")
        status, rest = int(line.split(b" ", 2)[1]), b""
        while len(rest) < ANSWER_BYTES_MAX and (more := await reader.read(ANSWER_BYTES_MAX)):
            rest += more
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    head_, _, content = (b"\r\n" + rest).partition(b"\r\n\r\n")
    if b"transfer-encoding:" in head_.lower():
        raise ValueError("the answer is in pieces")
    try:
        answer = json.loads(content) if content else {}
    except ValueError:
        answer = {}
    return status, answer if isinstance(answer, dict) else {}


def _error(path: str, status: int, answer: Mapping[str, Any]) -> FalError:
    given = answer.get("error")
    error: Mapping[str, Any] = given if isinstance(given, dict) else {}
    code = str(error.get("code", ""))
    what = str(error.get("what", ""))[:_WHAT_CHARS_MAX] or f"the worker answered {path} with {status}"
    remedy = "Look at the runner's log."
    return FalError(Code(code) if code in set(Code) else Code.RUNNER_FAILED, what, remedy=remedy)


__all__ = ["ANSWER_BYTES_MAX", "ask"]
