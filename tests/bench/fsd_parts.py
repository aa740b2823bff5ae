"""Parts for benchmarks of the bulk port: files of a folder, whole or on their way, with BLAKE3 checked as pieces come."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from blake3 import blake3

from fal_contract.artifact import Artifact, ArtifactFile, listing_id
from fal_contract.pieces import Bitmap, piece_bytes_of
from fal_fsd.ports import BadPiece


def artifact_of_folder(folder: Path) -> Artifact:
    """The artifact of all files in `folder`; BLAKE3 of every piece is read from file `.hashes` beside it, or made."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = tuple(ArtifactFile(path.name, path.stat().st_size, version="bench", sha256=bytes(32)) for path in paths)
    piece_bytes = piece_bytes_of("model", sum(file.size_bytes for file in files))
    bare = Artifact(listing_id("file:///bench", files), "model", "file:///bench", piece_bytes, files)
    cached = folder / ".hashes"
    if not cached.exists():
        fds = [os.open(path, os.O_RDONLY) for path in paths]
        cached.write_bytes(
            b"".join(blake3(os.pread(fds[x.file], x.length, x.offset)).digest() for x in bare.layout.spans())
        )
        for fd in fds:
            os.close(fd)
    raw = cached.read_bytes()
    hashes = tuple(raw[at : at + 32] for at in range(0, len(raw), 32))
    return Artifact(bare.id, bare.kind, bare.uri, piece_bytes, files, hashes)


class FolderPart:
    """`ports.Part` on plain files: of a folder that has them all, or (`empty`) of new ones."""

    def __init__(self, artifact: Artifact, folder: Path, *, empty: bool = False) -> None:
        self.artifact = artifact
        self._folder = folder
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT if empty else os.O_RDONLY
        self._fds = [os.open(folder / file.path, flags, 0o600) for file in artifact.files]
        if empty:
            for fd, file in zip(self._fds, artifact.files, strict=True):
                os.ftruncate(fd, file.size_bytes)
        self._have = Bitmap(artifact.layout.count) if empty else Bitmap.full(artifact.layout.count)

    @property
    def have(self) -> Bitmap:
        with self._lock:
            return Bitmap.of_bytes(self._have.size, bytes(self._have))

    def has(self, piece: int) -> bool:
        return piece in self._have

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> _Writer | None:
        if piece in self._have:
            return None
        span = self.artifact.layout.span(piece)
        assert self.artifact.hashes is not None
        return _Writer(self, piece, self._fds[span.file], span.offset, source, expect or self.artifact.hashes[piece])

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        span = self.artifact.layout.span(piece)
        return (self._fds[span.file], span.offset, span.length) if piece in self._have else None

    def digest_of(self, piece: int) -> bytes | None:
        assert self.artifact.hashes is not None
        return self.artifact.hashes[piece] if piece in self._have else None

    def file_path(self, file: int) -> Path:
        return self._folder / self.artifact.files[file].path

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def _count(self, piece: int) -> None:
        with self._lock:
            self._have.add(piece)


class _Writer:
    def __init__(self, part: FolderPart, piece: int, fd: int, offset: int, source: str, expect: bytes) -> None:
        self._part, self._piece, self._fd, self._at = part, piece, fd, offset
        self._source, self._expect = source, expect
        self._hash = blake3()

    def write(self, data: memoryview) -> None:
        self._hash.update(data)
        os.pwrite(self._fd, data, self._at)
        self._at += len(data)

    def finish(self) -> bytes:
        digest: bytes = self._hash.digest()
        if digest != self._expect:
            raise BadPiece(self._piece, self._source)
        self._part._count(self._piece)
        return digest

    def abort(self) -> None:
        pass
