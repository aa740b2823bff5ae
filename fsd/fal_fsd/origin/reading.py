"""Reading ranges: retries with what was reached kept, bytes handed over off the loop, an honest count.

`Origin` is what the node uses; the subclasses only know how to open one stream of bytes.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, TypeVar

from fal_contract.artifact import ArtifactFile
from fal_contract.clock import Clock, SystemClock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import (
    ORIGIN_ATTEMPTS_ALL_MAX,
    ORIGIN_ATTEMPTS_MAX,
    ORIGIN_BLOCK_BYTES,
    ORIGIN_CONNECTIONS_MAX,
    ORIGIN_RATE_MIN,
    ORIGIN_RETRY_BASE_S,
    ORIGIN_RETRY_CAP_S,
    ORIGIN_RETRY_WAIT_MAX_S,
)
from fal_fsd.origin.answers import CutShort, OriginBusy, cut_short, overlong
from fal_fsd.origin.uri import OriginUri

Sink = Callable[[memoryview], None]


@dataclass(frozen=True, slots=True)
class Body:
    """An answer's bytes: how many to skip first, then chunks. `received`: how many came so far, taken or not."""

    skip: int
    chunks: AsyncIterator[bytes]
    received: Callable[[], int] | None = None


_READ_BASE_S: Final = 120.0
_Result = TypeVar("_Result")


class Origin(ABC):
    """One resolved URI. Of one event loop; any number of reads at once, `connections_max` of them under way."""

    def __init__(
        self,
        uri: OriginUri,
        *,
        connections_max: int = ORIGIN_CONNECTIONS_MAX,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.uri = uri
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._slots = asyncio.Semaphore(connections_max)
        self._threads = ThreadPoolExecutor(connections_max, thread_name_prefix="origin")
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes of files that came from the origin, those of failed and aborted reads included."""
        return self._bytes_read

    async def supports_ranges(self, file: ArtifactFile) -> bool:
        """Whether a part of `file` can be read. Where not, only `read` of the whole file works."""
        return True

    async def read(self, file: ArtifactFile, offset: int, length: int, sink: Sink) -> None:
        """Hand exactly `length` bytes from `offset` to `sink`, in order, in blocks of at most 1 MiB.

        `sink` is called in a thread, never twice at once; after this returns, raises or is cancelled it is not called
        again. What it raises ends the read and comes out unchanged. Bytes handed over before an error are good.

        Raises CONFLICT (the file changed), NOT_FOUND, UNAUTHENTICATED, PERMISSION_DENIED, CORRUPT (ends early, too
        long), INVALID (redirects, encodings), FAILED_PRECONDITION (a part, of a server without ranges), TIMEOUT, and
        `OriginBusy` with `retry_s` when it should be asked later.
        """
        if offset < 0 or length < 0 or offset + length > file.size_bytes:
            raise invalid("range", f"{offset}+{length}", f"is not within {file.path!r}", remedy="Ask within its size.")
        if length == 0:
            return
        async with self._slots:
            delivery = _Delivery(sink, self._threads)
            try:
                async with asyncio.timeout(_READ_BASE_S + length / ORIGIN_RATE_MIN):
                    await self._read(file, offset, length, delivery)
            except _SinkFailed as exc:
                raise exc.error from None
            except TimeoutError:
                raise FalError(
                    Code.TIMEOUT, f"reading {self.label(file)} takes too long", remedy="Check the origin.", field="uri"
                ) from None
            finally:
                await delivery.close()

    async def close(self) -> None:
        """End all connections. Cancel reads before."""
        self._threads.shutdown(wait=True)

    def label(self, file: ArtifactFile) -> str:
        """How errors call a file."""
        base = str(self.uri)
        return f"{base.removesuffix('/')}/{file.path}" if self.uri.is_folder else base

    @abstractmethod
    def _open(self, file: ArtifactFile, offset: int, length: int, *, whole: bool) -> AbstractAsyncContextManager[Body]:
        """One attempt: a checked answer to a request for this range. `whole`: it is the rest of a whole file."""

    def _resumes(self, file: ArtifactFile) -> bool:
        """Whether a read that broke off goes on where it was, rather than from the start."""
        return True

    async def _read(self, file: ArtifactFile, offset: int, length: int, delivery: _Delivery) -> None:
        failures, whole = 0, length == file.size_bytes
        for attempt in range(1, ORIGIN_ATTEMPTS_ALL_MAX + 1):
            done = delivery.bytes_taken
            try:
                await self._attempt(file, offset + done, length - done, delivery, whole=whole)
                await delivery.drain()
                return
            except (OriginBusy, CutShort) as exc:
                came_on = delivery.bytes_taken > done and self._resumes(file)
                failures = 1 if came_on else failures + 1
                if delivery.bytes_taken == length:
                    # The last byte came; how the connection ended does not matter.
                    await delivery.drain()
                    return
                if failures >= ORIGIN_ATTEMPTS_MAX or attempt == ORIGIN_ATTEMPTS_ALL_MAX or _too_long(exc):
                    await delivery.drain()
                    raise
                await asyncio.sleep(_wait_s(exc, failures, self._rng))

    async def _attempt(self, file: ArtifactFile, offset: int, length: int, delivery: _Delivery, *, whole: bool) -> None:
        async with self._open(file, offset, length, whole=whole) as body:
            counted, skip = 0, body.skip
            try:
                async for chunk in body.chunks:
                    counted += len(chunk)
                    self._bytes_read += len(chunk)
                    view = memoryview(chunk)[skip:]
                    skip -= min(skip, len(chunk))
                    if len(view) > length:
                        raise overlong(self.label(file))
                    length -= len(view)
                    if view:
                        await delivery.put(view)
            finally:
                if body.received is not None:
                    # What a connection that breaks off or is left still held.
                    self._bytes_read += body.received() - counted
        if length:
            raise cut_short(self.label(file))


class _SinkFailed(Exception):
    """Keeps what a sink raised apart from what the network did."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Delivery:
    """Hands chunks to a sink in threads: while one MiB is being taken, the next one gathers."""

    def __init__(self, sink: Sink, threads: ThreadPoolExecutor) -> None:
        self._sink = sink
        self._threads = threads
        self._gathered: list[memoryview] = []
        self._gathered_bytes = 0
        self._under_way: asyncio.Future[None] | None = None
        self.bytes_taken = 0

    async def put(self, view: memoryview) -> None:
        """Take a chunk; waits while the sink is behind. Raises what the sink raised."""
        self._gathered.append(view)
        self._gathered_bytes += len(view)
        self.bytes_taken += len(view)
        if self._gathered_bytes >= ORIGIN_BLOCK_BYTES:
            await self._hand_over()

    async def drain(self) -> None:
        """Wait until the sink has all. Raises what it raised."""
        await self._hand_over()
        await self._settled()

    async def close(self) -> None:
        """Wait for a call of the sink that runs; drop the rest."""
        if self._under_way is not None and not self._under_way.done():
            await asyncio.wait({self._under_way})
        if self._under_way is not None and not self._under_way.cancelled():
            self._under_way.exception()  # told already, or nobody is interested any more

    async def _hand_over(self) -> None:
        await self._settled()
        views, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if views:
            loop = asyncio.get_running_loop()
            self._under_way = loop.run_in_executor(self._threads, self._deliver, views)

    async def _settled(self) -> None:
        if self._under_way is not None:
            # A cancelled read must still know when its sink has ended, so the thread's future stays as it is.
            await asyncio.shield(self._under_way)
            self._under_way = None

    def _deliver(self, views: list[memoryview]) -> None:
        try:
            for view in views:
                for start in range(0, len(view), ORIGIN_BLOCK_BYTES):
                    self._sink(view[start : start + ORIGIN_BLOCK_BYTES])
        except Exception as exc:
            raise _SinkFailed(exc) from exc


async def patiently(
    ask: Callable[[], Awaitable[_Result]], *, rng: random.Random, attempts_max: int = ORIGIN_ATTEMPTS_MAX
) -> _Result:
    """What `ask` gives; asked again, after a while, when the origin was busy or broke off. Raises the last error."""
    for attempt in range(1, attempts_max + 1):
        try:
            return await ask()
        except (OriginBusy, CutShort) as exc:
            if attempt == attempts_max or _too_long(exc):
                raise
            await asyncio.sleep(_wait_s(exc, attempt, rng))
    raise AssertionError


def _too_long(exc: FalError) -> bool:
    return isinstance(exc, OriginBusy) and exc.retry_s > ORIGIN_RETRY_WAIT_MAX_S


def _wait_s(exc: FalError, failures: int, rng: random.Random) -> float:
    """Full jitter, on top of what the origin asked for."""
    asked_s = exc.retry_s if isinstance(exc, OriginBusy) else 0.0
    return asked_s + rng.uniform(0.0, min(ORIGIN_RETRY_CAP_S, ORIGIN_RETRY_BASE_S * 2.0**failures))


__all__ = ["Body", "Origin", "Sink", "patiently"]
