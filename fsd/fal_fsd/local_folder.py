"""A folder on an operator's machine as an artifact: listed, hashed once, then read piece by piece.

Invariants: nothing but plain files is taken, links only where they stay in the folder; a file that is not what it was
when it was listed (size or change time) gives no byte, and `LocalPart.changed` names it. Used by fal_fsd.push.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

from fal_contract.artifact import Artifact, ArtifactFile, check_listing, listing_id
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import MODEL_FILES_MAX
from fal_contract.model_manifest import check_path
from fal_contract.pieces import Bitmap, PieceLayout, piece_bytes_of
from fal_fsd.origin import is_pickle
from fal_fsd.ports import PieceWriter

_DEPTH_MAX: Final = 16
_BLOCK_BYTES: Final = 4 << 20
_FILES_OPEN_MAX: Final = 64
_THREADS_MAX: Final = 8
OnBytes = Callable[[int], None]  # bytes hashed since the last call; called in threads


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of the folder: path below it, where its bytes are, size and change time when it was listed."""

    path: str
    real: Path
    size_bytes: int
    changed_ns: int

    def same(self, facts: os.stat_result) -> bool:
        """Whether it is as it was listed."""
        return stat.S_ISREG(facts.st_mode) and (facts.st_size, facts.st_mtime_ns) == (self.size_bytes, self.changed_ns)

    def unchanged(self) -> bool:
        """Whether it is there as it was listed."""
        try:
            return self.same(self.real.stat())
        except OSError:
            return False


def list_folder(folder: Path, *, allow_pickle: bool = False) -> tuple[LocalFile, ...]:
    """Its files in order of path. INVALID naming the first that may not be in a model."""
    try:
        root = folder.resolve(strict=True)
    except OSError as exc:
        raise invalid("DIR", str(folder), f"cannot be read: {exc.strerror}", remedy="Name a folder.") from None
    if not root.is_dir():
        raise invalid("DIR", str(folder), "is no folder", remedy="Name the folder that holds the model's files.")
    files: list[LocalFile] = []
    for file in _walk(root, root, "", 0):
        if is_pickle(file.path) and not allow_pickle:
            raise invalid(
                "file",
                file.path,
                "may hold a pickle, which runs code when it is loaded",
                remedy="Convert it to safetensors, take it out of the folder, or trust its author with --allow-pickle.",
            )
        files.append(file)
        if len(files) > MODEL_FILES_MAX:
            raise invalid("DIR", str(folder), "has too many files", remedy=f"A model has at most {MODEL_FILES_MAX}.")
    if not sum(file.size_bytes for file in files):
        raise invalid("DIR", str(folder), "holds no byte", remedy="Name the folder that holds the model's files.")
    return tuple(sorted(files, key=lambda file: file.path.encode()))


def _walk(root: Path, folder: Path, above: str, depth: int) -> Iterator[LocalFile]:
    if depth > _DEPTH_MAX:
        raise invalid("DIR", above, f"is nested deeper than {_DEPTH_MAX} folders", remedy="Flatten the model's folder.")
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as exc:
        raise invalid("DIR", above, f"cannot be read: {exc.strerror}", remedy="Correct its permissions.") from None
    for entry in entries:
        path = f"{above}{entry.name}"
        check_path(path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, folder / entry.name, f"{path}/", depth + 1)
        else:
            yield _local(root, folder / entry.name, path)


def _local(root: Path, where: Path, path: str) -> LocalFile:
    try:
        real = where.resolve(strict=True)
        facts = real.stat()
    except (OSError, RuntimeError) as exc:  # RuntimeError: links in a circle
        why = getattr(exc, "strerror", None) or "its links end nowhere"
        raise invalid("file", path, f"cannot be read: {why}", remedy="Repair or remove it.") from None
    if not real.is_relative_to(root):
        raise invalid("file", path, "is a link that leaves the folder", remedy="Copy the file into the folder.")
    if not stat.S_ISREG(facts.st_mode):
        raise invalid("file", path, "is not a regular file", remedy="A model holds files and folders only.")
    return LocalFile(path, real, facts.st_size, facts.st_mtime_ns)


def hash_folder(
    files: tuple[LocalFile, ...], uri: str, kind: str, *, stop: threading.Event, on_bytes: OnBytes = lambda count: None
) -> Artifact:
    """The artifact that the files are: SHA-256 of each, BLAKE3 of every piece, not signed. Blocks; reads each once.

    CONFLICT when a file changes meanwhile, CANCELLED once `stop` is set, INVALID for what can be no model.
    """
    piece_bytes = piece_bytes_of(kind, sum(file.size_bytes for file in files))
    PieceLayout([file.size_bytes for file in files], piece_bytes)  # too many pieces are refused before the work
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS_MAX), thread_name_prefix="hash") as pool:
        jobs = [pool.submit(_digests, file, piece_bytes, stop, on_bytes) for file in files]
        done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        failed = next((error for job in done if (error := job.exception()) is not None), None)
        if failed is not None:
            for job in jobs:
                job.cancel()
            stop.set()
            raise failed
    found = [job.result() for job in jobs]
    listed = tuple(ArtifactFile(x.path, x.size_bytes, sha256=sha) for x, (sha, _) in zip(files, found, strict=True))
    check_listing(listed)
    hashes = tuple(digest for _, pieces in found for digest in pieces)
    return Artifact(listing_id(uri, listed), kind, uri, piece_bytes, listed, hashes)


def _digests(file: LocalFile, piece_bytes: int, stop: threading.Event, on_bytes: OnBytes) -> tuple[bytes, list[bytes]]:
    whole, pieces, at = hashlib.sha256(), [], 0
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, max(file.size_bytes, 1))))
    try:
        fd = os.open(file.real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        raise changed(file.path) from None
    try:
        while at < file.size_bytes:
            piece, end = blake3(), min(at + piece_bytes, file.size_bytes)
            while at < end:
                if stop.is_set():
                    raise FalError(Code.CANCELLED, "hashing was ended", remedy="Push again.")
                count = os.preadv(fd, [buffer[: end - at]], at)
                if not count:
                    raise changed(file.path)
                whole.update(buffer[:count])
                piece.update(buffer[:count])
                at += count
                on_bytes(count)
            pieces.append(piece.digest())
        if not file.same(os.fstat(fd)):
            raise changed(file.path)
    finally:
        os.close(fd)
    return whole.digest(), pieces


def changed(path: str) -> FalError:
    """A file is not what was listed and hashed."""
    return FalError(
        Code.CONFLICT,
        f"{path} changed while it was pushed",
        remedy="Nothing was attested. Push again once its writer has ended.",
        field=path,
    )


class LocalPart:
    """The files, to be sent: `ports.Part` that has everything and takes nothing. Thread-safe; close it."""

    def __init__(self, artifact: Artifact, files: tuple[LocalFile, ...]) -> None:
        self.artifact = artifact
        self.changed = ""  # path of a file that is not what it was
        self.located: set[int] = set()  # pieces that were sent, or were about to be
        self._files = files
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()  # file → descriptor

    @property
    def have(self) -> Bitmap:
        every = Bitmap(self.artifact.layout.count)
        for piece in range(every.size):
            every.add(piece)
        return every

    def has(self, piece: int) -> bool:
        return 0 <= piece < self.artifact.layout.count and not self.changed

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> PieceWriter | None:
        return None

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        """As `ports.Part`, but the descriptor is good only until _FILES_OPEN_MAX other files were located: one thread
        at a time asks, and makes its own of it at once."""
        span = self.artifact.layout.span(piece)
        file = self._files[span.file]
        with self._lock:
            try:
                fd = self._descriptor(span.file)
                same = file.same(os.fstat(fd))
            except OSError:
                same = False
            if not same:
                self.changed = self.changed or file.path
                return None
            self.located.add(piece)
        return fd, span.offset, span.length

    def _descriptor(self, index: int) -> int:
        fd = self._open.pop(index, -1)
        if fd < 0:
            fd = os.open(self._files[index].real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        self._open[index] = fd
        if len(self._open) > _FILES_OPEN_MAX:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def digest_of(self, piece: int) -> bytes | None:
        assert self.artifact.hashes is not None
        return self.artifact.hashes[piece]

    def file_path(self, file: int) -> Path:
        return self._files[file].real

    def look(self, doubtful: Iterable[int] = ()) -> str:
        """Path of a file that is not what it was; empty: all are. Blocks. Pieces that are `doubtful` are read again:
        change times can lie."""
        for file in self._files:
            if not self.changed and not file.unchanged():
                self.changed = file.path
        for piece in doubtful:
            if not self.changed and not self._right(piece):
                self.changed = self._files[self.artifact.layout.span(piece).file].path
        return self.changed

    def _right(self, piece: int) -> bool:
        span = self.artifact.layout.span(piece)
        try:
            with self._files[span.file].real.open("rb", buffering=0) as stream:
                data = os.pread(stream.fileno(), span.length, span.offset)
        except OSError:
            return False
        return blake3(data).digest() == self.digest_of(piece)

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


__all__ = ["LocalFile", "LocalPart", "changed", "hash_folder", "list_folder"]
