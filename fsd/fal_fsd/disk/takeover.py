"""A state folder of the release before: `models/DIGEST` of plain files and `pins.db`, no blobs, no pieces.

Its trees are read once: what still has its digest is kept, under the manifest digest as its artifact id (a listing id
is not known), so that the same files staged under any name are linked and not fetched. Pins are kept.
"""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from fal_contract.artifact import Artifact, ArtifactFile
from fal_contract.errors import Code, FalError
from fal_contract.pieces import PieceLayout, piece_bytes_of
from fal_contract.telemetry import get_logger
from fal_fsd.disk import finishing

if TYPE_CHECKING:
    from fal_fsd.disk.store import DiskStore

_VERSION_MAX: Final = 1
_KIND: Final = "model"
_READ_BYTES: Final = 1 << 20
_log = get_logger("fal-fsd")


def take_over(store: DiskStore) -> None:
    """Trees that nobody knows, and the old pins. VERSION_MISMATCH, CORRUPT: nothing was changed."""
    old = store.layout.root / "pins.db"
    models, pins = _old_pins(old) if old.exists() else ({}, [])
    known = {row.digest for row in store.catalog.rows()}
    for tree in sorted(store.layout.models.iterdir()):
        if tree.name in known or not tree.is_dir():
            continue
        artifact = _read(tree)
        if artifact is None:
            _log.warning("a tree of the release before is damaged and goes", digest=tree.name)
            continue
        store.layout.save_manifest(artifact)
        for path, file in zip(store.layout.tree_files(artifact), artifact.files, strict=True):
            store.layout.add_blob(path, file.sha256.hex(), replace=False)
        finishing.record_ready(store, artifact, fresh={file.sha256.hex() for file in artifact.files})
        if model := models.get(tree.name, ""):
            store.catalog.name(artifact.id, model)
        _log.info("taken over from the release before", digest=tree.name, bytes=artifact.bytes_total)
    for digest, owner in pins:
        if store.catalog.resolve(digest):
            store.pins.pin(store.catalog.resolve(digest)[:1], owner)
    if old.exists():
        for path in (old, *(old.with_name(f"pins.db-{end}") for end in ("wal", "shm"))):
            path.unlink(missing_ok=True)


def _old_pins(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    db = sqlite3.connect(path)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION_MAX:
            raise FalError(
                Code.VERSION_MISMATCH,
                f"{path} has version {version}, this fal-fsd takes over version {_VERSION_MAX}",
                remedy="Start the fal-fsd that wrote it; nothing was changed.",
            )
        models = dict(db.execute("SELECT digest, model FROM artifact").fetchall()) if version else {}
        pins = db.execute("SELECT digest, owner FROM pin").fetchall() if version else []
        return models, pins
    except sqlite3.DatabaseError as exc:
        raise FalError(
            Code.CORRUPT,
            f"{path} is damaged: {exc}",
            remedy="Move it away and start again: models are kept, pins are told anew by the agent.",
        ) from None
    finally:
        db.close()


def _read(tree: Path) -> Artifact | None:
    """The artifact that this tree is, if its digest is still its name."""
    paths = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = {str(path.relative_to(tree)): path.stat().st_size for path in paths}
    names = sorted(sizes, key=str.encode)
    if not names:
        return None
    piece_bytes = piece_bytes_of(_KIND, sum(sizes.values()))
    files, hashes = [], []
    for name in names:
        sha256, digests = _hash(tree / name, PieceLayout([sizes[name]], piece_bytes))
        files.append(ArtifactFile(name, sizes[name], sha256=sha256))
        hashes += digests
    artifact = Artifact(tree.name, _KIND, "", piece_bytes, tuple(files), tuple(hashes))
    return artifact if artifact.manifest_digest == tree.name else None


def _hash(path: Path, layout: PieceLayout) -> tuple[bytes, list[bytes]]:
    whole, digests = hashlib.sha256(), []
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        for span in layout.spans():
            hasher, left = blake3(), span.length
            while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
                whole.update(buffer[:count])
                hasher.update(buffer[:count])
                left -= count
            digests.append(hasher.digest())
    return whole.digest(), digests
