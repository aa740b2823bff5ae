"""The mount system calls that Python lacks, typed, and nothing else: what to mount where is decided elsewhere.

Every function raises DRIVER_FAILED with the call, the paths and the kernel's reason, or returns. Detached trees are
file descriptors that the caller closes. Call numbers from 424 on are the same on every architecture.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path
from typing import Final

from fal_contract.errors import FalError
from fal_runtime.driver import driver_failed

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_NOSYMFOLLOW: Final = 256
MS_PRIVATE: Final = 1 << 18
MS_SHARED: Final = 1 << 20

ATTR_RDONLY: Final = 0x1
ATTR_NOSUID: Final = 0x2
ATTR_NODEV: Final = 0x4
ATTR_NOEXEC: Final = 0x8
ATTR_IDMAP: Final = 0x100000
ATTR_NOSYMFOLLOW: Final = 0x200000

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_MOUNT_SETATTR: Final = 442
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_NO_AUTOMOUNT: Final = 0x800
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_MOVE_MOUNT_BENEATH: Final = 0x200
_STACKED_MAX: Final = 64

_libc: Final = ctypes.CDLL(None, use_errno=True)
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise driver_failed(f"{what}: {os.strerror(error)}", remedy="Run as root on Linux 5.12 or newer.") from OSError(
            error, os.strerror(error)
        )
    return result


def mount(source: str, target: Path, fs_type: str, flags: int, options: str = "") -> None:
    """mount(2) of a new filesystem."""
    result = _libc.mount(
        source.encode(), os.fsencode(target), fs_type.encode(), ctypes.c_ulong(flags), options.encode() or None
    )
    _check(result, f"mount of {fs_type} on {target}")


def set_propagation(target: Path, flag: int) -> None:
    """Make the mount at `target` MS_SHARED or MS_PRIVATE."""
    result = _libc.mount(None, os.fsencode(target), None, ctypes.c_ulong(flag), None)
    _check(result, f"change of propagation of {target}")


def open_tree(source: Path) -> int:
    """A detached copy of the mount at directory or file `source`, from there down, without mounts below it."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_NO_AUTOMOUNT
    result = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), ctypes.c_uint(flags))
    return _check(result, f"open_tree of {source}")


def mount_setattr(tree_fd: int, attr_set: int, *, userns_fd: int | None = None) -> None:
    """Set attributes of a detached tree; with `userns_fd` also map its owners through that user namespace."""
    if userns_fd is not None:
        attr_set |= ATTR_IDMAP
    attr = _MountAttr(attr_set, 0, 0, userns_fd if userns_fd is not None else 0)
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, tree_fd, b"", ctypes.c_uint(_AT_EMPTY_PATH), ctypes.byref(attr), ctypes.sizeof(attr)
    )
    _check(result, "mount_setattr" + (" with an id map" if userns_fd is not None else ""))


def move_mount(tree_fd: int, target: Path, *, beneath: bool = False) -> None:
    """Attach a detached tree at `target`; `beneath` puts it under the mount that is there (Linux 6.5)."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (_MOVE_MOUNT_BENEATH if beneath else 0)
    result = _libc.syscall(_SYS_MOVE_MOUNT, tree_fd, b"", _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags))
    _check(result, f"move_mount to {target}")


def umount(target: Path) -> None:
    """Detach the topmost mount at `target` and those below it; what has it open keeps it."""
    _check(_libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW), f"umount of {target}")


def bind_tree(source: Path, target: Path, attr_set: int, *, userns_fd: int | None = None) -> None:
    """`source` at `target` with its attributes in force from the first moment on."""
    tree_fd = open_tree(source)
    try:
        mount_setattr(tree_fd, attr_set, userns_fd=userns_fd)
        move_mount(tree_fd, target)
    finally:
        os.close(tree_fd)


def mount_points() -> list[Path]:
    """Every mount point of this mount namespace, in mount order."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        escaped = line.split(" ", 5)[4]
        points.append(Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), escaped)))
    return points


def is_mount_point(path: Path) -> bool:
    """Is another filesystem mounted at `path`? (A bind of the same one is not seen; we ask about tmpfs only.)"""
    return os.path.ismount(path)


def unmount_all(path: Path) -> int:
    """Detach whatever is mounted at `path`, however many times; returns how many. No mount is fine."""
    for count in range(_STACKED_MAX):
        try:
            umount(path)
        except FalError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (22, 2, 1):
                return count  # EINVAL: nothing mounted; ENOENT: no such path; EPERM: not root, so nothing of ours
            raise
    return _STACKED_MAX


def unmount_below(path: Path) -> list[Path]:
    """Detach every mount at or below `path`; returns the mount points. One call takes a whole subtree with it."""
    root = path.resolve()
    found = [point for point in mount_points() if point == root or root in point.parents]
    for point in sorted(found, key=lambda p: len(p.parts)):
        with contextlib.suppress(FalError):  # gone with the one above it
            umount(point)
    return found
