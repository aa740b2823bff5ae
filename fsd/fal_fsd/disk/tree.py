"""Files and folders, durable or gone: fsync, atomic replacement, links, removal, and what disk errors mean."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError

_FICLONE: Final = 0x40049409
_COPY_BYTES: Final = 8 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_KERNEL_COPY: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durable(path: Path, *chunks: bytes) -> None:
    """Replace `path` by a file with this content: after a crash it is the old one or the new one, whole."""
    fresh = path.with_name(f".{path.name}.new")
    with open(fresh, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.rename(fresh, path)
    fsync_folder(path.parent)


def remove_tree(folder: Path) -> None:
    """Remove `folder` with everything below it, read-only folders too; what does not exist is fine."""
    if not folder.is_dir() or folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    for below in [folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())]:
        with contextlib.suppress(OSError):
            os.chmod(below, 0o755)
    shutil.rmtree(folder, ignore_errors=True)


def clone(source_fd: int, target_fd: int) -> bool:
    """Let the target share the source's blocks (reflink); False where the file systems cannot."""
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError:
        return False
    return True


def copy_file(source: Path, target: Path) -> None:
    """A new file at `target` with the bytes of `source`, mode 0644, not yet durable. Raises OSError."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            if not clone(source_fd, target_fd):
                _copy(source_fd, target_fd, os.fstat(source_fd).st_size)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def _copy(source_fd: int, target_fd: int, size: int) -> None:
    done, in_kernel = 0, True
    while done < size:
        want = min(_COPY_BYTES, size - done)
        if in_kernel:
            try:
                count = os.copy_file_range(source_fd, target_fd, want, done, done)
            except OSError as exc:
                if exc.errno not in _NO_KERNEL_COPY:
                    raise
                in_kernel = False
                continue
            in_kernel = count > 0
            done += count
            continue
        chunk = os.pread(source_fd, want, done)
        if not chunk:
            raise OSError(errno.EIO, "the file is shorter than it was")
        write_all(target_fd, memoryview(chunk), done)
        done += len(chunk)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """pwrite, all of it. Raises OSError."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def lock_folder(path: Path) -> int:
    """An exclusive lock, as an open descriptor. ALREADY_EXISTS when another process has it."""
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


def raise_file_limit() -> None:
    """Allow this process as many open files as it may have: a part keeps one open for each file of its artifact."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def boot_id() -> str:
    """Names this start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def no_room(what: str, *, remedy: str = "Free space on that disk, or give fal-fsd a larger one.") -> FalError:
    """NO_CAPACITY."""
    return FalError(Code.NO_CAPACITY, what, remedy=remedy, field="disk_bytes_max")


def disk_error(exc: OSError, doing: str, root: Path) -> FalError:
    """What an OSError of the cache's disk means to an operator: full, or broken."""
    if exc.errno in _FULL:
        free = shutil.disk_usage(root).free
        return no_room(f"{doing}: the disk of {root} is full ({exc.strerror}, {free} bytes free)")
    return FalError(
        Code.STORE_FAILED, f"{doing}: {exc.strerror or exc}", remedy="Look at the cache disk and fal-fsd's log."
    )
