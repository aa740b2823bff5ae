"""Bulk ports of two and three nodes on loopback: pieces traded, connections, tickets, claims, manifests."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fal_contract.artifact import claim_text
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, Role
from fal_contract.pieces import Bitmap
from fal_contract.ticket import make_ticket
from fal_fsd.core.messages import Claim, Lease
from fal_fsd.core.rates import BandwidthLimits
from fal_fsd.peers.frames import HelloOk, Join, Refused
from fsd_fakes import FakePart, make_artifact
from peers_rig import Ca, Node, RawPeer, Rig, key_of, on_loop, rig, ticket

ARTIFACT, CONTENTS = make_artifact([900_000, 0, 70_000], seed=1)
PROVISIONAL, _ = make_artifact([900_000, 0, 70_000], seed=1, attested=False)
COUNT = ARTIFACT.layout.count


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Threads and descriptors end with the ports."""
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    assert [t.name for t in threading.enumerate() if t not in threads and t.name.startswith("peer")] == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def _signed(identity: Identity, part: FakePart, pieces: Any, *, digest: bytes | None = None) -> list[Claim]:
    key = serialization.load_pem_private_key(identity.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    claims = []
    for piece in pieces:
        told = digest or part.digest_of(piece)
        assert told is not None
        text = claim_text(part.artifact.id, piece, told)
        claims.append(Claim(piece, told, identity.peer.name, key.sign(text, ec.ECDSA(hashes.SHA256()))))
    return claims


async def _fetch(node: Node, source: str, *, urgent: bool = False) -> None:
    """All that is missing, from one peer."""
    node.net.ask(source, node.part.artifact.id, list(node.part.have.missing()), urgent=urgent)
    await node.events.until(lambda _: node.part.have.complete)


@on_loop
async def test_disjoint_halves_are_traded() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a", range(0, COUNT, 2)), await world.add("b", range(1, COUNT, 2))
        world.meet()
        await world.up("a", "b")
        assert a.events.named("peer_up")[0][2].missing().__next__() == 0
        await asyncio.gather(_fetch(a, "b"), _fetch(b, "a"))
        for node, other in ((a, "b"), (b, "a")):
            assert node.part.contents() == CONTENTS
            assert {told[0] for told in node.events.named("piece_came")} == {other}
            assert node.net.rate_of(other) > 0.0
            assert [line.node_id for line in node.net.status().peers] == [other]


@on_loop
async def test_a_piece_goes_on_to_a_third_that_hears_of_it() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        await world.add("a", None)
        b, c = await world.add("b"), await world.add("c")
        world.meet(("b", "a"), ("b", "c"))
        await b.events.until(lambda e: e.named("peer_up", "a") and e.named("peer_up", "c"))
        b.events.hooks["piece_came"] = lambda _n, _a, piece, _s: b.net.tell_have(ARTIFACT.id, [piece])
        c.events.hooks["peer_has"] = lambda node, _a, pieces: c.net.ask(node, ARTIFACT.id, pieces, urgent=False)
        await _fetch(b, "a")
        await c.events.until(lambda _: c.part.have.complete)
        assert c.part.contents() == CONTENTS
        assert {told[0] for told in c.events.named("piece_came")} == {"b"}


@pytest.mark.parametrize("dialler", ["a", "b"])
@on_loop
async def test_data_flows_both_ways_whoever_dialled(dialler: str) -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a", range(5)), await world.add("b", range(5, COUNT))
        world.meet((dialler, "b" if dialler == "a" else "a"))
        await world.up("a", "b")
        await asyncio.gather(_fetch(a, "b"), _fetch(b, "a"))
        assert [line.dialled for line in a.net.status().peers] == [dialler == "a"]


@on_loop
async def test_of_two_connections_the_one_stays_that_the_smaller_id_dialled() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a", None), await world.add("b")
        world.meet(("b", "a"))
        await world.up("a", "b")
        world.meet(("a", "b"))  # nobody is dialled twice, so a raw caller has to try it
        assert [line.dialled for line in a.net.status().peers] == [False]
        b.net.set_members(ARTIFACT.id, [world.address(a, caller="b", dial=False)])
        await _second_connection(world, a, b)
        await b.events.until(lambda e: len(e.named("peer_up", "a")) == 2)
        assert [line.dialled for line in b.net.status().peers] == [False]


async def _second_connection(world: Rig, a: Node, b: Node) -> None:
    """As if `a` had dialled before it heard of the connection that stands."""
    route = a.net._routes.route("b")
    assert route is not None
    standing = a.net._live.pop("b")
    a.net.tick()
    a.net._live.setdefault("b", standing)
    await a.events.until(lambda e: len(e.named("peer_up", "b")) == 2)
    assert [line.dialled for line in a.net.status().peers] == [True]


@on_loop
async def test_leases_are_told_to_neighbours() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a"), await world.add("b")
        world.meet()
        await world.up("a", "b")
        lease = Lease(2, 5, 9, "a")
        a.net.tell_lease(ARTIFACT.id, lease, ended=False)
        a.net.tell_lease(ARTIFACT.id, lease, ended=True)
        await b.events.until(lambda e: len(e.named("lease_told")) == 2)
        assert b.events.named("lease_told") == [("a", ARTIFACT.id, lease, False), ("a", ARTIFACT.id, lease, True)]


@on_loop
async def test_who_joins_later_is_told_and_who_leaves_is_gone() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a", None), await world.add("b", join=False)
        world.meet()
        b.net.join(b.part)
        await world.up("a", "b")
        a.net.leave(ARTIFACT.id)
        await b.events.until(lambda e: e.named("peer_down"))
        assert b.events.named("peer_down") == [("a", ARTIFACT.id, "it left")]
        b.net.ask("a", ARTIFACT.id, [0, 1], urgent=True)
        await b.events.until(lambda e: e.named("piece_refused"))
        assert b.events.named("piece_refused") == [("a", ARTIFACT.id, (0, 1), 0.0)]
        await a.net.quiet(ARTIFACT.id)
        a.net.join(a.part)
        await b.events.until(lambda e: len(e.named("peer_up", "a")) == 2)
        await _fetch(b, "a")


@on_loop
async def test_two_artifacts_share_a_connection() -> None:
    other, other_contents = make_artifact([300_000], seed=9, kind="lora")
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a", None), await world.add("b")
        world.meet()
        await world.up("a", "b")
        full, empty = FakePart(other, other_contents), FakePart(other)
        try:
            for node, part, peer in ((a, full, b), (b, empty, a)):
                node.net.join(part)
                shown = ticket(world.clock, other.id, caller=node.node_id, at=peer.node_id)
                address = world.address(peer, caller=node.node_id)
                node.net.set_members(other.id, [type(address)(address.node_id, address.endpoints, shown, 1.0)])
            await b.events.until(lambda e: ("a", other.id) in {told[:2] for told in e.named("peer_up")})
            b.net.ask("a", other.id, list(range(other.layout.count)), urgent=False)
            await b.events.until(lambda _: empty.have.complete)
            assert empty.contents() == other_contents
            assert len(b.net.status().peers) == 1
            assert b.net.status().peers[0].swarms == 2
        finally:
            for node in (a, b):
                node.net.leave(other.id)
                await node.net.quiet(other.id)
            full.close()
            empty.close()


@pytest.mark.parametrize("fault", ["forged", "expired", "others", "artifact", "none", "short of keys"])
@on_loop
async def test_a_bad_ticket_is_refused(fault: str) -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a", None)
        now_s = world.clock.wall_s()
        good = {"caller": "raw", "artifact_id": ARTIFACT.id, "expires_s": now_s + 60}
        shown = {
            "forged": make_ticket(b"x" * 32, **good),  # type: ignore[arg-type]
            "expired": make_ticket(key_of("a"), caller="raw", artifact_id=ARTIFACT.id, expires_s=now_s - 1),
            "others": make_ticket(key_of("a"), caller="b", artifact_id=ARTIFACT.id, expires_s=now_s + 60),
            "artifact": make_ticket(key_of("a"), caller="raw", artifact_id="ab" * 32, expires_s=now_s + 60),
            "short of keys": ticket(world.clock, ARTIFACT.id, caller="raw", at="a"),
        }
        if fault == "short of keys":
            a.net.set_ticket_keys([])
        raw = RawPeer.dial(a.port)
        try:
            if fault == "none":
                await asyncio.to_thread(raw.send, _hello_without_ticket())
                answer = await asyncio.to_thread(raw.read, Refused)
            else:
                answer = await asyncio.to_thread(raw.greet, world, a, shown=shown[fault])
            assert isinstance(answer, Refused), answer
            assert "ticket" in answer.reason
            assert await asyncio.to_thread(raw.ended) == ""
        finally:
            raw.close()
        assert a.net.status().peers == ()
        assert a.events.seen == []


def _hello_without_ticket() -> Any:
    from fal_fsd.peers.frames import Hello
    from peers_rig import CLUSTER

    return Hello(CLUSTER, "raw", "f-raw")


@on_loop
async def test_a_ticket_for_one_artifact_opens_no_other() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a", None)
        elsewhere = "cd" * 32
        shown = make_ticket(key_of("a"), caller="raw", artifact_id=elsewhere, expires_s=world.clock.wall_s() + 60)
        raw = RawPeer.dial(a.port)
        try:
            await asyncio.to_thread(raw.send, _hello(elsewhere, shown))
            assert isinstance(await asyncio.to_thread(raw.read, HelloOk), HelloOk)
            await asyncio.to_thread(raw.send, Join(ARTIFACT.id, bytes(Bitmap(COUNT))))
            refused = await asyncio.to_thread(raw.read, Refused)
            assert isinstance(refused, Refused)
            assert refused.artifact_id == ARTIFACT.id
        finally:
            raw.close()
        assert a.events.seen == []


def _hello(artifact_id: str, shown: bytes) -> Any:
    from fal_fsd.peers.frames import Hello
    from peers_rig import CLUSTER

    return Hello(CLUSTER, "raw", "f-raw", ((artifact_id, shown),))


@on_loop
async def test_without_a_scheduler_an_old_ticket_ends_nothing_that_stands() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a", None)
        raw = RawPeer.dial(a.port)
        try:
            await asyncio.to_thread(raw.greet, world, a)
            await asyncio.to_thread(raw.join, world, bytes(Bitmap(COUNT)))
            await a.events.until(lambda e: e.named("peer_up", "raw"))
            a.net.set_scheduled(False)
            world.clock.skew(3601.0)
            a.net.tick()
            a.net.set_scheduled(True)  # a moment ago: the peer has yet to be told its new ticket
            a.net.tick()
            assert a.events.named("peer_down") == []
        finally:
            raw.close()


@on_loop
async def test_what_only_an_expired_ticket_allowed_ends() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a", None)
        raw = RawPeer.dial(a.port)
        try:
            await asyncio.to_thread(raw.greet, world, a)
            await asyncio.to_thread(raw.join, world, bytes(Bitmap(COUNT)))
            await a.events.until(lambda e: e.named("peer_up", "raw"))
            world.clock.skew(3601.0)
            await a.events.until(lambda e: e.named("peer_down", "raw"))
            assert a.events.named("peer_down")[0][2] == "its ticket has expired"
        finally:
            raw.close()


@on_loop
async def test_nobody_answers() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a"), await world.add("b")
        await b.net.close()
        world.meet(("a", "b"))
        async with asyncio.timeout(20):
            while a.net.status().unreachable != ("b",):  # noqa: ASYNC110  (there is no event of it)
                await asyncio.sleep(0.01)


@on_loop
async def test_tls_for_members_that_must_use_it(tmp_path: Path) -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        ca = Ca(tmp_path / "ca", world.clock)
        a = await world.add("a", None, identity=ca.identity("a"))
        b = await world.add("b", identity=ca.identity("b"))
        world.meet(tls=True)
        await world.up("a", "b")
        await _fetch(b, "a")
        assert b.part.contents() == CONTENTS
        assert all(line.tls for node in (a, b) for line in node.net.status().peers)
        raw = RawPeer.dial(a.port)  # clear text, with a good ticket
        try:
            answer = await asyncio.to_thread(raw.greet, world, a, caller="b")
            assert isinstance(answer, Refused)
            assert "TLS" in answer.reason
        finally:
            raw.close()


@on_loop
async def test_over_tls_the_ticket_must_be_that_of_the_certificate(tmp_path: Path) -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        ca = Ca(tmp_path / "ca", world.clock)
        a = await world.add("a", None, identity=ca.identity("a"))
        b = await world.add("b", identity=ca.identity("mallory"))
        world.meet(("b", "a"), tls=True)
        async with asyncio.timeout(20):
            while not b.net._routes.route("a").failures:  # type: ignore[union-attr]  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert a.events.seen == []
        assert b.net.status().unreachable == ()  # it did answer


@on_loop
async def test_an_operator_may_give_and_gets_nothing(tmp_path: Path) -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        ca = Ca(tmp_path / "ca", world.clock)
        a = await world.add("a", range(COUNT - 1), identity=ca.identity("a"))
        pusher = await world.add("operator/eve", [COUNT - 1], identity=ca.identity("eve", Role.OPERATOR))
        world.meet(("operator/eve", "a"), tls=True)
        await world.up("a", "operator/eve")
        await _fetch(a, "operator/eve")
        pusher.net.ask("a", ARTIFACT.id, [0], urgent=False)
        await pusher.events.until(lambda e: e.named("piece_refused"))
        assert not pusher.part.has(0)


@on_loop
async def test_claims_go_first_and_are_what_pieces_must_be(tmp_path: Path) -> None:
    async with rig(PROVISIONAL, CONTENTS) as world:
        ca = Ca(tmp_path / "ca", world.clock)
        a = await world.add("a", None, identity=ca.identity("a"))
        b, c = await world.add("b", identity=ca.identity("b")), await world.add("c", identity=ca.identity("c"))
        assert a.identity is not None
        a.net.tell_have(PROVISIONAL.id, range(5), _signed(a.identity, a.part, range(5)))
        world.meet(("b", "a"), ("c", "b"), tls=True)
        await b.events.until(lambda e: e.named("peer_has", "a"))
        assert b.events.named("peer_up", "a")[0][2].count == 0
        assert [claim.piece for claim in b.events.named("claims_told")[0][2]] == list(range(5))
        b.net.ask("a", PROVISIONAL.id, [4, 5], urgent=False)  # nobody claims 5
        await b.events.until(lambda e: e.named("piece_came") and e.named("piece_refused"))
        assert b.events.named("piece_refused")[0][2] == (5,)
        b.net.tell_have(PROVISIONAL.id, [4], b.events.named("claims_told")[0][2][4:])  # relayed with its signer
        await c.events.until(lambda e: e.named("peer_has", "b"))
        assert c.events.named("claims_told")[0][2][0].signer == "a"
        a.part.flip(3)  # not what was claimed
        b.net.ask("a", PROVISIONAL.id, [3], urgent=False)
        await b.events.until(lambda e: e.named("piece_bad"))
        assert not b.part.has(3)


@on_loop
async def test_a_forged_claim_ends_the_connection_for_a_while(tmp_path: Path) -> None:
    async with rig(PROVISIONAL, CONTENTS) as world:
        ca = Ca(tmp_path / "ca", world.clock)
        a = await world.add("a", None, identity=ca.identity("a"))
        b = await world.add("b", identity=ca.identity("b"))
        world.meet(tls=True)
        await world.up("a", "b")
        assert a.identity is not None
        (claim,) = _signed(a.identity, a.part, [0])
        a.net.tell_have(PROVISIONAL.id, [0], [Claim(0, b"\0" * 32, claim.signer, claim.signature)])
        await b.events.until(lambda e: e.named("peer_down"))
        assert "not signed" in b.events.named("peer_down")[0][2]
        assert set(b.net.status().dropped) == {"a"}
        assert b.events.named("claims_told") == []


@on_loop
async def test_manifests_travel() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a"), await world.add("b")
        world.meet()
        await world.up("a", "b")
        a.manifests["ef" * 32] = body = os.urandom(3 << 20)
        assert await b.net.fetch_manifest("a", "ef" * 32) == body
        with pytest.raises(FalError, match="no manifest") as caught:
            await b.net.fetch_manifest("a", "01" * 32)
        assert caught.value.code is Code.NOT_FOUND
        with pytest.raises(FalError, match="not connected"):
            await b.net.fetch_manifest("c", "01" * 32)


@on_loop
async def test_a_dropped_peer_stays_away() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a"), await world.add("b", None)
        world.meet()
        await world.up("a", "b")
        a.net.drop("b", "sent bad bytes")
        assert a.events.named("peer_down") == [("b", ARTIFACT.id, "sent bad bytes")]
        await b.events.until(lambda e: e.named("peer_down"))
        assert "sent bad bytes" in b.events.named("peer_down")[0][2]
        assert a.net.status().dropped == {"b": "sent bad bytes"}
        raw = RawPeer.dial(a.port)
        try:
            answer = await asyncio.to_thread(raw.greet, world, a, caller="b")
            assert isinstance(answer, Refused)
        finally:
            raw.close()
        world.clock.advance(601.0)
        await a.events.until(lambda e: len(e.named("peer_up", "b")) == 2)
        assert a.net.status().dropped == {}


@on_loop
async def test_a_port_that_is_taken_is_named() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a")
        b = Node(world, "b", FakePart(ARTIFACT), None, BandwidthLimits())
        b.net._listen = ("127.0.0.1", a.port)
        try:
            with pytest.raises(FalError, match=str(a.port)):
                await b.net.start()
        finally:
            await b.net.close()
            b.part.close()
