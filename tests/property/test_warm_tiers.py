"""What is kept in memory and staged ahead: budgets hold, the most valuable stay, sets do not flap."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fal_contract.limits import STAGE_AHEAD_BYTES_PER_HOUR, STAGE_AHEAD_DISK_PERC, STAGE_AHEAD_KEPT_S, WARM_PER_NODE_MAX
from fal_scheduler.core.warm_tiers import Ahead, Keepable, chosen, room_for

GIB = 1 << 30
keepables = st.builds(
    Keepable,
    artifact=st.text("abcdefgh", min_size=1, max_size=3),
    size_bytes=st.integers(1, 40 * GIB),
    worth=st.integers(0, 10**12),
)
lists = st.lists(keepables, max_size=10, unique_by=lambda x: x.artifact)
budgets = st.integers(0, 100 * GIB)


def total(found: list[Keepable], names: tuple[str, ...]) -> tuple[int, int]:
    """Bytes and worth of these."""
    kept = [one for one in found if one.artifact in names]
    assert len(kept) == len(names)
    return sum(one.size_bytes for one in kept), sum(one.worth for one in kept)


@settings(max_examples=50)
@given(lists, budgets, st.sets(st.text("abcdefgh", min_size=1, max_size=3)), st.booleans())
def test_the_budget_holds_and_what_is_worth_nothing_is_not_kept(
    found: list[Keepable], budget: int, before: set[str], hold: bool
) -> None:
    names = chosen(found, budget, dict.fromkeys(sorted(before)), hold=hold)
    size, _ = total(found, names)
    assert size <= budget
    assert len(set(names)) == len(names) <= WARM_PER_NODE_MAX
    worthless = {one.artifact for one in found if not one.worth}
    assert not worthless & set(names) - (before if hold else set())


@settings(max_examples=50)
@given(lists, budgets)
def test_at_least_half_of_the_best_is_kept_and_all_where_all_fit(found: list[Keepable], budget: int) -> None:
    _, worth = total(found, chosen(found, budget, {}))
    # What may be taken in parts is worth at least as much as the best whole choice.
    left, bound = budget, 0.0
    for one in sorted(found, key=lambda one: -one.worth / one.size_bytes):
        if one.size_bytes > budget:
            continue
        part = min(1.0, left / one.size_bytes)
        left -= round(part * one.size_bytes)
        bound += part * one.worth
    assert 2 * worth >= bound * 0.999
    if sum(one.size_bytes for one in found) <= budget:
        assert worth == sum(one.worth for one in found)


@settings(max_examples=50)
@given(lists, budgets, st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(found: list[Keepable], budget: int, rng: object) -> None:
    shuffled = list(found)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen(shuffled, budget, {}) == chosen(found, budget, {})


@settings(max_examples=50)
@given(lists, budgets, st.lists(st.integers(960, 1040), min_size=10, max_size=10))
def test_small_changes_of_rates_take_nothing_away(found: list[Keepable], budget: int, milli: list[int]) -> None:
    before = chosen(found, budget, {})
    assert set(chosen(found, budget, dict.fromkeys(before))) >= set(before)
    # Greedy is within half of the best, so that even the same worths may show another set: what is there must stand
    # as long as no other set that is found is worth a fifth more.
    moved = [replace(one, worth=one.worth * by // 1000) for one, by in zip(found, milli, strict=False)]
    after = chosen(moved, budget, dict.fromkeys(before))
    if not set(after) >= {one.artifact for one in moved if one.artifact in before and one.worth}:
        assert total(moved, after)[1] * 100 > total(moved, before)[1] * 120


@settings(max_examples=50)
@given(lists, budgets, st.sets(st.text("abcdefgh", min_size=1, max_size=3)))
def test_sets_settle_where_rates_stand_still(found: list[Keepable], budget: int, before: set[str]) -> None:
    kept = dict.fromkeys(sorted(before))
    seen: list[int] = []
    for _ in range(40):  # each change is worth a fifth more, so there is an end to them
        names = chosen(found, budget, kept)
        seen.append(total(found, names)[1])
        if set(names) == set(kept):
            break
        kept = dict.fromkeys(names)
    assert set(names) == set(kept)
    assert seen == sorted(seen)


@settings(max_examples=50)
@given(lists, st.sets(st.text("abcdefgh", min_size=1, max_size=3)), budgets)
def test_in_the_grace_nothing_that_fits_is_taken_away(found: list[Keepable], before: set[str], budget: int) -> None:
    there = {one.artifact: None for one in found if one.artifact in before}
    size = sum(one.size_bytes for one in found if one.artifact in there)
    names = chosen(found, max(size, budget), there, hold=True)
    assert set(there) <= set(names)


def test_a_fifth_more_replaces_what_is_there_and_less_does_not() -> None:
    old = Keepable("old", 10 * GIB, 1000)
    assert chosen([old, Keepable("new", 10 * GIB, 1190)], 10 * GIB, {"old": None}) == ("old",)
    assert chosen([old, Keepable("new", 10 * GIB, 1201)], 10 * GIB, {"old": None}) == ("new",)
    assert chosen([old, Keepable("new", 10 * GIB, 9000)], 10 * GIB, {"old": None}, hold=True) == ("old",)
    assert chosen([replace(old, worth=0)], 10 * GIB, {"old": None}) == ()


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 2000), st.sampled_from("abcdefgh"), st.integers(1, 30 * GIB)), max_size=60),
    st.integers(0, 200 * GIB),
)
def test_what_is_staged_ahead_stays_within_bytes_an_hour_and_the_share_of_the_disk(
    steps: list[tuple[float, str, int]], disk_bytes: int
) -> None:
    ahead, now_s = Ahead(), 0.0
    sizes: dict[str, int] = {}
    granted: list[tuple[float, int]] = []
    for pause_s, artifact, size in steps:
        now_s += pause_s
        ahead.expire(now_s)
        new = artifact not in ahead.until_s
        size = sizes.setdefault(artifact, size)
        if ahead.want(artifact, size, now_s, disk_bytes) and new:
            granted.append((now_s, size))
        assert sum(ahead.sizes.values()) <= disk_bytes * STAGE_AHEAD_DISK_PERC // 100
        assert ahead.sizes.keys() == ahead.until_s.keys()
        assert all(now_s < end_s <= now_s + STAGE_AHEAD_KEPT_S for end_s in ahead.until_s.values())
        assert sum(s for at_s, s in granted if at_s > now_s - 3600) <= STAGE_AHEAD_BYTES_PER_HOUR
    ahead.expire(now_s + STAGE_AHEAD_KEPT_S)
    assert not ahead.until_s
    assert not ahead.sizes


@settings(max_examples=50)
@given(
    st.integers(1, 100),
    st.integers(0, 100),
    st.integers(0, 100),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 100))),
)
def test_what_is_staged_ahead_displaces_only_what_is_asked_for_half_as_often(
    size: int, rate: int, free: int, others: list[tuple[int, int]]
) -> None:
    less = [one for one in others if 2 * one[1] <= rate]
    assert room_for(size, rate, free, others) == (size <= free + sum(bytes_ for bytes_, _ in less))
    assert room_for(size, rate, free, less) == room_for(size, rate, free, others)
