"""A signal that coalesces: the first is passed on at once, those within the window after it together at its end.

Uses the loop's time only, so that it is exact in virtual time. One waiter.
"""

from __future__ import annotations

import asyncio


class LeadingEdge:
    """`set` may be called any number of times; `wait` returns at most once per window."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._event = asyncio.Event()
        self._passed_s = float("-inf")

    def set(self) -> None:
        """There is something to do."""
        self._event.set()

    async def wait(self) -> None:
        """Wait for `set`, then for the window since the last return to end."""
        await self._event.wait()
        loop = asyncio.get_running_loop()
        delay_s = self._passed_s + self._window_s - loop.time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        self._event.clear()
        self._passed_s = loop.time()
