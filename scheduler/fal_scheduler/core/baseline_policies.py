"""The baselines that the FGD paper compares with, by its formulas.

Pure, deterministic (Random takes its numbers from a generator of its own with a given seed). Scores are integers,
truncated as published. A fraction goes to the GPU of that node where it fits tightest.

Used by `sim place` and benchmarks. Must not change `Shares`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import numpy as np

from fal_scheduler.core.fragmentation import (
    NEVER,
    WHOLE,
    Demand,
    Ints,
    Milli,
    Shares,
    first_gpus,
    is_fraction,
    rows_that_fit,
)
from fal_scheduler.core.policies import Choice, Ranking, Rows

CPU_SCALE: Final = 128_000  # the largest node of the paper's fleet, in milli
GPU_SCALE: Final = 8_000


def tightest(shares: Shares, row: int, demand: Demand) -> tuple[int, ...]:
    """The GPU with the least share that is enough; whole GPUs by lowest index."""
    if not is_fraction(demand):
        return first_gpus(shares, row, demand)
    free = shares.gpu_free[row]
    good = np.flatnonzero(free >= demand.gpu_milli)
    return (int(good[free[good].argmin()]),)


def _tightest(shares: Shares, demand: Demand, rows: Rows) -> Milli:
    if not is_fraction(demand):
        return np.full(len(rows), -1, np.int16)
    free = shares.gpu_free[rows]
    gpus: Milli = np.where(free >= demand.gpu_milli, free, WHOLE + 1).argmin(axis=1).astype(np.int16)
    return gpus


def _asked(demand: Demand) -> int:
    return demand.gpu_milli * demand.num_gpus


def _free(shares: Shares, rows: Rows) -> Ints:
    total: Ints = np.maximum(shares.gpu_free[rows], 0).sum(axis=1, dtype=np.int64)
    return total


class _Scored(ABC):
    """A baseline whose score is a number of the row; `_score` sees rows that fit."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._ranking = Ranking(shares, self._evaluate)

    def choose(self, shares: Shares, demand: Demand) -> Choice | None:
        """See `Policy`."""
        return self._ranking.choose(shares, demand)

    def _evaluate(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        scores, gpus = np.full(len(rows), NEVER, np.int64), np.full(len(rows), -1, np.int16)
        fits = rows_that_fit(self._shares, demand, rows)
        if fits.any():
            scores[fits], gpus[fits] = self._score(demand, rows[fits])
        return scores, gpus

    @abstractmethod
    def _score(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        """Of each row its score and, for a fraction, the GPU."""


class RandomFit:
    """Any row where it fits, and any of its GPUs."""

    def __init__(self, shares: Shares, seed: int) -> None:
        self._chance = np.random.Generator(np.random.PCG64(seed))
        self._rows = np.arange(len(shares))

    def choose(self, shares: Shares, demand: Demand) -> Choice | None:
        """See `Policy`."""
        fits = rows_that_fit(shares, demand, self._rows)
        if demand.memory_mib:
            fits &= shares.memory_free >= demand.memory_mib
        rows = fits.nonzero()[0]
        if not rows.size:
            return None
        row = int(rows[self._chance.integers(rows.size)])
        if not is_fraction(demand):
            return Choice(row, first_gpus(shares, row, demand))
        good = np.flatnonzero(shares.gpu_free[row] >= demand.gpu_milli)
        return Choice(row, (int(good[self._chance.integers(good.size)]),))


class DotProduct(_Scored):
    """The node whose free amounts and the demand have the smallest dot product."""

    def _score(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        shares = self._shares
        cpu = shares.cpu_free[rows] / CPU_SCALE * (demand.cpu_milli / CPU_SCALE)
        gpu = _free(shares, rows) / GPU_SCALE * (_asked(demand) / GPU_SCALE)
        scores = (100 * (1 - (cpu + gpu) / 2)).astype(np.int64)
        return np.maximum(scores, 0), _tightest(shares, demand, rows)


class BestFit(_Scored):
    """The node that is left with least, CPU and GPU weighted alike.

    The published score is then stretched to 0..100 over the nodes that fit, which changes the order of no two integers
    of that range and is left out.
    """

    def _score(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        shares = self._shares
        cpu = (shares.cpu_free[rows] - demand.cpu_milli) / CPU_SCALE
        gpu = (_free(shares, rows) - _asked(demand)) / GPU_SCALE
        scores = (100 * (1 - cpu / 2 - gpu / 2)).astype(np.int64)
        return np.maximum(scores, 0), _tightest(shares, demand, rows)


class GpuPacking(_Scored):
    """GPUs that are shared already, then idle GPUs of used nodes, then idle nodes with few GPUs."""

    def _score(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        free = self._shares.gpu_free[rows]
        if not demand.num_gpus:
            return np.zeros(len(rows), np.int64), np.full(len(rows), -1, np.int16)
        present = (free >= 0).sum(axis=1)
        idle_node = ((free == WHOLE).sum(axis=1)) == present
        scores = np.where(idle_node, np.maximum(33 - present, present), max(50 - demand.num_gpus, 33))
        gpus = _tightest(self._shares, demand, rows)
        if is_fraction(demand):
            chosen = free[np.arange(len(rows)), gpus].astype(np.int64)
            scores = np.where(chosen < WHOLE, np.maximum(100 - chosen // 100, 50), scores)
        return scores, gpus


class GpuClustering(_Scored):
    """Tasks of one class (a fraction, or so many GPUs) together on a node.

    It must be told what is placed and what leaves (`follow`), since free amounts do not say which classes a node holds.
    """

    def __init__(self, shares: Shares) -> None:
        super().__init__(shares)
        self._held: list[dict[int, int]] = [{} for _ in range(len(shares))]

    def follow(self, row: int, demand: Demand, by: int) -> None:
        """So many tasks more (or, below 0, fewer) of this demand are on the row."""
        if not demand.num_gpus:
            return
        held, name = self._held[row], _class_of(demand)
        held[name] = held.get(name, 0) + by
        if not held[name]:
            del held[name]

    def _score(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        gpus = _tightest(self._shares, demand, rows)
        if not demand.num_gpus:
            return np.zeros(len(rows), np.int64), gpus
        name = _class_of(demand)
        bonus = np.fromiter((_bonus(self._held[int(row)], name) for row in rows), np.int64, len(rows))
        used = (25 * (GPU_SCALE - _free(self._shares, rows)) / GPU_SCALE).astype(np.int64)
        return used + bonus, gpus


def _class_of(demand: Demand) -> int:
    return 0 if is_fraction(demand) else demand.num_gpus


def _bonus(held: dict[int, int], name: int) -> int:
    if name in held:
        return 75 if len(held) == 1 else 50
    return 0 if held else 25
