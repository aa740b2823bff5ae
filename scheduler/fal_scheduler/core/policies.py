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
    those_that_fit,
)
from fal_scheduler.core.gap_value import waste_table

Rows = NDArray[np.intp]
Typical = Sequence[tuple[Demand, int]]
Evaluate = Callable[[Demand, Rows], tuple[Ints, Milli]]

DEFICIT_PPM: Final = 300_000
STRANDED_PART: Final = 10  # FGD's F counts a tenth
_DEMANDS_MAX: Final = 1024
_BACKLOG_MAX: Final = 512
# Scores of `Falctl` are at least 0: no placement changes the cost by more than 2^20 milli (1000 GPUs of one node).
_OFFSET: Final = 1 << 20
_NO_GPU: Final = np.full(1, -1, np.int16)
_FAR: Final = -(1 << 60)  # below everything that a placement can save


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
    """The best row by a score that depends on nothing but the row and the demand (memory apart).

    A demand that comes rarely would find thousands of changed rows. So that no single decision takes long, each also
    catches up the demand that waited longest, once _BACKLOG_MAX changes have gathered.
    """

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
        row = int(scores.argmax())
        if shares.memory_free[row] < demand.memory_mib:
            scores = np.where(shares.memory_free >= demand.memory_mib, scores, NEVER)
            row = int(scores.argmax())
        if scores[row] < 0:
            return None
        gpu = int(column.gpus[row])
        return Choice(row, (gpu,) if gpu >= 0 else first_gpus(shares, row, demand))

    def _column(self, demand: Demand) -> _Column:
        key = demand[:4]
        columns = self._columns
        column = columns.pop(key, None)
        if column is None:
            if len(columns) >= _DEMANDS_MAX:
                columns.pop(next(iter(columns)))
            column = _Column(len(self._shares))
        columns[key] = column  # the one looked at longest ago stays first
        self._refresh(column, demand)
        oldest = next(iter(columns))
        late = columns[oldest]
        if self._shares.clock - late.seen > _BACKLOG_MAX:
            del columns[oldest]
            columns[oldest] = late
            self._refresh(late, Demand(*oldest))
        return column

    def _refresh(self, column: _Column, demand: Demand) -> None:
        shares = self._shares
        if column.seen == shares.clock:
            return
        rows = (shares.stamp > column.seen).nonzero()[0]
        column.scores[rows], column.gpus[rows] = self._evaluate(demand, rows)
        column.seen = shares.clock


class Fgd:
    """The published fragmentation gradient descent."""

    def __init__(self, shares: Shares, typical: Typical) -> None:
        self._shares = shares
        self.learn(typical)

    def learn(self, typical: Typical) -> None:
        """Take other typical tasks from now on."""
        self._fragmentation = Fragmentation(self._shares, typical)
        self._ranking = Ranking(self._shares, self.evaluate)

    def evaluate(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        """See `Fragmentation.evaluate`."""
        return self._fragmentation.evaluate(demand, rows)

    def choose(self, shares: Shares, demand: Demand) -> Choice | None:
        """See `Policy`."""
        return self._ranking.choose(shares, demand)


class Falctl:
    """Long-run packing: waste of shares by the tasks to come, and GPUs that CPU cannot feed.

    `stranded` adds a tenth of FGD's F over all typical tasks: as good where tasks only come, better where they also go,
    because it keeps nodes whole for tasks of several GPUs; half as fast.
    """

    def __init__(self, shares: Shares, typical: Typical, *, stranded: bool = False) -> None:
        self._shares = shares
        self._stranded = stranded
        self._ranking = Ranking(shares, self.evaluate)
        self.learn(typical)

    def learn(self, typical: Typical) -> None:
        """Take other typical tasks from now on."""
        self._cpus, table = waste_table(typical)
        # One more entry before share 0 stands for "no such GPU" (-1), which wastes nothing.
        self._waste = np.pad(table, ((0, 0), (1, 0))).ravel()
        self._width = table.shape[1] + 1
        gpu = sum(task.gpu_milli * task.num_gpus * weight for task, weight in typical)
        cpu = sum(task.cpu_milli * weight for task, weight in typical if task.num_gpus)
        self._fed_ppm = gpu * DEFICIT_PPM // cpu if cpu else 0  # weighted milli-GPU that a milli-CPU feeds
        if self._stranded:
            self._fragmentation = Fragmentation(self._shares, typical)
        self._ranking.forget()

    def choose(self, shares: Shares, demand: Demand) -> Choice | None:
        """See `Policy`."""
        return self._ranking.choose(shares, demand)

    def evaluate(self, demand: Demand, rows: Rows) -> tuple[Ints, Milli]:
        """The cost saved in milli plus _OFFSET, at least 0 where it fits, and the GPU for a fraction."""
        shares = self._shares
        free, cpu = shares.gpu_free.take(rows, axis=0), shares.cpu_free.take(rows)
        fits = those_that_fit(shares, demand, rows, free, cpu)
        if fits.all():
            return self._evaluate(demand, rows, free, cpu) if len(rows) else (np.zeros(0, np.int64), _NO_GPU)
        scores, gpus = np.full(len(rows), NEVER, np.int64), np.full(len(rows), -1, np.int16)
        good = fits.nonzero()[0]
        if good.size:
            scores[good], gpus[good] = self._evaluate(demand, rows[good], free[good], cpu[good])
        return scores, gpus

    def _evaluate(self, demand: Demand, rows: Rows, free: Milli, cpu: Ints) -> tuple[Ints, Milli]:
        """Rows that fit."""
        waste, left = self._waste, cpu - demand.cpu_milli
        level = self._cpus.searchsorted(left, "right") * self._width + 1
        place = level[:, None] + free
        then = waste.take(place)
        level = self._cpus.searchsorted(cpu, "right") * self._width + 1
        saved = waste.take(level[:, None] + free).sum(axis=1) - then.sum(axis=1)
        if self._fed_ppm:
            deficit = self._shares.gpu_total.take(rows) * DEFICIT_PPM - cpu * self._fed_ppm
            change = demand.gpu_milli * demand.num_gpus * DEFICIT_PPM - demand.cpu_milli * self._fed_ppm
            saved += np.maximum(deficit, 0) - np.maximum(deficit - change, 0)
        # Where the share is not enough the index means nothing; it is masked.
        then -= waste.take(np.maximum(place - demand.gpu_milli, 0))
        enough = free >= max(demand.gpu_milli, 1)
        if self._stranded:
            stranded = self._fragmentation.gain(demand, rows, free, cpu) // STRANDED_PART
            if is_fraction(demand):
                then += stranded
            else:
                saved += stranded[:, 0]
        if is_fraction(demand):
            then[~enough] = _FAR
            return (saved + then.max(axis=1)) // PPM + _OFFSET, then.argmax(axis=1).astype(np.int16)
        if demand.num_gpus:
            chosen = enough & (enough.cumsum(axis=1) <= demand.num_gpus)
            saved += (then * chosen).sum(axis=1)
        return saved // PPM + _OFFSET, _NO_GPU
