"""How a serving process reaches nodes: connections that it dials, and tunnels that nodes dial to it.

A path is believed only when it was seen to work: `direct` after a probe over mutual TLS was answered by the node that
was meant, `tunnel` while one stands. Connections are kept and used again; ours are dropped well before the node
would close them. Nothing here knows slots or leases; `dispatch` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.http_client import READ_BYTES, HttpConnection, NotSent
from fal_contract.identity import Identity, Role
from fal_contract.limits import (
    DATA_CLIENT_IDLE_S,
    DATA_CONNECT_TIMEOUT_S,
    DATA_CONNECTIONS_MAX,
    TUNNEL_PING_S,
    TUNNEL_SILENCE_MAX_S,
)
from fal_contract.tcp import keep_alive
from fal_contract.tls import client_context, server_context, verify_peer
from fal_contract.tunnel_wire import GREETING_BYTES_MAX, read_greeting

# What the proxy refuses with these codes surely did not run.
NOT_RUN: Final = frozenset({Code.BUSY, Code.DRAINING, Code.NOT_FOUND, Code.STALE_TERM, Code.UNAVAILABLE})
IDLE_PER_NODE_MAX: Final = 64
_PROBE_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Address:
    """Where a node's proxy listens on one network."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class TlsIdentity:
    """Our identity for the data path, and what is demanded of nodes. None of both: plain TCP, for benchmarks."""

    def __init__(self, identity: Identity | None, clock: Clock) -> None:
        self._identity = identity
        self._clock = clock
        self.client: ssl.SSLContext | None = client_context(identity) if identity else None
        self.server: ssl.SSLContext | None = server_context(identity) if identity else None

    def check_node(self, writer: asyncio.StreamWriter, node_id: str) -> None:
        """Raise FalError unless the peer is this node."""
        if self._identity is not None:
            cluster_id = self._identity.peer.cluster_id
            now_s = self._clock.wall_s()
            verify_peer(writer.transport, cluster_id=cluster_id, roles={Role.NODE}, name=node_id, now_s=now_s)


class DirectConnections:
    """Connections that we dial, kept per node while idle."""

    def __init__(self, tls: TlsIdentity) -> None:
        self._tls = tls
        self._idle: dict[str, list[tuple[float, HttpConnection]]] = {}

    async def acquire(self, node_id: str, addresses: Sequence[Address], *, fresh: bool = False) -> HttpConnection:
        """An idle connection, or a new one (`fresh`: surely). Raises NotSent when no address leads to the node."""
        kept = self._idle.get(node_id, [])
        now_s = asyncio.get_running_loop().time()
        while kept:
            since_s, connection = kept.pop()
            if not fresh and now_s - since_s < DATA_CLIENT_IDLE_S and not connection.closed:
                return connection
            connection.close()
        reasons = []
        for address in addresses:
            try:
                return await self._dial(node_id, address)
            except FalError as error:
                reasons.append(f"{address}: {error.what}")
        why = "; ".join(reasons) or "it has told no address"
        raise NotSent(Code.UNAVAILABLE, f"node {node_id} cannot be reached ({why})", remedy="Check its network.")

    async def probe(self, node_id: str, addresses: Sequence[Address]) -> None:
        """Believe that the node can be reached directly, or raise NotSent saying why not."""
        connection = await self.acquire(node_id, addresses, fresh=True)
        try:
            async with asyncio.timeout(DATA_CONNECT_TIMEOUT_S):
                answer = await connection.request("GET", "/v1/probe", [("host", node_id)])
                found = json.loads(await answer.read(_PROBE_BYTES_MAX)).get("node")
        except (FalError, TimeoutError, ValueError, AttributeError) as exc:
            connection.abort()
            raise NotSent(
                Code.UNAVAILABLE, f"node {node_id} did not answer a probe: {exc}", remedy="Check its proxy."
            ) from None
        if found != node_id:
            raise NotSent(
                Code.UNAVAILABLE, f"the address of node {node_id} leads to {found!r}", remedy="Check its endpoints."
            )

    def sweep(self) -> None:
        """Close what was idle for too long; call now and then."""
        now_s = asyncio.get_running_loop().time()
        for node_id, kept in list(self._idle.items()):
            fresh = [(since_s, one) for since_s, one in kept if now_s - since_s < DATA_CLIENT_IDLE_S and not one.closed]
            for _, connection in [item for item in kept if item not in fresh]:
                connection.close()
            if fresh:
                self._idle[node_id] = fresh
            else:
                del self._idle[node_id]

    def forget(self, node_id: str) -> None:
        """Drop the idle connections to a node."""
        for _, connection in self._idle.pop(node_id, []):
            connection.close()

    def close(self) -> None:
        """Cut all."""
        for kept in self._idle.values():
            for _, connection in kept:
                connection.abort()
        self._idle.clear()

    async def _dial(self, node_id: str, address: Address) -> HttpConnection:
        try:
            async with asyncio.timeout(DATA_CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(
                    address.host, address.port, ssl=self._tls.client, limit=READ_BYTES
                )
        except TimeoutError:
            raise NotSent(Code.UNAVAILABLE, f"no answer in {DATA_CONNECT_TIMEOUT_S:g} s", remedy="") from None
        except OSError as exc:
            raise NotSent(Code.UNAVAILABLE, exc.strerror or str(exc), remedy="") from None
        try:
            self._tls.check_node(writer, node_id)
        except FalError:
            writer.transport.abort()
            raise
        keep_alive(writer.transport)
        connection = HttpConnection(reader, writer)
        connection.on_idle = lambda idle: self._keep(node_id, idle)
        return connection

    def _keep(self, node_id: str, connection: HttpConnection) -> None:
        kept = self._idle.setdefault(node_id, [])
        if len(kept) < IDLE_PER_NODE_MAX:
            kept.append((asyncio.get_running_loop().time(), connection))
        else:
            connection.close()


class TunnelListener:
    """Takes tunnels that nodes dial. `on_change(node_id)` is called for a node's first and last one."""

    def __init__(self, tls: TlsIdentity) -> None:
        self.on_change: Callable[[str], None] = lambda node_id: None
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._idle: dict[str, dict[HttpConnection, asyncio.Task[None]]] = {}
        self._standing: dict[str, int] = {}
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._handlers: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> Address:
        """Listen; FalError(FAILED_PRECONDITION) when the port is taken."""
        try:
            self._server = await asyncio.start_server(
                self._accept, host, port, ssl=self._tls.server, limit=READ_BYTES,
                ssl_handshake_timeout=DATA_CONNECT_TIMEOUT_S if self._tls.server else None,
            )  # fmt: skip
        except OSError as exc:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"cannot listen for tunnels on {host}:{port}: {exc.strerror or exc}",
                remedy="Choose another port, or stop the process that has it.",
            ) from None
        bound = self._server.sockets[0].getsockname()
        return Address(str(bound[0]), int(bound[1]))

    def stands(self, node_id: str) -> bool:
        """Whether the node has a tunnel to us."""
        return self._standing.get(node_id, 0) > 0

    async def acquire(self, node_id: str, timeout_s: float = DATA_CONNECT_TIMEOUT_S) -> HttpConnection:
        """An idle tunnel of the node. Raises NotSent when none comes in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    idle = self._idle.get(node_id)
                    while idle:
                        connection, keeper = idle.popitem()
                        keeper.cancel()
                        await asyncio.wait([keeper])
                        if not connection.closed and not connection.leave:
                            return connection
                    await self._wait_for_one(node_id)
        except TimeoutError:
            raise NotSent(
                Code.UNAVAILABLE, f"node {node_id} has no free tunnel to us", remedy="Check its network."
            ) from None

    async def close(self) -> None:
        """End all tunnels and the listener."""
        if self._server is not None:
            self._server.close()
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _wait_for_one(self, node_id: str) -> None:
        waiting = self._waiting.setdefault(node_id, [])
        free: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(free)
        try:
            await free
        finally:
            waiting.remove(free)
            if not waiting:
                self._waiting.pop(node_id, None)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            async with asyncio.timeout(DATA_CONNECT_TIMEOUT_S):
                line = await reader.readuntil(b"\r\n")
            if len(line) > GREETING_BYTES_MAX or len(self._handlers) > DATA_CONNECTIONS_MAX:
                return
            node_id = read_greeting(line)
            self._tls.check_node(writer, node_id)
            keep_alive(writer.transport)
            await self._serve(node_id, reader, writer)
        except (OSError, FalError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # not a node of ours, or it went away
        except asyncio.CancelledError:
            pass  # closed by us
        finally:
            self._handlers.discard(task)
            writer.transport.abort()

    async def _serve(self, node_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Offer the tunnel until it closes."""
        connection = HttpConnection(reader, writer)
        connection.on_idle = lambda idle: self._offer(node_id, idle)
        with self._counted(node_id):
            self._offer(node_id, connection)
            try:
                await writer.wait_closed()
            finally:
                keeper = self._idle.get(node_id, {}).pop(connection, None)
                if keeper is not None:
                    keeper.cancel()

    @contextlib.contextmanager
    def _counted(self, node_id: str) -> Iterator[None]:
        self._standing[node_id] = self._standing.get(node_id, 0) + 1
        if self._standing[node_id] == 1:
            self.on_change(node_id)
        try:
            yield
        finally:
            self._standing[node_id] -= 1
            if self._standing[node_id] == 0:
                del self._standing[node_id]
                self.on_change(node_id)

    def _offer(self, node_id: str, connection: HttpConnection) -> None:
        keeper = asyncio.create_task(self._keep(node_id, connection), name=f"tunnel-{node_id}")
        self._idle.setdefault(node_id, {})[connection] = keeper
        for free in self._waiting.get(node_id, []):
            if not free.done():
                free.set_result(None)
                break

    async def _keep(self, node_id: str, connection: HttpConnection) -> None:
        """Ping, and notice the end, while the tunnel is idle."""
        loop = asyncio.get_running_loop()
        heard_s = loop.time()
        ping_s = heard_s + TUNNEL_PING_S
        try:
            while not connection.leave and loop.time() - heard_s <= TUNNEL_SILENCE_MAX_S:
                try:
                    async with asyncio.timeout_at(ping_s):
                        await connection.read_idle()
                    heard_s = loop.time()
                except TimeoutError:
                    connection.write_ping()
                    ping_s += TUNNEL_PING_S
        except OSError:
            pass
        self._idle.get(node_id, {}).pop(connection, None)
        connection.abort()
