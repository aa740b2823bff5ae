"""fal's scaling rules: its documented examples as a table, and apps that come and go with requests by the second."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_world import World, spec_of
from demand_rig import Serving
from fal_contract.errors import Code, FalError
from fal_contract.limits import FAILOVER_GRACE_S
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.events import ApplyApp, DeleteApp, Moment, ScaleApp
from fal_scheduler.core.forecast import foretold_runners
from fal_scheduler.core.records import Goal, ScaleOverride, Scaling
from fal_scheduler.core.scaling import UNUSED_S, runners_for
from fal_scheduler.core.serving import why_not_serving
from fal_scheduler.core.views import wanted

APP = "default/a"
MANY = 100


@pytest.mark.parametrize(
    ("knobs", "requests", "runners"),
    [
        # scale to zero, and with demand
        ({}, 0, 0),
        ({}, 1, 1),
        ({}, 7, 7),
        # floor and ceiling
        ({"min_concurrency": 2}, 0, 2),
        ({"min_concurrency": 2}, 1, 2),
        ({"min_concurrency": 2}, 3, 3),
        ({"max_concurrency": 2}, 9, 2),
        ({"max_concurrency": 0}, 9, 0),
        # the buffer is above demand, and beats min_concurrency when higher
        ({"concurrency_buffer": 3}, 0, 3),
        ({"concurrency_buffer": 3}, 4, 7),
        ({"min_concurrency": 2, "concurrency_buffer": 3}, 0, 3),
        ({"min_concurrency": 5, "concurrency_buffer": 2}, 1, 5),
        ({"min_concurrency": 5, "concurrency_buffer": 2}, 4, 6),
        ({"concurrency_buffer": 9, "max_concurrency": 4}, 1, 4),
        # the larger of both buffers; a percentage of the requests, rounded up
        ({"concurrency_buffer_perc": 20}, 0, 0),
        ({"concurrency_buffer_perc": 20}, 1, 2),
        ({"concurrency_buffer_perc": 20}, 10, 12),
        ({"concurrency_buffer_perc": 20}, 11, 14),
        ({"concurrency_buffer": 3, "concurrency_buffer_perc": 20}, 10, 13),
        ({"concurrency_buffer": 3, "concurrency_buffer_perc": 50}, 10, 15),
        # several requests in one runner
        ({"max_multiplexing": 4}, 1, 1),
        ({"max_multiplexing": 4}, 4, 1),
        ({"max_multiplexing": 4}, 5, 2),
        ({"max_multiplexing": 4, "concurrency_buffer": 1}, 8, 3),
    ],
)
def test_documented_examples(knobs: dict[str, int], requests: int, runners: int) -> None:
    assert runners_for(Scaling(**{"max_concurrency": MANY, **knobs}), requests) == runners  # type: ignore[arg-type]


KNOBS = st.builds(
    Scaling,
    min_concurrency=st.integers(0, 20),
    max_concurrency=st.integers(20, 60),
    concurrency_buffer=st.integers(0, 20),
    concurrency_buffer_perc=st.integers(0, 300),
    max_multiplexing=st.integers(1, 16),
)


@given(KNOBS, st.integers(0, 10_000), st.integers(0, 50), st.integers(0, 100))
def test_within_bounds_and_monotone_in_demand(scaling: Scaling, requests: int, more: int, forecast: int) -> None:
    found = runners_for(scaling, requests, forecast)
    assert scaling.min_concurrency <= found <= scaling.max_concurrency
    assert runners_for(scaling, requests + more, forecast) >= found
    assert runners_for(scaling, requests, forecast + more) >= found
    assert runners_for(replace(scaling, concurrency_buffer=scaling.concurrency_buffer + 1), requests, forecast) >= found


def test_a_request_wakes_an_app_and_keep_alive_ends_it() -> None:
    serving = Serving()
    serving.deploy(keep_alive_s=30.0)
    serving.run(20)
    assert not serving.runners()
    assert "this request starts one" in why_not_serving(serving.world.state, APP)
    serving.ask(1)
    serving.run(1)
    [runner] = serving.runners()
    assert runner.node
    serving.run(14)
    assert [one.id for one in serving.ready()] == [runner.id]
    assert serving.waits_s
    assert not serving.queue
    used_s = serving.used_s[runner.id]
    while serving.runners():
        serving.run(1)
        assert serving.world.now_s < used_s + 60.0
    assert 30.0 <= serving.world.now_s - used_s <= 33.0
    assert serving.world.state.runners[runner.id].goal is Goal.DRAIN
    assert "idle for" in serving.world.state.runners[runner.id].goal_reason
    serving.run(5)
    serving.ask(1)
    serving.run(12)
    assert len(serving.ready()) == 1, "and it comes back"


def test_one_request_starts_one_runner_however_often_it_is_told() -> None:
    serving = Serving()
    serving.deploy()
    serving.ask(1, takes_s=30.0)
    serving.run(30)
    assert max(serving.counts) == 1


def test_a_runner_that_never_got_a_request_dies_after_10_s() -> None:
    serving = Serving()
    serving.deploy(keep_alive_s=300.0)
    serving.ask(1)
    serving.run(2)
    serving.queue.clear()  # the client went away
    while not serving.ready():
        serving.run(1)
        assert len(serving.runners()) == 1, "one that starts is not stopped by that"
    ready_s = serving.world.now_s - 1.0  # told before the tick
    while serving.runners():
        serving.run(1)
        assert serving.world.now_s <= ready_s + UNUSED_S + 2.0
    assert serving.world.now_s >= ready_s + UNUSED_S


@pytest.mark.parametrize("knobs", [{"min_concurrency": 1}, {"concurrency_buffer": 1}])
def test_unless_floor_or_buffer_covers_it(knobs: dict[str, int]) -> None:
    serving = Serving()
    serving.deploy(**knobs)
    serving.run(60)
    assert len(serving.ready()) == 1


def test_buffer_follows_requests_under_way() -> None:
    serving = Serving()
    serving.deploy(concurrency_buffer=2, keep_alive_s=5.0)
    serving.run(20)
    assert len(serving.ready()) == 2
    serving.ask(3, takes_s=40.0)
    serving.run(20)
    assert len(serving.ready()) == 5
    serving.run(60)
    assert len(serving.runners()) == 2


def test_scaling_delay_waits_for_pick_up_but_not_where_nobody_serves() -> None:
    serving = Serving()
    serving.deploy(scaling_delay_s=20.0)
    serving.ask(1, takes_s=12.0)
    serving.run(1)
    assert len(serving.runners()) == 1, "nobody could pick it up"
    while serving.queue:
        serving.run(1)
    serving.ask(1, takes_s=200.0)
    serving.run(15)
    assert len(serving.runners()) == 1, "it was picked up in time"
    assert not serving.queue
    serving.ask(2)
    serving.run(19)
    assert len(serving.runners()) == 1
    serving.run(4)
    assert len(serving.runners()) == 3


def test_demand_ends_with_the_gateways_stream() -> None:
    serving = Serving()
    serving.deploy()
    world = serving.world
    world.step(DemandTold("g1", (AppDemand(APP, queued=3, oldest_age_ms=0),), world.now_s))
    world.step(DemandTold("g2", (AppDemand(APP, queued=2), AppDemand("default/unknown", queued=9)), world.now_s))
    world.settle()
    assert len(serving.runners()) == 5
    assert wanted(world.state, world.state.apps[APP]) == 5
    for runner in serving.runners()[1:]:
        assert runner.node
    world.step(DemandTold("g1", (), world.now_s))
    assert world.state.demand.queued(APP) == 2
    world.step(DemandTold("g2", (), world.now_s))
    demand = world.state.demand
    assert not demand.loads
    assert not demand.apps_of
    serving.run(60)
    assert not serving.runners()
    world.step(DeleteApp(APP))
    serving.run(3)
    assert not any((demand.usage, demand.wanted, demand.look_at_s, demand.arrivals))


def test_what_waits_for_a_place_goes_with_its_request() -> None:
    serving = Serving(World(Random(1), nodes=1))  # two GPUs
    serving.deploy()
    world = serving.world
    world.step(DemandTold("g1", (AppDemand(APP, queued=5),), world.now_s))
    world.settle()
    assert sum(1 for one in serving.runners() if not one.node) == 3
    world.step(DemandTold("g1", (AppDemand(APP, queued=1),), world.now_s))
    world.settle()
    assert [bool(one.node) for one in serving.runners()] == [True, True]


def test_idle_ones_go_first_the_longest_idle_of_them_and_busy_ones_drain() -> None:
    serving = Serving()
    serving.deploy(keep_alive_s=1000.0, max_concurrency=4)
    serving.ask(4, takes_s=8.0)
    serving.run(20)
    serving.ask(3, takes_s=8.0)
    serving.run(12)
    serving.ask(1, takes_s=300.0)
    serving.run(3)
    ready = serving.ready()
    assert len(ready) == 4
    [busy] = [one.id for one in ready if serving.busy.get(one.id)]
    by_use = sorted((serving.used_s[one.id], one.id) for one in ready if one.id != busy)
    assert by_use[0][0] < by_use[-1][0]
    serving.world.step(ScaleApp(APP, ScaleOverride(max_concurrency=3)))
    assert {one.id for one in ready} - {one.id for one in serving.runners()} == {by_use[0][1]}
    serving.world.step(ScaleApp(APP, ScaleOverride(max_concurrency=1)))
    assert [one.id for one in serving.runners()] == [busy]
    serving.world.step(ScaleApp(APP, ScaleOverride(max_concurrency=0)))
    assert serving.world.state.runners[busy].goal is Goal.DRAIN
    serving.run(10)
    assert busy in serving.world.state.runners, "it finishes its request"


def test_many_idle_runners_need_no_confirm() -> None:
    serving = Serving()
    serving.deploy(keep_alive_s=5.0)
    serving.ask(8, takes_s=20.0)
    serving.run(40)
    serving.run(20)
    assert max(serving.counts) == 8
    assert not serving.runners()
    assert not serving.world.state.alarms


def test_a_new_leader_judges_nothing_for_its_first_minutes_and_then_by_what_nodes_tell() -> None:
    serving = Serving()
    serving.deploy(keep_alive_s=200.0)
    serving.ask(2, takes_s=5.0)
    serving.run(20)
    assert len(serving.ready()) == 2
    world = serving.world
    state, used_s = world.state, max(serving.used_s.values())
    demand = type(state.demand)()  # what a leader knows at its start
    state.demand, state.term_began_s, state.grace_over = demand, world.now_s, False
    serving.told = ()
    for node_id in world.nodes:
        world.hello(node_id)
    assert all(not usage.unused for usage in demand.usage.values())
    assert max(usage.used_at_s for usage in demand.usage.values()) == pytest.approx(used_s, abs=1.5)
    serving.run(int(FAILOVER_GRACE_S) - 5)
    assert len(serving.ready()) == 2, "idle for longer than keep_alive, but nobody is judged yet"
    serving.run(15)
    assert not serving.runners()


def test_usage_is_remembered_though_a_node_forgets_it() -> None:
    serving = Serving()
    serving.deploy(keep_alive_s=100.0)
    serving.ask(1)
    serving.run(20)
    [runner] = serving.ready()
    node = serving.world.nodes[runner.node]
    serving.served.clear()
    serving.used_s.clear()
    node.containers[runner.id] = replace(node.containers[runner.id], served=0, last_used_age_s=-1.0)
    serving.world.hello(node.id)
    serving.run(int(UNUSED_S) + 5)
    assert [one.id for one in serving.ready()] == [runner.id]


def test_silent_nodes_are_not_judged() -> None:
    serving = Serving()
    serving.deploy(keep_alive_s=20.0)
    serving.ask(1)
    serving.run(15)
    [runner] = serving.ready()
    serving.world.cut(runner.node)
    serving.run(45)
    assert [one.id for one in serving.runners()] == [runner.id]
    assert serving.world.state.runners[runner.id].goal is Goal.RUN


def test_crash_backoff_holds_a_start_until_it_is_over_and_a_success_ends_it() -> None:
    serving = Serving()
    serving.deploy()
    serving.ask(1, takes_s=100.0)
    waits = []
    for _ in range(3):
        while not (placed := [one for one in serving.runners() if one.node]):
            serving.run(1)
        [runner] = placed
        serving.run(1)
        serving.world.nodes[runner.node].crash(runner.id)
        serving.world.report(runner.node)
        began_s = serving.world.now_s
        while not any(one.node for one in serving.runners()):
            serving.run(1)
        waits.append(serving.world.now_s - began_s)
    assert waits == [pytest.approx(30.0, abs=2), pytest.approx(60.0, abs=2), pytest.approx(90.0, abs=2)]
    while not serving.ready():
        serving.run(1)
    assert not serving.world.state.backoffs


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("keep_alive_s", [0.0, 10.0])
def test_constant_demand_does_not_flap(rate: float, keep_alive_s: float) -> None:
    serving = Serving()
    serving.deploy(keep_alive_s=keep_alive_s)
    serving.run(60, rate=rate, takes_s=6.0)
    serving.counts.clear()
    made = len(serving.seen_s)
    serving.run(120, rate=rate, takes_s=6.0)
    assert max(serving.counts) - min(serving.counts) <= 1
    # Where the load is no whole number of runners and nothing is kept, the last one may come and go.
    assert len(serving.seen_s) - made <= (0 if keep_alive_s else 12)


def test_bounds_hold_whatever_comes() -> None:
    rng = Random(7)
    for seed in range(3):
        serving = Serving(World(Random(seed), nodes=4))
        least, most = rng.randrange(2), rng.randrange(2, 7)
        serving.deploy(
            min_concurrency=least, max_concurrency=most, keep_alive_s=8.0, concurrency_buffer=rng.randrange(2)
        )
        for _ in range(12):
            serving.ask(rng.randrange(6), takes_s=float(rng.randrange(1, 20)))
            serving.run(rng.randrange(1, 15))
        assert max(serving.counts) <= most
        assert min(serving.counts) >= least


def test_values_set_at_run_time_survive_a_redeploy_until_they_are_reset() -> None:
    world = World(Random(1), nodes=2)
    spec, digest = spec_of(least=0)
    world.step(ApplyApp(APP, spec, digest))
    every = ScaleOverride(1, 5, 40.0, 1, 10, 2.0, 99.0, 1)
    world.step(ScaleApp(APP, every))
    spec = replace(spec, scaling=replace(spec.scaling, max_multiplexing=3, startup_timeout_s=7.0, keep_alive_s=1.0))
    world.step(ApplyApp(APP, spec, "second"))
    found = world.state.scaling_of(world.state.apps[APP])
    assert found == Scaling(40.0, 1, 5, 1, 10, 2.0, 3, 99.0, 7.0, 1), "code-set ones come from the code"
    world.step(ApplyApp(APP, spec, "second"))
    assert world.state.apps[APP].scale == every
    world.step(ScaleApp(APP, ScaleOverride(max_concurrency=6), reset=True))
    assert world.state.apps[APP].scale == ScaleOverride(max_concurrency=6)
    world.step(ApplyApp(APP, spec, "second", reset_scale=True))
    assert world.state.apps[APP].scale is None
    world.step(ScaleApp(APP, every))
    world.step(ApplyApp(APP, replace(spec, env={"A": "1"}), "third", reset_scale=True))
    assert world.state.scaling_of(world.state.apps[APP]) == spec.scaling


@pytest.mark.parametrize(
    ("scale", "field"),
    [
        (ScaleOverride(keep_alive_s=float("nan")), "keep_alive"),
        (ScaleOverride(concurrency_buffer_perc=1001), "concurrency_buffer_perc"),
        (ScaleOverride(concurrency_buffer=10**9), "concurrency_buffer"),
        (ScaleOverride(scaling_delay_s=-0.1), "scaling_delay"),
        (ScaleOverride(request_timeout_s=0.0), "request_timeout"),
        (ScaleOverride(forecast_concurrency=10**9), "forecast_concurrency"),
    ],
)
def test_wrong_values_are_refused_by_name(scale: ScaleOverride, field: str) -> None:
    world = World(Random(1), nodes=1)
    world.step(ApplyApp(APP, *spec_of(least=0)))
    with pytest.raises(FalError, match=field) as refused:
        world.core.step(ScaleApp(APP, scale), Moment(world.now_s, world.wall_s))
    assert refused.value.code is Code.INVALID


def test_the_forecast_starts_what_will_be_needed_within_its_budget() -> None:
    serving = Serving(starts_s=30.0)
    serving.deploy(keep_alive_s=5.0, forecast_concurrency=1)
    for _ in range(12):  # a request every 50 s
        serving.ask(1, takes_s=2.0)
        serving.run(50)
    assert serving.world.state.demand.arrivals[APP].total == 12
    serving.counts.clear()
    serving.waits_s.clear()
    for _ in range(4):
        serving.ask(1, takes_s=2.0)
        serving.run(50)
    assert set(serving.counts) == {1}, "it is there before it is asked for"
    assert max(serving.waits_s) <= 1.0
    serving.run(3600)
    assert not serving.runners(), "and goes when nobody comes any more"


@pytest.mark.parametrize(
    ("per_minute", "ahead_s", "takes_s", "runners"),
    [
        (0, 30, 10, 0),
        (0.1, 30, 10, 0),
        (1, 30, 10, 1),
        (1, 10, 10, 0),
        (60, 30, 3, 3),
        (60, 30, 3.5, 4),
        (60, 30, 0, 1),
    ],
)
def test_runners_that_are_foretold(per_minute: float, ahead_s: float, takes_s: float, runners: int) -> None:
    found = foretold_runners(round(per_minute * 1e6), round(ahead_s * 1000), round(takes_s * 1000), 1)
    assert found == runners
