"""One thread in which every call into a GPU driver is made, one at a time, each with a deadline.

A driver in trouble can hang a call for ever. The thread is a daemon, so that a hung call delays neither the loop nor
the end of the process, and while one hangs others are refused at once instead of queueing behind it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from fal_contract.errors import Code, FalError

T = TypeVar("T")


class DriverThread:
    """`await call(f)` runs `f()` in the thread."""

    def __init__(self, name: str, *, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending: asyncio.Future[Any] | None = None

    async def call(self, work: Callable[[], T]) -> T:
        """The result or exception of `work`. Raises FalError(TIMEOUT) when it, or an earlier one, does not end."""
        if self._pending is not None and not self._pending.done():
            raise self._stuck("still")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._pending = future
        self._jobs.put((work, future))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(future)
        except TimeoutError:
            raise self._stuck("within") from None

    def close(self) -> None:
        """Let the thread end after what it is doing; idempotent."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, future = job
            loop = future.get_loop()
            try:
                outcome, error = work(), None
            except BaseException as exc:
                outcome, error = None, exc
            try:
                loop.call_soon_threadsafe(_settle, future, outcome, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _stuck(self, when: str) -> FalError:
        since = f"within {self._timeout_s:g} s" if when == "within" else "an earlier question yet"
        return FalError(
            Code.TIMEOUT,
            f"the GPU driver ({self._name}) has not answered {since}",
            remedy="Look at `nvidia-smi` and the kernel log (Xid); a hung driver needs a reboot.",
        )


def _settle(future: asyncio.Future[Any], outcome: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(outcome)
    else:
        future.set_exception(error)
        future.exception()  # seen, should the caller have given up
