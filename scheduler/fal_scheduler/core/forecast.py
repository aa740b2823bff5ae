"""Arrivals of one app, counted and foretold. Pure; integers only, so that a replay comes to the same.

Kept per app: the requests of the minute under way, two moving averages of requests per minute (time constants of 8 and
64 minutes, updated each minute; of fewer minutes it is the plain mean), and a profile of the day in 96 bins of
15 minutes, each a moving average over days. Rates are in millionths of a request per minute.

`expected` foretells the arrivals of the next seconds: the mean of both averages, and once a whole day was seen the
profile's bin with equal weight (`falctl sim forecast` measures it against naive ones). Times are wall clock in
UTC: the profile is of the day's hours. Must not decide anything: `core.scaling` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

MICRO: Final = 1_000_000
MINUTE_S: Final = 60
BIN_MINUTES: Final = 15
BRING_BACK_MS: Final = 30_000  # where nobody has measured how long an app's runner takes to be ready
WORTH_IT: Final = MICRO // 5  # one request in five such times; `falctl sim forecast` shows what that saves
FORECAST_LOOK_S: Final = 15.0  # how often an app's forecast is looked at
BINS: Final = 24 * 60 // BIN_MINUTES
_FAST_MINUTES: Final = 8
_SLOW_MINUTES: Final = 64
_DAY_SHIFT: Final = 1  # the last day counts one half
_MINUTES_CAUGHT_UP_MAX: Final = 1500  # after so many without a request both averages are nothing
_BINS_CAUGHT_UP_MAX: Final = 4 * BINS


@dataclass(slots=True)
class Arrivals:
    """What is known of one app's arrivals. `minute` and `bin`: those under way, since the epoch; -1: none yet."""

    minute: int = -1
    in_minute: int = 0
    minutes_seen: int = 0
    fast: int = 0
    slow: int = 0
    bin: int = -1
    in_bin: int = 0
    bins_seen: int = 0
    profile: list[int] = field(default_factory=lambda: [0] * BINS)
    total: int = 0

    def note(self, count: int, wall_s: float) -> None:
        """So many requests came now."""
        self.advance(wall_s)
        self.in_minute += count
        self.in_bin += count
        self.total += count

    def advance(self, wall_s: float) -> None:
        """Close what lies behind. A clock that went back changes nothing."""
        minute = int(wall_s) // MINUTE_S
        if self.minute < 0:
            self.minute, self.bin = minute, minute // BIN_MINUTES
            return
        passed = minute - self.minute
        if passed > _MINUTES_CAUGHT_UP_MAX:
            self.fast = self.slow = self.in_minute = self.minutes_seen = 0
            self.minute, passed = minute, 0
        for _ in range(passed):
            self.minutes_seen += 1
            self.fast += (self.in_minute * MICRO - self.fast) // min(self.minutes_seen, _FAST_MINUTES)
            self.slow += (self.in_minute * MICRO - self.slow) // min(self.minutes_seen, _SLOW_MINUTES)
            self.in_minute = 0
        self.minute = max(self.minute, minute)
        self._close_bins(minute // BIN_MINUTES)

    def as_of(self, wall_s: float) -> Arrivals:
        """A copy, brought up to a moment; this one stays as it is, so that anybody may look."""
        copy = replace(self, profile=list(self.profile))
        copy.advance(wall_s)
        return copy

    def _close_bins(self, current: int) -> None:
        self.bin = max(self.bin, current - _BINS_CAUGHT_UP_MAX)
        while self.bin < current:
            at, now = self.bin % BINS, self.in_bin * MICRO // BIN_MINUTES
            known = self.bins_seen >= BINS
            self.profile[at] = self.profile[at] + ((now - self.profile[at]) >> _DAY_SHIFT) if known else now
            self.bins_seen, self.in_bin, self.bin = self.bins_seen + 1, 0, self.bin + 1

    @property
    def rate(self) -> int:
        """Millionths of a request per minute, by the last hour."""
        return (self.fast + self.slow) // 2

    def rate_at(self, wall_s: float) -> int:
        """Millionths of a request per minute to be expected at a time to come."""
        rate = self.rate
        if self.bins_seen >= BINS:
            rate = (rate + self.profile[int(wall_s) // MINUTE_S // BIN_MINUTES % BINS]) // 2
        return rate

    def expected(self, wall_s: float, horizon_s: float) -> int:
        """Millionths of requests that should come within `horizon_s` from `wall_s`."""
        middle_s = wall_s + horizon_s / 2
        return self.rate_at(middle_s) * int(horizon_s) // MINUTE_S


def foretold_runners(rate: int, ahead_ms: int, request_ms: int, multiplexing: int, worth: int = WORTH_IT) -> int:
    """Runners that will be busy, from `rate` (millionths of a request per minute) and the time of one request.

    None where fewer than `worth` millionths of a request are to be expected in the `ahead_ms` that a start takes, else
    at least one.
    """
    busy = rate * request_ms // (1000 * MINUTE_S)  # millionths of requests under way (Little's law)
    runners = max(1, -(-busy // (MICRO * max(1, multiplexing))))
    return runners if rate * ahead_ms // (1000 * MINUTE_S) >= worth else 0


__all__ = [
    "BINS",
    "BIN_MINUTES",
    "BRING_BACK_MS",
    "FORECAST_LOOK_S",
    "MICRO",
    "MINUTE_S",
    "WORTH_IT",
    "Arrivals",
    "foretold_runners",
]
