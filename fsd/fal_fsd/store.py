"""The cache on disk: whole artifacts under `models/`, unfinished ones under `parts/`, pins in SQLite.

Invariants: `models/DIGEST` appears by one rename, after every byte was checked and is durable, read-only from then
on; a pin survives kill -9; nothing is removed here but parts that nobody wants. All methods block: fal_fsd.service
calls them in threads. One process has a store (an exclusive lock on its folder).

    STATE/lock  STATE/pins.db  STATE/parts/DIGEST/…  STATE/models/DIGEST/…
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError, not_found
from fal_fsd.copy import OnBytes, copy_checked
from fal_fsd.core.manifest import Manifest

SCHEMA_VERSION: Final = 1
RESERVE_BYTES: Final = 256 << 20  # of the disk, for logs, journal and the rest of the node
_SCHEMA: Final = """
CREATE TABLE artifact (digest TEXT PRIMARY KEY, model TEXT NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE pin (digest TEXT NOT NULL, owner TEXT NOT NULL, PRIMARY KEY (digest, owner)) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What is known of one artifact here."""

    digest: str
    model: str
    bytes_total: int
    ready: bool
    pinned_by: tuple[str, ...]


class Store:
    """See the module's docstring. Raises FalError at opening: another fsd, a newer or a damaged database."""

    def __init__(self, root: Path, *, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._root = root
        self._reserve_bytes = reserve_bytes
        self._mutex = threading.Lock()
        for folder in (root, root / "models", root / "parts"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        self._lock_fd = _lock(root / "lock")
        try:
            self._db = _open(root / "pins.db")
            self._sweep()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        with self._mutex:
            self._db.close()
        os.close(self._lock_fd)

    # ---- artifacts

    def path(self, digest: str) -> Path:
        return self._root / "models" / digest

    def ready(self, digest: str) -> bool:
        return self.path(digest).is_dir()

    def begin(self, manifest: Manifest, model: str, owner: str) -> None:
        """Remember what is being staged, pinned for `owner` (unless empty)."""
        with self._mutex, self._db:
            self._db.execute(
                "INSERT INTO artifact VALUES (?, ?, ?) ON CONFLICT (digest) DO NOTHING",
                (manifest.digest, model, manifest.bytes_total),
            )
            if owner:
                self._db.execute("INSERT OR IGNORE INTO pin VALUES (?, ?)", (manifest.digest, owner))

    def stage(self, manifest: Manifest, source: Path, *, on_bytes: OnBytes, stop: threading.Event) -> Path:
        """Copy, check, expose. The caller makes sure that a digest is staged once at a time."""
        final, parts = self.path(manifest.digest), self._root / "parts" / manifest.digest
        if final.is_dir():
            return final
        self._check_room(manifest, parts)
        try:
            parts.mkdir(exist_ok=True)
            for folder in manifest.folders:
                (parts / folder).mkdir(exist_ok=True)
            for entry in manifest.files:
                copy_checked(source / entry.path, parts / entry.path, entry, on_bytes=on_bytes, stop=stop)
            _remove_strangers(parts, manifest)
            for folder in reversed(manifest.folders):
                os.chmod(parts / folder, 0o555)
                _fsync(parts / folder)
            _fsync(parts)
            os.rename(parts, final)
            os.chmod(final, 0o555)  # only now: without root a folder that is read-only cannot be moved
            _fsync(final)
            _fsync(final.parent)
        except OSError as exc:
            raise _disk_error(manifest, exc, self._root) from exc
        return final

    def abandon(self, digest: str) -> None:
        """Remove the parts and the row of an artifact that is neither ready nor pinned; else do nothing."""
        with self._mutex, self._db:
            if self.ready(digest) or self._db.execute("SELECT 1 FROM pin WHERE digest = ?", (digest,)).fetchone():
                return
            _remove_tree(self._root / "parts" / digest)
            self._db.execute("DELETE FROM artifact WHERE digest = ?", (digest,))

    def artifacts(self) -> list[Artifact]:
        """All that are here or on their way, by digest."""
        with self._mutex:
            pins: dict[str, list[str]] = {}
            for digest, owner in self._db.execute("SELECT digest, owner FROM pin ORDER BY owner"):
                pins.setdefault(digest, []).append(owner)
            rows = self._db.execute("SELECT digest, model, bytes FROM artifact ORDER BY digest").fetchall()
        return [Artifact(d, model, size, self.ready(d), tuple(pins.get(d, ()))) for d, model, size in rows]

    # ---- pins

    def pin(self, digest: str, owner: str) -> None:
        with self._mutex, self._db:
            if self._db.execute("SELECT 1 FROM artifact WHERE digest = ?", (digest,)).fetchone() is None:
                raise not_found("artifact", digest, remedy="Stage it first.")
            self._db.execute("INSERT OR IGNORE INTO pin VALUES (?, ?)", (digest, owner))

    def unpin(self, owner: str) -> list[str]:
        """The digests that were pinned for `owner`."""
        with self._mutex, self._db:
            rows = self._db.execute("DELETE FROM pin WHERE owner = ? RETURNING digest", (owner,)).fetchall()
        return [digest for (digest,) in rows]

    def pinned(self, digest: str) -> bool:
        with self._mutex:
            return self._db.execute("SELECT 1 FROM pin WHERE digest = ?", (digest,)).fetchone() is not None

    # ---- inside

    def _sweep(self) -> None:
        """After a start: parts that no pin wants go; rows without files and pins go too."""
        known = {artifact.digest: artifact for artifact in self.artifacts()}
        for digest in {folder.name for folder in (self._root / "parts").iterdir()} | known.keys():
            self.abandon(digest)

    def _check_room(self, manifest: Manifest, parts: Path) -> None:
        have = sum(file.stat().st_size for file in parts.rglob("*") if file.is_file()) if parts.exists() else 0
        free = shutil.disk_usage(self._root).free
        if manifest.bytes_total - have + self._reserve_bytes > free:
            raise _no_room(manifest, free, self._root)


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise FalError(
            Code.ALREADY_EXISTS,
            f"another fal-fsd works in {path.parent}",
            remedy="Use that one, or another --state-dir.",
        ) from None
    return fd


def _open(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, check_same_thread=False, isolation_level="IMMEDIATE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        elif version > SCHEMA_VERSION:
            db.close()
            raise FalError(
                Code.VERSION_MISMATCH,
                f"{path} has version {version}, this fal-fsd reads up to {SCHEMA_VERSION}",
                remedy="Start the newer fal-fsd again; nothing was changed.",
            )
    except sqlite3.DatabaseError as exc:
        raise FalError(
            Code.CORRUPT,
            f"{path} is damaged: {exc}",
            remedy="Move it away and start again: models are kept, pins are told anew by the agent.",
        ) from None
    return db


def _remove_strangers(parts: Path, manifest: Manifest) -> None:
    """An earlier attempt cannot leave files of another manifest, but what is exposed must be exactly the manifest."""
    wanted = {entry.path for entry in manifest.files} | set(manifest.folders)
    for found in sorted(parts.rglob("*"), reverse=True):
        if str(found.relative_to(parts)) not in wanted:
            found.rmdir() if found.is_dir() and not found.is_symlink() else found.unlink()


def _remove_tree(folder: Path) -> None:
    for below in [folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())]:
        with contextlib.suppress(OSError):
            os.chmod(below, 0o755)
    shutil.rmtree(folder, ignore_errors=True)


def _fsync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _no_room(manifest: Manifest, free: int, root: Path) -> FalError:
    return FalError(
        Code.NO_CAPACITY,
        f"the cache in {root} has no room: {manifest.bytes_total} bytes to stage, {free} free on the disk",
        remedy="Free space on that disk, or give fal-fsd a larger one.",
    )


def _disk_error(manifest: Manifest, exc: OSError, root: Path) -> FalError:
    if exc.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return _no_room(manifest, shutil.disk_usage(root).free, root)
    return FalError(Code.STORE_FAILED, f"staging failed: {exc}", remedy="Look at the cache disk and fal-fsd's log.")
