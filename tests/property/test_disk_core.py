"""Eviction and the clock of pins: what must hold whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fal_fsd.core.eviction import HALF_LIFE_S, Candidate, bytes_to_free, choose, cooled, requests_per_hour, value
from fal_fsd.core.pin_clock import JUMP_MAX_S, PinClock

GIB = 1 << 30
candidates = st.builds(
    Candidate,
    id=st.text("abcdef", min_size=1, max_size=6),
    bytes_total=st.integers(0, 100 * GIB),
    bytes_freed=st.integers(0, 100 * GIB),
    requests_per_hour=st.floats(0, 1e6),
    seconds_back=st.floats(0, 1e6),
    last_copy=st.booleans(),
    pinned=st.booleans(),
    open=st.booleans(),
    told_ms=st.none() | st.integers(0, 1 << 40),
)
lists = st.lists(candidates, max_size=20, unique_by=lambda x: x.id)


@given(lists, st.integers(1, 500 * GIB))
def test_nothing_pinned_or_open_goes_and_no_more_than_needed(found: list[Candidate], wanted: int) -> None:
    by_id = {x.id: x for x in found}
    chosen = choose(found, wanted)
    assert len(chosen) == len(set(chosen))
    assert not any(by_id[id].pinned or by_id[id].open for id in chosen)
    freed = [by_id[id].bytes_freed for id in chosen]
    assert sum(freed[:-1]) < wanted
    may = [x for x in found if not x.pinned and not x.open]
    assert sum(freed) >= wanted or len(chosen) == len(may)


@given(lists, st.integers(1, 500 * GIB), st.randoms(use_true_random=False))
def test_order_of_the_list_does_not_matter(found: list[Candidate], wanted: int, rng: object) -> None:
    shuffled = list(found)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose(shuffled, wanted) == choose(found, wanted)


@given(lists)
def test_last_copies_go_after_everything_else(found: list[Candidate]) -> None:
    by_id = {x.id: x for x in found}
    flags = [by_id[id].last_copy for id in choose(found, 1 << 60)]
    assert flags == sorted(flags)


def test_the_least_seconds_saved_per_gib_go_first() -> None:
    hot_small = Candidate("a", GIB, GIB, 10, 10)
    hot_large = Candidate("b", 20 * GIB, 20 * GIB, 10, 200)
    dear = Candidate("c", GIB, GIB, 0, 1000)
    cold = Candidate("d", GIB, GIB, 0, 10)
    assert value(hot_small) == value(hot_large) > value(dear) > value(cold)
    assert choose([hot_small, dear, cold], 2 * GIB) == ["d", "c"]


@given(lists)
def test_what_the_scheduler_says_counts_instead_of_what_was_asked_for_here(found: list[Candidate]) -> None:
    plain = [replace(x, last_copy=False, bytes_freed=1) for x in found]
    chosen = [next(x for x in plain if x.id == id) for id in choose(plain, 1 << 60)]
    worth = [x.told_ms / 1000 if x.told_ms is not None else value(x) for x in chosen]
    assert worth == sorted(worth)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000), st.integers(50, 100), st.integers(0, 50))
def test_water_marks(used: int, needed: int, bytes_max: int, high: int, low: int) -> None:
    free = bytes_to_free(used=used, needed=needed, bytes_max=bytes_max, high_percent=high, low_percent=low)
    if (used + needed) * 100 <= bytes_max * high:
        assert free == 0
    else:
        assert (used + needed - free) * 100 <= bytes_max * low or free == used + needed


def test_heat_is_a_rate() -> None:
    heat = 0.0
    for _ in range(20 * 24):  # one request an hour, for twenty days
        heat = cooled(heat, 3600.0) + 1
    assert 0.9 < requests_per_hour(heat) < 1.1
    assert cooled(heat, HALF_LIFE_S) == heat / 2
    assert cooled(heat, -5.0) == heat


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(-1e8, 1e8), st.booleans()), max_size=30))
def test_store_time_never_runs_back_and_gains_at_most_an_hour_a_restart(steps: list[tuple[float, float, bool]]) -> None:
    wall_s, monotonic_s = 1.7e9, 0.0
    clock = PinClock.begin(None, wall_s=wall_s, monotonic_s=monotonic_s)
    for passed_s, jump_s, restart in steps:
        before_s = clock.now_s(monotonic_s)
        saved = (before_s, wall_s)
        wall_s, monotonic_s = wall_s + passed_s + jump_s, monotonic_s + passed_s
        if restart:
            monotonic_s = 0.0
            clock = PinClock.begin(saved, wall_s=wall_s, monotonic_s=monotonic_s)
            assert before_s <= clock.now_s(monotonic_s) <= before_s + JUMP_MAX_S
        else:
            assert abs(clock.now_s(monotonic_s) - before_s - passed_s) < 1e-3


def test_a_pin_lasts_as_long_as_was_said() -> None:
    clock = PinClock.begin(None, wall_s=1e9, monotonic_s=50.0)
    ends_s = clock.of_wall_s(1e9 + 100, wall_s=1e9, monotonic_s=50.0)
    assert clock.now_s(149.0) < ends_s
    assert clock.now_s(150.0) >= ends_s
