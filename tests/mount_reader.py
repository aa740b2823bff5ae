"""A process that reads files for tests: commands on stdin, answers on stdout, one JSON object a line; see `mount_rig`.

    {"open": PATH}             → a number          {"read": [NUMBER, OFFSET, SIZE]} → SHA-256 and length of what came
    {"map": [PATH, SHARED]}    → SHA-256 of a mapping of the whole file, read in order
    {"whole": PATH}            → SHA-256 and length of the file, read in order; SIGUSR1 interrupts reads, not the reader
    {"list": PATH}             → its names         {"stat": PATH} → [mode, size]

A failure is {"errno": N}. Standard library only.
"""

import ctypes
import hashlib
import json
import mmap
import os
import signal
import sys
from typing import Any

_CHUNK_BYTES = 1 << 16


_libc = ctypes.CDLL(None, use_errno=True)


def pread(fd: int, size: int, offset: int) -> bytes:
    """pread(2) of everything. Python's own would try again after EINTR."""
    got = b""
    while len(got) < size:
        buffer = ctypes.create_string_buffer(size - len(got))
        count = _libc.pread(fd, buffer, ctypes.c_size_t(size - len(got)), ctypes.c_int64(offset + len(got)))
        if count < 0:
            raise OSError(ctypes.get_errno(), "pread")
        if not count:
            break
        got += buffer.raw[:count]
    return got


def do(command: dict[str, Any]) -> Any:
    ((op, words),) = command.items()
    if op == "open":
        return os.open(words, os.O_RDONLY)
    if op == "read":
        fd, offset, size = words
        data = pread(fd, size, offset)
        return [hashlib.sha256(data).hexdigest(), len(data)]
    if op == "whole":
        fd, done, whole = os.open(words, os.O_RDONLY), 0, hashlib.sha256()
        while True:
            try:
                data = pread(fd, _CHUNK_BYTES, done)
            except InterruptedError:
                continue
            if not data:
                return [whole.hexdigest(), done]
            whole.update(data)
            done += len(data)
    if op == "map":
        path, shared = words
        fd = os.open(path, os.O_RDONLY)
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        with mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ) as view:
            hasher = hashlib.sha256()
            for at in range(0, len(view), _CHUNK_BYTES):
                hasher.update(view[at : at + _CHUNK_BYTES])
        os.close(fd)
        return hasher.hexdigest()
    if op == "list":
        return sorted(os.listdir(words))
    if op == "stat":
        found = os.stat(words)
        return [found.st_mode, found.st_size]
    raise ValueError(op)


signal.signal(signal.SIGUSR1, lambda *_: None)
print(json.dumps({"result": "ready"}), flush=True)
for line in sys.stdin:
    try:
        answer = {"result": do(json.loads(line))}
    except OSError as exc:
        answer = {"errno": exc.errno}
    print(json.dumps(answer), flush=True)
