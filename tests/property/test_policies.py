"""Every placement policy on random fleets: what fits is placed, the same way each time, within what is free, and what
is kept between decisions equals what is computed anew. FGD against its definition, task by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_scheduler.core.fragmentation import NEVER, PPM, WHOLE, Demand, Fragmentation, Shares
from fal_scheduler.core.gap_value import knapsack, prices, waste_table
from fal_scheduler.core.policies import Choice, Falctl, Fgd
from fal_scheduler.core.typical import TypicalTasks
from fal_scheduler.sim.placing import POLICIES, Player

GPUS_MAX = 4
Row = tuple[int, int, list[int], int]  # CPU, memory, shares, kind

rows = st.tuples(
    st.integers(0, 40).map(lambda n: n * 1000),
    st.integers(0, 16).map(lambda n: n * 1024),
    st.lists(st.sampled_from([0, 60, 190, 300, 350, 530, 810, 1000, 1000]), max_size=GPUS_MAX),
    st.integers(0, 2),
)
fleets = st.lists(rows, min_size=1, max_size=8)


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    """CPU only, a fraction, or some whole GPUs (rarely: parts of several)."""
    cpu, memory = draw(st.integers(0, 16)) * 1000, draw(st.sampled_from([0, 0, 512, 4096]))
    kinds = tuple(sorted(draw(st.sets(st.integers(0, 2), max_size=2)))) if draw(st.booleans()) else ()
    count = draw(st.sampled_from([0, 1, 1, 1, 1, 2, 4]))
    share = draw(st.sampled_from([50, 160, 320, 470, 650, 810, WHOLE, WHOLE])) if count else 0
    return Demand(cpu, share, count, kinds, memory)


tasks = st.lists(demands(), min_size=1, max_size=12)


def shares_of(fleet: Sequence[Row]) -> Shares:
    shares = Shares(len(fleet), GPUS_MAX)
    for row, (cpu, memory, gpus, kind) in enumerate(fleet):
        shares.set_row(row, cpu_free=cpu, memory_free=memory, gpu_free=gpus, kind=kind)
    return shares


def fits(shares: Shares, row: int, demand: Demand) -> bool:
    return (
        shares.cpu_free[row] >= demand.cpu_milli
        and shares.memory_free[row] >= demand.memory_mib
        and (not demand.kinds or int(shares.kind[row]) in demand.kinds)
        and sum(share >= demand.gpu_milli for share in shares.gpu_free[row].tolist() if share >= 0) >= demand.num_gpus
    )


def player(name: str, shares: Shares, seen: Sequence[Demand]) -> Player:
    return POLICIES[name](shares, TypicalTasks(seen), 1)


def play(name: str, fleet: Sequence[Row], seen: Sequence[Demand], todo: Sequence[Demand]) -> list[Choice | None]:
    """Choose and hold, one task after the other; every choice must be one that fits, and there must be one."""
    shares = shares_of(fleet)
    one = player(name, shares, seen)
    choices: list[Choice | None] = []
    for demand in todo:
        choice = one.policy.choose(shares, demand)
        choices.append(choice)
        if choice is None:
            assert not any(fits(shares, row, demand) for row in range(len(shares))), "a feasible task was refused"
            continue
        assert fits(shares, choice.row, demand)
        assert list(choice.gpus) == sorted(choice.gpus)
        shares.take(choice.row, demand, choice.gpus)  # raises where something is not free
        assert shares.gpu_free.max() <= WHOLE
        if one.follow is not None:
            one.follow(choice.row, demand, 1)
    return choices


@pytest.mark.parametrize("name", POLICIES)
@given(fleet=fleets, seen=tasks, todo=tasks)
@settings(max_examples=8)
def test_what_fits_is_placed_within_what_is_free_and_the_same_each_time(
    name: str, fleet: list[Row], seen: list[Demand], todo: list[Demand]
) -> None:
    assert play(name, fleet, seen, todo) == play(name, fleet, seen, todo)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("random", "gpu-clustering")])
@given(fleet=fleets, seen=tasks, todo=tasks, after=demands())
@settings(max_examples=8)
def test_what_is_kept_between_decisions_equals_what_is_computed_anew(
    name: str, fleet: list[Row], seen: list[Demand], todo: list[Demand], after: Demand
) -> None:
    shares = shares_of(fleet)
    kept = player(name, shares, seen)
    held: list[tuple[Choice, Demand]] = []
    for number, demand in enumerate([*todo, *todo, after]):
        choice = kept.policy.choose(shares, demand)
        assert choice == player(name, shares, seen).policy.choose(shares, demand)
        if choice is not None:
            shares.take(choice.row, demand, choice.gpus)
            held.append((choice, demand))
        if number % 3 == 2 and held:
            gone, was = held.pop(0)
            shares.give(gone.row, was, gone.gpus)


@pytest.mark.parametrize("name", ["falctl", "fgd"])
@given(fleet=fleets, seen=tasks, todo=tasks, chance=st.randoms(use_true_random=False))
@settings(max_examples=8)
def test_the_order_of_rows_decides_only_between_equal_scores(
    name: str, fleet: list[Row], seen: list[Demand], todo: list[Demand], chance: object
) -> None:
    """Nodes in another order: the chosen node has the same free amounts up to a tie in score."""
    order = list(range(len(fleet)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    shares, turned = shares_of(fleet), shares_of([fleet[place] for place in order])
    one, other = player(name, shares, seen), player(name, turned, seen)
    for demand in todo:
        first, second = one.policy.choose(shares, demand), other.policy.choose(turned, demand)
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert score(name, shares, seen, demand, first.row) == score(name, turned, seen, demand, second.row)


def score(name: str, shares: Shares, seen: Sequence[Demand], demand: Demand, row: int) -> int:
    policy = player(name, shares, seen).policy
    assert isinstance(policy, Falctl | Fgd)
    scores, _ = policy.evaluate(demand, np.array([row], np.intp))
    return int(scores[0])


def stranded(cpu: int, shares: Sequence[int], kind: int, typical: Sequence[tuple[Demand, int]]) -> int:
    """F by its definition, in ppm of a milli-GPU."""
    total = 0
    for task, weight in typical:
        good = [share for share in shares if share >= task.gpu_milli]
        lost = not task.num_gpus or (task.kinds and kind not in task.kinds)
        lost = lost or cpu < task.cpu_milli or len(good) < task.num_gpus
        total += weight * (sum(shares) if lost else sum(shares) - sum(good))
    return total


def published(cpu: int, shares: list[int], kind: int, demand: Demand, typical: Sequence[tuple[Demand, int]]) -> int:
    """The best score of any way to place `demand` on a node where it fits, by its definition."""
    before = stranded(cpu, shares, kind, typical)
    good = [place for place, share in enumerate(shares) if share >= demand.gpu_milli]
    fraction = demand.num_gpus == 1 and demand.gpu_milli < WHOLE
    ways = [[place] for place in good] if fraction else [good[: demand.num_gpus]]
    best = NEVER
    for way in ways:
        left = [share - demand.gpu_milli * (place in way) for place, share in enumerate(shares)]
        gain = before - stranded(cpu - demand.cpu_milli, left, kind, typical)
        best = max(best, int(100 / (1 + math.exp(-float(Fraction(gain, WHOLE * PPM))))))
    return best


@given(fleet=fleets, seen=tasks, todo=tasks)
@settings(max_examples=40)
def test_fgd_scores_by_look_up_equal_its_definition(fleet: list[Row], seen: list[Demand], todo: list[Demand]) -> None:
    typical = TypicalTasks(seen).typical()
    shares = shares_of(fleet)
    fragmentation = Fragmentation(shares, typical)
    every = np.arange(len(fleet))
    assert fragmentation.stranded(every).tolist() == [
        stranded(cpu, gpus, kind, typical) for cpu, _, gpus, kind in fleet
    ]
    for demand in todo:
        scores, gpus = fragmentation.score(demand, every)
        for row, (cpu, _, free, kind) in enumerate(fleet):
            if not fits(shares, row, demand):
                assert scores[row] == NEVER
                continue
            assert scores[row] == published(cpu, free, kind, demand, typical)
            assert (gpus[row] >= 0) == (demand.num_gpus == 1 and demand.gpu_milli < WHOLE)


@given(fleet=fleets, seen=tasks, todo=tasks)
@settings(max_examples=40)
def test_fgd_scores_of_rows_one_by_one_equal_those_of_columns(
    fleet: list[Row], seen: list[Demand], todo: list[Demand]
) -> None:
    """Scores, their types and the GPU of a fraction: which way is taken must change no decision."""
    typical = TypicalTasks(seen).typical()
    shares, every = shares_of(fleet), np.arange(len(fleet))
    columns = Fragmentation(shares, typical, few_rows=0)
    single = Fragmentation(shares, typical, few_rows=len(fleet))
    for demand in todo:
        (scores, gpus), (scores_single, gpus_single) = columns.score(demand, every), single.score(demand, every)
        assert scores.tolist() == scores_single.tolist()
        assert gpus.tolist() == gpus_single.tolist()
        assert (scores.dtype, gpus.dtype) == (scores_single.dtype, gpus_single.dtype)


@given(weights=st.dictionaries(st.integers(1, 100), st.integers(1, 500), min_size=1, max_size=10))
@settings(max_examples=20)
def test_prices_are_a_bound_on_the_gpus_that_tasks_need(weights: dict[int, int]) -> None:
    """Feasible duals: no GPU's worth of tasks costs more than one GPU; so the priced volume never exceeds the need of
    first fit, and it is at least the volume."""
    price = prices(weights)
    sizes = sorted(weights)
    assert knapsack(sizes, [price[size] / PPM for size in sizes])[100] <= 1.0001
    worth = sum(price[size] * count for size, count in weights.items()) / PPM
    bins: list[int] = []
    for size, count in sorted(weights.items(), reverse=True):
        for _ in range(count):
            place = next((place for place, used in enumerate(bins) if used + size <= 100), len(bins))
            if place == len(bins):
                bins.append(0)
            bins[place] += size
    volume = sum(size * count for size, count in weights.items()) / 100
    assert volume - 0.01 * len(bins) <= worth <= len(bins) + 0.01


def test_waste_of_a_share_is_what_no_coming_task_can_use() -> None:
    typical = [(Demand(4000, 470, 1), 600_000), (Demand(1000, 810, 1), 400_000)]
    cpus, table = waste_table(typical)
    assert cpus.tolist() == [1000, 4000]
    # With CPU for both: 530 takes one of 470 (half a GPU each: two fill one), 190 takes nothing.
    assert table[2, 530] == 30 * PPM
    assert table[2, 190] == 190 * PPM
    assert table[2, 60] == 60 * PPM
    # Without the CPU of the smaller task its space is lost too.
    assert table[1, 530] == 530 * PPM
    assert table[:, WHOLE].tolist() == [0, 0, 0]


def test_typical_tasks_are_the_most_frequent_that_cover_most() -> None:
    a, b, c = Demand(1000, 500, 1), Demand(2000, WHOLE, 1), Demand(3000, WHOLE, 8)
    seen = TypicalTasks([*[a] * 6, *[b._replace(memory_mib=5)] * 3, *[b] * 10, c])
    assert seen.typical() == [(b, 684_210), (a, 315_789)]
    assert [demand for demand, _ in seen.typical(PPM)] == [b, a, c]


def test_shares_refuse_what_is_not_free() -> None:
    shares = shares_of([(4000, 1024, [300, WHOLE], 0)])
    half = Demand(1000, 500, 1, (), 512)
    with pytest.raises(ValueError, match="has not"):
        shares.take(0, half, (0,))
    with pytest.raises(ValueError, match="has not"):
        shares.take(0, half._replace(num_gpus=2), (1, 1))
    shares.take(0, half, (1,))
    assert shares.gpu_free[0].tolist() == [300, 500, -1, -1]
    shares.give(0, half, (1,))
    with pytest.raises(ValueError, match="never gave"):
        shares.give(0, half, (1,))
    assert shares.gpu_free[0].tolist() == [300, WHOLE, -1, -1]
    assert (shares.cpu_free[0], shares.memory_free[0], shares.gpu_total[0]) == (4000, 1024, 1300)
