"""The cache's one stream to the scheduler: dial, tell everything, then listen and report. The agent's rules.

Invariants: a session begins with CacheHello and ends with the first error; the next one starts over, so nothing said in
an old one needs to be remembered; without a scheduler everything under way goes on. Changes leave at once, progress at
most once a second (`CacheSide.take` decides what is in a report). Called by fal_fsd.node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, Protocol

import grpc.aio

from fal_contract import rpc
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_contract.leader_search import LeaderSearch, pause_max_s
from fal_contract.limits import RECONNECT_CAP_S, REPORT_WINDOW_S, RPC_TIMEOUT_S
from fal_contract.telemetry import get_logger
from fal_contract.v1 import state_pb2, weights_pb2, weights_pb2_grpc
from fal_contract.versions import agree

_SETTLED_AFTER_S: Final = 10.0  # a session that lasted so long begins the backoff anew
_REFUSED_CAP_S: Final = 60.0  # revoked or foreign: trying often helps nobody
_REFUSED: Final = frozenset({Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.VERSION_MISMATCH})
_log = get_logger("fsd.link")


class CacheSide(Protocol):
    """What the stream talks for. All on the event loop."""

    @property
    def waiting(self) -> asyncio.Event:
        """Set when `take` has something that should leave; `take` clears it."""
        ...

    async def hello(self) -> weights_pb2.CacheHello: ...

    def welcome(self, message: weights_pb2.CacheWelcome) -> None: ...

    async def take(self) -> Sequence[weights_pb2.CacheUp]:
        """What is to be told now, oldest first; it counts as told."""
        ...

    async def down(self, message: weights_pb2.CacheDown) -> None:
        """Everything but the first welcome. Must not raise for what one message says."""
        ...

    def disconnected(self) -> None: ...


class Link:
    """Keeps a stream for as long as `run` runs, to the scheduler that leads."""

    def __init__(
        self,
        addresses: Sequence[str],
        identity: Callable[[], Identity],
        side: CacheSide,
        *,
        clock: Clock,
        rng: Random,
    ) -> None:
        self._search = LeaderSearch(addresses)
        self._identity = identity
        self._side = side
        self._clock = clock
        self._rng = rng
        self._channel: grpc.aio.Channel | None = None
        self.connected = False

    async def run(self) -> None:
        """Until cancelled: one session after the other, full-jitter backoff between them."""
        loop, attempt = asyncio.get_running_loop(), 0
        while True:
            began_s = loop.time()
            error: Exception
            try:
                await self._once()
            except FalError as exc:
                error = exc
            except Exception as exc:  # a mistake of ours or a full disk must not cut this node off for good
                _log.exception("session_failed", scheduler=self._address)
                error = exc
            else:
                continue  # it never returns
            if self.connected:
                self.connected = False
                self._side.disconnected()
            _log.info("disconnected", scheduler=self._address, error=str(error))
            attempt = 0 if loop.time() - began_s > _SETTLED_AFTER_S else attempt + 1
            refused = isinstance(error, FalError) and error.code in _REFUSED
            cap_s = _REFUSED_CAP_S if refused else RECONNECT_CAP_S
            await asyncio.sleep(self._rng.uniform(0, pause_max_s(self._search, error, attempt, cap_s=cap_s)))

    async def manifest(self, id_: str) -> state_pb2.ModelManifest:
        """GetManifest over the channel that stands. UNAVAILABLE without one, NOT_FOUND …"""
        if self._channel is None:
            raise FalError(Code.UNAVAILABLE, "the scheduler is away", remedy="It is asked again once it is back.")
        with rpc.fal_errors():
            stub = weights_pb2_grpc.CacheServiceStub(self._channel)
            return await stub.GetManifest(weights_pb2.GetManifestRequest(id=id_), timeout=RPC_TIMEOUT_S)

    @property
    def _address(self) -> str:
        return self._search.dialled

    async def _once(self) -> None:
        """One session; always ends with a FalError."""
        identity = self._identity()
        identity.check(now_s=self._clock.wall_s())
        dial = self._search.next()
        self._channel = channel = rpc.channel(dial.address, identity)
        try:
            session: Any = weights_pb2_grpc.CacheServiceStub(channel).Session  # the stubs want an iterator
            call = session(metadata=dial.metadata)
            try:
                await self._talk(call)
            finally:
                call.cancel()
        finally:
            self._channel = None
            await channel.close(None)

    async def _talk(self, call: Any) -> None:
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                await _send(call, weights_pb2.CacheUp(hello=await self._side.hello()))
                first = await _receive(call)
        except TimeoutError:
            raise FalError(
                Code.TIMEOUT, f"the scheduler did not answer in {RPC_TIMEOUT_S:g} s", remedy="It is tried again."
            ) from None
        if first.WhichOneof("kind") != "welcome":
            raise FalError(Code.INVALID, "the scheduler did not begin with a welcome", remedy="Upgrade it.")
        agree("the scheduler", first.welcome.version, first.welcome.version)
        self.connected = True
        self._search.connected()
        self._side.welcome(first.welcome)
        _log.info("connected", scheduler=self._address)
        jobs = [
            asyncio.create_task(self._listen(call), name="listen"),
            asyncio.create_task(self._report(call), name="report"),
        ]
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                job.result()  # raises: neither returns
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def _listen(self, call: Any) -> None:
        while True:
            await self._side.down(await _receive(call))

    async def _report(self, call: Any) -> None:
        while True:
            await self._side.waiting.wait()
            for message in await self._side.take():
                await _send(call, message)
            await asyncio.sleep(REPORT_WINDOW_S)


async def _send(call: Any, message: weights_pb2.CacheUp) -> None:
    try:
        await call.write(message)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as exc:
        raise await _why(call, exc) from None


async def _receive(call: Any) -> weights_pb2.CacheDown:
    try:
        message = await call.read()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as exc:
        raise await _why(call, exc) from None
    if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
        raise await _why(call, None)
    result: weights_pb2.CacheDown = message
    return result


async def _why(call: Any, exc: BaseException | None) -> FalError:
    """What ended the call: the server's error if it sent one."""
    if isinstance(exc, grpc.aio.AioRpcError):
        return rpc.to_fal_error(exc)
    with contextlib.suppress(asyncio.CancelledError):
        if call.done() and await call.code() is not grpc.StatusCode.OK:
            error = grpc.aio.AioRpcError(
                await call.code(),
                await call.initial_metadata(),
                await call.trailing_metadata(),
                details=await call.details(),
                debug_error_string="",
            )
            return rpc.to_fal_error(error)
    return FalError(Code.UNAVAILABLE, "the scheduler ended the session", remedy="It is opened again by itself.")


__all__ = ["CacheSide", "Link"]
