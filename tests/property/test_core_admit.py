"""What would admit a runner really does: each change that is told is carried out, and then there is a place."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from core_world import GIB, World, spec_of
from fal_contract.ids import team_of
from fal_scheduler.core.admit import Admission, smallest_changes
from fal_scheduler.core.events import ApplyApp, CordonNode
from fal_scheduler.core.node_events import LabelNode
from fal_scheduler.core.quota_events import SetQuota
from fal_scheduler.core.ranking import Ask
from fal_scheduler.core.records import Spec
from fal_scheduler.core.waiting import reserved_for_others

APP = "default/new"


def busy_world(rng: Random) -> World:
    world = World(rng, nodes=3)
    for at in range(rng.randrange(1, 7)):
        spec, digest = spec_of(
            gpus=rng.choice((0, 1, 1, 2, 4)), least=rng.randrange(3), memory_gib=rng.choice((1, 8, 30))
        )
        spec = replace(spec, priority=rng.choice((0, 0, 5)))
        world.step(ApplyApp(f"default/a{at}", spec, f"{digest} {at}"))
        world.settle()
    for node_id in world.nodes:
        if rng.randrange(3) == 0:
            world.step(CordonNode(node_id, True, "fan"))
    if rng.randrange(4) == 0:
        world.step(SetQuota("default", 1000 * rng.randrange(4), borrow=False))
    for _ in range(2):
        for node_id in world.nodes:
            world.deliver(node_id)
            world.report(node_id)
        world.tick(1.0)
    return world


def wanted(rng: Random) -> Spec:
    spec, _ = spec_of(
        gpus=rng.choice((1, 2, 4)),
        model=rng.choice(("", "", "H100-80GB", "A100-40GB", "B200-180GB")),
        memory_gib=rng.choice((1, 30, 60)),
    )
    return replace(spec, labels=rng.choice(({}, {}, {"disk": "nvme"})))


def has_place(world: World, spec: Spec) -> bool:
    state = world.state
    ask = Ask(APP, team_of(APP), avoid=reserved_for_others(state, APP))
    return world.core.placer.place(spec, ask) is not None


def carry_out(world: World, change: Admission, spec: Spec) -> Spec:
    state = world.state
    if change.command.startswith("falctl node uncordon"):
        world.step(CordonNode(change.node_id, False))
    elif change.command.startswith("falctl node label"):
        world.step(LabelNode(change.node_id, dict(spec.labels)))
    elif change.command.startswith("falctl quota"):
        world.step(SetQuota("default", round(float(change.command.split()[-1]) * 1000), borrow=False))
    for runner_id in change.stops:
        runner = state.runners[runner_id]
        held = runner.gpus, runner.memory_bytes, runner.cpu_milli
        state.fleet.release(runner.node, runner.id, *held, runner.apps)
    return change.spec or spec


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4))
def test_every_change_that_is_told_admits_it(seed: int, which: int) -> None:
    rng = Random(seed)
    world, spec = busy_world(rng), wanted(rng)
    before = has_place(world, spec)
    changes = smallest_changes(world.state, APP, spec)
    assert [change.order for change in changes] == sorted(change.order for change in changes)
    if before and not any("quota" in change.command for change in changes):
        assert not changes
        return
    if which < len(changes) and changes[which].disturbs < 3:
        assert has_place(world, carry_out(world, changes[which], spec)), changes[which]


def test_the_least_is_told_first() -> None:
    world = World(Random(1), nodes=2)  # two GPUs and four
    spec, digest = spec_of(gpus=2, least=3)
    world.step(ApplyApp("default/a", spec, digest))
    world.settle()
    world.step(CordonNode("n-1", True, "fan"))
    one, _ = spec_of(gpus=1)
    texts = [change.text for change in smallest_changes(world.state, APP, one)]
    assert texts[0].startswith("end default/a-")
    assert texts[-1] == "add a node with 1 × any GPU"
    big = replace(one, resources=replace(one.resources, memory_bytes=10_000 * GIB))
    assert not any(change.text.startswith("end ") for change in smallest_changes(world.state, APP, big))
