"""Typical tasks: which demands there are and how often, learnt from those that arrived.

Pure. A demand counts by what packing sees: CPU, share, number and kinds of GPUs, not memory. The most frequent are kept
until they cover COVER_PPM of all arrivals; ties in frequency go to the one that came first.

Fed by whoever sees arrivals; read by fragmentation and the packing policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from fal_scheduler.core.fragmentation import PPM, Demand

COVER_PPM: Final = 950_000
DEMANDS_MAX: Final = 4096


class TypicalTasks:
    """Counts of demands. Bounded: beyond DEMANDS_MAX distinct ones, those seen once or never again are forgotten."""

    def __init__(self, seen: Iterable[Demand] = ()) -> None:
        self._counts: dict[Demand, int] = {}
        self.arrivals = 0
        for demand in seen:
            self.observe(demand)

    def observe(self, demand: Demand, times: int = 1) -> None:
        """A task arrived, or so many alike."""
        key = demand._replace(memory_mib=0)
        self.arrivals += times
        self._counts[key] = self._counts.get(key, 0) + times
        if len(self._counts) > DEMANDS_MAX:
            ranked = sorted(self._counts.items(), key=lambda one: -one[1])
            self._counts = dict(ranked[: DEMANDS_MAX // 2])

    def counts(self) -> list[tuple[Demand, int]]:
        """Every demand and how often it came, the most frequent first."""
        return sorted(self._counts.items(), key=lambda one: -one[1])

    def typical(self, cover_ppm: int = COVER_PPM) -> list[tuple[Demand, int]]:
        """The most frequent demands that cover so much, and their weights in ppm of one another."""
        return most_frequent(self.counts(), cover_ppm)


def most_frequent(weighted: Sequence[tuple[Demand, int]], cover_ppm: int = COVER_PPM) -> list[tuple[Demand, int]]:
    """Of demands by falling weight the first that cover so much, and their weights in ppm of one another."""
    kept: list[tuple[Demand, int]] = []
    covered, total = 0, sum(weight for _, weight in weighted)
    for demand, weight in weighted:
        if covered * PPM >= cover_ppm * total:
            break
        kept.append((demand, weight))
        covered += weight
    return [(demand, weight * PPM // covered) for demand, weight in kept]
