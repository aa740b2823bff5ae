"""Share groups in random worlds: whoever crashes, leaves or is cut off, only what may share does, and demand is met."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from core_world import MODELS, World, random_step, spec_of
from fal_contract.ids import team_of
from fal_scheduler.core.bindings import serves_app, shared
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.events import ApplyApp, DeleteApp
from fal_scheduler.core.invariants import audit
from fal_scheduler.core.model_events import AddModel
from fal_scheduler.core.records import Goal, Model, Scaling
from fal_scheduler.core.state import State

APPS = ("default/s0", "default/s1", "default/s2", "other/s0", "other/s1")
STEPS = 120


def deploy(world: World, app: str) -> None:
    """An app of one of two groups and two engines; what it shares with others is left to chance."""
    rng = world.rng
    spec, _ = spec_of(gpus=1, tag=rng.choice(("one", "one", "one", "one", "two")))
    model = rng.choice(MODELS)
    scaling = Scaling(rng.choice((10.0, 100.0, 1000.0)), rng.choice((0, 0, 0, 1)), rng.choice((1, 3)))
    spec = replace(spec, share_group=rng.choice(("g", "g", "g", "g", "h", "")), model=model, scaling=scaling)
    if model not in world.state.models:
        world.step(AddModel(Model(model, "model", f"file:///{model}")))
    world.step(ApplyApp(app, spec, f"digest of {spec!r}"))


def share_step(world: World) -> None:
    rng, app = world.rng, world.rng.choice(APPS)
    match rng.randrange(14):
        case 0:
            deploy(world, app)
        case 1 if rng.randrange(3) == 0:
            world.step(DeleteApp(app))
        case 2 if rng.randrange(3) == 0:
            node = world.nodes[rng.choice(sorted(world.nodes))]
            node.broken ^= {rng.choice(MODELS)}
        case 3 | 4 | 5 | 6:
            asked = rng.sample(APPS, rng.randrange(3))
            demands = tuple(AppDemand(one, "", "", rng.randrange(2), rng.randrange(3), 100) for one in asked)
            world.step(DemandTold("g1", demands, world.now_s))
        case _:
            for node_id, node in world.nodes.items():
                world.deliver(node_id)
                for runner_id, status in list(node.containers.items()):
                    if status.serves:
                        node.use(runner_id, rng.randrange(4) // 3)
                    else:
                        node.advance(runner_id)
                world.report(node_id)
            world.tick(1.0)


def check_shares(state: State) -> None:
    """Recomputed from records alone."""
    for runner in state.runners.values():
        assert len({team_of(app) for app in (runner.id, *runner.apps)}) == 1
        if len(runner.bindings) == 1:
            continue
        assert shared(runner)
        specs = [state.revisions[one.app, one.revision].spec for one in runner.bindings]
        assert len({(one.share_group, tuple(one.env.items()), one.image, one.num_gpus) for one in specs}) == 1
        loaded = {one.model for one in runner.residencies}
        assert {one.model for one in specs if one.model} == loaded


@settings(deadline=None, max_examples=15, database=None)
@given(st.integers(0, 1 << 20))
@example(1939)  # an app is deleted while a runner that it shares drains
def test_only_what_may_share_does_whatever_happens(seed: int) -> None:
    world = World(Random(seed), nodes=2)
    for app in APPS[:3]:
        deploy(world, app)
    for _ in range(STEPS):
        (share_step if world.rng.randrange(5) else random_step)(world)
        check_shares(world.state)
    world.heal()
    check_shares(world.state)
    assert not [found for part in audit(world.state) for found in part]


@settings(deadline=None, max_examples=8, database=None)
@given(st.integers(0, 1 << 20))
def test_every_app_that_is_asked_for_is_served_though_there_is_one_gpu(seed: int) -> None:
    rng = Random(seed)
    world = World(rng, nodes=1)
    apps = ("default/s0", "default/s1", "default/s2")
    for app in apps:
        spec, _ = spec_of(gpus=2)  # all that the node has
        spec = replace(spec, share_group="g", model=app, scaling=Scaling(1000.0, 0, 1))
        world.step(AddModel(Model(app, "model", f"file:///{app}")))
        world.step(ApplyApp(app, spec, f"digest of {spec!r}"))
    for _ in range(6):
        app = rng.choice(apps)
        world.step(DemandTold("g1", (AppDemand(app, "", "", 0, 1, 0),), world.now_s))
        for _ in range(12):
            world.settle()
            world.deliver("n-0")
            for runner_id, status in list(world.nodes["n-0"].containers.items()):
                if not status.serves:
                    world.nodes["n-0"].advance(runner_id)
            world.report("n-0")
            world.tick(1.0)
        mine = [world.state.runners[id_] for id_ in world.state.runners_by_app.get(app, ())]
        assert any(one.goal is Goal.RUN and serves_app(world.state, one, app) for one in mine), (app, mine)
        world.step(DemandTold("g1", (), world.now_s))
    assert len([one for one in world.state.runners.values() if one.node]) == 1, "all in one container"
