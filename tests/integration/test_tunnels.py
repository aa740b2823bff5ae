"""Tunnels: the proxy dials, the gateway serves requests over it; pings, dead peers, reconnects, wrong peers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import fal_agent.proxy.tunnels as proxy_tunnels
import fal_contract.datapath as datapath
from dataplane import NODE, RUNNER, Identities, address_of, call, entry, identities, serving, until, working
from fal_agent.proxy.messages import GatewayEntry
from fal_agent.proxy.server import ProxyServer
from fal_contract.clock import SystemClock
from fal_contract.datapath import Address, TlsIdentity, TunnelListener
from fal_contract.identity import Identity


@contextlib.asynccontextmanager
async def listening(identity: Identity | None, port: int = 0) -> AsyncIterator[tuple[TunnelListener, Address]]:
    listener = TunnelListener(TlsIdentity(identity, SystemClock()))
    address = await listener.start("127.0.0.1", port)
    try:
        yield listener, address
    finally:
        await listener.close()


def dial(proxy: ProxyServer, address: Address, gateway_id: str = "gw-1") -> None:
    proxy.set_gateways([GatewayEntry(gateway_id, ((address.host, address.port),))])


async def answered(listener: TunnelListener, path: str = "/infer") -> dict[str, object]:
    connection = await listener.acquire(NODE)
    answer = await call(connection, path, b"{}")
    assert answer.status == 200
    found = json.loads(await answer.read(1000))
    assert isinstance(found, dict)
    return found


@pytest.fixture
def cluster(tmp_path: Path) -> Identities:
    return identities(tmp_path)


def test_requests_run_over_tunnels_which_are_used_again(tmp_path: Path, cluster: Identities) -> None:
    async def scenario() -> None:
        async with (
            working(tmp_path) as worker,
            serving(tmp_path / "p", identity=cluster.node_file) as proxy,
            listening(cluster.gateway) as (listener, address),
        ):
            proxy.put_runner(entry(worker, slots=2))
            dial(proxy, address)
            await until(lambda: proxy.stats().tunnels == ("gw-1",))
            for _ in range(20):
                assert (await answered(listener))["path"] == "/infer"
            assert proxy.stats().connections == 4, "no tunnel was wasted, none more was dialled"
            connection = await listener.acquire(NODE)
            stream = await call(connection, "/stream?n=5")
            assert await stream.read(1000) == b"".join(b"data: %d\n\n" % n for n in range(5))
            # Leaving early cancels, as over a direct connection.
            connection = await listener.acquire(NODE)
            stream = await call(connection, "/stream?n=1000")
            assert await anext(stream.chunks()) == b"data: 0\n\n"
            stream.close()
            await until(lambda: worker.broken == 1)
            await until(lambda: proxy.stats().connections == 4)

    asyncio.run(scenario())


def test_as_many_tunnels_as_slots(tmp_path: Path, cluster: Identities) -> None:
    async def scenario() -> None:
        async with (
            working(tmp_path) as worker,
            serving(tmp_path / "p", identity=cluster.node_file) as proxy,
            listening(cluster.gateway) as (listener, address),
        ):
            dial(proxy, address)
            await until(lambda: proxy.stats().connections == 4)
            proxy.put_runner(entry(worker, slots=9))
            await until(lambda: proxy.stats().connections == 9)
            worker.gate.clear()
            requests = [asyncio.create_task(answered(listener)) for _ in range(9)]
            await until(lambda: worker.running == 9)
            worker.gate.set()
            await asyncio.gather(*requests)
            proxy.remove_runner(RUNNER)
            await until(lambda: proxy.stats().connections == 4)
            proxy.set_gateways([])
            await until(lambda: proxy.stats().connections == 0)
            assert not listener.stands(NODE)

    asyncio.run(scenario())


def test_idle_tunnels_are_pinged_both_ways_and_live(
    tmp_path: Path, cluster: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pings every 20 ms and a silence limit of 100 ms, a tunnel lives for many limits."""
    for module in (proxy_tunnels, datapath):
        monkeypatch.setattr(module, "TUNNEL_PING_S", 0.02)
        monkeypatch.setattr(module, "TUNNEL_SILENCE_MAX_S", 0.5)

    async def scenario() -> None:
        async with (
            working(tmp_path) as worker,
            serving(tmp_path / "p", identity=cluster.node_file) as proxy,
            listening(cluster.gateway) as (listener, address),
        ):
            proxy.put_runner(entry(worker))
            dial(proxy, address)
            await until(lambda: proxy.stats().connections == 4)
            before = set(proxy._path.connections)
            end_s = asyncio.get_running_loop().time() + 1.5
            await until(lambda: asyncio.get_running_loop().time() > end_s)
            assert set(proxy._path.connections) == before, "the very same tunnels"
            assert (await answered(listener))["path"] == "/infer"

    asyncio.run(scenario())


def test_a_peer_that_fell_silent_is_left_and_dialled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_tunnels, "TUNNEL_PING_S", 0.02)
    monkeypatch.setattr(proxy_tunnels, "TUNNEL_SILENCE_MAX_S", 0.1)

    async def scenario() -> None:
        greetings: list[bytes] = []
        writers: list[asyncio.StreamWriter] = []

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            greetings.append(await reader.readline())

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with serving(tmp_path / "p") as proxy:
            dial(proxy, Address(host, port))
            await until(lambda: len(greetings) >= 8)  # four lanes, each at least twice
            assert set(greetings) == {f"FAL-TUNNEL/1 {NODE}\r\n".encode()}
        server.close()
        for writer in writers:
            writer.transport.abort()

    asyncio.run(scenario())


def test_a_gateway_that_comes_back_is_dialled_again(tmp_path: Path, cluster: Identities) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p", identity=cluster.node_file) as proxy:
            proxy.put_runner(entry(worker))
            async with listening(cluster.gateway) as (listener, address):
                dial(proxy, address)
                assert (await answered(listener))["path"] == "/infer"
            await until(lambda: proxy.stats().tunnels == ())
            async with listening(cluster.gateway, address.port) as (listener, _):
                await until(lambda: listener.stands(NODE), 20)
                assert (await answered(listener))["path"] == "/infer"

    asyncio.run(scenario())


def test_neither_side_speaks_to_the_wrong_peer(
    tmp_path: Path, cluster: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    foreign = identities(tmp_path / "foreign")

    class Log:
        def warning(self, event: str, **fields: object) -> None:
            refused.append(event)

    monkeypatch.setattr(proxy_tunnels, "_log", Log())

    async def scenario() -> None:
        heard: list[bytes] = []

        async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            said = b""
            with contextlib.suppress(OSError):
                said = await reader.read()
            heard.append(said)
            writer.transport.abort()

        async with serving(tmp_path / "p", identity=cluster.node_file) as proxy:
            for identity, gateway_id in (
                (cluster.gateway, "gw-2"),
                (cluster.viewer, "eve"),
                (cluster.node, NODE),
                (foreign.gateway, "gw-1"),
            ):
                heard.clear()
                tls = TlsIdentity(identity, SystemClock())
                server = await asyncio.start_server(hear, "127.0.0.1", 0, ssl=tls.server)
                dial(proxy, Address(*server.sockets[0].getsockname()), gateway_id)
                refused.clear()
                await until(lambda: bool(refused))
                assert set(heard) <= {b""}, "not even a greeting"
                assert proxy.stats().connections == 0
                server.close()
            proxy.set_gateways([])
            # And a peer that is no node, or claims another's name, gets no tunnel.
            async with listening(cluster.gateway) as (listener, address):
                for identity in (cluster.admin, cluster.node):
                    tls = TlsIdentity(identity, SystemClock())
                    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls.client)
                    writer.write(b"FAL-TUNNEL/1 n-somebodyelse\r\n")
                    with contextlib.suppress(OSError):
                        assert await reader.read() == b""
                    writer.transport.abort()
                    assert not listener.stands("n-somebodyelse")

    asyncio.run(scenario())


def test_a_hand_over_moves_tunnels_without_a_failed_request(tmp_path: Path, cluster: Identities) -> None:
    async def scenario() -> None:
        async with (
            working(tmp_path) as worker,
            listening(cluster.gateway) as (listener, address),
            serving(tmp_path / "p", identity=cluster.node_file) as old,
        ):
            old.put_runner(entry(worker, slots=4))
            dial(old, address)
            await until(lambda: old.stats().connections == 4)
            connection = await listener.acquire(NODE)
            stream = await call(connection, "/stream?n=40")
            async with serving(tmp_path / "p", identity=cluster.node_file, takeover=True) as new:
                await until(lambda: new.stats().tunnels == ("gw-1",))
                await until(lambda: old.stats().connections == 1)  # the idle ones left
                for _ in range(10):
                    assert (await answered(listener))["path"] == "/infer"
                assert len(await stream.read(1 << 20)) == sum(len(b"data: %d\n\n" % n) for n in range(40))
                await until(lambda: old.stats().connections == 0)
                counted = new.stats().runners[0]
                assert (counted.served, counted.failed, counted.in_flight) == (11, 0, 0)
                assert address_of(new)

    asyncio.run(scenario())
