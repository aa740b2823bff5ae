"""The time by which pins end: it survives restarts and does not follow the wall clock's jumps. Pure.

Store time is seconds that surely have passed since the store was made. While fsd runs it follows the monotonic clock.
Over a restart it gains what the wall clock says, but never less than nothing and never more than JUMP_MAX_S: who set
the clock by hours while we were down cannot end a pin. A machine that was really off for longer keeps its pins for
that much longer, which costs disk space and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

JUMP_MAX_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class PinClock:
    """Store time was `store_s` when the monotonic clock read `monotonic_s`."""

    store_s: float
    monotonic_s: float

    @classmethod
    def begin(cls, saved: tuple[float, float] | None, *, wall_s: float, monotonic_s: float) -> PinClock:
        """At a start. `saved`: store time and wall clock as last written down; None for a new store."""
        if saved is None:
            return cls(0.0, monotonic_s)
        store_s, saved_wall_s = saved
        return cls(store_s + min(max(wall_s - saved_wall_s, 0.0), JUMP_MAX_S), monotonic_s)

    def now_s(self, monotonic_s: float) -> float:
        """Store time."""
        return self.store_s + max(monotonic_s - self.monotonic_s, 0.0)

    def of_wall_s(self, at_s: float, *, wall_s: float, monotonic_s: float) -> float:
        """Store time at which the wall clock, read as `wall_s` now, would read `at_s`."""
        return self.now_s(monotonic_s) + (at_s - wall_s)


__all__ = ["JUMP_MAX_S", "PinClock"]
