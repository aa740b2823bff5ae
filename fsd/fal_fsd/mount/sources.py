"""Where the bytes of a mounted artifact come from: its part while it grows, descriptors of our own when it is closed.

Invariant: a descriptor that is read from is valid: the part's while the part is in use, copies afterwards, so that what
is open in a container reads on after the part was finished, moved or evicted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from fal_contract.artifact import Artifact
from fal_contract.pieces import Bitmap
from fal_fsd.ports import Part, PieceWriter

_OPEN_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class FolderPart:
    """`ports.Part` of a finished artifact: plain files below `folder`, opened when they are first read. Thread-safe."""

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        self.artifact = artifact
        self._folder = folder
        self._fds: dict[int, int] = {}

    @property
    def have(self) -> Bitmap:
        return Bitmap.full(self.artifact.layout.count)

    def has(self, piece: int) -> bool:
        return True

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> PieceWriter | None:
        return None

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        span = self.artifact.layout.span(piece)
        fd = self._fds.get(span.file)
        if fd is None:
            made = os.open(self.file_path(span.file), _OPEN_FLAGS)
            fd = self._fds.setdefault(span.file, made)
            if fd != made:  # another thread was faster
                os.close(made)
        return fd, span.offset, span.length

    def digest_of(self, piece: int) -> bytes | None:
        return self.artifact.hashes[piece] if self.artifact.hashes is not None else None

    def file_path(self, file: int) -> Path:
        return self._folder / self.artifact.files[file].path

    def close(self) -> None:
        """Close its files."""
        while self._fds:
            os.close(self._fds.popitem()[1])


class Kept:
    """What of a part was here when its mount was closed, on descriptors of our own. Read-only once made."""

    def __init__(self, part: Part, *, nothing: bool = False) -> None:
        self.artifact = part.artifact
        self._have = Bitmap(part.artifact.layout.count) if nothing else part.have
        self._fds: dict[int, int] = {}  # the part's descriptor → ours
        self._files: dict[int, tuple[int, int]] = {}  # file → (ours, offset there of its first byte)
        self._odd: dict[int, tuple[int, int, int]] = {}  # pieces that lie elsewhere
        try:
            for piece in self._have:
                found = part.locate(piece)
                if found is None:
                    self._have.discard(piece)
                else:
                    self._keep(piece, *found)
        except BaseException:
            self.close()
            raise

    def _keep(self, piece: int, fd: int, offset: int, length: int) -> None:
        if fd not in self._fds:
            self._fds[fd] = os.dup(fd)
        ours, span = self._fds[fd], self.artifact.layout.span(piece)
        if self._files.setdefault(span.file, (ours, offset - span.offset)) != (ours, offset - span.offset):
            self._odd[piece] = (ours, offset, length)

    def has(self, piece: int) -> bool:
        return piece in self._have

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        if piece not in self._have:
            return None
        if piece in self._odd:
            return self._odd[piece]
        span = self.artifact.layout.span(piece)
        ours, base = self._files[span.file]
        return ours, base + span.offset, span.length

    def close(self) -> None:
        """Close the descriptors."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def segments(source: Part | Kept, pieces: range, offset: int, size: int) -> list[tuple[int, int, int]] | None:
    """What to read for [offset, offset + size) of the file that `pieces` cover: (descriptor, its offset, bytes).

    None when a piece is not here any more. Neighbours in one descriptor are one segment.
    """
    layout = source.artifact.layout
    found: list[tuple[int, int, int]] = []
    for piece in pieces:
        at = source.locate(piece)
        if at is None:
            return None
        fd, base, length = at
        start = layout.span(piece).offset
        low, high = max(offset, start), min(offset + size, start + length)
        here = base + low - start
        if found and found[-1][0] == fd and sum(found[-1][1:]) == here:
            found[-1] = (fd, found[-1][1], found[-1][2] + high - low)
        else:
            found.append((fd, here, high - low))
    return found


__all__ = ["FolderPart", "Kept", "segments"]
