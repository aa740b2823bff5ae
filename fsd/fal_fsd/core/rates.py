"""How fast bytes may leave and how fast they came: token buckets, measured rates, classes of links. Pure.

Bucket: tokens grow by `rate` up to `burst`; a take may drive them below zero, then the taker waits until they are back
at zero. So over any time t at most burst + rate · t bytes leave, and takers are served in the order in which they take.

Measured rate: exponentially weighted by time, r ← r·e^(-s/τ) + (bytes/s)·(1 - e^(-s/τ)) for bytes that took s seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fal_fsd.core.messages import Place

BURST_S: Final = 0.05  # a bucket holds what flows in so many seconds …
BURST_BYTES_MIN: Final = 64 << 10  # … but at least this
BURST_BYTES_MAX: Final = 4 << 20
RATE_TAU_S: Final = 4.0
SECONDS_MIN: Final = 1e-6


class LinkClass(StrEnum):
    """What lies between two nodes; the origin is a class of its own."""

    POOL = "pool"
    REGION = "region"
    OTHER = "other"
    ORIGIN = "origin"


@dataclass(frozen=True, slots=True)
class BandwidthLimits:
    """Bytes per second, 0: none. `node`: all that leaves this node; `pool`, `region`, `other`: what leaves over links
    of this class; `origin`: what it reads from origins."""

    node: int = 0
    pool: int = 0
    region: int = 0
    other: int = 0
    origin: int = 0

    def of(self, link: LinkClass) -> int:
        """The limit of a class."""
        return {
            LinkClass.POOL: self.pool,
            LinkClass.REGION: self.region,
            LinkClass.OTHER: self.other,
            LinkClass.ORIGIN: self.origin,
        }[link]


def link_class(me: Place, other: Place) -> LinkClass:
    """The class of the link between two nodes."""
    if me.pool == other.pool:
        return LinkClass.POOL
    return LinkClass.REGION if me.region == other.region else LinkClass.OTHER


class TokenBucket:
    """One limit. `rate_bytes_s` 0: none. Not thread-safe; time must not go back."""

    __slots__ = ("_at_s", "_tokens", "burst_bytes", "rate_bytes_s")

    def __init__(self, rate_bytes_s: int, *, burst_bytes: int | None = None) -> None:
        self.rate_bytes_s = rate_bytes_s
        meant = int(rate_bytes_s * BURST_S)
        self.burst_bytes = min(max(meant, BURST_BYTES_MIN), BURST_BYTES_MAX) if burst_bytes is None else burst_bytes
        self._tokens = float(self.burst_bytes)
        self._at_s: float | None = None

    def take(self, bytes_: int, now_s: float) -> float:
        """Seconds to wait before these bytes may leave."""
        if not self.rate_bytes_s:
            return 0.0
        if self._at_s is not None:
            grown = self._tokens + max(now_s - self._at_s, 0.0) * self.rate_bytes_s
            self._tokens = min(grown, float(self.burst_bytes))
        self._at_s = now_s
        self._tokens -= bytes_
        return max(-self._tokens / self.rate_bytes_s, 0.0)


class Limiter:
    """The buckets of a node: its own and one a class of links. Not thread-safe."""

    def __init__(self, limits: BandwidthLimits) -> None:
        self.limits = limits
        self._node = TokenBucket(limits.node)
        self._links = {link: TokenBucket(limits.of(link)) for link in LinkClass}

    def limited(self, link: LinkClass) -> bool:
        """Whether anything over such links is slowed down."""
        return bool(self.limits.of(link) or (self.limits.node and link is not LinkClass.ORIGIN))

    def take(self, link: LinkClass, bytes_: int, now_s: float) -> float:
        """Seconds to wait before these bytes may pass. The node's own limit is of what leaves, not of origin reads."""
        wait_s = self._links[link].take(bytes_, now_s)
        return wait_s if link is LinkClass.ORIGIN else max(wait_s, self._node.take(bytes_, now_s))


class RateMeter:
    """A measured rate. `rate_bytes_s` is 0 before the first `add`."""

    __slots__ = ("_tau_s", "bytes_total", "rate_bytes_s")

    def __init__(self, tau_s: float = RATE_TAU_S) -> None:
        self._tau_s = tau_s
        self.rate_bytes_s = 0.0
        self.bytes_total = 0

    def add(self, bytes_: int, seconds: float) -> None:
        """So many bytes came in so many seconds."""
        seconds = max(seconds, SECONDS_MIN)
        rate = bytes_ / seconds
        old = math.exp(-seconds / self._tau_s) if self.bytes_total else 0.0
        self.rate_bytes_s = self.rate_bytes_s * old + rate * (1.0 - old)
        self.bytes_total += bytes_


__all__ = ["BandwidthLimits", "Limiter", "LinkClass", "RateMeter", "TokenBucket", "link_class"]
