"""How much is sent at once: the bandwidth limits of `core.rates`, for threads; blocks that suit a connection's rate."""

from __future__ import annotations

import threading
from typing import Final

from fal_contract.clock import Clock
from fal_fsd.core.rates import BandwidthLimits, Limiter, LinkClass

BLOCK_S: Final = 0.05  # that a frame may wait behind a block
BLOCK_BYTES_MIN: Final = 64 << 10
_FADE: Final = 0.5


class Fit:
    """Bytes of the next block of one connection: what leaves in BLOCK_S, as the last blocks did, within bounds."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = self._seconds = 0.0
        self.block_bytes = bytes_max

    def sent(self, length: int, seconds: float) -> bool:
        """A block left in so long; True when the next should be clearly smaller or larger (by half, by double)."""
        self._bytes = self._bytes * _FADE + length
        self._seconds = self._seconds * _FADE + seconds
        meant = self._bytes_max
        if self._seconds > 0.0:
            meant = min(max(int(self._bytes / self._seconds * BLOCK_S), BLOCK_BYTES_MIN), self._bytes_max)
        fit = 1 << meant.bit_length() - 1
        changed, self.block_bytes = fit != self.block_bytes, fit
        return changed


class Pacer:
    """Thread-safe. Origin reads use it as well as peers, so that one limit holds for both."""

    def __init__(self, limits: BandwidthLimits, clock: Clock) -> None:
        self._limiter = Limiter(limits)
        self._clock = clock
        self._lock = threading.Lock()

    def limited(self, link: LinkClass) -> bool:
        """Whether `take` can ever say to wait."""
        return self._limiter.limited(link)

    def take(self, link: LinkClass, bytes_: int) -> float:
        """Seconds to wait before these bytes may pass; who took earlier passes earlier."""
        with self._lock:
            return self._limiter.take(link, bytes_, self._clock.monotonic_s())


__all__ = ["Fit", "Pacer"]
