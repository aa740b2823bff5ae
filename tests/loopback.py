"""A leader that falctl's verbs call without a network; patch `unary` and `call` of their modules with its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fal_scheduler.api.service import ClusterService
from fal_scheduler.leadership import CurrentLeadership, Leadership
from scheduler_rig import leading


class Loopback:
    """A leader on a thread of its own; calls go to its handlers as they would over gRPC."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._up = threading.Event()
        self._current = CurrentLeadership()
        self.service = ClusterService(self._current)  # type: ignore[abstract]
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._lead(),))

    async def _lead(self) -> None:
        async with leading(self._folder) as leader:
            self._current.set(leader)
            self._up.set()
            await self._stop.wait()

    def __enter__(self) -> Loopback:
        self._thread.start()
        assert self._up.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        self._loop.close()

    def run(self, work: Callable[[Leadership], Awaitable[Any]]) -> Any:
        async def body() -> Any:
            return await work(self._current.get())

        return asyncio.run_coroutine_threadsafe(body(), self._loop).result(20)

    def unary(self, method: str, request: Any) -> Any:
        coroutine = getattr(self.service, method)(request, None)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def call(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        async def body() -> Any:
            return await work(self)

        return asyncio.run_coroutine_threadsafe(body(), self._loop).result(20)

    async def ListModels(self, request: Any, *, timeout: float) -> Any:
        return await self.service.ListModels(request, None)
