"""The engine over stores that stall, fail and lose answers, in virtual time; and a deploy of 1,000 runners on etcd."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest

from core_world import GIB, sim_gpus
from engine_rig import Rig, deploy
from etcd_server import EtcdServer
from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError
from fal_scheduler.core import tokens
from fal_scheduler.core.events import (
    ApplyPool,
    AssignmentChanged,
    CreateToken,
    DeleteApp,
    Effect,
    Logged,
    NodeHello,
    RedeemToken,
    ScaleApp,
)
from fal_scheduler.core.records import Pool, RunnerState, ScaleOverride
from fal_scheduler.core.told import Health, Inventory
from fal_scheduler.engine import Engine, EngineOptions
from fal_scheduler.store.etcd import EtcdStore
from fal_scheduler.store.faults import Fault, FaultKind
from fal_scheduler.store.interface import Store
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from virtual_time import run_virtually

T = TypeVar("T")


def virtually(test: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run in virtual time."""
    return run_virtually(test())


def test_a_healthy_idle_node_costs_no_store_write() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(3)
        await rig.engine.submit(deploy(least=2))
        rig.tell(RunnerState.IDLE)
        await asyncio.sleep(1.0)
        before = rig.engine.statistics()["store_commits"]
        for _ in range(24):
            rig.heartbeat("n-0", "n-1", "n-2")
            await asyncio.sleep(5.0)
        assert rig.engine.statistics()["store_commits"] == before
        assert {live.health for live in rig.engine.view.live.values()} == {Health.READY}
        await rig.engine.stop()

    virtually(go)


def test_a_store_that_stalls_20_s_makes_no_node_unknown_and_no_assignment_early() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(3)
        rig.store.add(Fault(FaultKind.STALL, 20.0))
        told = len(rig.effects)
        waiting = asyncio.create_task(rig.engine.submit(deploy(least=3)))
        for _ in range(4):
            await asyncio.sleep(4.9)
            rig.heartbeat("n-0", "n-1", "n-2")
            assert not waiting.done()
            assert not any(isinstance(effect, AssignmentChanged) for effect in rig.effects[told:])
            assert [rig.engine.assignments(node_id) for node_id in ("n-0", "n-1", "n-2")] == [(), (), ()]
            assert len(rig.engine.view.runners) == 3  # reads see what is under way
        await asyncio.sleep(1.0)
        assert (await waiting).outcome == "created"
        assert sum(len(rig.engine.assignments(f"n-{at}")) for at in range(3)) == 3
        assert {live.health for live in rig.engine.view.live.values()} == {Health.READY}
        assert not any(isinstance(effect, Logged) and effect.kind == "NODE_UNKNOWN" for effect in rig.effects)
        await rig.engine.stop()

    virtually(go)


def test_an_answer_lost_after_the_commit_ends_the_leadership_and_the_next_leader_has_it() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        rig.store.add(Fault(FaultKind.LOSE_ANSWER))
        with pytest.raises(FalError) as failure:
            await rig.engine.submit(deploy())
        assert failure.value.code is Code.STORE_UNKNOWN
        assert failure.value.retryable
        assert (await rig.engine.lost()).code is Code.STORE_UNKNOWN
        with pytest.raises(FalError):
            await rig.engine.submit(deploy(tag="later"))
        await rig.engine.stop()
        await rig.store.close()
        heir = Rig(rig.backend)
        await heir.engine.start("heir")
        assert heir.engine.view.term == 2
        assert list(heir.engine.view.apps) == ["default/a"]
        assert len(heir.engine.view.runners) == 1
        again = await heir.engine.submit(deploy())
        assert again.outcome == "unchanged"
        await heir.engine.stop()

    virtually(go)


def test_a_commit_that_fails_is_taken_back_with_all_that_was_built_on_it() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        rig.store.add(Fault(FaultKind.FAIL, 1.0))
        first = asyncio.create_task(rig.engine.submit(deploy("default/a")))
        await asyncio.sleep(0.5)
        scaled = ScaleApp("default/a", ScaleOverride(min_concurrency=2))
        built_on_it = asyncio.create_task(rig.engine.submit(scaled))
        unchanged = asyncio.create_task(rig.engine.submit(deploy("default/a")))
        results = await asyncio.gather(first, built_on_it, unchanged, return_exceptions=True)
        assert [getattr(one, "code", one) for one in results] == [Code.STORE_FAILED] * 3
        assert rig.engine.view.apps == {}
        assert rig.engine.view.runners == {}
        assert not rig.engine.assignments("n-0")
        assert (await rig.engine.submit(deploy("default/a"))).outcome == "created"
        await rig.engine.stop()

    virtually(go)


def test_the_end_of_a_runner_that_could_not_be_stored_is_stored_later() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        await rig.engine.submit(deploy())
        rig.tell(RunnerState.IDLE)
        await rig.engine.submit(DeleteApp("default/a"))
        rig.store.add(Fault(FaultKind.FAIL))
        rig.tell(RunnerState.TERMINATED)
        await asyncio.sleep(0.5)
        assert rig.engine.view.apps, "the commit that forgets it failed"
        await asyncio.sleep(5.0)
        assert rig.engine.view.apps == {}
        assert rig.engine.view.runners == {}
        await rig.engine.stop()

    virtually(go)


def test_a_hello_with_a_higher_term_raises_ours_before_anything_is_assigned() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        await rig.hello("n-0", cluster_id="c1", term_seen=41)
        assert rig.engine.view.term == 42
        assert rig.backend.term == 42
        await rig.engine.submit(deploy())
        assert [one.assignment.term for one in rig.engine.assignments("n-0") if one.assignment] == [42]
        await rig.engine.stop()

    virtually(go)


def test_a_deposed_leader_says_so_and_changes_nothing() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        rig.backend.term += 1  # another leader campaigned
        with pytest.raises(FalError) as failure:
            await rig.engine.submit(deploy())
        assert failure.value.code is Code.NOT_LEADER
        assert "team/default/app/a" not in rig.backend.records
        await rig.engine.stop()

    virtually(go)


async def _thousand(store: Store) -> None:
    clock = SystemClock()
    engine = Engine(store, clock=clock, rng=Random(1), options=EngineOptions("c1", strict=True))
    await engine.start("test")
    await engine.submit(ApplyPool(Pool("p")))
    token = tokens.create("t", "s", pool="p", ttl_s=3600.0, uses=999, created_by="", now_s=clock.wall_s())
    await engine.submit(CreateToken(token))
    for at in range(128):
        node_id = f"n-{at}"
        await engine.submit(RedeemToken("t", "s", node_id, f"node{at}"))
        inventory = Inventory(1, sim_gpus(node_id, 8, "H100-80GB", 80), "", "", 256_000, 2048 * GIB)
        await engine.submit(NodeHello(node_id, node_id, "boot", clock.monotonic_s(), inventory=inventory))
    assigned: dict[str, None] = {}
    done = asyncio.Event()

    def listen(effect: Effect) -> None:
        if isinstance(effect, AssignmentChanged):
            assert engine.assignment(effect.node_id, effect.runner_id) is not None
            assigned[effect.runner_id] = None
            if len(assigned) == 1000:
                done.set()

    engine.subscribe(listen)
    await engine.submit(deploy(least=1000, most=1000))
    await asyncio.wait_for(done.wait(), 60.0)
    gpus = [gpu for runner in engine.view.runners.values() for gpu in runner.gpus]
    assert len(gpus) == len(set(gpus)) == 1000
    stored = await store.load()
    assert sum(1 for key in stored.records if "/runner/" in key) == 1000
    await engine.stop()


def test_a_deploy_of_1000_runners_takes_several_commits_of_100_at_most() -> None:
    store = MemoryStore(MemoryBackend())
    asyncio.run(_thousand(store))
    assert store.statistics()["operations"] / store.statistics()["commits"] <= 100


@pytest.mark.etcd
@pytest.mark.slow
def test_a_deploy_of_1000_runners_on_etcd(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "etcd") as etcd:

        async def go() -> None:
            store = EtcdStore([etcd.endpoint])
            try:
                await _thousand(store)
            finally:
                await store.close()

        asyncio.run(go())
