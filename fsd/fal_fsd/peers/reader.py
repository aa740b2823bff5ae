"""Bytes of a connection as they come; once many have come, received by a thread of its own.

Hashing and writing a block takes as long as receiving the next, so a connection that carries bulk receives ahead into
the next of BUFFERS buffers. One that carries a few frames now and then needs neither the thread nor the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from fal_fsd.peers.sockets import Stream

BUFFER_BYTES: Final = 256 << 10  # stays in the processor's cache between hash and write
BUFFERS: Final = 4
BULK_BYTES: Final = 4 << 20


class Reader:
    """Used by one thread. `heard` is called, by any thread, whenever bytes came."""

    def __init__(self, stream: Stream, heard: Callable[[], None]) -> None:
        self._stream = stream
        self._heard = heard
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._count = 0
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        self._full: SimpleQueue[tuple[memoryview, int] | Exception] = SimpleQueue()
        self._ahead: threading.Thread | None = None

    def read(self) -> memoryview:
        """What came; empty at the end. The view before is used again. Raises OSError."""
        if self._ahead is None:
            if self._count < BULK_BYTES:
                count = self._stream.recv_into(self._buffer)
                self._heard()
                self._count += count
                return self._buffer[:count]
            self._begin()
        else:
            self._free.put(self._buffer)
        item = self._full.get()
        if isinstance(item, Exception):
            self._buffer = memoryview(b"")
            raise item
        self._buffer, count = item
        return self._buffer[:count]

    def _begin(self) -> None:
        self._free.put(self._buffer)
        for _ in range(BUFFERS - 1):
            self._free.put(memoryview(bytearray(BUFFER_BYTES)))
        self._ahead = threading.Thread(target=self._receive, name="peer-ahead", daemon=True)
        self._ahead.start()

    def _receive(self) -> None:
        try:
            while (buffer := self._free.get()) is not None:
                count = self._stream.recv_into(buffer)
                self._heard()
                self._full.put((buffer, count))
                if not count:
                    return
        except Exception as error:  # the reading thread gets it
            self._full.put(error)

    def close(self) -> None:
        """The stream was shut down: wait for the thread."""
        if self._ahead is not None:
            self._free.put(None)
            self._ahead.join()


__all__ = ["Reader"]
