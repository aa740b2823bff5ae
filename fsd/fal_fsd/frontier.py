"""SHA-256 of an artifact's files, computed while their pieces arrive: always up to the first one that is missing.

Invariant: only pieces that are here are read, in order; a piece that is lost again makes its file begin anew. Reads of
a piece that was just written come from the page cache. `advance` blocks and is called by one thread at a time; `lost`
by any. Used by fal_fsd.transfer for artifacts that nobody has attested.
"""

from __future__ import annotations

import hashlib
import os
import threading
from typing import Final

from fal_fsd.ports import Part

_BLOCK_BYTES: Final = 1 << 20


class Frontier:
    """See the module's docstring."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._layout = part.artifact.layout
        self._digests: list[bytes | None] = [None] * len(part.artifact.files)
        self._file = 0
        self._next = 0  # the piece that comes next
        self._hasher = hashlib.sha256()
        self._mutex = threading.Lock()
        self._lost: set[int] = set()

    @property
    def digests(self) -> list[bytes] | None:
        """Of all files, once all are known."""
        return [x for x in self._digests if x is not None] if all(x is not None for x in self._digests) else None

    def lost(self, piece: int) -> None:
        """It is missing again, or has other bytes."""
        with self._mutex:
            self._lost.add(self._layout.span(piece).file)

    def advance(self, stop: threading.Event) -> bool:
        """Hash on as far as there is something; True when all is done. OSError when it cannot be read."""
        while not stop.is_set():
            self._forget_lost()
            if self._file == len(self._digests):
                return True
            pieces = self._layout.of_file(self._file)
            if self._next >= pieces.stop:
                self._digests[self._file] = self._hasher.digest()
                self._begin(self._file + 1)
                continue
            place = self._part.locate(self._next)
            if place is None:
                return False
            self._read(*place)
            self._next += 1
        return False

    def _read(self, fd: int, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            data = os.pread(fd, min(_BLOCK_BYTES, end - offset), offset)
            if not data:
                raise OSError(f"file {self._file} of artifact {self._part.artifact.id[:12]} is shorter than it was")
            self._hasher.update(data)
            offset += len(data)

    def _forget_lost(self) -> None:
        with self._mutex:
            lost, self._lost = self._lost, set()
        for file in lost:
            self._digests[file] = None
        if lost and min(lost) <= self._file:
            self._begin(min(lost))

    def _begin(self, file: int) -> None:
        """At the next file that is not hashed yet."""
        while file < len(self._digests) and self._digests[file] is not None:
            file += 1
        self._file = file
        self._next = self._layout.of_file(file).start if file < len(self._digests) else self._layout.count
        self._hasher = hashlib.sha256()


__all__ = ["Frontier"]
