"""A tiny process that keeps files in memory: maps them and locks the pages. Run by fal_fsd.disk.memory, by path.

It lives in fsd's cgroup, so that what it reads in is charged there and no container's limit pushes it out. Standard
library only, a few MiB. One JSON object a line: `{"op": "probe", "bytes": N}`, `{"op": "lock", "id": …, "paths": …,
"drop": …}`, `{"op": "unlock", "id": …}`; each is answered by `{"bytes": N, "error": TEXT}`. Ends when its standard
input does: with fsd.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import json
import os
import resource
import sys
from typing import Any, Final

_PROT_READ: Final = 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x20, 0x4000
_MLOCK_ONFAULT: Final = 1
_STEP_BYTES: Final = 64 << 20
_PAGE: Final = resource.getpagesize()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED: Final = ctypes.c_void_p(-1).value

Mapping = tuple[int, int]  # address, bytes


def _fail() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _map(size: int, flags: int, fd: int) -> int:
    address = _libc.mmap(None, size, _PROT_READ, flags, fd, 0)
    if address == _FAILED:
        raise _fail()
    return int(address)


def probe(size: int) -> int:
    """Whether so much may be locked: asks the kernel for it without touching a page. Raises OSError."""
    size = max(size, _PAGE)
    address = _map(size, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    try:
        if _libc.mlock2(address, size, _MLOCK_ONFAULT) != 0:
            raise _fail()
    finally:
        _libc.munmap(address, size)
    return size


def lock(path: str, drop: bool) -> Mapping:
    """The file's pages are in memory and stay. `drop`: pages that somebody else is charged for are let go first."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            return 0, 0
        if drop:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        address = _map(size, _MAP_SHARED, fd)
    finally:
        os.close(fd)
    for at in range(0, size, _STEP_BYTES):
        if _libc.mlock(address + at, min(_STEP_BYTES, size - at)) != 0:
            error = _fail()
            _libc.munmap(address, size)
            raise error
    return address, size


def unlock(mappings: list[Mapping]) -> int:
    """Pages may go again; bytes."""
    for address, size in mappings:
        if size:
            _libc.munmap(address, size)
    return sum(size for _, size in mappings)


def answer(request: dict[str, Any], locked: dict[str, list[Mapping]]) -> int:
    """Do what is asked. Raises OSError: nothing of it was done."""
    if request["op"] == "probe":
        return probe(request["bytes"])
    if request["op"] == "unlock":
        return unlock(locked.pop(request["id"], []))
    made: list[Mapping] = []
    try:
        for path in request["paths"]:
            made.append(lock(path, request["drop"]))
    except OSError:
        unlock(made)
        raise
    unlock(locked.pop(request["id"], []))
    locked[request["id"]] = made
    return sum(size for _, size in made)


def main() -> None:
    """Serve until the input ends."""
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    locked: dict[str, list[Mapping]] = {}
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"bytes": answer(json.loads(line), locked), "error": ""}
        except OSError as exc:
            reply = {"bytes": 0, "error": f"{exc.strerror} (errno {exc.errno})"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
