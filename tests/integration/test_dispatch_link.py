"""The Dispatch stream over gRPC: what its client wrote arrives, whoever was cancelled meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from fal_contract.dispatch_grpc import GrpcLink
from fal_contract.errors import Code, FalError
from fal_contract.v1 import serving_pb2, serving_pb2_grpc

LONG = 3 << 20  # bytes
LONG_MAX = 30  # so many are certainly more than flow control lets out before the server reads


class Server(serving_pb2_grpc.ServingServicer):
    """Reads nothing until `read` is set; `ended` once the client has closed its side."""

    def __init__(self) -> None:
        self.read = asyncio.Event()
        self.ended = asyncio.Event()
        self.heard: list[str] = []

    async def Dispatch(self, request_iterator: AsyncIterator[serving_pb2.GatewayMessage], context: object) -> None:
        await self.read.wait()
        async for message in request_iterator:
            self.heard.append(message.hello.gateway_id[:8])
        self.ended.set()


def hello(name: str, length: int = 0) -> serving_pb2.GatewayMessage:
    return serving_pb2.GatewayMessage(hello=serving_pb2.GatewayHello(gateway_id=name.ljust(length, ".")))


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Server, GrpcLink]]:
    served, server = Server(), grpc.aio.server()
    serving_pb2_grpc.add_ServingServicer_to_server(served, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = GrpcLink(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
    try:
        async with asyncio.timeout(30):
            yield served, link
    finally:
        await link.close()
        await server.stop(0)


def test_a_cancelled_send_leaves_the_stream_and_what_comes_after_it() -> None:
    async def scenario() -> None:
        async with connected() as (server, link):
            await link.send(hello("first"))
            long = 0
            done: set[asyncio.Task[None]] = {asyncio.create_task(asyncio.sleep(0))}
            while done and long < LONG_MAX:
                long += 1
                sending = asyncio.create_task(link.send(hello("long", LONG)))
                done, _ = await asyncio.wait({sending}, timeout=0.5)
            assert not done, "none waits for the server, who does not read"
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            server.read.set()
            await link.send(hello("last"))
            await link.close()
            await server.ended.wait()
            assert server.heard == ["first", *["long...."] * long, "last"]

    asyncio.run(scenario())


def test_a_stream_that_has_ended_says_so() -> None:
    async def scenario() -> None:
        async with connected() as (server, link):
            await link.send(hello("first"))
            server.read.set()
            await link.close()
            with pytest.raises(FalError) as refused:
                await link.send(hello("late"))
            assert refused.value.code is Code.UNAVAILABLE

    asyncio.run(scenario())
