"""The dispatch order under any arrivals: it serves what it can, nobody is passed over for ever, teams share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_scheduler.core.dispatch_learnt import MODELS_MAX, Learnt
from fal_scheduler.core.dispatch_order import (
    BusyRunner,
    Decision,
    DispatchOrder,
    FreeRunner,
    Settings,
    Waiting,
    erlang_b_micro,
)

MODELS = ["m0", "m1", "m2", "m3", "m4"]
SETTINGS = Settings(load_ms=5_000, bypass_ms=60_000, bypass_max=40)


@dataclass
class Rig:
    """A few runners with one model each, served step by step; `log` holds what was served, and who still waited."""

    order: DispatchOrder
    runners: int
    service_ms: int = 10_000
    now_ms: int = 0
    queues: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # team, model -> arrivals
    model: dict[int, str] = field(default_factory=dict)
    busy: dict[int, tuple[int, int, bool]] = field(default_factory=dict)  # runner -> since, until, loads
    log: list[tuple[int, str, str, int]] = field(default_factory=list)  # now, team, model, arrival
    decisions: list[Decision] = field(default_factory=list)

    def arrive(self, team: str, model: str) -> None:
        self.queues.setdefault((team, model), []).append(self.now_ms)
        self.order.observe_arrival(model, self.now_ms)

    def waiting(self, weights: dict[str, int] | None = None) -> list[Waiting]:
        return [
            Waiting(f"{t}/{m}", t, f"{t}/a", m, 0, len(q), self.now_ms - q[0], 0, (weights or {}).get(t, 1))
            for (t, m), q in self.queues.items()
            if q
        ]

    def advance(self, by_ms: int) -> None:
        self.now_ms += by_ms
        for n, (since, until, loads) in list(self.busy.items()):
            if until <= self.now_ms:
                (self.order.observe_load if loads else self.order.observe_done)(self.model[n], until - since)
                del self.busy[n]

    def dispatch(self, weights: dict[str, int] | None = None) -> None:
        while waiting := self.waiting(weights):
            free = [
                FreeRunner(f"r{n}", (self.model[n],) if n in self.model else (), None)
                for n in range(self.runners)
                if n not in self.busy
            ]
            held = [
                BusyRunner(f"r{n}", (self.model[n],), self.now_ms - since, until - self.now_ms if loads else None)
                for n, (since, until, loads) in self.busy.items()
            ]
            decision = self.order.choose(self.now_ms, waiting, free, held)
            if decision is None:
                warm = {x.resident[0] for x in free if x.resident}
                assert not warm & {x.model for x in waiting}, "a free runner with the model, and somebody who waits"
                return
            self.order.took(decision, waiting)
            self.decisions.append(decision)
            n = int(decision.runner[1:])
            team, model = decision.key.split("/")
            if decision.load:
                assert self.model.get(n) != decision.model
                self.model[n] = decision.model
                self.busy[n] = (self.now_ms, self.now_ms + SETTINGS.load_ms, True)
            else:
                assert self.model[n] == model
                self.log.append((self.now_ms, team, model, self.queues[team, model].pop(0)))
                self.busy[n] = (self.now_ms, self.now_ms + self.service_ms, False)


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 8_000), st.sampled_from(["a", "b"]), st.sampled_from(MODELS)), min_size=1, max_size=120
)


def play(arrivals: list[tuple[int, str, str]], runners: int) -> Rig:
    rig = Rig(DispatchOrder(SETTINGS), runners)
    for gap_ms, team, model in arrivals:
        rig.advance(gap_ms)
        rig.arrive(team, model)
        rig.dispatch()
    for _ in range(10_000):
        if not rig.waiting() and not rig.busy:
            return rig
        rig.advance(1_000)
        rig.dispatch()
    raise AssertionError(f"never served: {rig.waiting()}")


@given(ARRIVALS, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_everything_is_served_and_who_is_overdue_is_next(arrivals: list[tuple[int, str, str]], runners: int) -> None:
    """From when a request is overdue, only those as old, what a runner still holds for one such, and warm ones pass."""
    rig = play(arrivals, runners)
    assert len(rig.log) == len(arrivals)
    for at_ms, team, model, arrived_ms in rig.log:
        overdue_ms = arrived_ms + SETTINGS.bypass_ms
        older = sum(1 for *_, a in rig.log if a <= arrived_ms)
        # After that every runner serves those before it, one load each, and then it.
        bound = overdue_ms + (older + 1) * (rig.service_ms + SETTINGS.load_ms) + 2_000
        assert at_ms <= bound, (team, model)
        if runners == 1:
            passed = [x for x in rig.log if overdue_ms + rig.service_ms + 6_000 < x[0] < at_ms and x[3] > arrived_ms]
            assert not passed, "with one runner nobody younger goes before who is overdue"


@given(ARRIVALS, st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_the_same_events_decide_the_same(arrivals: list[tuple[int, str, str]], runners: int) -> None:
    assert play(arrivals, runners).decisions == play(arrivals, runners).decisions


@given(st.integers(1, 4), st.sampled_from([0, 1]))
@settings(max_examples=10, deadline=None)
def test_teams_share_saturated_runners_by_weight(weight: int, same: int) -> None:
    """Both teams always wait, one asks ten times as much: they still get runner time as their weights are."""
    rig = Rig(DispatchOrder(Settings(load_ms=5_000, bypass_ms=10**9, bypass_max=10**9, fair_ms=20_000)), 2)
    weights = {"a": weight, "b": 1}
    for step in range(400):
        for n in range(10):
            rig.arrive("b", MODELS[n % 2])
        for _ in range(2):
            rig.arrive("a", MODELS[0 if same else 2])
        rig.advance(10_000)
        rig.dispatch(weights)
        assert step < 5 or all(rig.queues[t, m] for t, m in (("b", "m0"), ("b", "m1")))
    served = Counter(team for _, team, *_ in rig.log)
    wanted = min(weight / (weight + 1), 800 / len(rig.log))
    assert abs(served["a"] / len(rig.log) - wanted) < 0.06, served


def test_priority_comes_first_and_age_makes_up_for_it() -> None:
    order = DispatchOrder(SETTINGS)
    free = [FreeRunner("r0", ("m0", "m1"))]
    low = Waiting("low", "t", "t/a", "m0", 0, 1, 1_000)
    high = Waiting("high", "t", "t/a", "m1", 1, 1, 0)
    assert order.choose(0, [low, high], free) == Decision("high", "r0", False, "m1")
    aged = Waiting("low", "t", "t/a", "m0", 0, 1, 2 * SETTINGS.bypass_ms)
    assert order.choose(0, [aged, high], free) == Decision("low", "r0", False, "m0")


def test_who_was_passed_over_too_often_is_next() -> None:
    order = DispatchOrder(SETTINGS)
    old = Waiting("old", "t", "t/a", "m0", 0, 1, 2_000)
    for _ in range(SETTINGS.bypass_max):
        young = Waiting("young", "t", "t/a", "m1", 0, 1, 1_000)
        decision = order.choose(0, [old, young], [FreeRunner("r0", ("m1",), ())])
        assert decision == Decision("young", "r0", False, "m1")
        order.took(decision, [old, young])
    assert order.due(old)
    assert order.choose(0, [old, young], [FreeRunner("r0", ("m1",))]) == Decision("old", "r0", True, "m0")


def test_a_busy_copy_is_waited_for_where_a_load_saves_nothing() -> None:
    order = DispatchOrder(Settings())
    order.observe_arrival("m0", 0)
    free, one = [FreeRunner("r1", ("m9",))], Waiting("k", "t", "t/a", "m0", 0, 1, 0)
    assert order.choose(0, [one], free, [BusyRunner("r0", ("m0",), 29_000)]) is None
    many = Waiting("k", "t", "t/a", "m0", 0, 12, 0)
    assert order.choose(0, [many], free, [BusyRunner("r0", ("m0",), 29_000)]) == Decision("k", "r1", True, "m0")


def test_the_model_that_is_asked_for_least_is_dropped() -> None:
    order = DispatchOrder(Settings())
    for n in range(20):
        order.observe_arrival("hot", n * 1_000)
    order.observe_arrival("cold", 5_000)
    free = [FreeRunner("r0", ("hot",), None, 90_000), FreeRunner("r1", ("cold",), None, 10)]
    decision = order.choose(20_000, [Waiting("k", "t", "t/a", "new", 0, 1, 0)], free)
    assert decision == Decision("k", "r1", True, "new")


def test_nothing_is_loaded_into_a_runner_that_may_not() -> None:
    order = DispatchOrder(Settings())
    one = Waiting("k", "t", "t/a", "m0", 0, 50, 10**7)
    assert order.choose(0, [one], [FreeRunner("r0", ("m1",), ())]) is None
    assert order.choose(0, [one], [FreeRunner("r0", ("m0",), None, 0, ("t/other",))]) is None
    assert order.choose(0, [one], [FreeRunner("r0", ("m1",), ("m0",), 0, ("t/a",))]) == Decision("k", "r0", True, "m0")


@given(st.integers(0, 12), st.integers(0, 20_000_000))
@settings(max_examples=100, deadline=None)
def test_erlangs_loss_is_exact_to_a_millionth_or_so(servers: int, offered_micro: int) -> None:
    load = offered_micro / 1e6
    lost, term, total = 1.0, 1.0, 1.0
    for n in range(1, servers + 1):
        term *= load / n
        total += term
    lost = term / total
    assert abs(erlang_b_micro(servers, offered_micro) / 1e6 - lost) < 2e-5


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=60), st.integers(1_000, 400_000))
@settings(max_examples=60, deadline=None)
def test_rates_decay_as_the_half_life_says_in_however_many_steps(gaps_ms: list[int], half_ms: int) -> None:
    learnt = Learnt(22_000, (half_ms, half_ms, 10_800_000))
    now_ms, exact = 0, 0.0
    for gap_ms in gaps_ms:
        now_ms += gap_ms
        exact = exact * 0.5 ** (gap_ms / half_ms) + 1
        learnt.arrived("m", now_ms, 1)
    assert learnt.per_s_micro("m", now_ms, (1_000, 0, 0)) == pytest.approx(exact * 693e6 / half_ms, rel=0.005, abs=2)
    assert learnt.per_s_micro("m", now_ms, (500, 500, 0)) == pytest.approx(exact * 693e6 / half_ms, rel=0.005, abs=3)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100_000)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_what_is_expected_of_a_size_lies_between_what_was_seen_of_it_and_of_its_model(
    done: list[tuple[str, int]],
) -> None:
    learnt = Learnt(22_000, (1_000, 1_000, 1_000))
    learnt.arrived("m", 0, 1)
    for size, took_ms in done:
        learnt.served("m", took_ms, size)
    for size in "abc":
        seen = [took_ms for x, took_ms in done if x == size]
        expected = learnt.service_ms("m", size)
        if not seen:
            assert expected == learnt.service_ms("m")
        else:
            low, high = min(*seen, learnt.service_ms("m")), max(*seen, learnt.service_ms("m"))
            assert low - 1 <= expected <= high + 1


def test_the_size_expected_to_be_short_is_served_first_unless_the_long_one_waited() -> None:
    order = DispatchOrder(SETTINGS)
    order.observe_arrival("m0", 0)
    for size, took_ms in (("long", 60_000), ("short", 2_000)) * 10:
        order.observe_done("m0", took_ms, size)
    free = [FreeRunner("r0", ("m0",))]
    long = Waiting("l", "t", "t/a", "m0", 0, 1, 20_000, size="long")
    short = Waiting("s", "t", "t/a", "m0", 0, 1, 0, size="short")
    assert order.choose(0, [long, short], free) == Decision("s", "r0", False, "m0")
    assert order.choose(0, [replace(long, oldest_ms=55_000), short], free) == Decision("l", "r0", False, "m0")


def test_what_is_learnt_is_bounded() -> None:
    learnt = Learnt(22_000, (1_000, 1_000, 1_000))
    learnt.arrived("m", 0, 1)
    learnt.served("m", 5_000, "first")
    learnt.served("m", 9_000, "second")
    first = learnt.service_ms("m", "first")
    for n in range(MODELS_MAX):
        learnt.served("m", 7_000, f"size {n}")
    assert learnt.service_ms("m", "first") == learnt.service_ms("m") != first
    for n in range(MODELS_MAX):
        learnt.arrived(f"model {n}", n, 1)
    assert learnt.per_s_micro("m", 0, (1_000, 0, 0)) == 0
