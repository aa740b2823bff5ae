"""A scheduler on an empty, an hour-old or a foreign store while 20 containers run: none stops, all are reported.

Also clones, foreign nodes, lost zones and mass stops: what waits for an operator, and what their word does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from core_world import SimNode, sim_gpus
from engine_rig import Rig, deploy
from fal_contract.errors import FalError
from fal_scheduler.core.events import ApplyPool, Confirm, CordonNode, GatewayReach, NodeReport, ScaleApp, StopRunner
from fal_scheduler.core.records import Goal, Pool, RunnerState, ScaleOverride
from fal_scheduler.core.told import Health, Hold, Inventory
from fal_scheduler.core.views import runner_phase
from fal_scheduler.store.faults import Fault, FaultKind
from fal_scheduler.store.memory import MemoryBackend
from virtual_time import run_virtually

NODES = 5
GPUS = 4
RUNNERS = NODES * GPUS


@dataclass
class Fleet:
    """Simulated nodes that outlive schedulers, and remember what a scheduler told them of its store."""

    nodes: dict[str, SimNode] = field(default_factory=dict)
    cluster_id: str = ""
    incarnation: str = ""
    epoch: int = 0
    revision: int = 0

    def __post_init__(self) -> None:
        for at in range(NODES):
            node_id = f"n-{at}"
            gpus = sim_gpus(node_id, GPUS, "H100-80GB", 80)
            self.nodes[node_id] = SimNode(node_id, Inventory(1, gpus, "", "", 64_000, 1 << 40))

    async def hello(self, rig: Rig) -> None:
        """Every node begins a session with `rig` and obeys it as far as it is trusted."""
        for node in self.nodes.values():
            statuses = tuple(node.containers.values())
            await rig.hello(
                node.id,
                gpus=GPUS,
                cluster_id=self.cluster_id,
                incarnation=self.incarnation,
                epoch_seen=self.epoch,
                store_revision_seen=self.revision,
                term_seen=node.term_seen,
                statuses=statuses,
            )
        await self.obey(rig)

    async def obey(self, rig: Rig) -> None:
        """Nodes do what they are assigned and tell; twice, so that ends are told too."""
        for _ in range(3):
            view = rig.engine.view
            for node in self.nodes.values():
                node.assign(rig.engine.assignments(node.id), term=view.term)
                for runner_id, status in list(node.containers.items()):
                    if status.state in (RunnerState.STAGING, RunnerState.SETUP, RunnerState.DRAINING):
                        node.advance(runner_id)
                told = node.report(rig.clock.monotonic_s())
                rig.engine.offer(replace(told, session_id=f"s-{node.id}"))
            await asyncio.sleep(1.1)
        meta = rig.engine.view.meta
        assert meta is not None
        if not any(live.hold for live in rig.engine.view.live.values()):
            self.cluster_id, self.incarnation, self.epoch = meta.cluster_id, meta.incarnation, meta.epoch
            self.revision = rig.engine.view.store_revision

    def live(self) -> list[str]:
        """Runner ids of all containers that run."""
        return sorted(id_ for node in self.nodes.values() for id_, one in node.containers.items() if not one.ended)

    async def heartbeats(self, rig: Rig, seconds_s: float) -> None:
        """Time passes on a healthy cluster."""
        for _ in range(int(seconds_s / 5.0)):
            await asyncio.sleep(5.0)
            rig.heartbeat(*self.nodes)


async def twenty(rig: Rig, fleet: Fleet, *, least: int = RUNNERS) -> None:
    """20 GPUs; an app on `least` of them."""
    await rig.found(NODES, gpus=GPUS)
    await fleet.hello(rig)
    await rig.engine.submit(deploy(least=least, most=RUNNERS))
    await fleet.obey(rig)
    assert len(fleet.live()) == least


def kinds(rig: Rig) -> set[str]:
    return {kind for kind, _ in rig.engine.view.alarms}


def run(main: Coroutine[Any, Any, None]) -> None:
    run_virtually(main)


def test_an_empty_store_stops_nothing_reports_all_and_follows_the_operator() -> None:
    async def go() -> None:
        fleet = Fleet()
        rig = Rig()
        await twenty(rig, fleet)
        before = fleet.live()
        await rig.engine.stop()
        new = Rig(MemoryBackend())
        await new.engine.start("new")
        await fleet.hello(new)
        await fleet.heartbeats(new, 600.0)
        assert fleet.live() == before
        assert len(new.engine.view.orphans) == RUNNERS
        assert {"STORE_NEW", "ORPHANS"} <= kinds(new)
        # An app deployed meanwhile gets nothing: every node is held.
        await new.engine.submit(deploy("default/b"))
        assert not any(runner.node for runner in new.engine.view.runners.values())
        reply = await new.engine.submit(Confirm("store", actor="op"))
        assert len(reply.lines) == NODES + 1
        await fleet.obey(new)
        assert fleet.live() == before, "confirming the store stops nothing either"
        await new.engine.submit(Confirm("stop", actor="op"))
        await fleet.obey(new)
        assert [one for one in fleet.live() if one in before] == []
        assert not kinds(new)
        await fleet.obey(new)
        assert len(fleet.live()) == 1, "the app that waited has its runner now"
        await new.engine.stop()

    run(go())


def test_an_hour_old_copy_stops_nothing_and_adopts_what_it_can() -> None:
    async def go() -> None:
        fleet = Fleet()
        rig = Rig()
        await twenty(rig, fleet, least=10)
        copy = rig.backend.copy()
        await rig.engine.submit(ScaleApp("default/a", ScaleOverride(min_concurrency=16)))
        await fleet.obey(rig)
        gone = fleet.live()[0]
        await rig.engine.submit(StopRunner(gone, actor="op"))
        await fleet.obey(rig)
        before = fleet.live()
        assert len(before) == 16
        await rig.engine.stop()
        old = Rig(copy)
        await old.engine.start("old")
        await fleet.hello(old)
        await fleet.heartbeats(old, 900.0)
        assert fleet.live() == before, "nothing is started or stopped by itself"
        assert {"STORE_OLDER", "ORPHANS"} <= kinds(old)
        assert old.engine.view.term > rig.engine.view.term
        unknown = len(old.engine.view.orphans)
        assert unknown >= 6
        await old.engine.submit(Confirm("store", actor="op"))
        reply = await old.engine.submit(Confirm("adopt", actor="op"))
        assert sum("adopted" in line for line in reply.lines) == unknown
        assert fleet.live() == before, "adopting stops nothing"
        await fleet.obey(old)
        await fleet.heartbeats(old, 60.0)
        await fleet.obey(old)
        assert not kinds(old)
        assert len(fleet.live()) == 10, "what nobody uses goes by the app's own keep_alive"
        await old.engine.stop()

    run(go())


def test_an_old_copy_stays_suspected_under_every_later_leader_until_it_is_confirmed() -> None:
    """Operators' commands bring its revision past all that nodes have seen; then the leader changes."""

    async def go() -> None:
        fleet, old, before = await an_old_copy()
        seen = fleet.revision
        while old.engine.view.store_revision <= seen:
            await old.engine.submit(CordonNode("n-0", cordon=not old.engine.view.nodes["n-0"].cordoned))
        await old.engine.stop()
        for _ in range(2):
            later = Rig(old.backend)
            await later.engine.start("later")
            assert "STORE_OLDER" in kinds(later), "before any node spoke"
            await fleet.hello(later)
            await fleet.heartbeats(later, 400.0)
            assert {live.hold for live in later.engine.view.live.values()} == {Hold.STORE}
            assert fleet.live() == before
            await later.engine.submit(deploy("default/b"))
            assert not any(one.node for one in later.engine.view.runners.values() if one.app == "default/b")
            await later.engine.stop()
        last = Rig(old.backend)
        await last.engine.start("last")
        await fleet.hello(last)
        await last.engine.submit(Confirm("store", actor="op"))
        assert "STORE_OLDER" not in kinds(last)
        await last.engine.stop()
        calm = Rig(old.backend)
        await calm.engine.start("calm")
        assert not calm.engine.view.hold_all
        await fleet.hello(calm)
        assert {live.hold for live in calm.engine.view.live.values()} == {Hold.NONE}
        await calm.engine.stop()

    run(go())


def test_a_suspicion_that_could_not_be_written_is_written_later() -> None:
    async def go() -> None:
        fleet, old, _ = await an_old_copy(Fault(FaultKind.FAIL))
        view = old.engine.view
        assert "STORE_OLDER" in kinds(old)
        await fleet.heartbeats(old, 10.0)
        assert view.meta is not None
        assert view.meta.suspicion is not None
        assert view.meta.suspicion.revision_seen == fleet.revision > view.meta.suspicion.store_revision
        await old.engine.stop()

    run(go())


def test_a_confirm_that_could_not_be_written_leaves_the_suspicion() -> None:
    async def go() -> None:
        fleet, old, before = await an_old_copy()
        old.store.add(Fault(FaultKind.FAIL))
        with pytest.raises(FalError):
            await old.engine.submit(Confirm("store", actor="op"))
        assert old.engine.view.hold_all
        assert "STORE_OLDER" in kinds(old)
        await fleet.heartbeats(old, 60.0)
        assert {live.hold for live in old.engine.view.live.values()} == {Hold.STORE}
        assert fleet.live() == before
        await old.engine.submit(Confirm("store", actor="op"))
        assert not old.engine.view.hold_all
        await old.engine.stop()

    run(go())


async def an_old_copy(*faults: Fault) -> tuple[Fleet, Rig, list[str]]:
    """16 runners run, and a leader begins on a copy from before six of them; `faults` meet its first commits."""
    fleet, rig = Fleet(), Rig()
    await twenty(rig, fleet, least=10)
    copy = rig.backend.copy()
    await rig.engine.submit(ScaleApp("default/a", ScaleOverride(min_concurrency=16)))
    await fleet.obey(rig)
    before = fleet.live()
    await rig.engine.stop()
    old = Rig(copy)
    await old.engine.start("old")
    old.store.add(*faults)
    await fleet.hello(old)
    return fleet, old, before


def test_another_clusters_store_stops_nothing_until_its_nodes_are_accepted() -> None:
    async def go() -> None:
        fleet = Fleet()
        rig = Rig()
        await twenty(rig, fleet)
        before = fleet.live()
        await rig.engine.stop()
        other = Rig(cluster_id="c2")
        await other.engine.start("other")
        await other.engine.submit(ApplyPool(Pool("p")))
        await fleet.hello(other)
        await fleet.heartbeats(other, 600.0)
        assert fleet.live() == before
        assert "FOREIGN_NODE" in kinds(other)
        assert {live.hold for live in other.engine.view.live.values()} == {Hold.FOREIGN}
        await other.engine.submit(Confirm("stop", actor="op"))
        await fleet.obey(other)
        assert fleet.live() == before, "foreign nodes come first"
        await other.engine.submit(Confirm("node", actor="op"))
        assert other.engine.view.meta is not None
        assert other.engine.view.meta.accepted_clusters == ("c1",)
        await other.engine.submit(Confirm("stop", actor="op"))
        await fleet.obey(other)
        assert fleet.live() == []
        await other.engine.stop()

    run(go())


def test_a_store_of_another_cluster_than_our_ca_holds_everything() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        await rig.engine.stop()
        await rig.store.close()
        mixed = Rig(rig.backend, cluster_id="c2")
        await mixed.engine.start("mixed")
        await mixed.hello("n-0")
        await mixed.engine.submit(deploy())
        await asyncio.sleep(10.0)
        assert "STORE_FOREIGN" in kinds(mixed)
        runner = next(iter(mixed.engine.view.runners.values()), None)
        assert runner is None or not runner.node
        await mixed.engine.stop()

    run(go())


def test_a_second_machine_with_one_identity_is_quarantined() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        await rig.engine.submit(deploy())
        rig.tell(RunnerState.IDLE)
        await rig.hello("n-0", boot_id="other machine")
        assert rig.engine.view.live["n-0"].hold is Hold.NONE, "a machine may start anew"
        await rig.hello("n-0", boot_id="boot")
        assert rig.engine.view.live["n-0"].hold is Hold.CLONE
        assert rig.engine.assignments("n-0") == ()
        assert "CLONE" in kinds(rig)
        await rig.engine.submit(deploy("default/b"))
        b = next(one for one in rig.engine.view.runners.values() if one.app == "default/b")
        assert not b.node
        assert "confirm" in runner_phase(rig.engine.view, b).reason
        await rig.engine.stop()

    run(go())


def test_one_lost_node_is_replaced_and_both_serve_when_it_returns_so_the_newer_drains() -> None:
    async def go() -> None:
        fleet = Fleet()
        rig = Rig()
        await twenty(rig, fleet, least=5)
        await fleet.heartbeats(rig, 400.0)  # out of the first minutes
        lost = next(node_id for node_id in fleet.nodes if rig.engine.assignments(node_id))
        theirs = {runner.id for runner in rig.engine.assignments(lost)}
        others = [node_id for node_id in fleet.nodes if node_id != lost]
        states = set()
        for _ in range(16):
            await asyncio.sleep(5.0)
            rig.heartbeat(*others)
            states.add(rig.engine.view.live[lost].health)
        assert states == {Health.READY, Health.UNKNOWN, Health.LOST}
        assert all(rig.engine.view.runners[id_].gpus for id_ in theirs), "its GPUs stay promised"
        cut = fleet.nodes.pop(lost)
        await fleet.obey(rig)
        assert len(fleet.live()) == 5, "replaced elsewhere"
        fleet.nodes[lost] = cut
        await fleet.hello(rig)
        await fleet.heartbeats(rig, 60.0)
        await rig.engine.submit(Confirm("stops"))
        await fleet.obey(rig)
        assert len(fleet.live()) == 5
        assert theirs <= set(fleet.live()), "the older ones stay"
        await rig.engine.stop()

    run(go())


def test_silence_of_all_nodes_means_that_we_are_cut_off() -> None:
    async def go() -> None:
        fleet = Fleet()
        rig = Rig()
        await twenty(rig, fleet, least=5)
        await asyncio.sleep(900.0)
        view = rig.engine.view
        assert {live.health for live in view.live.values()} == {Health.UNKNOWN}
        assert len(view.runners) == 5
        assert {runner_phase(view, runner).state for runner in view.runners.values()} == {RunnerState.UNKNOWN}
        await fleet.hello(rig)
        assert len(fleet.live()) == 5
        await rig.engine.stop()

    run(go())


def test_a_silent_node_that_a_gateway_reaches_is_not_lost() -> None:
    async def go() -> None:
        fleet = Fleet()
        rig = Rig()
        await twenty(rig, fleet, least=5)
        for _ in range(40):
            await asyncio.sleep(5.0)
            rig.heartbeat("n-1", "n-2", "n-3", "n-4")
            rig.engine.offer(GatewayReach("g", {"n-0": "direct"}, rig.clock.monotonic_s()))
        assert rig.engine.view.live["n-0"].health is Health.UNKNOWN
        assert len(rig.engine.view.runners) == 5
        await rig.engine.stop()

    run(go())


def test_a_runner_in_store_that_is_to_stop_and_is_not_there_is_forgotten() -> None:
    async def go() -> None:
        fleet = Fleet()
        rig = Rig()
        await twenty(rig, fleet, least=1)
        runner_id = fleet.live()[0]
        await rig.engine.submit(StopRunner(runner_id, kill=True, actor="op"))
        assert rig.engine.view.runners[runner_id].goal is Goal.KILL
        for node in fleet.nodes.values():
            node.containers.clear()  # its disk was wiped
        await fleet.hello(rig)
        assert runner_id not in rig.engine.view.runners
        assert len(fleet.live()) == 1, "the app has another"
        with pytest.raises(FalError):
            await rig.engine.submit(StopRunner(runner_id, actor="op"))
        await rig.engine.stop()

    run(go())


def test_a_crash_waits_longer_each_time_and_tells_its_last_words() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        await rig.engine.submit(deploy())
        waits = []
        for _ in range(3):
            (runner,) = rig.engine.assignments("n-0")
            assert runner.assignment is not None
            node = SimNode("n-0", Inventory())
            node.put(runner)
            node.crash(runner.id)
            told = replace(node.report(rig.clock.monotonic_s()), session_id="s-n-0")
            rig.engine.offer(NodeReport("n-0", "s-n-0", told.arrived_s, statuses=told.statuses))
            begun_s = rig.clock.monotonic_s()
            await asyncio.sleep(0.1)
            (waiting,) = rig.engine.view.runners.values()
            phase = runner_phase(rig.engine.view, waiting)
            assert phase.state is RunnerState.CRASH_BACKOFF
            assert "exit code 1" in phase.reason
            while not rig.engine.assignments("n-0"):
                await asyncio.sleep(1.0)
                rig.heartbeat("n-0")
            waits.append(round(rig.clock.monotonic_s() - begun_s))
        assert [abs(wait - due) <= 2 for wait, due in zip(waits, (30, 60, 90), strict=True)] == [True] * 3, waits
        rig.tell(RunnerState.IDLE)
        await asyncio.sleep(0.1)
        assert rig.engine.view.backoffs == {}, "a success starts anew"
        await rig.engine.stop()

    run(go())
