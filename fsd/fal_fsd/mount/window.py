"""Which pieces the readers of an artifact will want next. Pure.

Every open file has a window: the pieces that its last read asked for and, while it reads on in order, some beyond them
(doubling with each piece that it enters, up to `AHEAD_BYTES_MAX`), as the kernel's own read-ahead grows. All reads of
an image come through one open file, the loop device's: that two follow each other says less there. A piece is
wanted while it lies in at least one window or a read waits for it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

AHEAD_BYTES_MAX: Final = 64 << 20
IMAGE_AHEAD_BYTES_MAX: Final = 2 << 20
AHEAD_PIECES_MIN: Final = 2  # may be ahead, however big a piece is
HANDLES_MAX: Final = 4096


@dataclass(slots=True)
class _Handle:
    held: range
    asked: range
    ahead: int


class Readers:
    """See the module. Not thread-safe."""

    def __init__(self, piece_bytes: int, ahead_bytes_max: int = AHEAD_BYTES_MAX) -> None:
        self._ahead_max = max(AHEAD_PIECES_MIN, ahead_bytes_max // piece_bytes)
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._wanted: Counter[int] = Counter()

    @property
    def wanted(self) -> frozenset[int]:
        """Pieces in any window or waited for."""
        return frozenset(self._wanted)

    def read(self, handle: int, pieces: range, of_file: range) -> tuple[list[int], list[int]]:
        """A read that covers `pieces` of a file: (newly wanted, no longer wanted). `pieces` is not empty."""
        known = self._handles.get(handle)
        if known is not None and known.asked == pieces:
            return [], []
        ahead = self._ahead(known, pieces, of_file)
        held = range(pieces.start, min(pieces.stop + ahead, of_file.stop))
        self._handles[handle] = _Handle(held, pieces, ahead)
        self._handles.move_to_end(handle)
        added = self.take(held)
        gone = self.give_back(known.held) if known is not None else []
        if len(self._handles) > HANDLES_MAX:
            gone += self.give_back(self._handles.popitem(last=False)[1].held)
        return added, gone

    def _ahead(self, known: _Handle | None, pieces: range, of_file: range) -> int:
        if known is None:
            return 1 if pieces.start == of_file.start else 0  # who begins at the beginning mostly goes on
        if known.asked.start <= pieces.start <= known.asked.stop:
            return min(max(2 * known.ahead, 1), self._ahead_max)
        return 0

    def release(self, handle: int) -> list[int]:
        """The file was closed: pieces that nobody wants now."""
        known = self._handles.pop(handle, None)
        return [] if known is None else self.give_back(known.held)

    def take(self, pieces: Iterable[int]) -> list[int]:
        """A read waits for these: those that nobody wanted before."""
        new = []
        for piece in pieces:
            self._wanted[piece] += 1
            if self._wanted[piece] == 1:
                new.append(piece)
        return new

    def give_back(self, pieces: Iterable[int]) -> list[int]:
        """It does not wait any more: those that nobody wants now."""
        gone = []
        for piece in pieces:
            self._wanted[piece] -= 1
            if not self._wanted[piece]:
                del self._wanted[piece]
                gone.append(piece)
        return gone
