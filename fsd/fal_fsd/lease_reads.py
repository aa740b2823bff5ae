"""Reads of the origin under leases: ranges in, checked pieces out.

Invariants: a piece counts only through its `PieceWriter`; what an aborted range left of a piece is thrown away; pieces
that are here are not read again; at most ORIGIN_READS_MAX ranges of an artifact run at once. Bytes are written and
hashed in the origin's threads, everything else happens on the event loop. Used by fal_fsd.transfer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from fal_contract.artifact import ArtifactFile
from fal_contract.errors import Code, FalError
from fal_contract.limits import ORIGIN_READS_MAX
from fal_fsd.core.messages import ORIGIN, Lease
from fal_fsd.ports import BadPiece, Part, PieceWriter

_RETRY_S: Final = 1.0
_ALONE_RETRY_S: Final = 30.0
Sink = Callable[[memoryview], None]


class OriginReader(Protocol):
    """The part of `fal_fsd.origin.Origin` that is used here."""

    @property
    def bytes_read(self) -> int: ...

    async def read(self, file: ArtifactFile, offset: int, length: int, sink: Sink) -> None: ...

    async def close(self) -> None: ...


class LeaseEvents(Protocol):
    """What the reads tell; called on the event loop."""

    def origin_piece(self, piece: int, digest: bytes, seconds: float) -> None:
        """It was checked and stored."""
        ...

    def origin_bad(self, piece: int) -> None:
        """The origin sent something else than what was attested."""
        ...

    def origin_done(self, lease: Lease) -> None:
        """All of the lease was read, or is here from elsewhere."""
        ...

    def origin_failed(self, lease: Lease, error: FalError, retry_s: float) -> None:
        """It ended early; `retry_s`: when to try again at the earliest."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """Pieces that follow each other in one file."""

    file: int
    pieces: range
    offset: int
    length: int


def runs(part: Part, pieces: Sequence[int]) -> Iterator[Run]:
    """`pieces`, without those that are here, as contiguous ranges of files, in their order."""
    layout = part.artifact.layout
    begun: list[int] = []
    for piece in [*(p for p in pieces if not part.has(p)), None]:
        if begun and (piece != begun[-1] + 1 or piece is None or layout.span(piece).file != layout.span(begun[0]).file):
            first, last = layout.span(begun[0]), layout.span(begun[-1])
            length = last.offset + last.length - first.offset
            yield Run(first.file, range(begun[0], begun[-1] + 1), first.offset, length)
            begun = []
        if piece is not None:
            begun.append(piece)


class PieceSink:
    """Cuts a stream of bytes into pieces and writes those that are missing. One thread calls it, another may abort."""

    def __init__(self, part: Part, pieces: range, on_piece: Callable[[int, bytes], None]) -> None:
        self._part = part
        self._on_piece = on_piece
        self._pieces = iter(pieces)
        self._piece = -1
        self._left = 0
        self._writer: PieceWriter | None = None
        self._mutex = threading.Lock()
        self._aborted = False

    def __call__(self, data: memoryview) -> None:
        """The next bytes. Raises BadPiece and what `PieceWriter.write` raises."""
        with self._mutex:
            if self._aborted:
                raise FalError(Code.CANCELLED, "the read was given up", remedy="Nothing: another one goes on.")
            self._take(data)

    def _take(self, data: memoryview) -> None:
        while data:
            if not self._left:
                self._next()
            chunk = data[: self._left]
            if self._writer is not None:
                self._writer.write(chunk)
            self._left -= len(chunk)
            data = data[len(chunk) :]
            if not self._left and self._writer is not None:
                writer, self._writer = self._writer, None
                try:
                    digest = writer.finish()
                finally:
                    writer.abort()
                self._on_piece(self._piece, digest)

    def abort(self) -> None:
        """Throw away what is not whole."""
        with self._mutex:
            self._aborted = True
            if self._writer is not None:
                self._writer.abort()
                self._writer = None

    def _next(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise FalError(Code.CORRUPT, "the origin sent more than was asked for", remedy="It is read again.")
        self._piece = piece
        self._left = self._part.artifact.layout.length(piece)
        self._writer = self._part.writer(piece, source=ORIGIN)


class LeaseReads:
    """All reads of one artifact. `slots` bounds those of the whole node; close it."""

    def __init__(self, part: Part, origin: OriginReader, events: LeaseEvents, *, now_s: Callable[[], float]) -> None:
        self._part = part
        self._origin = origin
        self._events = events
        self._now_s = now_s
        self._slots = asyncio.Semaphore(ORIGIN_READS_MAX)
        self._tasks: dict[Lease, asyncio.Task[None]] = {}
        self._whole: set[int] = set()  # files that this origin gives only whole

    def start(self, lease: Lease, pieces: Sequence[int]) -> None:
        """Read these of the lease's pieces, in this order."""
        if lease not in self._tasks:
            task = asyncio.create_task(self._read(lease, pieces), name=f"origin {lease.first}+{lease.count}")
            self._tasks[lease] = task

    def stop(self, lease: Lease) -> None:
        """End it without a word."""
        if (task := self._tasks.pop(lease, None)) is not None:
            task.cancel()

    @property
    def count(self) -> int:
        """Leases that are being read."""
        return len(self._tasks)

    async def close(self) -> None:
        """End all."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, lease: Lease, pieces: Sequence[int]) -> None:
        try:
            for run in list(runs(self._part, pieces)):
                async with self._slots:
                    await self._run(run, lease)
        except BadPiece as exc:
            self._over(lease)
            self._events.origin_bad(exc.piece)
            self._events.origin_done(lease)
        except FalError as exc:
            self._over(lease)
            self._events.origin_failed(lease, exc, getattr(exc, "retry_s", 0.0) or _RETRY_S)
        except OSError as exc:
            self._over(lease)
            error = FalError(Code.NO_CAPACITY, f"the cache cannot be written: {exc}", remedy="Look at its disk.")
            self._events.origin_failed(lease, error, _RETRY_S)
        else:
            self._over(lease)
            self._events.origin_done(lease)

    async def _run(self, run: Run, lease: Lease) -> None:
        file = self._part.artifact.files[run.file]
        if run.file not in self._whole:
            try:
                await self._range(file, run)
                return
            except FalError as exc:
                if exc.code is not Code.FAILED_PRECONDITION:
                    raise
                self._whole.add(run.file)
        # No ranges here: whoever holds the file's first piece reads all of it, the others get it from that one.
        every = self._part.artifact.layout.of_file(run.file)
        if every.start not in lease.pieces:
            raise _Later(file)
        await self._range(file, Run(run.file, every, 0, file.size_bytes))

    async def _range(self, file: ArtifactFile, run: Run) -> None:
        loop, began_s = asyncio.get_running_loop(), self._now_s()
        last_s = began_s

        def told(piece: int, digest: bytes) -> None:
            nonlocal last_s
            seconds, last_s = self._now_s() - last_s, self._now_s()
            loop.call_soon_threadsafe(self._events.origin_piece, piece, digest, seconds)

        sink = PieceSink(self._part, run.pieces, told)
        try:
            await self._origin.read(file, run.offset, run.length, sink)
        finally:
            sink.abort()

    def _over(self, lease: Lease) -> None:
        self._tasks.pop(lease, None)


class _Later(FalError):
    retry_s = _ALONE_RETRY_S

    def __init__(self, file: ArtifactFile) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            f"the origin gives {file.path!r} only whole, and another node reads it",
            remedy="It comes from that node.",
        )


__all__ = ["LeaseEvents", "LeaseReads", "OriginReader", "PieceSink", "Run", "runs"]
