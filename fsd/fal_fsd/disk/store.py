"""The cache on disk as the node uses it: parts, finished trees, pins, room.

All methods block and are thread-safe; one process has a store (an exclusive lock on its folder). Locks are taken in
this order: a part's `sync_lock`, the store's mutex, a part's `changed`. Ids are artifact ids; where a method says so, a
manifest digest will do. `open` means what `opened` and `closed` counted (the mount tells them; looking through /proc
takes seconds on a busy node) or a part that is being brought; runners that have a model bound hold a pin.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.artifact import Artifact
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.pieces import Bitmap
from fal_fsd.disk import checks, finishing, localcopy, reconcile, removal, room
from fal_fsd.disk.catalog import PART, READY, REVOKED, Catalog, unknown
from fal_fsd.disk.layout import Layout, purge
from fal_fsd.disk.opening import resume
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.pins import Pins
from fal_fsd.disk.progress import Discarded, Progress
from fal_fsd.disk.syncer import SYNC_INTERVAL_S, Syncer
from fal_fsd.disk.tree import boot_id, lock_folder, raise_file_limit

RESERVE_BYTES: Final = 256 << 20  # of the disk, for logs, journal and the rest of the node


@dataclass(frozen=True, slots=True)
class CachedRecord:
    """What is known of one artifact here. `used_s`: store time of its last use; `bytes_disk`: checked bytes here."""

    id: str
    manifest_digest: str
    kind: str
    models: tuple[str, ...]
    bytes_total: int
    bytes_disk: int
    ready: bool
    revoked: bool
    pinned_by: tuple[str, ...]
    hits: int
    used_s: float
    seconds_back: float
    bytes_from_origin: int = 0  # since it came here
    bytes_from_peers: int = 0


class DiskStore:
    """See the module. Raises FalError at opening: another fsd, a newer or a damaged database.

    `on_lost(artifact id, pieces)`: pieces that counted are not here any more. `on_gone(artifact ids)`: evicted or
    withdrawn; whoever has their parts open closes them. Both are called from any thread, without locks.
    """

    def __init__(
        self,
        root: Path,
        *,
        bytes_max: int | None,
        clock: Clock,
        high_percent: int = 90,
        low_percent: int = 80,
        reserve_bytes: int = RESERVE_BYTES,
        on_lost: Callable[[str, Sequence[int]], None] = lambda _id, _pieces: None,
        on_gone: Callable[[Sequence[str]], None] = lambda _ids: None,
        sync_interval_s: float = SYNC_INTERVAL_S,
    ) -> None:
        self.layout = Layout(root)
        self.marks = room.Marks(bytes_max, high_percent, low_percent, reserve_bytes)
        self.mutex = threading.RLock()
        self.boot = boot_id()
        self.clock = clock
        self._on_lost = on_lost
        self._on_gone = on_gone
        self._parts: dict[str, DiskPart] = {}
        self._opened: dict[str, int] = {}
        self._hits: dict[str, int] = {}
        self._part_bytes: dict[str, int] = {}  # of parts that are not open
        self._last_copies: frozenset[str] = frozenset()
        self.values_ms: Mapping[str, int] = {}  # by id, the scheduler's word, see eviction; replaced as a whole
        self._arrivals: dict[str, tuple[float, int]] = {}  # when a part was opened, with how many bytes
        self._lock_fd = lock_folder(root / "lock")
        try:
            raise_file_limit()
            self.catalog = Catalog(root / "cache.db")
            self.pins = Pins(self.catalog, clock)
            reconcile.reconcile(self)
            self._syncer = Syncer(on_lost, self._tick, interval_s=sync_interval_s)
        except BaseException:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Everything durable, every part closed."""
        self._syncer.close()
        for part in list(self._parts.values()):
            part.close()
        self._flush()
        self.catalog.close()
        os.close(self._lock_fd)

    # ---- parts

    def open_part(self, artifact: Artifact, *, model: str, owner: str = "") -> DiskPart:
        """Create, resume or open what is finished; the same object until it is closed. With `owner` it is pinned.

        NO_CAPACITY: it can never fit, or nothing more may be evicted. FAILED_PRECONDITION: it was withdrawn. When
        `artifact` is attested and the part was not, `DiskPart.discarded` tells what was taken back.
        """
        why = self.catalog.revoked(artifact.id, artifact.manifest_digest)
        if why is not None:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"artifact {artifact.id[:12]} was withdrawn: {why}",
                remedy="Use another model.",
            )
        gone: list[str] = []
        try:
            with self.removing() as trash, self.mutex:
                part = self._parts.get(artifact.id)
                if part is None or part.gone:  # whoever has the old one still open closes it in his own time
                    part = self._open(artifact, gone, trash)
                self._named(artifact.id, model, owner)
        finally:
            if gone:
                self._on_gone(gone)
        if artifact.attested and not part.artifact.attested:
            part.discarded = self.attest(artifact)
        return part

    def _named(self, id: str, model: str, owner: str) -> None:
        if model:
            self.catalog.name(id, model)
        if owner:
            self.pins.pin([id], owner)

    def _open(self, artifact: Artifact, gone: list[str], trash: list[Path]) -> DiskPart:
        """Under the mutex."""
        row = self.catalog.get(artifact.id)
        if row is not None and row.state == READY:
            stored = self.layout.load_manifest(artifact.id) or artifact
            full = Bitmap.full(stored.layout.count)
            part = self._make(stored, self.layout.tree_files(stored), full, resuming=False)
        else:
            if row is None:
                gone += room.make_room(self, artifact, trash)
            part = resume(self, artifact, self._make)
            self._arrivals[artifact.id] = (self.clock.monotonic_s(), part.bytes_done)
        self._parts[artifact.id] = part
        self._part_bytes.pop(artifact.id, None)
        self._syncer.add(part)
        return part

    def _make(self, artifact: Artifact, paths: Sequence[Path], have: Bitmap, *, resuming: bool) -> DiskPart:
        progress = Progress(self.layout.part(artifact.id), artifact.id, artifact.layout.count) if resuming else None
        return DiskPart(
            artifact,
            root=self.layout.root,
            paths=paths,
            have=have,
            progress=progress,
            want_sync=lambda part: self._syncer.want(part),
            on_closed=self._closed_part,
        )

    def _closed_part(self, part: DiskPart) -> None:
        with self.mutex:
            if self._parts.get(part.artifact.id) is part:
                del self._parts[part.artifact.id]
                if not part.gone:
                    self._part_bytes[part.artifact.id] = part.bytes_done
        self._syncer.remove(part)

    def part(self, id: str) -> DiskPart | None:
        """The part of artifact `id` that is open."""
        with self.mutex:
            return self._parts.get(id)

    def artifact(self, id: str) -> Artifact | None:
        """As last told (artifact id or manifest digest); survives restarts."""
        with self.mutex:
            ids = self.catalog.resolve(id)
            part = self._parts.get(ids[0]) if ids else None
        return part.artifact if part else self.layout.load_manifest(ids[0]) if ids else None

    def attest(self, artifact: Artifact) -> list[Discarded]:
        """Its digests are known now: pieces that differ are taken back and told. INVALID: another listing."""
        part = self.part(artifact.id)
        opened = part is None
        part = part or self.open_part(artifact, model="")
        try:
            bad = part.attest(artifact) or part.discarded
            self.layout.save_manifest(part.artifact)
            with self.mutex:
                row = self.catalog.get(artifact.id)
                if row is not None and row.digest != artifact.manifest_digest:
                    self.put(artifact, row.state)
            return bad
        finally:
            if opened:
                part.close()

    def sync(self) -> None:
        """Make every checked piece durable now."""
        self._syncer.sync_all()

    def copy_in(
        self, part: DiskPart, folder: Path, stop: threading.Event, on_bytes: Callable[[int], None] = lambda _: None
    ) -> None:
        """See fal_fsd.disk.localcopy."""
        localcopy.copy_in(part, folder, stop, on_bytes)

    # ---- finished

    def finish(self, id: str, *, sha256: Sequence[bytes] | None = None) -> Path:
        """Make a complete, attested part READY: durable, linked into blobs/, one rename to models/. Idempotent.

        `sha256`: of the files, when somebody has read them; compared. FAILED_PRECONDITION: pieces are missing, or
        nobody has attested it. CORRUPT: a digest differs.
        """
        return finishing.finish(self, id, sha256)

    def adopt(self, artifact: Artifact, *, model: str = "", owner: str = "") -> Path | None:
        """READY at once, when every file is here already under whatever name; else None. Only what is attested."""
        with self.mutex:
            path = finishing.adopt(self, artifact)
            if path is not None:
                self._named(artifact.id, model, owner)
            return path

    def path_of(self, id: str) -> Path | None:
        """The folder of a READY artifact (artifact id or manifest digest)."""
        for found in self.catalog.resolve(id):
            row = self.catalog.get(found)
            if row is not None and row.state == READY and (path := self.layout.tree(row.digest)).is_dir():
                return path
        return None

    def files_of(self, id: str) -> list[Path]:
        """The files of a READY artifact, in its order (artifact id or manifest digest); empty when it is not READY."""
        path, artifact = self.path_of(id), self.artifact(id)
        return [path / file.path for file in artifact.files] if path is not None and artifact is not None else []

    def verify(
        self, id: str, stop: threading.Event, on_progress: Callable[[int], None] = lambda _bytes: None
    ) -> list[int]:
        """Read every byte from disk again; pieces that are not what they must be are taken back and returned.

        A READY artifact with bad pieces is a part again, without them, and so is any other that shares the file
        (`on_lost` tells of those). Raises Cancelled, NOT_FOUND.
        """
        return checks.verify(self, self._known(id), stop, on_progress, cold=True)

    def first_use_check(self, id: str, stop: threading.Event | None = None) -> list[int]:
        """Like `verify`, but only files that changed, or were not read since the machine started. Before each use."""
        return checks.first_use(self, self._known(id), stop or threading.Event())

    def lost(self, id: str, pieces: Sequence[int]) -> None:
        """Tell the node."""
        self._on_lost(id, pieces)

    # ---- pins and use

    def pin(self, id: str, owner: str, *, expires_at_s: float = 0.0) -> None:
        """Keep it (artifact id or manifest digest); durable on return. `expires_at_s`: wall clock; 0: never."""
        with self.mutex:
            found = self._known(id)
            row = self.catalog.get(found)
            if row is not None and row.state == REVOKED:
                raise FalError(
                    Code.FAILED_PRECONDITION, f"artifact {id[:12]} was withdrawn", remedy="Use another model."
                )
            self.pins.pin([found], owner, expires_at_s=expires_at_s)

    def unpin(self, owner: str, id: str = "") -> list[str]:
        """Artifact ids that `owner` had pinned (of those that `id` names, unless empty); nobody else's are touched."""
        with self.removing() as trash, self.mutex:
            gone = self.catalog.unpin(owner, self.catalog.resolve(id) if id else None)
            removal.drop_revoked(self, gone, trash)
        return gone

    def pinned(self, id: str) -> bool:
        """Artifact id or manifest digest."""
        return any(self.pins.pinned(found) for found in self.catalog.resolve(id))

    def opened(self, id: str) -> None:
        """Somebody reads it through something that is no runner's pin; until `closed`, as often."""
        with self.mutex:
            self._opened[id] = self._opened.get(id, 0) + 1

    def closed(self, id: str) -> None:
        with self.removing() as trash, self.mutex:
            count = self._opened.get(id, 0) - 1
            self._opened.pop(id, None) if count <= 0 else self._opened.update({id: count})
            removal.drop_revoked(self, [id], trash)

    def counted_open(self, id: str) -> bool:
        """Whether `opened` was called more often than `closed`."""
        return id in self._opened

    def is_open(self, id: str) -> bool:
        with self.mutex:
            part = self._parts.get(id)
            return id in self._opened or (part is not None and part.busy)

    def touch(self, id: str) -> None:
        """It was asked for (artifact id or manifest digest); written down with the next flush."""
        with self.mutex:
            for found in self.catalog.resolve(id)[:1]:
                self._hits[found] = self._hits.get(found, 0) + 1

    def artifacts(self) -> list[CachedRecord]:
        """All that are here or on their way, by artifact id."""
        with self.mutex:
            pins, names, came = self.pins.all(), self.catalog.names(), self.catalog.came()
            return [
                CachedRecord(
                    id=row.id, manifest_digest=row.digest, kind=row.kind, models=tuple(names.get(row.id, ())),
                    bytes_total=row.bytes_total,
                    bytes_disk=row.bytes_total if row.state == READY else self.bytes_here(row.id),
                    ready=row.state == READY, revoked=row.state == REVOKED, pinned_by=tuple(pins.get(row.id, ())),
                    hits=row.hits + self._hits.get(row.id, 0), used_s=row.used_at_s, seconds_back=row.seconds_back,
                    bytes_from_origin=came.get(row.id, (0, 0))[0], bytes_from_peers=came.get(row.id, (0, 0))[1],
                )
                for row in self.catalog.rows()
            ]  # fmt: skip

    def bytes_here(self, id: str) -> int:
        """Checked bytes of a part."""
        part = self._parts.get(id)
        return part.bytes_done if part is not None else self._part_bytes.get(id, 0)

    # ---- room

    def room(self) -> room.Room:
        """Bytes that may be used, are used, and are left."""
        with self.mutex:
            return room.measure(self)

    def set_bytes_max(self, bytes_max: int | None) -> None:
        """The scheduler's word on the quota; None: what the disk holds."""
        with self.mutex:
            self.marks = self.marks.with_bytes_max(bytes_max)

    def set_last_copies(self, ids: Collection[str]) -> None:
        """Artifacts that no other node has."""
        self._last_copies = frozenset(ids)

    def is_last_copy(self, id: str) -> bool:
        return id in self._last_copies

    def evict(self, bytes_needed: int = 0) -> list[str]:
        """Make room for so many bytes by the water marks; artifact ids that went, least valuable first."""
        with self.removing() as trash, self.mutex:
            self._flush()
            gone = room.evict(self, bytes_needed, trash)
        if gone:
            self._on_gone(gone)
        return gone

    def abandon(self, id: str) -> None:
        """Remove a part that nobody has pinned or open; anything else stays."""
        with self.removing() as trash, self.mutex:
            row = self.catalog.get(id)
            if row is not None and row.state == PART and not self.pins.pinned(id) and id not in self._parts:
                removal.remove(self, id, trash)

    def drop(self, id: str, *, force: bool, reason: str = "") -> bool:
        """Remove an artifact (artifact id or manifest digest); True when nothing of it is left.

        Without `force` nothing happens while it is pinned or open. With it (withdrawn) it is remembered as such, taken
        from models/ at once, and its files go as soon as nobody has it pinned or open.
        """
        with self.removing() as trash, self.mutex:
            ids, left = removal.drop(self, id, trash, force=force, reason=reason)
        if ids:
            self._on_gone(ids)
        return not left

    def revoked(self, id: str) -> str | None:
        """Why it was withdrawn; None: it was not."""
        return self.catalog.revoked(id)

    def forget(self, id: str) -> None:
        """What is kept of it in memory."""
        self._part_bytes.pop(id, None)
        self._hits.pop(id, None)

    # ---- inside

    def _known(self, id: str) -> str:
        ids = self.catalog.resolve(id)
        if not ids:
            raise unknown(id)
        return ids[0]

    def put(self, artifact: Artifact, state: str) -> None:
        """It is in this state from now on. Under the mutex."""
        self.catalog.put(
            artifact.id,
            digest=artifact.manifest_digest,
            kind=artifact.kind,
            bytes_total=artifact.bytes_total,
            state=state,
            used_at_s=self.pins.now_s(),
        )

    def note_part_bytes(self, id: str, bytes_done: int) -> None:
        """What reconcile found."""
        self._part_bytes[id] = bytes_done

    def arrival(self, id: str) -> tuple[float, int] | None:
        """When a part was opened (monotonic seconds) and how many bytes it had; told once."""
        return self._arrivals.pop(id, None)

    @contextmanager
    def removing(self) -> Iterator[list[Path]]:
        """What is put into the list is removed at the end, outside all locks."""
        trash: list[Path] = []
        try:
            yield trash
        finally:
            purge(trash)

    def _tick(self) -> None:
        with self.removing() as trash, self.mutex:
            removal.drop_revoked(self, self.pins.expire(), trash)
            self._flush()

    def _flush(self) -> None:
        with self.mutex:
            hits, self._hits = self._hits, {}
            if hits:
                self.catalog.warmed(hits, self.pins.now_s())
            self.pins.save()
