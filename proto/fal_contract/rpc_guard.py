"""The server side's guard: who calls, may they, and what becomes of errors and of streams of revoked certificates.

One interceptor in front of every method. A method without a row in the role table is refused to everyone. Expected
failures (`FalError`) leave through `rpc.abort`; anything else is logged under an incident id, and the caller learns
the id and nothing more. Every call under way is registered with its peer; `Guard.cut_revoked` ends those whose
certificate has been revoked since (called on each revocation, and by `Guard.run` every two seconds).

Nothing here may block; `is_revoked` is a look-up in memory.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import isasyncgen
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.identity import PeerIdentity, Role, peer_of_pem, require
from fal_contract.limits import REVOCATION_SWEEP_S
from fal_contract.rpc import abort, methods_of
from fal_contract.telemetry import get_logger

if TYPE_CHECKING:  # generic in the stubs only
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.aio.ServerInterceptor

_PEERS_CACHED_MAX: Final = 4096
EVERYONE: Final = frozenset(Role)
STANDARD_METHODS: Final[Mapping[str, Collection[Role]]] = {
    "/grpc.health.v1.Health/Check": EVERYONE,
    "/grpc.health.v1.Health/Watch": EVERYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": EVERYONE - {Role.NODE},
}

_log = get_logger("fal.rpc")
_peer: ContextVar[PeerIdentity] = ContextVar("fal_rpc_peer")


def current_peer() -> PeerIdentity:
    """Who called the method that is being served. Only inside a handler behind a `Guard`."""
    return _peer.get()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call that the guard turned away, for an event."""

    method: str
    code: Code
    peer: str  # `role/name`, or the transport address when the certificate says nothing usable
    message: str


class _Call:
    """One call under way."""

    __slots__ = ("cut", "peer", "task")

    def __init__(self, peer: PeerIdentity, task: asyncio.Task[Any]) -> None:
        self.peer = peer
        self.task = task
        self.cut = False


class Guard(_ServerInterceptor):
    """Pass it in `grpc.aio.server(interceptors=[guard])`.

    `roles` maps full method names to the roles served; `STANDARD_METHODS` is added. `on_refused` must not block.
    """

    def __init__(
        self,
        *,
        cluster_id: str,
        roles: Mapping[str, Collection[Role]],
        clock: Clock,
        is_revoked: Callable[[PeerIdentity], bool] = lambda peer: False,
        on_refused: Callable[[Refusal], None] = lambda refusal: None,
    ) -> None:
        self._cluster_id = cluster_id
        self._roles = {**STANDARD_METHODS, **roles}
        self._clock = clock
        self._is_revoked = is_revoked
        self._on_refused = on_refused
        self._calls: set[_Call] = set()
        self._peers: OrderedDict[bytes, PeerIdentity] = OrderedDict()

    def cut_revoked(self) -> int:
        """End every call whose certificate is revoked by now; returns how many."""
        cut = [call for call in self._calls if not call.cut and self._is_revoked(call.peer)]
        for call in cut:
            call.cut = True
            call.task.cancel()
        return len(cut)

    async def run(self, interval_s: float = REVOCATION_SWEEP_S) -> None:
        """Sweep until cancelled; catches revocations that reached this process by another way."""
        while True:
            await asyncio.sleep(interval_s)
            self.cut_revoked()

    def statistics(self) -> dict[str, int]:
        """Calls under way, in all and by role."""
        by_role: dict[str, int] = {"calls": len(self._calls)}
        for call in self._calls:
            by_role[f"calls_{call.peer.role}"] = by_role.get(f"calls_{call.peer.role}", 0) + 1
        return by_role

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """grpc.aio calls this for each call; returns the method's handler, guarded."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        return self._guarded(handler, str(handler_call_details.method))

    def _guarded(self, handler: Any, method: str) -> Any:
        async def answer_once(request: Any, context: Any) -> Any:
            async with self._call(method, context):
                inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
                return await _resolved(inner(request, context))

        async def answer_many(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._call(method, context):
                inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
                answers = inner(request, context)
                if not isasyncgen(answers):
                    await answers  # it writes through the context itself
                    return
                try:
                    async for answer in answers:
                        yield answer
                finally:
                    await answers.aclose()

        makers = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        make: Any = makers[handler.request_streaming, handler.response_streaming]
        return make(
            answer_many if handler.response_streaming else answer_once,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _call(self, method: str, context: Any) -> AsyncIterator[None]:
        """Around one call: admit, register, map what goes wrong."""
        try:
            peer = self._admit(method, context)
        except FalError as error:
            await abort(context, error)
        task = asyncio.current_task()
        assert task is not None
        call = _Call(peer, task)
        self._calls.add(call)
        _peer.set(peer)
        try:
            try:
                yield
            finally:  # before the caller hears of the end
                self._calls.discard(call)
        except asyncio.CancelledError:
            if not call.cut:
                raise
            task.uncancel()
            await abort(context, self._refuse(method, peer.subject, _revoked(peer)))
        except FalError as error:
            await abort(context, error)
        except (grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception:
            incident = secrets.token_hex(6)
            _log.exception("rpc_failed", method=method, peer=peer.subject, incident=incident)
            await abort(context, _internal(incident))

    def _admit(self, method: str, context: Any) -> PeerIdentity:
        who = context.peer()
        try:
            peer = self._peer_of(context)
            who = peer.subject
            require(peer, cluster_id=self._cluster_id, roles=self._roles.get(method, ()), now_s=self._clock.wall_s())
            if self._is_revoked(peer):
                raise _revoked(peer)
        except FalError as error:
            raise self._refuse(method, who, error) from None
        return peer

    def _peer_of(self, context: Any) -> PeerIdentity:
        pems: Sequence[bytes] = context.auth_context().get("x509_pem_cert") or ()
        if len(pems) != 1:
            raise FalError(Code.UNAUTHENTICATED, "the caller showed no certificate", remedy="Connect with mutual TLS.")
        pem = pems[0]
        cached = self._peers.get(pem)
        if cached is None:
            cached = self._peers[pem] = peer_of_pem(pem)
            if len(self._peers) > _PEERS_CACHED_MAX:
                self._peers.popitem(last=False)
        return cached

    def _refuse(self, method: str, who: str, error: FalError) -> FalError:
        _log.warning("rpc_refused", method=method, peer=who, code=str(error.code), message=error.what)
        self._on_refused(Refusal(method, error.code, who, str(error)))
        return error


def unguarded(services: Collection[Any], roles: Mapping[str, Collection[Role]]) -> frozenset[str]:
    """Methods of the service descriptors that have no row in `roles`; a test says that there are none."""
    return frozenset().union(*map(methods_of, services)) - roles.keys()


async def _resolved(answer: Any) -> Any:
    return await answer if isinstance(answer, Awaitable) else answer


def _revoked(peer: PeerIdentity) -> FalError:
    return FalError(
        Code.UNAUTHENTICATED,
        f"the certificate {peer.serial} of {peer.subject} was revoked",
        remedy="Join again with a new token, or ask an admin why.",
    )


def _internal(incident: str) -> FalError:
    return FalError(
        Code.INTERNAL,
        f"an unexpected error happened (incident {incident})",
        remedy="The server's log has the incident.",
    )
