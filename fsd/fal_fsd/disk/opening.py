"""Creating or resuming a part. Called by the store, under its mutex."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fal_contract.artifact import Artifact
from fal_contract.pieces import Bitmap
from fal_fsd.disk import checks
from fal_fsd.disk.catalog import PART
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.progress import Progress, read_bits
from fal_fsd.disk.tree import disk_error

if TYPE_CHECKING:
    from fal_fsd.disk.store import DiskStore


class MakePart(Protocol):
    """Constructs the object."""

    def __call__(self, artifact: Artifact, paths: list[Path], have: Bitmap, *, resuming: bool) -> DiskPart: ...


def resume(store: DiskStore, artifact: Artifact, make: MakePart) -> DiskPart:
    """The part with what is durable of it; what was checked last is hashed again and counts too. NO_CAPACITY …"""
    layout = store.layout
    stored = layout.load_manifest(artifact.id)
    try:
        fresh = stored is None or not layout.part(artifact.id).is_dir()
        known = artifact if stored is None else stored
        if fresh:
            known = artifact if artifact.attested or stored is None else stored
            layout.save_manifest(known)
            store.put(known, PART)
            have = _link_blobs(store, known)
        else:
            have = read_bits(layout.part(known.id), known.id, known.layout.count) or Bitmap(known.layout.count)
            if store.catalog.get(known.id) is None:
                store.put(known, PART)
        layout.make_part(known)
        for file, path in enumerate(layout.part_files(known)):
            if path.stat().st_size != known.files[file].size_bytes:
                _refill(path, known.files[file].size_bytes)
                for piece in known.layout.of_file(file):
                    have.discard(piece)
        part = make(known, layout.part_files(known), have, resuming=True)
        part.recover()
    except OSError as exc:
        raise disk_error(exc, f"opening artifact {artifact.id[:12]}", layout.root) from exc
    return part


def _link_blobs(store: DiskStore, artifact: Artifact) -> Bitmap:
    """Files that are here under another name are linked; their pieces count (checked when they were finished)."""
    layout, have = store.layout, Bitmap(artifact.layout.count)
    data = layout.part(artifact.id) / "data"
    data.mkdir(parents=True, exist_ok=True, mode=0o755)
    for index, (file, path) in enumerate(zip(artifact.files, layout.part_files(artifact), strict=True)):
        if file.sha256 and file.size_bytes and checks.blob_sound(store, file.sha256.hex()):
            path.unlink(missing_ok=True)
            try:
                os.link(layout.blob(file.sha256.hex()), path)
            except OSError:
                continue  # too many names: it is brought again
            for piece in artifact.layout.of_file(index):
                have.add(piece)
    progress = Progress(layout.part(artifact.id), artifact.id, artifact.layout.count)
    try:
        progress.save(have)
    finally:
        progress.close()
    return have


def _refill(path: Path, size_bytes: int) -> None:
    path.unlink()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)
