"""At a start: make catalog and folders agree, whatever moment the last process died in.

    tree   part's bits    then the artifact is
    yes    complete, none READY: it died between the rename and the catalog
    yes    incomplete     a part: it died while damaged pieces were taken back; the tree goes
    no     any            a part, if somebody has it pinned; else it goes
A catalog that was lost is made again from manifests and trees; such files are read before their first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fal_contract.artifact import Artifact
from fal_contract.telemetry import get_logger
from fal_fsd.disk import finishing, removal, takeover
from fal_fsd.disk.catalog import PART, READY, REVOKED
from fal_fsd.disk.layout import purge
from fal_fsd.disk.progress import read_bits

if TYPE_CHECKING:
    from fal_fsd.disk.store import DiskStore

_log = get_logger("fal-fsd")


def reconcile(store: DiskStore) -> None:
    """Before the store is used. Raises FalError: a folder of a newer release."""
    kept = {row.id for row in store.catalog.rows() if row.state == REVOKED and store.pins.pinned(row.id)}
    purge(path for path in store.layout.trash.iterdir() if path.name not in kept)
    _know_again(store)
    for row in store.catalog.rows():
        if row.state != REVOKED:
            _settle(store, row.id)
        elif row.id not in kept:
            _remove(store, row.id)
    takeover.take_over(store)
    _sweep(store)


def _know_again(store: DiskStore) -> None:
    """Manifests that the catalog does not know: it was lost, or the process died between the two."""
    known = {row.id for row in store.catalog.rows()}
    for path in store.layout.manifests.iterdir():
        if path.name in known or path.name.startswith("."):
            continue
        artifact = store.layout.load_manifest(path.name)
        if artifact is not None and (_tree(store, artifact) or store.layout.part(artifact.id).is_dir()):
            store.put(artifact, PART)
        else:
            path.unlink()


def _tree(store: DiskStore, artifact: Artifact) -> Path | None:
    tree = store.layout.tree(artifact.manifest_digest) if artifact.attested else None
    return tree if tree is not None and tree.is_dir() else None


def _settle(store: DiskStore, id: str) -> None:
    layout, row = store.layout, store.catalog.get(id)
    assert row is not None
    if row.state == READY and layout.tree(row.digest).is_dir() and not layout.part(id).exists():
        return  # the usual case, without reading its manifest
    artifact = layout.load_manifest(id)
    tree = _tree(store, artifact) if artifact is not None else None
    folder = layout.part(id)
    bits = read_bits(folder, id, artifact.layout.count) if artifact is not None and folder.is_dir() else None
    if artifact is not None and tree is not None and (bits is None or bits.complete):
        if row.state != READY:
            _promote(store, artifact)
        if folder.is_dir():
            purge([folder])
        return
    if tree is not None and not any(x != id for x in store.catalog.resolve(tree.name)):
        moved = layout.to_trash(tree)
        purge([moved] if moved else [])
    if artifact is None or not folder.is_dir() or (not store.pins.pinned(id) and row.state == PART):
        if store.pins.pinned(id) and artifact is not None:
            store.put(artifact, PART)  # nothing of it is here, but somebody still wants it
        else:
            _remove(store, id)
        return
    if row.state != PART:
        store.put(artifact, PART)
        for sha in store.catalog.release(id):
            store.catalog.drop_blob(sha)
    store.note_part_bytes(id, sum(artifact.layout.length(piece) for piece in bits or ()))


def _promote(store: DiskStore, artifact: Artifact) -> None:
    """The tree was exposed, so its content had been checked; but not by a process that told us in which boot."""
    for path, file in zip(store.layout.tree_files(artifact), artifact.files, strict=True):
        if not store.layout.blob(file.sha256.hex()).exists():
            store.layout.add_blob(path, file.sha256.hex(), replace=False)
    finishing.record_ready(store, artifact, fresh=(), boot="")
    _log.info("found finished", artifact=artifact.id[:12])


def _remove(store: DiskStore, id: str) -> None:
    trash: list[Path] = []
    removal.remove(store, id, trash)
    purge(trash)


def _sweep(store: DiskStore) -> None:
    """What no row of the catalog accounts for."""
    layout, rows = store.layout, store.catalog.rows()
    ids, digests = {row.id for row in rows}, {row.digest for row in rows if row.state == READY}
    purge(path for path in layout.parts.iterdir() if path.name not in ids)
    purge(path for path in layout.models.iterdir() if path.name not in digests)
    blobs = store.catalog.blob_names()
    for path in layout.blobs.glob("??/*"):
        if path.name not in blobs:
            path.unlink()
    for sha in blobs:
        if not store.catalog.holders(sha):
            layout.blob(sha).unlink(missing_ok=True)
            store.catalog.drop_blob(sha)
