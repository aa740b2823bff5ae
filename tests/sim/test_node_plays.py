"""Machines are taken out of a whole cluster in virtual time: drains over a failover, reboots, spot waves, lost zones.

Each play is one story on real leaders, engines, sessions and agents; the checker looks on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from core_world import GIB
from fal_agent.core.notice import Announced
from fal_contract.limits import LOST_AFTER_S
from fal_scheduler.core.events import ApplyApp
from fal_scheduler.core.node_events import DrainNode
from fal_scheduler.core.records import Drain, Node, Resources, Scaling, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health
from sim.checker import Wish
from sim.cluster import Profile, SimCluster, quiet
from sim.host import Host
from virtual_time import run_virtually

APP = "default/a"
WANTED = 4
Story = Callable[[SimCluster], Awaitable[None]]


@pytest.fixture
def tell(tmp_path: Path, base_seed: int) -> Callable[[Story], None]:
    """Tell a story on six healthy machines in two zones, with two schedulers and an app that serves."""

    def run(story: Story) -> None:
        quiet()

        async def main() -> None:
            cluster = SimCluster(base_seed, tmp_path, Profile(nodes=6, schedulers=2))
            for host in cluster.hosts.values():
                host.moody = False
            try:
                await cluster.found()
                await deploy(cluster)
                await story(cluster)
                cluster.stop_if_broken()
            finally:
                await cluster.close()

        run_virtually(main())

    return run


async def deploy(cluster: SimCluster) -> None:
    scaling = Scaling(min_concurrency=WANTED, max_concurrency=8, startup_timeout_s=60.0, request_timeout_s=60.0)
    spec = Spec(image="host", num_gpus=1, resources=Resources(1000, GIB), scaling=scaling)
    cluster.checker.excuses.wishes[APP] = [Wish("apply", WANTED, 0.0)]
    await cluster.submit(ApplyApp(APP, spec, "digest", actor="operator"))
    await cluster.until(lambda: serving(cluster) == WANTED, "an app that serves", within_s=60.0)
    # One that the leader has not heard of as ready counts as starting, and a drain starts it elsewhere at once.
    await cluster.until(lambda: known(cluster) == WANTED, "a leader that knows it", within_s=10.0)


def serving(cluster: SimCluster) -> int:
    return sum(len(host.serving()) for host in cluster.hosts.values())


def known(cluster: SimCluster) -> int:
    """Runners that the leader knows to serve."""
    state = view(cluster)
    statuses = [state.status_of(runner) for runner in state.runners.values()] if state is not None else []
    return sum(1 for status in statuses if status is not None and status.serves)


def view(cluster: SimCluster) -> State | None:
    leader = cluster.checker.leader()
    return leader.view if leader is not None else None


def busiest(cluster: SimCluster) -> Host:
    return max(cluster.hosts.values(), key=lambda host: (len(host.serving()), host.node_id))


async def always(cluster: SimCluster, done: Callable[[], object], name: str, *, within_s: float) -> None:
    """Until it is done, never fewer serve than should."""

    def good() -> object:
        assert serving(cluster) >= WANTED, f"{serving(cluster)} serve"
        return done()

    await cluster.until(good, name, within_s=within_s)


def empty(cluster: SimCluster, *hosts: Host) -> bool:
    state = view(cluster)
    return state is not None and not any(state.runners_by_node.get(host.node_id) for host in hosts)


def excuse(cluster: SimCluster, *hosts: Host) -> None:
    """What runs there may end."""
    for host in hosts:
        cluster.checker.excuses.runners.update(host.serving())


def fail_over(cluster: SimCluster) -> None:
    cluster.kill_scheduler(next(one for one in cluster.schedulers if one.leadership is not None))


def test_a_drain_goes_on_under_the_next_leader(tell: Callable[[Story], None]) -> None:
    async def story(cluster: SimCluster) -> None:
        host = busiest(cluster)
        excuse(cluster, host)
        await cluster.submit(DrainNode(host.node_id, reason="fan", actor="ada"))
        await asyncio.sleep(0.5)
        assert not empty(cluster, host)
        fail_over(cluster)
        await always(cluster, lambda: empty(cluster, host), "an empty node", within_s=120.0)
        await always(cluster, lambda: _node(cluster, host).drain is None, "the end of the drain", within_s=30.0)
        assert _node(cluster, host).cordon_reason == "drained: fan"

    tell(story)


def test_a_machine_is_rebooted_once_though_the_leader_changes_meanwhile(tell: Callable[[Story], None]) -> None:
    async def story(cluster: SimCluster) -> None:
        host = busiest(cluster)
        reboots = []

        def reboot() -> None:
            reboots.append(asyncio.get_running_loop().time())
            asyncio.get_running_loop().call_soon(cluster.power_off, host)

        host.on_reboot = reboot
        cluster.kill_agent(host)
        cluster.start_agent(host)  # says now that it may
        await cluster.until(lambda: _may_reboot(cluster, host), "an agent that may", within_s=60.0)
        excuse(cluster, host)
        await cluster.submit(DrainNode(host.node_id, "reboot", actor="ada"))
        await always(cluster, lambda: reboots, "the order", within_s=120.0)
        fail_over(cluster)
        await asyncio.sleep(20.0)
        assert _node(cluster, host).drain is not None, "it is not back yet"
        cluster.start_agent(host)
        await always(cluster, lambda: _node(cluster, host).drain is None, "the end of it", within_s=120.0)
        assert not _node(cluster, host).cordoned
        await asyncio.sleep(60.0)
        assert len(reboots) == 1

    tell(story)


def test_an_agent_that_comes_back_on_the_same_boot_is_told_again(tell: Callable[[Story], None]) -> None:
    async def story(cluster: SimCluster) -> None:
        host = busiest(cluster)
        told = []
        host.on_reboot = lambda: told.append(host.boots)  # and nothing happens
        cluster.kill_agent(host)
        cluster.start_agent(host)
        await cluster.until(lambda: _may_reboot(cluster, host), "an agent that may", within_s=60.0)
        excuse(cluster, host)
        await cluster.submit(DrainNode(host.node_id, "reboot", actor="ada"))
        await always(cluster, lambda: told, "the order", within_s=120.0)
        fail_over(cluster)
        await cluster.until(lambda: len(told) == 2, "the order again, of the same boot", within_s=60.0)

    tell(story)


def test_a_spot_wave_over_a_third_of_the_nodes_costs_nobody_anything(tell: Callable[[Story], None]) -> None:
    async def story(cluster: SimCluster) -> None:
        ranked = sorted(cluster.hosts.values(), key=lambda host: (-len(host.serving()), host.node_id))
        wave = ranked[:2]
        assert sum(len(host.serving()) for host in wave) > 1
        excuse(cluster, *wave)
        for host in wave:
            assert host.node is not None
            host.node.announce(Announced("spot", host.clock.wall_s() + 120.0, "the cloud wants it back"))
        await always(cluster, lambda: empty(cluster, *wave), "two empty nodes", within_s=100.0)
        for host in wave:
            cluster.power_off(host)
        await always(cluster, lambda: _lost(cluster, *wave), "two lost nodes", within_s=2 * LOST_AFTER_S)
        assert serving(cluster) == WANTED

    tell(story)


def test_a_notice_that_is_withdrawn_gives_the_node_back(tell: Callable[[Story], None]) -> None:
    async def story(cluster: SimCluster) -> None:
        host = busiest(cluster)
        assert host.node is not None
        excuse(cluster, *cluster.hosts.values())
        host.node.announce(Announced("notice", None, "some time"))
        await cluster.until(lambda: _node(cluster, host).cordoned, "a cordoned node", within_s=30.0)
        host.node.announce(None)
        await cluster.until(lambda: not _node(cluster, host).cordoned, "its return", within_s=30.0)
        assert _node(cluster, host).drain is None

    tell(story)


def test_a_lost_zone_is_replaced_in_the_other(tell: Callable[[Story], None]) -> None:
    async def story(cluster: SimCluster) -> None:
        zone = [host for at, host in enumerate(cluster.hosts.values()) if at % 2 == 0]
        cluster.checker.excuses.lost.add(APP)
        for host in zone:
            cluster.power_off(host)
        gone = WANTED - serving(cluster)
        assert gone > 0
        await asyncio.sleep(LOST_AFTER_S / 2)
        assert serving(cluster) == WANTED - gone, "unknown is not dead"
        await cluster.until(lambda: serving(cluster) == WANTED, "replacements", within_s=LOST_AFTER_S * 1.5)
        assert _lost(cluster, *zone)

    tell(story)


def test_when_everybody_is_silent_nothing_is_replaced_and_an_alarm_says_so(tell: Callable[[Story], None]) -> None:
    async def story(cluster: SimCluster) -> None:
        ways = [(host.node_id, one.name) for host in cluster.hosts.values() for one in cluster.schedulers]
        ways += [(b, a) for a, b in ways]
        before = {runner_id for host in cluster.hosts.values() for runner_id in host.serving()}
        cluster.network.block(*ways)
        await cluster.until(lambda: _alarm(cluster), "the alarm", within_s=3 * LOST_AFTER_S)
        state = view(cluster)
        assert state is not None
        assert {state.health_of(node_id) for node_id in cluster.hosts} == {Health.UNKNOWN}
        assert state.runners.keys() == before
        cluster.network.unblock(*ways)
        await cluster.until(lambda: not _alarm(cluster), "its end", within_s=120.0)
        await asyncio.sleep(60.0)
        assert {runner_id for host in cluster.hosts.values() for runner_id in host.serving()} == before

    tell(story)


def _alarm(cluster: SimCluster) -> bool:
    state = view(cluster)
    return state is not None and ("MASS_SILENCE", "cluster") in state.alarms


def _lost(cluster: SimCluster, *hosts: Host) -> bool:
    state = view(cluster)
    return state is not None and {state.health_of(host.node_id) for host in hosts} == {Health.LOST}


def _may_reboot(cluster: SimCluster, host: Host) -> bool:
    state = view(cluster)
    live = state.live.get(host.node_id) if state is not None else None
    return live is not None and "reboot" in live.capabilities.features and live.health is Health.READY


def _node(cluster: SimCluster, host: Host) -> Node:
    """Its record; while nobody leads, one of a node that is still drained."""
    state = view(cluster)
    return state.nodes[host.node_id] if state is not None else Node("", "", "", True, drain=Drain("drain"))
