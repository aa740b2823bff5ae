"""What placements teach: lines, ratios, what is believed of few points, how it is saved and comes back."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_world import CountingIds
from fal_scheduler.codec import decode, encode
from fal_scheduler.core import learning as learning_module
from fal_scheduler.core.events import Moment
from fal_scheduler.core.learning import AGE_MAX_S, DEFAULTS, MILLI, RATIOS_MAX, Learning, default_line, shrunk
from fal_scheduler.core.learnt_record import Learnt
from fal_scheduler.core.learnt_shards import KEYS_AT_ONCE_MAX, NODES_PER_KEY, SAVE_EVERY_S, SHARDS, load, save, shard_of
from fal_scheduler.core.records import Change, Meta, Node, key_of
from fal_scheduler.core.robust_line import PPM, SLOPE_PPM_MAX, RobustLine, fit
from fal_scheduler.core.state import State
from fal_scheduler.core.work import Work

NODE = ("pool/p", "node/n1")


def test_a_line_is_found_through_points_of_which_some_are_far_off() -> None:
    points = [(x, 250 + 3 * x) for x in range(1000, 21_000, 1000)]
    assert fit(points, RobustLine(0)) == RobustLine(250, 3 * PPM)
    for at in (1, 6, 11, 16):  # a fifth of them
        points[at] = (points[at][0], 900_000)
    found = fit(points, RobustLine(0))
    assert found.at(10_000) == pytest.approx(30_250, rel=0.05)


def test_points_at_one_x_scale_the_line_that_was_assumed() -> None:
    assert fit([(1000, 500), (1010, 510), (990, 40_000)], RobustLine(100, PPM)) == RobustLine(46, 463_636)
    assert fit([(5, 70)], RobustLine(0)) == RobustLine(70)
    assert fit([], RobustLine(7, 8)) == RobustLine(7, 8)


@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 2**40)), max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_line_is_never_negative_and_fits_columns(points: list[tuple[int, int]]) -> None:
    found = fit(points, RobustLine(200, PPM))
    assert found.base >= 0
    assert 0 <= found.slope_ppm <= SLOPE_PPM_MAX


def test_few_points_are_believed_in_part() -> None:
    assert [shrunk((2000,) * n) for n in (1, 2, 3, 8)] == [1500, 1800, 1900, 1984]
    assert shrunk((2000, 2000, 2000, 20_000, 2000)) == shrunk((2000,) * 5)


def test_what_is_learnt_of_one_node_is_first_believed_of_all_and_then_of_it() -> None:
    known = Learning()
    assert known.at("start/oci", 0, NODE) == default_line("start/oci").base
    known.learn("start/oci", 0, 800, NODE, wall_s=1)
    assert known.at("start/oci", 0, ("pool/q", "node/other")) == 800
    for n in range(20):
        known.learn("start/oci", 0, 400, ("pool/p", "node/n2"), wall_s=n)
        known.learn("start/oci", 0, 1600, ("pool/p", "node/slow"), wall_s=n)
    assert known.at("start/oci", 0, ("pool/p", "node/n2")) == pytest.approx(400, rel=0.05)
    assert known.at("start/oci", 0, ("pool/p", "node/slow")) == pytest.approx(1600, rel=0.05)
    assert 400 <= known.at("start/oci", 0, ("pool/p", "node/new")) < 1600


@pytest.mark.parametrize("seed", range(3))
def test_learning_converges_within_ten_placements_and_resists_outliers(seed: int) -> None:
    """Two apps on six nodes, one slow node, 10 % noise, every twelfth start five times as long."""
    rng = Random(seed)
    factor = {f"n{at}": 1.0 + 0.1 * at for at in range(5)} | {"n5": 3.0}
    known = Learning()
    errors: list[float] = []
    for n in range(120):
        node, app = f"n{rng.randrange(6)}", rng.choice("ab")
        kib = rng.choice((1 << 15, 1 << 17, 1 << 20))
        truth = (400 + kib / 500) * factor[node] * {"a": 1.0, "b": 2.0}[app]
        subjects = (f"app/{app}", "pool/p", f"node/{node}")
        if n >= 60:
            errors.append(abs(known.at("setup/disk/", kib, subjects) - truth) / truth)
        seen = truth * rng.uniform(0.95, 1.05) * (5.0 if n % 12 == 11 else 1.0)
        known.learn("setup/disk/", kib, round(seen), subjects, wall_s=n)
    assert sorted(errors)[len(errors) // 2] < 0.08
    assert sorted(errors)[len(errors) * 9 // 10] < 0.25


def test_what_is_old_is_forgotten_and_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Learning()
    known.learn("rest", 0, 5000, ("node/n1",), wall_s=0)
    known.learn("rest", 0, 100, ("node/n2",), wall_s=AGE_MAX_S + 1)
    assert known.line("rest").at(0) == 100
    monkeypatch.setattr(learning_module, "SUBJECTS_MAX", 3)
    monkeypatch.setattr(learning_module, "FAMILIES_MAX", 2)
    for n in range(9):
        known.learn(f"make/{n}", 0, 100, (f"node/n{n}", f"node/m{n}"), wall_s=AGE_MAX_S)
    assert list(known.families) == ["make/7", "make/8"]
    assert known.subjects == sum(len(one.ratios or {}) for one in known.families.values()) <= 4
    for _ in range(20):
        known.learn("make/8", 0, 100, ("node/n8",), wall_s=AGE_MAX_S)
    assert len((known.families["make/8"].ratios or {})["node/n8"]) == RATIOS_MAX


def taught(nodes: int, seed: int = 0) -> State:
    """A cluster with so many nodes, each of which has taught something."""
    state, rng = State(), Random(seed)
    state.apply(Change("meta", None, Meta("c1", 1, "i", 0.0)))
    for at in range(nodes):
        node = Node(f"n{at:04d}", f"node{at}", "p")
        state.apply(Change(key_of(node), None, node))
        for part in ("rest", "make/oci", "weights/peer"):
            y = rng.randrange(10, 10_000)
            state.learning.learn(
                part, rng.randrange(10**4), y, ("pool/p", f"node/{node.id}"), wall_s=1_700_000_000 + at
            )
    return state


def saved(state: State, now_s: float) -> list[Learnt]:
    """What one tick writes."""
    work = Work(state, Moment(now_s, 1_700_000_000.0 + now_s), CountingIds())
    save(work)
    return [change.after for change in work.changes if isinstance(change.after, Learnt)]


def test_the_next_leader_knows_what_was_learnt_and_numbers_come_back_as_they_were() -> None:
    state = taught(30)
    records = [record for at in range(40) for record in saved(state, 1000.0 + at * SAVE_EVERY_S)]
    assert not state.learning.unsaved
    again = Learning()
    stored = {key_of(one): encode(one) for one in records}
    load(again, [one for key, value in stored.items() if isinstance(one := decode(key, value), Learnt)])
    assert (again.subjects, again.unsaved) == (state.learning.subjects, {})
    for family, have in state.learning.families.items():
        assert again.families[family].points == have.points
        assert again.families[family].ratios == have.ratios
        for node in ("n0000", "n0029", "new"):
            subjects = ("pool/p", f"node/{node}")
            assert again.at(family, 777, subjects) == state.learning.at(family, 777, subjects)


def test_saving_is_rare_and_costs_no_more_than_a_fiftieth_write_a_node_and_minute() -> None:
    state = taught(200)
    assert len(saved(state, SAVE_EVERY_S)) == 200 // NODES_PER_KEY
    assert saved(state, 2 * SAVE_EVERY_S - 1.0) == []
    assert len(saved(state, 2 * SAVE_EVERY_S)) * 60 / SAVE_EVERY_S / 200 <= 0.02
    while saved(state, state.learning.saved_at_s + SAVE_EVERY_S):
        pass
    assert saved(state, 10**6) == [], "nothing learnt, nothing written"
    state.learning.learn("rest", 0, 5, ("node/n0007",), wall_s=1)
    shards = {one.shard for one in saved(state, 2 * 10**6)}
    assert shards == {shard_of("rest"), shard_of("rest|node/n0007")}
    assert len(saved(taught(3), SAVE_EVERY_S)) == 1
    assert len(saved(taught(900), SAVE_EVERY_S)) <= KEYS_AT_ONCE_MAX


def test_a_nodes_entries_share_one_key() -> None:
    assert len({shard_of(f"{family}|node/n1") for family in DEFAULTS}) == 1
    assert len({shard_of(f"rest|node/n{at}") for at in range(2000)}) == SHARDS


def test_entries_of_a_later_release_are_left_out() -> None:
    known = Learning()
    load(known, [Learnt("01", 0.0, (("later/x", (1, 2, 3)), ("later/x|node/n1", (5, 900)), ("rest", (0, 90, 5))))])
    assert (known.at("rest", 0, NODE), list(known.families)) == (90, ["rest"])
    assert known.ratio_milli("later/x", "node/n1") == MILLI
