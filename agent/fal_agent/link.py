"""The session's transport: one gRPC stream over mutual TLS, to the scheduler that leads.

Implements `session.Link` and its dialer. Every failure is a FalError; nothing is retried here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import grpc.aio

from fal_contract import rpc
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_contract.leader_search import HINTS_MAX, LeaderSearch
from fal_contract.limits import RPC_TIMEOUT_S
from fal_contract.v1 import agent_pb2, agent_pb2_grpc

_ELSEWHERE: Final = frozenset({Code.NOT_LEADER, Code.UNAVAILABLE, Code.TIMEOUT})


class GrpcLink:
    """One Session call. A `send` or `receive` that is cancelled ends it, as gRPC has it."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._channel = channel
        open_call: Any = agent_pb2_grpc.AgentServiceStub(channel).Session  # the stubs want an iterator
        self._call = open_call(metadata=metadata)

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        try:
            await self._call.write(message)
        except asyncio.CancelledError:
            raise self._cut_off() from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as exc:
            raise await self._why(exc) from None

    async def receive(self) -> agent_pb2.SchedulerMessage:
        try:
            message = await self._call.read()
        except asyncio.CancelledError:
            raise self._cut_off() from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as exc:
            raise await self._why(exc) from None
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
            raise await self._why(None)
        result: agent_pb2.SchedulerMessage = message
        return result

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close(None)

    def _cut_off(self) -> BaseException:
        """The caller's own cancellation; or that of the call under it, which gRPC tells in the same way."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return asyncio.CancelledError()
        return FalError(Code.UNAVAILABLE, "the session was cut off", remedy="It is opened again by itself.")

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
    """Dials the leader as far as it is known, else the addresses in turn. `identity` gives the newest certificate."""

    def __init__(self, addresses: Sequence[str], identity: Callable[[], Identity], clock: Clock) -> None:
        self._addresses = tuple(addresses)
        self._search = LeaderSearch(self._addresses)
        self._identity = identity
        self._clock = clock

    async def __call__(self) -> GrpcLink:
        # The call itself connects, so that what TLS refuses is said in its error; the session has a timeout.
        dial = self._search.next()
        return GrpcLink(self._channel(dial.address), dial.metadata)

    def connected(self) -> None:
        """What was dialled last leads."""
        self._search.connected()

    def failed(self, error: FalError) -> bool:
        """What was dialled last does not lead, or no longer; True: there is somewhere to dial at once."""
        return self._search.failed(error)

    async def renew(self, csr_pem: bytes) -> bytes:
        """AgentService.RenewCertificate at the scheduler that leads."""

        async def ask(stub: Any) -> Any:
            return await stub.RenewCertificate(
                agent_pb2.RenewCertificateRequest(csr_pem=csr_pem), timeout=RPC_TIMEOUT_S
            )

        reply = await self._asked("renewed the certificate", ask)
        certificate: bytes = reply.certificate_pem
        return certificate

    async def secrets(self, runner_id: str) -> Mapping[str, bytes]:
        """AgentService.GetSecrets at the scheduler that leads."""

        async def ask(stub: Any) -> Any:
            return await stub.GetSecrets(agent_pb2.GetSecretsRequest(runner_id=runner_id), timeout=RPC_TIMEOUT_S)

        return dict((await self._asked("gave the secrets", ask)).values)

    async def _asked(self, what: str, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        """A call that may be repeated: at the leader, else at each address once and where that points to."""
        first = self._search.dialled
        search = LeaderSearch((first, *(one for one in self._addresses if one != first)))
        tries_left = len(self._addresses) + HINTS_MAX
        while True:
            tries_left -= 1
            try:
                async with self._channel(search.next().address) as channel:
                    with rpc.fal_errors():
                        return await ask(agent_pb2_grpc.AgentServiceStub(channel))
            except FalError as error:
                if error.code not in _ELSEWHERE:
                    raise
                if not search.failed(error) and tries_left <= HINTS_MAX:
                    words = f"no scheduler {what}: {error.what}"
                    raise FalError(Code.UNAVAILABLE, words, remedy="It is asked again.") from None

    @property
    def address(self) -> str:
        """The address dialled last."""
        return self._search.dialled

    def _channel(self, address: str) -> grpc.aio.Channel:
        identity = self._identity()
        identity.check(now_s=self._clock.wall_s())
        return rpc.channel(address, identity)
