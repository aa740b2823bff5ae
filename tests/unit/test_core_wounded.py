"""A runner whose container's monitor died: replaced first, drained then; never more than one more than wanted."""

from __future__ import annotations

from random import Random

import pytest

from core_world import World, spec_of
from fal_contract.limits import FAILOVER_GRACE_S, MASS_STOP_RUNNERS_MIN
from fal_scheduler.core.events import ApplyApp, Confirm, DeleteApp, ScaleApp
from fal_scheduler.core.records import Goal, Runner, RunnerState, ScaleOverride
from fal_scheduler.core.told import Health

APP = "default/a"


def deployed(least: int, *, most: int = 8, nodes: int = 2, gpus: int = 1) -> World:
    """Nodes with 2, 4, 2, … GPUs, and an app whose runners are ready."""
    world = World(Random(1), nodes=nodes)
    spec, digest = spec_of(gpus=gpus, least=least, most=most)
    world.step(ApplyApp(APP, spec, digest))
    work(world)
    assert len(serving(world)) == least
    return world


def runners(world: World) -> list[Runner]:
    return [world.state.runners[id_] for id_ in world.state.runners_by_app.get(APP, ())]


def serving(world: World) -> list[Runner]:
    """With goal RUN, and ready."""
    found = [runner for runner in runners(world) if runner.goal is Goal.RUN]
    return [one for one in found if (status := world.state.status_of(one)) is not None and status.serves]


def deliver(world: World, *, advance: bool = True) -> None:
    """Agents hear what they should run, come a phase further, and tell."""
    world.settle()
    for node_id, node in world.nodes.items():
        world.deliver(node_id)
        for runner_id in list(node.containers) if advance else ():
            if node.containers[runner_id].state is not RunnerState.IDLE:
                node.advance(runner_id)
        world.report(node_id)


def work(world: World, *, most: int | None = None) -> None:
    """Until nothing moves; `most`: there are never more runners that should serve."""
    for _ in range(20):
        deliver(world)
        wanting = [runner for runner in runners(world) if runner.goal is Goal.RUN]
        assert most is None or len(wanting) <= most, wanting
        world.tick(5.0)


def wound(world: World, *victims: Runner) -> None:
    for one in victims:
        world.nodes[one.node].wound(one.id)
        world.report(one.node)


def test_a_wounded_runner_is_replaced_first_and_drained_then() -> None:
    world = deployed(2, most=2)
    sick, sound = runners(world)
    wound(world, sick)
    assert [runner.goal for runner in runners(world)] == [Goal.RUN] * 3, "one more, though most is 2"
    [fresh] = [runner for runner in runners(world) if runner.id not in (sick.id, sound.id)]
    assert fresh.node
    deliver(world, advance=False)
    assert {runner.goal for runner in runners(world)} == {Goal.RUN}, "it is not ready yet"
    while len(serving(world)) < 3 and world.state.runners[sick.id].goal is Goal.RUN:
        deliver(world)
    assert world.state.runners[sick.id].goal is Goal.DRAIN
    assert world.state.runners[sick.id].goal_reason == "replaced: conmon died"
    work(world, most=2)
    assert {runner.id for runner in serving(world)} == {sound.id, fresh.id}
    assert len(runners(world)) == 2


def test_many_wounded_are_replaced_one_at_a_time_and_a_mass_of_them_waits_for_a_confirm() -> None:
    world = deployed(MASS_STOP_RUNNERS_MIN + 1, nodes=4)
    sick = runners(world)
    wound(world, *sick)
    work(world, most=5)
    assert len(serving(world)) == 5
    assert ("MASS_STOP", "cluster") in world.state.alarms
    world.step(Confirm("stops"))
    work(world, most=5)
    assert not world.state.alarms
    assert len(serving(world)) == len(runners(world)) == 4
    assert not {runner.id for runner in sick}.intersection(world.state.runners)


def test_without_a_free_place_it_serves_on_and_nothing_pends_until_there_is_one() -> None:
    world = deployed(1, nodes=1, gpus=2)
    [sick] = runners(world)
    wound(world, sick)
    work(world, most=1)
    assert [runner.id for runner in serving(world)] == [sick.id]
    assert len(runners(world)) == 1
    world.step(ScaleApp(APP, ScaleOverride(min_concurrency=0)))
    work(world)
    assert not runners(world)


def test_a_place_that_becomes_free_is_taken() -> None:
    world = deployed(1, nodes=1)
    spec, digest = spec_of(gpus=1, least=1, tag="other")
    world.step(ApplyApp("default/b", spec, digest))
    work(world)
    [sick] = runners(world)
    wound(world, sick)
    work(world)
    assert [runner.id for runner in runners(world)] == [sick.id]
    world.step(DeleteApp("default/b"))
    work(world, most=2)
    [fresh] = runners(world)
    assert fresh.id != sick.id


@pytest.mark.parametrize("least", [0, 3, 5])
def test_scaled_down_the_wounded_one_goes_first_and_nothing_replaces_it(least: int) -> None:
    world = deployed(6)  # all GPUs
    sick = runners(world)[0]  # the oldest, which would go last
    wound(world, sick)
    work(world, most=6)
    assert sick in serving(world)
    world.step(ScaleApp(APP, ScaleOverride(min_concurrency=least)))
    assert world.state.runners[sick.id].goal is Goal.DRAIN
    assert sum(runner.goal is Goal.RUN for runner in runners(world)) == least
    work(world, most=least)
    assert len(serving(world)) == least


def test_a_deleted_app_replaces_nothing() -> None:
    world = deployed(2)
    sick = runners(world)[0]
    world.step(DeleteApp(APP))
    wound(world, sick)
    assert all(runner.goal is Goal.STOP for runner in runners(world))
    work(world, most=0)
    assert not runners(world)


def test_a_new_leader_drains_none_of_them_in_its_first_minutes() -> None:
    world = deployed(1)
    world.state.term_began_s, world.state.grace_over = world.now_s, False
    [sick] = runners(world)
    wound(world, sick)
    for _ in range(5):
        deliver(world)
    assert len(serving(world)) == 2
    world.tick(FAILOVER_GRACE_S)
    work(world, most=1)
    assert sick.id not in world.state.runners


def test_a_replacement_on_a_silent_node_replaces_nobody() -> None:
    world = deployed(1, nodes=4, gpus=4)
    [sick] = runners(world)
    wound(world, sick)
    [fresh] = [runner for runner in runners(world) if runner.id != sick.id]
    assert fresh.node != sick.node
    world.deliver(fresh.node)
    for _ in range(2):
        world.nodes[fresh.node].advance(fresh.id)
    world.cut(fresh.node)
    world.tick(20.0)
    world.hello(sick.node)
    assert world.state.health_of(fresh.node) is Health.UNKNOWN
    world.tick(20.0)
    assert world.state.runners[sick.id].goal is Goal.RUN


def test_a_replacement_that_crashes_is_tried_again_after_its_backoff() -> None:
    world = deployed(1)
    [sick] = runners(world)
    wound(world, sick)
    [fresh] = [runner for runner in runners(world) if runner.id != sick.id]
    deliver(world, advance=False)
    world.nodes[fresh.node].crash(fresh.id)
    world.report(fresh.node)
    assert world.state.backoffs[APP].failures == 1
    assert [runner.id for runner in serving(world)] == [sick.id]
    work(world, most=2)
    assert sick.id not in world.state.runners
    assert len(serving(world)) == 1
