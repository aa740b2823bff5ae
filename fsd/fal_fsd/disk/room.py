"""Room on the cache's disk: what is used, what may be, and what goes to make some.

Called by the store, under its mutex.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fal_contract.artifact import Artifact
from fal_fsd.core import eviction
from fal_fsd.disk import checks
from fal_fsd.disk.catalog import READY, REVOKED, Row
from fal_fsd.disk.layout import purge
from fal_fsd.disk.tree import no_room

if TYPE_CHECKING:
    from fal_fsd.disk.store import DiskStore

# Until it was measured: what bringing an artifact back takes.
_NOMINAL_BYTES_S: Final = 100e6


@dataclass(frozen=True, slots=True)
class Marks:
    """`bytes_max`: quota; None: what the disk holds. Above `high_percent`, eviction goes down to `low_percent`."""

    bytes_max: int | None
    high_percent: int
    low_percent: int
    reserve_bytes: int

    def with_bytes_max(self, bytes_max: int | None) -> Marks:
        return replace(self, bytes_max=bytes_max)


@dataclass(frozen=True, slots=True)
class Room:
    """`bytes_used`: finished files once each, parts as if they were whole. `bytes_free`: what may still come."""

    bytes_max: int
    bytes_used: int
    bytes_free: int


def measure(store: DiskStore) -> Room:
    """As it is now."""
    info = os.statvfs(store.layout.root)
    used = store.catalog.bytes_used()
    coming = sum(size - store.bytes_here(id) for id, size in store.catalog.parts())
    # What parts will still take is promised: it is not free, though the disk says so.
    disk_free = max(info.f_bavail * info.f_frsize - store.marks.reserve_bytes - coming, 0)
    most = used + disk_free if store.marks.bytes_max is None else store.marks.bytes_max
    return Room(most, used, max(min(most - used, disk_free), 0))


def make_room(store: DiskStore, artifact: Artifact, trash: list[Path]) -> list[str]:
    """For an artifact that is not here yet: what was evicted. NO_CAPACITY when that does not suffice."""
    shared = {x.sha256 for x in artifact.files if x.sha256 and checks.blob_sound(store, x.sha256.hex())}
    needed = sum(file.size_bytes for file in artifact.files if file.sha256 not in shared)
    info = os.statvfs(store.layout.root)
    disk = info.f_blocks * info.f_frsize - store.marks.reserve_bytes
    most = disk if store.marks.bytes_max is None else min(store.marks.bytes_max, disk)
    if needed > most:
        raise no_room(
            f"artifact {artifact.id[:12]} has {needed} bytes and can never fit: the cache in {store.layout.root}"
            f" holds {max(most, 0)}",
            remedy="Give fal-fsd a larger disk_bytes_max or disk.",
        )
    gone = evict(store, needed, trash)
    left = measure(store)
    if needed > left.bytes_free:
        raise no_room(
            f"the cache in {store.layout.root} has no room: {needed} bytes to stage, {left.bytes_free} free of"
            f" {left.bytes_max}, and the rest is pinned or in use",
            remedy="Unpin or stop something on this node, or give the cache more room.",
        )
    return gone


def evict(store: DiskStore, needed: int, trash: list[Path]) -> list[str]:
    """By the water marks; artifact ids."""
    from fal_fsd.disk import removal  # which releases through us

    gone: list[str] = []
    while True:
        room = measure(store)
        goal = eviction.bytes_to_free(
            used=room.bytes_used,
            needed=needed,
            bytes_max=room.bytes_max,
            high_percent=store.marks.high_percent,
            low_percent=store.marks.low_percent,
        )
        # The disk itself may be fuller than our quota says.
        goal = max(goal, needed - room.bytes_free)
        chosen = eviction.choose(candidates(store), goal) if goal > 0 else []
        if not chosen:
            return gone
        for id in chosen:
            removal.remove(store, id, trash)
        gone += chosen
        purge(trash)  # now, though it is slow: only then does the disk tell what is free
        trash.clear()


def candidates(store: DiskStore) -> list[eviction.Candidate]:
    """Everything here, as the pure rules take it."""
    now_s, pins = store.pins.now_s(), store.pins.all()
    return [
        eviction.Candidate(
            id=row.id,
            bytes_total=row.bytes_total,
            bytes_freed=row.bytes_freed,
            requests_per_hour=eviction.requests_per_hour(eviction.cooled(row.heat, now_s - row.used_at_s)),
            seconds_back=row.seconds_back or row.bytes_total / _NOMINAL_BYTES_S,
            last_copy=store.is_last_copy(row.id),
            pinned=row.id in pins,
            open=store.is_open(row.id),
            told_ms=store.values_ms.get(row.id),
        )
        for row in store.catalog.rows()
        if row.state != REVOKED
    ]


def release(store: DiskStore, row: Row, trash: list[Path]) -> None:
    """Tree and blobs that nobody else here needs go to the trash."""
    layout, catalog = store.layout, store.catalog
    others = [x for x in catalog.resolve(row.digest) if x != row.id] if row.digest else []
    paths = [layout.blob(sha) for sha in catalog.release(row.id)]
    for path in paths:
        catalog.drop_blob(path.name)
    if row.state == READY and not any(is_ready(store, x) for x in others):
        paths.append(layout.tree(row.digest))
    for path in paths:
        moved = layout.to_trash(path)
        trash += [moved] if moved else []


def is_ready(store: DiskStore, id: str) -> bool:
    """Whether its tree is there, by the catalog."""
    row = store.catalog.get(id)
    return row is not None and row.state == READY
