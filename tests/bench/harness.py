"""What every benchmark shares: interleaved runs, ratios, percentiles, an open loop, the table and the last line.

A benchmark compares ours with a baseline on the same machine in the same run, A B A B …, so that what slows the machine
slows both; the figure is the median of the pairs' ratios. A module `bench_NAME.py` beside this file with
`MUST_REACH` and `async def run(options: Options) -> Result` is a benchmark; `run.py` finds it.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Options:
    """How long to measure. `pairs` of runs, `seconds_s` each; quick runs prove that a benchmark works, no more."""

    pairs: int = 7
    seconds_s: float = 1.0

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.seconds_s <= 0.0:
            raise ValueError("pairs and seconds must be above 0")


@dataclass(frozen=True, slots=True)
class Paired:
    """The figures of interleaved runs, in order."""

    ours: Sequence[float]
    baseline: Sequence[float]

    @property
    def ratio(self) -> float:
        """The median of ours ÷ baseline, pair by pair."""
        return statistics.median(a / b for a, b in zip(self.ours, self.baseline, strict=True))

    def as_json(self) -> dict[str, Any]:
        """Medians, and the spread of the ratio."""
        ratios = [a / b for a, b in zip(self.ours, self.baseline, strict=True)]
        return {
            "ours": significant(statistics.median(self.ours)),
            "baseline": significant(statistics.median(self.baseline)),
            "ratio": significant(self.ratio),
            "ratio_min": significant(min(ratios)),
            "ratio_max": significant(max(ratios)),
        }


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark's outcome; `extra` holds further figures of its own."""

    bench: str
    ours: float
    baseline: float
    ratio: float
    unit: str
    runs: int
    must_reach: str
    reached: bool
    extra: Mapping[str, Any] = field(default_factory=dict)

    def last_line(self) -> str:
        """The JSON object that others read."""
        return json.dumps(
            {
                "bench": self.bench,
                "ours": significant(self.ours),
                "baseline": significant(self.baseline),
                "ratio": significant(self.ratio),
                "unit": self.unit,
                "runs": self.runs,
                **self.extra,
                "must_reach": self.must_reach,
                "reached": self.reached,
            }
        )


async def interleave(ours: Run, baseline: Run, *, pairs: int) -> Paired:
    """Run ours and the baseline in turns; each returns its figure. One unmeasured pair goes first."""
    await ours()
    await baseline()
    figures: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        figures[0].append(await ours())
        figures[1].append(await baseline())
    return Paired(*figures)


async def rate(work: Callable[[], Awaitable[int]], *, seconds_s: float) -> float:
    """Do `work`, which returns how much it did, one after the other for so long; amount per second."""
    done = 0
    begun_s = time.perf_counter()
    end_s = begun_s + seconds_s
    while (now_s := time.perf_counter()) < end_s:
        done += await work()
    return done / (now_s - begun_s)


async def open_loop(work: Callable[[], Awaitable[object]], *, per_s: float, seconds_s: float) -> list[float]:
    """Begin `work` at a fixed rate whether or not earlier ones have ended; seconds from due to done, each.

    Counting from when it was *due* keeps a stall from hiding the waits that it causes.
    """
    loop = asyncio.get_running_loop()
    took: list[float] = []
    begun_s = loop.time()

    async def one(due_s: float) -> None:
        await work()
        took.append(loop.time() - due_s)

    async with asyncio.TaskGroup() as tasks:
        for n in range(max(int(per_s * seconds_s), 1)):
            due_s = begun_s + n / per_s
            await asyncio.sleep(max(due_s - loop.time(), 0.0))
            tasks.create_task(one(due_s))
    return took


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def significant(value: float, digits: int = 4) -> float:
    """`value` to so many significant digits."""
    return float(f"{value:.{digits}g}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table for people; the first column left, the others right."""
    cells = [
        [f"{cell:,.4g}" if isinstance(cell, float) and abs(cell) < 1000 else _plain(cell) for cell in row]
        for row in (header, *rows)
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())


def _plain(cell: object) -> str:
    return f"{cell:,.0f}" if isinstance(cell, float) else str(cell)
