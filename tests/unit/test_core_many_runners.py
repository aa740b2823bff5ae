"""Apps of many runners: their reports cost no look at all of them each, and one step never looks at too many."""

from __future__ import annotations

from random import Random

import pytest

from core_world import World, spec_of
from fal_scheduler.core import step
from fal_scheduler.core.events import ApplyApp, Moment, NodeReport, Proceed, Tick
from fal_scheduler.core.place import Placer
from fal_scheduler.core.work import Work


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Apps that were reconciled, in order."""
    seen: list[str] = []
    real = step.reconcile

    def counted(work: Work, placer: Placer, app_id: str) -> None:
        seen.append(app_id)
        real(work, placer, app_id)

    monkeypatch.setattr(step, "reconcile", counted)
    return seen


def world_of(apps: int, runners: int) -> World:
    world = World(Random(3), nodes=4)
    for node_id in world.nodes:
        world.hello(node_id)
    for number in range(apps):
        spec, digest = spec_of(gpus=0, least=runners, most=runners, tag=str(number))
        world.step(ApplyApp(f"t/many{number}", spec, digest, None, "op"))
    world.settle()
    return world


def test_reports_of_an_app_of_many_cost_one_look_in_a_while(looks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "RUNNERS_MANY", 3)
    world = world_of(1, 4)
    world.step(Tick())
    state = world.state
    (app_id,) = state.apps
    world.now_s += 10.0
    looks.clear()
    for at_s, count in ((0.0, 1), (0.05, 1), (step.RECONCILE_GAP_S + 0.01, 2)):
        state.dirty[app_id] = None
        node_id, live = next(iter(state.live.items()))
        world.core.step(NodeReport(node_id, live.session_id, world.now_s + at_s), Moment(world.now_s + at_s, 1.0))
        assert looks.count(app_id) == count
        assert (app_id in state.dirty) is (at_s == 0.05), "what was not looked at is not forgotten"
    state.dirty[app_id] = None
    world.step(Proceed())  # nothing waits to be taken in: at once
    assert looks.count(app_id) == 3
    assert not state.dirty


def test_one_step_looks_at_so_many_runners_and_the_next_goes_on(
    looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(4, 3)
    monkeypatch.setattr(step, "RUNNERS_LOOKED_AT_MAX", 4)
    world.state.dirty.update(dict.fromkeys(sorted(world.state.apps)))
    looks.clear()
    world.core.step(Tick(), Moment(world.now_s, world.wall_s))
    assert looks == ["t/many0", "t/many1"]
    assert list(world.state.dirty) == ["t/many2", "t/many3"]
    world.core.step(Proceed(), Moment(world.now_s, world.wall_s))
    assert not world.state.dirty
