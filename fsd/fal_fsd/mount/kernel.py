"""Mounting, unmounting and aborting FUSE connections: the system calls that Python lacks.

Invariant: nothing here looks at anything below a mount point. Such a look would be a request to ourselves. What is
mounted where is read from /proc/self/mountinfo. Called by `mounts` and `probe`, in threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError
from fal_fsd.mount.wire import READ_BYTES_MAX

DEVICE: Final = Path("/dev/fuse")
FS_TYPE: Final = "fuse.falctl"
_CONTROL: Final = Path("/sys/fs/fuse/connections")
_READAHEAD_KIB: Final = READ_BYTES_MAX >> 10
_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_OCTAL: Final = re.compile(r"\\([0-7]{3})")

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mounted:
    """A FUSE mount of ours. `connection`: its number below /sys/fs/fuse/connections."""

    path: Path
    connection: int


def open_device() -> int:
    """A new /dev/fuse, non-blocking. FAILED_PRECONDITION when this machine has none for us."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise _refused(f"{DEVICE} cannot be opened", exc.errno or 0) from exc


def mount(device_fd: int, path: Path) -> int:
    """Mount that device read-only at `path`, for every user; the number of its connection."""
    options = (
        f"fd={device_fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={READ_BYTES_MAX}"
    )
    flags = ctypes.c_ulong(_MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    if _libc.mount(b"falctl", os.fsencode(path), FS_TYPE.encode(), flags, options.encode()) < 0:
        raise _refused(f"FUSE cannot be mounted at {path}", ctypes.get_errno())
    found = [x for x in mounted_below(path.parent) if x.path == path]
    if not found:
        umount(path)
        raise FalError(Code.INTERNAL, f"the mount at {path} is not listed", remedy="Tell us your kernel's version.")
    connection = found[-1].connection
    # A page fault reads ahead so far. Best effort: a machine without sysfs reads 128 KiB at a time.
    with contextlib.suppress(OSError):
        Path(f"/sys/class/bdi/0:{connection}/read_ahead_kb").write_text(str(_READAHEAD_KIB))
    return connection


def umount(path: Path) -> bool:
    """Detach the topmost mount at `path`; what has it open keeps it. False when nothing is mounted there."""
    return int(_libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW)) == 0


def remove_mount_point(path: Path) -> None:
    """Detach everything at `path` and remove the empty folder; nothing there is fine."""
    while umount(path):
        pass
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def mounted_below(folder: Path) -> list[Mounted]:
    """Our FUSE mounts at or directly below `folder` (an absolute path without links), in mount order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        head, _, tail = line.partition(" - ")
        _id, _parent, device, _root, escaped, *_ = head.split(" ")
        path = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), escaped))
        if tail.startswith(f"{FS_TYPE} ") and (path == folder or path.parent == folder):
            found.append(Mounted(path, int(device.partition(":")[2])))
    return found


def abort(connection: int) -> bool:
    """End a connection whatever hangs in it: all its requests fail. False when the kernel would not."""
    control = _CONTROL / str(connection) / "abort"
    try:
        if not control.exists():
            _mount_control()
        control.write_text("1")
    except OSError:
        return False
    return True


def _mount_control() -> None:
    if not _CONTROL.is_dir() or any(_CONTROL.iterdir()):
        return
    _libc.mount(b"fusectl", os.fsencode(_CONTROL), b"fusectl", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV), None)


def _refused(what: str, number: int) -> FalError:
    return FalError(
        Code.FAILED_PRECONDITION,
        f"{what}: {os.strerror(number)}",
        remedy="Unfinished models are not shown; containers wait until they are ready. Run fal-fsd as root with FUSE.",
    )
