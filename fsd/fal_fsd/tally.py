"""Which bytes of an artifact are here, where they came from and how fast. One event loop. Used by fal_fsd.transfer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fal_contract.artifact import Artifact
from fal_contract.origin_source import origin_source
from fal_contract.pieces import Bitmap
from fal_fsd.core.rates import RateMeter

_WINDOW_S: Final = 5.0
_ORIGINS_MAX: Final = 64
_ORIGIN_SAMPLE_S: Final = 0.1


class Totals:
    """Of all transfers since the start of the process."""

    def __init__(self) -> None:
        self.bytes_from_origin = 0
        self.bytes_from_peers = 0
        self.pieces_bad = 0
        self._origins: OrderedDict[str, _Origin] = OrderedDict()  # by `origin_source`

    def came_from_origin(self, source: str, length: int, now_s: float) -> None:
        """A piece of this origin was stored. The rate is taken over all reads at once; after a pause it begins anew."""
        origin = self._origin(source)
        origin.down = False
        gap_s = now_s - origin.since_s
        if gap_s > _WINDOW_S:
            origin.since_s, origin.bytes = now_s, 0  # how long this piece took is not known
            return
        origin.bytes += length
        if gap_s >= _ORIGIN_SAMPLE_S:
            origin.meter.add(origin.bytes, gap_s)
            origin.since_s, origin.bytes = now_s, 0

    def origin_failed(self, source: str) -> None:
        """It gives nothing, until it does again."""
        self._origin(source).down = True

    def origin_rates(self) -> dict[str, int]:
        """Bytes per second of each origin that was read lately; 0: the last that was tried failed."""
        known = self._origins.items()
        return {i: 0 if x.down else int(x.meter.rate_bytes_s) for i, x in known if x.down or x.meter.bytes_total}

    def _origin(self, source: str) -> _Origin:
        origin = self._origins.setdefault(source, _Origin())
        self._origins.move_to_end(source)
        if len(self._origins) > _ORIGINS_MAX:
            self._origins.popitem(last=False)
        return origin


@dataclass(slots=True)
class _Origin:
    meter: RateMeter = field(default_factory=RateMeter)
    since_s: float = float("-inf")
    bytes: int = 0
    down: bool = False


class Tally:
    """`have`: what is here at the start; `came`: bytes that origin and peers have sent until then."""

    def __init__(
        self,
        artifact: Artifact,
        have: Bitmap,
        now_s: Callable[[], float],
        totals: Totals,
        came: tuple[int, int] = (0, 0),
    ) -> None:
        self._layout = artifact.layout
        self._have = have
        self._now_s = now_s
        self._totals = totals
        self._source = origin_source(artifact.uri)
        self._recent: deque[tuple[float, int]] = deque()
        self._moved = asyncio.Event()
        self.bytes_total = artifact.bytes_total
        self.bytes_done = sum(self._layout.length(piece) for piece in have)
        self.bytes_from_origin, self.bytes_from_peers = came

    @property
    def came(self) -> tuple[int, int]:
        """Bytes from the origin and from peers, since the artifact came here."""
        return self.bytes_from_origin, self.bytes_from_peers

    @property
    def complete(self) -> bool:
        return self._have.complete

    @property
    def rate_bytes_s(self) -> int:
        """Over the last seconds."""
        now_s = self._now_s()
        self._trim(now_s)
        if not self._recent:
            return 0
        span_s = max(now_s - self._recent[0][0], 0.25)
        return int(sum(length for _, length in self._recent) / span_s)

    def uncounted(self, have: Bitmap) -> list[int]:
        """Pieces of `have` that were not told as arrived."""
        more, found = have.as_int() & ~self._have.as_int(), []
        while more:
            low = more & -more
            found.append(low.bit_length() - 1)
            more ^= low
        return found

    def arrived(self, piece: int, *, from_origin: bool) -> None:
        """Idempotent."""
        if not self._have.add(piece):
            return
        length = self._layout.length(piece)
        self.bytes_done += length
        if from_origin:
            self.bytes_from_origin += length
            self._totals.bytes_from_origin += length
            self._totals.came_from_origin(self._source, length, self._now_s())
        else:
            self.bytes_from_peers += length
            self._totals.bytes_from_peers += length
        now_s = self._now_s()
        self._trim(now_s)
        self._recent.append((now_s, length))
        self._wake()

    def origin_failed(self) -> None:
        """A read of it failed."""
        self._totals.origin_failed(self._source)

    def bad(self) -> None:
        """A piece came with a wrong digest."""
        self._totals.pieces_bad += 1

    def lost(self, piece: int) -> None:
        """Idempotent."""
        if self._have.discard(piece):
            self.bytes_done -= self._layout.length(piece)
            self._wake()

    async def moved(self) -> None:
        """Return after the next change."""
        await self._moved.wait()

    def _trim(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - _WINDOW_S:
            self._recent.popleft()

    def _wake(self) -> None:
        event, self._moved = self._moved, asyncio.Event()
        event.set()


__all__ = ["Tally", "Totals"]
