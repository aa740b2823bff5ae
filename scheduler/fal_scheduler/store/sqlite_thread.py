"""One thread that owns what must stay on one thread; the event loop awaits its answers.

Called by the SQLite store. Calls run one at a time, in the order in which they were made. Must not know SQL.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class DatabaseThread:
    """A thread, a queue of calls, and futures of the loop that made them."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        self._ended = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the thread; its result or exception. Cancelling the call does not stop the work."""
        answer: asyncio.Future[T] = self._loop.create_future()
        self._calls.put((work, answer))
        return await answer

    async def stop(self) -> None:
        """Finish the calls made so far and end the thread."""
        self._calls.put(None)
        await self._ended
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            work, answer = call
            try:
                result = work()
            except BaseException as error:  # handed to the caller, who decides
                self._tell(_fail, answer, error)
            else:
                self._tell(_resolve, answer, result)
        self._tell(_resolve, self._ended, None)

    def _tell(self, how: Callable[[asyncio.Future[Any], Any], None], answer: asyncio.Future[Any], what: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(how, answer, what)


def _resolve(answer: asyncio.Future[Any], result: Any) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: asyncio.Future[Any], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
