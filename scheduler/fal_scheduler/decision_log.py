"""The decision log of a leader: everything that changed its State and what it decided, as segments beside its store.

An edge. Losing it is fine (design, section 6): a full disk is told once and tried again after minutes, never an error
or a wait for the caller. Entries gather in memory and leave as compressed blocks of 64 KiB, or every second; a thread
that lives only while something waits compresses and writes. Heartbeats that change nothing but when a node was heard
are gathered into one entry before whatever else comes next: between two entries they commute, so a replay is exact.

Called by the engine on its loop. Must decide nothing, and must not read a clock: time comes with the steps.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from io import BufferedWriter
from operator import attrgetter
from pathlib import Path
from typing import Final

import structlog

from fal_contract.errors import FalError
from fal_contract.limits import (
    DECISION_LOG_BLOCK_BYTES,
    DECISION_LOG_FLUSH_S,
    DECISION_LOG_RETRY_S,
    DECISION_LOG_SEGMENT_BYTES_MAX,
    DECISION_LOG_WAITING_BYTES_MAX,
)
from fal_scheduler.core import snapshot
from fal_scheduler.core.events import Event, Moment, NodeReport, Outcome
from fal_scheduler.core.log_codec import Packer, UnknownType
from fal_scheduler.core.log_entries import Beats, Committed, Ended, Entry, Failed, Loaded, Stepped, Whole
from fal_scheduler.core.records import Change
from fal_scheduler.core.replayer import describe, redacted
from fal_scheduler.core.state import State
from fal_scheduler.decision_files import Header, block_of, header_here, prune

CLOSE_S: Final = 10.0  # longest wait for the disk at the end of a term
BEATS_MAX: Final = 20_000
COMPRESSION: Final = 4  # at least; entries of a busy fleet come to a sixth

_HEARTBEAT: Final = NodeReport("", "", 0.0)
# Tunnels are told each time; where they are others than before, the outcome is not empty.
_BEAT_FIELDS: Final = ("node_id", "session_id", "arrived_s", "tunnels")
_TOLD: Final = attrgetter(*(one.name for one in fields(NodeReport) if one.name not in _BEAT_FIELDS))
_TOLD_NOTHING: Final = _TOLD(_HEARTBEAT)

_log = structlog.get_logger("fal.decisions")


class DecisionLog:
    """A Recorder on files in `folder` (made, 0700). One object serves one term: `began` … `close`."""

    def __init__(
        self,
        folder: Path,
        *,
        cluster_id: str,
        wall_s: float,
        segment_bytes_max: int = DECISION_LOG_SEGMENT_BYTES_MAX,
        block_bytes: int = DECISION_LOG_BLOCK_BYTES,
    ) -> None:
        """`wall_s`: now, for the header of the first segment and for what is too old to keep."""
        self._folder = folder
        self._cluster_id = cluster_id
        self._wall_s = wall_s
        self._now_s = 0.0
        self._segment_bytes_max = segment_bytes_max
        self._block_bytes = block_bytes
        self._state = State()
        self._packer = Packer()
        self._buffer = bytearray()
        self._file: _SegmentFile | None = None
        self._epoch = self._term = 0  # of the begin of this term; both may rise under way
        self._segment = -1
        self._number = 0  # of the last entry
        self._packed = 0  # bytes behind the head of this segment, before compression
        self._cut_s = 0.0  # when the last block left
        self._retry_s: float | None = None  # when a segment is tried again after the disk refused one
        self._beats: dict[tuple[str, str], float] = {}  # (node, session) -> monotonic seconds
        self._dirty = False  # after the last entry
        self._unacknowledged: deque[Change] = deque()
        self.failures = 0

    # --- Recorder ---------------------------------------------------------------------------------------------------

    def began(self, state: State, loaded: Loaded | None) -> None:
        """See Recorder."""
        self._state, self._term = state, state.term
        self._epoch = state.meta.epoch if state.meta is not None else 1
        self._now_s = loaded.now_s if loaded is not None else state.term_began_s
        self._open(loaded)

    def stepped(
        self, event: Event, moment: Moment, ids: Sequence[str], outcome: Outcome | None, error: FalError | None = None
    ) -> None:
        """See Recorder. The state is as the step left it."""
        self._now_s, self._wall_s = moment.now_s, moment.wall_s
        if outcome is not None and outcome.changes:
            self._unacknowledged.extend(outcome.changes)
        if self._file is None:
            if self._retry_s is not None and moment.now_s >= self._retry_s:
                self._open(None)
            return
        quiet = outcome is not None and not outcome.changes and not outcome.effects
        if quiet and not self._dirty and type(event) is NodeReport and _TOLD(event) == _TOLD_NOTHING:
            self._beat(event)
            return
        self._append(
            Stepped(
                redacted(self._state, event),
                moment.now_s,
                moment.wall_s,
                tuple(ids),
                tuple((change.key, change.after) for change in outcome.changes) if outcome is not None else (),
                outcome.effects if outcome is not None else (),
                outcome.reply if outcome is not None else None,
                describe(error) if error is not None else "",
            )
        )

    def note(self, entry: Entry) -> None:
        """See Recorder."""
        match entry:
            case Committed():
                for _ in range(entry.changes):
                    self._unacknowledged.popleft()
            case Failed():
                self._unacknowledged.clear()
        self._append(entry)

    def close(self) -> None:
        """See Recorder. Waits for the disk, for ten seconds at most."""
        self._append(self._ended())
        if self._file is not None:
            self._hand_over()
        file, self._file = self._file, None
        if file is not None and not file.close(CLOSE_S):
            _log.warning("decision log not closed", path=str(file.path), remedy="Look at the disk.")
        self._retry_s = None

    def wait_for_disk(self, timeout_s: float) -> bool:
        """Until nothing waits for the disk; False where it took longer. For tests and for who copies a log."""
        return self._file is None or self._file.wait(timeout_s)

    def _ended(self) -> Ended:
        try:
            return Ended(snapshot.fingerprints(self._state) if self._file is not None else {})
        except (UnknownType, OverflowError, ValueError, RecursionError):
            return Ended({})

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open(self, loaded: Loaded | None) -> None:
        """Begin a segment, with the records of a term's begin or with everything."""
        self._segment, self._retry_s = self._segment + 1, None
        header = header_here(
            cluster_id=self._cluster_id,
            epoch=self._epoch,
            term=self._term,
            segment=self._segment,
            first=self._number + 1,
            wall_s=self._wall_s,
        )
        self._beats.clear()  # the head says when everybody was heard
        self._packer, self._buffer = Packer(), bytearray()
        self._file = _SegmentFile(self._folder, header, reserve_bytes=self._segment_bytes_max)
        self._write(loaded or Whole(snapshot.take(self._state), tuple(self._unacknowledged)))
        self._dirty = bool(self._state.dirty)
        self._hand_over()
        self._packed = 0  # a head that is larger than a segment should be must not begin another

    def _append(self, entry: Entry) -> None:
        if self._file is None:
            return
        self._flush_beats()
        self._write(entry)
        self._dirty = bool(self._state.dirty)
        if len(self._buffer) >= self._block_bytes or self._now_s - self._cut_s >= DECISION_LOG_FLUSH_S:
            self._cut()

    def _beat(self, event: NodeReport) -> None:
        if len(self._beats) >= BEATS_MAX:
            self._flush_beats()
        key = event.node_id, event.session_id
        self._beats[key] = max(event.arrived_s, self._beats.get(key, 0.0))

    def _flush_beats(self) -> None:
        if self._beats:
            told = tuple((node_id, session, arrived_s) for (node_id, session), arrived_s in self._beats.items())
            self._beats.clear()
            self._write(Beats(told))

    def _write(self, entry: Entry) -> None:
        self._number += 1
        try:
            self._buffer += self._packer.pack(entry)
        except (UnknownType, OverflowError, ValueError, RecursionError) as error:
            self._give_up(f"{type(entry).__name__}: {error}")

    def _cut(self) -> None:
        """Hand what gathered to the disk; begin another segment where this one is full."""
        if self._file is None:
            return
        self._hand_over()
        if self._file.error:
            self._give_up(self._file.error)
        elif self._packed >= COMPRESSION * self._segment_bytes_max:
            self._flush_beats()
            self._hand_over()
            self._file.finish()
            self._open(None)

    def _hand_over(self) -> None:
        self._cut_s = self._now_s
        block, self._buffer = bytes(self._buffer), bytearray()
        if block and self._file is not None:
            self._file.append(block)
            self._packed += len(block)

    def _give_up(self, why: str) -> None:
        """No log until a segment is tried again. Told once a failure."""
        self.failures += 1
        self._number += 1  # a number that no entry has: readers see the gap
        if self._file is not None:
            self._file.finish()
        self._file, self._buffer = None, bytearray()
        self._retry_s = self._now_s + DECISION_LOG_RETRY_S
        remedy = f"Free the disk; tried again in {DECISION_LOG_RETRY_S:g} s."
        _log.warning("decision log not written", why=why, folder=str(self._folder), remedy=remedy)


class _SegmentFile:
    """One file that is written in a thread, as long as there is something to write."""

    def __init__(self, folder: Path, header: Header, *, reserve_bytes: int) -> None:
        self.path = folder / header.name
        self.error = ""
        self._header = header
        self._reserve_bytes = reserve_bytes
        self._file: BufferedWriter | None = None
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._finished = False
        self._thread: threading.Thread | None = None

    def append(self, block: bytes) -> None:
        """Write a block, soon."""
        with self._lock:
            if self._waiting_bytes + len(block) > DECISION_LOG_WAITING_BYTES_MAX and self._waiting:
                self.error = self.error or f"{self._waiting_bytes} bytes wait for the disk"
            if self.error:
                return
            self._waiting.append(block)
            self._waiting_bytes += len(block)
            self._wake()

    def finish(self) -> None:
        """Close the file when all is written."""
        with self._lock:
            self._finished = True
            self._wake()

    def close(self, timeout_s: float) -> bool:
        """`finish`, and wait for it; False where it took too long."""
        self.finish()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """Until nothing waits; False where it took too long."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """Write until nothing waits."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    if self._finished:
                        self._shut()
                    return
                block = self._waiting.popleft()
                self._waiting_bytes -= len(block)
            try:
                self._put(block)
            except OSError as error:
                with self._lock:
                    self.error = self.error or str(error)
                    self._waiting.clear()
                    self._waiting_bytes = 0

    def _put(self, block: bytes) -> None:
        if self._file is None:
            self._folder_ready()
            self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
            self._file.write(self._header.encode())
        self._file.write(block_of(block))
        self._file.flush()

    def _folder_ready(self) -> None:
        folder = self.path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        prune(folder, now_wall_s=self._header.began_wall_s, reserve_bytes=self._reserve_bytes)

    def _shut(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self.error = self.error or str(error)


__all__ = ["DecisionLog"]
