"""From a complete part to READY. After a crash anywhere in here it is a part, or READY: reconcile tells them apart."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fal_contract.artifact import Artifact
from fal_contract.errors import Code, FalError
from fal_fsd.disk import checks
from fal_fsd.disk.catalog import READY, unknown
from fal_fsd.disk.layout import needs_attestation
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.tree import disk_error, remove_tree

if TYPE_CHECKING:
    from fal_fsd.disk.store import DiskStore


def finish(store: DiskStore, id: str, sha256: Sequence[bytes] | None) -> Path:
    """See `DiskStore.finish`."""
    done = store.path_of(id)
    if done is not None:
        return done
    part = store.part(id)
    if part is None:
        raise unknown(id)
    with part.sync_lock:
        _check(part, sha256)
        try:
            return _expose(store, part)
        except OSError as exc:
            raise disk_error(exc, f"finishing artifact {id[:12]}", store.layout.root) from exc


def _check(part: DiskPart, sha256: Sequence[bytes] | None) -> None:
    artifact = part.artifact
    if not artifact.attested:
        raise needs_attestation(artifact)
    part.sync()
    if not part.complete or part.bytes_unsynced:
        missing = sum(1 for _ in part.have.missing())
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"artifact {artifact.id[:12]} lacks {missing} pieces, {part.bytes_unsynced} bytes are not durable",
            remedy="Bring them first.",
        )
    for file, digest in zip(artifact.files, sha256 or (), strict=False):
        if file.sha256 != digest:
            raise FalError(
                Code.CORRUPT,
                f"file {file.path!r} has SHA-256 {digest.hex()}, not {file.sha256.hex()}",
                remedy="Register the model again.",
                field=file.path,
            )


def _expose(store: DiskStore, part: DiskPart) -> Path:
    """Under the part's sync_lock."""
    artifact, layout = part.artifact, store.layout
    shas = [file.sha256.hex() for file in artifact.files]
    with store.removing() as trash, store.mutex:
        if store.part(artifact.id) is not part or store.catalog.get(artifact.id) is None:
            raise unknown(artifact.id)
        fresh: set[str] = set()
        for path, sha in zip(layout.part_files(artifact), shas, strict=True):
            blob = layout.blob(sha)
            if sha in fresh or checks.checked_now(store, sha) or (blob.exists() and blob.samefile(path)):
                continue  # the one that is there is as good as ours, or is ours
            layout.add_blob(path, sha, replace=True)
            fresh.add(sha)
        final = _link(store, artifact, shas)
        part.become_finished(layout.tree_files(artifact))
        moved = layout.to_trash(layout.part(artifact.id))
        trash += [moved] if moved else []
        record_ready(store, artifact, fresh=fresh)
        _note_arrival(store, part)
    return final


def _link(store: DiskStore, artifact: Artifact, shas: Sequence[str]) -> Path:
    tree = store.layout.build_tree(artifact, [store.layout.blob(sha) for sha in shas])
    return store.layout.expose(tree, artifact.manifest_digest)


def record_ready(store: DiskStore, artifact: Artifact, *, fresh: Collection[str], boot: str | None = None) -> None:
    """Its tree is there. `fresh`: blobs whose content was read in this boot; unknown ones get `boot`.

    Under the store's mutex.
    """
    shas = {file.sha256.hex() for file in artifact.files}
    with store.catalog.transaction():
        store.put(artifact, READY)
        store.catalog.hold(artifact.id, shas)
        for sha in shas:
            if sha in fresh or store.catalog.blob(sha) is None:
                told = store.boot if sha in fresh or boot is None else boot
                store.catalog.put_blob(store.layout.blob_row(sha, told))


def _note_arrival(store: DiskStore, part: DiskPart) -> None:
    """How long it took, as the time that bringing it back will take."""
    begun_s, had = store.arrival(part.artifact.id) or (0.0, part.bytes_done)
    brought, total = part.bytes_done - had, part.artifact.bytes_total
    if brought * 10 >= total > 0:
        store.catalog.set_seconds_back(part.artifact.id, (store.clock.monotonic_s() - begun_s) * total / brought)


def adopt(store: DiskStore, artifact: Artifact) -> Path | None:
    """See `DiskStore.adopt`. Under the store's mutex."""
    if not artifact.attested or store.catalog.revoked(artifact.id, artifact.manifest_digest) is not None:
        return None
    path = store.path_of(artifact.id)
    shas = [file.sha256.hex() for file in artifact.files]
    if path is not None or store.part(artifact.id) or not all(checks.blob_sound(store, sha) for sha in set(shas)):
        return path
    try:
        store.layout.save_manifest(artifact)
        path = _link(store, artifact, shas)
        remove_tree(store.layout.part(artifact.id))
        record_ready(store, artifact, fresh=())
    except OSError as exc:
        raise disk_error(exc, f"linking artifact {artifact.id[:12]}", store.layout.root) from exc
    return path
