"""The session's transport: one gRPC stream over mutual TLS, to the next address of the list.

Implements `session.Link` and its dialer. Every failure is a FalError; nothing is retried here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import grpc.aio

from fal_contract import rpc
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_contract.limits import RPC_TIMEOUT_S
from fal_contract.v1 import agent_pb2, agent_pb2_grpc

_ELSEWHERE: Final = frozenset({Code.NOT_LEADER, Code.UNAVAILABLE, Code.TIMEOUT})


class GrpcLink:
    """One Session call."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        open_call: Any = agent_pb2_grpc.AgentServiceStub(channel).Session  # the stubs want an iterator
        self._call = open_call()

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as exc:
            raise await self._why(exc) from None

    async def receive(self) -> agent_pb2.SchedulerMessage:
        try:
            message = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as exc:
            raise await self._why(exc) from None
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
            raise await self._why(None)
        result: agent_pb2.SchedulerMessage = message
        return result

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close(None)

    async def _why(self, exc: BaseException | None) -> FalError:
        """What ended the call: the server's error if it sent one."""
        if isinstance(exc, grpc.aio.AioRpcError):
            return rpc.to_fal_error(exc)
        if self._call.done() and await self._call.code() is not grpc.StatusCode.OK:
            error = grpc.aio.AioRpcError(
                await self._call.code(),
                await self._call.initial_metadata(),
                await self._call.trailing_metadata(),
                details=await self._call.details(),
                debug_error_string="",
            )
            return rpc.to_fal_error(error)
        return FalError(Code.UNAVAILABLE, "the scheduler ended the session", remedy="It is opened again by itself.")


class GrpcDialer:
    """Dials the addresses in turn. `identity` gives the newest certificate."""

    def __init__(self, addresses: Sequence[str], identity: Callable[[], Identity], clock: Clock) -> None:
        self._addresses = tuple(addresses)
        self._identity = identity
        self._clock = clock
        self._next = 0

    async def __call__(self) -> GrpcLink:
        # The call itself connects, so that what TLS refuses is said in its error; the session has a timeout.
        return GrpcLink(self._channel())

    async def renew(self, csr_pem: bytes) -> bytes:
        """AgentService.RenewCertificate at the next address."""
        async with self._channel() as channel:
            with rpc.fal_errors():
                reply = await agent_pb2_grpc.AgentServiceStub(channel).RenewCertificate(
                    agent_pb2.RenewCertificateRequest(csr_pem=csr_pem), timeout=RPC_TIMEOUT_S
                )
        return reply.certificate_pem

    async def secrets(self, runner_id: str) -> Mapping[str, bytes]:
        """AgentService.GetSecrets at the scheduler that leads: all addresses are tried once."""
        for last in range(len(self._addresses) - 1, -1, -1):
            try:
                async with self._channel() as channel:
                    with rpc.fal_errors():
                        reply = await agent_pb2_grpc.AgentServiceStub(channel).GetSecrets(
                            agent_pb2.GetSecretsRequest(runner_id=runner_id), timeout=RPC_TIMEOUT_S
                        )
                return dict(reply.values)
            except FalError as error:
                if error.code not in _ELSEWHERE:
                    raise
                if not last:
                    what = f"no scheduler gave the secrets: {error.what}"
                    raise FalError(Code.UNAVAILABLE, what, remedy="It is asked again.") from None
        raise AssertionError("there is at least one address")

    @property
    def address(self) -> str:
        """The address dialled last."""
        return self._addresses[(self._next - 1) % len(self._addresses)]

    def _channel(self) -> grpc.aio.Channel:
        identity = self._identity()
        identity.check(now_s=self._clock.wall_s())
        self._next += 1
        return rpc.channel(self.address, identity)
