"""Tunnels: connections that the proxy dials to gateways that cannot dial it (NAT, firewalls).

After TLS, the proxy checks that the gateway is who the scheduler said, sends one line `FAL-TUNNEL/1 NODE`, and from
then on serves requests on the connection as if the gateway had dialled. While a tunnel is idle both ends send CRLF
every 10 s, which HTTP ignores between messages: a NAT keeps the flow, and a dead peer is noticed in 25 s. To each
gateway stand as many tunnels as the node has slots, at least 4; what breaks is dialled anew, with full jitter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Final, cast

from fal_agent.proxy.datapath import DataPath
from fal_agent.proxy.listener import Credentials
from fal_agent.proxy.messages import GatewayEntry
from fal_agent.proxy.pump import ClientConnection
from fal_contract.clock import Clock
from fal_contract.errors import FalError
from fal_contract.identity import Role
from fal_contract.limits import (
    DATA_CONNECT_TIMEOUT_S,
    RECONNECT_BASE_S,
    RECONNECT_CAP_S,
    TUNNEL_PING_S,
    TUNNEL_SILENCE_MAX_S,
    TUNNELS_MAX,
    TUNNELS_MIN,
)
from fal_contract.tcp import keep_alive
from fal_contract.telemetry import get_logger
from fal_contract.tls import verify_peer
from fal_contract.tunnel_wire import TUNNEL_BYE, tunnel_greeting

_GATEWAYS: Final = frozenset({Role.SERVING, Role.OPERATOR, Role.ADMIN})
_BACKOFF_DOUBLINGS_MAX: Final = 10
_log = get_logger("proxy.tunnels")


class TunnelConnection(ClientConnection):
    """A connection that we dialled; the gateway uses it as if it had."""

    def __init__(self, path: DataPath, gateway_id: str, credentials: Credentials | None, clock: Clock) -> None:
        super().__init__(path)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.refused: FalError | None = None
        self._gateway_id = gateway_id
        self._credentials = credentials
        self._clock = clock
        self._ping: asyncio.TimerHandle | None = None
        self._retired = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        try:
            if self._credentials is not None:
                cluster_id = self._credentials.identity.peer.cluster_id
                self.peer = verify_peer(
                    transport, cluster_id=cluster_id, roles=_GATEWAYS, name=self._gateway_id, now_s=self._clock.wall_s()
                )
                self._path.revoked.check(self.peer)
        except FalError as error:
            self.refused = error
            transport.abort()
            return
        keep_alive(transport)
        transport.write(tunnel_greeting(self._path.node_id))
        super().connection_made(transport)
        self._ping = asyncio.get_running_loop().call_later(TUNNEL_PING_S, self._ping_or_end)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ping is not None:
            self._ping.cancel()
        super().connection_lost(exc)
        if not self.lost.done():
            self.lost.set_result(None)

    @property
    def may_keep_alive(self) -> bool:
        return super().may_keep_alive and not self._retired

    def idle_timeout_s(self) -> float | None:
        # The pings keep watch, unless the gateway was asked to leave.
        return super().idle_timeout_s() if self._retired else None

    def retire(self) -> None:
        """Ask the gateway to use this connection no more; a request under way is finished first."""
        self._retired = True
        if self.idle:
            self.wait_for_request()

    def wait_for_request(self) -> None:
        super().wait_for_request()
        if self._retired:
            self.write(TUNNEL_BYE)

    def _ping_or_end(self) -> None:
        if self.idle:
            if self._path.now_s() - self.heard_s > TUNNEL_SILENCE_MAX_S:
                self.abort()
                return
            self.write(b"\r\n")
        self._ping = asyncio.get_running_loop().call_later(TUNNEL_PING_S, self._ping_or_end)


class Tunnels:
    """Keeps tunnels to the gateways that were told. `on_change` is called when a gateway gets its first or loses
    its last one."""

    def __init__(
        self,
        path: DataPath,
        *,
        credentials: Callable[[], Credentials | None],
        clock: Clock,
        rng: Random,
        on_change: Callable[[], None],
    ) -> None:
        self._path = path
        self._credentials = credentials
        self._clock = clock
        self._rng = rng
        self._on_change = on_change
        self._gateways: dict[str, GatewayEntry] = {}
        self._lanes: dict[str, list[asyncio.Task[None]]] = {}
        self._open: dict[str, set[TunnelConnection]] = {}
        self._why: dict[str, str] = {}  # gateway → the last reason logged

    @property
    def gateways(self) -> tuple[GatewayEntry, ...]:
        """What was told."""
        return tuple(self._gateways.values())

    def connected(self) -> tuple[str, ...]:
        """Gateways to which at least one tunnel stands."""
        return tuple(sorted(gateway_id for gateway_id, open_now in self._open.items() if open_now))

    def set_gateways(self, gateways: Sequence[GatewayEntry]) -> None:
        """All gateways that want tunnels; those to others are closed once idle."""
        told = {gateway.gateway_id: gateway for gateway in gateways}
        for gateway_id in [known for known in self._gateways if told.get(known) != self._gateways[known]]:
            self._end_lanes(gateway_id, 0)
            self._lanes.pop(gateway_id, None)
        self._gateways = told
        self.fit()

    def fit(self) -> None:
        """As many lanes as the node has slots; call when slots changed."""
        lanes_wanted = min(TUNNELS_MAX, max(TUNNELS_MIN, self._path.slots.slots_total()))
        for gateway_id, gateway in self._gateways.items():
            lanes = self._lanes.setdefault(gateway_id, [])
            self._end_lanes(gateway_id, lanes_wanted)
            while len(lanes) < lanes_wanted:
                lanes.append(asyncio.create_task(self._lane(gateway), name=f"tunnel-{gateway_id}"))

    def retire(self) -> None:
        """A successor has its own tunnels: dial no more, ask gateways to leave these. Requests under way go on."""
        for lanes in self._lanes.values():
            for lane in lanes:
                lane.cancel()
        self._lanes.clear()
        for connections in self._open.values():
            for connection in connections:
                connection.retire()

    async def close(self) -> None:
        """End everything."""
        lanes = [lane for lanes in self._lanes.values() for lane in lanes]
        self._lanes.clear()
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
        for connections in list(self._open.values()):
            for connection in list(connections):
                connection.abort()

    def _end_lanes(self, gateway_id: str, keep: int) -> None:
        lanes = self._lanes.get(gateway_id, [])
        while len(lanes) > keep:
            lanes.pop().cancel()

    async def _lane(self, gateway: GatewayEntry) -> None:
        """One tunnel, for ever."""
        attempt = 0
        while True:
            connection = await self._dial(gateway)
            if connection is not None:
                since_s = self._path.now_s()
                await self._hold(gateway.gateway_id, connection)
                if self._path.now_s() - since_s > TUNNEL_PING_S:
                    attempt = 0  # it worked; only what breaks at once is dialled ever more slowly
            cap_s = min(RECONNECT_CAP_S, RECONNECT_BASE_S * 2 ** min(attempt, _BACKOFF_DOUBLINGS_MAX))
            attempt += 1
            await asyncio.sleep(self._rng.uniform(0, cap_s))

    async def _hold(self, gateway_id: str, connection: TunnelConnection) -> None:
        """Until the tunnel is lost. When its lane is ended, an idle one goes; a busy one finishes its request."""
        open_now = self._open.setdefault(gateway_id, set())
        open_now.add(connection)
        self._on_change()

        def gone(_: asyncio.Future[None]) -> None:
            open_now.discard(connection)
            self._on_change()

        connection.lost.add_done_callback(gone)
        try:
            await asyncio.shield(connection.lost)
        except asyncio.CancelledError:
            connection.retire()
            raise

    async def _dial(self, gateway: GatewayEntry) -> TunnelConnection | None:
        """A tunnel over the first endpoint that works, or None."""
        why = "it has told no address"
        for host, port in gateway.endpoints:
            try:
                connection = await self._connect(gateway.gateway_id, host, port)
            except (OSError, TimeoutError) as exc:
                why = f"{host}:{port}: {exc or type(exc).__name__}"
                continue
            if connection.refused is None:
                self._why.pop(gateway.gateway_id, None)
                return connection
            why = f"{host}:{port}: {connection.refused.what}"
        if self._why.get(gateway.gateway_id) != why:  # many lanes, many attempts: one line
            self._why[gateway.gateway_id] = why
            _log.warning("no tunnel to gateway", gateway=gateway.gateway_id, why=why)
        return None

    async def _connect(self, gateway_id: str, host: str, port: int) -> TunnelConnection:
        credentials = self._credentials()
        async with asyncio.timeout(DATA_CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: TunnelConnection(self._path, gateway_id, credentials, self._clock),
                host,
                port,
                ssl=credentials.client if credentials else None,
            )
        return connection
