"""An unpacked image on disk: how large it is, what in it cannot be packed, and how it is made equal everywhere.

Nothing here follows a link or opens a file. Walks keep a list, not the stack: a hostile tree may be deep.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError, invalid
from fal_runtime.images.manifest import too_large

FILES_MAX: Final = 4_000_000
_SPECIAL_MAX: Final = 1000  # names of device nodes and sockets that are kept
_ANYWAY_S: Final = 20.0
_REST_FACTOR: Final = 10  # a walk is made at most this many times its own duration apart


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of all files, hard links once; number of entries."""

    bytes: int
    files: int


@dataclass(slots=True)
class Findings:
    """`special`: device nodes and sockets, paths below the root; `ids_beyond`: files of users or groups that a
    container's range of 65,536 lacks; `unreadable`: files that an ordinary user had to make readable."""

    size: Size = Size(0, 0)
    special: list[str] = field(default_factory=list)
    ids_beyond: int = 0
    unreadable: int = 0


def measure(root: Path, *, bytes_max: int = 1 << 62, files_max: int = 1 << 62) -> Size:
    """How large it is by now; stops once it is beyond a bound. What vanishes meanwhile is not counted."""
    size, files, seen = 0, 0, set()
    for _, facts in _walk(os.fsencode(root)):
        files += 1
        if facts.st_nlink > 1 and not stat.S_ISDIR(facts.st_mode):
            if facts.st_ino in seen:
                continue
            seen.add(facts.st_ino)
        size += max(facts.st_size, facts.st_blocks * 512)
        if size > bytes_max or files > files_max:
            break
    return Size(size, files)


class Growth:
    """Says when a folder becomes too large, without walking it all the time.

    The file system's own numbers are asked first, and the folder is walked only where these allow that it is too large.
    As others write and remove there, too, and some file systems count no files, it is walked now and then anyway.
    """

    def __init__(self, root: Path, bytes_max: int) -> None:
        self._root = root
        self._bytes_max = bytes_max
        self._clock = SystemClock()
        self._before = os.statvfs(root)
        self._next_s = 0.0
        self._anyway_s = self._clock.monotonic_s() + _ANYWAY_S

    def check(self) -> None:
        """FAILED_PRECONDITION once it is beyond a bound."""
        now = os.statvfs(self._root)
        bytes_ = (self._before.f_bfree - now.f_bfree) * now.f_frsize
        files = self._before.f_ffree - now.f_ffree
        began_s = self._clock.monotonic_s()
        likely = bytes_ > self._bytes_max or files > FILES_MAX or not now.f_files
        if began_s < (self._next_s if likely else self._anyway_s):
            return
        size = measure(self._root, bytes_max=self._bytes_max, files_max=FILES_MAX)
        ended_s = self._clock.monotonic_s()
        self._next_s = ended_s + _REST_FACTOR * (ended_s - began_s)
        self._anyway_s = self._next_s + _ANYWAY_S
        check_size(size, self._bytes_max)


def check_size(size: Size, bytes_max: int) -> None:
    """FAILED_PRECONDITION beyond a bound."""
    if size.bytes > bytes_max:
        raise too_large(size.bytes, bytes_max)
    if size.files > FILES_MAX:
        what = f"the image has more than {FILES_MAX} files"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Make it smaller.", field="source")


def inspect(root: Path, *, bytes_max: int, ids_max: int, since_s: float = 0.0, repair: bool = False) -> Findings:
    """Look at everything once before it is packed.

    With `repair` (a tree that we unpacked): device nodes and sockets are removed, times that were set by unpacking
    (after `since_s`, seconds since 1970) become 1970, files that their owner may not read become readable.
    """
    found = Findings()
    size, files, seen = 0, 0, set()
    device = os.stat(root).st_dev
    prefix = len(os.fsencode(root)) + 1
    for path, facts in _walk(os.fsencode(root), repair=repair):
        files += 1
        mode = facts.st_mode
        if facts.st_dev != device:
            where = os.fsdecode(path[prefix:])
            raise invalid("source", where, "is another file system", remedy="Unmount what is mounted in the folder.")
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
            if len(found.special) < _SPECIAL_MAX:
                found.special.append(os.fsdecode(path[prefix:]))
            if repair:
                os.unlink(path)
                continue
        if facts.st_uid >= ids_max or facts.st_gid >= ids_max:
            found.ids_beyond += 1
        if facts.st_nlink > 1 and not stat.S_ISDIR(mode):
            if facts.st_ino in seen:
                continue
            seen.add(facts.st_ino)
        size += facts.st_size if stat.S_ISREG(mode) else 0
        if repair and stat.S_ISREG(mode) and not mode & stat.S_IRUSR and os.geteuid() != 0:
            os.chmod(path, stat.S_IMODE(mode) | stat.S_IRUSR)
            found.unreadable += 1
        if repair and facts.st_mtime >= since_s:
            os.utime(path, (0, 0), follow_symlinks=False)
        if size > bytes_max or files > FILES_MAX:
            break
    if repair and os.stat(root).st_mtime >= since_s:
        os.utime(root, (0, 0))
    found.size = Size(size, files)
    check_size(found.size, bytes_max)
    return found


def _walk(root: bytes, *, repair: bool = False) -> Iterator[tuple[bytes, os.stat_result]]:
    """Everything below `root`, folders after what is in them (their times change with it). Names are bytes: an image's
    need not be text. Raises OSError for what cannot be read, unless it has vanished."""
    stack: list[tuple[bytes, os.stat_result | None]] = [(root, None)]
    while stack:
        folder, done = stack.pop()
        if done is not None:
            yield folder, done
            continue
        with suppress(FileNotFoundError, NotADirectoryError):
            inside = []
            for entry in _entries(folder, repair=repair):
                with suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(facts.st_mode):
                        inside.append((entry.path, facts))
                    else:
                        yield entry.path, facts
            for path, facts in inside:
                stack.append((path, facts))
                stack.append((path, None))


def _entries(folder: bytes, *, repair: bool) -> list[os.DirEntry[bytes]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:
        if not repair:
            raise
    os.chmod(folder, stat.S_IRWXU)  # an ordinary user's, with a mode that shuts its owner out
    with os.scandir(folder) as entries:
        return list(entries)
