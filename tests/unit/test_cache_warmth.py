"""Automatic wishes and values reach caches: by value, within the memory, beside operators' wishes, after a failover."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fake_cache import FakeCache, NoManifests, holding
from fake_engine import FakeEngine
from fal_contract.errors import Code, FalError
from fal_contract.limits import FAILOVER_GRACE_S, STAGE_AHEAD_KEPT_S, VALUES_EVERY_S, WARM_LOOK_S
from fal_contract.v1 import fsd_pb2
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.cache_sessions import CacheSessions
from fal_scheduler.core.cache_events import CacheTold
from fal_scheduler.core.events import News, WishesChanged
from fal_scheduler.core.forecast import Arrivals
from fal_scheduler.core.records import App, Model, ModelState, Node, Pool, Revision, Spec, Wish
from fal_scheduler.core.told import Capabilities, Health, Inventory, NodeLive
from virtual_time import LoopClock, run_virtually

GIB = 1 << 30
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


class Engine(FakeEngine):
    """One that takes what caches told into its State."""

    def offer(self, event: News) -> None:
        super().offer(event)
        if isinstance(event, CacheTold):
            self.view.cache_facts.take(event)


class Rig:
    """A leader's caches in virtual time; an app for each model, without GPUs. `values`: what caches were told last."""

    def __init__(self) -> None:
        self.engine, self.clock, self.made = Engine(), LoopClock(), list[FakeCache]()
        self.engine.put(Pool("p"))
        self.engine.view.term_began_s = -FAILOVER_GRACE_S
        self.caches = self.leader()
        self.upkeep = asyncio.create_task(self.caches.upkeep())

    def leader(self) -> CacheSessions:
        return CacheSessions(
            self.engine,
            NoManifests(),
            secret=b"s" * 32,
            clock=self.clock,
            alarms=EdgeAlarms(),
            note=lambda event: None,
        )

    def app(self, artifact: str, gib: int, per_minute: int) -> None:
        """An app `t/x` that needs the model `t/x`, asked for so often in the last minutes."""
        name = f"t/{artifact[0]}"
        self.engine.put(
            Model(
                name, "model", f"s3://x/{name}", ModelState.REGISTERED, bytes=gib * GIB, files=1, artifact_id=artifact
            )
        )
        self.engine.put(Revision(name, 1, Spec("host", command=("true",), model=name), "1"))
        self.engine.put(App(name, 1))
        self.rate(artifact, per_minute)

    def rate(self, artifact: str, per_minute: int) -> None:
        """Asked for so often from now on, as far as was seen."""
        arrivals = self.engine.view.demand.arrivals[f"t/{artifact[0]}"] = Arrivals()
        wall_s = self.clock.wall_s()
        for minute in range(10, 0, -1):
            arrivals.note(per_minute, wall_s - 60 * minute)

    def cache(self, node_id: str, *artifacts: fsd_pb2.CachedArtifact, memory_gib: int = 0, disk_gib: int = 1000) -> Any:
        """A ready node and its cache."""
        state = self.engine.view
        self.engine.put(Node(node_id, f"name-{node_id}", "p"))
        inventory = Inventory(cpu_milli=8000, memory_bytes=64 * GIB)
        state.live[node_id] = NodeLive(
            node_id, health=Health.READY, inventory=inventory, capabilities=Capabilities(driver="process")
        )
        state.refresh_node(node_id)
        made = FakeCache(lambda *args: self.caches.run(*args), node_id)
        self.made.append(made)
        status = fsd_pb2.CacheStatus(
            disk_bytes_max=disk_gib * GIB,
            disk_bytes_used=sum(one.bytes_disk for one in artifacts),
            memory_bytes_max=memory_gib * GIB,
        )
        return made.dial(*artifacts, status=status)

    def wish(self, artifact: str, target: str, **more: Any) -> None:
        self.engine.put(Wish(f"t/{artifact[0]}", target, **more))
        self.engine.emit(WishesChanged(f"t/{artifact[0]}"))

    async def looked(self) -> None:
        """Some time later, nothing more to tell."""
        await asyncio.sleep(2 * WARM_LOOK_S + 1)

    async def close(self) -> None:
        self.upkeep.cancel()
        self.caches.close(FalError(Code.NOT_LEADER, "over", remedy="Wait."))
        tasks = [one.task for one in self.made if one.task is not None]
        await asyncio.gather(self.upkeep, *tasks, return_exceptions=True)


def warmth_test(test: Callable[[Rig], Awaitable[None]]) -> None:
    async def body() -> None:
        rig = Rig()
        try:
            await test(rig)
        finally:
            await rig.close()

    run_virtually(body())


def have(artifact: str, gib: int, **more: Any) -> fsd_pb2.CachedArtifact:
    return holding(artifact, gib * GIB, **more)


def values_of(cache: FakeCache) -> dict[str, int]:
    told = [one.values for one in cache.messages if one.WhichOneof("kind") == "values"]
    return dict(told[-1].values) if told else {}


def test_the_most_valuable_models_are_wished_into_memory_and_follow_what_is_asked_for() -> None:
    async def body(rig: Rig) -> None:
        for artifact, rate in ((A, 5), (B, 50), (C, 20)):
            rig.app(artifact, 10, rate)
        cache = rig.cache("n1", have(A, 10), have(B, 10), have(C, 10), memory_gib=25)
        await cache.until(lambda: cache.wished() == {B: "memory", C: "memory"}, timeout_s=100)
        rig.rate(C, 6)  # A is worth less than a fifth less now, and stays out
        rig.rate(A, 7)
        await rig.looked()
        assert cache.wished() == {B: "memory", C: "memory"}
        rig.rate(A, 90)
        await cache.until(lambda: cache.wished() == {A: "memory", B: "memory"}, timeout_s=100)
        assert rig.caches.statistics()["warm_memory"] == 2
        for artifact in (A, B, C):
            del rig.engine.view.demand.arrivals[f"t/{artifact[0]}"]  # nobody asks any more
        await cache.until(lambda: not cache.wished(), timeout_s=100)

    warmth_test(body)


def test_operators_wishes_come_first_and_what_runners_locked_counts() -> None:
    async def body(rig: Rig) -> None:
        rig.app(A, 10, 50)
        rig.app(B, 10, 0)
        rig.app(C, 10, 20)
        rig.wish(B, "node/n1", tier="memory")
        cache = rig.cache("n1", have(A, 10), have(B, 10), have(C, 10), memory_gib=25)
        await cache.until(lambda: cache.wished() == {A: "memory", B: "memory"}, timeout_s=100)
        await rig.looked()
        assert cache.wished() == {A: "memory", B: "memory"}  # for C there is no room beside the operator's
        cache.report(have("d" * 64, 10, bytes_memory=10 * GIB))  # a runner's
        await cache.until(lambda: cache.wished() == {B: "memory"}, timeout_s=100)

    warmth_test(body)


def test_without_memory_or_on_no_disk_nothing_is_wished() -> None:
    async def body(rig: Rig) -> None:
        rig.app(A, 10, 50)
        none = rig.cache("n1", have(A, 10))
        some = rig.cache("n2", memory_gib=100, disk_gib=0)  # where not even staging has room
        await rig.looked()
        assert none.wished() == some.wished() == {}

    warmth_test(body)


def test_what_a_forecast_expects_is_staged_once_and_let_go_of_by_itself() -> None:
    async def body(rig: Rig) -> None:
        rig.app(A, 10, 50)
        caches = [rig.cache(f"n{at}") for at in range(3)]
        await rig.looked()
        staged = [one for one in caches if one.wished() == {A: "disk"}]
        assert len(staged) == 1
        assert [one.wished() for one in caches].count({}) == 2
        cache = staged[0]
        ends_s = cache.wishes.wishes[0].expires_at_s
        assert 0 < ends_s - rig.clock.wall_s() <= STAGE_AHEAD_KEPT_S
        cache.report(have(A, 10))
        del rig.engine.view.demand.arrivals["t/a"]
        await cache.until(lambda: cache.wished() == {}, timeout_s=STAGE_AHEAD_KEPT_S + 2 * WARM_LOOK_S)
        assert rig.clock.wall_s() >= ends_s

    warmth_test(body)


def test_nothing_is_staged_ahead_onto_a_disk_that_has_no_room_for_it_or_for_what_is_asked_for_seldom() -> None:
    async def body(rig: Rig) -> None:
        rig.app(A, 10, 50)
        full = rig.cache("n1", have(B, 35), disk_gib=40)
        rig.app(B, 35, 40)  # nearly as often, so it is not displaced
        rig.app(C, 10, 0)
        await rig.looked()
        assert full.wished() == {}
        rig.rate(B, 1)
        await full.until(lambda: full.wished() == {A: "disk"}, timeout_s=100)

    warmth_test(body)


def test_caches_are_told_what_their_artifacts_are_worth() -> None:
    async def body(rig: Rig) -> None:
        rig.app(A, 10, 50)
        rig.app(B, 10, 1)
        one, two = rig.cache("n1", have(A, 10), have(B, 10), have(C, 10)), rig.cache("n2", have(A, 10))
        await one.until(lambda: bool(values_of(one)), timeout_s=2 * VALUES_EVERY_S)
        worth = values_of(one)
        assert worth.keys() == {A, B}  # nobody uses C: the cache judges by itself
        assert worth[A] > worth[B] > 0
        await two.until(lambda: values_of(two).keys() == {A}, timeout_s=2 * VALUES_EVERY_S)
        rig.rate(B, 5000)
        await one.until(lambda: values_of(one).get(B, 0) > worth[A], timeout_s=2 * VALUES_EVERY_S)
        del rig.engine.view.demand.arrivals["t/a"], rig.engine.view.demand.arrivals["t/b"]
        await one.until(lambda: not values_of(one), timeout_s=2 * VALUES_EVERY_S)
        count = len(one.messages)
        await asyncio.sleep(2 * VALUES_EVERY_S)
        assert "values" not in [message.WhichOneof("kind") for message in one.messages[count:]]

    warmth_test(body)


def test_a_new_leader_takes_nothing_away_in_its_first_time() -> None:
    async def body(rig: Rig) -> None:
        rig.engine.view.term_began_s = rig.clock.monotonic_s()
        rig.app(A, 10, 0)
        rig.app(B, 10, 50)
        rig.app(C, 10, 0)
        cache = rig.cache(
            "n1",
            have(A, 10, bytes_memory=10 * GIB, pinned_by=["wish"]),
            have(B, 10),
            have(C, 10, pinned_by=["wish"]),
            memory_gib=15,
        )
        await cache.until(lambda: cache.wishes is not None)
        assert cache.wished() == {A: "memory", C: "disk"}  # with the first word already
        await asyncio.sleep(FAILOVER_GRACE_S - 2 * WARM_LOOK_S)
        assert cache.wished() == {A: "memory", C: "disk"}
        rig.rate(B, 50)
        await cache.until(lambda: cache.wished() == {B: "memory"}, timeout_s=5 * WARM_LOOK_S)
        assert rig.clock.monotonic_s() >= FAILOVER_GRACE_S

    warmth_test(body)
