"""What must survive the agent's kill -9: its standing and its runners.

Invariants: what `write` returned for is on disk; the file is only ever appended to or replaced whole by rename; a file
that we do not fully understand is never touched. A cut last record (power loss) is dropped with an event; damage
before the last record, and a newer version, refuse the start. On a full disk nothing is half written: the file is cut
back to its last whole record, `write` fails, running containers go on.

File: 8 bytes head (magic, version), then frames: length, CRC-32 of the length, CRC-32 of the payload, payload; all
numbers are unsigned 32-bit little-endian. Called by fal_agent.node.
"""

from __future__ import annotations

import asyncio
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fal_agent.core.standing import Standing
from fal_agent.core.tasks import Task
from fal_agent.journal_codec import Forget, Record, Recorded, decode, encode
from fal_contract.errors import Code, FalError
from fal_contract.limits import JOURNAL_BYTES_MAX, JOURNAL_RECORD_BYTES_MAX

VERSION: Final = 1
_MAGIC: Final = b"FALJ"
_HEAD: Final = struct.Struct("<4sI")
_FRAME: Final = struct.Struct("<III")
_COMPACT_BYTES_MIN: Final = 256 << 10  # below this a journal is not worth compacting
_COMPACT_GROWTH: Final = 4

OnEvent = Callable[[str, str, str], None]  # kind, subject, message


class Journal(Protocol):
    """What the node needs of a journal; tests have one in memory."""

    def recorded(self) -> Recorded:
        """Standing and tasks as they were durable when the journal was opened."""
        ...

    async def write(self, *records: Record) -> None:
        """Return once all are durable. STORE_FAILED: none is."""
        ...


@dataclass(frozen=True, slots=True)
class _Write:
    """One call of `write` that waits for its turn."""

    records: tuple[Record, ...]
    payloads: list[bytes]
    done: asyncio.Future[None]


class FileJournal:
    """The journal in one file. `on_event` is told of a cut tail.

    All writes that wait while one is under way are made durable together: fifty runners that start at once cost a few
    flushes of the disk.
    """

    def __init__(self, path: Path, *, on_event: OnEvent, bytes_max: int = JOURNAL_BYTES_MAX) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._waiting: list[_Write] = []
        self._writer: asyncio.Task[None] | None = None
        self._live: dict[tuple[str, str], bytes] = {}  # the payloads that a compaction keeps
        self._recorded = Recorded()
        self._compact_above = _COMPACT_BYTES_MIN
        path.with_suffix(".new").unlink(missing_ok=True)
        if not path.exists():
            _replace(path, _HEAD.pack(_MAGIC, VERSION))
        good = self._read(on_event)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(self._fd, good)
        os.lseek(self._fd, good, os.SEEK_SET)
        self._size = good

    def recorded(self) -> Recorded:
        return self._recorded

    async def write(self, *records: Record) -> None:
        """See Journal. Each call is written whole or not at all, in the order of the calls."""
        payloads = [encode(record) for record in records]
        if any(len(payload) > JOURNAL_RECORD_BYTES_MAX for payload in payloads):
            raise FalError(Code.STORE_FAILED, "a journal record is too long", remedy="Make the app's spec smaller.")
        one = _Write(records, payloads, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting(), name="journal")
        # A cancelled caller must not leave half of this undone.
        await _finished(one.done)

    async def _write_waiting(self) -> None:
        batch: list[_Write] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await self._write(batch)
                except FalError as exc:
                    await self._write_each(batch, exc)
        finally:  # ended by an error or with its loop: nobody may wait on
            for one in (*batch, *self._waiting):
                one.done.cancel()
            self._waiting = []

    async def _write_each(self, batch: list[_Write], error: FalError) -> None:
        """What is too much together may fit one by one."""
        for one in batch:
            try:
                if len(batch) == 1:
                    raise error
                await self._write([one])
            except FalError as exc:
                one.done.set_exception(exc)

    async def _write(self, batch: list[_Write]) -> None:
        await asyncio.to_thread(self._append, [payload for one in batch for payload in one.payloads])
        for one in batch:
            for record, payload in zip(one.records, one.payloads, strict=True):
                self._keep(record, payload)
        if self._size > self._compact_above:
            await asyncio.to_thread(self._compact)
        for one in batch:
            one.done.set_result(None)

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, payloads: list[bytes]) -> None:
        data = b"".join(_frame(payload) for payload in payloads)
        if self._size + len(data) > self._bytes_max:
            raise self._full(f"it would grow beyond {self._bytes_max} bytes")
        try:
            _write_all(self._fd, data)
            os.fdatasync(self._fd)
        except OSError as exc:
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)
            raise self._full(exc.strerror or str(exc)) from exc
        self._size += len(data)

    def _full(self, why: str) -> FalError:
        return FalError(
            Code.STORE_FAILED,
            f"the journal {self._path} cannot be written: {why}",
            remedy="Free space on the state disk; running containers go on meanwhile.",
        )

    def _keep(self, record: Record, payload: bytes) -> None:
        match record:
            case Standing():
                self._live["standing", ""] = payload
            case Task():
                self._live["task", record.runner_id] = payload
            case Forget():
                self._live.pop(("task", record.runner_id), None)

    def _compact(self) -> None:
        data = _HEAD.pack(_MAGIC, VERSION) + b"".join(_frame(payload) for payload in self._live.values())
        try:
            _replace(self._path, data)
        except OSError:
            self._compact_above = 2 * self._size  # a full disk: the old file is still whole
            return
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._size = os.lseek(self._fd, 0, os.SEEK_END)
        self._compact_above = max(_COMPACT_BYTES_MIN, _COMPACT_GROWTH * self._size)

    def _read(self, on_event: OnEvent) -> int:
        """Fold the file; returns where its last whole record ends."""
        data = self._path.read_bytes()
        _check_head(self._path, data)
        good = _HEAD.size
        for end, payload in _frames(data):
            try:
                record = decode(payload)
            except (ValueError, TypeError, KeyError) as exc:
                raise _corrupt(self._path, good, f"record is not understood: {exc}") from exc
            self._recorded.add(record)
            self._keep(record, payload)
            good = end
        if good < len(data):
            if _whole_frame_after(data, good + 1):
                raise _corrupt(self._path, good, "a record is damaged and others follow it")
            on_event("JOURNAL_CUT", str(self._path), f"{len(data) - good} bytes of an unfinished record were dropped")
        return good


def _frame(payload: bytes) -> bytes:
    length = struct.pack("<I", len(payload))
    return _FRAME.pack(len(payload), zlib.crc32(length), zlib.crc32(payload)) + payload


def _frame_at(data: bytes, at: int) -> bytes | None:
    """The payload of a whole, undamaged frame at `at`, or None."""
    if at + _FRAME.size > len(data):
        return None
    length, length_crc, payload_crc = _FRAME.unpack_from(data, at)
    if zlib.crc32(data[at : at + 4]) != length_crc or length > JOURNAL_RECORD_BYTES_MAX:
        return None
    payload = data[at + _FRAME.size : at + _FRAME.size + length]
    return payload if len(payload) == length and zlib.crc32(payload) == payload_crc else None


def _frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(end, payload) of each frame up to the first that is not whole."""
    at = _HEAD.size
    while (payload := _frame_at(data, at)) is not None:
        at += _FRAME.size + len(payload)
        yield at, payload


def _whole_frame_after(data: bytes, at: int) -> bool:
    return any(_frame_at(data, n) is not None for n in range(at, len(data) - _FRAME.size))


def _check_head(path: Path, data: bytes) -> None:
    if len(data) < _HEAD.size or data[:4] != _MAGIC:
        raise _corrupt(path, 0, "it does not begin like a journal")
    version = _HEAD.unpack_from(data)[1]
    if version > VERSION:
        raise FalError(
            Code.VERSION_MISMATCH,
            f"the journal {path} has version {version}, this agent reads up to {VERSION}",
            remedy="Start the newer agent again; nothing was changed.",
        )


def _corrupt(path: Path, at: int, why: str) -> FalError:
    return FalError(
        Code.CORRUPT,
        f"the journal {path} is damaged at byte {at}: {why}",
        remedy="Nothing was changed. Start without it by moving it away: running containers go on, as orphans.",
    )


def _replace(path: Path, data: bytes) -> None:
    """Write the whole file beside `path`, make it durable, rename it into place."""
    beside = path.with_suffix(".new")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _finished(done: asyncio.Future[None]) -> None:
    """Wait for `done` even when the caller is cancelled; then pass the cancellation on."""
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.wait({done})
        if not done.cancelled():
            done.exception()  # nobody is there to be told
        raise
