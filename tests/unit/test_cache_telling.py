"""What of a cache's reports becomes an event of the core: rounded, one a node and second (sooner where a fetch begins
or ends), bounded, exact in the end."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_scheduler import cache_telling
from fal_scheduler.cache_telling import CacheTelling, fact_of, matters, rounded
from fal_scheduler.core.cache_events import CacheTold
from fal_scheduler.core.residency import Holding, ResidencyTable
from fal_scheduler.core.state import State
from virtual_time import LoopClock, run_virtually

GB = 10**9
A, B = "a" * 64, "b" * 64


class Rig:
    """A table and a State that takes each event at once."""

    def __init__(self) -> None:
        self.table, self.state = ResidencyTable(), State()
        self.events: list[CacheTold] = []
        self.telling = CacheTelling(self.table, lambda: self.state, self._take, LoopClock())

    def _take(self, event: CacheTold) -> None:
        self.events.append(event)
        self.state.cache_facts.take(event)

    def hello(self, *holdings: Holding) -> None:
        self.table.hello("n1", holdings)
        self.telling.hello("n1")

    def report(self, *holdings: Holding, gone: tuple[str, ...] = (), **rates: int) -> None:
        told = {name.replace("__", ":"): rate for name, rate in rates.items()}
        self.table.report("n1", holdings=holdings, gone=gone, rates=told)
        self.telling.report("n1", (*gone, *(one.artifact_id for one in holdings)), told)


def coming(done: int, rate: int = 0) -> Holding:
    return Holding(A, GB, done, wanted=True, rate_bytes_s=rate)


def test_a_fetch_of_a_thousand_reports_is_a_few_dozen_events_and_its_end_is_exact() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.hello()
        for at in range(1000):
            rig.report(coming(at * GB // 1000, 90_000_000 + at % 7 * 1_000_000), origin__b=90_000_000 + at % 5 * 10**6)
            await asyncio.sleep(0.1)
        rig.report(Holding(A, GB, GB, ready=True))
        await asyncio.sleep(cache_telling.TELL_EVERY_S)
        assert len(rig.events) < 60
        fact = rig.state.cache_facts.holders[A]["n1"]
        assert (fact.ready, fact.fetching, fact.bytes_left, fact.bytes_here) == (True, False, 0, GB)
        assert rig.state.cache_facts.nodes["n1"].rates["origin:b"] == pytest.approx(92_000_000, rel=0.07)
        rig.telling.close()

    run_virtually(scenario())


def test_no_node_tells_its_progress_more_than_once_a_second_and_the_first_word_goes_at_once() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.hello(Holding(B, GB, GB, ready=True))
        assert [event.whole for event in rig.events] == [True]
        await asyncio.sleep(5.0)
        began_s = asyncio.get_running_loop().time()
        rig.report(coming(0))
        assert len(rig.events) == 2
        for at in range(30):
            rig.report(coming(at * 30_000_000))
            await asyncio.sleep(0.05)
        span_s = asyncio.get_running_loop().time() - began_s
        assert len(rig.events) - 1 <= span_s / cache_telling.TELL_EVERY_S + 1
        rig.telling.close()

    run_virtually(scenario())


def test_what_turns_does_not_wait_for_the_second() -> None:
    async def scenario() -> None:
        rig = Rig()
        facts = rig.state.cache_facts
        rig.hello()
        rig.report(coming(0))
        await asyncio.sleep(cache_telling.TURN_EVERY_S)
        assert facts.holders[A]["n1"].fetching
        rig.report(coming(GB // 2))
        rig.report(Holding(A, GB, GB, ready=True))
        await asyncio.sleep(cache_telling.TURN_EVERY_S)
        assert facts.holders[A]["n1"].ready
        rig.report(gone=(A,))
        rig.report(Holding(B, GB, 0, wanted=True))
        await asyncio.sleep(cache_telling.TURN_EVERY_S)
        assert list(facts.holders) == [B]
        assert len(rig.events) == 4, "one event for all that turned at once"
        rig.telling.close()

    run_virtually(scenario())


def test_a_node_where_everything_turns_all_the_time_is_told_three_times_a_second_at_most() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.hello()
        for _ in range(600):
            rig.report(coming(0))
            await asyncio.sleep(0.05)
            rig.report(gone=(A,))
            await asyncio.sleep(0.05)
        usual, sooner = 60 / cache_telling.TELL_EVERY_S, 60 / cache_telling.TURN_COSTS_S
        assert len(rig.events) <= usual + sooner + cache_telling.TURNS_AHEAD_MAX + 1
        await asyncio.sleep(cache_telling.TELL_EVERY_S)
        assert A not in rig.state.cache_facts.holders
        rig.telling.close()

    run_virtually(scenario())


def test_a_node_that_is_forgotten_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.hello(coming(5), Holding(B, GB, GB, ready=True))
        rig.report(coming(GB // 2))
        rig.table.forget("n1")
        rig.telling.left("n1")
        await asyncio.sleep(3.0)
        facts = rig.state.cache_facts
        assert (facts.holders, facts.nodes, facts.under_way) == ({}, {}, {})
        rig.telling.left("unknown")
        assert len(rig.events) == 2
        rig.telling.close()

    run_virtually(scenario())


def test_of_a_full_cache_what_is_on_its_way_and_the_largest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_telling, "CACHE_FACTS_PER_NODE_MAX", 2)

    async def scenario() -> None:
        rig = Rig()
        ready = [Holding(name * 64, size, size, ready=True) for name, size in (("1", 5), ("2", 7), ("3", 6))]
        rig.hello(*ready, Holding(A, 1, 0, wanted=True))
        assert list(rig.state.cache_facts.holders) == [A, "2" * 64]
        await asyncio.sleep(2.0)
        rig.report(Holding("4" * 64, 9, 9, ready=True))
        assert len(rig.state.cache_facts.holders) == 2
        rig.telling.close()

    run_virtually(scenario())


@given(st.integers(0, 1 << 50))
def test_a_rate_is_kept_to_about_a_tenth(rate: int) -> None:
    assert abs(rounded(rate) - rate) * 16 <= rate
    assert rounded(rounded(rate)) == rounded(rate)


def test_small_steps_do_not_matter_and_turns_do() -> None:
    fact = fact_of(coming(100))
    assert matters(fact, None, GB)
    assert not matters(fact_of(coming(200)), fact, GB)
    assert matters(fact_of(coming(GB // 20 + 100)), fact, GB)
    assert matters(fact_of(Holding(A, GB, 100)), fact, GB), "it is no longer fetched"
    assert matters(fact_of(coming(100, rate=GB)), fact, GB)
