"""The proxy's side of the control protocol: a unix socket of mode 0600.

Any number of controllers may connect; each gets stats when they change (the first change at once, then at most one
message per 100 ms). A controller that does not read is cut. Requests are handled in order, one connection each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from fal_agent.proxy.messages import (
    CONTROL_VERSION,
    GatewayEntry,
    ProxyInfo,
    ProxyStats,
    RunnerEntry,
    encode,
    error_to_wire,
    gateway_from_wire,
    info_to_wire,
    read_frame,
    revoked_from_wire,
    runner_from_wire,
    runner_to_wire,
    stats_to_wire,
    take,
)
from fal_contract.errors import Code, FalError, not_found
from fal_contract.limits import REPORT_WINDOW_S
from fal_contract.revocation import RevokedPeer
from fal_contract.telemetry import get_logger

HELLO_TIMEOUT_S: Final = 5.0
_UNREAD_BYTES_MAX: Final = 1 << 20
_CONTROLLERS_MAX: Final = 16
_log = get_logger("proxy.control")

Successor = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int, Mapping[str, Any]], Awaitable[None]]


class Controlled(Protocol):
    """What the control socket steers; `server.ProxyServer`. Methods raise FalError."""

    def info(self) -> ProxyInfo: ...
    def stats(self) -> ProxyStats: ...
    def runners(self) -> tuple[RunnerEntry, ...]: ...
    def put_runner(self, entry: RunnerEntry) -> None: ...
    def drain_runner(self, runner_id: str) -> bool: ...
    def remove_runner(self, runner_id: str) -> bool: ...
    def set_term(self, term: int) -> None: ...
    def set_gateways(self, gateways: list[GatewayEntry]) -> None: ...
    def set_revoked(self, peers: list[RevokedPeer]) -> None: ...
    async def reload_identity(self) -> None: ...
    def stop(self) -> None: ...


class ControlServer:
    """Listens on a unix socket."""

    def __init__(self, path: Path, controlled: Controlled, *, on_successor: Successor) -> None:
        self._path = path
        self._controlled = controlled
        self._on_successor = on_successor
        self._server: asyncio.Server | None = None
        self._writers: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._successors: set[asyncio.Task[None]] = set()
        self._push: asyncio.TimerHandle | None = None
        self._pushed_s = -REPORT_WINDOW_S

    async def start(self) -> None:
        """Bind beside the path and rename, so that the name always leads to somebody who answers.

        Again: takes the name back, keeps the connections.
        """
        if self._server is not None:
            self._server.close()
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        scratch.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(str(scratch))
            scratch.chmod(0o600)
            self._server = await asyncio.start_unix_server(self._serve, sock=sock)
            scratch.rename(self._path)
        except OSError as exc:
            sock.close()
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"cannot make the control socket {self._path}: {exc.strerror or exc}",
                remedy="Give a writable folder and a path of less than 90 bytes.",
                field="control",
            ) from None

    def changed(self) -> None:
        """Push stats soon."""
        if self._push is None and self._writers:
            loop = asyncio.get_running_loop()
            delay_s = max(0.0, self._pushed_s + REPORT_WINDOW_S - loop.time())
            self._push = loop.call_later(delay_s, self._push_now)

    async def close(self, *, successor: bool) -> None:
        """Cut all controllers, and the `successor` if wanted. The socket's name stays: it may be another's by now."""
        if self._push is not None:
            self._push.cancel()
            self._push = None
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = [*self._writers.values(), *(self._successors if successor else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _push_now(self) -> None:
        self._push = None
        self._pushed_s = asyncio.get_running_loop().time()
        frame = encode({"t": "stats", **stats_to_wire(self._controlled.stats())})
        for writer in list(self._writers):
            if writer.transport.get_write_buffer_size() > _UNREAD_BYTES_MAX:
                _log.warning("a controller does not read; cut")
                writer.transport.abort()
            else:
                writer.write(frame)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            role = await self._greet(reader, writer)
            if role == "successor":
                self._successors.add(task)
            else:
                self._writers[writer] = task
                self.changed()
            while True:
                message = await read_frame(reader)
                await self._answer(reader, writer, message)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass
        except FalError as error:
            _log.warning("controller refused", why=str(error))
            with contextlib.suppress(OSError):
                writer.write(encode(error_to_wire(error, 0)))
        except asyncio.CancelledError:
            pass  # closed by us
        finally:
            self._writers.pop(writer, None)
            self._successors.discard(task)
            if task.cancelling():
                writer.transport.abort()
            else:
                writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            hello = await read_frame(reader)
        if hello["t"] != "hello":
            raise FalError(Code.INVALID, "the first message is not hello", remedy="The peer is no fal process.")
        low, high = take(hello, "min", int), take(hello, "max", int)
        if not low <= CONTROL_VERSION <= high:
            raise FalError(
                Code.VERSION_MISMATCH,
                f"the controller speaks versions {low} to {high}, this proxy {CONTROL_VERSION}",
                remedy="Upgrade the older of agent and proxy.",
            )
        if len(self._writers) >= _CONTROLLERS_MAX:
            raise FalError(Code.BUSY, f"{_CONTROLLERS_MAX} controllers are connected", remedy="Close some.")
        writer.write(encode(info_to_wire(self._controlled.info())))
        return take(hello, "role", str, default="agent")

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: Mapping[str, Any]
    ) -> None:
        request_id = take(message, "id", int)
        try:
            if message["t"] == "takeover":
                await self._on_successor(reader, writer, request_id, message)
                return
            result = await self._handle(message)
        except FalError as error:
            writer.write(encode(error_to_wire(error, request_id)))
        else:
            writer.write(encode({"t": "ok", "id": request_id, **result}))

    async def _handle(self, message: Mapping[str, Any]) -> dict[str, object]:
        proxy = self._controlled
        match message["t"]:
            case "put_runner":
                proxy.put_runner(runner_from_wire(message))
            case "drain_runner" | "remove_runner" as kind:
                runner_id = take(message, "runner", str)
                known = proxy.drain_runner(runner_id) if kind == "drain_runner" else proxy.remove_runner(runner_id)
                if not known and kind == "drain_runner":
                    raise not_found("runner", runner_id, remedy="Put it first.")
            case "set_term":
                proxy.set_term(take(message, "term", int))
            case "set_gateways":
                proxy.set_gateways([gateway_from_wire(raw) for raw in take(message, "gateways", list)])
            case "set_revoked":
                proxy.set_revoked([revoked_from_wire(raw) for raw in take(message, "revoked", list)])
            case "reload_identity":
                await proxy.reload_identity()
            case "runners":
                return {"runners": [runner_to_wire(entry) for entry in proxy.runners()]}
            case "stats":
                return stats_to_wire(proxy.stats())
            case "stop":
                proxy.stop()
            case kind:
                raise FalError(Code.INVALID, f"the proxy knows no {kind!r}", remedy="Upgrade the proxy.")
        return {}
