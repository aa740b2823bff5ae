"""Three schedulers, etcd and three agents, each in a network namespace of its own; links are cut and healed.

Whatever is cut: no warm request fails, no runner is disturbed, nothing that was acknowledged is lost or doubled. Two of
the cuts by default, all with --all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from e2e_cluster import until
from e2e_network import Network, network
from fal_contract.v1 import cluster_pb2 as pb
from ha_cluster import ETCD_PORT, HaCluster, Load, Scheduler, ha_cluster

pytestmark = [
    pytest.mark.root, pytest.mark.netns, pytest.mark.etcd, pytest.mark.slow, pytest.mark.timeout(600),
]  # fmt: skip
NODES = ("n0", "n1", "n2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HaCluster]:
    """A warm app with a runner on each node."""
    with network() as made, ha_cluster(tmp_path_factory.mktemp("han"), made) as cluster:
        for number, name in enumerate(NODES):
            made.attach(name, f"10.79.{number}")
            cluster.add_node(name, driver="process", gpus="2xH100-80GB", namespace=name)
        cluster.apply("warm", count=len(NODES), driver="process")
        yield cluster


class Watched:
    """One cut: what was there before must be there after it."""

    def __init__(self, world: HaCluster) -> None:
        self.world = world
        self.number = 0

    def run(self, scenario: Callable[[HaCluster, Network, Scheduler], None]) -> None:
        world = self.world
        assert world.network is not None
        world.wait_ready("warm", len(NODES))
        before, pids = world.ready("warm"), world.worker_pids()
        apps, leader = world.apps(), world.leader()
        with Load(world, "warm") as load:
            until(lambda: load.served > 5, "requests are served")
            scenario(world, world.network, leader)
            for name in NODES:
                world.wait_node(name, "ready")
            served = load.served
            until(lambda: load.served > served + 5, "requests are served after it")
        assert load.failed == []
        assert world.ready("warm") == before
        assert pids <= world.worker_pids()
        assert apps <= world.apps()
        assert sum(world.leads(one) for one in world.schedulers) == 1

    def places(self) -> None:
        """Whoever leads takes an order and carries it out, once."""
        self.number += 1
        name = f"after{self.number}"
        (runner,) = self.world.apply(name, driver="process")
        assert [view.runner.id for view in self.world.runners(name)] == [runner]
        self.world.delete(name)


def test_cuts(world: HaCluster, scale: Callable[[int], int]) -> None:
    watched = Watched(world)

    def leader_from_etcd(world: HaCluster, net: Network, leader: Scheduler) -> None:
        net.block(leader.name, ETCD_PORT)
        try:
            world.leader(other_than=leader)
            until(lambda: not world.leads(leader), "the old leader knows that it is none")
            watched.places()
        finally:
            net.unblock(leader.name, ETCD_PORT)
        until(lambda: not world.view(leader).trouble, "it sees etcd again")
        assert not world.leads(leader)

    def node_from_leader(world: HaCluster, net: Network, leader: Scheduler) -> None:
        port = leader.ports["rpc"]
        net.block("n1", port)
        try:
            world.wait_node("n1", "unknown")
            assert world.leads(leader)
            watched.places()
        finally:
            net.unblock("n1", port)

    def leader_from_everybody(world: HaCluster, net: Network, leader: Scheduler) -> None:
        net.cut(leader.name)
        try:
            world.leader(other_than=leader)
            for name in NODES:
                world.wait_node(name, "ready")
            watched.places()
        finally:
            net.mend(leader.name)
        until(lambda: not world.leads(leader), "the old leader knows that it is none")

    def etcd_from_everybody(world: HaCluster, net: Network, leader: Scheduler) -> None:
        term = int(world.view(leader).term)
        for one in world.schedulers:
            net.block(one.name, ETCD_PORT)
        try:
            until(lambda: not any(world.leads(one) for one in world.schedulers), "nobody leads")
        finally:
            for one in world.schedulers:
                net.unblock(one.name, ETCD_PORT)
        assert int(world.view(world.leader()).term) > term
        watched.places()

    cuts = [leader_from_etcd, node_from_leader, leader_from_everybody, etcd_from_everybody]
    for cut in cuts[: len(cuts) if scale(10) == 10 else 2]:
        watched.run(cut)
    events = world.call("ListApps", pb.ListAppsRequest()).apps
    assert {view.app.id for view in events} == {"default/warm"}
