"""What happened, for operators: a numbered ring in memory and bounded JSON-lines files beside the store.

An edge. Losing it is fine (design, section 6): a full disk is told once and tolerated, never an error for a caller.
Called by the engine only; the API reads `since`. Must not hold secrets: the core's messages carry none.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from io import BufferedWriter
from itertools import takewhile
from pathlib import Path
from typing import Final

import structlog

from fal_scheduler.core.events import Logged

RING_EVENTS_MAX: Final = 10_000
FILE_BYTES_MAX: Final = 16 << 20
FILES_MAX: Final = 4
READ_BACK_BYTES_MAX: Final = 1 << 20  # of each of the two newest files, at the start

_log = structlog.get_logger("fal.events")


class EventLog:
    """Numbers rise by one across restarts where the files are still there, and the newest events are read back."""

    def __init__(self, directory: Path | None, *, file_bytes_max: int = FILE_BYTES_MAX) -> None:
        """`directory`: where the files go; None keeps the ring only."""
        self._directory = directory
        self._file_bytes_max = file_bytes_max
        self._ring: deque[Logged] = deque()
        self._newest: dict[tuple[str, str], Logged] = {}  # of each kind and subject in the ring
        self._file: BufferedWriter | None = None
        self._file_bytes = 0
        self._failed = False
        self._number = 0
        if directory is not None:
            for name in ("events.jsonl.1", "events.jsonl"):
                for event in _read_back(directory / name):
                    self._keep(event)
            self._number = self._ring[-1].number if self._ring else 0
            self._open()

    @property
    def last_number(self) -> int:
        """Number of the newest event; 0 before the first."""
        return self._number

    def append(self, event: Logged) -> Logged:
        """Number an event and keep it; `flush` brings it to the file."""
        self._number += 1
        numbered = replace(event, number=self._number)
        self._keep(numbered)
        self._write(numbered)
        return numbered

    def _keep(self, event: Logged) -> None:
        self._ring.append(event)
        self._newest[event.kind, event.subject] = event
        if len(self._ring) > RING_EVENTS_MAX:
            gone = self._ring.popleft()
            if self._newest[gone.kind, gone.subject] is gone:
                del self._newest[gone.kind, gone.subject]

    def since(self, after: int, *, subject: str = "") -> list[Logged]:
        """Events in the ring with a higher number, oldest first; only about `subject` where one is given."""
        behind = takewhile(lambda event: event.number > after, reversed(self._ring))  # readers are near the end
        found = [event for event in behind if subject in ("", event.subject)]
        found.reverse()
        return found

    def latest(self, kind: str, subject: str) -> Logged | None:
        """The newest event of this kind about `subject` that is still in the ring."""
        return self._newest.get((kind, subject))

    def flush(self) -> None:
        """Hand what was appended to the operating system."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        assert self._directory is not None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            path = self._directory / "events.jsonl"
            self._file = path.open("ab")
            self._file_bytes = path.stat().st_size
            if self._file_bytes and _last_byte(path) != b"\n":
                self._file_bytes += self._file.write(b"\n")  # a crash tore the last line
        except OSError as error:
            self._give_up(error)

    def _write(self, event: Logged) -> None:
        if self._file is None:
            return
        line = json.dumps(
            {
                "number": event.number,
                "time_s": event.wall_s,
                "kind": event.kind,
                "subject": event.subject,
                "message": event.message,
                "actor": event.actor,
                "facts": dict(event.facts),
            },
            separators=(",", ":"),
        ).encode()
        try:
            self._file.write(line + b"\n")
            self._file_bytes += len(line) + 1
            if self._file_bytes >= self._file_bytes_max:
                self._rotate()
        except OSError as error:
            self._give_up(error)

    def _rotate(self) -> None:
        assert self._directory is not None
        assert self._file is not None
        self._file.close()
        path = self._directory / "events.jsonl"
        for number in range(FILES_MAX - 1, 0, -1):
            older = path.with_name(f"events.jsonl.{number}")
            newer = path.with_name(f"events.jsonl.{number - 1}") if number > 1 else path
            if newer.exists():
                newer.replace(older)
        self._open()

    def _give_up(self, error: OSError) -> None:
        """The disk is full or gone: the ring goes on alone until the next start."""
        if not self._failed:
            _log.warning("event log not written", error=str(error), remedy="Free the disk, then restart the scheduler.")
        self._failed = True
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                return


def _read_back(path: Path) -> list[Logged]:
    """The newest events of a file; a line that a crash tore is left out, as is one of another release."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - READ_BACK_BYTES_MAX))
            lines = file.read().splitlines()
    except OSError:
        return []
    return [event for line in lines if (event := _parse(line)) is not None]


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read()


def _parse(line: bytes) -> Logged | None:
    try:
        told = json.loads(line)
        facts = {str(name): str(value) for name, value in told["facts"].items()}
        return Logged(
            str(told["kind"]), str(told["subject"]), str(told["message"]), float(told["time_s"]),
            actor=str(told["actor"]), facts=facts, number=int(told["number"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
