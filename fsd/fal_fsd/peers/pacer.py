"""The bandwidth limits of `core.rates`, for threads."""

from __future__ import annotations

import threading

from fal_contract.clock import Clock
from fal_fsd.core.rates import BandwidthLimits, Limiter, LinkClass


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


__all__ = ["Pacer"]
