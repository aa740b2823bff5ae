"""How much free GPU a placement would strand: the fragmentation gradient of "Beware of Fragmentation" (ATC'23), exact.

Pure. `Shares` are the free amounts of a fleet as columns; `Fragmentation` scores what one more task would do to each
node. Of a node with free CPU c and free shares g_i of its GPUs (thousandths), a typical task m of weight p_m cannot
use

    F(m) = sum of g_i                        when it asks for no GPU, its kinds are others, c < cpu_m, or fewer than
                                             num_m GPUs have g_i >= milli_m
    F(m) = sum of those g_i below milli_m    otherwise

F = sum of p_m F(m), and the score of a placement is int(100 sigmoid((F before - F after) / 1000)), higher is better.
The truncation to 101 steps is part of the method: without it, it packs worse.

All is integer: weights in ppm, F in ppm of a milli-GPU. What a GPU with share g contributes to what is usable is the
weight of the tasks that fit the node and need at most g; it depends on c only by which tasks' CPU it covers, and on
each g only by which tasks' shares it covers. So F is a sum of looked-up numbers, and a node costs one look-up a GPU.

Many rows are scored as columns. Since a decision changes one row, mostly one or two are to be scored again: for so few
numpy's fixed cost of some fifty calls is most of the time, and each row is computed by itself, with the same result.

Called by `policies` and by placement as its last criterion. Must not choose nodes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Milli = NDArray[np.int16]
Bools = NDArray[np.bool_]

WHOLE: Final = 1000  # thousandths of a GPU
PPM: Final = 1_000_000
NEVER: Final = -1  # the score of a row that does not fit
_PERCENT: Final = 100
FEW_ROWS: Final = 8  # up to so many are scored one by one; measured: there both ways take as long


class Demand(NamedTuple):
    """What a task asks of one node."""

    cpu_milli: int
    gpu_milli: int  # 1..1000 of each GPU; 1000 is the whole GPU
    num_gpus: int
    kinds: tuple[int, ...] = ()  # kinds of GPU that will do; empty: any
    memory_mib: int = 0


class Shares:
    """Free amounts, one row a node; `stamp` says when a row last changed, so that caches know what they must look at.

    `set_row` is for those who know what is free (placement), `take` and `give` for those who count it themselves
    (simulations); neither lets a share go below 0 or above the whole.
    """

    def __init__(self, rows: int, gpus_max: int) -> None:
        self.cpu_free: Ints = np.zeros(rows, np.int64)  # milli
        self.memory_free: Ints = np.zeros(rows, np.int64)  # MiB
        self.gpu_free: Milli = np.full((rows, gpus_max), -1, np.int16)  # milli; -1: no such GPU
        self.kind: Milli = np.zeros(rows, np.int16)  # of its GPUs
        self.gpu_total: Ints = np.zeros(rows, np.int64)  # sum of its free shares
        self.stamp: Ints = np.zeros(rows, np.int64)
        self.clock = 0  # counts changes

    def __len__(self) -> int:
        return len(self.cpu_free)

    def set_row(self, row: int, *, cpu_free: int, memory_free: int, gpu_free: Sequence[int], kind: int) -> None:
        """Say what is free on a row. `gpu_free` may be shorter than `gpus_max`: there are no others."""
        given = list(gpu_free)
        if any(not -1 <= share <= WHOLE for share in given):
            raise ValueError(f"shares of row {row} must be -1..{WHOLE}: {given}")
        width = self.gpu_free.shape[1]
        self.gpu_free[row] = given + [-1] * (width - len(given))
        self.cpu_free[row] = cpu_free
        self.memory_free[row] = memory_free
        self.kind[row] = kind
        self.touch(row)

    def take(self, row: int, demand: Demand, gpus: Sequence[int]) -> None:
        """Hold what `demand` asks for on these GPUs. Raises ValueError where it is not free; nothing changes then."""
        free = self.gpu_free[row]
        if len(set(gpus)) != demand.num_gpus or any(free[gpu] < demand.gpu_milli for gpu in gpus):
            raise ValueError(f"row {row} has not {demand} free on GPUs {tuple(gpus)}")
        if self.cpu_free[row] < demand.cpu_milli or self.memory_free[row] < demand.memory_mib:
            raise ValueError(f"row {row} has not the CPU or memory of {demand}")
        for gpu in gpus:
            free[gpu] -= demand.gpu_milli
        self.cpu_free[row] -= demand.cpu_milli
        self.memory_free[row] -= demand.memory_mib
        self.touch(row)

    def give(self, row: int, demand: Demand, gpus: Sequence[int]) -> None:
        """Give back what `take` held. Raises ValueError when a GPU would have more than itself."""
        free = self.gpu_free[row]
        if any(not 0 <= free[gpu] <= WHOLE - demand.gpu_milli for gpu in gpus):
            raise ValueError(f"row {row} never gave {demand} on GPUs {tuple(gpus)}")
        for gpu in gpus:
            free[gpu] += demand.gpu_milli
        self.cpu_free[row] += demand.cpu_milli
        self.memory_free[row] += demand.memory_mib
        self.touch(row)

    def touch(self, row: int) -> None:
        """Mark a row as changed."""
        self.clock += 1
        self.stamp[row] = self.clock
        self.gpu_total[row] = sum(share for share in self.gpu_free[row].tolist() if share > 0)


def rows_that_fit(shares: Shares, demand: Demand, rows: NDArray[np.intp]) -> Bools:
    """Of these rows, those with the CPU, GPUs and kind that `demand` asks for. Memory is left to the caller."""
    return those_that_fit(shares, demand, rows, shares.gpu_free.take(rows, axis=0), shares.cpu_free.take(rows))


def those_that_fit(shares: Shares, demand: Demand, rows: NDArray[np.intp], free: Milli, cpu: Ints) -> Bools:
    """`rows_that_fit` of rows whose free shares and CPU are at hand."""
    fits: Bools = cpu >= demand.cpu_milli
    if demand.num_gpus:
        enough = free >= demand.gpu_milli
        fits &= enough.any(axis=1) if demand.num_gpus == 1 else enough.sum(axis=1) >= demand.num_gpus
    if demand.kinds:
        fits &= np.isin(shares.kind.take(rows), demand.kinds)
    return fits


def first_gpus(shares: Shares, row: int, demand: Demand) -> tuple[int, ...]:
    """The GPUs of lowest index that have the share; the row fits."""
    good = np.flatnonzero(shares.gpu_free[row] >= demand.gpu_milli)
    return tuple(int(gpu) for gpu in good[: demand.num_gpus])


def is_fraction(demand: Demand) -> bool:
    """Whether the choice of the GPU matters: a part of one GPU."""
    return demand.num_gpus == 1 and demand.gpu_milli < WHOLE


def ways_to_place(demand: Demand, free: NDArray[np.intp]) -> tuple[NDArray[np.intp], Bools]:
    """What each way to place `demand` would leave of these shares [row, GPU]: [row, way, GPU], and which ways exist.

    A fraction has one way for each GPU, everything else one: the GPUs of lowest index that have the share. Rows fit.
    """
    if not is_fraction(demand):
        enough = free >= max(demand.gpu_milli, 1)
        chosen = enough & (np.cumsum(enough, axis=1) <= demand.num_gpus)
        return (free - chosen * demand.gpu_milli)[:, None, :], np.ones((len(free), 1), np.bool_)
    width = free.shape[1]
    left = np.repeat(free[:, None, :], width, axis=1)
    every = np.arange(width)
    left[:, every, every] -= demand.gpu_milli
    return np.maximum(left, 0), free >= demand.gpu_milli


_NO_GPU: Final = np.full(1, -1, np.int16)

# _STEPS[k] is the least (F before - F after), in ppm of a milli-GPU, whose score is k + 1.
_STEPS: Final = np.array(
    [math.ceil(math.log(k / (_PERCENT - k)) * WHOLE * PPM) for k in range(1, _PERCENT)], dtype=np.int64
)
_STEPS_OF_ONE: Final[list[int]] = _STEPS.tolist()


class Fragmentation:
    """FGD scores of a fleet against typical tasks: (demand, weight in ppm), at most a few hundred."""

    def __init__(self, shares: Shares, typical: Sequence[tuple[Demand, int]], *, few_rows: int = FEW_ROWS) -> None:
        self._shares = shares
        self._few_rows = few_rows
        self._weight = sum(weight for _, weight in typical)
        tasks = [(task, weight) for task, weight in typical if task.num_gpus]
        self._cpus = np.array(sorted({task.cpu_milli for task, _ in tasks}), np.int64)
        self._millis = np.array(sorted({task.gpu_milli for task, _ in tasks}), np.int64)
        # How many of the distinct shares a share of 0..1000 covers.
        self._rank = np.searchsorted(self._millis, np.arange(WHOLE + 1), "right").astype(np.intp)
        masks = sorted({task.kinds for task, _ in tasks if task.kinds})
        named = sorted({kind for mask in masks for kind in mask})
        # Kinds that no typical task names are alike: class 0.
        self._kind_class = {kind: place for place, kind in enumerate(named, start=1)}
        counts = sorted({task.num_gpus for task, _ in tasks})
        self._tables = [(count, self._table(count, named, tasks)) for count in counts]
        self._single = counts == [1]
        # The same for single rows; views, because tables can be large.
        self._views = [(count, table.data) for count, table in self._tables]
        self._cpu_list: list[int] = self._cpus.tolist()
        self._rank_list: list[int] = self._rank.tolist()

    def _table(self, count: int, named: list[int], tasks: list[tuple[Demand, int]]) -> Ints:
        """Usable weight by (class of kind, CPUs covered, rank of the count-th largest share, rank of a share)."""
        ranks = len(self._millis) + 1
        table = np.zeros((len(named) + 1, len(self._cpus) + 1, ranks, ranks), np.int64)
        for task, weight in tasks:
            if task.num_gpus != count:
                continue
            cpu = int(np.searchsorted(self._cpus, task.cpu_milli)) + 1
            rank = int(np.searchsorted(self._millis, task.gpu_milli)) + 1
            places = [place for place, kind in enumerate([None, *named]) if not task.kinds or kind in task.kinds]
            for place in places:
                table[place, cpu:, rank:, rank:] += weight
        return table.ravel()

    def changed(self, row: int) -> None:
        """For whoever writes the columns past `Shares.set_row`."""
        self._shares.touch(row)

    def stranded(self, rows: NDArray[np.intp]) -> Ints:
        """F of rows as they are, in ppm of a milli-GPU."""
        rows = np.asarray(rows, np.intp)
        free = np.maximum(self._shares.gpu_free[rows], 0).astype(np.intp)
        stranded: Ints = self._stranded(rows, self._shares.cpu_free[rows], free[:, None, :])[:, 0]
        return stranded

    def score(self, demand: Demand, rows: NDArray[np.intp]) -> tuple[Ints, Milli]:
        """Scores (0..99, NEVER where it does not fit), and the GPU for a fraction (-1 for everything else)."""
        rows = np.asarray(rows, np.intp)
        scores, gpus = self.evaluate(demand, rows)
        if demand.memory_mib:
            scores[self._shares.memory_free[rows] < demand.memory_mib] = NEVER
        return scores, np.broadcast_to(gpus, rows.shape).copy() if len(gpus) != len(rows) else gpus

    def evaluate(self, demand: Demand, rows: NDArray[np.intp]) -> tuple[Ints, Milli]:
        """`score` of rows whose memory is enough; one -1 for all rows where no GPU is chosen."""
        shares = self._shares
        free, cpu = shares.gpu_free.take(rows, axis=0), shares.cpu_free.take(rows)
        fits = those_that_fit(shares, demand, rows, free, cpu)
        if not fits.all():
            good = fits.nonzero()[0]
            scores = np.full(len(rows), NEVER, np.int64)
            if not good.size:
                return scores, _NO_GPU
            gpus = np.zeros(len(rows), np.int16)
            scores[good], gpus[good] = self._evaluate(demand, rows[good], free[good], cpu[good])
            return scores, gpus
        return self._evaluate(demand, rows, free, cpu) if len(rows) else (np.zeros(0, np.int64), _NO_GPU)

    def _evaluate(self, demand: Demand, rows: NDArray[np.intp], free: Milli, cpu: Ints) -> tuple[Ints, Milli]:
        """Rows that fit."""
        if len(rows) <= self._few_rows:
            return self._one_by_one(demand, rows, free, cpu)
        found = _STEPS.searchsorted(self.gain(demand, rows, free, cpu), "right")
        if not is_fraction(demand):
            return found[:, 0], _NO_GPU
        found[free < demand.gpu_milli] = NEVER
        return found.max(axis=1), found.argmax(axis=1).astype(np.int16)

    def _one_by_one(self, demand: Demand, rows: NDArray[np.intp], free: Milli, cpu: Ints) -> tuple[Ints, Milli]:
        """`_evaluate` for few rows."""
        classes = [self._kind_class.get(kind, 0) for kind in self._shares.kind.take(rows).tolist()]
        look = self._fraction_of_one if is_fraction(demand) else self._whole_of_one
        levels, found = len(self._cpu_list) + 1, []
        for kind, shares, cpu_milli in zip(classes, free.tolist(), cpu.tolist(), strict=True):
            before = kind * levels + bisect_right(self._cpu_list, cpu_milli)
            after = kind * levels + bisect_right(self._cpu_list, cpu_milli - demand.cpu_milli)
            found.append(look(demand, shares, before, after))
        scores: Ints = np.array([bisect_right(_STEPS_OF_ONE, gain) for gain, _ in found], np.int64)
        return scores, np.array([gpu for _, gpu in found], np.int16) if is_fraction(demand) else _NO_GPU

    def _whole_of_one(self, demand: Demand, shares: list[int], before: int, after: int) -> tuple[int, int]:
        """F before - F after of one row, in ppm of a milli-GPU, and no GPU."""
        if not demand.num_gpus:
            if before == after:
                return 0, -1
            return self._usable(after, shares) - self._usable(before, shares), -1
        left, missing = shares.copy(), demand.num_gpus
        for at, share in enumerate(shares):
            if share >= demand.gpu_milli and missing:
                left[at] = share - demand.gpu_milli
                missing -= 1
        taken = demand.gpu_milli * demand.num_gpus * self._weight
        return taken + self._usable(after, left) - self._usable(before, shares), -1

    def _fraction_of_one(self, demand: Demand, shares: list[int], before: int, after: int) -> tuple[int, int]:
        """The best F before - F after of one row by score, and the first GPU that has that score."""
        milli, gains = demand.gpu_milli, {}
        none = milli * self._weight - self._usable(before, shares)
        for at, share in enumerate(shares):
            if share >= milli and share not in gains:  # GPUs with the same share are alike
                left = shares.copy()
                left[at] = share - milli
                gains[share] = none + self._usable(after, left)
        best = max(gains.values())
        score = bisect_right(_STEPS_OF_ONE, best)
        least = _STEPS_OF_ONE[score - 1] if score else min(gains.values())
        return best, next(at for at, share in enumerate(shares) if gains.get(share, least - 1) >= least)

    def _usable(self, place: int, shares: list[int]) -> int:
        """What typical tasks can use of these shares (below 1: none), in ppm of a milli-GPU."""
        rank, ranks, total = self._rank_list, len(self._millis) + 1, 0
        there = [share for share in shares if share > 0]
        for count, table in self._views:
            if count > len(there):
                continue
            nth = rank[max(there) if count == 1 else sorted(there)[-count]]
            base = (place * ranks + nth) * ranks
            for share in there:
                total += table[base + rank[share]] * share
        return total

    def gain(self, demand: Demand, rows: NDArray[np.intp], free: Milli, cpu: Ints) -> Ints:
        """F before - F after of rows that fit and have so much free, in ppm of a milli-GPU: [row, way].

        The ways are those of `ways_to_place`; where a GPU has not the share the number means nothing.
        """
        there = np.maximum(free, 0).astype(np.intp)
        if is_fraction(demand) and self._single:
            return self._fraction_gain(demand, rows, there, cpu)
        left, _ = ways_to_place(demand, there)
        if left.shape[1] == 1:
            both = self._stranded(
                np.concatenate((rows, rows)),
                np.concatenate((cpu, cpu - demand.cpu_milli)),
                np.concatenate((there[:, None, :], left)),
            )
            gain: Ints = both[: len(rows)] - both[len(rows) :]
            return gain
        before = self._stranded(rows, cpu, there[:, None, :])
        return before - self._stranded(rows, cpu - demand.cpu_milli, left)

    def _place(self, rows: NDArray[np.intp], cpu: Ints) -> NDArray[np.intp]:
        """Which kinds and which CPUs rows cover, as the table's first index."""
        place: NDArray[np.intp] = self._cpus.searchsorted(cpu, "right")
        if self._kind_class:
            of_kind = [self._kind_class.get(kind, 0) for kind in self._shares.kind[rows].tolist()]
            place = place + np.array(of_kind, np.intp) * (len(self._cpus) + 1)
        return place

    def _stranded(self, rows: NDArray[np.intp], cpu: Ints, left: NDArray[np.intp]) -> Ints:
        """F of hypothetical shares [row, way, GPU] with so much CPU [row]."""
        ranks = len(self._millis) + 1
        place = self._place(rows, cpu) * ranks
        rank = self._rank.take(left)
        ordered = None if self._single else np.sort(left, axis=2)
        total: Ints = left.sum(axis=2) * self._weight
        for count, table in self._tables:
            if count > left.shape[2]:
                continue
            # A larger share covers no fewer tasks: the rank of the largest is the largest rank.
            nth = rank.max(axis=2) if ordered is None else self._rank.take(ordered[:, :, -count])
            base = (place[:, None] + nth) * ranks
            total -= (table.take(base[:, :, None] + rank) * left).sum(axis=2)
        return total

    def _fraction_gain(self, demand: Demand, rows: NDArray[np.intp], free: NDArray[np.intp], cpu: Ints) -> Ints:
        """F before - F after for each GPU of rows that fit, where all typical tasks take one GPU at most.

        Then only the largest share says which tasks fit, and it changes only where it is the one that is cut: so the
        sum over GPUs is made once, each GPU's own term exchanged, and the largest's sum made anew.
        """
        ranks, table = len(self._millis) + 1, self._tables[0][1]
        every, largest = np.arange(len(rows)), free.argmax(axis=1)
        here = self._place(rows, cpu) * ranks
        there = self._place(rows, cpu - demand.cpu_milli) * ranks
        rank = self._rank.take(free)
        top = rank.max(axis=1)
        before = (table.take(((here + top) * ranks)[:, None] + rank) * free).sum(axis=1)
        base = ((there + top) * ranks)[:, None]
        terms = table.take(base + rank) * free
        cut = np.maximum(free - demand.gpu_milli, 0)
        usable: Ints = terms.sum(axis=1)[:, None] - terms + table.take(base + self._rank.take(cut)) * cut
        then = free.copy()
        then[every, largest] = cut[every, largest]
        rank = self._rank.take(then)
        base = ((there + rank.max(axis=1)) * ranks)[:, None]
        usable[every, largest] = (table.take(base + rank) * then).sum(axis=1)
        # A free share counts with the whole weight before what is usable is taken off; what is cut is no longer free.
        usable += (demand.gpu_milli * self._weight - before)[:, None]
        return usable
