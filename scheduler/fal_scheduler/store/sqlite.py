"""The embedded store: one SQLite file (WAL, synchronous=FULL), one scheduler at a time by a lock on a side file.

Invariants: a file that is corrupt, foreign or of a newer format is refused before anything of it is changed; a commit
that was acknowledged is on the disk; the `-wal` and `-shm` files are SQLite's own and belong
to the store when it is copied.

One thread owns the connection (`DatabaseThread`); the event loop hands it closures over a queue and gets the answer by
`call_soon_threadsafe`. The sqlite3 module drops and retakes the interpreter lock around every statement, and beside
a busy loop each retake may wait a switch interval: so a commit is a fixed, small number of statements, however many
operations it has.

Called by the engine and the leader module. Must not be used from two event loops.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from fal_contract.errors import Code, FalError
from fal_scheduler.store import sqlite_file
from fal_scheduler.store.interface import (
    CommitCounters,
    Guard,
    Loaded,
    Member,
    Roster,
    Write,
    check_writes,
    leads_already,
    load_first,
    not_leader,
)
from fal_scheduler.store.sqlite_file import FileLock
from fal_scheduler.store.sqlite_members import MemberFiles
from fal_scheduler.store.sqlite_thread import DatabaseThread

_FILE_BYTES_MAX = 8 << 30
_ON_CONFLICT = "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
_LOCK_POLL_S = 0.2  # flock has no event; a waiting scheduler asks this often


class SqliteStore:
    """Records in one SQLite file."""

    name = "sqlite"

    def __init__(self, path: Path, *, standby: bool = False, file_bytes_max: int = _FILE_BYTES_MAX) -> None:
        """`standby`: where another scheduler has the file, wait for it in `campaign` instead of refusing in `open`."""
        self._path = path
        self._standby = standby
        self._file_bytes_max = file_bytes_max
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        self._members = MemberFiles(path)
        self._thread: DatabaseThread | None = None
        self._connection: sqlite3.Connection | None = None  # touched by the thread only
        self._inode: tuple[int, int] = (0, 0)  # the thread's too, as is _revision
        self._revision = 0
        self._lost: tuple[bytes, asyncio.Event] | None = None
        self._term = 0  # ours, while we lead
        self._must_load = False
        self._counters = CommitCounters()

    async def open(self) -> None:
        """Create the file where there is none, else check all of it."""
        if self._thread is not None:
            return
        self._thread = DatabaseThread(f"sqlite {self._path.name}")
        try:
            await self._thread.call(self._open_file)
        except OSError as error:
            await self.close()
            raise FalError(
                Code.STORE_FAILED,
                f"store {self._path} cannot be opened: {error}",
                remedy="Check the folder's owner and free space.",
            ) from error
        except BaseException:
            await self.close()
            raise

    async def campaign(self, holder: str, *, term_min: int = 0) -> Guard:
        """See Store. The lock is the leadership: it ends with the process, never by time."""
        thread = self._opened()
        if self._lost is not None:
            raise leads_already(holder)
        while not self._lock.acquire(f"{holder} (pid {os.getpid()})"):  # noqa: ASYNC110  (flock has no event)
            await asyncio.sleep(_LOCK_POLL_S)
        try:
            guard = await thread.call(lambda: self._begin_term(holder, term_min))
        except BaseException:
            self._lock.release()
            raise
        self._lost = (guard.token, asyncio.Event())
        self._term = guard.term
        return guard

    async def raise_term(self, guard: Guard, term: int) -> Guard:
        """See Store."""
        if term <= guard.term:
            return guard

        def update() -> Guard:
            with self._transaction() as db:
                changed = db.execute(
                    "UPDATE meta SET term = ? WHERE term = ? AND token = ?", (term, guard.term, guard.token)
                )
                if changed.rowcount != 1:
                    raise not_leader(guard, "another term has begun")
            return Guard(term, guard.holder, guard.token)

        self._check_lead(guard)
        raised = await self._opened().call(update)
        self._term = raised.term
        return raised

    async def resign(self, guard: Guard) -> None:
        """See Store."""
        if self._lost is not None and self._lost[0] == guard.token:
            self._end_leadership()

    async def lost(self, guard: Guard) -> None:
        """See Store."""
        if self._lost is not None and self._lost[0] == guard.token:
            await self._lost[1].wait()

    async def load(self) -> Loaded:
        """See Store."""

        def read() -> Loaded:
            with self._transaction("DEFERRED") as db:
                (self._revision,) = db.execute("SELECT revision FROM meta").fetchone()
                return Loaded(self._revision, dict(db.execute("SELECT key, value FROM record")))

        loaded = await self._opened().call(read)
        self._must_load = False
        return loaded

    async def commit(self, guard: Guard, writes: Sequence[Write]) -> int:
        """See Store."""
        size = check_writes(writes)
        thread = self._opened()
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        puts: list[str | bytes] = []
        deletes: list[str] = []
        for write in writes:
            if write.value is None:
                deletes.append(write.key)
            else:
                puts += (write.key, write.value)
        try:
            self._check_lead(guard)
            if self._must_load:
                raise load_first(self.name)
            revision = await thread.call(lambda: self._write(guard, puts, deletes))
        except FalError as error:
            self._must_load |= error.code is Code.STORE_UNKNOWN
            self._counters.refused(error)
            raise
        self._counters.committed(len(writes), size, loop.time() - begun_s)
        return revision

    async def announce(self, member: Member) -> None:
        """See Store. A locked file beside the store, that ends with the process."""
        try:
            self._members.announce(member)
        except OSError as error:
            raise FalError(
                Code.STORE_FAILED,
                f"no file can be made beside store {self._path}: {error}",
                remedy="Check the folder's owner and free space.",
            ) from error

    async def roster(self) -> Roster:
        """See Store. The term is the leader's to tell: 0 on a standby."""
        members = self._members.members()
        leader = self._lock.holder().partition(" (pid ")[0] if self._lock.exists() else ""
        if self._lost is None and all(one.name != leader for one in members):
            leader = ""  # whoever wrote that is gone
        return Roster(leader, self._term if self._lost is not None else 0, members)

    async def close(self) -> None:
        """See Store. The WAL is folded into the file, so that the file alone is the store."""
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                await thread.call(self._close_file)
            finally:
                await thread.stop()
        self._members.withdraw()
        self._end_leadership()

    def statistics(self) -> Mapping[str, float]:
        """See Store; `file_bytes` and `wal_bytes` are sizes on disk."""
        wal = self._path.with_name(self._path.name + "-wal")
        return {
            **self._counters.as_mapping(),
            "file_bytes": float(sqlite_file.size_of(self._path)),
            "wal_bytes": float(sqlite_file.size_of(wal)),
        }

    # On the event loop.

    def _opened(self) -> DatabaseThread:
        if self._thread is None:
            raise FalError(Code.FAILED_PRECONDITION, f"store {self._path} is not open", remedy="Open it first.")
        return self._thread

    def _check_lead(self, guard: Guard) -> None:
        if self._lost is None or self._lost[0] != guard.token:
            raise not_leader(guard, "it has resigned or another leads")

    def _end_leadership(self) -> None:
        lost, self._lost = self._lost, None
        self._lock.release()
        if lost is not None:
            lost[1].set()

    # On the database thread.

    def _open_file(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            sqlite_file.check_header(self._path)
        if self._lock.acquire(f"a scheduler that is starting (pid {os.getpid()})"):
            try:
                self._check_or_create()
            finally:
                self._lock.release()
        elif not self._standby:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"store {self._path} is in use by {self._lock.holder()}",
                remedy="Stop that scheduler, give this one another state directory, or start it as a standby.",
            )

    def _check_or_create(self) -> None:
        if self._path.exists():
            sqlite_file.check_whole(self._path)
        else:
            sqlite_file.create(self._path)

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite_file.connect(self._path, file_bytes_max=self._file_bytes_max)
            self._inode = sqlite_file.inode_of(self._path)
        return self._connection

    def _close_file(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()  # the last connection checkpoints and removes the WAL

    def _begin_term(self, holder: str, term_min: int) -> Guard:
        if self._connection is None:
            self._check_or_create()
        token = os.urandom(16)
        with self._transaction() as db:
            stored, revision = db.execute("SELECT term, revision FROM meta").fetchone()
            term = max(stored, term_min - 1) + 1
            db.execute("UPDATE meta SET term = ?, holder = ?, token = ?", (term, holder, token))
        self._revision = revision
        return Guard(term, holder, token)

    def _write(self, guard: Guard, puts: list[str | bytes], deletes: list[str]) -> int:
        """One transaction of at most five statements; `puts` is key, value, key, value …"""
        if sqlite_file.inode_of(self._path) != self._inode:
            raise FalError(
                Code.STORE_FAILED,
                f"store {self._path} was moved or replaced while in use",
                remedy="Stop the scheduler, put the right file in place, and start it again.",
            )
        revision = self._revision + 1
        with self._transaction() as db:
            # Not RETURNING: it costs more than the rest of a small commit.
            changed = db.execute(
                "UPDATE meta SET revision = ? WHERE term = ? AND token = ? AND revision = ?",
                (revision, guard.term, guard.token, self._revision),
            )
            if changed.rowcount != 1:
                raise not_leader(guard, "another term has begun, or another process wrote to the file")
            if puts:
                rows = ",".join(("(?,?)",) * (len(puts) // 2))
                # An upsert, not REPLACE, which deletes and inserts and so dirties more pages.
                db.execute(f"INSERT INTO record (key, value) VALUES {rows} {_ON_CONFLICT}", puts)
            if deletes:
                marks = ",".join("?" * len(deletes))
                db.execute(f"DELETE FROM record WHERE key IN ({marks})", deletes)
        self._revision = revision
        return revision

    def _transaction(self, kind: str = "IMMEDIATE") -> sqlite_file.Transaction:
        return sqlite_file.Transaction(self._connect(), kind, self._path)
