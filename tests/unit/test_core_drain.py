"""Runners leave a node: replaced first, in the app's share, stopped at the deadline; nodes labelled, removed, lost."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from core_world import World, spec_of
from fal_contract.errors import Code, FalError
from fal_contract.limits import COMMIT_OPERATIONS_MAX
from fal_scheduler.core.events import ApplyApp, CordonNode, Event, Moment
from fal_scheduler.core.node_events import (
    CancelDrain,
    DeclareLost,
    DrainNode,
    LabelNode,
    NodeNotice,
    RebootDue,
    RebootRefused,
    RemoveNode,
)
from fal_scheduler.core.records import Goal, Node, Resources, Runner, RunnerState
from fal_scheduler.core.told import Capabilities, Health

APP = "default/a"


class Fleet:
    """Nodes with 2, 4, 2 … GPUs and one app whose runners are ready."""

    def __init__(self, least: int, *, nodes: int = 4) -> None:
        self.world = World(Random(1), nodes=nodes)
        spec, digest = spec_of(gpus=1, least=least)
        self.world.step(ApplyApp(APP, spec, digest))
        self.rounds(8)
        assert self.serving() == least

    def do(self, event: Event) -> None:
        assert self.world.step(event) is not None

    def node(self, node_id: str) -> Node:
        return self.world.state.nodes[node_id]

    def runners(self, node_id: str = "") -> list[Runner]:
        return [one for one in self.world.state.runners.values() if node_id in ("", one.node)]

    def busiest(self) -> str:
        return max(self.world.nodes, key=lambda node_id: (len(self.runners(node_id)), node_id))

    def serving(self) -> int:
        state = self.world.state
        running = [one for one in self.runners() if one.goal is Goal.RUN]
        return sum(1 for one in running if (status := state.status_of(one)) is not None and status.serves)

    def rounds(self, count: int, *, least: int = 0, silent: tuple[str, ...] = ()) -> None:
        world = self.world
        for _ in range(count):
            world.settle()
            for node_id, node in world.nodes.items():
                if node_id in silent or not node.connected:
                    continue
                world.deliver(node_id)
                for runner_id in list(node.containers):
                    if node.containers[runner_id].state is not RunnerState.IDLE:
                        node.advance(runner_id)
                world.report(node_id)
            world.tick(1.0)
            assert self.serving() >= least, [(one.id, one.node, one.goal) for one in self.runners()]


def test_a_drained_node_is_left_and_never_fewer_serve() -> None:
    fleet = Fleet(4)
    node = fleet.busiest()
    assert len(fleet.runners(node)) > 1
    fleet.do(DrainNode(node, reason="fan", actor="ada"))
    assert fleet.node(node).cordoned
    fleet.rounds(40, least=4)
    assert not fleet.runners(node)
    assert (fleet.node(node).drain, fleet.node(node).cordon_reason) == (None, "drained: fan")
    assert not fleet.world.state.draining


def test_no_more_leave_at_once_than_the_app_allows() -> None:
    fleet = Fleet(8, nodes=8)
    fleet.do(DrainNode(fleet.busiest()))
    for _ in range(40):
        fleet.rounds(1, least=8)
        assert sum(1 for one in fleet.runners() if one.goal is Goal.DRAIN) <= 2, "a quarter of eight"


def test_without_another_place_they_stay_until_the_deadline() -> None:
    fleet = Fleet(2, nodes=1)
    fleet.do(DrainNode("n-0", deadline_s=60.0))
    fleet.rounds(50, least=2)
    fleet.rounds(30)
    assert not fleet.runners("n-0")
    assert fleet.node("n-0").drain is None
    assert fleet.serving() == 0


def test_without_a_deadline_they_stay_for_ever_and_a_new_place_frees_them() -> None:
    fleet = Fleet(2, nodes=2)
    for node_id in ("n-0", "n-1"):
        fleet.do(DrainNode(node_id))
    fleet.rounds(120, least=2)
    fleet.do(CancelDrain("n-1"))
    fleet.rounds(40, least=2)
    assert not fleet.runners("n-0")


def test_force_stops_at_once() -> None:
    fleet = Fleet(3)
    node = fleet.busiest()
    fleet.do(DrainNode(node, force=True))
    assert {one.goal for one in fleet.runners(node)} == {Goal.STOP}
    fleet.rounds(20)
    assert fleet.serving() == 3


def test_used_again_when_it_is_empty_where_that_was_asked() -> None:
    fleet = Fleet(1)
    node = fleet.busiest()
    fleet.do(DrainNode(node, uncordon=True))
    fleet.rounds(30, least=1)
    assert not fleet.node(node).cordoned


def test_a_cancelled_drain_takes_back_what_it_started() -> None:
    fleet = Fleet(4)
    node = fleet.busiest()
    fleet.do(DrainNode(node))
    fleet.do(CancelDrain(node))
    fleet.rounds(40, least=4)
    assert (fleet.node(node).cordoned, fleet.node(node).drain) == (False, None)
    assert len(fleet.runners()) == 4


def test_a_reboot_waits_until_the_machine_is_back() -> None:
    fleet = Fleet(1)
    node = fleet.busiest()
    fleet.do(DrainNode(node, kind="reboot"))
    fleet.rounds(30, least=1)
    drain = fleet.node(node).drain
    assert drain is not None
    assert drain.boot_id == f"boot-{node}"
    assert fleet.node(node).cordoned
    fleet.world.nodes[node].boot_id = "after"
    fleet.world.hello(node)
    fleet.rounds(5, least=1)
    assert (fleet.node(node).cordoned, fleet.node(node).drain) == (False, None)


def test_a_removed_node_is_forgotten_when_it_is_empty() -> None:
    fleet = Fleet(2)
    node = fleet.busiest()
    fleet.do(DrainNode(node, kind="remove"))
    fleet.rounds(40, least=2)
    assert node not in fleet.world.state.nodes


def test_spot_notices_leave_before_the_machine_goes_and_can_be_withdrawn() -> None:
    fleet = Fleet(2, nodes=3)
    node = fleet.busiest()
    session = fleet.world.state.live[node].session_id
    fleet.do(NodeNotice(node, session, "spot", 120.0, "", fleet.world.now_s))
    fleet.rounds(60, least=2)
    assert not fleet.runners(node)
    assert fleet.node(node).drain is not None, "the machine is still to go"
    fleet.do(NodeNotice(node, session, "", 0.0, "", fleet.world.now_s))
    assert (fleet.node(node).cordoned, fleet.node(node).drain) == (False, None)


def test_a_notice_that_is_withdrawn_leaves_an_operators_cordon() -> None:
    fleet = Fleet(0)
    session = fleet.world.state.live["n-0"].session_id
    fleet.do(CordonNode("n-0", True, "fan"))
    for within_s in (900.0, 60.0):  # told twice
        fleet.do(NodeNotice("n-0", session, "notice", within_s, "switches", fleet.world.now_s))
    assert fleet.node("n-0").drain is not None
    fleet.do(NodeNotice("n-0", session, "", 0.0, "", fleet.world.now_s))
    assert (fleet.node("n-0").cordoned, fleet.node("n-0").drain) == (True, None)


def test_a_notice_without_a_date_stops_nothing() -> None:
    fleet = Fleet(2, nodes=1)
    session = fleet.world.state.live["n-0"].session_id
    fleet.do(NodeNotice("n-0", session, "spot", -1.0, "rebalance", fleet.world.now_s))
    fleet.rounds(60, least=2)
    fleet.do(NodeNotice("n-0", session, "spot", 30.0, "taken back", fleet.world.now_s))
    fleet.rounds(20)
    assert not fleet.runners("n-0"), "now there is a date"


def test_a_machine_that_was_not_rebooted_stays_cordoned_with_an_alarm_until_somebody_looked() -> None:
    fleet = Fleet(1)
    node = fleet.busiest()
    fleet.do(DrainNode(node, kind="reboot"))
    fleet.rounds(30, least=1)
    session = fleet.world.state.live[node].session_id
    fleet.do(RebootRefused(node, session, "another boot", "no power", "Go and look.", fleet.world.now_s))
    assert fleet.node(node).drain is not None, "an order of another boot"
    fleet.do(RebootRefused(node, session, f"boot-{node}", "no power", "Go and look.", fleet.world.now_s))
    assert (fleet.node(node).drain, fleet.node(node).cordon_reason) == (None, "not rebooted: no power")
    assert "no power" in fleet.world.state.alarms["NODE_NOT_REBOOTED", node].message
    fleet.do(CordonNode(node, False))
    fleet.rounds(2)
    assert ("NODE_NOT_REBOOTED", node) not in fleet.world.state.alarms


def test_a_reboot_of_a_machine_whose_agent_may_not_is_refused_at_once() -> None:
    fleet = Fleet(1)
    node = fleet.busiest()
    fleet.world.state.live[node].capabilities = Capabilities()
    with pytest.raises(FalError, match="may not reboot") as refused:
        fleet.world.core.step(DrainNode(node, kind="reboot"), Moment(fleet.world.now_s, fleet.world.wall_s))
    assert "reboot_command" in refused.value.remedy
    assert not fleet.node(node).cordoned


def test_the_order_goes_out_after_the_boot_is_in_the_record_and_again_with_each_session_of_it() -> None:
    fleet = Fleet(0)
    outcome = fleet.world.step(DrainNode("n-0", kind="reboot"))
    assert outcome is not None
    assert RebootDue("n-0", "boot-n-0") in outcome.effects
    assert any(isinstance(one.after, Node) and one.after.drain is not None for one in outcome.changes)
    meta = fleet.world.state.meta
    assert meta is not None
    again = fleet.world.step(fleet.world.nodes["n-0"].hello(fleet.world.now_s, meta))
    assert again is not None
    assert RebootDue("n-0", "boot-n-0") in again.effects
    fleet.world.nodes["n-0"].boot_id = "after"
    back = fleet.world.step(fleet.world.nodes["n-0"].hello(fleet.world.now_s, meta))
    assert back is not None
    assert not any(isinstance(one, RebootDue) for one in back.effects)


def test_what_cannot_go_elsewhere_is_stopped_before_the_cloud_takes_the_machine() -> None:
    fleet = Fleet(2, nodes=1)
    session = fleet.world.state.live["n-0"].session_id
    fleet.do(NodeNotice("n-0", session, "spot", 60.0, "", fleet.world.now_s))
    fleet.rounds(30, least=2)
    fleet.rounds(25)
    assert not fleet.runners("n-0")


def test_news_of_an_old_session_count_nothing_and_a_notice_stands_beside_an_operators_drain() -> None:
    fleet = Fleet(1)
    node = fleet.busiest()
    session = fleet.world.state.live[node].session_id
    fleet.do(NodeNotice(node, "an older one", "spot", 120.0, "", fleet.world.now_s))
    assert fleet.node(node).drain is None
    fleet.do(DrainNode(node, deadline_s=3600.0))
    drain = fleet.node(node).drain
    assert drain is not None
    fleet.do(NodeNotice(node, session, "notice", 120.0, "", fleet.world.now_s))
    both = fleet.node(node).drain
    assert both == replace(drain, notice="notice", notice_at_s=fleet.world.wall_s + 120.0)
    fleet.do(NodeNotice(node, session, "", 0.0, "", fleet.world.now_s))
    assert fleet.node(node).drain == drain, "the notice is withdrawn"


@pytest.mark.parametrize("first", ["drain", "spot"])
def test_of_an_operators_drain_and_a_notice_the_nearer_deadline_counts_whichever_came_first(first: str) -> None:
    fleet = Fleet(2, nodes=1)
    session = fleet.world.state.live["n-0"].session_id
    spot = NodeNotice("n-0", session, "spot", 60.0, "taken back", fleet.world.now_s)
    for event in (DrainNode("n-0"), spot) if first == "drain" else (spot, DrainNode("n-0")):
        fleet.do(event)
    fleet.rounds(30, least=2)
    fleet.rounds(25)
    assert not fleet.runners("n-0")
    drain = fleet.node("n-0").drain
    assert drain is not None
    assert (drain.kind, drain.keep_cordoned) == ("spot", True), "the operator's is over, the machine is still to go"
    fleet.do(NodeNotice("n-0", session, "", 0.0, "", fleet.world.now_s))
    assert (fleet.node("n-0").cordoned, fleet.node("n-0").drain) == (True, None), "it stays cordoned, as was asked"


def test_an_operators_nearer_deadline_counts_beside_a_notice() -> None:
    fleet = Fleet(2, nodes=1)
    session = fleet.world.state.live["n-0"].session_id
    fleet.do(DrainNode("n-0", deadline_s=20.0, uncordon=True))
    fleet.do(NodeNotice("n-0", session, "notice", 3600.0, "switches", fleet.world.now_s))
    fleet.rounds(25)
    assert not fleet.runners("n-0")
    assert fleet.node("n-0").cordoned, "its cloud works on it"
    fleet.do(NodeNotice("n-0", session, "", 0.0, "", fleet.world.now_s))
    assert not fleet.node("n-0").cordoned


def test_labels_are_set_and_removed_and_placement_sees_them() -> None:
    fleet = Fleet(0)
    fleet.do(LabelNode("n-0", {"disk": "nvme", "rack": "1"}))
    fleet.do(LabelNode("n-0", {"rack": "2"}, ("disk",)))
    assert fleet.node("n-0").labels == {"rack": "2"}
    assert fleet.world.state.fleet.facts["n-0"].labels["rack"] == "2"


def test_a_silent_pool_is_declared_lost_though_nobody_else_speaks() -> None:
    fleet = Fleet(2, nodes=4)
    everything = tuple(fleet.world.nodes)
    west = tuple(node_id for node_id in everything if fleet.node(node_id).pool == "west")
    for node_id in everything:
        fleet.world.cut(node_id)
    fleet.rounds(90)
    state = fleet.world.state
    assert {state.health_of(node_id) for node_id in everything} == {Health.UNKNOWN}, "it is we who are cut off"
    fleet.do(DeclareLost("west"))
    fleet.rounds(2)
    assert {state.health_of(node_id) for node_id in west} == {Health.LOST}
    assert {state.health_of(node_id) for node_id in everything if node_id not in west} == {Health.UNKNOWN}
    for node_id in west:
        fleet.world.hello(node_id)
    assert {state.health_of(node_id) for node_id in west} == {Health.READY}
    for node_id in west:
        fleet.world.cut(node_id)
    fleet.rounds(70)
    assert {state.health_of(node_id) for node_id in west} == {Health.UNKNOWN}, "that word was about another silence"


@pytest.mark.parametrize(
    ("event", "code", "field"),
    [
        (DrainNode("none"), Code.NOT_FOUND, ""),
        (DrainNode("n-0", kind="explode"), Code.INVALID, "kind"),
        (DrainNode("n-0", deadline_s=0.0), Code.INVALID, "deadline"),
        (CancelDrain("none"), Code.NOT_FOUND, ""),
        (LabelNode("n-0", {"": "x"}), Code.INVALID, "labels"),
        (LabelNode("n-0", {f"l{at}": "x" for at in range(65)}), Code.INVALID, "labels"),
        (RemoveNode("n-0"), Code.FAILED_PRECONDITION, ""),
        (RemoveNode("none"), Code.NOT_FOUND, ""),
        (DeclareLost("none"), Code.NOT_FOUND, ""),
        (DeclareLost("west"), Code.FAILED_PRECONDITION, ""),
    ],
)
def test_wrong_commands_are_refused(event: Event, code: Code, field: str) -> None:
    world = Fleet(1).world
    before = dict(world.state.nodes)
    with pytest.raises(FalError) as refused:
        world.core.step(event, Moment(world.now_s, world.wall_s))
    assert (refused.value.code, refused.value.field or "") == (code, field)
    assert refused.value.remedy
    assert world.state.nodes == before


def test_a_node_that_lost_more_runners_than_one_commit_holds_is_taken_in_step_by_step() -> None:
    """All were to stop; the machine comes back without any of them."""
    world = World(Random(1), nodes=1)
    spec, digest = spec_of(gpus=0, least=120, most=200, memory_gib=0)
    spec = replace(spec, resources=Resources(1, 0))
    world.step(ApplyApp(APP, spec, digest))
    world.settle()
    assert len(world.state.runners_by_node["n-0"]) == 120
    world.step(DrainNode("n-0", force=True))
    world.settle()
    for _ in range(4):
        world.tick(1.0)
    assert {one.goal for one in world.state.runners.values() if one.node} == {Goal.STOP}
    world.nodes["n-0"].containers.clear()
    meta = world.state.meta
    assert meta is not None
    outcome = world.step(world.nodes["n-0"].hello(world.now_s, meta))
    assert outcome is not None
    assert len(outcome.changes) <= COMMIT_OPERATIONS_MAX
    world.settle()
    assert not world.state.runners_by_node.get("n-0")
