"""Time as a parameter: decisions take `now_s`; edges own one `Clock` and pass its readings in."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a process reads time."""

    def wall_s(self) -> float:
        """Seconds since 1970; jumps when somebody sets the clock. For stamps and certificate dates only."""
        ...

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start; never jumps. For every duration and deadline."""
        ...


class SystemClock:
    """The machine's clocks."""

    def wall_s(self) -> float:
        return time.time()  # noqa: TID251  (the one place)

    def monotonic_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that a test moves by hand; wall and monotonic can be skewed apart."""

    def __init__(self, *, wall_s: float = 1_700_000_000.0, monotonic_s: float = 0.0) -> None:
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s

    def wall_s(self) -> float:
        return self._wall_s

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def advance(self, seconds_s: float) -> None:
        """Let time pass on both clocks."""
        self._wall_s += seconds_s
        self._monotonic_s += seconds_s

    def skew(self, seconds_s: float) -> None:
        """Set the wall clock forwards or back, as NTP or an operator does."""
        self._wall_s += seconds_s
