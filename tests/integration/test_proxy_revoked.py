"""A revoked caller is cut off from the data path: handshake, open connections, tunnels; also after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dataplane import NODE, RUNNER, TICKET, Identities, address_of, entry, identities, serving, until, working
from fal_agent.proxy.control import ProxyControl
from fal_agent.proxy.messages import GatewayEntry, revoked_from_wire
from fal_agent.proxy.server import ProxyServer
from fal_contract.clock import SystemClock
from fal_contract.datapath import Address, DirectConnections, TlsIdentity, TunnelListener
from fal_contract.errors import Code, FalError
from fal_contract.http_client import HttpResponse
from fal_contract.identity import Identity, Role
from fal_contract.revocation import RevokedPeer, RevokedPeers

CUT_WITHIN_S = 5.0


@pytest.fixture
def cluster(tmp_path: Path) -> Identities:
    return identities(tmp_path)


def revocation_of(identity: Identity) -> RevokedPeer:
    """Of everything that was issued to its holder until now."""
    return RevokedPeer("serving.x", identity.peer.subject, SystemClock().wall_s())


async def ask(address: Address, identity: Identity, action: str) -> HttpResponse:
    """One request on a connection of its own."""
    direct = DirectConnections(TlsIdentity(identity, SystemClock()))
    connection = await direct.acquire(NODE, [address])
    headers = [("host", "test"), TICKET]
    return await connection.request("POST", f"/v1/runners/{RUNNER}{action}", headers, b"")


async def to_the_end(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


async def status_of(proxy: ProxyServer, identity: Identity) -> tuple[int, str]:
    answer = await ask(address_of(proxy), identity, "/infer")
    code = (answer.header(b"fal-code") or b"").decode()
    answer.close()
    return answer.status, code


def test_a_revoked_gateway_is_cut_within_its_request_and_refused_from_then_on(
    tmp_path: Path, cluster: Identities
) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker:
            async with serving(tmp_path / "p", identity=cluster.node_file) as proxy:
                proxy.put_runner(entry(worker, slots=4))
                assert (await status_of(proxy, cluster.gateway))[0] == 200
                stream = await ask(address_of(proxy), cluster.gateway, "/stream?n=1000")
                kept = await ask(address_of(proxy), cluster.admin, "/stream?n=20")
                chunks = stream.chunks()
                assert await anext(chunks) == b"data: 0\n\n"
                control = await ProxyControl.connect(proxy._options.control_path, on_stats=lambda _: None)
                await control.set_revoked([revocation_of(cluster.gateway)])
                await control.close()
                cut = asyncio.ensure_future(to_the_end(chunks))
                await asyncio.wait({cut}, timeout=CUT_WITHIN_S)
                assert cut.done(), "the stream is 20 s long"
                assert cut.exception() is not None, "it was cut, not ended"
                await until(lambda: worker.broken == 1, CUT_WITHIN_S)
                assert await status_of(proxy, cluster.gateway) == (401, "UNAUTHENTICATED")
                assert (await kept.read(10_000)).endswith(b"data: 19\n\n"), "others are not touched"
            async with serving(tmp_path / "p", identity=cluster.node_file) as proxy:  # as after a kill: no agent yet
                assert await status_of(proxy, cluster.gateway) == (401, "UNAUTHENTICATED")
                assert (await status_of(proxy, cluster.admin))[0] == 200

    asyncio.run(scenario())


def test_a_successor_refuses_whom_its_predecessor_refused(tmp_path: Path, cluster: Identities) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p", identity=cluster.node_file) as old:
            old.put_runner(entry(worker))
            old.set_revoked([revocation_of(cluster.gateway)])
            (tmp_path / "p" / "proxy.state").unlink()  # it must be handed over, not read
            async with serving(tmp_path / "p", identity=cluster.node_file, takeover=True) as new:
                assert await status_of(new, cluster.gateway) == (401, "UNAUTHENTICATED")
                assert (await status_of(new, cluster.admin))[0] == 200

    asyncio.run(scenario())


def test_tunnels_to_a_revoked_gateway_end_and_are_not_made_again(tmp_path: Path, cluster: Identities) -> None:
    async def scenario() -> None:
        listener = TunnelListener(TlsIdentity(cluster.gateway, SystemClock()))
        address = await listener.start("127.0.0.1", 0)
        try:
            async with serving(tmp_path / "p", identity=cluster.node_file) as proxy:
                proxy.set_gateways([GatewayEntry("gw-1", ((address.host, address.port),))])
                await until(lambda: proxy.stats().tunnels == ("gw-1",))
                proxy.set_revoked([revocation_of(cluster.gateway)])
                await until(lambda: proxy.stats().tunnels == (), CUT_WITHIN_S)
                await until(lambda: "was revoked" in proxy._tunnels._why.get("gw-1", ""), CUT_WITHIN_S)
                assert proxy.stats().connections == 0
        finally:
            await listener.close()

    asyncio.run(scenario())


def test_what_is_issued_after_the_revocation_is_good(cluster: Identities) -> None:
    now_s = cluster.gateway.peer.issued_at_s
    table = RevokedPeers([RevokedPeer("serving.gw-1", "serving/gw-1", now_s + 1.0), RevokedPeer("0f", "admin/x", 0.0)])
    assert table.is_revoked(cluster.gateway.peer)
    assert not table.is_revoked(cluster.admin.peer)
    renewed = cluster.ca.new_identity(role=Role.SERVING, name="gw-1", now_s=now_s + 5.0)
    assert not table.is_revoked(renewed.peer)
    by_serial = RevokedPeers([RevokedPeer(renewed.peer.serial, "serving/gw-1", 0.0)])
    assert by_serial.is_revoked(renewed.peer)
    assert not by_serial.is_revoked(cluster.gateway.peer)
    with pytest.raises(FalError) as refused:
        by_serial.check(renewed.peer)
    assert refused.value.code is Code.UNAUTHENTICATED


@pytest.mark.parametrize("raw", [None, [], ["a", "b"], ["a", "b", "c"], ["a", 1, 2.0], "abc"])
def test_what_is_no_revocation_is_refused(raw: object) -> None:
    with pytest.raises(FalError) as refused:
        revoked_from_wire(raw)
    assert refused.value.code is Code.INVALID
