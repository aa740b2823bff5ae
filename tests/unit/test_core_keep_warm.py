"""Keep-warm by value: what idles ends early only where a request waits for its place, the least valuable first."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_world import World
from demand_rig import Serving
from fal_scheduler.core.events import CordonNode, Moment
from fal_scheduler.core.keep_warm import GIB, idle_runners, value, value_of
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
