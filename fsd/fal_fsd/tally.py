"""Which bytes of an artifact are here, where they came from and how fast. One event loop. Used by fal_fsd.transfer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from fal_contract.artifact import Artifact
from fal_contract.pieces import Bitmap

_WINDOW_S: Final = 5.0


class Totals:
    """Of all transfers since the start of the process."""

    def __init__(self) -> None:
        self.bytes_from_origin = 0
        self.bytes_from_peers = 0
        self.pieces_bad = 0


class Tally:
    """`have`: what is here at the start."""

    def __init__(self, artifact: Artifact, have: Bitmap, now_s: Callable[[], float], totals: Totals) -> None:
        self._layout = artifact.layout
        self._have = have
        self._now_s = now_s
        self._totals = totals
        self._recent: deque[tuple[float, int]] = deque()
        self._moved = asyncio.Event()
        self.bytes_total = artifact.bytes_total
        self.bytes_done = sum(self._layout.length(piece) for piece in have)
        self.bytes_from_origin = 0
        self.bytes_from_peers = 0

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
        else:
            self.bytes_from_peers += length
            self._totals.bytes_from_peers += length
        now_s = self._now_s()
        self._trim(now_s)
        self._recent.append((now_s, length))
        self._wake()

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
