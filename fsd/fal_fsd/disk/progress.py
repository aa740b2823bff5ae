"""What is written down about a part: which pieces are durable, their digests, and which came last.

    bits      head, bitmap, SHA-256 of both; replaced whole. Only pieces whose bytes were synced before.
    digests   32 bytes a piece, at 32 x piece; of a part that nobody has attested. Synced before `bits`.
    recent    (piece, BLAKE3) of pieces that were checked since `bits` was written; never synced.

After kill -9 `recent` is still there, because the kernel holds it: its pieces are hashed again and counted when they
are what it says. After a power failure it may be anything, and then its pieces are fetched again.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import FalError
from fal_contract.pieces import BLAKE3_BYTES, Bitmap
from fal_fsd.disk.tree import write_all, write_durable

_HEAD: Final = struct.Struct("<12s64sI")
_MAGIC: Final = b"fal-bits 1\n\0"
_RECENT: Final = struct.Struct(f"<I{BLAKE3_BYTES}s")
_RECENT_BYTES_MAX: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Discarded:
    """A piece that was here and is not what was attested. `source` sent it; empty when that is not known any more."""

    piece: int
    digest: bytes
    source: str


class Progress:
    """The three files of one part, in its folder. Not thread-safe: the part's locks guard it."""

    def __init__(self, folder: Path, artifact_id: str, count: int) -> None:
        self._folder = folder
        self._id = artifact_id.encode()
        self._count = count
        self._recent_fd = os.open(folder / "recent", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._digests_fd = -1

    def close(self) -> None:
        """Idempotent."""
        for fd in (self._recent_fd, self._digests_fd):
            if fd >= 0:
                os.close(fd)
        self._recent_fd = self._digests_fd = -1

    # ---- bits

    def load(self) -> Bitmap:
        """The durable pieces; none when the file is missing, damaged or another's."""
        return read_bits(self._folder, self._id.decode(), self._count) or Bitmap(self._count)

    def save(self, durable: Bitmap) -> None:
        """Write `bits`. Raises OSError: then the old ones hold."""
        head = _HEAD.pack(_MAGIC, self._id, self._count)
        body = bytes(durable)
        write_durable(self._folder / "bits", head, body, hashlib.sha256(head + body).digest())

    # ---- recent

    def note(self, piece: int, digest: bytes) -> None:
        """A piece was checked. Losing this costs one fetch, so errors are the next sync's to find."""
        os.write(self._recent_fd, _RECENT.pack(piece, digest))

    def forget_recent(self, still: Iterable[tuple[int, bytes]] = ()) -> None:
        """All but these are durable now."""
        os.ftruncate(self._recent_fd, 0)
        for piece, digest in still:
            self.note(piece, digest)

    def recent(self) -> Iterator[tuple[int, bytes]]:
        """What an earlier process noted last; may hold nonsense."""
        raw = os.pread(self._recent_fd, _RECENT_BYTES_MAX, 0)
        for at in range(0, len(raw) - _RECENT.size + 1, _RECENT.size):
            piece, digest = _RECENT.unpack_from(raw, at)
            if piece < self._count:
                yield piece, digest

    # ---- digests

    def save_digests(self, digests: Iterable[tuple[int, bytes]]) -> None:
        """Durable when this returns."""
        fd = self._digests()
        for piece, digest in digests:
            write_all(fd, memoryview(digest), piece * BLAKE3_BYTES)
        os.fdatasync(fd)

    def load_digest(self, piece: int) -> bytes | None:
        """As written by `save_digests`; None where nothing was."""
        digest = os.pread(self._digests(), BLAKE3_BYTES, piece * BLAKE3_BYTES)
        return digest if len(digest) == BLAKE3_BYTES and any(digest) else None

    def _digests(self) -> int:
        if self._digests_fd < 0:
            self._digests_fd = os.open(self._folder / "digests", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._digests_fd


def read_bits(folder: Path, artifact_id: str, count: int) -> Bitmap | None:
    """The durable pieces of the part in `folder`; None when there are no sound bits of this artifact."""
    try:
        raw = (folder / "bits").read_bytes()
    except OSError:
        return None
    head = _HEAD.pack(_MAGIC, artifact_id.encode(), count)
    body, digest = raw[len(head) : -32], raw[-32:]
    if raw[: len(head)] != head or hashlib.sha256(head + body).digest() != digest:
        return None
    try:
        return Bitmap.of_bytes(count, body)
    except FalError:
        return None
