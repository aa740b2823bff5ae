"""From threads to the event loop: calls in order, many to a turn of the loop, none of which takes long."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

CALLS_PER_TURN: Final = 64  # then others have their turn


class Mailbox:
    """Calls that threads leave for the loop. Unbounded by itself: each sender bounds what it has left there."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._awake = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on this loop is called. Before anything is posted."""
        self._loop = loop

    def post(self, call: Callable[..., None], *told: Any) -> None:
        """Have the loop call it, after all that were posted before. Lost when the loop is closed."""
        with self._lock:
            self._calls.append((call, told))
            if self._awake:
                return
            self._awake = True
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        assert self._loop is not None
        for _ in range(CALLS_PER_TURN):
            with self._lock:
                if not self._calls:
                    self._awake = False
                    return
                call, told = self._calls.popleft()
            try:
                call(*told)
            except Exception as error:  # one event must not take the others along
                self._loop.call_exception_handler(
                    {"message": f"an event of the bulk port failed: {call}", "exception": error}
                )
        self._loop.call_soon(self._drain)


__all__ = ["Mailbox"]
