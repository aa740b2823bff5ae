"""The join listener: HTTPS of its own, where a machine with a token becomes a node.

It has a port of its own because its callers have no certificate yet, and one gRPC port cannot serve both. It is the
only listener that strangers reach, so everything has a bound: connections and their life, body, attempts per address
and joins at once. The redemption is durable before the certificate leaves (`Joiner.redeem` returns after the commit).
Every refusal is told to `on_refused`, which must not block.
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from aiohttp import web
from pydantic import ValidationError

from fal_contract.clock import Clock
from fal_contract.config import pydantic_error
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, Role
from fal_contract.join_wire import BODY_BYTES_MAX, CA_PATH, HTTP_STATUS, JOIN_PATH, JoinReply, JoinRequest, error_body
from fal_contract.limits import JOIN_ATTEMPTS_PER_MINUTE_MAX, JOIN_TIMEOUT_S
from fal_contract.telemetry import get_logger
from fal_contract.tls import anonymous_server_context, replace_certificate
from fal_scheduler.ca import CertificateAuthority, check_csr

_CONNECTIONS_MAX: Final = 256
_CONNECTION_LIFE_S: Final = 2 * JOIN_TIMEOUT_S
_HANDSHAKE_TIMEOUT_S: Final = 10.0
_JOINS_MAX: Final = 32
_ADDRESSES_MAX: Final = 10_000
_WINDOW_S: Final = 60.0

_log = get_logger("fal.join")


@dataclass(frozen=True, slots=True)
class NodeGrant:
    """What a redeemed token gives."""

    node_id: str
    pool: str


class Joiner(Protocol):
    """The engine's side of a join."""

    async def redeem(self, token_id: str, secret: str, node_name: str, now_s: float) -> NodeGrant:
        """Spend one use and make the node, durably; return after the commit. Raises FalError to refuse."""
        ...


@dataclass(frozen=True, slots=True)
class JoinRefusal:
    """A join that was turned away, for an event."""

    address: str
    token_id: str
    node_name: str
    code: Code
    message: str


class AttemptLimit:
    """At most so many attempts per address and minute; remembers a bounded number of addresses."""

    def __init__(self, attempts_max: int = JOIN_ATTEMPTS_PER_MINUTE_MAX, addresses_max: int = _ADDRESSES_MAX) -> None:
        self._attempts_max = attempts_max
        self._addresses_max = addresses_max
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def admit(self, address: str, *, now_s: float) -> None:
        """Count one attempt at monotonic `now_s`; raises BUSY beyond the limit."""
        begun_s, attempts = self._windows.pop(address, (now_s, 0))
        if now_s - begun_s >= _WINDOW_S:
            begun_s, attempts = now_s, 0
        self._windows[address] = (begun_s, attempts + 1)
        if len(self._windows) > self._addresses_max:
            self._windows.popitem(last=False)
        if attempts >= self._attempts_max:
            raise FalError(
                Code.BUSY,
                f"more than {self._attempts_max} attempts to join from {address} in a minute",
                remedy=f"Try again in {max(1, round(begun_s + _WINDOW_S - now_s))} s.",
            )


class JoinServer:
    """Serves `/v1/ca` and `/v1/join`. `identity` gives the certificate to show (see `ca.OwnIdentity.current`)."""

    def __init__(
        self,
        *,
        ca: CertificateAuthority,
        identity: Callable[[], Identity],
        joiner: Joiner,
        clock: Clock,
        on_refused: Callable[[JoinRefusal], None] = lambda refusal: None,
        connections_max: int = _CONNECTIONS_MAX,
        connection_life_s: float = _CONNECTION_LIFE_S,
    ) -> None:
        self._ca = ca
        self._identity = identity
        self._joiner = joiner
        self._clock = clock
        self._on_refused = on_refused
        self._limit = AttemptLimit()
        self._joins = 0
        self._connections = _Connections(connections_max, connection_life_s)
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (useful with 0). Raises FalError(UNAVAILABLE) when it is taken."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_get(CA_PATH, self._serve_ca)
        app.router.add_post(JOIN_PATH, self._serve_join)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=5.0, handle_signals=False)
        await runner.setup()
        shown = self._identity()
        context = anonymous_server_context(shown)

        def accept() -> asyncio.Protocol:
            nonlocal shown
            latest = self._identity()
            if latest is not shown:  # renewed; handshakes from now on show it
                replace_certificate(context, latest)
                shown = latest
            assert runner.server is not None
            return _Connection(runner.server(), self._connections)

        try:
            self._server = await asyncio.get_running_loop().create_server(
                accept, host, port, ssl=context, ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S, backlog=128
            )
        except OSError as exc:
            await runner.cleanup()
            raise FalError(
                Code.UNAVAILABLE,
                f"the join listener cannot listen on {host}:{port}: {exc.strerror or exc}",
                remedy="Stop what uses the port (`ss -ltnp` names it), or choose another one.",
            ) from exc
        self._runner = runner
        listening: socket.socket = self._server.sockets[0]
        return int(listening.getsockname()[1])

    async def close(self) -> None:
        """Stop listening and end what is open; idempotent."""
        server, self._server = self._server, None
        runner, self._runner = self._runner, None
        if server is None or runner is None:
            return
        server.close()
        self._connections.abort()
        await runner.cleanup()
        await server.wait_closed()

    async def _serve_ca(self, request: web.Request) -> web.Response:
        return web.Response(body=self._ca.ca_pem, content_type="application/x-pem-file")

    async def _serve_join(self, request: web.Request) -> web.Response:
        address = request.remote or "?"
        asked: JoinRequest | None = None
        try:
            self._limit.admit(address, now_s=self._clock.monotonic_s())
            asked = await _read(request)
            reply = await self._join(asked)
        except FalError as error:
            refusal = JoinRefusal(
                address=address,
                token_id=asked.token_id if asked else "",
                node_name=asked.node_name if asked else "",
                code=error.code,
                message=str(error),
            )
            _log.warning("join_refused", address=address, node=refusal.node_name, code=error.code, message=error.what)
            self._on_refused(refusal)
            return web.Response(
                body=error_body(error), status=HTTP_STATUS.get(error.code, 500), content_type="application/json"
            )
        _log.info("node_joined", address=address, node=reply.node_id, name=asked.node_name, pool=reply.pool)
        return web.Response(text=reply.model_dump_json(), content_type="application/json")

    async def _join(self, asked: JoinRequest) -> JoinReply:
        csr_pem = asked.csr.encode()
        check_csr(csr_pem)  # before a use is spent
        if self._joins >= _JOINS_MAX:
            raise FalError(Code.BUSY, f"{_JOINS_MAX} joins are under way", remedy="Try again in some seconds.")
        self._joins += 1
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                grant = await self._joiner.redeem(asked.token_id, asked.secret, asked.node_name, self._clock.wall_s())
        except TimeoutError:
            raise FalError(
                Code.TIMEOUT, "the join was not recorded in time", remedy="Try again; a use may have been spent."
            ) from None
        finally:
            self._joins -= 1
        now_s = self._clock.wall_s()
        certificate = self._ca.issue(csr_pem, role=Role.NODE, name=grant.node_id, now_s=now_s)
        return JoinReply(
            node_id=grant.node_id,
            pool=grant.pool,
            cluster_id=self._ca.cluster_id,
            certificate=certificate.decode(),
            ca=self._ca.ca_pem.decode(),
            time_s=now_s,
        )


async def _read(request: web.Request) -> JoinRequest:
    try:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            body = await request.read()
    except TimeoutError:
        raise FalError(Code.TIMEOUT, "the request did not arrive in time", remedy="Try again.") from None
    except web.HTTPRequestEntityTooLarge:
        raise FalError(
            Code.INVALID, f"the request is larger than {BODY_BYTES_MAX} bytes", remedy="Send a JoinRequest."
        ) from None
    try:
        return JoinRequest.model_validate_json(body)
    except ValidationError as exc:
        raise pydantic_error(exc, "join request", model=JoinRequest) from None


class _Connections:
    """The open ones: at most so many, each for at most so long."""

    def __init__(self, connections_max: int, life_s: float) -> None:
        self._connections_max = connections_max
        self._life_s = life_s
        self._ends: dict[asyncio.Transport, asyncio.TimerHandle] = {}

    def add(self, transport: asyncio.Transport) -> None:
        if len(self._ends) >= self._connections_max:
            transport.abort()
            return
        self._ends[transport] = asyncio.get_running_loop().call_later(self._life_s, transport.abort)

    def discard(self, transport: asyncio.Transport) -> None:
        if (end := self._ends.pop(transport, None)) is not None:
            end.cancel()

    def abort(self) -> None:
        for transport in list(self._ends):
            transport.abort()


class _Connection(asyncio.Protocol):
    """aiohttp's protocol, entered among the open connections."""

    def __init__(self, inner: Any, connections: _Connections) -> None:
        self._inner = inner
        self._connections = connections
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's TLS transport is no subclass of asyncio's, it only behaves like one.
        self._transport = cast(asyncio.Transport, transport)
        self._inner.connection_made(transport)
        self._connections.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._connections.discard(self._transport)
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        answer: bool | None = self._inner.eof_received()
        return answer

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
