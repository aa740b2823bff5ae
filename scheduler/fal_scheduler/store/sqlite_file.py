"""The SQLite store's file: its format, the checks before it is touched, its lock, its transactions, its errors.

Blocking; called on the store's database thread (the lock also on the event loop: it never waits). Must not decide
who leads: that is sqlite.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import struct
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from fal_contract.errors import Code, FalError

FORMAT_VERSION: Final = 1  # PRAGMA user_version
APPLICATION_ID: Final = 0x46414C43  # PRAGMA application_id, "FALC"
_MAGIC: Final = b"SQLite format 3\0"
_HEADER_BYTES: Final = 100
_PAGE_BYTES: Final = 4096
_WAL_KEPT_BYTES: Final = 16 << 20
_SCHEMA: Final = """
-- With a rowid: values of 700 bytes in the key's own tree would make every write touch more pages.
CREATE TABLE record (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE meta (term INTEGER NOT NULL, revision INTEGER NOT NULL, holder TEXT NOT NULL, token BLOB NOT NULL);
INSERT INTO meta VALUES (0, 0, '', x'');
"""
# A statement per number of operations: 1 to 100 rows to put, 1 to 100 keys to delete, and a few more.
_STATEMENTS_CACHED: Final = 256
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def check_header(path: Path) -> None:
    """Refuse a file that is no store of ours or of a newer format, from its first 100 bytes."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise _corrupt(path, "its header is not that of a SQLite file")
    (version,) = struct.unpack(">I", header[60:64])
    (application,) = struct.unpack(">I", header[68:72])
    if application != APPLICATION_ID:
        raise _corrupt(path, "it is a SQLite file of another program")
    if version > FORMAT_VERSION:
        raise FalError(
            Code.VERSION_MISMATCH,
            f"store {path} has format {version}, this scheduler reads up to {FORMAT_VERSION}",
            remedy="Start the newer scheduler that wrote it, or restore a backup made before the upgrade.",
        )


def check_whole(path: Path) -> None:
    """Refuse a store whose pages do not hold together; changes nothing. Needs the lock: nobody may be writing.

    With a write-ahead log beside it the file alone may be torn, and opening it would recover it: then a copy is
    recovered and checked. Without one, the file itself is read as immutable, which creates no side file.
    """
    check_header(path)
    wal = path.with_name(path.name + "-wal")
    if size_of(wal) == 0:
        _quick_check(path, path, "mode=ro&immutable=1")
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-check-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        shutil.copyfile(wal, copy.with_name(copy.name + "-wal"))
        _quick_check(path, copy, "mode=rw")


def _quick_check(path: Path, readable: Path, options: str) -> None:
    """Check `readable`, the file at `path` or a copy of it; errors name `path`."""
    try:
        db = sqlite3.connect(f"{readable.absolute().as_uri()}?{options}", uri=True, isolation_level=None)
        try:
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            rows = db.execute("SELECT term, revision FROM meta").fetchall()
            db.execute("SELECT key, value FROM record LIMIT 1").fetchall()
        finally:
            db.close()
    except sqlite3.DatabaseError as error:
        raise _corrupt(path, str(error)) from error
    if verdict != "ok":
        raise _corrupt(path, verdict)
    if len(rows) != 1:
        raise _corrupt(path, f"it has {len(rows)} terms")


def create(path: Path) -> None:
    """Make an empty store, complete before it has its name: a crash on the way leaves no half of one."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    try:
        db = sqlite3.connect(unfinished, isolation_level=None)
        try:
            db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            db.execute("PRAGMA journal_mode = WAL")
        finally:
            db.close()
    except sqlite3.Error as error:
        unfinished.unlink(missing_ok=True)
        raise translate(error, path, committing=False) from error
    unfinished.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def connect(path: Path, *, file_bytes_max: int) -> sqlite3.Connection:
    """The store's connection: write-ahead log, every commit synced, the file bounded."""
    try:
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, cached_statements=_STATEMENTS_CACHED
        )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")
        db.execute(f"PRAGMA max_page_count = {file_bytes_max // _PAGE_BYTES}")
    except sqlite3.Error as error:
        raise translate(error, path, committing=False) from error
    return db


class Transaction:
    """`with Transaction(...) as db`: committed at the end, rolled back on any error, SQLite's errors as ours."""

    def __init__(self, db: sqlite3.Connection, kind: str, path: Path) -> None:
        self._db, self._kind, self._path = db, kind, path

    def __enter__(self) -> sqlite3.Connection:
        try:
            self._db.execute(f"BEGIN {self._kind}")
        except sqlite3.Error as error:
            raise translate(error, self._path, committing=False) from error
        return self._db

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if error is None:
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error as failure:
                self._roll_back()
                raise translate(failure, self._path, committing=True) from failure
            return False
        self._roll_back()
        if isinstance(error, sqlite3.Error):
            raise translate(error, self._path, committing=False) from error
        return False

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # SQLite rolls some failures back by itself
            self._db.execute("ROLLBACK")


def translate(error: sqlite3.Error, path: Path, *, committing: bool) -> FalError:
    """SQLite's error as ours. While committing, an input/output error leaves the outcome open."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _DAMAGED:
        return _corrupt(path, str(error))
    if code == sqlite3.SQLITE_FULL:
        return FalError(
            Code.STORE_FAILED,
            f"store {path} cannot grow: {error}",
            remedy=f"Free space in {path.parent}; the scheduler goes on by itself.",
        )
    if committing and code == sqlite3.SQLITE_IOERR:
        return FalError(
            Code.STORE_UNKNOWN,
            f"store {path} failed while committing: {error}",
            remedy="Check the disk; the scheduler must load the records again before it goes on.",
        )
    return FalError(Code.STORE_FAILED, f"store {path} failed: {error}", remedy="Check the disk and the file's owner.")


def inode_of(path: Path) -> tuple[int, int]:
    """(device, inode), (0, 0) where there is no file."""
    try:
        status = os.stat(path)  # at every commit, and three times faster than Path.stat
    except FileNotFoundError:
        return (0, 0)
    return (status.st_dev, status.st_ino)


def size_of(path: Path) -> int:
    """Bytes, 0 where there is no file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _corrupt(path: Path, why: str) -> FalError:
    return FalError(
        Code.CORRUPT,
        f"store {path} is damaged or not ours: {why}",
        remedy="Nothing was changed. Restore the file from a backup, or move it away to begin with an empty store.",
    )


class FileLock:
    """An advisory lock on a side file, which names its holder. It ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self, holder: str) -> bool:
        """Take the lock without waiting; True where it is ours now (or was already)."""
        if self._fd is None:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            self._fd = fd
        text = holder.encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)
        return True

    def release(self) -> None:
        """Give the lock up; nothing happens where it is not ours."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def exists(self) -> bool:
        """Whether anybody ever took it."""
        return self._path.exists()

    def holder(self) -> str:
        """What the holder wrote; for error messages only."""
        return self._path.read_text(errors="replace").strip() or "another process"
