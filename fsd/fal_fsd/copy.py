"""Copy one file and check it: reflink or in-kernel copy where the file systems can, SHA-256 over what was written.

Invariant: returns only when the target holds exactly the manifest's bytes, durable, mode 0444. The digest is taken from
the target, not from the source, so that the copy itself is checked too. Runs in threads, called by fal_fsd.store.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError
from fal_contract.model_manifest import FileEntry

_CHUNK_BYTES: Final = 8 << 20
_FICLONE: Final = 0x40049409
_NO_KERNEL_COPY: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})

OnBytes = Callable[[int], None]


class Cancelled(Exception):
    """Nobody wants the artifact any more."""


def copy_checked(source: Path, target: Path, entry: FileEntry, *, on_bytes: OnBytes, stop: threading.Event) -> None:
    """See the module. Raises CORRUPT, NOT_FOUND, INVALID, OSError (disk full), Cancelled."""
    _check(stop)
    if _have(target, entry, on_bytes, stop):
        return
    source_fd = _open_source(source, entry)
    try:
        target.unlink(missing_ok=True)
        target_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        try:
            digest = _fill(source_fd, target_fd, entry.size_bytes, on_bytes, stop)
            if digest != entry.sha256:
                raise _corrupt(source, entry, f"SHA-256 is {digest.hex()}, not {entry.sha256.hex()}")
            os.fchmod(target_fd, 0o444)
            os.fsync(target_fd)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def _have(target: Path, entry: FileEntry, on_bytes: OnBytes, stop: threading.Event) -> bool:
    """True when an earlier attempt (before a kill -9) left the whole file: it is read and hashed, not believed."""
    try:
        fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if os.fstat(fd).st_size != entry.size_bytes:
            return False
        hasher, at = hashlib.sha256(), 0
        while at < entry.size_bytes:
            _check(stop)
            chunk = os.pread(fd, _CHUNK_BYTES, at)
            if not chunk:
                return False
            hasher.update(chunk)
            at += len(chunk)
        if hasher.digest() != entry.sha256:
            return False
        os.fsync(fd)
    finally:
        os.close(fd)
    on_bytes(entry.size_bytes)
    return True


def _open_source(source: Path, entry: FileEntry) -> int:
    try:
        # O_NONBLOCK: a FIFO in the folder must not hang us.
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise FalError(
            Code.NOT_FOUND,
            f"file {entry.path!r} cannot be read at {source}: {exc.strerror}",
            remedy="Put it back where the model was registered, or register the model again.",
            field=entry.path,
        ) from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise _corrupt(source, entry, "it is no regular file")
    if info.st_size != entry.size_bytes:
        os.close(fd)
        raise _corrupt(source, entry, f"it has {info.st_size} bytes, not {entry.size_bytes}")
    return fd


def _fill(source_fd: int, target_fd: int, size_bytes: int, on_bytes: OnBytes, stop: threading.Event) -> bytes:
    cloned = _clone(source_fd, target_fd)
    hasher, at, in_kernel = hashlib.sha256(), 0, True
    while at < size_bytes:
        _check(stop)
        want = min(_CHUNK_BYTES, size_bytes - at)
        if not cloned:
            in_kernel = in_kernel and _copy_range(source_fd, target_fd, at, want)
            if not in_kernel:
                _copy_plain(source_fd, target_fd, at, want)
        chunk = os.pread(target_fd, want, at)
        if not chunk:
            break  # the source shrank: the digest will say so
        hasher.update(chunk)
        at += len(chunk)
        on_bytes(len(chunk))
    return hasher.digest()


def _clone(source_fd: int, target_fd: int) -> bool:
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError:
        return False  # another file system, or one without reflinks
    return True


def _copy_range(source_fd: int, target_fd: int, at: int, want: int) -> bool:
    """Copy [at, at+want) in the kernel; False when these file systems cannot."""
    done = 0
    while done < want:
        try:
            count = os.copy_file_range(source_fd, target_fd, want - done, at + done, at + done)
        except OSError as exc:
            if exc.errno in _NO_KERNEL_COPY:
                return False
            raise
        if count == 0:
            return False
        done += count
    return True


def _copy_plain(source_fd: int, target_fd: int, at: int, want: int) -> None:
    done = 0
    while done < want:
        chunk = os.pread(source_fd, want - done, at + done)
        if not chunk:
            return
        view = memoryview(chunk)
        while view:
            written = os.pwrite(target_fd, view, at + done)
            view, done = view[written:], done + written


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Cancelled


def _corrupt(source: Path, entry: FileEntry, why: str) -> FalError:
    return FalError(
        Code.CORRUPT,
        f"file {entry.path!r} at {source} is not what was registered: {why}",
        remedy="Nothing of the model was exposed. Restore the file, or register the model again.",
        field=entry.path,
    )
