"""An engine in virtual time over a memory store with faults, with nodes that say Hello and send heartbeats."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from core_world import GIB, sim_gpus, spec_of
from fal_scheduler.core import tokens
from fal_scheduler.core.events import (
    ApplyApp,
    ApplyPool,
    CreateToken,
    Effect,
    NodeHello,
    NodeReport,
    RedeemToken,
)
from fal_scheduler.core.records import Pool, RunnerState
from fal_scheduler.core.told import Inventory, RunnerStatus
from fal_scheduler.engine import Engine, EngineOptions
from fal_scheduler.store.faults import FaultStore
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from virtual_time import LoopClock


class StoppingClock(LoopClock):
    """The loop's time, and the time for which the process stood still."""

    stood_still_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.stood_still_s


class Rig:
    """An engine in virtual time over a store with faults, and nodes that say Hello and send heartbeats."""

    def __init__(self, backend: MemoryBackend | None = None, *, cluster_id: str = "c1") -> None:
        self.backend = backend or MemoryBackend()
        self.clock = StoppingClock()
        self.store = FaultStore(MemoryStore(self.backend))
        self.engine = Engine(
            self.store, clock=self.clock, rng=Random(7), options=EngineOptions(cluster_id, strict=True)
        )
        self.effects: list[Effect] = []
        self.engine.subscribe(self.effects.append)

    def clock_jump(self, seconds_s: float) -> None:
        """The process stands still for so long: the clock goes on, timers and messages wait."""
        self.clock.stood_still_s += seconds_s

    async def found(self, nodes: int, *, gpus: int = 4) -> None:
        """Start, make a pool, let nodes join and say Hello."""
        await self.engine.start("test")
        await self.engine.submit(ApplyPool(Pool("p")))
        now_s = self.clock.wall_s()
        token = tokens.create("t", "s", pool="p", ttl_s=3600.0, uses=999, created_by="", now_s=now_s)
        await self.engine.submit(CreateToken(token))
        for at in range(nodes):
            await self.engine.submit(RedeemToken("t", "s", f"n-{at}", f"node{at}"))
            await self.hello(f"n-{at}", gpus=gpus)

    async def hello(self, node_id: str, *, gpus: int = 4, **fields: object) -> None:
        """A session begins."""
        inventory = Inventory(1, sim_gpus(node_id, gpus, "H100-80GB", 80), "", "", 256_000, 2048 * GIB)
        hello = NodeHello(node_id, f"s-{node_id}", "boot", self.clock.monotonic_s(), inventory=inventory)
        await self.engine.submit(hello if not fields else _with(hello, **fields))

    def heartbeat(self, *node_ids: str) -> None:
        """Empty reports."""
        for node_id in node_ids:
            self.engine.offer(NodeReport(node_id, f"s-{node_id}", self.clock.monotonic_s()))

    def tell(self, state: RunnerState) -> None:
        """Every node reports all of its assigned runners in one state."""
        for node_id in self.engine.view.live:
            told = tuple(
                RunnerStatus(one.id, state, one.assignment.id if one.assignment else "", gpus=one.gpus)
                for one in self.engine.assignments(node_id)
            )
            self.engine.offer(NodeReport(node_id, f"s-{node_id}", self.clock.monotonic_s(), statuses=told))


def _with(hello: NodeHello, **fields: object) -> NodeHello:
    return replace(hello, **fields)


def deploy(name: str = "default/a", *, least: int = 1, most: int = 8, tag: str = "") -> ApplyApp:
    """A deploy of runners with one GPU each."""
    spec, digest = spec_of(gpus=1, least=least, most=most, tag=tag)
    return ApplyApp(name, spec, digest)
