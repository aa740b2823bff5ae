"""One artifact's bytes on disk, on their way or finished: `ports.Part`.

Invariants: a piece is in `have` only after its digest was checked; in `durable` only after its bytes were synced, and
`bits` is written after that. At most SYNC_BATCH_BYTES of checked pieces are not durable at any time: a writer that
would exceed it waits for the sync. A file that is shared (a blob, a tree) is never written: it is copied first.

Locks: `_sync` (taken first) serialises sync, attestation, verification and finishing; `changed` guards the rest and is
notified whenever a piece is counted or becomes durable.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from fal_contract.artifact import Artifact
from fal_contract.errors import Code, FalError, invalid
from fal_contract.pieces import Bitmap
from fal_fsd.disk import reading
from fal_fsd.disk.progress import Discarded, Progress
from fal_fsd.disk.reading import Cancelled
from fal_fsd.disk.tree import copy_file, disk_error
from fal_fsd.disk.writer import Writer
from fal_fsd.ports import BadPiece

SYNC_BATCH_BYTES: Final = 64 << 20
SYNC_WAIT_MAX_S: Final = 60.0  # a disk that syncs 64 MiB no faster is broken
_STOP_POLL_S: Final = 0.25


class DiskPart:
    """See the module. Made by `DiskStore.open_part` only. `paths`: where each file's bytes are."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        root: Path,
        paths: Sequence[Path],
        have: Bitmap,
        progress: Progress | None,
        want_sync: Callable[[DiskPart], None],
        on_closed: Callable[[DiskPart], None],
    ) -> None:
        self.changed = threading.Condition()
        self.sync_lock = threading.RLock()
        self._artifact = artifact
        self._root = root
        self._paths = list(paths)
        self._have = have
        self._durable = Bitmap.of_bytes(have.size, bytes(have))
        self._progress = progress  # None: finished
        self._want_sync = want_sync
        self._on_closed = on_closed
        self.discarded: list[Discarded] = []  # by the attestation that it was opened with
        self._fds: list[int] = [-1] * len(paths)
        self._writable = [False] * len(paths)
        self._spare_fds: list[int] = []
        self._digests: dict[int, bytes] = {}
        self._sources: dict[int, str] = {}
        self._writing: set[int] = set()
        self._pending: dict[int, int] = {}  # piece -> bytes, checked and not durable
        self._pending_bytes = 0
        self._bytes_done = sum(artifact.layout.length(piece) for piece in have)
        self._discards = 0
        self._failure: FalError | None = None
        self._gone = ""
        self._closed = False

    # ---- ports.Part

    @property
    def artifact(self) -> Artifact:
        return self._artifact

    @property
    def have(self) -> Bitmap:
        """A copy."""
        with self.changed:
            return Bitmap.of_bytes(self._have.size, bytes(self._have))

    def has(self, piece: int) -> bool:
        return piece in self._have

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> Writer | None:
        """See ports.Part. Raises FalError: the disk failed at the last sync, the artifact was dropped."""
        with self.changed:
            self._check_usable()
            if piece in self._have or piece in self._writing:
                return None
            span = self._artifact.layout.span(piece)
            try:
                fd = self._fd(span.file, write=True)
            except OSError as exc:
                raise disk_error(exc, f"writing artifact {self._artifact.id[:12]}", self._root) from exc
            self._writing.add(piece)
        return Writer(self, piece, span, fd, source=source, expect=expect, root=self._root)

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        """See ports.Part. None too when the artifact was dropped."""
        with self.changed:
            if piece not in self._have or self._gone or self._closed:
                return None
            span = self._artifact.layout.span(piece)
            return self._fd(span.file, write=False), span.offset, span.length

    def digest_of(self, piece: int) -> bytes | None:
        """BLAKE3 of a piece that is here: as attested, as written down, or taken from the bytes."""
        with self.changed:
            if piece not in self._have:
                return None
            if self._artifact.hashes is not None:
                return self._artifact.hashes[piece]
            known = self._digests.get(piece) or (self._progress.load_digest(piece) if self._progress else None)
        digest = known or self.read_digest(piece)
        if digest is not None:
            with self.changed:
                self._digests.setdefault(piece, digest)
        return digest

    def file_path(self, file: int) -> Path:
        with self.changed:
            return self._paths[file]

    # ---- more for the node

    @property
    def bytes_done(self) -> int:
        """Of the pieces that are here."""
        return self._bytes_done

    @property
    def complete(self) -> bool:
        """Whether every piece is here; not whether it is READY."""
        return self._have.complete

    @property
    def finished(self) -> bool:
        """Whether its files are READY."""
        return self._progress is None

    @property
    def bytes_unsynced(self) -> int:
        """Of checked pieces that a power failure would lose; at most SYNC_BATCH_BYTES."""
        return self._pending_bytes

    @property
    def busy(self) -> bool:
        """Whether pieces are missing and this part is open: somebody brings them."""
        return not self._closed and not self._have.complete

    def sha256_of(self, file: int, stop: threading.Event) -> bytes:
        """SHA-256 of a file, read in order as its pieces come: waits for those that are missing. Raises Cancelled."""
        while True:
            discards = self._discards
            digest = reading.sha256_of(self, file, lambda piece: self._wait_for(piece, stop))
            with self.changed:
                if discards == self._discards:  # else a piece was taken back meanwhile
                    return digest

    def _wait_for(self, piece: int, stop: threading.Event) -> None:
        with self.changed:
            while not stop.is_set() and piece not in self._have and not self._closed and not self._gone:
                self.changed.wait(_STOP_POLL_S)
            if stop.is_set() or self._closed or self._gone:
                raise Cancelled

    def read_digest(self, piece: int) -> bytes | None:
        """BLAKE3 of the bytes that are where the piece belongs; None when the file is shorter. Raises OSError."""
        return reading.blake3_of(self, piece)

    def place(self, piece: int) -> tuple[int, int, int]:
        """(file descriptor, offset, length) of where the piece belongs, whether it is here or not."""
        with self.changed:
            if self._closed:
                raise Cancelled
            span = self._artifact.layout.span(piece)
            return self._fd(span.file, write=False), span.offset, span.length

    # ---- called by writers

    def count_piece(self, piece: int, length: int, digest: bytes, source: str) -> None:
        """The piece has this digest. Waits while a whole batch is not durable.

        Raises BadPiece when the attested digest is another, FalError when the disk failed.
        """
        with self.changed:
            while self._pending and self._pending_bytes + length > SYNC_BATCH_BYTES and not self._failure:
                self._want_sync(self)
                if not self.changed.wait(SYNC_WAIT_MAX_S):
                    raise FalError(
                        Code.STORE_FAILED,
                        f"the cache disk did not sync {self._pending_bytes} bytes in {SYNC_WAIT_MAX_S:.0f} s",
                        remedy="Look at the cache disk.",
                    )
            self._check_usable()
            if self._artifact.hashes is not None and self._artifact.hashes[piece] != digest:
                raise BadPiece(piece, source)
            if not self._have.add(piece):
                return
            self._bytes_done += length
            self._pending[piece] = length
            self._pending_bytes += length
            self._sources[piece] = source
            if self._artifact.hashes is None:
                self._digests[piece] = digest
            if self._progress is not None:
                with contextlib.suppress(OSError):
                    self._progress.note(piece, digest)
            if self._pending_bytes * 2 >= SYNC_BATCH_BYTES or self._have.complete:
                self._want_sync(self)
            self.changed.notify_all()

    def writer_done(self, piece: int) -> None:
        """The piece may be written by another."""
        with self.changed:
            self._writing.discard(piece)
            self.changed.notify_all()

    def fill_file(self, file: int, fill: Callable[[int], bool]) -> bool:
        """Let `fill` put content into a file of which nothing is here or on its way; whether it did. Counts nothing."""
        with self.changed:
            self._check_usable()
            pieces = self._artifact.layout.of_file(file)
            if any(piece in self._have or piece in self._writing for piece in pieces):
                return False
            fd = self._fd(file, write=True)
            return fill(fd)

    # ---- durability

    def sync(self) -> list[int]:
        """Make the checked pieces durable; those that could not be written are taken back and returned.

        The next `writer` then raises why.
        """
        with self.sync_lock:
            with self.changed:
                if not self._pending or self._progress is None:
                    return []
                batch = dict(self._pending)
                files = {self._artifact.layout.span(piece).file for piece in batch}
                fds = [self._fds[file] for file in files]
                digests = [(piece, self._digests[piece]) for piece in batch if piece in self._digests]
            try:
                for fd in fds:
                    os.fdatasync(fd)
                if digests:
                    self._progress.save_digests(digests)
            except OSError as exc:
                return self._take_back(list(batch), disk_error(exc, "syncing pieces", self._root))
            return self._save_bits(batch)

    def _save_bits(self, batch: dict[int, int]) -> list[int]:
        assert self._progress is not None
        with self.changed:
            durable = Bitmap.of_bytes(self._durable.size, bytes(self._durable))
            for piece in batch:
                durable.add(piece)
        try:
            self._progress.save(durable)
        except OSError as exc:
            # The bytes are safe, the note is not: they count, stay pending, and the next sync tries again.
            with self.changed:
                self._failure = disk_error(exc, "writing down which pieces are durable", self._root)
                self.changed.notify_all()
            return []
        with self.changed:
            self._durable = durable
            self._failure = None
            for piece, length in batch.items():
                if self._pending.pop(piece, None) is not None:
                    self._pending_bytes -= length
            with contextlib.suppress(OSError):
                self._progress.forget_recent(self._pending_digests())
            self.changed.notify_all()
        return []

    def _take_back(self, pieces: list[int], failure: FalError) -> list[int]:
        with self.changed:
            self._failure = failure
            self._drop_bits(pieces)
            self.changed.notify_all()
        return pieces

    def _drop_bits(self, pieces: Iterable[int]) -> None:
        for piece in pieces:
            if self._have.discard(piece):
                self._bytes_done -= self._artifact.layout.length(piece)
            self._durable.discard(piece)
            self._pending_bytes -= self._pending.pop(piece, 0)
            self._digests.pop(piece, None)
            self._sources.pop(piece, None)
        self._discards += 1

    def discard(self, pieces: Sequence[int]) -> None:
        """Take pieces back, durably before anybody writes them again. Raises FalError when that fails."""
        with self.sync_lock:
            with self.changed:
                self._drop_bits(pieces)
                self._writing.update(pieces)  # nobody writes them while the old bits still tell that they are here
                durable = Bitmap.of_bytes(self._durable.size, bytes(self._durable))
            try:
                if self._progress is not None:
                    self._progress.save(durable)
                    self._progress.forget_recent(self._pending_digests())
            except OSError as exc:
                raise disk_error(exc, "taking pieces back", self._root) from exc
            finally:
                with self.changed:
                    self._writing.difference_update(pieces)
                    self.changed.notify_all()

    def recover(self) -> int:
        """Count what an earlier process had checked but not synced, if its bytes are still so. How many pieces."""
        assert self._progress is not None
        found = 0
        for piece, digest in list(self._progress.recent()):
            hashes = self._artifact.hashes
            expected = digest if hashes is None else hashes[piece]
            if piece in self._have or self.read_digest(piece) != expected:
                continue
            self.count_piece(piece, self._artifact.layout.length(piece), expected, "")
            found += 1
        self.sync()
        return found

    # ---- attestation and the end

    def attest(self, artifact: Artifact) -> list[Discarded]:
        """From now on these digests count; pieces that differ are taken back and returned. INVALID: another's."""
        mine = self._artifact
        same = [(x.path, x.size_bytes) for x in mine.files] == [(x.path, x.size_bytes) for x in artifact.files]
        if artifact.id != mine.id or artifact.hashes is None or not same or artifact.piece_bytes != mine.piece_bytes:
            raise invalid("artifact", artifact.id[:12], "does not match the part", remedy="Register the model again.")
        hashes = artifact.hashes
        with self.sync_lock:
            if mine.hashes is not None:
                return []
            compared = self.have
            bad = {piece for piece in compared if not self._is(piece, hashes[piece])}
            with self.changed:
                self._artifact = artifact  # from here on `count_piece` compares
                late = {piece for piece in self._have if piece not in compared}
                bad |= {piece for piece in late if self._digests[piece] != hashes[piece]}
                told = [Discarded(x, self._digests.get(x, b""), self._sources.get(x, "")) for x in sorted(bad)]
                self._drop_bits(bad)
                self._writing.update(bad)
                self._digests.clear()
            if bad:
                self.discard(sorted(bad))
            return told

    def _is(self, piece: int, digest: bytes) -> bool:
        # What was written down may itself be damaged: nobody is blamed before the bytes were read.
        return self.digest_of(piece) == digest or self.read_digest(piece) == digest

    def become_finished(self, paths: Sequence[Path]) -> None:
        """Its files are READY at `paths`; open descriptors go on."""
        with self.changed:
            self._paths = list(paths)
            progress, self._progress = self._progress, None
            self._writable = [False] * len(paths)
            if progress is not None:
                progress.close()

    def become_part(self, paths: Sequence[Path], bad: Iterable[int], progress: Progress) -> None:
        """Its files were found damaged: they are now at `paths`, without the pieces `bad`. Under `sync_lock`."""
        with self.changed:
            self._spare_fds += [fd for fd in self._fds if fd >= 0]
            self._fds, self._writable = [-1] * len(paths), [False] * len(paths)
            self._paths, self._progress = list(paths), progress
            self._drop_bits(bad)
            self.changed.notify_all()

    def mark_gone(self, why: str) -> None:
        """The artifact was dropped: nothing is located or written from now on; descriptors stay until `close`."""
        with self.changed:
            self._gone = why
            self.changed.notify_all()

    def close(self) -> None:
        """Sync and let go; idempotent. Its writers must have ended (those that have not are waited for, bounded)."""
        if not self._gone:
            self.sync()
        with self.sync_lock, self.changed:
            self._closed = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self._writing, SYNC_WAIT_MAX_S)
            for fd in {*self._fds, *self._spare_fds} - {-1}:
                os.close(fd)
            self._fds, self._spare_fds = [-1] * len(self._fds), []
            if self._progress is not None:
                self._progress.close()
        self._on_closed(self)

    @property
    def gone(self) -> bool:
        """Whether the artifact was dropped since this was opened."""
        return bool(self._gone)

    @property
    def closed(self) -> bool:
        return self._closed

    # ---- inside; under `changed`

    def _pending_digests(self) -> Iterator[tuple[int, bytes]]:
        for piece in self._pending:
            digest = self._digests.get(piece) if self._artifact.hashes is None else self._artifact.hashes[piece]
            if digest is not None:
                yield piece, digest

    def _check_usable(self) -> None:
        if self._gone or self._closed:
            raise FalError(
                Code.CANCELLED,
                f"artifact {self._artifact.id[:12]} {self._gone or 'was closed'}",
                remedy="Stage it again.",
            )
        if self._failure is not None:
            failure, self._failure = self._failure, None  # told once: the next attempt finds out anew
            raise failure

    def _fd(self, file: int, *, write: bool) -> int:
        """Open, and kept open. For writing never the inode of a blob or a tree."""
        if self._fds[file] >= 0 and (self._writable[file] or not write):
            return self._fds[file]
        path = self._paths[file]
        if not write:
            self._fds[file] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            return self._fds[file]
        if self._progress is None:
            raise FalError(Code.FAILED_PRECONDITION, "a finished artifact is not written", remedy="Verify it first.")
        if path.stat().st_nlink > 1:
            fresh = path.with_name(f"{path.name}.new")
            copy_file(path, fresh)
            os.rename(fresh, path)
        path.chmod(0o644)
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        if self._fds[file] >= 0:
            self._spare_fds.append(self._fds[file])  # somebody may be sending from it
        self._fds[file], self._writable[file] = fd, True
        return fd
