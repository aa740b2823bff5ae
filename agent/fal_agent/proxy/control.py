"""The agent's side of the control protocol of fal-proxy.

    control = await ProxyControl.connect(path, on_stats=seen)
    await control.put_runner(RunnerEntry(…))

One connection; requests are answered in any order; `on_stats` is called on the loop for every push. The proxy keeps
serving when this connection breaks: the agent connects again and tells everything again, all calls are idempotent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from fal_agent.proxy.messages import (
    CONTROL_VERSION,
    GatewayEntry,
    ProxyInfo,
    ProxyStats,
    RunnerEntry,
    encode,
    error_from_wire,
    gateway_to_wire,
    info_from_wire,
    read_frame,
    revoked_to_wire,
    runner_from_wire,
    runner_to_wire,
    stats_from_wire,
)
from fal_contract.errors import Code, FalError
from fal_contract.revocation import RevokedPeer

CALL_TIMEOUT_S: Final = 5.0


class ProxyControl:
    """A live control connection. Every method raises FalError: UNAVAILABLE, TIMEOUT, or what the proxy says."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: ProxyInfo,
        on_stats: Callable[[ProxyStats], None],
    ) -> None:
        """Use `connect`."""
        self.info = info
        self._writer = writer
        self._on_stats = on_stats
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._closed = asyncio.Event()
        self._task = asyncio.create_task(self._read(reader), name="proxy-control")

    @classmethod
    async def connect(
        cls, socket_path: Path, *, on_stats: Callable[[ProxyStats], None], timeout_s: float = CALL_TIMEOUT_S
    ) -> ProxyControl:
        """Connect and say hello. FalError(UNAVAILABLE) when no proxy answers."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(str(socket_path))
                try:
                    info = await _greet(reader, writer)
                except BaseException:
                    writer.close()
                    raise
        except (OSError, asyncio.IncompleteReadError) as exc:
            raise FalError(
                Code.UNAVAILABLE, f"no proxy answers at {socket_path}: {exc}", remedy="Start fal-proxy."
            ) from None
        return cls(reader, writer, info, on_stats)

    async def put_runner(self, entry: RunnerEntry) -> None:
        """Make a runner routable, or change it. Requests under way are not touched."""
        await self._call("put_runner", runner_to_wire(entry))

    async def drain_runner(self, runner_id: str) -> None:
        """Take no new requests; those under way go on. NOT_FOUND when it is unknown."""
        await self._call("drain_runner", {"runner": runner_id})

    async def remove_runner(self, runner_id: str) -> None:
        """Forget a runner; requests under way go on until its worker ends."""
        await self._call("remove_runner", {"runner": runner_id})

    async def set_term(self, term: int) -> None:
        """Tell the leader's term; tickets older than this one and the one before are refused. Never goes back."""
        await self._call("set_term", {"term": term})

    async def set_gateways(self, gateways: Sequence[GatewayEntry]) -> None:
        """The gateways that want tunnels, all of them."""
        await self._call("set_gateways", {"gateways": [gateway_to_wire(gateway) for gateway in gateways]})

    async def set_revoked(self, peers: Sequence[RevokedPeer]) -> None:
        """Callers' certificates that are refused, all of them; connections open with them end."""
        await self._call("set_revoked", {"revoked": [revoked_to_wire(peer) for peer in peers]})

    async def reload_identity(self) -> None:
        """Read the node's certificate again; new connections use it."""
        await self._call("reload_identity", {})

    async def runners(self) -> tuple[RunnerEntry, ...]:
        """What the proxy serves now; after its restart, what its state file held."""
        answer = await self._call("runners", {})
        return tuple(runner_from_wire(raw) for raw in answer["runners"])

    async def stats(self) -> ProxyStats:
        """The counters now."""
        return stats_from_wire(await self._call("stats", {}))

    async def stop(self) -> None:
        """End the proxy: listeners close, requests under way finish, then the process exits."""
        await self._call("stop", {})

    async def wait_closed(self) -> None:
        """Until the connection ended, from either side."""
        await self._closed.wait()

    @property
    def closed(self) -> bool:
        """The connection ended."""
        return self._closed.is_set()

    async def close(self) -> None:
        """Let go; the proxy goes on."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._end()  # a task that was cancelled before it began has no finally
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _call(self, kind: str, fields: dict[str, object]) -> dict[str, Any]:
        if self.closed:
            raise _gone()
        request_id = next(self._ids)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answer
        try:
            self._writer.write(encode({"t": kind, "id": request_id, **fields}))
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise FalError(
                Code.TIMEOUT, f"the proxy did not answer {kind} in {CALL_TIMEOUT_S:g} s", remedy="Look at its log."
            ) from None
        finally:
            del self._waiting[request_id]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await read_frame(reader)
                if message["t"] == "stats" and "id" not in message:
                    self._on_stats(stats_from_wire(message))
                    continue
                answer = self._waiting.get(message.get("id", 0))
                if answer is None or answer.done():
                    continue
                if message["t"] == "error":
                    answer.set_exception(error_from_wire(message))
                else:
                    answer.set_result(message)
        except (OSError, asyncio.IncompleteReadError, FalError):
            pass  # the proxy is gone, or is none
        finally:
            self._end()

    def _end(self) -> None:
        self._closed.set()
        self._writer.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_gone())


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> ProxyInfo:
    writer.write(encode({"t": "hello", "min": CONTROL_VERSION, "max": CONTROL_VERSION, "role": "agent"}))
    message = await read_frame(reader)
    if message["t"] == "error":
        raise error_from_wire(message)
    return info_from_wire(message)


def _gone() -> FalError:
    return FalError(Code.UNAVAILABLE, "the connection to the proxy broke", remedy="Connect again.")
