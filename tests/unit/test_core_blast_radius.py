"""What silence costs: a zone is replaced at a bounded rate, silence everywhere is ours, what served goes on serving."""

from __future__ import annotations

from random import Random

import pytest

from core_world import GIB, SimNode, World, sim_gpus, spec_of
from fal_contract.limits import (
    FAILOVER_GRACE_S,
    LOST_AFTER_S,
    LOST_REPLACED_MIN,
    LOST_REPLACED_OF_DOMAIN_MIN,
)
from fal_scheduler.core import liveness, tokens
from fal_scheduler.core.cache_events import PeerReach
from fal_scheduler.core.events import ApplyApp, ApplyPool, CreateToken, GatewayReach, Moment, RedeemToken, Tick
from fal_scheduler.core.records import Binding, Change, Goal, Node, Pool, Runner, RunnerState, key_of
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health, Inventory, NodeLive
from fal_scheduler.core.work import Work

APP = "default/a"


class Zones:
    """Three zones of three nodes with two GPUs each; an app with so many runners, all of them ready."""

    def __init__(self, least: int = 6) -> None:
        self.world = World(Random(3), nodes=0)
        world = self.world
        for zone in ("a", "b", "c"):
            world.step(ApplyPool(Pool(zone, zone=zone)))
            token = tokens.create(
                f"z-{zone}", "secret", pool=zone, ttl_s=86400.0, uses=9, created_by="", now_s=world.wall_s
            )
            world.step(CreateToken(token))
            for at in range(3):
                self._join(f"{zone}-{at}", f"z-{zone}")
        spec, digest = spec_of(gpus=1, least=least)
        world.step(ApplyApp(APP, spec, digest))
        self.rounds(8)
        assert self.ready() == least

    def _join(self, node_id: str, token: str) -> None:
        world = self.world
        world.step(RedeemToken(token, "secret", node_id, node_id))
        gpus = sim_gpus(node_id, 2, "H100-80GB", 80)
        world.nodes[node_id] = SimNode(node_id, Inventory(1, gpus, "555", "12.4", 16_000, 64 * GIB))
        world.hello(node_id)

    def zone(self, letter: str) -> list[str]:
        return [node_id for node_id in self.world.nodes if node_id[0] == letter]

    def health(self, letter: str) -> set[Health]:
        return {self.world.state.health_of(node_id) for node_id in self.zone(letter)}

    def on(self, letter: str) -> list[Runner]:
        return [one for one in self.world.state.runners.values() if one.node[:1] == letter]

    def ready(self) -> int:
        """Runners that somebody can use now."""
        state, count = self.world.state, 0
        for one in state.runners.values():
            status = state.status_of(one)
            heard = state.health_of(one.node) is Health.READY
            count += bool(one.goal is Goal.RUN and heard and status is not None and status.serves)
        return count

    def cut(self, *letters: str) -> None:
        for letter in letters:
            for node_id in self.zone(letter):
                self.world.cut(node_id)

    def rounds(self, count: int, *, advance: bool = True) -> None:
        world = self.world
        for _ in range(count):
            world.settle()
            for node_id, node in world.nodes.items():
                if not node.connected:
                    continue
                world.deliver(node_id)
                for runner_id in list(node.containers):
                    if advance and node.containers[runner_id].state is not RunnerState.IDLE:
                        node.advance(runner_id)
                world.report(node_id)
            world.tick(1.0)


def test_a_silent_zone_is_unknown_first_then_lost_and_replaced_elsewhere() -> None:
    zones = Zones()
    mine = zones.on("a")
    assert mine
    zones.cut("a")
    zones.rounds(30)
    assert zones.health("a") == {Health.UNKNOWN}
    assert {one.goal for one in zones.on("a")} == {Goal.RUN}, "they may well serve: they keep their slots"
    assert len(zones.world.state.runners) == 6
    zones.rounds(50)
    assert zones.health("a") == {Health.LOST}
    assert zones.ready() == 6
    assert {one.id for one in mine} <= zones.world.state.runners.keys(), "their GPUs stay promised"
    assert ("MASS_SILENCE", "cluster") not in zones.world.state.alarms


def test_silence_everywhere_replaces_nothing_and_is_an_alarm_until_somebody_speaks() -> None:
    zones = Zones()
    zones.cut("a", "b", "c")
    zones.rounds(120)
    state = zones.world.state
    assert zones.health("a") | zones.health("b") | zones.health("c") == {Health.UNKNOWN}
    assert len(state.runners) == 6
    alarm = state.alarms["MASS_SILENCE", "cluster"]
    assert "9 of 9 nodes" in alarm.message
    assert "3 of 3 failure domains" in alarm.message
    assert "declare-lost" in alarm.remedy
    for node_id in zones.world.nodes:
        zones.world.hello(node_id)
    zones.rounds(2)
    assert ("MASS_SILENCE", "cluster") not in state.alarms
    assert zones.ready() == 6


def test_a_silent_node_that_a_gateway_reaches_is_not_lost_as_long_as_it_does() -> None:
    zones = Zones()
    world = zones.world
    zones.cut("a")
    for _ in range(10):
        world.step(GatewayReach("g1", {"a-0": "direct"}, world.now_s))
        zones.rounds(10)
    assert world.state.health_of("a-0") is Health.UNKNOWN
    assert world.state.health_of("a-1") is Health.LOST
    zones.rounds(int(LOST_AFTER_S) + 2)
    assert world.state.health_of("a-0") is Health.LOST


def test_a_silent_node_that_a_cache_of_another_domain_reaches_is_not_lost() -> None:
    zones = Zones()
    world = zones.world
    zones.cut("a")
    for _ in range(10):
        world.step(PeerReach("a-0", "b-0", world.now_s))
        zones.rounds(10)
    assert world.state.health_of("a-0") is Health.UNKNOWN
    assert world.state.health_of("a-1") is Health.LOST
    zones.rounds(int(LOST_AFTER_S) + 2)
    assert world.state.health_of("a-0") is Health.LOST


def test_a_node_that_never_spoke_to_this_leader_has_the_grace_to_do_so() -> None:
    zones = Zones()
    world = zones.world
    state = State()  # a new leader knows the records and nothing else
    for table in (world.state.pools, world.state.nodes, world.state.apps, world.state.revisions, world.state.runners):
        for record in table.values():
            state.apply(Change(key_of(record), None, record))
    state.meta, state.term, state.term_began_s = world.state.meta, 2, world.now_s
    world.core = world.core_of(state)
    for node_id, node in world.nodes.items():
        if node_id[0] == "a":
            node.connected = False
        else:
            world.hello(node_id)
    zones.rounds(int(FAILOVER_GRACE_S) - 10)
    assert Health.LOST not in zones.health("a"), "it may be on its way to this leader"
    zones.cut("b")
    zones.rounds(20)
    used = [node_id for node_id in zones.zone("a") if state.runners_by_node.get(node_id)]
    assert {state.health_of(node_id) for node_id in used} == {Health.LOST}
    assert zones.health("b") == {Health.UNKNOWN}
    zones.rounds(60)
    assert zones.health("b") == {Health.LOST}


def test_replacements_are_bounded_in_each_minute_by_domain_and_in_all() -> None:
    """More runners than may be replaced at once, on paper: nobody places them."""
    state = State()
    state.settled = True
    for zone in ("a", "b", "c"):
        state.apply(Change(zone, None, Pool(zone, zone=zone)))
        node = f"{zone}-0"
        state.apply(Change(node, None, Node(node, node, zone)))
        state.live[node] = NodeLive(node, Health.LOST if zone != "c" else Health.READY, session_id="s")
        state.runners_by_node[node] = {f"default/{zone}-{at}": None for at in range(500)}
        for runner_id in state.runners_by_node[node]:
            state.runners[runner_id] = Runner(runner_id, APP, (Binding(APP, 1),), 0.0, node)

    def abandon(now_s: float) -> dict[str, int]:
        work = Work(state, Moment(now_s, now_s), None)  # type: ignore[arg-type]
        liveness._abandon(work)
        return {zone: sum(1 for one in state.abandoned if one.startswith(f"default/{zone}")) for zone in ("a", "b")}

    of_domain, of_all = max(LOST_REPLACED_OF_DOMAIN_MIN, 150), max(LOST_REPLACED_MIN, 300)
    assert abandon(1000.0) == {"a": of_domain, "b": of_domain}
    assert of_all == 2 * of_domain
    assert abandon(1059.0) == {"a": of_domain, "b": of_domain}, "not before the minute is over"
    assert abandon(1060.0) == {"a": 2 * of_domain, "b": 2 * of_domain}
    state.live["c-0"].health = Health.LOST
    abandon(1120.0)
    assert len(state.abandoned) == 3 * of_all, "of all domains together"


def test_what_served_all_the_time_stays_and_what_stood_in_for_it_drains() -> None:
    zones = Zones()
    world = zones.world
    mine = {one.id for one in zones.on("a")}
    zones.cut("a")
    zones.rounds(90)
    assert zones.ready() == 6
    stand_ins = {one.id for one in world.state.runners.values()} - mine
    for node_id in zones.zone("a"):
        world.hello(node_id)
    zones.rounds(30)
    left = set(world.state.runners)
    assert mine <= left, "they were there first, and warm"
    assert len(left) == 6
    assert len(stand_ins - left) == len(mine)


def test_what_only_starts_when_the_node_comes_back_is_stopped() -> None:
    zones = Zones()
    world = zones.world
    mine = {one.id for one in zones.on("a")}
    zones.cut("a")
    zones.rounds(70, advance=False)
    starting = {one.id for one in world.state.runners.values()} - mine
    fresh = [one for one in world.state.runners.values() if one.id in starting and not _serves(world, one)]
    assert len(fresh) == len(mine)
    for node_id in zones.zone("a"):
        world.hello(node_id)
    world.settle()
    assert {world.state.runners[one.id].goal for one in fresh if one.id in world.state.runners} <= {Goal.STOP}
    zones.rounds(10)
    assert mine <= set(world.state.runners)
    assert not world.state.returned, "all have their place again"


def _serves(world: World, runner: Runner) -> bool:
    status = world.state.status_of(runner)
    return status is not None and status.serves


@pytest.mark.parametrize("stall_s", [0.0, 200.0])
def test_our_own_stall_gives_everybody_that_much_longer(stall_s: float) -> None:
    zones = Zones()
    world = zones.world
    zones.cut("a")
    zones.rounds(10)
    world.now_s += stall_s
    world.step(Tick(stall_s=stall_s))
    zones.rounds(2)
    assert zones.health("a") == {Health.READY}
    zones.rounds(60)
    assert zones.health("a") == {Health.LOST}
