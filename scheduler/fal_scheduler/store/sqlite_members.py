"""Which schedulers of one SQLite store are up: a small locked file each, beside the store.

Invariant: `store.db.member-NAME` counts while the process that wrote it lives, because that holds a lock on it; the
file has its name only once it is whole and locked. What a dead process left is removed by whoever looks next.

Blocks on small files. Called by the SQLite store.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Final

from fal_scheduler.store.interface import Member

_BYTES_MAX: Final = 64 << 10


class MemberFiles:
    """The files beside the store at `path`; one process's view."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._prefix = f"{path.name}.member-"
        self._own: Member | None = None
        self._fd: int | None = None

    def announce(self, member: Member) -> None:
        """Be known as this; a second call with the same changes nothing. Raises OSError."""
        if member == self._own:
            return
        self.withdraw()
        path = self._file(member.name)
        scratch = path.with_name(f".{path.name}.new")
        fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fields = [member.name, list(member.addresses), member.started_at_s, member.software]
            os.write(fd, json.dumps(fields).encode())
            os.replace(scratch, path)
        except BaseException:
            os.close(fd)
            raise
        self._own, self._fd = member, fd

    def withdraw(self) -> None:
        """Be known no longer; nothing happens where we are not."""
        own, self._own = self._own, None
        fd, self._fd = self._fd, None
        if own is not None:
            self._file(own.name).unlink(missing_ok=True)
        if fd is not None:
            os.close(fd)

    def members(self) -> tuple[Member, ...]:
        """Who is up, by name."""
        found = [] if self._own is None else [self._own]
        for path in self._path.parent.glob(f"{self._prefix}*"):
            if self._own is None or path != self._file(self._own.name):
                member = _living(path)
                found += [member] if member is not None else []
        return tuple(sorted(found, key=lambda one: one.name))

    def _file(self, name: str) -> Path:
        return self._path.with_name(self._prefix + name.replace("/", "_"))


def _living(path: Path) -> Member | None:
    """Who holds this file; None, and the file is gone, where nobody does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                name, addresses, started_at_s, software = json.loads(os.read(fd, _BYTES_MAX))
                return Member(str(name), tuple(map(str, addresses)), float(started_at_s), str(software))
            except (TypeError, ValueError):
                return None  # of a release that writes it otherwise
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return None
    finally:
        os.close(fd)


__all__ = ["MemberFiles"]
