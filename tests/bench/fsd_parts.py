"""A part for benchmarks of the bulk port: plain files of a folder, all there."""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3

from fal_contract.artifact import Artifact, ArtifactFile, listing_id
from fal_contract.pieces import Bitmap, piece_bytes_of


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
    """`ports.Part` of which everything is here; it takes nothing."""

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        self.artifact = artifact
        self.have = Bitmap.full(artifact.layout.count)
        self._folder = folder
        self._fds = [os.open(folder / file.path, os.O_RDONLY) for file in artifact.files]

    def has(self, piece: int) -> bool:
        return 0 <= piece < self.have.size

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> None:
        """It is here."""

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        span = self.artifact.layout.span(piece)
        return self._fds[span.file], span.offset, span.length

    def digest_of(self, piece: int) -> bytes | None:
        return self.artifact.hashes[piece] if self.artifact.hashes is not None else None

    def file_path(self, file: int) -> Path:
        return self._folder / self.artifact.files[file].path

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
