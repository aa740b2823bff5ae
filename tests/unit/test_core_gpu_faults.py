"""Faulty GPUs in the scheduler: one is taken out, not its node; its runners go elsewhere; a refusal is no crash."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from core_world import World, spec_of
from fal_contract.errors import Code, FalError
from fal_contract.limits import GPU_REFUSALS_FREE_MAX
from fal_scheduler.core.events import ApplyApp, RevokeNode
from fal_scheduler.core.gpu_commands import gpu_named
from fal_scheduler.core.gpu_events import QuarantineGpu, ReleaseGpu
from fal_scheduler.core.gpu_faults import as_placed, dead, faulty
from fal_scheduler.core.records import Goal, Runner, RunnerState
from fal_scheduler.core.told import Gpu

APP = "default/a"


def deployed(least: int = 1, *, nodes: int = 2) -> World:
    """Nodes with 2, 4, 2, … GPUs, and an app whose runners are ready."""
    world = World(Random(1), nodes=nodes)
    spec, digest = spec_of(gpus=1, least=least)
    world.step(ApplyApp(APP, spec, digest))
    work(world)
    assert len(serving(world)) == least
    return world


def runners(world: World) -> list[Runner]:
    return [world.state.runners[id_] for id_ in world.state.runners_by_app.get(APP, ())]


def serving(world: World) -> list[Runner]:
    found = [runner for runner in runners(world) if runner.goal is Goal.RUN]
    return [one for one in found if (status := world.state.status_of(one)) is not None and status.serves]


def work(world: World, rounds: int = 20) -> None:
    """Agents do what they should, until nothing moves."""
    for _ in range(rounds):
        world.settle()
        for node_id, node in world.nodes.items():
            world.deliver(node_id)
            for runner_id in list(node.containers):
                if node.containers[runner_id].state is not RunnerState.IDLE:
                    node.advance(runner_id)
            world.report(node_id)
        world.tick(5.0)


def judged(world: World, runner: Runner, fault: str) -> None:
    """The runner's node finds a fault of its GPU, and tells."""
    world.nodes[runner.node].judge(runner.gpus[0], fault)
    world.report(runner.node)


def alarms(world: World) -> list[str]:
    return [subject for kind, subject in world.state.alarms if kind == "GPU_QUARANTINED"]


@pytest.mark.parametrize("fault", ["reset", "slow", "foreign", "stuck"])
def test_its_runner_is_replaced_first_and_drained_then(fault: str) -> None:
    world = deployed()
    [sick] = runners(world)
    judged(world, sick, fault)
    assert [runner.goal for runner in runners(world)] == [Goal.RUN] * 2, "one more, as long as it takes"
    [fresh] = [runner for runner in runners(world) if runner.id != sick.id]
    assert fresh.node
    assert set(fresh.gpus).isdisjoint(sick.gpus)
    assert alarms(world) == [f"{sick.node}/{sick.gpus[0]}"]
    assert fault in world.state.alarms["GPU_QUARANTINED", alarms(world)[0]].message
    work(world)
    assert [runner.id for runner in runners(world)] == [fresh.id]
    judged(world, sick, "")
    assert alarms(world) == []
    assert sick.gpus[0] in world.state.fleet.free_gpus(sick.node)


def test_the_runner_of_a_dead_one_is_stopped_at_once_also_in_a_leaders_first_minutes() -> None:
    world = deployed(2)
    sick, sound = runners(world)
    world.state.term_began_s = world.now_s
    judged(world, sick, "dead")
    assert world.state.runners[sick.id].goal is Goal.STOP
    assert dead(world.state, sick)
    assert not dead(world.state, sound)
    work(world)
    assert len(serving(world)) == 2
    assert sound.id in {runner.id for runner in serving(world)}


def test_one_that_only_starts_goes_elsewhere_at_once() -> None:
    world = World(Random(1), nodes=2)
    spec, digest = spec_of(gpus=1)
    world.step(ApplyApp(APP, spec, digest))
    [first] = runners(world)
    world.deliver(first.node)
    world.report(first.node)
    judged(world, first, "reset")
    assert world.state.runners[first.id].goal is Goal.STOP
    work(world)
    [now] = serving(world)
    assert now.gpus != first.gpus


def test_without_a_place_it_serves_on() -> None:
    world = deployed(2, nodes=1)
    sick, _ = runners(world)
    judged(world, sick, "slow")
    work(world)
    assert sick.id in {runner.id for runner in serving(world)}
    assert len(serving(world)) == 2


def test_the_rest_of_the_node_is_used_on() -> None:
    world = deployed()
    [sick] = runners(world)
    judged(world, sick, "reset")
    work(world)
    facts = world.state.fleet.facts[sick.node]
    assert [gpu.id for gpu in facts.gpus if not gpu.healthy] == list(sick.gpus)
    assert len(facts.gpus) > 1
    assert sick.gpus[0] not in world.state.fleet.free_gpus(sick.node)


def test_a_reason_without_a_class_moves_nobody() -> None:
    world = deployed()
    [runner] = runners(world)
    node = world.nodes[runner.node]
    gpus = tuple(
        Gpu(gpu.id, gpu.model, gpu.memory_bytes, gpu.index, healthy=False, health_reason="the driver hangs")
        for gpu in node.inventory.gpus
    )
    node.judge(runner.gpus[0], "")
    node.inventory = replace(node.inventory, gpus=gpus)
    world.report(runner.node)
    work(world)
    assert [one.id for one in serving(world)] == [runner.id]
    assert alarms(world) == []
    assert world.state.fleet.free_gpus(runner.node) == ()


# ---- an operator's word


def test_an_operators_word_is_kept_in_the_nodes_record() -> None:
    world = deployed()
    [runner] = runners(world)
    gpu = runner.gpus[0]
    world.step(QuarantineGpu(runner.node, gpu, "RMA 4711", "op"))
    assert world.state.nodes[runner.node].quarantined_gpus == {gpu: "RMA 4711"}
    assert "RMA 4711" in faulty(world.state, runner)
    work(world)
    [now] = serving(world)
    assert now.gpus[0] != gpu
    assert alarms(world) == [f"{runner.node}/{gpu}"]
    world.hello(runner.node)  # the node is told nothing of it, and tells nothing of it
    assert gpu not in world.state.fleet.free_gpus(runner.node)
    world.step(ReleaseGpu(runner.node, gpu, "op"))
    assert gpu in world.state.fleet.free_gpus(runner.node)
    assert (alarms(world), world.state.nodes[runner.node].quarantined_gpus) == ([], {})


def test_words_about_what_is_not_there() -> None:
    world = deployed()
    node_id = next(iter(world.nodes))
    assert world.step(QuarantineGpu("nothing", "GPU-1")) is None
    assert world.step(QuarantineGpu(node_id, "GPU-none")) is None
    outcome = world.step(ReleaseGpu(node_id, "GPU-none"))
    assert outcome is not None
    assert outcome.reply is not None
    assert outcome.reply.outcome == "unchanged"


def test_gpus_are_named_by_id_beginning_or_index() -> None:
    world = deployed()
    state = world.state
    node = state.nodes[next(iter(world.nodes))]
    first = world.nodes[node.id].inventory.gpus[0].id
    assert gpu_named(state, node, first) == first
    assert gpu_named(state, node, "0") == first
    with pytest.raises(FalError) as many:
        gpu_named(state, node, "GPU-")
    assert many.value.code is Code.INVALID
    for name in ("99", "GPU-none", ""):
        with pytest.raises(FalError) as none:
            gpu_named(state, node, name)
        assert none.value.code is Code.NOT_FOUND


def test_a_devices_quarantine_is_its_instances() -> None:
    whole = Gpu("GPU-1", "H100-80GB", 80 << 30)
    parts = tuple(Gpu(f"MIG-{n}", "H100-80GB-MIG-1g.10gb", 10 << 30, parent_id="GPU-1") for n in range(2))
    assert [gpu.healthy for gpu in as_placed((whole, *parts), {"GPU-1": "RMA"})] == [False] * 3
    assert [gpu.healthy for gpu in as_placed((whole, *parts), {"MIG-0": ""})] == [True, False, True]
    assert as_placed((whole,), {}) == (whole,)
    sick = Gpu("GPU-1", "m", 1, healthy=False, health_class="dead", health_reason="gone")
    [both] = as_placed((sick,), {"GPU-1": "RMA"})
    assert (both.health_class, both.health_reason) == ("dead", "gone; taken out by an operator: RMA")


# ---- refusals


def test_a_refusal_is_no_crash_and_the_runner_is_placed_again_on_what_the_node_told() -> None:
    world = World(Random(1), nodes=1)
    spec, digest = spec_of(gpus=1)
    world.step(ApplyApp(APP, spec, digest))
    [placed] = runners(world)
    assert placed.assignment is not None
    node = world.nodes[placed.node]
    assert placed.assignment.inventory_generation == node.inventory.generation
    node.judge(placed.gpus[0], "reset")  # found, and not told yet
    world.deliver(placed.node)
    assert node.containers[placed.id].refused
    world.report(placed.node)
    [again] = runners(world)
    assert world.state.backoffs == {}
    assert again.node
    assert again.gpus != placed.gpus
    assert again.assignment is not None
    assert again.assignment.inventory_generation == node.inventory.generation
    work(world)
    assert len(serving(world)) == 1
    assert world.state.refusals == {}


def test_a_node_that_refuses_on_and_on_is_a_failure_after_a_while() -> None:
    world = World(Random(1), nodes=1)
    spec, digest = spec_of(gpus=1)
    world.step(ApplyApp(APP, spec, digest))
    [runner] = runners(world)
    node = world.nodes[runner.node]
    node.changed_at = {gpu.id: 1_000_000 for gpu in node.inventory.gpus}
    rounds = 0
    while not world.state.backoffs:
        rounds += 1
        assert rounds < 20
        world.deliver(node.id)
        world.report(node.id)
    assert rounds == GPU_REFUSALS_FREE_MAX + 1
    assert world.state.backoffs[APP].failures == 1
    node.changed_at = {}
    work(world, rounds=40)
    assert len(serving(world)) == 1


def test_a_node_that_is_revoked_takes_its_alarms_along() -> None:
    world = deployed(nodes=3)
    [runner] = runners(world)
    judged(world, runner, "reset")
    assert alarms(world)
    world.step(RevokeNode(runner.node))
    assert alarms(world) == []
