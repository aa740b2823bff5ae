"""The agent's link over a real call: what a cancelled call looks like from inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from fal_agent.link import GrpcLink
from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2, agent_pb2_grpc


class _Silent(agent_pb2_grpc.AgentServiceServicer):
    """Welcomes, and says nothing more."""

    async def Session(self, requests: AsyncIterator[agent_pb2.AgentMessage], context: Any) -> AsyncIterator[Any]:
        async for _ in requests:
            yield agent_pb2.SchedulerMessage(welcome=agent_pb2.Welcome(version=1))


@asynccontextmanager
async def _opened() -> AsyncIterator[GrpcLink]:
    server = grpc.aio.server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(_Silent(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = GrpcLink(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
    try:
        await link.send(agent_pb2.AgentMessage(seq=1))
        assert (await link.receive()).HasField("welcome")
        yield link
    finally:
        await link.close()
        await server.stop(None)


def test_a_call_that_ends_under_its_reader_is_an_error_and_no_cancellation() -> None:
    async def main() -> None:
        async with _opened() as link:
            reading = asyncio.create_task(link.receive())
            await asyncio.sleep(0)  # it reads
            link._call.cancel()
            with pytest.raises(FalError) as caught:
                await reading
            assert caught.value.code is Code.UNAVAILABLE
            with pytest.raises(FalError):
                await link.send(agent_pb2.AgentMessage(seq=2))

    asyncio.run(main())


def test_a_reader_that_is_cancelled_is_cancelled() -> None:
    async def main() -> None:
        async with _opened() as link:
            reading = asyncio.create_task(link.receive())
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(main())
