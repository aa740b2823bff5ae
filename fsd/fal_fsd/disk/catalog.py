"""What the cache remembers in `cache.db` (SQLite, WAL, synchronous FULL): artifacts, pins, blobs, what is withdrawn.

Invariant: a pin is durable when `pin` returns. All methods block and are thread-safe. Times are store times
(fal_fsd.core.pin_clock) except where a name says otherwise. A state folder of the release before has `pins.db`
instead (fal_fsd.disk.takeover).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError, not_found
from fal_fsd.core.eviction import cooled

SCHEMA_VERSION: Final = 1
PART, READY, REVOKED = "part", "ready", "revoked"
_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE artifact (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, kind TEXT NOT NULL, bytes INTEGER NOT NULL, state TEXT NOT NULL,
    heat REAL NOT NULL DEFAULT 0, used_at_s REAL NOT NULL DEFAULT 0, hits INTEGER NOT NULL DEFAULT 0,
    seconds_back REAL NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE INDEX artifact_digest ON artifact (digest);
CREATE TABLE name (artifact TEXT NOT NULL, model TEXT NOT NULL, PRIMARY KEY (artifact, model)) WITHOUT ROWID;
CREATE TABLE pin (
    artifact TEXT NOT NULL, owner TEXT NOT NULL, expires_s REAL NOT NULL, PRIMARY KEY (artifact, owner)) WITHOUT ROWID;
CREATE INDEX pin_owner ON pin (owner);
CREATE TABLE blob (
    sha256 TEXT PRIMARY KEY, bytes INTEGER NOT NULL, ino INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    boot TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE holds (artifact TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (artifact, sha256)) WITHOUT ROWID;
CREATE INDEX holds_sha256 ON holds (sha256);
CREATE TABLE revoked (id TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 1;
"""
# Beside version 1, which does not miss it.
_LATER: Final = """
CREATE TABLE IF NOT EXISTS came (
    artifact TEXT PRIMARY KEY, origin INTEGER NOT NULL, peers INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Row:
    """An artifact. `bytes_freed`: of blobs that only it holds (of a part: all of it)."""

    id: str
    digest: str
    kind: str
    bytes_total: int
    state: str
    heat: float
    used_at_s: float
    hits: int
    seconds_back: float
    bytes_freed: int = 0


@dataclass(frozen=True, slots=True)
class BlobRow:
    """A finished file as it was when its content was last known to be good; `boot`: in which start of the machine."""

    sha256: str
    bytes: int
    ino: int
    mtime_ns: int
    boot: str


_COLUMNS: Final = "id, digest, kind, bytes, state, heat, used_at_s, hits, seconds_back"


class Catalog:
    """See the module. Raises FalError at opening: a newer or a damaged database."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._db = _open(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable at its end; nests."""
        with self._lock:
            self._depth += 1
            try:
                if self._depth > 1:
                    yield self._db
                    return
                with self._db:
                    yield self._db
            except sqlite3.OperationalError as exc:
                raise FalError(
                    Code.STORE_FAILED, f"cache.db: {exc}", remedy="Free space on the cache disk, look at fal-fsd's log."
                ) from exc
            finally:
                self._depth -= 1

    # ---- small things

    def recall(self, key: str) -> bytes | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def remember(self, key: str, value: bytes) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # ---- artifacts

    def put(self, id: str, *, digest: str, kind: str, bytes_total: int, state: str, used_at_s: float) -> None:
        """Make it known, or change its digest and state."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO artifact (id, digest, kind, bytes, state, used_at_s) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET digest = excluded.digest, state = excluded.state",
                (id, digest, kind, bytes_total, state, used_at_s),
            )

    def set_state(self, id: str, state: str) -> None:
        with self.transaction() as db:
            db.execute("UPDATE artifact SET state = ? WHERE id = ?", (state, id))

    def name(self, id: str, model: str) -> None:
        """It was staged under this name."""
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO name VALUES (?, ?)", (id, model))

    def get(self, id: str) -> Row | None:
        with self._lock:
            row = self._db.execute(f"SELECT {_COLUMNS} FROM artifact WHERE id = ?", (id,)).fetchone()
        return None if row is None else Row(*row)

    def resolve(self, id: str) -> list[str]:
        """Artifact ids that `id` names, itself an artifact id or a manifest digest; what is READY first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT id FROM artifact WHERE id = ? OR (digest = ? AND digest != '')"
                " ORDER BY state != ?, state = ?, id",
                (id, id, READY, REVOKED),
            ).fetchall()
        return [row[0] for row in rows]

    def rows(self) -> list[Row]:
        """All, by id, with what each would free."""
        with self._lock:
            rows = self._db.execute(
                f"SELECT {_COLUMNS}, CASE WHEN state = '{PART}' THEN bytes ELSE COALESCE((SELECT SUM(b.bytes)"
                " FROM holds h JOIN blob b USING (sha256) WHERE h.artifact = artifact.id AND NOT EXISTS"
                " (SELECT 1 FROM holds o WHERE o.sha256 = h.sha256 AND o.artifact != h.artifact)), 0) END"
                " FROM artifact ORDER BY id"
            ).fetchall()
        return [Row(*row) for row in rows]

    def parts(self) -> list[tuple[str, int]]:
        """Ids and whole sizes of parts."""
        with self._lock:
            return self._db.execute("SELECT id, bytes FROM artifact WHERE state = ?", (PART,)).fetchall()

    def names(self) -> dict[str, list[str]]:
        with self._lock:
            rows = self._db.execute("SELECT artifact, model FROM name ORDER BY artifact, model").fetchall()
        found: dict[str, list[str]] = {}
        for id, model in rows:
            found.setdefault(id, []).append(model)
        return found

    def warmed(self, hits: dict[str, int], now_s: float) -> None:
        """So many requests since the last call."""
        with self.transaction() as db:
            for id, count in hits.items():
                row = db.execute("SELECT heat, used_at_s FROM artifact WHERE id = ?", (id,)).fetchone()
                if row is not None:
                    heat = cooled(row[0], now_s - row[1]) + count
                    db.execute(
                        "UPDATE artifact SET heat = ?, used_at_s = ?, hits = hits + ? WHERE id = ?",
                        (heat, now_s, count, id),
                    )

    def set_seconds_back(self, id: str, seconds: float) -> None:
        with self.transaction() as db:
            db.execute("UPDATE artifact SET seconds_back = ? WHERE id = ?", (seconds, id))

    def remove(self, id: str) -> None:
        """With its names, pins and holds."""
        with self.transaction() as db:
            db.execute("DELETE FROM artifact WHERE id = ?", (id,))
            for table in ("name", "pin", "holds", "came"):
                db.execute(f"DELETE FROM {table} WHERE artifact = ?", (id,))

    def came(self) -> dict[str, tuple[int, int]]:
        """Bytes of each artifact that the origin and that peers sent, since it came here."""
        with self._lock:
            rows = self._db.execute("SELECT artifact, origin, peers FROM came").fetchall()
        return {id: (origin, peers) for id, origin, peers in rows}

    def came_of(self, id: str) -> tuple[int, int]:
        """As above, of one."""
        with self._lock:
            row = self._db.execute("SELECT origin, peers FROM came WHERE artifact = ?", (id,)).fetchone()
        return (0, 0) if row is None else (int(row[0]), int(row[1]))

    def set_came(self, counts: Mapping[str, tuple[int, int]]) -> None:
        """These are it now. What is not known here is passed over."""
        with self.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO came SELECT id, ?, ? FROM artifact WHERE id = ?",
                [(origin, peers, id) for id, (origin, peers) in counts.items()],
            )

    # ---- pins

    def pin(self, ids: Iterable[str], owner: str, expires_s: float) -> None:
        """`expires_s` in store time; 0: never."""
        with self.transaction() as db:
            for id in ids:
                db.execute("INSERT OR REPLACE INTO pin VALUES (?, ?, ?)", (id, owner, expires_s))

    def unpin(self, owner: str, ids: Sequence[str] | None) -> list[str]:
        """Ids whose pins of `owner` there were."""
        with self.transaction() as db:
            rows = db.execute("SELECT artifact FROM pin WHERE owner = ? ORDER BY artifact", (owner,)).fetchall()
            gone = [row[0] for row in rows if ids is None or row[0] in ids]
            db.executemany("DELETE FROM pin WHERE owner = ? AND artifact = ?", [(owner, id) for id in gone])
        return gone

    def pins(self, now_s: float) -> dict[str, list[str]]:
        """Owners of each artifact's pins that hold."""
        with self._lock:
            rows = self._db.execute(
                "SELECT artifact, owner FROM pin WHERE expires_s = 0 OR expires_s > ? ORDER BY artifact, owner",
                (now_s,),
            ).fetchall()
        found: dict[str, list[str]] = {}
        for id, owner in rows:
            found.setdefault(id, []).append(owner)
        return found

    def pinned(self, id: str, now_s: float) -> bool:
        with self._lock:
            row = self._db.execute(
                "SELECT 1 FROM pin WHERE artifact = ? AND (expires_s = 0 OR expires_s > ?) LIMIT 1", (id, now_s)
            ).fetchone()
        return row is not None

    def expire(self, now_s: float) -> list[str]:
        """Forget pins that have ended; the ids that had one."""
        with self._lock:
            if not self._db.execute("SELECT 1 FROM pin WHERE expires_s BETWEEN 1e-9 AND ?", (now_s,)).fetchone():
                return []  # no write, no fsync
        with self.transaction() as db:
            rows = db.execute("DELETE FROM pin WHERE expires_s BETWEEN 1e-9 AND ? RETURNING artifact", (now_s,))
            return sorted({row[0] for row in rows.fetchall()})

    # ---- blobs

    def put_blob(self, blob: BlobRow) -> None:
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO blob VALUES (?, ?, ?, ?, ?)",
                (blob.sha256, blob.bytes, blob.ino, blob.mtime_ns, blob.boot),
            )

    def blob(self, sha256: str) -> BlobRow | None:
        with self._lock:
            row = self._db.execute("SELECT * FROM blob WHERE sha256 = ?", (sha256,)).fetchone()
        return None if row is None else BlobRow(*row)

    def drop_blob(self, sha256: str) -> None:
        with self.transaction() as db:
            db.execute("DELETE FROM blob WHERE sha256 = ?", (sha256,))

    def blob_names(self) -> set[str]:
        with self._lock:
            return {row[0] for row in self._db.execute("SELECT sha256 FROM blob")}

    def hold(self, id: str, sha256s: Iterable[str]) -> None:
        """READY artifact `id` consists of these."""
        with self.transaction() as db:
            db.executemany("INSERT OR IGNORE INTO holds VALUES (?, ?)", [(id, sha256) for sha256 in sha256s])

    def release(self, id: str) -> list[str]:
        """It does not any more; the blobs that nobody holds now."""
        with self.transaction() as db:
            mine = [row[0] for row in db.execute("SELECT sha256 FROM holds WHERE artifact = ?", (id,)).fetchall()]
            db.execute("DELETE FROM holds WHERE artifact = ?", (id,))
            return [x for x in mine if not db.execute("SELECT 1 FROM holds WHERE sha256 = ? LIMIT 1", (x,)).fetchone()]

    def holders(self, sha256: str) -> list[str]:
        with self._lock:
            rows = self._db.execute("SELECT artifact FROM holds WHERE sha256 = ? ORDER BY artifact", (sha256,))
            return [row[0] for row in rows.fetchall()]

    def bytes_used(self) -> int:
        """Of blobs, and of parts as if they were whole."""
        with self._lock:
            (blobs,) = self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM blob").fetchone()
            (parts,) = self._db.execute(
                "SELECT COALESCE(SUM(bytes), 0) FROM artifact WHERE state = ?", (PART,)
            ).fetchone()
        return int(blobs) + int(parts)

    # ---- withdrawn

    def revoke(self, id: str, reason: str) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO revoked VALUES (?, ?)", (id, reason))

    def revoked(self, *ids: str) -> str | None:
        """Why one of them was withdrawn; None: none was."""
        with self._lock:
            for id in ids:
                row = self._db.execute("SELECT reason FROM revoked WHERE id = ?", (id,)).fetchone()
                if row is not None:
                    return str(row[0])
        return None


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level="IMMEDIATE")
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        elif version > SCHEMA_VERSION:
            raise FalError(
                Code.VERSION_MISMATCH,
                f"{path} has version {version}, this fal-fsd reads up to {SCHEMA_VERSION}",
                remedy="Start the newer fal-fsd again; nothing was changed.",
            )
        elif (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        db.executescript(_LATER)
    except sqlite3.DatabaseError as exc:
        db.close()
        raise FalError(
            Code.CORRUPT,
            f"{path} is damaged: {exc}",
            remedy="Move it away and start again: models are kept, pins are told anew by the agent.",
        ) from None
    except FalError:
        db.close()
        raise
    return db


def unknown(id: str) -> FalError:
    """NOT_FOUND for an artifact id or manifest digest."""
    return not_found("artifact", id, remedy="Stage it first.")
