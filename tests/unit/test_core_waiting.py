"""What waits for a place: one order, woken by what could admit it; quotas; preemption."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_world import World, spec_of
from fal_contract.errors import Code, FalError
from fal_scheduler.core import preemption, quotas, waiting
from fal_scheduler.core.events import ApplyApp, CordonNode, DeleteApp, Moment, ScaleApp
from fal_scheduler.core.preemption import PREEMPTION_GAP
from fal_scheduler.core.quota_events import SetQuota, UnsetQuota
from fal_scheduler.core.records import Change, Goal, Runner, RunnerState, ScaleOverride, key_of
from fal_scheduler.core.state import Pending
from fal_scheduler.core.waiting_line import AGEING_S, Waiting, order_ms


class Fleet:
    """Nodes with 2, 4, 2 … GPUs."""

    def __init__(self, *, nodes: int = 1) -> None:
        self.world = World(Random(1), nodes=nodes)

    def apply(self, app: str, *, gpus: int = 1, least: int = 1, priority: int = 0, gpu_milli: int = 0) -> None:
        spec, digest = spec_of(gpus=gpus, least=least, gpu_milli=gpu_milli)
        spec = replace(spec, priority=priority)
        assert self.world.step(ApplyApp(app, spec, f"{digest} at {priority}")) is not None

    def runners(self, app: str) -> list[Runner]:
        state = self.world.state
        return [state.runners[id_] for id_ in state.runners_by_app.get(app, ())]

    def placed(self, app: str) -> int:
        return sum(1 for one in self.runners(app) if one.node and one.goal is Goal.RUN)

    def pending(self, app: str) -> Pending:
        return self.world.state.pending[app, 1]

    def rounds(self, count: int = 4) -> None:
        world = self.world
        for _ in range(count):
            world.settle()
            for node_id, node in world.nodes.items():
                world.deliver(node_id)
                for runner_id in list(node.containers):
                    if node.containers[runner_id].state is not RunnerState.IDLE:
                        node.advance(runner_id)
                world.report(node_id)
            world.tick(1.0)


def test_a_freed_place_goes_to_the_first_in_line_whatever_came_later() -> None:
    fleet = Fleet()
    fleet.apply("default/holder", gpus=2)
    for at, app in enumerate(("default/c", "default/a", "default/b")):
        fleet.apply(app, gpus=2)
        fleet.rounds(1)
        assert list(fleet.world.state.waiting)[at] == app
    fleet.world.step(DeleteApp("default/holder"))
    fleet.rounds()
    assert [fleet.placed(app) for app in ("default/c", "default/a", "default/b")] == [1, 0, 0]
    fleet.world.step(DeleteApp("default/c"))
    fleet.rounds()
    assert [fleet.placed(app) for app in ("default/a", "default/b")] == [1, 0]


def test_priority_goes_first_and_waiting_makes_up_for_it() -> None:
    fleet = Fleet()
    fleet.apply("default/holder", gpus=2, priority=50)
    fleet.apply("default/old", gpus=2)
    fleet.world.tick(4 * AGEING_S)
    fleet.apply("default/urgent", gpus=2, priority=3)
    fleet.apply("default/more", gpus=2, priority=5)
    fleet.rounds()
    order = ["default/more", "default/old", "default/urgent"]
    for app in order:
        holder = "default/holder" if app == order[0] else order[order.index(app) - 1]
        fleet.world.step(DeleteApp(holder))
        fleet.rounds()
        assert fleet.placed(app) == 1, app


def test_a_smaller_one_takes_what_the_first_cannot_use() -> None:
    fleet = Fleet()
    fleet.apply("default/one", gpus=1)
    fleet.apply("default/two", gpus=2)
    fleet.rounds()
    assert fleet.placed("default/two") == 0
    fleet.apply("default/small", gpus=1)
    fleet.rounds()
    assert fleet.placed("default/small") == 1


def test_only_classes_that_could_be_admitted_are_woken() -> None:
    fleet = Fleet(nodes=2)
    fleet.apply("default/holder", gpus=2, least=3)
    fleet.apply("default/wide", gpus=4)
    fleet.apply("default/narrow", gpus=1)
    fleet.rounds()
    state = fleet.world.state
    assert len(state.waiting.asleep) == 2
    looked: list[str] = []
    place = fleet.world.core.placer.place

    def counted(*args: object) -> object:
        looked.append(args[1].app)  # type: ignore[attr-defined]
        return place(*args)  # type: ignore[arg-type]

    fleet.world.core.placer.place = counted  # type: ignore[method-assign, assignment]
    fleet.rounds(10)
    assert not looked, "nothing is tried again while nothing changes"
    fleet.world.step(ScaleApp("default/holder", ScaleOverride(min_concurrency=2, max_concurrency=2)))
    fleet.rounds(6)
    assert fleet.placed("default/narrow") == 1
    assert "default/wide" not in looked, "four GPUs were never free on one node"


def test_a_change_for_everybody_wakes_everybody() -> None:
    fleet = Fleet()
    fleet.world.step(CordonNode("n-0", True))
    for app in ("default/a", "default/b"):
        fleet.apply(app)
    fleet.rounds()
    assert len(fleet.world.state.waiting) == 2
    fleet.world.step(CordonNode("n-0", False))
    fleet.rounds(1)
    assert not fleet.world.state.waiting
    assert fleet.placed("default/a") == fleet.placed("default/b") == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 50)), max_size=40), st.data())
def test_the_line_is_in_order_and_forgets(entries: list[tuple[int, int, int]], data: st.DataObject) -> None:
    line = Waiting()
    model: dict[str, tuple[tuple[object, ...], tuple[int, str]]] = {}
    for app, need, order in entries:
        name = f"t/{app}"
        line.put(name, (need,), order)
        have = model.get(name)
        if have is None or have[0] != (need,) or order < have[1][0]:
            model[name] = ((need,), (order, name))
        if data.draw(st.booleans()):
            gone = f"t/{data.draw(st.integers(0, 5))}"
            line.pop(gone)
            model.pop(gone, None)
    assert line.apps == model
    expected: dict[tuple[object, ...], list[tuple[int, str]]] = {}
    for need_, order_ in model.values():
        expected.setdefault(need_, []).append(order_)
    assert line.by_need == {need_: sorted(orders) for need_, orders in expected.items()}


@given(st.integers(-100, 100), st.integers(-100, 100), st.floats(0, 1e6))
def test_nobody_waits_for_ever(mine: int, theirs: int, since_s: float) -> None:
    """A later one passes an earlier one only within AGEING_S a point of priority."""
    spec, _ = spec_of()
    first = order_ms(replace(spec, priority=mine), since_s)
    later = order_ms(replace(spec, priority=theirs), since_s + max(0, theirs - mine) * AGEING_S + 1.0)
    assert first < later


# --- quotas ---------------------------------------------------------------------------------------------------------


def test_a_team_within_its_quota_is_never_refused_and_above_it_borrows_what_nobody_waits_for() -> None:
    fleet = Fleet(nodes=2)
    world = fleet.world
    world.step(SetQuota("a", 2000))
    world.step(SetQuota("b", 4000))
    fleet.apply("a/x", least=5)
    fleet.rounds()
    assert fleet.placed("a/x") == 5, "three are borrowed"
    fleet.apply("b/y", least=3)
    fleet.rounds(12)
    assert fleet.placed("b/y") == 3, "the owner takes back what it is owed"
    assert fleet.placed("a/x") == 3
    assert "taken back" in " ".join(one.goal_reason for one in fleet.runners("a/x")) or fleet.placed("a/x") == 3
    waits = next(one for one in fleet.runners("a/x") if not one.node)
    assert waits.goal is Goal.RUN


def test_who_waits_for_what_no_node_has_keeps_nobody_from_borrowing() -> None:
    fleet = Fleet(nodes=4)
    fleet.world.step(SetQuota("a", 8000))
    fleet.world.step(SetQuota("b", 1000))
    spec, digest = spec_of(gpus=1, model="B999")
    fleet.world.step(ApplyApp("a/x", spec, digest))
    fleet.apply("b/y", least=3)
    fleet.rounds()
    assert (fleet.placed("a/x"), fleet.placed("b/y")) == (0, 3)


def test_who_may_not_borrow_waits_and_says_why() -> None:
    fleet = Fleet(nodes=2)
    fleet.world.step(SetQuota("a", 1000, borrow=False))
    fleet.apply("a/x", least=2)
    fleet.rounds()
    assert fleet.placed("a/x") == 1
    assert fleet.pending("a/x").reason == "team a holds 1 GPUs of its quota of 1, 1 more asked, and it may not borrow"
    assert fleet.pending("a/x").refused == (("quota", 1),)
    fleet.world.step(SetQuota("a", 2000, borrow=False))
    fleet.rounds()
    assert fleet.placed("a/x") == 2
    fleet.world.step(UnsetQuota("a"))
    assert not fleet.world.state.quotas


def test_fractions_count_as_such() -> None:
    fleet = Fleet()
    fleet.world.step(SetQuota("a", 500, borrow=False))
    fleet.apply("a/x", gpu_milli=250, least=3)
    fleet.rounds()
    assert fleet.placed("a/x") == 2
    assert fleet.world.state.held_milli == {"a": 500}


@pytest.mark.parametrize(
    ("event", "code", "field"),
    [
        (SetQuota("A!", 1000), Code.INVALID, "team"),
        (SetQuota("a", -1), Code.INVALID, "gpus"),
        (UnsetQuota("a"), Code.NOT_FOUND, ""),
    ],
)
def test_wrong_quotas_are_refused(event: SetQuota | UnsetQuota, code: Code, field: str) -> None:
    world = Fleet().world
    with pytest.raises(FalError) as refused:
        world.core.step(event, Moment(world.now_s, world.wall_s))
    assert (refused.value.code, refused.value.field or "") == (code, field)
    assert not world.state.quotas


# --- preemption -----------------------------------------------------------------------------------------------------


def test_higher_priority_takes_from_lower_drained_and_the_place_is_kept_for_it() -> None:
    fleet = Fleet()
    fleet.apply("default/low", least=2)
    fleet.rounds()
    fleet.apply("default/high", gpus=2, priority=PREEMPTION_GAP)
    state = fleet.world.state
    fleet.rounds(2)
    victims = [one for one in fleet.runners("default/low") if one.goal is not Goal.RUN]
    assert {one.goal for one in victims} <= {Goal.DRAIN}
    assert set(state.reserved.values()) <= {"default/high"}
    fleet.rounds(20)
    assert fleet.placed("default/high") == 1
    assert fleet.placed("default/low") == 0
    assert not state.reserved
    assert fleet.pending("default/low").reason


def test_a_small_gap_takes_nothing() -> None:
    fleet = Fleet()
    fleet.apply("default/low", least=2)
    fleet.rounds()
    fleet.apply("default/high", gpus=2, priority=PREEMPTION_GAP - 1)
    fleet.rounds(10)
    assert (fleet.placed("default/low"), fleet.placed("default/high")) == (2, 0)


def test_the_fewest_and_youngest_are_taken() -> None:
    fleet = Fleet(nodes=2)
    fleet.apply("default/wide", gpus=2)
    fleet.rounds()
    fleet.apply("default/old", gpus=2)
    fleet.rounds()
    fleet.apply("default/young", gpus=2)
    fleet.rounds()
    fleet.apply("default/high", gpus=2, priority=50)
    fleet.rounds(12)
    assert fleet.placed("default/high") == 1
    assert [fleet.placed(f"default/{one}") for one in ("wide", "old", "young")] == [1, 1, 0]


def test_never_below_a_teams_quota() -> None:
    fleet = Fleet()
    fleet.world.step(SetQuota("a", 2000))
    fleet.apply("a/x", least=2)
    fleet.rounds()
    fleet.apply("b/y", gpus=1, priority=90)
    fleet.rounds(10)
    assert (fleet.placed("a/x"), fleet.placed("b/y")) == (2, 0)
    assert not fleet.world.state.reserved


@pytest.mark.parametrize("why", ["idle runners give way", "the store is suspected"])
def test_a_tick_takes_nothing_while_something_else_is_under_way_or_all_is_held(why: str) -> None:
    fleet = Fleet()
    fleet.apply("default/low", least=2)
    fleet.rounds()
    state = fleet.world.state
    held = why != "idle runners give way"
    if not held:
        state.demand.gave_way["default/idle-1"] = "default/high"
    fleet.apply("default/high", gpus=2, priority=90)
    if held:
        fleet.world.settle()
        for runner in fleet.runners("default/low"):
            state.apply(Change(key_of(runner), runner, replace(runner, goal=Goal.RUN, goal_reason="")))
        state.hold_all = why
    for _ in range(8):
        fleet.world.tick(1.0)
    assert all(one.goal is Goal.RUN for one in fleet.runners("default/low"))
    state.demand.gave_way.clear()
    state.hold_all = ""
    fleet.rounds(12)
    assert fleet.placed("default/high") == 1


def test_a_new_leader_looks_for_places_once_when_all_nodes_have_spoken() -> None:
    fleet = Fleet(nodes=3)
    for at in range(5):
        fleet.apply(f"default/wide{at}", gpus=64)
    state = fleet.world.state
    assert len(state.waiting) == 5
    state.settled = False
    state.freed_all = True
    waiting.wake(state)
    assert not state.awake
    state.settled = True
    waiting.wake(state)
    assert state.awake


def test_a_reservation_ends_with_its_reason() -> None:
    fleet = Fleet()
    fleet.apply("default/low", least=2)
    fleet.rounds()
    fleet.apply("default/high", gpus=2, priority=50)
    fleet.world.settle()
    assert fleet.world.state.reserved == {"n-0": "default/high"}
    fleet.world.step(DeleteApp("default/high"))
    fleet.rounds(10)
    assert not fleet.world.state.reserved
    assert fleet.placed("default/low") == 2


def test_who_waits_for_a_backoff_takes_nothing_and_the_next_of_its_class_may() -> None:
    fleet = Fleet()
    world, state = fleet.world, fleet.world.state
    fleet.apply("default/first", gpus=2, priority=50)
    fleet.rounds()
    world.nodes["n-0"].crash(fleet.runners("default/first")[0].id)
    world.report("n-0")
    fleet.apply("default/low", least=2)
    fleet.rounds(3)
    assert fleet.placed("default/low") == 2, "nothing is kept for who waits for a backoff"
    fleet.apply("default/second", gpus=2, priority=40)
    fleet.rounds(12)
    assert [fleet.placed(f"default/{one}") for one in ("first", "second", "low")] == [0, 1, 0]
    assert state.backoffs["default/first"].until_s > world.now_s
    world.step(DeleteApp("default/second"))
    fleet.rounds(40)
    assert fleet.placed("default/first") == 1


def test_what_is_kept_for_an_app_is_everybodys_when_the_app_crashes() -> None:
    fleet = Fleet(nodes=2)
    world, state = fleet.world, fleet.world.state
    fleet.apply("default/high", gpus=2, priority=50)
    fleet.apply("default/low", gpus=2, least=2)
    fleet.rounds()
    assert (fleet.placed("default/high"), fleet.placed("default/low")) == (1, 2)
    mine = next(one for one in fleet.runners("default/high") if one.node)
    world.step(ScaleApp("default/high", ScaleOverride(min_concurrency=2)))
    world.settle()
    assert list(state.reserved.values()) == ["default/high"]
    world.nodes[mine.node].crash(mine.id)
    world.report(mine.node)
    assert not state.reserved
    fleet.rounds(8)
    assert fleet.placed("default/low") == 2
    fleet.rounds(40)
    assert fleet.placed("default/high") == 2, "after its backoff it takes what it has a right to"


def test_what_is_kept_for_one_is_its_own_though_another_of_its_class_came_before_it() -> None:
    fleet = Fleet()
    world, state = fleet.world, fleet.world.state
    fleet.apply("default/low", least=2)
    fleet.rounds()
    fleet.apply("default/high", gpus=2, priority=PREEMPTION_GAP)
    world.settle()
    assert state.reserved == {"n-0": "default/high"}
    fleet.apply("default/higher", gpus=2, priority=PREEMPTION_GAP + 5)
    assert [app for _, app in next(iter(state.waiting.by_need.values()))] == ["default/higher", "default/high"]
    fleet.rounds(12)
    assert (fleet.placed("default/high"), fleet.placed("default/higher")) == (1, 0)
    assert not state.reserved


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_victims_are_as_few_as_can_be(seed: int) -> None:
    """Against every set of eligible runners of every node."""
    from itertools import combinations

    from fal_scheduler.core.explain import takes_without
    from fal_scheduler.core.ranking import Ask

    rng = Random(seed)
    fleet = Fleet(nodes=2)
    if rng.randrange(2):
        fleet.world.step(SetQuota("t0", rng.choice((1000, 2000))))
    for at in range(rng.randrange(1, 6)):
        fleet.apply(f"t{rng.randrange(2)}/a{at}", gpus=rng.choice((1, 1, 2)), priority=rng.choice((0, 0, 20)))
        fleet.rounds(1)
    fleet.rounds(3)
    spec, _ = spec_of(gpus=rng.choice((1, 2, 4)))
    spec = replace(spec, priority=25)
    world = fleet.world
    world.step(CordonNode("n-0", False))
    app = replace(next(iter(world.state.apps.values())), id="t9/high")
    state = world.state
    found = preemption.find(state, app, spec)
    ask = Ask(app.id, "t9")
    if any(takes_without(state, node_id, spec, ask, ()) for node_id in state.runners_by_node):
        return  # nobody needs to leave
    sizes = []
    for node_id in state.runners_by_node:
        eligible = preemption._eligible(state, app, spec, node_id)
        for count in range(1, len(eligible) + 1):
            for chosen in combinations(eligible, count):
                ids = tuple(one.id for one in chosen)
                if preemption._may_go(state, chosen) and takes_without(state, node_id, spec, ask, ids):
                    sizes.append(count)
    assert (len(found.runners) if found is not None else None) == (min(sizes) if sizes else None)
    if found is not None:
        for one in found.runners:
            assert one.priority <= spec.priority - PREEMPTION_GAP
        held = {team: state.held_milli.get(team, 0) for team in state.quotas}
        for one in found.runners:
            team = one.app.split("/")[0]
            if team in held:
                held[team] -= quotas.held_by(one)
                assert held[team] >= min(state.quotas[team].gpu_milli, state.held_milli[team])


def test_nodes_that_cannot_have_better_victims_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(nodes=24)
    for at in range(9):
        fleet.apply(f"default/low{at}", least=8)
    assert all(one.node for one in fleet.world.state.runners.values())
    fleet.apply("default/high", gpus=4, priority=PREEMPTION_GAP - 1)
    state = fleet.world.state
    app = state.apps["default/high"]
    spec = replace(state.revision_of(app).spec, priority=50)
    looks = 0
    look = preemption.takes_without

    def counted(*args: Any) -> bool:
        nonlocal looks
        looks += 1
        return look(*args)

    monkeypatch.setattr(preemption, "takes_without", counted)
    found = preemption.find(state, app, spec)
    assert found is not None
    assert len(found.runners) == 4
    assert looks <= 12 * 6  # none for sets that are too small; 12 nodes have four GPUs


def test_who_waits_for_an_owner_borrows_again_when_that_gives_up() -> None:
    """No capacity changes: only the line does."""
    fleet = Fleet()
    fleet.world.step(SetQuota("a", 0))
    fleet.world.step(SetQuota("b", 4000))
    fleet.apply("c/holder", gpus=1)
    fleet.apply("b/wide", gpus=2)
    fleet.rounds()
    fleet.apply("a/x")
    fleet.rounds()
    assert (fleet.placed("b/wide"), fleet.placed("a/x")) == (0, 0)
    assert "waits first" in fleet.pending("a/x").reason
    fleet.world.step(DeleteApp("b/wide"))
    fleet.rounds(3)
    assert fleet.placed("a/x") == 1
