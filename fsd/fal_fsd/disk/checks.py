"""Reading again what was finished: does it still have its digests? If not it is a part again, without the bad pieces.

A finished file's size, mtime and inode are written down with the start of the machine in which its content was last
read. Before a use, files whose record still holds and that were read since the machine started are believed: within
one start, what the page cache holds is what was checked. All others are hashed, which also warms them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from fal_contract.artifact import Artifact
from fal_contract.pieces import Bitmap
from fal_fsd.disk.catalog import PART, READY
from fal_fsd.disk.layout import purge
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.progress import Progress
from fal_fsd.disk.reading import Cancelled
from fal_fsd.disk.tree import copy_file, disk_error, fsync_folder

if TYPE_CHECKING:
    from fal_fsd.disk.store import DiskStore


def blob_sound(store: DiskStore, sha256: str, *, path: Path | None = None) -> bool:
    """Whether the blob (or `path`, a link to it) looks as when its content was last known to be good."""
    row = store.catalog.blob(sha256)
    if row is None:
        return False
    try:
        info = (path or store.layout.blob(sha256)).lstat()
    except OSError:
        return False
    return (info.st_size, info.st_ino, info.st_mtime_ns) == (row.bytes, row.ino, row.mtime_ns)


def checked_now(store: DiskStore, sha256: str) -> bool:
    """Whether the blob's content was read since the machine started, and looks as it did then."""
    row = store.catalog.blob(sha256)
    return row is not None and row.boot == store.boot and blob_sound(store, sha256)


def first_use(store: DiskStore, id: str, stop: threading.Event) -> list[int]:
    """See `DiskStore.first_use_check`."""
    row, artifact = store.catalog.get(id), store.layout.load_manifest(id)
    if row is None or row.state != READY or artifact is None:
        return []
    files = []
    for index, (file, path) in enumerate(zip(artifact.files, store.layout.tree_files(artifact), strict=True)):
        sha = file.sha256.hex()
        if not (checked_now(store, sha) and blob_sound(store, sha, path=path)):
            files.append(index)
    return _check(store, id, files, stop, lambda _bytes: None, cold=False) if files else []


def verify(
    store: DiskStore, id: str, stop: threading.Event, on_progress: Callable[[int], None], *, cold: bool
) -> list[int]:
    """See `DiskStore.verify`. `cold`: from the disk, not from the page cache (what is mapped or locked stays there)."""
    artifact = store.artifact(id)
    files = range(len(artifact.files)) if artifact is not None else range(0)
    return _check(store, id, files, stop, on_progress, cold=cold)


def _check(
    store: DiskStore,
    id: str,
    files: Collection[int],
    stop: threading.Event,
    on_progress: Callable[[int], None],
    *,
    cold: bool,
) -> list[int]:
    artifact = store.artifact(id)
    if artifact is None:
        return []
    part = store.part(id)
    opened = part is None
    part = part or store.open_part(artifact, model="")
    try:
        bad = [
            piece
            for file in files
            for piece in part.artifact.layout.of_file(file)
            if part.has(piece) and not _sound(part, piece, stop, on_progress, cold=cold)
        ]
        shared = _take_back(store, part, bad, files)
    finally:
        if opened:
            part.close()
    for other, its_files in shared.items():
        its_bad = _check(store, other, its_files, stop, lambda _bytes: None, cold=cold)
        if its_bad:
            store.lost(other, its_bad)
    return bad


def _sound(
    part: DiskPart, piece: int, stop: threading.Event, on_progress: Callable[[int], None], *, cold: bool
) -> bool:
    if stop.is_set():
        raise Cancelled
    where = part.locate(piece)
    if where is None:
        return True  # taken back or dropped meanwhile
    fd, offset, length = where
    expected = part.digest_of(piece)
    try:
        if cold:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        good = part.read_digest(piece) == expected
    except OSError:
        good = False  # the disk cannot read it
    on_progress(length)
    return good


def _take_back(store: DiskStore, part: DiskPart, bad: list[int], files: Collection[int]) -> dict[str, list[int]]:
    """Other artifacts that share a bad file, with the indices of that file in them."""
    with part.sync_lock:
        if not part.finished:
            if bad:
                part.discard(bad)
            return {}
        artifact = part.artifact
        if not bad:
            with store.mutex, store.catalog.transaction():
                for sha in {artifact.files[file].sha256.hex() for file in files}:
                    if store.layout.blob(sha).exists():
                        store.catalog.put_blob(store.layout.blob_row(sha, store.boot))
            return {}
        bad_files = {artifact.layout.span(piece).file for piece in bad}
        try:
            demote(store, part, bad)
        except OSError as exc:
            raise disk_error(exc, f"taking back artifact {artifact.id[:12]}", store.layout.root) from exc
    return _sharing(store, artifact, {artifact.files[file].sha256 for file in bad_files})


def _sharing(store: DiskStore, artifact: Artifact, shas: Collection[bytes]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for other in {x for sha in shas for x in store.catalog.holders(sha.hex())} - {artifact.id}:
        manifest = store.layout.load_manifest(other)
        if manifest is not None:
            found[other] = [n for n, file in enumerate(manifest.files) if file.sha256 in shas]
    return found


def demote(store: DiskStore, part: DiskPart, bad: list[int]) -> None:
    """READY → a part that lacks `bad`. Under the part's sync_lock. Raises OSError: then it is READY still.

    Order matters for a crash in between: the part with its incomplete bits is durable first (reconcile then takes the
    tree away), then the catalog knows, then the tree goes.
    """
    artifact, layout = part.artifact, store.layout
    bad_files = {artifact.layout.span(piece).file for piece in bad}
    data = layout.part(artifact.id) / "data"
    data.mkdir(parents=True, exist_ok=True, mode=0o755)
    paths = layout.part_files(artifact)
    for index, (source, path) in enumerate(zip(layout.tree_files(artifact), paths, strict=True)):
        path.unlink(missing_ok=True)
        if index in bad_files:
            copy_file(source, path)  # never repaired in place: others may have this inode open
        else:
            os.link(source, path)
    _sync_copies([paths[file] for file in bad_files])
    fsync_folder(data)
    progress = Progress(layout.part(artifact.id), artifact.id, artifact.layout.count)
    have = Bitmap.full(artifact.layout.count)
    for piece in bad:
        have.discard(piece)
    progress.save(have)
    progress.forget_recent()
    trash: list[Path] = []
    with store.mutex:
        with store.catalog.transaction():
            store.put(artifact, PART)
            unheld = store.catalog.release(artifact.id)
            for sha in unheld:
                store.catalog.drop_blob(sha)
        for path in [layout.tree(artifact.manifest_digest), *(layout.blob(sha) for sha in unheld)]:
            moved = layout.to_trash(path)
            trash += [moved] if moved else []
        part.become_part(paths, bad, progress)
    purge(trash)


def _sync_copies(paths: Collection[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)
