"""What the scheduler's edge tells the core of weight caches: the facts that placement looks at, and no more.

Pure. News: never stored, told again by each cache's next Hello. The edge (`cache_telling`) rounds and coalesces, so
that a log of events stays small; nothing of a cache reaches a decision by another way, so a replay is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CachedFact:
    """An artifact on a node. Bytes checked on disk, of them locked in memory.

    `bytes_left`, `rate_bytes_s`: what is still to come and how fast it arrives, while it is `fetching`.
    """

    bytes_here: int
    bytes_memory: int = 0
    ready: bool = False
    fetching: bool = False
    bytes_left: int = 0
    rate_bytes_s: int = 0


@dataclass(frozen=True, slots=True)
class CacheTold:
    """What changed in a node's cache. `arrived_s`: monotonic.

    `rates`: bytes per second towards the node by source ("origin:HOST", "peer:NODE", "disk"); 0: it does not answer.
    `fed_bytes_s`: the most that all its fetches together were measured at, None: as before. `whole`: everything that
    is not in this message is not there. `left`: the node is forgotten, the rest of the message is empty.
    """

    node_id: str
    arrived_s: float
    put: Mapping[str, CachedFact] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    rates: Mapping[str, int] = field(default_factory=dict)
    fed_bytes_s: int | None = None
    whole: bool = False
    left: bool = False


@dataclass(frozen=True, slots=True)
class PeerReach:
    """A silent node is still reached by the cache of a node `by` of another failure domain. `arrived_s`: monotonic."""

    node_id: str
    by: str
    arrived_s: float


__all__ = ["CacheTold", "CachedFact", "PeerReach"]
