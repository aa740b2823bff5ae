"""Random histories of a small cluster: the rules hold after every step, and it comes to rest when faults stop."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_world import World, check_indexes, random_step, spec_of
from fal_contract.ids import team_of
from fal_scheduler.core.events import ApplyApp, Confirm, Moment, Tick
from fal_scheduler.core.explain import model_awaited
from fal_scheduler.core.place import Ask
from fal_scheduler.core.records import Goal, RunnerState
from fal_scheduler.core.views import app_reason, runner_phase, wanted

SEEDS = st.integers(0, 2**32 - 1)
BOUNDED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


@BOUNDED
@given(SEEDS)
def test_rules_hold_after_every_step_and_all_comes_to_rest(seed: int) -> None:
    """`World.step` checks after each event; then faults stop and every app has what it wants, or a true reason."""
    world = World(Random(seed))
    for _ in range(120):
        random_step(world)
    world.heal()
    state = world.state
    for runner in state.runners.values():
        spec = (
            state.revisions[runner.app, runner.revision].spec
            if (runner.app, runner.revision) in state.revisions
            else None
        )
        if spec is not None and runner.node and runner.goal is Goal.RUN:
            assert not any(state.models[name].withdrawn for name in spec.models), "nobody runs what was withdrawn"
    for app in state.apps.values():
        assert not app.deleting, f"{app.id} was never forgotten"
        runners = [state.runners[id_] for id_ in state.runners_by_app.get(app.id, ())]
        phases = [runner_phase(state, runner) for runner in runners if runner.revision == app.revision]
        ready = sum(1 for phase in phases if phase.state in (RunnerState.IDLE, RunnerState.RUNNING))
        if ready != wanted(state, app):
            spec = state.revision_of(app).spec
            assert model_awaited(state, spec) or world.core.placer.place(spec, Ask(app.id, team_of(app.id))) is None, (
                app,
                runners,
                phases,
            )
            waits = any(phase.state is RunnerState.PENDING and phase.reason for phase in phases)
            assert waits or "is not begun" in app_reason(state, app), (app, phases)
        else:
            assert all(runner.revision == app.revision for runner in runners), runners


@BOUNDED
@given(SEEDS)
def test_the_same_history_gives_the_same_records(seed: int) -> None:
    """No clock, no randomness, no order of hashing decides anything."""
    first, second = World(Random(seed)), World(Random(seed))
    for world in (first, second):
        for _ in range(60):
            random_step(world)
    assert first.state.runners == second.state.runners
    assert first.state.alarms == second.state.alarms


@BOUNDED
@given(SEEDS)
def test_a_step_taken_back_leaves_records_and_indexes_as_they_were(seed: int) -> None:
    """What the engine does when a commit fails: undo the newest first."""
    world = World(Random(seed))
    for _ in range(60):
        random_step(world)
    state = world.state
    records = {name: dict(getattr(state, name)) for name in ("apps", "revisions", "runners", "nodes", "models")}
    history = []
    for number in range(3):
        spec, digest = spec_of(gpus=1, least=3, tag=f"undone {number}")
        moment = Moment(world.now_s, world.wall_s)
        app_id = f"default/new{world.rng.randrange(2)}"
        history.append(world.core.step(ApplyApp(app_id, spec, digest), moment))
        history.append(world.core.step(Confirm("adopt" if number else "stop"), moment))
    for outcome in reversed(history):
        for change in reversed(outcome.changes):
            state.apply(change.undone())
    assert records == {name: getattr(state, name) for name in records}
    check_indexes(state)
    world.step(Tick(recheck=True))


@BOUNDED
@given(SEEDS)
def test_a_rollout_never_serves_with_fewer_than_before(seed: int) -> None:
    """New revisions come, some that no node can take; without crashes the ready runners never become fewer."""
    rng = Random(seed)
    world = World(rng, nodes=rng.randrange(2, 5))
    spec, digest = spec_of(gpus=1, least=rng.randrange(1, 5))
    world.step(ApplyApp("default/a", spec, digest))
    world.heal(rounds=4)
    before = _ready(world)
    for number in range(4):
        spec, digest = spec_of(
            gpus=rng.choice((1, 2)), model=rng.choice(("", "B200-180GB")), least=max(before, 1), tag=str(number)
        )
        world.step(ApplyApp("default/a", spec, digest))
        for _ in range(rng.randrange(30)):
            node = world.nodes[rng.choice(sorted(world.nodes))]
            world.deliver(node.id)
            for runner_id in list(node.containers):
                node.advance(runner_id)
            world.report(node.id)
            assert _ready(world) >= before, number
            world.tick(1.0)
            world.settle()


def _ready(world: World) -> int:
    """Runners that take requests."""
    phases = [runner_phase(world.state, runner) for runner in world.state.runners.values()]
    return sum(1 for phase in phases if phase.state in (RunnerState.IDLE, RunnerState.RUNNING))
