"""The session protocol of weight caches over a link in memory: what goes down, what ends a session, who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fake_cache import FakeCache, holding, wanting
from fake_engine import FakeEngine
from fal_contract.errors import Code, FalError, not_found
from fal_contract.ticket import TICKET_TTL_S, check_ticket
from fal_contract.v1 import agent_pb2, fsd_pb2, state_pb2, weights_pb2
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.cache_sessions import CacheSessions
from fal_scheduler.core.events import Logged, ModelChanged, NodeChanged, WishesChanged
from fal_scheduler.core.records import Model, ModelState, Node, Pool, Wish
from fal_scheduler.core.tickets import TicketOffice
from fal_scheduler.core.told import Health, NodeLive
from virtual_time import LoopClock, run_virtually

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
DIGEST = "d" * 64
SIZE = 1000


class FakeRegistrar:
    """Keeps what caches told; manifests by id."""

    def __init__(self) -> None:
        self.manifests: dict[str, state_pb2.ModelManifest] = {}
        self.claims: list[tuple[str, weights_pb2.PieceClaims]] = []
        self.attestations: list[tuple[str, weights_pb2.Attestation]] = []
        self.wanted: tuple[str, ...] = ()

    def on_claims(self, node_id: str, claims: weights_pb2.PieceClaims) -> None:
        self.claims.append((node_id, claims))

    def on_attestation(self, node_id: str, attestation: weights_pb2.Attestation) -> None:
        self.attestations.append((node_id, attestation))

    def manifest_of(self, id_: str) -> state_pb2.ModelManifest:
        if id_ not in self.manifests:
            raise not_found("manifest", id_, remedy="Wait.")
        return self.manifests[id_]

    def offer_manifest(self, message: state_pb2.ModelManifest) -> bool:
        self.manifests[message.artifact_id] = message
        return True


class Rig:
    """Caches over a fake engine in virtual time, pool `p` of region `r`."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.engine.put(Pool("p", region="r", trusted_network=True))
        self.clock = LoopClock()
        self.alarms = EdgeAlarms()
        self.notes: list[Logged] = []
        self.registrar = FakeRegistrar()
        self.made: list[FakeCache] = []
        self.caches = self.new_leader()
        self.upkeep = asyncio.create_task(self.caches.upkeep())

    def new_leader(self) -> CacheSessions:
        return CacheSessions(
            self.engine,
            self.registrar,
            secret=b"s" * 32,
            clock=self.clock,
            alarms=self.alarms,
            note=self.notes.append,
        )

    def model(self, artifact_id: str, state: ModelState = ModelState.REGISTERED, **more: object) -> Model:
        name = f"t/{artifact_id[0]}"
        before = self.engine.view.models.get(name)
        uri = f"s3://{artifact_id[0]}/m"
        made = Model(name, "model", uri, state, bytes=SIZE, files=1, artifact_id=artifact_id, **more)  # type: ignore[arg-type]
        assert before is None or before.artifact_id == artifact_id
        self.engine.put(made)
        self.engine.emit(ModelChanged(name))
        return made

    def cache(self, node_id: str, *, pool: str = "p", endpoints: bool = True, disk: int = 1 << 40) -> FakeCache:
        if node_id not in self.engine.view.nodes:
            self.engine.put(Node(node_id, f"name-{node_id}", pool))
        made = FakeCache(lambda *args: self.caches.run(*args), node_id, endpoints=endpoints, disk=disk)
        self.made.append(made)
        return made

    async def close(self) -> None:
        self.upkeep.cancel()
        self.caches.close(FalError(Code.NOT_LEADER, "over", remedy="Wait."))
        tasks = [x.task for x in self.made if x.task is not None]
        await asyncio.gather(self.upkeep, *tasks, return_exceptions=True)


def cache_test(test: Callable[[Rig], Awaitable[None]]) -> None:
    async def body() -> None:
        rig = Rig()
        try:
            await test(rig)
        finally:
            await rig.close()

    run_virtually(body())


async def ended(cache: FakeCache) -> FalError:
    assert cache.task is not None
    with pytest.raises(FalError) as caught:
        await asyncio.wait_for(cache.task, 60)
    return caught.value


# --- hello -----------------------------------------------------------------------------------------------------------


def test_welcome_tells_keys_place_and_room() -> None:
    async def body(rig: Rig) -> None:
        rig.engine.put(Pool("q", region="eu", zone="eu-1", cache_bytes=77))
        cache = rig.cache("n1", pool="q").dial()
        await cache.until(lambda: cache.wishes is not None)
        welcome = cache.welcome
        assert welcome is not None
        assert cache.messages[0].WhichOneof("kind") == "welcome"
        assert (welcome.pool, welcome.region, welcome.zone, welcome.disk_bytes_max) == ("q", "eu", "eu-1", 77)
        assert not welcome.trusted_network
        assert welcome.term == rig.engine.view.term
        assert tuple(welcome.ticket_keys) == TicketOffice(b"s" * 32).keys("n1", rig.clock.wall_s())
        assert cache.wished() == {}

    cache_test(body)


def test_a_hello_with_anothers_name_or_none_at_all_is_refused() -> None:
    async def body(rig: Rig) -> None:
        assert (await ended(rig.cache("n1").dial(node_id="n2"))).code is Code.PERMISSION_DENIED
        silent = rig.cache("n1")
        silent.task = asyncio.create_task(rig.caches.run("n1", silent._incoming(silent._up), silent._receive))
        assert (await ended(silent)).code is Code.TIMEOUT
        early = rig.cache("n1")
        early.report()
        early.task = asyncio.create_task(rig.caches.run("n1", early._incoming(early._up), early._receive))
        assert (await ended(early)).field == "kind"
        rig.engine.put(Node("n3", "x", "p", revoked=True))
        assert (await ended(rig.cache("n3").dial())).code is Code.PERMISSION_DENIED
        assert (await ended(rig.cache("n1").dial(holding("../x", 5)))).field == "artifact_id"
        twice = rig.cache("n1").dial()
        twice.say(weights_pb2.CacheUp(hello=weights_pb2.CacheHello(node_id="n1")))
        assert (await ended(twice)).field == "hello"

    cache_test(body)


def test_a_newer_session_takes_the_place_of_an_older_one_and_its_facts() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        old = rig.cache("n1").dial(holding(A, SIZE), holding(B, SIZE))
        await old.until(lambda: old.wishes is not None)
        new = rig.cache("n1").dial(holding(B, SIZE))
        assert (await ended(old)).code is Code.UNAVAILABLE
        await new.until(lambda: new.wishes is not None)
        assert rig.caches.counts(A).nodes_ready == 0
        assert rig.caches.counts(B).nodes_ready == 1
        assert rig.caches.connected("n1")

    cache_test(body)


def test_a_cache_that_takes_nothing_is_cut_and_the_queue_is_bounded() -> None:
    async def body(rig: Rig) -> None:
        slow = rig.cache("n1").dial(holding(A, SIZE))
        await slow.until(lambda: slow.wishes is not None)
        slow.hold()
        assert rig.caches.verify(A, ["n1", "n9"]) == ["n1"]
        error = await ended(slow)  # the send takes too long
        assert error.code is Code.UNAVAILABLE
        assert "too slowly" in error.what
        other = rig.cache("n1").dial(holding(A, SIZE))
        await other.until(lambda: other.wishes is not None)
        other.hold()
        told = [bool(rig.caches.verify(A, ["n1"])) for _ in range(1200)]
        assert sum(told) == 1024  # STREAM_QUEUE_MESSAGES_MAX
        assert (await ended(other)).code is Code.UNAVAILABLE

    cache_test(body)


def test_a_silent_node_counts_for_a_minute_and_is_forgotten_then() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        cache = rig.cache("n1").dial(holding(A, SIZE))
        await cache.until(lambda: cache.wishes is not None)
        await cache.hang_up()
        await asyncio.sleep(50)
        node = rig.caches.table.node("n1")
        assert node is not None
        assert node.stale
        assert rig.caches.counts(A).nodes_ready == 1
        await asyncio.sleep(20)
        assert rig.caches.table.node("n1") is None
        assert rig.caches.counts(A).nodes_ready == 0

    cache_test(body)


# --- what artifacts stand for ----------------------------------------------------------------------------------------


def test_revocation_reaches_nodes_at_once_and_those_that_were_off_at_hello() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        here, empty = rig.cache("n1").dial(wanting(A, SIZE)), rig.cache("n2").dial()
        await here.until(lambda: here.wishes is not None)
        await empty.until(lambda: empty.wishes is not None)
        rig.model(A, ModelState.REVOKED, reason="the licence ended")
        for cache in (here, empty):
            await cache.until(lambda cache=cache: A in cache.drops)
            assert cache.drops[A].revoked
            assert "the licence ended" in cache.drops[A].reason
        late = rig.cache("n3").dial(holding(A, SIZE, manifest_digest=DIGEST))
        await late.until(lambda: A in late.drops)
        assert late.drops[A].revoked
        before = len(late.messages)
        late.report(holding(A, SIZE))  # it is not told again and again
        late.report(holding(B, SIZE))
        await asyncio.sleep(5)
        assert [m.WhichOneof("kind") for m in late.messages[before:]].count("drop") == 0
        await asyncio.sleep(120)  # but now and then, while it is still there
        assert [m.WhichOneof("kind") for m in late.messages[before:]].count("drop") >= 1

    cache_test(body)


def test_an_artifact_that_another_model_may_use_stays_and_a_refused_one_is_only_evicted() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A, ModelState.REVOKED, reason="gone")
        rig.engine.put(Model("u/other", "model", "s3://a/m", bytes=SIZE, artifact_id=A))
        rig.model(B, ModelState.REFUSED, reason="bad bytes")
        cache = rig.cache("n1").dial(wanting(A, SIZE), wanting(B, SIZE), wanting(C, SIZE))
        await cache.until(lambda: B in cache.drops)
        assert not cache.drops[B].revoked
        assert "bad bytes" in cache.drops[B].reason
        await asyncio.sleep(5)
        assert set(cache.drops) == {B}

    cache_test(body)


def test_attestation_reaches_those_who_have_it_small_ones_inline() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        cache = rig.cache("n1").dial(wanting(A, SIZE))
        other = rig.cache("n2").dial(holding(A, SIZE, manifest_digest=DIGEST))
        await cache.until(lambda: cache.wishes is not None)
        file = state_pb2.ModelFile(path="w", bytes=SIZE, sha256=b"1" * 32, blake3=b"2" * 32)
        rig.registrar.manifests[A] = state_pb2.ModelManifest(artifact_id=A, files=[file], signature=b"s")
        rig.model(A, ModelState.ATTESTED, manifest_digest=DIGEST)
        await cache.until(lambda: A in cache.attested)
        assert len(cache.attested[A].files) == 1
        late = rig.cache("n3").dial(wanting(A, SIZE))
        await late.until(lambda: A in late.attested)
        late.report(wanting(A, SIZE, 10))
        await asyncio.sleep(2)
        assert sum(1 for m in late.messages if m.WhichOneof("kind") == "attested") == 1
        assert other.attested == {}  # it knows
        big = state_pb2.ModelFile(path="w", bytes=SIZE, sha256=b"1" * 32, blake3=b"2" * (2 << 20))
        rig.registrar.manifests[A] = state_pb2.ModelManifest(artifact_id=A, files=[big], signature=b"s")
        huge = rig.cache("n4").dial(wanting(A, SIZE))
        await huge.until(lambda: A in huge.attested)
        assert not huge.attested[A].files
        assert huge.attested[A].signature == b"s"

    cache_test(body)


def test_a_lost_manifest_is_asked_of_who_has_it_and_then_told() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A, ModelState.ATTESTED, manifest_digest=DIGEST)
        waiting = rig.cache("n1").dial(wanting(A, SIZE))
        owner = rig.cache("n2").dial(holding(A, SIZE, manifest_digest=DIGEST))
        nobody = rig.cache("n3").dial()
        for cache in (waiting, owner, nobody):
            await cache.until(lambda cache=cache: cache.wishes is not None)
        rig.caches.want_manifest(A)
        await owner.until(lambda: owner.manifests_wanted == [A])
        assert waiting.attested == {}
        manifest = state_pb2.ModelManifest(artifact_id=A, signature=b"s")
        owner.say(weights_pb2.CacheUp(manifest=manifest))
        await waiting.until(lambda: A in waiting.attested)
        assert nobody.manifests_wanted == []
        rig.registrar.wanted = (B,)
        late = rig.cache("n4").dial(manifests=[B])
        await late.until(lambda: late.manifests_wanted == [B])

    cache_test(body)


def test_claims_and_attestations_go_to_the_registrar_under_the_streams_name() -> None:
    async def body(rig: Rig) -> None:
        cache = rig.cache("n1").dial()
        cache.say(weights_pb2.CacheUp(claims=weights_pb2.PieceClaims(artifact_id=A)))
        cache.say(weights_pb2.CacheUp(attestation=weights_pb2.Attestation(artifact_id=A, failure="other bytes")))
        await cache.until(lambda: bool(rig.registrar.attestations) or cache.wishes is not None)
        await asyncio.sleep(1)
        assert [(n, c.artifact_id) for n, c in rig.registrar.claims] == [("n1", A)]
        assert rig.registrar.attestations[0][1].failure == "other bytes"

    cache_test(body)


def test_events_of_a_node_are_told_once_a_minute() -> None:
    async def body(rig: Rig) -> None:
        cache = rig.cache("n1").dial()
        event = weights_pb2.CacheEvent(kind="BAD_PEER", subject="n2", message="x" * 2000, at_s=5.0)
        for _ in range(10):
            cache.report(events=[event] * 50)
        await asyncio.sleep(1)
        assert [(e.kind, e.subject, e.actor) for e in rig.notes] == [("BAD_PEER", "n2", "node/n1")]
        assert len(rig.notes[0].message) == 500
        await asyncio.sleep(61)
        cache.report(events=[event])
        await asyncio.sleep(1)
        assert len(rig.notes) == 2

    cache_test(body)


def test_the_last_copy_is_told_to_its_holder_and_taken_back() -> None:
    async def body(rig: Rig) -> None:
        one, two = rig.cache("n1").dial(holding(A, SIZE)), rig.cache("n2").dial(holding(B, SIZE))
        await one.until(lambda: one.last_copies == [A])
        two.report(holding(A, SIZE))
        await one.until(lambda: one.last_copies == [])
        await two.until(lambda: two.last_copies == [B])
        two.report(gone=[A])
        await one.until(lambda: one.last_copies == [A])
        for _ in range(50):  # a burst is one word
            two.report(holding(A, SIZE))
            two.report(gone=[A])
        before = len(one.messages)
        await asyncio.sleep(10)
        assert len(one.messages) - before <= 2
        assert one.last_copies == [A]

    cache_test(body)


# --- wishes ----------------------------------------------------------------------------------------------------------


def _healthy(rig: Rig, node_id: str, health: Health = Health.READY) -> None:
    rig.engine.view.live[node_id] = NodeLive(node_id, health=health)
    rig.engine.emit(NodeChanged(node_id))


def _wish(rig: Rig, target: str, **more: object) -> None:
    rig.engine.put(Wish("t/a", target, **more))  # type: ignore[arg-type]
    rig.engine.emit(WishesChanged("t/a"))


def test_a_wish_ends_by_itself_and_a_small_manifest_comes_with_it() -> None:
    async def body(rig: Rig) -> None:
        rig.registrar.manifests[A] = state_pb2.ModelManifest(artifact_id=A, piece_bytes=7)
        rig.model(A)
        cache = rig.cache("n1").dial()
        end_s = rig.clock.wall_s() + 100
        _wish(rig, "pool/p", expires_at_s=end_s)
        await cache.until(lambda: cache.wished() == {A: "disk"})
        assert cache.wishes is not None
        assert cache.wishes.wishes[0].artifact.manifest.piece_bytes == 7
        revision = cache.wishes.revision
        _wish(rig, "node/n1", expires_at_s=end_s + 100, tier="memory")
        await cache.until(lambda: cache.wished() == {A: "memory"})
        assert cache.wishes.wishes[0].expires_at_s == end_s + 100
        assert cache.wishes.revision > revision
        await asyncio.sleep(150)
        assert cache.wished() == {A: "memory"}
        await asyncio.sleep(60)
        assert cache.wished() == {}

    cache_test(body)


def test_a_replica_of_a_lost_node_is_brought_elsewhere_and_a_withdrawn_model_nowhere() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        caches = [rig.cache(f"n{i}").dial() for i in range(4)]
        for cache in caches:
            _healthy(rig, cache.node_id)
        _wish(rig, "replicas", replicas=2)
        chosen: list[FakeCache] = []
        async with asyncio.timeout(30):
            while len(chosen) != 2:
                await asyncio.sleep(1)
                chosen = [cache for cache in caches if cache.wished()]
        for cache in chosen:
            cache.report(wanting(A, SIZE, 10))
        gone, stays = chosen
        await gone.hang_up()
        await asyncio.sleep(30)
        assert sum(bool(cache.wished()) for cache in caches) == 2  # silent, not lost
        _healthy(rig, gone.node_id, Health.LOST)
        await asyncio.sleep(5)
        now = [cache for cache in caches if cache.wished() and cache is not gone]
        assert len(now) == 2
        assert stays in now
        rig.model(A, ModelState.REVOKED, reason="over")
        for cache in now:
            await cache.until(lambda cache=cache: cache.wished() == {})

    cache_test(body)


def test_a_new_leader_waits_for_its_caches_before_it_chooses_replicas_anew() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        one, two = rig.cache("n1"), rig.cache("n2")
        _healthy(rig, "n1")
        _healthy(rig, "n2")
        one.dial()
        _wish(rig, "replicas", replicas=1)
        await asyncio.sleep(10)
        assert one.wished() == {}  # n2 may well have it
        two.dial(holding(A, SIZE))
        await two.until(lambda: two.wished() == {A: "disk"})
        await asyncio.sleep(60)
        assert one.wished() == {}

    cache_test(body)


# --- swarms ----------------------------------------------------------------------------------------------------------


def test_who_fetches_alone_is_told_to_read_the_origin() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        alone = rig.cache("n0").dial(wanting(A, SIZE))
        await alone.until(lambda: A in alone.swarms)
        told = alone.swarms[A]
        assert (told.seed, told.region_members, list(told.members)) == (True, 1, [])
        second = rig.cache("n1").dial(wanting(A, SIZE))
        await second.until(lambda: set(second.neighbours(A)) == {"n0"})
        await alone.until(lambda: set(alone.neighbours(A)) == {"n1"})

    cache_test(body)


def test_who_fetches_is_told_its_neighbours_with_tickets_that_pass_there_only() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        caches = [rig.cache(f"n{i}").dial(wanting(A, SIZE)) for i in range(3)]
        for cache in caches:
            await cache.until(lambda cache=cache: len(cache.neighbours(A)) == 2)
        office, now_s = TicketOffice(b"s" * 32), rig.clock.wall_s()
        members = caches[0].neighbours(A)
        assert set(members) == {"n1", "n2"}
        assert not members["n1"].tls
        assert members["n1"].endpoints[0].host == "n1.test"
        for server in ("n1", "n2"):
            keys = office.keys(server, now_s)
            ticket = members["n1"].ticket
            why = check_ticket(keys, ticket, caller="n0", artifact_id=A, now_s=now_s)
            assert (why == "") == (server == "n1")
        assert check_ticket(office.keys("n1", now_s), members["n1"].ticket, caller="n2", artifact_id=A, now_s=now_s)
        assert members["n1"].ticket_expires_s <= now_s + TICKET_TTL_S
        assert caches[0].swarms[A].region_members == 3

    cache_test(body)


def test_a_new_leader_makes_the_same_keys_and_higher_revisions() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        one, two = (rig.cache(f"n{i}").dial(wanting(A, SIZE)) for i in range(2))
        await one.until(lambda: "n1" in one.neighbours(A))
        first = one.neighbours(A)["n1"]
        revision = one.swarms[A].revision
        rig.caches.close(FalError(Code.NOT_LEADER, "over", remedy="Wait."))
        await ended(one)
        await ended(two)
        rig.engine.view.term += 1
        rig.upkeep.cancel()
        rig.caches = rig.new_leader()
        rig.upkeep = asyncio.create_task(rig.caches.upkeep())
        one.swarms.clear()
        one.dial(wanting(A, SIZE))
        two.dial(wanting(A, SIZE))
        await one.until(lambda: "n1" in one.neighbours(A))
        assert one.swarms[A].revision > revision
        keys = TicketOffice(b"s" * 32).keys("n1", rig.clock.wall_s())
        for ticket in (first.ticket, one.neighbours(A)["n1"].ticket):
            assert check_ticket(keys, ticket, caller="n0", artifact_id=A, now_s=rig.clock.wall_s()) == ""

    cache_test(body)


def test_tickets_are_made_anew_at_half_their_life_and_keys_at_midnight() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        one, _two = (rig.cache(f"n{i}").dial(wanting(A, SIZE)) for i in range(2))
        await one.until(lambda: "n1" in one.neighbours(A))
        first = one.neighbours(A)["n1"].ticket_expires_s
        await asyncio.sleep(TICKET_TTL_S * 0.6)
        assert one.neighbours(A)["n1"].ticket_expires_s > first
        assert sum(1 for m in one.messages if m.WhichOneof("kind") == "swarm") <= 3
        welcome = one.welcome
        await asyncio.sleep(86400)
        assert one.welcome is not None
        assert welcome is not None
        assert one.welcome.ticket_keys[0] == welcome.ticket_keys[1]

    cache_test(body)


def test_a_finished_node_is_told_only_of_those_that_cannot_dial_it() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        seed = rig.cache("n0").dial(holding(A, SIZE))
        shut = rig.cache("n1", endpoints=False).dial(holding(A, SIZE))
        fetch = rig.cache("n2").dial(wanting(A, SIZE))
        await fetch.until(lambda: len(fetch.neighbours(A)) == 2)
        await shut.until(lambda: set(shut.neighbours(A)) == {"n2"})  # nobody can dial it, so it dials
        assert not fetch.neighbours(A)["n1"].endpoints
        assert fetch.neighbours(A)["n0"].complete
        await asyncio.sleep(5)
        assert A not in seed.swarms
        fetch.unreachable("n0")
        await seed.until(lambda: set(seed.neighbours(A)) == {"n2"})
        assert seed.neighbours(A)["n2"].endpoints

    cache_test(body)


def test_an_address_that_changes_reaches_the_neighbours() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        one, two, seed = (rig.cache(f"n{i}").dial(wanting(A, SIZE)) for i in range(3))
        await one.until(lambda: len(one.neighbours(A)) == 2)
        moved = agent_pb2.Endpoint(network="lan", host="elsewhere.test", port=7448)
        two.dial(wanting(A, SIZE), endpoints=[moved])
        await one.until(lambda: one.neighbours(A)["n1"].endpoints[0].host == "elsewhere.test")
        seed.report(holding(A, SIZE))
        await asyncio.sleep(2)
        seed.dial(holding(A, SIZE), endpoints=[moved])  # who fetches is told where a finished one is now, too
        await one.until(lambda: one.neighbours(A)["n2"].endpoints[0].host == "elsewhere.test")
        assert one.neighbours(A)["n2"].complete

    cache_test(body)


def test_pools_that_share_no_network_do_not_dial_and_others_use_tls() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        rig.engine.put(Pool("east", region="e", networks=("lan",)))
        rig.engine.put(Pool("west", region="w", networks=("wan",)))
        rig.engine.put(Pool("both", region="w", networks=("wan", "lan"), trusted_network=True))
        east, west = rig.cache("n1", pool="east").dial(wanting(A, SIZE)), rig.cache("n2", pool="west")
        west.dial(wanting(A, SIZE))
        both = rig.cache("n3", pool="both").dial(wanting(A, SIZE))
        await east.until(lambda: len(east.neighbours(A)) == 2)
        await both.until(lambda: len(both.neighbours(A)) == 2)
        assert not east.neighbours(A)["n2"].endpoints
        assert east.neighbours(A)["n3"].endpoints
        assert east.neighbours(A)["n3"].tls

    cache_test(body)


def test_unregistered_and_withdrawn_artifacts_have_no_swarm() -> None:
    async def body(rig: Rig) -> None:
        one, _two = (rig.cache(f"n{i}").dial(wanting(A, SIZE), wanting(B, SIZE)) for i in range(2))
        rig.model(B, ModelState.REFUSED, reason="bad")
        await asyncio.sleep(5)
        assert one.swarms == {}
        assert rig.caches.statistics()["swarms"] == 0
        rig.model(A)
        await one.until(lambda: "n1" in one.neighbours(A))
        rig.model(A, ModelState.REVOKED, reason="x")
        await one.until(lambda: A in one.drops)
        assert rig.caches.statistics()["swarms"] == 0

    cache_test(body)


def test_of_a_large_swarm_only_the_neighbours_of_a_change_are_told(scale: Callable[[int], int]) -> None:
    count = max(scale(1000), 150)

    async def body(rig: Rig) -> None:
        rig.model(A)
        caches = [rig.cache(f"n{i:04}").dial(wanting(A, SIZE)) for i in range(count)]
        for cache in caches:
            await cache.until(lambda cache=cache: A in cache.swarms)
        await asyncio.sleep(30)
        for cache in caches:
            names = set(cache.neighbours(A))
            assert names == {x.node_id for x in rig.caches.swarms.neighbours(cache.node_id, A)}
        before = [len(cache.messages) for cache in caches]
        late = rig.cache("n-late").dial(wanting(A, SIZE))
        await late.until(lambda: A in late.swarms)
        await asyncio.sleep(10)
        told = sum(1 for cache, had in zip(caches, before, strict=True) if len(cache.messages) > had)
        assert 0 < told < count // 2
        before = [len(cache.messages) for cache in caches]
        caches[7].report(holding(A, SIZE))  # finished: no word for anybody but, perhaps, new seeds
        await asyncio.sleep(10)
        assert sum(1 for c, had in zip(caches, before, strict=True) if len(c.messages) > had) < count // 2
        caches[8].report(gone=[A])
        await asyncio.sleep(10)
        assert all("n0008" not in cache.neighbours(A) for cache in caches)

    cache_test(body)


def test_a_revoked_node_leaves_the_swarm_and_its_stream_ends() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        one, two = (rig.cache(f"n{i}").dial(wanting(A, SIZE)) for i in range(2))
        await one.until(lambda: "n1" in one.neighbours(A))
        rig.engine.put(Node("n1", "name-n1", "p", revoked=True))
        rig.engine.emit(NodeChanged("n1"))
        assert (await ended(two)).code is Code.UNAUTHENTICATED
        await one.until(lambda: one.neighbours(A) == {})

    cache_test(body)


def test_reports_of_status_and_a_flood_of_artifacts_are_taken_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fal_scheduler.core.residency.CACHED_ARTIFACTS_PER_NODE_MAX", 2)

    async def body(rig: Rig) -> None:
        cache = rig.cache("n1").dial(*[holding(f"{i:064x}", 1) for i in range(5)])
        await cache.until(lambda: cache.wishes is not None)
        assert len(rig.caches.table) == 2
        assert [alarm.kind for alarm in rig.alarms.all()] == ["CACHE_FACTS"]
        cache.report(status=fsd_pb2.CacheStatus(disk_bytes_max=9, disk_bytes_used=4, capabilities={"fuse": "yes"}))
        await asyncio.sleep(1)
        node = rig.caches.table.node("n1")
        assert node is not None
        assert (node.room.disk_bytes_max, node.capabilities) == (9, {"fuse": "yes"})

    cache_test(body)


def test_a_cache_that_lies_about_its_peers_fills_no_memory() -> None:
    async def body(rig: Rig) -> None:
        rig.model(A)
        rig.cache("n0").dial(holding(A, SIZE))
        liar = rig.cache("n1").dial(wanting(A, SIZE))
        await liar.until(lambda: liar.neighbours(A))
        status = fsd_pb2.CacheStatus(capabilities={f"{n:05}": "x" * 1000 for n in range(1000)})
        liar.report(unreachable=["n0", *(f"made-up-{n}" for n in range(10_000))], unreachable_told=True, status=status)
        await asyncio.sleep(1)
        told = rig.caches.table.node("n1")
        assert told is not None
        assert told.unreachable == {"n0"}
        assert sum(map(len, told.capabilities.values())) < 10_000

    cache_test(body)
