"""Artifacts with content, and how tests bring them into a store."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from blake3 import blake3

from fal_contract.artifact import Artifact, ArtifactFile, listing_id
from fal_contract.clock import Clock, ManualClock
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.store import DiskStore

PIECE_BYTES = 64 << 10


def content(seed: int, sizes: Mapping[str, int]) -> dict[str, bytes]:
    """Files with random bytes."""
    return {path: random.Random(f"{seed}/{path}").randbytes(size) for path, size in sorted(sizes.items())}


def artifact_of(
    files: Mapping[str, bytes],
    *,
    uri: str = "s3://b/m",
    attested: bool = True,
    sha: bool = True,
    piece_bytes: int = PIECE_BYTES,
) -> Artifact:
    """What describes these files. `sha`: whether the origin told SHA-256."""
    paths = sorted(files, key=str.encode)
    listed = tuple(ArtifactFile(p, len(files[p]), "v1", sha256(files[p]).digest() if sha else b"") for p in paths)
    digests = [
        blake3(files[p][at : at + piece_bytes]).digest() for p in paths for at in range(0, len(files[p]), piece_bytes)
    ]
    return Artifact(
        listing_id(uri, listed), "model", uri, piece_bytes, listed, tuple(digests) if attested and sha else None
    )


def bytes_of(artifact: Artifact, files: Mapping[str, bytes], piece: int) -> bytes:
    """What a piece must be."""
    span = artifact.layout.span(piece)
    return files[artifact.files[span.file].path][span.offset : span.offset + span.length]


def put(part: DiskPart, piece: int, data: bytes, *, source: str = "peer", expect: bytes | None = None) -> bytes:
    """Write a piece in two blocks."""
    writer = part.writer(piece, source=source, expect=expect)
    assert writer is not None
    try:
        half = len(data) // 2
        writer.write(memoryview(data)[:half])
        writer.write(memoryview(data)[half:])
        return writer.finish()
    finally:
        writer.abort()


def bring(part: DiskPart, files: Mapping[str, bytes], pieces: Iterable[int] | None = None) -> None:
    """All missing pieces, or these."""
    for piece in list(part.have.missing()) if pieces is None else pieces:
        put(part, piece, bytes_of(part.artifact, files, piece))


def open_store(root: Path, *, clock: Clock | None = None, bytes_max: int | None = None) -> DiskStore:
    """A store that syncs only when it must or is told to."""
    return DiskStore(root, bytes_max=bytes_max, clock=clock or ManualClock(), reserve_bytes=0, sync_interval_s=3600.0)


def stage(store: DiskStore, files: Mapping[str, bytes], *, uri: str = "s3://b/m", owner: str = "") -> Artifact:
    """READY, its part closed."""
    artifact = artifact_of(files, uri=uri)
    part = store.open_part(artifact, model="t/m", owner=owner)
    bring(part, files)
    store.finish(artifact.id)
    part.close()
    return artifact


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, at: int) -> None:
    """Change one byte of a read-only file."""
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)
