"""Placement policies: of the nodes where a task fits, which one takes it. A task that fits somewhere is never refused.

Pure, deterministic. A policy is made for one `Shares` and keeps its scores of each kind of demand; a decision changes
one node, so the next one looks again only at rows whose stamp is newer. Of equal scores the first row wins.

`Falctl`, our own, minimises what a placement adds to

    waste    what is lost of each GPU's free share if the tasks to come pack as well as they could (`gap_value`)
    deficit  0.3 x GPU share that the node's free CPU cannot feed, at the typical tasks' CPU for each GPU

and so does not look one task ahead, as FGD does, but at the packing in the long run. `Fgd` is the published one; the
baselines of its paper are in `baseline_policies`.

Used by `sim place` and, on its own columns, by placement. Must not change `Shares`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fal_scheduler.core.fragmentation import (
    NEVER,
    PPM,
    Demand,
    Fragmentation,
    Ints,
    Milli,
    Shares,
    first_gpus,
    is_fraction,
    rows_that_fit,
)
from fal_scheduler.core.gap_value import waste_table

Rows = NDArray[np.intp]
Typical = Sequence[tuple[Demand, int]]
Evaluate = Callable[[Demand, Rows], tuple[Ints, Milli]]

DEFICIT_PPM: Final = 300_000
_DEMANDS_MAX: Final = 1024
# Scores of `Falctl` are at least 0: no placement changes the cost by more than 2^20 milli (1000 GPUs of one node).
_OFFSET: Final = 1 << 20


class Choice(NamedTuple):
    """A row and the GPUs of it, ascending."""

    row: int
    gpus: tuple[int, ...]


class Policy(Protocol):
    """Chooses for the `Shares` it was made for."""

    def choose(self, shares: Shares, demand: Demand) -> Choice | None:
        """Where `demand` goes; None when it fits nowhere."""


class _Column:
    """Scores of one demand on every row, as of a clock of `Shares`."""

    __slots__ = ("gpus", "scores", "seen")

    def __init__(self, rows: int) -> None:
        self.scores: Ints = np.full(rows, NEVER, np.int64)
        self.gpus: Milli = np.full(rows, -1, np.int16)
        self.seen = -1


class Ranking:
    """The best row by a score that depends on nothing but the row and the demand (memory apart)."""

    def __init__(self, shares: Shares, evaluate: Evaluate) -> None:
        self._shares = shares
        self._evaluate = evaluate
        self._columns: dict[tuple[int, int, int, tuple[int, ...]], _Column] = {}

    def forget(self) -> None:
        """What scores rest on has changed."""
        self._columns.clear()

    def choose(self, shares: Shares, demand: Demand) -> Choice | None:
        """The first row with the highest score."""
        if shares is not self._shares:
            raise ValueError("a policy chooses for the shares that it was made for")
        column = self._column(demand)
        scores = column.scores
        if demand.memory_mib:
            scores = np.where(shares.memory_free >= demand.memory_mib, scores, NEVER)
        row = int(scores.argmax())
        if scores[row] < 0:
            return None
        gpu = int(column.gpus[row])
        return Choice(row, (gpu,) if gpu >= 0 else first_gpus(shares, row, demand))

    def _column(self, demand: Demand) -> _Column:
        key = demand[:4]
        column = self._columns.get(key)
        if column is None:
            if len(self._columns) >= _DEMANDS_MAX:
                self._columns.clear()
            column = self._columns[key] = _Column(len(self._shares))
        shares = self._shares
        if column.seen != shares.clock:
            rows = (shares.stamp > column.seen).nonzero()[0]
            fits = rows_that_fit(shares, demand, rows)
            column.scores[rows] = NEVER
            rows = rows[fits]
            if rows.size:
                column.scores[rows], column.gpus[rows] = self._evaluate(demand, rows)
            column.seen = shares.clock
        return column


class Fgd:
    """The published fragmentation gradient descent."""

    def __init__(self, shares: Shares, typical: Typical) -> None:
        self._shares = shares
        self.learn(typical)

    def learn(self, typical: Typical) -> None:
        """Take other typical tasks from now on."""
        self._ranking = Ranking(self._shares, Fragmentation(self._shares, typical).score_fitting)

    def choose(self, shares: Shares, demand: Demand) -> Choice | None:
        """See `Policy`."""
        return self._ranking.choose(shares, demand)


class Falctl:
    """Long-run packing: waste of shares by the tasks to come, and GPUs that CPU cannot feed."""

    def __init__(self, shares: Shares, typical: Typical) -> None:
        self._shares = shares
        self._ranking = Ranking(shares, self._score)
        self.learn(typical)

    def learn(self, typical: Typical) -> None:
        """Take other typical tasks from now on."""
        self._cpus, table = waste_table(typical)
        # Milli: a score is the cost saved, so fractions of a thousandth of a GPU do not decide.
        self._waste = table.ravel()
        gpu = sum(task.gpu_milli * task.num_gpus * weight for task, weight in typical)
        cpu = sum(task.cpu_milli * weight for task, weight in typical if task.num_gpus)
        self._milli_per_cpu_ppm = gpu * PPM // cpu if cpu else 0
        self._ranking.forget()

    def choose(self, shares: Shares, demand: Demand) -> Choice | None:
        """See `Policy`."""
        return self._ranking.choose(shares, demand)

    def _score(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        """The cost saved in milli plus _OFFSET, at least 0, and the GPU for a fraction."""
        shares = self._shares
        free = np.maximum(shares.gpu_free[rows], 0).astype(np.intp)
        cpu = shares.cpu_free[rows]
        left = cpu - demand.cpu_milli
        total = free.sum(axis=1)
        asked = demand.gpu_milli * demand.num_gpus
        feeds = self._milli_per_cpu_ppm
        deficit = np.maximum(total * PPM - cpu * feeds, 0) - np.maximum((total - asked) * PPM - left * feeds, 0)
        saved = deficit * DEFICIT_PPM // PPM if feeds else np.zeros(len(rows), np.int64)
        before = np.searchsorted(self._cpus, cpu, "right") * 1001
        level = np.searchsorted(self._cpus, left, "right") * 1001
        same = self._waste[level[:, None] + free]
        saved += self._waste[before[:, None] + free].sum(axis=1) - same.sum(axis=1)
        if not is_fraction(demand):
            enough = free >= max(demand.gpu_milli, 1)
            chosen = enough & (np.cumsum(enough, axis=1) <= demand.num_gpus)
            left_over = self._waste[level[:, None] + free - chosen * demand.gpu_milli]
            saved += (same - left_over).sum(axis=1)
            return saved // PPM + _OFFSET, np.full(len(rows), -1, np.int16)
        ways = free >= demand.gpu_milli
        of_gpu = same - self._waste[level[:, None] + np.where(ways, free - demand.gpu_milli, 0)]
        scores = np.where(ways, (saved[:, None] + of_gpu) // PPM + _OFFSET, NEVER)
        gpus = scores.argmax(axis=1)
        return scores[np.arange(len(rows)), gpus], gpus.astype(np.int16)
