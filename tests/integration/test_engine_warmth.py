"""From arrivals to caches over a real engine: staged ahead, into memory, another leader; nothing of it is stored."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from core_world import spec_of
from engine_rig import Rig
from fake_cache import FakeCache, NoManifests, holding
from fal_contract.errors import Code, FalError
from fal_contract.limits import FAILOVER_GRACE_S, WARM_LOOK_S
from fal_contract.v1 import fsd_pb2
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.cache_sessions import CacheSessions
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.events import ApplyApp
from fal_scheduler.core.model_events import AddModel
from fal_scheduler.core.records import Model, ModelState
from virtual_time import run_virtually

GIB = 1 << 30
A = "a" * 64
NODES = ("n-0", "n-1")


class Caches:
    """An engine's caches, with two nodes that have 20 GiB of memory each to lock."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.sessions = CacheSessions(
            rig.engine,
            NoManifests(),
            secret=b"s" * 32,
            clock=rig.clock,
            alarms=EdgeAlarms(),
            note=lambda event: None,
        )
        self.upkeep = asyncio.create_task(self.sessions.upkeep())
        self.made = {node_id: FakeCache(self.sessions.run, node_id) for node_id in NODES}

    def dial(self, node_id: str, *artifacts: fsd_pb2.CachedArtifact) -> None:
        status = fsd_pb2.CacheStatus(disk_bytes_max=1000 * GIB, memory_bytes_max=20 * GIB)
        self.made[node_id].dial(*artifacts, status=status)

    def wished(self) -> dict[str, dict[str, str]]:
        return {node_id: wished for node_id, cache in self.made.items() if (wished := cache.wished())}

    async def minutes(self, count: int, *, arrived: int = 0) -> None:
        """Time passes; so many requests come in each minute and are served at once."""
        for _ in range(count):
            demands = (AppDemand("default/m", arrived=arrived),) if arrived else ()
            self.rig.engine.offer(DemandTold("g", demands, self.rig.clock.monotonic_s()))
            for _ in range(12):
                await asyncio.sleep(5.0)
                self.rig.heartbeat(*NODES)

    async def close(self) -> None:
        self.upkeep.cancel()
        self.sessions.close(FalError(Code.NOT_LEADER, "over", remedy="Wait."))
        tasks = [one.task for one in self.made.values() if one.task is not None]
        await asyncio.gather(self.upkeep, *tasks, return_exceptions=True)


def have(**more: Any) -> fsd_pb2.CachedArtifact:
    return holding(A, 10 * GIB, **more)


def test_what_is_asked_for_is_staged_ahead_then_kept_in_memory_by_every_leader_and_never_stored() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.found(2)
        model = Model("default/m", "model", "s3://x/m", ModelState.REGISTERED, bytes=10 * GIB, files=1, artifact_id=A)
        await rig.engine.submit(AddModel(model))
        spec, digest = spec_of(least=0)
        await rig.engine.submit(ApplyApp("default/m", replace(spec, model="default/m"), digest))
        caches = Caches(rig)
        for node_id in NODES:
            caches.dial(node_id)
        commits = rig.engine.statistics()["store_commits"]
        await caches.minutes(3)
        assert caches.wished() == {}
        await caches.minutes(4, arrived=10)  # 10 GiB at an assumed 25 MB/s are 7 minutes: a start would come too late
        [(node_id, staged)] = caches.wished().items()
        assert staged == {A: "disk"}
        caches.made[node_id].report(have(pinned_by=["wish"]))
        await caches.minutes(2, arrived=10)
        assert caches.wished() == {node_id: {A: "memory"}}
        assert rig.engine.statistics()["store_commits"] == commits
        assert not rig.engine.view.runners
        await caches.close()
        await rig.engine.stop()

        later = Rig(rig.backend)
        await later.engine.start("test")
        for other in NODES:
            await later.hello(other)
        caches = Caches(later)
        caches.dial(node_id, have(bytes_memory=10 * GIB, pinned_by=["wish"]))
        await caches.made[node_id].until(lambda: caches.made[node_id].wishes is not None)
        assert caches.wished() == {node_id: {A: "memory"}}
        began_s = later.engine.view.term_began_s
        await caches.made[node_id].until(lambda: not caches.wished(), timeout_s=2 * FAILOVER_GRACE_S)  # nobody asks
        assert FAILOVER_GRACE_S <= later.clock.monotonic_s() - began_s <= FAILOVER_GRACE_S + 2 * WARM_LOOK_S
        await caches.close()
        await later.engine.stop()

    run_virtually(main())
