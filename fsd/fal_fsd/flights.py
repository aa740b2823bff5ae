"""Staging in progress: one flight a digest, however many ask for it.

Invariant: a flight ends when its artifact is ready or refused, or when nobody waits for it and no pin wants it.
Waiters come and go freely; a waiter's cancellation never hurts another. Called by fal_fsd.service.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError
from fal_fsd.copy import Cancelled
from fal_fsd.core.manifest import Manifest
from fal_fsd.store import Store

FLIGHTS_MAX: Final = 2  # copies at once: more only make a disk seek
_PROGRESS_S: Final = 0.25


@dataclass(slots=True)
class Flight:
    """One artifact on its way. `bytes_done` is written by the copying thread."""

    manifest: Manifest
    stop: threading.Event = field(default_factory=threading.Event)
    bytes_done: int = 0
    waiters: int = 0
    task: asyncio.Task[Path] | None = None

    def count(self, more: int) -> None:
        self.bytes_done += more


class Flights:
    """All flights of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._flights: dict[str, Flight] = {}
        self._slots = asyncio.Semaphore(FLIGHTS_MAX)

    async def stage(self, manifest: Manifest, source: Path) -> AsyncGenerator[int | Path, None]:
        """Bytes done from time to time, at last the path. Raises what the store raises."""
        flight = self._join(manifest, source)
        assert flight.task is not None
        try:
            while True:
                done, _ = await asyncio.wait({flight.task}, timeout=_PROGRESS_S)
                if done:
                    yield flight.task.result()
                    return
                yield flight.bytes_done
        finally:
            flight.waiters -= 1
            await self.let_go(manifest.digest)

    async def let_go(self, digest: str) -> None:
        """A waiter or a pin went: end the flight, or clear what one left, when it was the last."""
        flight = self._flights.get(digest)
        if flight is None:
            await asyncio.to_thread(self._store.abandon, digest)
            return
        if flight.waiters:
            return
        if not await asyncio.to_thread(self._store.pinned, digest) and not flight.waiters:
            flight.stop.set()

    async def close(self) -> None:
        """End all; what is copied stays in parts and is taken up again."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.stop.set()
        await asyncio.gather(*(flight.task for flight in flights if flight.task), return_exceptions=True)

    def _join(self, manifest: Manifest, source: Path) -> Flight:
        flight = self._flights.get(manifest.digest)
        if flight is None or flight.stop.is_set():
            before = flight.task if flight is not None else None
            flight = self._flights[manifest.digest] = Flight(manifest)
            flight.task = asyncio.create_task(self._fly(flight, source, before), name=f"stage {manifest.digest[:12]}")
            flight.task.add_done_callback(_retrieve)
        flight.waiters += 1
        return flight

    async def _fly(self, flight: Flight, source: Path, before: asyncio.Task[Path] | None) -> Path:
        digest = flight.manifest.digest
        try:
            if before is not None:
                await asyncio.wait({before})
            async with self._slots:
                return await asyncio.to_thread(
                    self._store.stage, flight.manifest, source, on_bytes=flight.count, stop=flight.stop
                )
        except Cancelled:
            raise FalError(Code.CANCELLED, "nobody wants the artifact any more", remedy="Stage it again.") from None
        finally:
            if self._flights.get(digest) is flight:
                del self._flights[digest]
                await asyncio.to_thread(self._store.abandon, digest)


def _retrieve(task: asyncio.Task[Path]) -> None:
    """Its waiters may all have gone before it failed: nobody need look at the error."""
    if not task.cancelled():
        task.exception()
