"""A line through a few measured points that outliers do not bend: y = base + slope · x. Pure; integers only.

Theil–Sen: the median of the slopes of all pairs, then the median of what is left (Sen 1968, "Estimates of the
regression coefficient based on Kendall's tau"); it stands up to 29 % of arbitrary points. Where all x are about the
same, no slope can be seen: then a line of a given shape is scaled to the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Final

PPM: Final = 1_000_000
SLOPE_PPM_MAX: Final = 10**9  # so that products fit 64 bits in columns
_SPREAD: Final = 4  # x must differ by a quarter of the largest, to say anything about a slope


@dataclass(frozen=True, slots=True)
class RobustLine:
    """`base` in units of y, `slope_ppm` in millionths of y for each x. Neither is negative."""

    base: int
    slope_ppm: int = 0

    def at(self, x: int) -> int:
        """y there, rounded down."""
        return self.base + x * self.slope_ppm // PPM


def fit(points: Sequence[tuple[int, int]], prior: RobustLine) -> RobustLine:
    """The line through (x, y); `prior`, scaled, where the points show no slope; `prior` where there are none."""
    if not points:
        return prior
    xs = [x for x, _ in points]
    if max(xs) - min(xs) <= max(xs) // _SPREAD:
        return _scaled(points, prior)
    least = (max(xs) - min(xs)) // (2 * len(points))  # of two that are nearly the same the slope is all noise
    slopes = [
        (y2 - y1) * PPM // (x2 - x1)
        for at, (x1, y1) in enumerate(points)
        for x2, y2 in points[at + 1 :]
        if abs(x2 - x1) > least
    ]
    slope = min(max(0, median_low(slopes)), SLOPE_PPM_MAX)
    base = median_low([y - x * slope // PPM for x, y in points])
    if base < 0:
        return RobustLine(0, min(median_low([y * PPM // x for x, y in points if x]), SLOPE_PPM_MAX))
    return RobustLine(base, slope)


def _scaled(points: Sequence[tuple[int, int]], prior: RobustLine) -> RobustLine:
    x = median_low([x for x, _ in points])
    y = median_low([y for _, y in points])
    expected = prior.at(x)
    if expected <= 0:
        return RobustLine(y)
    return RobustLine(prior.base * y // expected, min(prior.slope_ppm * y // expected, SLOPE_PPM_MAX))


__all__ = ["PPM", "RobustLine", "fit"]
