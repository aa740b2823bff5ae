"""Container logs on disk: the line format that conmon calls k8s-file, read back by tail and follow.

    2026-11-21T00:06:35.123456789+00:00 stdout F the text

F ends a line, P is a part of a longer one. Invariant: a reader never blocks the writer, survives rotation (the file is
replaced by a new one under the same name; an older one may stay as NAME.1), and returns lines of bounded length.
Written by conmon and by `fal_runtime.process_supervisor`; read by the drivers. Nothing here writes.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final

from fal_contract.limits import LOG_LINE_BYTES_MAX
from fal_runtime.driver import LogLine, Stream
from fal_runtime.watch import Watcher

FOLLOW_RECHECK_S: Final = 1.0  # the end of a container is no event in its log's directory
_BLOCK_BYTES: Final = 64 << 10
_FINISHED: Final = re.compile(rb"^\S+ std(?:out|err) F ", re.MULTILINE)
_RECORD_BYTES_MAX: Final = 1 << 20  # a record without a newline of this size is dropped


def _time_s(stamp: str) -> float:
    """RFC 3339 with nanoseconds → seconds since 1970 (Python reads at most microseconds)."""
    head, dot, rest = stamp.partition(".")
    if not dot:
        return datetime.fromisoformat(stamp).timestamp()
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    whole = datetime.fromisoformat(head + rest[len(digits) :])
    return whole.timestamp() + float(f"0.{digits or '0'}")


class LineAssembler:
    """Turns raw bytes of a log file into lines: keeps an unfinished record and unfinished parts between calls."""

    def __init__(self) -> None:
        self._rest = b""
        self._parts: dict[str, bytes] = {}

    def feed(self, data: bytes) -> Iterator[LogLine]:
        *records, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _RECORD_BYTES_MAX:
            self._rest = b""
        for record in records:
            line = self._take(record)
            if line is not None:
                yield line

    def _take(self, record: bytes) -> LogLine | None:
        fields = record.split(b" ", 3)
        if len(fields) != 4 or fields[1] not in (b"stdout", b"stderr") or fields[2] not in (b"F", b"P"):
            return None  # the cut first record of a block, or a damaged one
        stream: Stream = "stdout" if fields[1] == b"stdout" else "stderr"
        text = (self._parts.pop(stream, b"") + fields[3])[: LOG_LINE_BYTES_MAX + 1]
        if fields[2] == b"P":
            self._parts[stream] = text
            return None
        try:
            time_s = _time_s(fields[0].decode("ascii"))
        except ValueError:
            return None
        cut = "…" if len(text) > LOG_LINE_BYTES_MAX else ""
        return LogLine(time_s, stream, text[:LOG_LINE_BYTES_MAX].decode("utf-8", "replace").rstrip("\r") + cut)


def _tail_bytes(file: BinaryIO, tail_lines: int) -> bytes:
    """The end of `file` holding at least `tail_lines` finished lines, or all of it. The position is right behind it.

    That is not the file's end any more where somebody has written meanwhile.
    """
    at = end = file.seek(0, os.SEEK_END)
    blocks: list[bytes] = []
    finished = 0
    while at > 0 and finished <= tail_lines:
        size = min(_BLOCK_BYTES, at)
        at -= size
        file.seek(at)
        blocks.append(file.read(size))
        finished += len(_FINISHED.findall(blocks[-1]))
    file.seek(end)
    return b"".join(reversed(blocks))


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def tail(path: Path, tail_lines: int) -> list[LogLine]:
    """The last lines of the log and, if it was just rotated, of NAME.1 before it."""
    if tail_lines <= 0:
        return []
    lines: list[LogLine] = []
    assembler = LineAssembler()
    for name in (path.with_name(path.name + ".1"), path):
        file = _open(name)
        if file is not None:
            with file:
                lines.extend(assembler.feed(_tail_bytes(file, tail_lines)))
    return lines[-tail_lines:]


class Follower:
    """Reads what is appended to a log from its end on, across rotations."""

    def __init__(self, path: Path, *, tail_lines: int) -> None:
        self._path = path
        self._assembler = LineAssembler()
        self._file = _open(path)
        self.first: list[LogLine] = []
        if self._file is not None:
            older = tail(path.with_name(path.name + ".1"), tail_lines)
            if tail_lines > 0:
                self.first = list(self._assembler.feed(_tail_bytes(self._file, tail_lines)))
            else:
                self._file.seek(0, os.SEEK_END)
            self.first = (older + self.first)[-tail_lines:] if tail_lines > 0 else []

    def read(self) -> Iterator[list[LogLine]]:
        """Everything new since the last call, in pieces of a few milliseconds' work."""
        while True:
            if self._file is None:
                self._file = _open(self._path)
            if self._file is None:
                return
            # Look for a successor before reading: what is in the old file when the new one exists is all of it.
            replaced = self._replaced()
            while data := self._file.read(_BLOCK_BYTES):
                yield list(self._assembler.feed(data))
            if not replaced:
                return
            self.close()

    def _replaced(self) -> bool:
        assert self._file is not None
        here = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        return (here.st_ino, here.st_dev) != (there.st_ino, there.st_dev)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


async def _follower(path: Path, tail_lines: int) -> Follower:
    """Made in a thread; closed when nobody waits for it any more."""
    making = asyncio.create_task(asyncio.to_thread(Follower, path, tail_lines=tail_lines))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(made: asyncio.Task[Follower]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().close()


async def read_log(
    path: Path,
    watcher: Watcher,
    ended: Callable[[], Awaitable[bool]],
    *,
    tail_lines: int,
    follow: bool,
    since_s: float = 0.0,
) -> AsyncGenerator[LogLine, None]:
    """Tail, then follow until `ended()` says that nothing more will be written; nothing from before `since_s`."""
    if not follow:
        # Thousands of lines take tens of milliseconds to read and parse: not on the loop.
        for line in await asyncio.to_thread(tail, path, tail_lines):
            if line.time_s >= since_s:
                yield line
        return
    with watcher.subscribe(path.parent) as subscription:
        follower = await _follower(path, tail_lines)
        try:
            for line in follower.first:
                if line.time_s >= since_s:
                    yield line
            while True:
                last = await ended()  # before reading: what was written before the end is then read
                for lines in follower.read():
                    for line in lines:
                        yield line
                    await asyncio.sleep(0)  # a flood must not keep others from the loop
                if last:
                    return
                await subscription.changed(FOLLOW_RECHECK_S)
        finally:
            follower.close()
