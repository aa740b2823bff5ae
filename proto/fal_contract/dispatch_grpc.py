"""The Dispatch stream over gRPC. The only part of the serving client that imports grpc."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc.aio

from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_contract.leader_search import LeaderSearch
from fal_contract.rpc import channel, fal_errors
from fal_contract.v1 import serving_pb2, serving_pb2_grpc

_CLOSE_S: Final = 1.0


class GrpcLink:
    """One stream on a channel of its own."""

    def __init__(self, made: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._channel = made
        dispatch: Any = serving_pb2_grpc.ServingStub(made).Dispatch  # the stubs know no stream without an iterator
        self._call = dispatch(metadata=metadata)
        self._reading: asyncio.Future[Any] | None = None
        self._writing: asyncio.Future[None] | None = None

    async def send(self, message: serving_pb2.GatewayMessage) -> None:
        """Raises FalError when the stream broke. Cancelling it leaves the stream open; the message still goes."""
        with fal_errors():
            try:
                await self._written()
                self._writing = asyncio.ensure_future(self._call.write(message))
                await self._written()
            except (grpc.aio.UsageError, asyncio.InvalidStateError):  # it ended meanwhile; reading tells why
                raise _ended() from None

    async def receive(self) -> serving_pb2.DispatchMessage:
        """The next message. Raises FalError at the end. Cancelling it leaves the stream open."""
        with fal_errors():
            message = await self._read()
        if not isinstance(message, serving_pb2.DispatchMessage):  # grpc.aio.EOF
            raise _ended()
        return message

    async def close(self) -> None:
        """End the stream and its channel, once the server has read what was sent."""
        if not self._call.done():
            with contextlib.suppress(
                grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError
            ):
                async with asyncio.timeout(_CLOSE_S):
                    await self._written()
                    await self._call.done_writing()
                    while isinstance(await self._read(), serving_pb2.DispatchMessage):
                        pass
        self._call.cancel()
        pending = [future for future in (self._reading, self._writing) if future is not None]
        await asyncio.gather(*pending, return_exceptions=True)
        await self._channel.close(None)

    async def _written(self) -> None:
        """Once the last message is on its way. A write that is cancelled would end the whole call, as a read would."""
        if self._writing is None:
            return
        try:
            await asyncio.shield(self._writing)
        finally:
            if self._writing.done():
                self._writing = None

    async def _read(self) -> Any:
        """gRPC cancels the whole call with a read that is cancelled, and what was written last would be lost."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        try:
            return await asyncio.shield(self._reading)
        finally:
            if self._reading.done():
                self._reading = None


class GrpcDispatchDialer:
    """Dials the scheduler that leads; `identity` is asked each time, so that renewals count."""

    def __init__(self, addresses: Sequence[str], identity: Callable[[], Identity]) -> None:
        """`addresses`: host:port of every scheduler. Raises INVALID where there is none."""
        self._search = LeaderSearch(addresses)
        self._identity = identity

    async def __call__(self) -> GrpcLink:
        dial = self._search.next()
        return GrpcLink(channel(dial.address, self._identity()), dial.metadata)

    def connected(self) -> None:
        """What was dialled last leads."""
        self._search.connected()

    def failed(self, error: FalError) -> bool:
        """True: there is somewhere to dial at once."""
        return self._search.failed(error)


def _ended() -> FalError:
    return FalError(Code.UNAVAILABLE, "the scheduler ended the stream", remedy="It is tried again.")
