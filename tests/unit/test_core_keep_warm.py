"""Keep-warm by value: what idles ends early only where a request waits for its place, the least valuable first."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_world import CountingIds, World, sim_gpus, spec_of
from demand_rig import Serving
from fal_scheduler.core.demand import GatewayLoad
from fal_scheduler.core.events import CordonNode, Moment
from fal_scheduler.core.forecast import BRING_BACK_MS, Arrivals
from fal_scheduler.core.keep_warm import (
    GIB,
    IDLE_S,
    LOOK_S,
    LOOKED_AT_PER_S,
    LOOKS_PER_S,
    idle_runners,
    others_looked,
    pause_of,
    value,
    value_of,
)
from fal_scheduler.core.records import App, Binding, Change, Goal, Node, Revision, Runner, RunnerState, Scaling, key_of
from fal_scheduler.core.scaling import needed
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health, Hold, Inventory, RunnerStatus
from fal_scheduler.core.work import Work

KEPT = 10_000.0


def full(apps: tuple[str, ...], *, nodes: int = 1, often: str = "", **scaling: float) -> Serving:
    """Two GPUs (or more nodes), one runner of each of `apps` on them, idle; `often` is asked for every 10 s."""
    serving = Serving(World(Random(1), nodes=nodes))
    for app in apps:
        serving.deploy(app, keep_alive_s=KEPT, **scaling)
        serving.ask(1, app=app, takes_s=1.0)
    serving.run(12)
    for _ in range(20 if often else 0):
        serving.ask(1, app=often, takes_s=1.0)
        serving.run(10)
    assert all(len(serving.ready(app)) == 1 for app in apps)
    return serving


def ends_of(serving: Serving, app: str) -> list[str]:
    """Why runners of the app were asked to end, so far."""
    return [why for runner_id, why in serving.ends.items() if runner_id.startswith(f"{app}-")]


@given(st.integers(0, 10**9), st.integers(0, 10**7), st.integers(0, 1 << 40), st.integers(1, 10**6))
def test_value_grows_with_arrivals_and_time_and_falls_with_size(rate: int, back_ms: int, size: int, more: int) -> None:
    have = value(rate, back_ms, size)
    assert value(rate + more, back_ms, size) >= have
    assert value(rate, back_ms + more, size) >= have
    assert value(rate, back_ms, size + more) <= have
    assert value(rate, back_ms, GIB) * 2 <= value(rate * 2, back_ms, GIB) + 1


def test_without_a_request_that_waits_everything_keeps_its_time() -> None:
    serving = full(("default/a", "default/b"))
    serving.deploy("default/c", min_concurrency=1)  # waits for a place, but nobody asks for it
    serving.run(60)
    assert not serving.ready("default/c")
    assert len(serving.ready("default/a")) == len(serving.ready("default/b")) == 1


@pytest.mark.parametrize("often", ["default/a", "default/b"])
def test_the_least_valuable_gives_way_to_a_request(often: str) -> None:
    serving = full(("default/a", "default/b"), often=often)
    seldom = "default/b" if often == "default/a" else "default/a"
    state, wall_s = serving.world.state, serving.world.wall_s
    [kept], [given] = serving.ready(often), serving.ready(seldom)
    assert value_of(state, kept, wall_s) > value_of(state, given, wall_s)
    serving.deploy("default/c")
    serving.ask(1, app="default/c")
    serving.run(15)
    [why] = ends_of(serving, seldom)
    assert "gives way to default/c" in why
    assert len(serving.ready("default/c")) == 1
    assert [one.id for one in serving.ready(often)] == [kept.id]
    assert not serving.world.state.demand.gave_way


def test_what_is_needed_or_in_use_gives_way_to_nobody() -> None:
    serving = full(("default/a",), min_concurrency=1)
    serving.deploy("default/b", keep_alive_s=KEPT)
    serving.ask(1, app="default/b", takes_s=60.0)
    serving.run(10)
    serving.deploy("default/c")
    serving.ask(1, app="default/c", takes_s=1.0)
    serving.run(45)
    assert serving.queue, "it waits on"
    assert len(serving.ready("default/a")) == len(serving.ready("default/b")) == 1
    serving.run(40)
    assert not serving.queue, "and gets the place when that request has ended"
    assert len(ends_of(serving, "default/b")) == 1
    assert not ends_of(serving, "default/a")
    assert len(serving.ready("default/a")) == 1


def test_as_many_of_one_node_as_are_needed_and_no_more() -> None:
    serving = Serving(World(Random(1), nodes=2))  # two GPUs and four
    for app in ("default/a", "default/b", "default/d"):
        serving.deploy(app, keep_alive_s=KEPT, max_concurrency=2)
        serving.ask(2, app=app, takes_s=10.0)
    serving.run(25)
    assert sum(len(serving.ready(app)) for app in ("default/a", "default/b", "default/d")) == 6
    serving.deploy("default/c", gpus=2, keep_alive_s=KEPT)
    serving.ask(1, app="default/c", takes_s=1.0)
    serving.run(20)
    assert len(serving.ends) == 2
    assert len(serving.ready("default/c")) == 1
    assert sum(len(serving.ready(app)) for app in ("default/a", "default/b", "default/d")) == 4


def test_nothing_gives_way_where_that_helps_nobody() -> None:
    serving = full(("default/a", "default/b"))
    [runner] = serving.ready("default/a")
    serving.world.step(CordonNode(runner.node, True))
    serving.deploy("default/c")
    serving.ask(1, app="default/c")
    serving.run(20)
    assert len(serving.ready("default/a")) == len(serving.ready("default/b")) == 1


def test_a_pause_between_requests_is_no_idleness() -> None:
    serving = full(("default/a", "default/b"))
    world = serving.world
    serving.ask(1, app="default/a", takes_s=0.5)
    serving.ask(1, app="default/b", takes_s=0.5)
    serving.run(2)
    work = Work(world.state, Moment(world.now_s, world.wall_s), world.core.ids)
    assert idle_runners(work) == []
    work = Work(world.state, Moment(world.now_s + 10.0, world.wall_s), world.core.ids)
    assert {one.runner.app for one in idle_runners(work)} == {"default/a", "default/b"}
    assert [one.runner.app for one in idle_runners(work, but="default/b")] == ["default/a"]


def by_definition(work: Work) -> list[tuple[int, float, str]]:
    """What `idle_runners` finds, one runner after the other and nothing kept in between."""
    state, now_s, wall_s = work.state, work.moment.now_s, work.moment.wall_s

    def worth(runner: Runner) -> int:
        facts = state.fleet.facts[runner.node]
        held = sum(gpu.memory_bytes for gpu in facts.gpus if gpu.id in runner.gpus) * (runner.gpu_milli or 1000) // 1000
        size = held or runner.memory_bytes
        back = state.demand.bring_back_ms
        return sum(value(state.demand.rate(app, wall_s), back.get(app, BRING_BACK_MS), size) for app in runner.apps)

    def idle_of(app: App) -> list[tuple[int, float, str]]:
        runners = [state.runners[id_] for id_ in state.runners_by_app.get(app.id, ())]
        told = [(one, state.status_of(one)) for one in runners if one.goal is Goal.RUN]
        ready = [(one, status) for one, status in told if status is not None and status.serves]
        spare = len(ready) - needed(state, app, state.scaling_of(app), now_s, wall_s).runners
        found = []
        for one, status in ready:
            known = state.health_of(one.node) is Health.READY and state.live[one.node].hold is Hold.NONE
            since_s = state.demand.usage_of(one.id, now_s).idle_since_s
            if known and not status.in_flight and one.id not in state.frozen and now_s - since_s >= IDLE_S:
                found.append((worth(one), since_s, one.id))
        return sorted(found)[: max(0, spare)]

    apps = [state.apps[id_] for id_ in state.demand.wanted if id_ in state.apps and id_ not in state.frozen]
    each = [one for app in apps if not app.deleting and app.rollout is None for one in idle_of(app)]
    return sorted({one for one in each if each.count(one) == len(state.runners[one[2]].apps)})


def idle_fleet(rng: Random) -> Work:
    """Four apps on six nodes of every sort: some silent, held or frozen; whole GPUs, shares and none; runners that two
    apps share, that are busy, start, end or were used a moment ago."""
    state, now_s, apps = State(), 1000.0, [f"default/a{at}" for at in range(4)]
    for app_id in apps:
        spec, _ = spec_of(tag=app_id)
        scaling = Scaling(max_concurrency=50, min_concurrency=rng.choice((0, 0, 1)))
        for record in (Revision(app_id, 1, replace(spec, scaling=scaling), ""), App(app_id, 1)):
            state.apply(Change(key_of(record), None, record))
        state.demand.wanted[app_id] = 5
        state.demand.arrivals.setdefault(app_id, Arrivals()).note(rng.randrange(4), 0.0)
        if rng.random() < 0.5:
            state.demand.bring_back_ms[app_id] = rng.randrange(1000, 90_000)
        if rng.random() < 0.3:
            state.demand.set_load(app_id, "gw", GatewayLoad(rng.randrange(3), rng.randrange(2)))
    for at in range(6):
        node = Node(f"n-{at}", f"node{at}", "p")
        live = state.live_of(node.id)
        live.health, live.hold = (
            rng.choice((*[Health.READY] * 4, Health.UNKNOWN)),
            rng.choice((*[Hold.NONE] * 5, Hold.STORE)),
        )
        live.inventory = Inventory(
            1, sim_gpus(node.id, 8, "H100-80GB", rng.choice((40, 80))), "", "", 64_000, 512 * GIB
        )
        state.apply(Change(key_of(node), None, node))
        for gpu in live.inventory.gpus:
            app_ids = rng.sample(apps, rng.choice((1, 1, 1, 2)))
            runner = Runner(f"{app_ids[0]}-{gpu.id}", "g", tuple(Binding(one, 1) for one in app_ids), 0.0, node.id)
            gpus = rng.choice(((gpu.id,), (gpu.id,), ()))
            runner = replace(runner, gpus=gpus, gpu_milli=rng.choice((0, 500)) if gpus else 0, memory_bytes=8 * GIB)
            runner = replace(runner, goal=rng.choice((*[Goal.RUN] * 5, Goal.DRAIN)))
            state.apply(Change(key_of(runner), None, runner))
            what = rng.choice((*[RunnerState.IDLE] * 4, RunnerState.RUNNING, RunnerState.SETUP))
            busy = int(what is RunnerState.RUNNING)
            status = RunnerStatus(
                runner.id, what, served=1, in_flight=busy, last_used_age_s=rng.choice((0.5, 9.0, 90.0))
            )
            live.statuses[runner.id] = status
            state.demand.note_status(runner.app, status, now_s - rng.choice((0.0, 30.0)))
            if rng.random() < 0.05:
                state.frozen[runner.id] = "test"
    return Work(state, Moment(now_s, 3600.0), CountingIds())


def test_what_is_looked_up_once_is_what_each_look_finds() -> None:
    counts = []
    for seed in range(30):
        work = idle_fleet(Random(seed))
        found = [(one.value, one.since_s, one.runner.id) for one in idle_runners(work)]
        assert found == by_definition(work)
        counts.append(len(found))
    assert min(counts) >= 1
    assert max(counts) > 10


@pytest.mark.parametrize("runners", [10, 2_000, 10_000, 45_000])
@pytest.mark.parametrize("waiting", [1, 3, 8, 40])
def test_looks_are_so_few_that_the_fleet_can_be_large_and_every_app_gets_its_own(runners: int, waiting: int) -> None:
    """`make_room` tick by tick: an app that is put off asks again with the next tick, in the order of asking."""
    tick_s, now_s, span_s = 1.01, 0.0, 60.0 + 20 * pause_of(waiting, runners)
    due_s, sought_s = dict.fromkeys(range(waiting), 0.0), dict[int, float]()
    looks: dict[int, list[float]] = {app: [] for app in range(waiting)}
    while now_s < span_s:
        for app in [app for app, at_s in due_s.items() if at_s <= now_s]:
            del due_s[app]
            if others_looked(sought_s.values(), runners, now_s):
                due_s[app] = now_s + LOOK_S
                continue
            sought_s[app] = now_s
            looks[app].append(now_s)
            due_s[app] = now_s + pause_of(waiting, runners)
        now_s += tick_s
    for times in looks.values():
        gaps = [later - sooner for sooner, later in pairwise(times)]
        assert len(times) >= 10
        assert max(gaps) <= 2 * pause_of(waiting, runners) + 2 * tick_s
    count = sum(map(len, looks.values()))
    assert count * runners <= max(LOOKED_AT_PER_S * (span_s + tick_s), waiting * runners * LOOKS_PER_S)


def test_in_a_small_fleet_nobody_is_put_off() -> None:
    assert pause_of(1, 1000) == pause_of(8, 1000) == LOOK_S
    assert pause_of(16, 1000) == 2 * LOOK_S
    assert not others_looked([5.0] * LOOKS_PER_S, 1000, 5.0)
