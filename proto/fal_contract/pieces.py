"""How an artifact is cut into pieces: the unit of transfer and of verification. Pure.

Invariant: every process computes the same layout from (kind, file sizes). A piece never spans two files; pieces are
numbered over all files in order of path, from 0; only the last piece of a file is shorter; an empty file has none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from fal_contract.errors import invalid

KINDS: Final = ("model", "lora", "image", "cache")
BLAKE3_BYTES: Final = 32
_MODEL_PIECE_BYTES_MIN: Final = 4 << 20
_MODEL_PIECE_BYTES_MAX: Final = 32 << 20
_MODEL_PIECES_MEANT: Final = 2000  # 24 GB: 16 MiB
_IMAGE_PIECE_BYTES_MIN: Final = 256 << 10
_IMAGE_PIECES_MEANT: Final = 1 << 16  # up to 16 GiB: 256 KiB. Its manifest then has 2 MiB, and a message takes it
_CACHE_PIECE_BYTES: Final = 1 << 20
# What may lie in a swarm: a bitmap of so many pieces is 64 KiB.
PIECES_MAX: Final = 1 << 19


def piece_bytes_of(kind: str, bytes_total: int) -> int:
    """Length of a piece of an artifact of this kind and size: a power of two. INVALID for an unknown kind."""
    if kind not in KINDS:
        raise invalid("kind", kind, "is no kind", remedy=f"Use one of {', '.join(KINDS)}.")
    if kind == "cache":
        return _CACHE_PIECE_BYTES
    if kind == "image":
        size = _IMAGE_PIECE_BYTES_MIN
        while size * _IMAGE_PIECES_MEANT < bytes_total:
            size *= 2
        return size
    size = _MODEL_PIECE_BYTES_MIN
    while size < _MODEL_PIECE_BYTES_MAX and size * _MODEL_PIECES_MEANT < bytes_total:
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class Span:
    """Where a piece lies: index of its file, offset in it, length; all in bytes."""

    file: int
    offset: int
    length: int


class PieceLayout:
    """Pieces of files of these sizes. Immutable."""

    __slots__ = ("_first", "count", "piece_bytes", "sizes")

    def __init__(self, sizes: Sequence[int], piece_bytes: int) -> None:
        if piece_bytes <= 0:
            raise invalid("piece_bytes", piece_bytes, "is not positive", remedy="Register the model again.")
        self.sizes = tuple(sizes)
        self.piece_bytes = piece_bytes
        counts = (-(-size // piece_bytes) for size in self.sizes)
        self._first = (0, *accumulate(counts))  # number of each file's first piece, and of all pieces
        self.count = self._first[-1]
        if self.count > PIECES_MAX:
            raise invalid("pieces", self.count, "are too many", remedy=f"An artifact has at most {PIECES_MAX}.")

    def __len__(self) -> int:
        return self.count

    @property
    def bytes_total(self) -> int:
        """Sum of all files."""
        return sum(self.sizes)

    def span(self, piece: int) -> Span:
        """Where `piece` lies. Raises IndexError."""
        if not 0 <= piece < self.count:
            raise IndexError(piece)
        file = bisect_right(self._first, piece) - 1
        offset = (piece - self._first[file]) * self.piece_bytes
        return Span(file, offset, min(self.piece_bytes, self.sizes[file] - offset))

    def length(self, piece: int) -> int:
        """Bytes of `piece`."""
        return self.span(piece).length

    def of_file(self, file: int) -> range:
        """Pieces of a file."""
        return range(self._first[file], self._first[file + 1])

    def covering(self, file: int, offset: int, length: int) -> range:
        """Pieces that hold [offset, offset+length) of a file, cut at its end; empty where nothing is left."""
        end = min(offset + length, self.sizes[file])
        if offset >= end:
            return range(0)
        first = self._first[file]
        return range(first + offset // self.piece_bytes, first + (end - 1) // self.piece_bytes + 1)

    def spans(self) -> Iterator[Span]:
        """All of them, in order."""
        return (self.span(piece) for piece in range(self.count))


class Bitmap:
    """A set of pieces, one bit each (bit `p % 8` of byte `p // 8`), that knows how many it holds."""

    __slots__ = ("_bits", "count", "size")

    def __init__(self, size: int, pieces: Iterable[int] = ()) -> None:
        self.size = size
        self._bits = bytearray(-(-size // 8))
        self.count = 0
        for piece in pieces:
            self.add(piece)

    @classmethod
    def full(cls, size: int) -> Bitmap:
        """All pieces."""
        return cls.of_bytes(size, b"\xff" * (size // 8) + bytes([(1 << size % 8) - 1] if size % 8 else []))

    @classmethod
    def of_bytes(cls, size: int, raw: bytes) -> Bitmap:
        """From `bytes(bitmap)`. INVALID when the length or a bit beyond the end says that it is another's."""
        if len(raw) != -(-size // 8) or (size % 8 and raw[-1] >> size % 8):
            raise invalid("bitmap", len(raw), f"bytes are no bitmap of {size} pieces", remedy="Drop the peer.")
        made = cls(size)
        made._bits[:] = raw
        made.count = int.from_bytes(raw, "little").bit_count()
        return made

    def __bytes__(self) -> bytes:
        return bytes(self._bits)

    def __contains__(self, piece: int) -> bool:
        return bool(self._bits[piece >> 3] >> (piece & 7) & 1)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for at, byte in enumerate(self._bits):
            while byte:
                low = byte & -byte
                yield (at << 3) + low.bit_length() - 1
                byte ^= low

    def add(self, piece: int) -> bool:
        """True when it was not there. Raises IndexError."""
        if not 0 <= piece < self.size:
            raise IndexError(piece)
        at, bit = piece >> 3, 1 << (piece & 7)
        if self._bits[at] & bit:
            return False
        self._bits[at] |= bit
        self.count += 1
        return True

    def discard(self, piece: int) -> bool:
        """True when it was there."""
        at, bit = piece >> 3, 1 << (piece & 7)
        if not self._bits[at] & bit:
            return False
        self._bits[at] &= ~bit
        self.count -= 1
        return True

    @property
    def complete(self) -> bool:
        """Whether it holds all."""
        return self.count == self.size

    def missing(self) -> Iterator[int]:
        """Pieces that are not in it."""
        return (piece for piece in range(self.size) if piece not in self)

    def as_int(self) -> int:
        """The bits as one number, piece 0 the lowest: for set operations."""
        return int.from_bytes(self._bits, "little")


__all__ = ["BLAKE3_BYTES", "KINDS", "PIECES_MAX", "Bitmap", "PieceLayout", "Span", "piece_bytes_of"]
