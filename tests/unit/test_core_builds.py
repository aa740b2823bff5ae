"""Build tasks on the pure core: what ends one that nobody tells of, and that nothing of it stays."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from core_world import World, spec_of
from fal_contract.limits import BUILD_WAIT_MAX_S
from fal_scheduler.core.build_events import BuildCache
from fal_scheduler.core.builds import runner_of_build
from fal_scheduler.core.events import Tick
from fal_scheduler.core.records import BuildTask, Runner, Spec

KEY = "ab" * 32


def spec(*, machine_type: str = "") -> Spec:
    made, _ = spec_of(gpus=1, model=machine_type, least=1, most=1)
    return replace(made, command=("true",), build=BuildTask("cluster", KEY, 1000))


@pytest.fixture
def world() -> World:
    return World(Random(1), nodes=2)


def begun(world: World, asked: Spec) -> Runner:
    world.step(BuildCache(asked))
    runner = runner_of_build(world.state, "cluster", KEY)
    assert runner is not None
    return runner


def test_a_build_on_a_lost_node_has_failed_and_is_not_placed_again(world: World) -> None:
    runner = begun(world, spec())
    assert runner.node
    world.state.abandoned[runner.id] = None
    world.state.dirty[runner.app] = None
    world.step(Tick())
    assert f"its node {runner.node} is lost" in world.state.build_failures["cluster", KEY].reason
    assert runner_of_build(world.state, "cluster", KEY) is None
    again = begun(world, spec())  # the old one's end is not waited for
    assert again.app != runner.app
    world.heal()
    assert runner.app not in world.state.apps
    assert again.app in world.state.apps


def test_a_build_that_no_node_takes_waits_and_then_fails(world: World) -> None:
    runner = begun(world, spec(machine_type="none-such"))
    assert not runner.node
    world.step(Tick())
    assert runner_of_build(world.state, "cluster", KEY) == runner
    world.now_s += BUILD_WAIT_MAX_S + 1
    world.step(Tick())
    assert "no node took it" in world.state.build_failures["cluster", KEY].reason
    assert not [app for app in world.state.apps if app.startswith("system/")]
    assert not world.state.catalog.builds
    assert not [one for one in world.state.runners.values() if one.app == runner.app]
