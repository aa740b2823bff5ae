"""Looks at files as a container sees them, without following a link out of it (openat2 with RESOLVE_IN_ROOT)."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path
from typing import Final

_SYS_OPENAT2: Final = 437  # the same on every architecture
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_inside(root: Path, name: str) -> int:
    """A descriptor for reading `name`, every link on the way resolved as if `root` were the whole file system.

    Linux 5.6. A fifo does not block, a terminal does not become ours. Raises OSError.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _open(directory, name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    finally:
        os.close(directory)


def _open(root: int, name: str, flags: int) -> int:
    how = _OpenHow(flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    fd: int = _libc.syscall(_SYS_OPENAT2, root, os.fsencode(name), ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return fd


def has_program(pid: int, name: str, path: str) -> bool:
    """Would process `pid` find an executable file when it runs `name` with this $PATH?"""
    candidates = [name] if "/" in name else [f"{part}/{name}" for part in path.split(":") if part]
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return any(candidate.startswith("/") and _executable(root, candidate) for candidate in candidates)
    finally:
        os.close(root)


def _executable(root: int, path: str) -> bool:
    try:
        fd = _open(root, path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        mode = os.fstat(fd).st_mode
        return stat.S_ISREG(mode) and bool(mode & 0o111)
    finally:
        os.close(fd)
