"""Moving bytes between sockets with as few copies as Python can.

All connections of the process read into one buffer (`VIEW`): whoever is told that bytes came uses them before it
returns, and nobody else reads meanwhile, because everything runs on one loop. What was read is sent from there at once
where the other side takes it; only what it does not take is copied, for the loop to send later.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from typing import Final

BUFFER: Final = bytearray(512 << 10)
VIEW: Final = memoryview(BUFFER)  # what the loop is given: asyncio's TLS slices it, and a slice of BUFFER were a copy
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 32 << 20

Send = Callable[[bytes | memoryview], int]  # as much as goes at once; BlockingIOError: nothing


def write(transport: asyncio.Transport, send: Send, data: bytes | memoryview) -> None:
    """Send by `send`, which must lead to the transport's own socket, what goes at once, the rest by the transport.

    Only on plain sockets. An error is the transport's to notice: it is given what could not be sent.
    """
    if transport.is_closing():
        return
    if transport.get_write_buffer_size() == 0:
        try:
            sent = send(data)
        except OSError:
            sent = 0
        if sent == len(data):
            return
        data = data[sent:]
    transport.write(bytes(data))


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed for the next: TLS asks for one at each read.

    Else each comes from the kernel and goes back to it, page by page. Does nothing where the library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)
