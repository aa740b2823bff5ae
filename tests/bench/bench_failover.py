"""`failover`: kill -9 of the leader under load, 20 times; how long until the next leader has placed something.

Three schedulers with a data folder each on a real etcd, three agents, three gateways, all processes. Two loads run
meanwhile: requests through each gateway to a warm app with a runner on every node, and apps that come and go.
A takeover is counted from the kill to the first app that the new leader has acknowledged *and* given a node; it needs
the election, the agents' return and a commit. The baseline is the lease's ttl: no store knows of the death sooner.

lost: apps acknowledged and gone afterwards. doubled: apps of one runner that have two. runners_disturbed: warm runners
whose id or process is another. failed: warm requests that did not end with their picture. Then all schedulers are
killed for a minute, with one runner and three gateways: failed_leaderless.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from harness import Options, Result, percentile, print_table, significant

from etcd_server import why_no_etcd
from fal_contract.limits import STORE_LEASE_TTL_S
from fal_contract.manifest import AppManifest
from fal_contract.v1 import cluster_pb2 as pb
from fal_runtime.host_image import worker_command
from ha_cluster import HaCluster, Load, Scheduler, ha_cluster

MUST_REACH = "worst takeover <= 10 s, nothing lost, doubled or disturbed, no warm request failed"
TAKEOVER_MAX_S = 10.0
KILLS = 20
LEADERLESS_S = 60.0
NODES = 3
APPS_KEPT = 4
GIVE_UP_S = 60.0
_CALL_S = 2.0


@dataclass
class Placements:
    """Apps that come and go; what was acknowledged is remembered."""

    world: HaCluster
    standing: list[str] = field(default_factory=list)  # acknowledged, not deleted
    lost: set[str] = field(default_factory=set)
    doubled: set[str] = field(default_factory=set)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, one: Scheduler | None = None) -> str:
        """Apply one more app, to this scheduler alone where one is given; its name, '' where that did not work.

        What is placed at one scheduler is the caller's to `keep`.
        """
        name = f"p{next(self._numbers)}"
        keys: dict[str, Any] = {
            "name": name, "team": "default", "num_gpus": 1, "min_concurrency": 1, "max_concurrency": 1,
            "command": [*worker_command(isolates=False).argv, "-m", "fal_runtime.worker.fake"],
            "resources": {"cpu": 0.1, "memory_gib": 0.1}, "pools": ["laptops"], "image": "host",
        }  # fmt: skip
        request = pb.ApplyAppRequest(id=f"default/{name}", spec=AppManifest.model_validate(keys).to_proto())
        try:
            if one is None:
                self.world.call("ApplyApp", request)
            else:
                self.world.ask_one(one, "ApplyApp", request, timeout_s=_CALL_S)
        except grpc.RpcError:
            return ""
        if one is None:
            self.keep(name)
        return name

    def keep(self, name: str) -> None:
        """From now on it must be there, until it is the oldest."""
        with self._lock:
            self.standing.append(name)

    def shrink(self) -> None:
        """Delete the oldest."""
        with self._lock:
            name = self.standing[0] if len(self.standing) > APPS_KEPT else ""
            if name:
                self.standing.remove(name)  # from here on it may be there or not
        if name:
            with suppress(grpc.RpcError):  # a takeover lost the answer: it may stand on, and is counted by nobody
                self.world.call("DeleteApp", pb.DeleteAppRequest(id=f"default/{name}"))

    def audit(self) -> None:
        """Compare what was acknowledged with what there is."""
        with self._lock:
            expected = list(self.standing)
            there = self.world.apps()
            self.lost |= {name for name in expected if name not in there}
        runners: dict[str, int] = {}
        for view in self.world.runners():
            if view.runner.node and not view.runner.goal_reason:
                app = view.runner.id.rpartition("-")[0]
                runners[app] = runners.get(app, 0) + 1
        self.doubled |= {app for app, count in runners.items() if count > (NODES if app == "default/warm" else 1)}

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Apply and delete all the time."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.3):
                self.place()
                self.shrink()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(GIVE_UP_S)


def take_over(world: HaCluster, placements: Placements) -> tuple[float, float]:
    """Kill the leader; seconds until another answers, and until it has placed something."""
    leader = world.leader()
    began_s = time.monotonic()
    leader.process.end(signal.SIGKILL)
    successor = world.leader(other_than=leader, within_s=GIVE_UP_S)
    answered_s = time.monotonic() - began_s
    name = ""
    while time.monotonic() - began_s < GIVE_UP_S:
        name = name or placements.place(successor)
        with suppress(grpc.RpcError):
            if name and any(view.runner.node for view in world.runners(name)):
                break
        time.sleep(0.02)
    placed_s = time.monotonic() - began_s
    if name:
        placements.keep(name)
    world.start_one(leader)
    return answered_s, placed_s


def leaderless(world: HaCluster, seconds_s: float) -> tuple[int, int]:
    """Requests (served, failed) to one runner through all gateways while no scheduler lives."""
    world.apply("one", driver="process", max_concurrency=1)
    for port in world.http_ports:
        assert world.post_to(port, "one").status == 200
    for one in world.schedulers:
        one.process.end(signal.SIGKILL)
    with Load(world, "one") as load:
        time.sleep(seconds_s)
    for one in world.schedulers:
        one.process.start()
    world.leader(within_s=GIVE_UP_S)
    return load.served, len(load.failed)


def measure(folder: Path, kills: int, leaderless_s: float) -> dict[str, Any]:
    """Everything; blocks."""
    with ha_cluster(folder, gateways=3) as world:
        for number in range(NODES):
            world.add_node(f"n{number}", driver="process", gpus="16xH100-80GB")
        world.apply("warm", count=NODES, driver="process", max_concurrency=NODES)
        runners, pids = world.ready("warm"), world.worker_pids()
        placements = Placements(world)
        took: list[tuple[float, float]] = []
        with Load(world, "warm") as load, placements.going_on():
            for _ in range(kills):
                took.append(take_over(world, placements))
                placements.audit()
        world.wait_ready("warm", NODES)
        for app in sorted(world.apps() - {"warm"}):  # also those whose deletion a takeover swallowed: they hold GPUs
            world.call("DeleteApp", pb.DeleteAppRequest(id=f"default/{app}"))
        disturbed = len(runners.items() ^ world.ready("warm").items()) + len(pids - world.worker_pids())
        served, failed = leaderless(world, leaderless_s)
        return {
            "took": took,
            "lost": len(placements.lost),
            "doubled": len(placements.doubled),
            "runners_disturbed": disturbed,
            "requests": load.served,
            "failed": len(load.failed),
            "why_failed": load.failed[:3],
            "requests_leaderless": served,
            "failed_leaderless": failed,
            "leaderless_s": leaderless_s,
        }


async def run(options: Options) -> Result:
    """See the module."""
    if why := why_no_etcd():
        raise SystemExit(f"error: {why}")
    whole = options.pairs >= Options().pairs
    with tempfile.TemporaryDirectory(prefix="fo") as folder:
        found = await asyncio.to_thread(
            measure, Path(folder), KILLS if whole else options.pairs, LEADERLESS_S if whole else 5.0
        )
    took = found.pop("took")
    answered, placed = [one for one, _ in took], [one for _, one in took]
    print_table(("kill", "answers after s", "placed after s"), [(n + 1, *pair) for n, pair in enumerate(took)])
    none = ("lost", "doubled", "runners_disturbed", "failed", "failed_leaderless")
    worst = max(placed)
    return Result(
        bench="failover",
        ours=worst,
        baseline=STORE_LEASE_TTL_S,
        ratio=worst / STORE_LEASE_TTL_S,
        unit="s, worst of all takeovers",
        runs=len(took),
        must_reach=MUST_REACH,
        reached=worst <= TAKEOVER_MAX_S and not any(found[name] for name in none) and found["requests"] > 0,
        extra={
            "median": significant(statistics.median(placed)),
            "p90": significant(percentile(placed, 0.9)),
            "answers_worst": significant(max(answered)),
            **found,
        },
    )
