"""A timer that is set and cleared with every request, and costs nothing then.

An event loop's timer costs more than the rest of a small request's bookkeeping. This one stays armed: when it fires
and its time was put off meanwhile, it is armed again for the rest; when it was cleared, nothing happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class LazyTimer:
    """Calls once the time that was set last is there. Set and clear from the loop only; `stop` at the end."""

    __slots__ = ("_armed_s", "_call", "_due_s", "_handle", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._armed_s = 0.0
        self._due_s: float | None = None
        self._call: Callable[[], None] = _nothing

    def set(self, due_s: float, call: Callable[[], None]) -> None:
        """Call at `due_s` of the loop's clock; replaces what was set before."""
        self._due_s = due_s
        self._call = call
        if self._handle is not None:
            if self._armed_s <= due_s:
                return
            self._handle.cancel()
        self._armed_s = due_s
        self._handle = self._loop.call_at(due_s, self._fired)

    def clear(self) -> None:
        """Do not call."""
        self._due_s = None
        self._call = _nothing

    def stop(self) -> None:
        """Let go of the loop's timer, too."""
        self.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fired(self) -> None:
        self._handle = None
        if self._due_s is None:
            return
        if self._due_s > self._armed_s:
            self.set(self._due_s, self._call)
            return
        call = self._call
        self.clear()
        call()


def _nothing() -> None:
    pass
