"""One piece on its way to disk: written and hashed as it comes, in the caller's blocks; nothing is buffered here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from fal_contract.errors import Code, FalError
from fal_contract.pieces import Span
from fal_fsd.disk.tree import disk_error
from fal_fsd.ports import BadPiece


class Counts(Protocol):
    """Where a checked piece is counted: the part."""

    def count_piece(self, piece: int, length: int, digest: bytes, source: str) -> None: ...

    def writer_done(self, piece: int) -> None: ...


class Writer:
    """`ports.PieceWriter`. Used by one thread; ends with `finish` or `abort`, whichever comes first."""

    __slots__ = ("_at", "_ended", "_expect", "_fd", "_hasher", "_part", "_piece", "_root", "_source", "_span")

    def __init__(
        self, part: Counts, piece: int, span: Span, fd: int, *, source: str, expect: bytes | None, root: Path
    ) -> None:
        self._part = part
        self._piece = piece
        self._span = span
        self._fd = fd
        self._source = source
        self._expect = expect
        self._root = root
        self._hasher = blake3()
        self._at = 0
        self._ended = False

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises ValueError beyond the piece's end, FalError when the disk is full or broken."""
        self._check_open()
        if self._at + len(data) > self._span.length:
            raise ValueError(f"piece {self._piece} has {self._span.length} bytes")
        self._hasher.update(data)
        try:
            while data:
                count = os.pwrite(self._fd, data, self._span.offset + self._at)
                data = data[count:]
                self._at += count
        except OSError as exc:
            self.abort()
            raise disk_error(exc, f"writing piece {self._piece}", self._root) from exc

    @property
    def fd(self) -> int:
        """Of the file that the piece lies in."""
        return self._fd

    def took(self, data: memoryview) -> None:
        """Like `write`, for bytes that are in their place already."""
        self._check_open()
        self._hasher.update(data)
        self._at += len(data)

    def finish(self) -> bytes:
        """See ports.PieceWriter. A piece that is too short is a BadPiece."""
        self._check_open()
        try:
            digest = self._hasher.digest()
            if self._at != self._span.length or (self._expect is not None and digest != self._expect):
                raise BadPiece(self._piece, self._source)
            self._part.count_piece(self._piece, self._at, digest, self._source)
        finally:
            self.abort()
        return digest

    def abort(self) -> None:
        """Give it up; idempotent."""
        if not self._ended:
            self._ended = True
            self._part.writer_done(self._piece)

    def _check_open(self) -> None:
        if self._ended:
            raise FalError(Code.CANCELLED, f"writing piece {self._piece} has ended", remedy="Begin again.")
