"""One step never changes more than one commit may hold, however many runners are on a node, or days in a record."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from core_world import SimNode, World, spec_of
from fal_contract.limits import COMMIT_OPERATIONS_MAX, USAGE_DETAILS_KEPT_S
from fal_scheduler.core.events import ApplyApp, Event, Outcome, Proceed, RevokeNode, Tick
from fal_scheduler.core.node_events import RemoveNode
from fal_scheduler.core.records import RunnerState
from fal_scheduler.core.usage_records import Usage

APP = "default/a"
NODE = "n-0"
MANY = 70  # with the usage of each, more than a commit holds
DAY_S = 86_400.0


class Crowd:
    """One node with MANY runners that have run for a while."""

    def __init__(self) -> None:
        self.world = world = World(Random(1), nodes=1)
        spec, digest = spec_of(gpus=0, least=MANY, most=MANY)
        small = replace(spec.resources, cpu_milli=1, memory_bytes=1 << 20)
        world.step(ApplyApp(APP, replace(spec, resources=small), digest))
        world.settle()
        world.deliver(NODE)
        for id_ in list(self.node.containers):
            one = self.node.containers[id_]
            self.node._set(replace(one, state=RunnerState.IDLE, started_at_s=world.wall_s - 100.0))
        world.report(NODE)
        world.tick(100.0)
        assert len(world.state.runners_by_node[NODE]) == MANY

    @property
    def node(self) -> SimNode:
        return self.world.nodes[NODE]

    def crash_all(self) -> None:
        for id_ in list(self.node.containers):
            self.node.crash(id_)

    def do(self, event: Event) -> None:
        self.check(self.world.step(event))
        for _ in range(20):
            if not self.world.state.dirty:
                break
            self.check(self.world.step(Proceed()))

    def tick(self, seconds_s: float) -> None:
        self.world.now_s += seconds_s
        self.check(self.world.step(Tick()))

    @staticmethod
    def check(outcome: Outcome | None) -> None:
        assert outcome is not None
        assert len({change.key for change in outcome.changes}) <= COMMIT_OPERATIONS_MAX

    def ended(self) -> int:
        return sum(1 for one in self.world.state.usage.values() if one.ended)


@pytest.mark.parametrize("again", [False, True], ids=["reported", "told by a new session"])
def test_all_runners_of_a_crowded_node_end_at_once(again: bool) -> None:
    crowd = Crowd()
    meta = crowd.world.state.meta
    assert meta is not None
    crowd.crash_all()
    crowd.do(crowd.node.hello(crowd.world.now_s, meta) if again else crowd.node.report(crowd.world.now_s))
    assert crowd.ended() == MANY
    assert not crowd.world.state.ends_due


def test_a_crowded_node_is_revoked_over_several_steps() -> None:
    crowd = Crowd()
    crowd.do(RevokeNode(NODE, "stolen"))
    for _ in range(5):
        crowd.tick(1.0)
    state = crowd.world.state
    assert NODE not in state.runners_by_node
    assert state.nodes[NODE].revoked
    assert crowd.ended() == MANY


def test_a_crowded_node_is_removed_over_several_steps() -> None:
    crowd = Crowd()
    crowd.do(RemoveNode(NODE, force=True))
    for _ in range(5):
        crowd.tick(1.0)
    state = crowd.world.state
    assert not any(NODE in table for table in (state.nodes, state.runners_by_node, state.draining))
    assert state.revocations[NODE].subject == f"node/{NODE}"
    assert crowd.ended() == MANY


def test_a_container_of_many_days_is_folded_day_by_day_and_nothing_is_lost() -> None:
    world = World(Random(1), nodes=1)
    world.now_s += 400 * DAY_S
    state, wall_s = world.state, world.wall_s
    start_s, end_s = wall_s - 300 * DAY_S, wall_s - USAGE_DETAILS_KEPT_S - 60.0
    gpu_ms = round((end_s - start_s) * 1000)
    for at in range(3):
        one = Usage(
            f"a{at}",
            APP,
            1,
            f"{APP}-{at}",
            gpus=1,
            started_at_s=start_s,
            until_s=end_s,
            gpu_ms=gpu_ms,
            busy_gpu_ms=gpu_ms // 3,
            served=77,
            ended=True,
        )
        state.usage[one.assignment] = one
    for _ in range(200):
        if not state.usage:
            break
        world.now_s += 1.0
        Crowd.check(world.step(Tick()))
    assert not state.usage
    rows = [row for part in state.usage_days.values() for row in part.rows]
    assert sum(row.gpu_ms for row in rows) == 3 * gpu_ms
    assert sum(row.busy_gpu_ms for row in rows) == 3 * (gpu_ms // 3)
    assert (sum(row.served for row in rows), sum(row.runners for row in rows)) == (3 * 77, 3)
    assert len(state.usage_days) >= 298
