"""A gRPC server that holds agents' sessions open and does nothing: the floor of `footprint`. Prints its port.

`python bare_session_server.py IDENTITY_FILE`; ends when it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio

from fal_contract.identity import Identity
from fal_contract.rpc import SERVER_OPTIONS, bind, server_credentials
from fal_contract.v1 import agent_pb2, agent_pb2_grpc


class Sessions(agent_pb2_grpc.AgentServiceServicer):
    """Answers the first message, then only reads."""

    async def Session(
        self, requests: AsyncIterator[agent_pb2.AgentMessage], context: object
    ) -> AsyncIterator[agent_pb2.SchedulerMessage]:
        yield agent_pb2.SchedulerMessage(welcome=agent_pb2.Welcome(version=1))
        async for _ in requests:
            pass

    async def RenewCertificate(
        self, request: agent_pb2.RenewCertificateRequest, context: object
    ) -> agent_pb2.RenewCertificateReply:
        raise NotImplementedError


async def serve(identity: Path) -> None:
    """Until killed."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Sessions(), server)
    print(bind(server, "127.0.0.1:0", server_credentials(Identity.load(identity))), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
