"""Removing artifacts, and withdrawing them. Called by the store, under its mutex; the trash is emptied after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fal_fsd.disk import room
from fal_fsd.disk.catalog import READY, REVOKED

if TYPE_CHECKING:
    from fal_fsd.disk.store import DiskStore


def drop(store: DiskStore, id: str, trash: list[Path], *, force: bool, reason: str) -> tuple[list[str], list[str]]:
    """See `DiskStore.drop`: ids that it named and that went, and those of which something is left."""
    ids = store.catalog.resolve(id)
    if force:
        with store.catalog.transaction():
            for each in {id, *ids}:
                store.catalog.revoke(each, reason or "no reason was given")
        for found in ids:
            _withdraw(store, found)
        drop_revoked(store, ids, trash)
    elif any(store.pins.pinned(x) or store.is_open(x) for x in ids):
        return [], ids
    else:
        for found in ids:
            remove(store, found, trash)
    return ids, [x for x in ids if store.catalog.get(x) is not None]


def _withdraw(store: DiskStore, id: str) -> None:
    row, part = store.catalog.get(id), store.part(id)
    assert row is not None
    if part is not None:
        part.mark_gone("was withdrawn")
    tree = store.layout.tree(row.digest)
    others = [x for x in store.catalog.resolve(row.digest) if x != id] if row.digest else []
    if row.state == READY and tree.is_dir() and not any(room.is_ready(store, x) for x in others):
        # Files stay for those who have it bound, under a name that nobody is told.
        tree.chmod(0o755)
        os.rename(tree, store.layout.trash / id)
    store.catalog.set_state(id, REVOKED)


def drop_revoked(store: DiskStore, ids: Sequence[str], trash: list[Path]) -> None:
    """Those of them that were withdrawn and that nobody holds any more go."""
    for id in ids:
        row = store.catalog.get(id)
        if row is not None and row.state == REVOKED and not store.pins.pinned(id) and not store.counted_open(id):
            remove(store, id, trash)


def remove(store: DiskStore, id: str, trash: list[Path]) -> None:
    """Everything of artifact `id` goes to the trash."""
    row, part = store.catalog.get(id), store.part(id)
    if part is not None:
        part.mark_gone("was removed")
    if row is not None:
        room.release(store, row, trash)
    for path in (store.layout.part(id), store.layout.manifests / id, store.layout.trash / id):
        moved = store.layout.to_trash(path)
        trash += [moved] if moved else []
    store.catalog.remove(id)
    store.forget(id)
