"""Drills with the store: empty, an hour old, another cluster's, slow, silent. Leaders, sessions and agents are real.

The first three copy real SQLite files under 20 running containers, in real time: none is stopped, all are reported, and
an operator's confirm settles them. The others run in virtual time on the store in memory.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from etcd_server import EtcdServer
from fal_agent.core.assignments import Complete, Delta
from fal_agent.core.tasks import Task
from fal_agent.session import Link
from fal_contract.errors import Code, FalError
from fal_contract.snapshot_file import SnapshotWriter
from fal_contract.v1 import schedulers_pb2
from fal_scheduler.api.schedulers import save_snapshot
from fal_scheduler.core import tokens
from fal_scheduler.core.events import ApplyApp, ApplyPool, Confirm, CreateToken, RedeemToken, Reply, ScaleApp
from fal_scheduler.core.records import Pool, Resources, ScaleOverride, Scaling, Spec
from fal_scheduler.core.state import State
from fal_scheduler.moving import migrate, restore
from fal_scheduler.store.etcd import EtcdStore
from fal_scheduler.store.faults import Fault, FaultKind
from fal_scheduler.store.interface import Store
from fal_scheduler.store.sqlite import SqliteStore
from sim.cluster import AgentLink, Profile, SimCluster, quiet
from sim.host import Host
from sim.network import Network, Stream, broken
from sim.process import install
from sim.schedulers import Scheduler, SchedulerHooks, authority
from virtual_time import run_virtually

NODES, GPUS = 5, 4
CLUSTER = "c-010101010101"
WITHIN_S = 20.0


class Stops:
    """Which containers were stopped while they ran."""

    def __init__(self) -> None:
        self.runners: list[str] = []

    def container_started(self, host: Host, runner_id: str, gpus: tuple[str, ...]) -> None:
        """See Watcher."""

    def container_stopped(self, host: Host, runner_id: str, *, ready: bool) -> None:
        """See Watcher."""
        self.runners.append(runner_id)

    def took_in(self, host: Host, message: Complete | Delta, before: dict[str, Task], after: dict[str, Task]) -> None:
        """See Watcher."""


class Drill:
    """Five machines with four GPUs each, and one scheduler on an SQLite file that the drill exchanges."""

    def __init__(self, root: Path) -> None:
        install(asyncio.get_running_loop())
        self.root, self.stops, self.network = root, Stops(), Network(Random(1))
        self.hosts = [
            Host(f"n-{at:012d}", root / f"n{at}", GPUS, Random(at), self.stops, moody=False) for at in range(NODES)
        ]
        self.scheduler: Scheduler | None = None
        self._rng = Random(7)
        self._store: Store | None = None

    @property
    def view(self) -> State:
        """The leader's."""
        assert self.scheduler is not None
        assert self.scheduler.leadership is not None
        return self.scheduler.leadership.view

    async def submit(self, command: object) -> Reply:
        """To the leader."""
        assert self.scheduler is not None
        assert self.scheduler.leadership is not None
        return await self.scheduler.leadership.engine.submit(command)  # type: ignore[arg-type]

    async def confirm(self, what: str) -> Reply:
        """An operator's word."""
        return await self.submit(Confirm(what, actor="operator"))

    async def start(self, file: str = "", *, cluster_id: str = CLUSTER, store: Store | None = None) -> None:
        """A scheduler of `cluster_id` on this store: a file's, or another."""
        self._store = store = store or SqliteStore(self.root / file)
        self.scheduler = Scheduler(
            "s0", cluster_id=cluster_id, folder=self.root / "s0", rng=self._rng, hooks=SchedulerHooks(),
            store_of=lambda: store,
        )  # fmt: skip
        self.scheduler.start()
        await self.until(lambda: self.scheduler is not None and self.scheduler.leadership is not None)

    async def stop(self) -> None:
        """The scheduler is gone, its files are closed."""
        assert self.scheduler is not None
        assert self._store is not None
        process = self.scheduler.process
        self.scheduler.kill()
        for stream in self.network.streams_of("s0"):
            stream.leave("s0")
        if process is not None:
            await process.gone()
        await self._store.close()

    def copy(self, source: str, target: str) -> None:
        """What a backup of a closed store copies."""
        for suffix in ("", "-wal", "-shm"):
            if (self.root / f"{source}{suffix}").exists():
                shutil.copy(self.root / f"{source}{suffix}", self.root / f"{target}{suffix}")

    async def join(self) -> None:
        """All machines become nodes and start their agents."""
        await self.submit(ApplyPool(Pool("p")))
        now_s = self.hosts[0].clock.wall_s()
        await self.submit(
            CreateToken(tokens.create("t", "s", pool="p", ttl_s=3600.0, uses=99, created_by="", now_s=now_s))
        )
        for host in self.hosts:
            await self.submit(RedeemToken("t", "s", host.node_id, host.node_id))
            host.start_agent(self._dialer(host))
        await self.heard()

    def _dialer(self, host: Host) -> Callable[[], Awaitable[Link]]:
        async def dial() -> Link:
            if self.scheduler is None or self.scheduler.leadership is None:
                raise broken("connection refused")
            stream = Stream(self.network, host.node_id, "s0")
            self.scheduler.serve(stream)
            return AgentLink(stream, host, lambda: None)

        return dial

    async def heard(self) -> None:
        """Every node has told this leader what it runs."""
        await self.until(lambda: all(self.view.health_of(host.node_id) == "ready" for host in self.hosts))

    async def deploy(self, app: str, count: int) -> None:
        """So many runners with one GPU each."""
        scaling = Scaling(min_concurrency=count, max_concurrency=20)
        spec = Spec(image="host", num_gpus=1, resources=Resources(1000, 1 << 30), scaling=scaling)
        await self.submit(ApplyApp(app, spec, f"digest {app}", actor="operator"))

    def running(self) -> set[str]:
        """Runners whose containers run."""
        return {runner_id for host in self.hosts for runner_id in host.live()}

    def serving(self) -> set[str]:
        """Runners that are ready."""
        return {runner_id for host in self.hosts for runner_id in host.serving()}

    def reported(self) -> set[str]:
        """Runners that an operator sees on this store: records that their node tells of, and orphans."""
        known = {id for live in self.view.live.values() for id in (*live.statuses, *live.orphans)}
        return {id for id in known if id in self.view.runners or any(id == orphan for _, orphan in self.view.orphans)}

    def alarms(self) -> set[str]:
        """Kinds of alarms that stand."""
        return {kind for kind, _ in self.view.alarms}

    async def until(self, what: Callable[[], bool]) -> None:
        """Poll with a deadline."""
        async with asyncio.timeout(WITHIN_S):
            while not what():  # noqa: ASYNC110  (anything may make it true)
                await asyncio.sleep(0.02)

    async def nothing_stops(self) -> None:
        """A tick and many rounds of deltas pass, and all 20 still run."""
        before = self.running()
        await asyncio.sleep(1.5)  # the time itself is what is tested
        assert self.stops.runners == []
        assert self.running() == before
        assert len(before) == NODES * GPUS
        assert self.reported() == before

    async def close(self) -> None:
        """End everything."""
        processes = [host.process for host in self.hosts if host.process is not None]
        for host in self.hosts:
            host.kill_agent()
        for process in processes:
            await process.gone()
        await self.stop()


def drill(tmp_path: Path, scenario: Callable[[Drill], Awaitable[None]]) -> None:
    """Run it in real time: SQLite has a thread of its own."""
    quiet()

    async def main() -> None:
        made = Drill(tmp_path)
        try:
            await scenario(made)
        finally:
            await made.close()

    asyncio.run(main())


def test_an_empty_store_under_running_containers(tmp_path: Path) -> None:
    """Everything is an orphan; the store is confirmed, the orphans are stopped at an operator's word only."""

    async def scenario(d: Drill) -> None:
        await d.start("ours.db")
        await d.join()
        await d.deploy("default/a", 20)
        await d.until(lambda: len(d.serving()) == 20)
        await d.stop()
        await d.start("empty.db")
        await d.until(lambda: len(d.view.orphans) == 20)
        assert "STORE_NEW" in d.alarms()
        assert "ORPHANS" in d.alarms()
        await d.nothing_stops()
        await d.confirm("store")
        await d.nothing_stops()
        lines = (await d.confirm("adopt")).lines
        assert len(lines) == 20
        assert all("not in the store" in line for line in lines)
        await d.confirm("stop")
        await d.until(lambda: not d.running() and not d.view.orphans and not d.view.runners)
        await d.until(lambda: not d.alarms())
        await d.deploy("default/b", 20)  # every GPU is free again
        await d.until(lambda: len(d.serving()) == 20)

    drill(tmp_path, scenario)


def test_an_older_copy_of_the_store(tmp_path: Path) -> None:
    """What the copy knows goes on; of the rest, what it has an app for is adopted, what it has not is stopped."""

    async def scenario(d: Drill) -> None:
        await d.start("ours.db")
        await d.join()
        await d.deploy("default/a", 10)
        await d.until(lambda: len(d.serving()) == 10)
        known = d.running()
        await d.stop()
        d.copy("ours.db", "older.db")
        await d.start("ours.db")
        await d.heard()
        await d.submit(ScaleApp("default/a", ScaleOverride(min_concurrency=15), actor="operator"))
        await d.deploy("default/b", 5)
        await d.until(lambda: len(d.serving()) == 20)
        await asyncio.sleep(0.5)  # the nodes hear of the newest revision with the next delta
        await d.stop()
        await d.start("older.db")
        await d.heard()
        assert "STORE_OLDER" in d.alarms()
        assert {id for _, id in d.view.orphans} == d.running() - known
        await d.nothing_stops()
        await d.confirm("store")
        await d.confirm("adopt")
        await d.until(lambda: len(d.view.runners) == 15)
        await d.confirm("stop")
        await d.until(lambda: not d.view.orphans and len(d.running()) == 15)
        assert {id.partition("-")[0] for id in d.stops.runners} == {"default/b"}
        assert known <= d.serving()
        await d.until(lambda: not d.alarms())

    drill(tmp_path, scenario)


def test_another_clusters_store(tmp_path: Path) -> None:
    """The scheduler says whose store it is, the nodes do not obey it, and nothing stops until they are told to."""

    async def scenario(d: Drill) -> None:
        await d.start("theirs.db", cluster_id="c-020202020202")
        await d.stop()
        await d.start("ours.db")
        await d.join()
        await d.deploy("default/a", 20)
        await d.until(lambda: len(d.serving()) == 20)
        await d.stop()
        await d.start("theirs.db")
        await d.until(lambda: len(d.view.orphans) == 20)
        assert {"STORE_FOREIGN", "FOREIGN_NODE", "ORPHANS"} <= d.alarms()
        await d.nothing_stops()
        await d.confirm("store")
        await d.confirm("stop")  # the nodes are held: nothing happens
        await d.nothing_stops()
        await d.confirm("node")
        await d.heard()
        await d.nothing_stops()
        await d.confirm("stop")
        await d.until(lambda: not d.running() and not d.view.orphans)

    drill(tmp_path, scenario)


def _virtually(tmp_path: Path, scenario: Callable[[SimCluster], Awaitable[None]]) -> None:
    quiet()

    async def main() -> None:
        cluster = SimCluster(1, tmp_path, Profile(nodes=5, schedulers=2))
        for host in cluster.hosts.values():
            host.moody = False
        try:
            await cluster.found()
            await scenario(cluster)
            cluster.checker.everything()
            cluster.stop_if_broken()
        finally:
            await cluster.close()

    run_virtually(main())


def _app(name: str, least: int) -> ApplyApp:
    spec = Spec(
        image="host",
        num_gpus=1,
        resources=Resources(1000, 1 << 30),
        scaling=Scaling(min_concurrency=least, max_concurrency=20),
    )
    return ApplyApp(name, spec, f"digest {name} {least}", actor="operator")


def test_a_store_that_stalls_for_20_s_kills_no_node(tmp_path: Path) -> None:
    """Heartbeats go on being counted; the deploy under way is done when the store answers."""

    async def scenario(c: SimCluster) -> None:
        await c.submit(_app("default/a", 4))
        await c.until(lambda: not c.checker.unsettled(exactly=True), "rest", within_s=60.0)
        leader = next(s for s in c.schedulers if s.leadership is not None)
        assert leader.faults is not None
        leader.faults.add(Fault(FaultKind.STALL, 20.0))
        assert await c.submit(_app("default/b", 2)) is not None
        await c.until(lambda: not c.checker.unsettled(exactly=True), "rest", within_s=60.0)
        assert c.checker.counts.get("NODE_UNKNOWN", 0) == 0
        assert c.checker.counts["terms"] == 1
        assert c.checker.counts.get("stops", 0) == 0
        assert c.checker.counts["starts"] == 6

    _virtually(tmp_path, scenario)


@pytest.mark.parametrize("kind", [FaultKind.LOSE_ANSWER, FaultKind.LOSE_REQUEST])
def test_an_answer_lost_around_the_commit(tmp_path: Path, kind: FaultKind) -> None:
    """The leader steps down, the next loads what was done: nothing is lost, nothing doubled, the retry is safe."""

    async def scenario(c: SimCluster) -> None:
        await c.submit(_app("default/a", 4))
        await c.until(lambda: not c.checker.unsettled(exactly=True), "rest", within_s=60.0)
        leader = next(s for s in c.schedulers if s.leadership is not None)
        assert leader.faults is not None
        leader.faults.add(Fault(kind))
        engine = leader.leadership.engine if leader.leadership is not None else None
        assert engine is not None
        with pytest.raises(FalError) as refused:
            await engine.submit(_app("default/b", 2))
        assert refused.value.code is Code.STORE_UNKNOWN
        await c.until(lambda: c.checker.leader() is not None, "the next leader", within_s=30.0)
        view = next(iter([term.view for s in c.schedulers if (term := s.leadership) is not None]))
        assert ("default/b" in view.apps) == (kind is FaultKind.LOSE_ANSWER)
        await c.submit(_app("default/b", 2))
        await c.until(lambda: not c.checker.unsettled(exactly=True), "rest", within_s=60.0)
        assert c.checker.counts["starts"] == 6
        assert c.checker.counts.get("stops", 0) == 0

    _virtually(tmp_path, scenario)


# Moves: a snapshot, and another store.


async def save(d: Drill, file: Path) -> None:
    """As `falctl operator snapshot save` does."""
    assert d.scheduler is not None
    assert d.scheduler.leadership is not None
    facts: dict[str, object] = {}
    with SnapshotWriter(file) as writer:
        async for chunk in save_snapshot(d.scheduler.leadership, schedulers_pb2.SaveSnapshotRequest()):
            facts = json.loads(chunk.head) if chunk.head else facts
            writer.write(chunk.body)
            if chunk.sha256:
                writer.finish(facts, sha256=chunk.sha256)


def test_a_snapshot_restored_into_an_empty_store(tmp_path: Path) -> None:
    """Nodes follow it without a doubt, because its epoch is higher; what came after it is kept and reported."""

    async def scenario(d: Drill) -> None:
        await d.start("ours.db")
        await d.join()
        await d.deploy("default/a", 10)
        await d.until(lambda: len(d.serving()) == 10)
        known, epoch = d.running(), d.view.meta.epoch  # type: ignore[union-attr]
        await save(d, tmp_path / "snapshot")
        await d.submit(ScaleApp("default/a", ScaleOverride(min_concurrency=15), actor="operator"))
        await d.deploy("default/b", 5)
        await d.until(lambda: len(d.serving()) == 20)
        await asyncio.sleep(0.5)  # the nodes hear of the newest revision with the next delta
        await d.stop()
        store = SqliteStore(d.root / "restored.db")
        filled = await restore(
            store, tmp_path / "snapshot", ca=authority(CLUSTER), blobs=d.root / "s0" / "blobs", force=False
        )
        assert filled.epoch == epoch + 1
        await d.start("restored.db")
        await d.heard()
        assert not d.alarms() & {"STORE_OLDER", "STORE_NEW"}
        assert {id for _, id in d.view.orphans} == d.running() - known
        await d.nothing_stops()
        await d.confirm("adopt")
        await d.until(lambda: len(d.view.runners) == 15)
        await d.confirm("stop")
        await d.until(lambda: not d.view.orphans and len(d.running()) == 15)
        assert known <= d.serving()
        await d.stop()
        await d.start("ours.db")  # the store of before: nobody follows it
        await d.until(lambda: "STORE_OLDER" in d.alarms())
        before = set(d.stops.runners)
        await asyncio.sleep(1.5)  # the time itself is what is tested
        assert set(d.stops.runners) == before

    drill(tmp_path, scenario)


@pytest.mark.etcd
def test_from_a_file_to_etcd_and_back_under_running_containers(tmp_path: Path) -> None:
    """No runner notices, nothing is an orphan, and the store that was left refuses to be led on."""

    async def scenario(d: Drill, endpoint: str) -> None:
        await d.start("ours.db")
        await d.join()
        await d.deploy("default/a", 20)
        await d.until(lambda: len(d.serving()) == 20)
        with pytest.raises(FalError) as caught:
            await migrate(SqliteStore(d.root / "ours.db"), EtcdStore([endpoint]), where="etcd", force=False)
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert "in use" in caught.value.what
        await d.stop()
        await migrate(SqliteStore(d.root / "ours.db"), EtcdStore([endpoint]), where=f"etcd://{endpoint}", force=False)
        await d.start(store=EtcdStore([endpoint]))
        await d.heard()
        assert not d.alarms()
        assert not d.view.orphans
        await d.nothing_stops()
        await d.submit(ScaleApp("default/a", ScaleOverride(max_concurrency=40), actor="operator"))
        with pytest.raises(FalError, match="a scheduler leads"):
            await migrate(EtcdStore([endpoint]), SqliteStore(d.root / "back.db"), where="back", force=False, wait_s=0.5)
        await d.stop()
        left = SqliteStore(d.root / "ours.db")
        with pytest.raises(FalError, match="moved to etcd://"):
            await migrate(left, EtcdStore([endpoint]), where="x", force=True)
        await migrate(EtcdStore([endpoint]), SqliteStore(d.root / "ours.db"), where="sqlite", force=False)
        await d.start("ours.db")
        await d.heard()
        assert not d.alarms()
        assert not d.view.orphans
        assert d.stops.runners == []
        assert len(d.serving()) == 20
        assert d.view.meta is not None
        assert d.view.meta.epoch == 3

    with EtcdServer(tmp_path / "etcd") as etcd:
        drill(tmp_path, lambda d: scenario(d, etcd.endpoint))
