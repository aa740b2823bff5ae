"""What waits to be sent on one connection: frames first, then pieces by urgency, a block at a time. Thread-safe.

Pieces of higher urgency overtake between two blocks, so at most one piece of each rank is half sent. Everything is
bounded: a peer that asks for more than it takes is told BUSY, one that does not read its frames is given up.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from fal_fsd.peers.frames import DataHead, Frame, Have
from fal_fsd.peers.shared import SharedPart
from fal_fsd.peers.wire import PIECES_PER_FRAME_MAX, encode

FRAME_BYTES_MAX: Final = 8 << 20  # waiting; two manifests and a thousand announcements
JOBS_MAX: Final = 512  # pieces that one peer may have asked for
Key = tuple[str, int]


class Overflow(Exception):
    """The peer does not read what it is sent."""


@dataclass(eq=False, slots=True)
class Job:
    """A piece that was asked for. `sent`: bytes of it that have left; `begun`: a block may be on its way already."""

    shared: SharedPart
    piece: int
    rank: int
    length: int
    sent: int = 0
    begun: bool = False
    cancelled: bool = False

    @property
    def key(self) -> Key:
        return self.shared.artifact_id, self.piece


class Outbox:
    """See the module's docstring. One thread takes, any may put."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._changed = threading.Condition()
        self._frames: list[bytes] = []
        self._frame_bytes = 0
        self._have: dict[str, list[int]] = defaultdict(list)
        self._jobs: dict[Key, Job] = {}
        self._order: list[tuple[int, int, Job]] = []  # heap
        self._number = 0
        self._last = False  # nothing more may be put
        self._closed = False

    def send(self, frame: Frame) -> None:
        """Put a frame at the end of all frames. Raises Overflow."""
        raw = encode(frame)
        with self._changed:
            if self._last:
                return
            if self._frame_bytes + len(raw) > FRAME_BYTES_MAX:
                raise Overflow("the peer does not read what it is sent")
            self._frames.append(raw)
            self._frame_bytes += len(raw)
            self._changed.notify()

    def have(self, artifact_id: str, pieces: Iterable[int]) -> None:
        """Announce pieces; those that wait go together, after all frames."""
        with self._changed:
            if not self._last:
                self._have[artifact_id].extend(pieces)
                self._changed.notify()

    def want(self, shared: SharedPart, piece: int, length: int, rank: int) -> bool:
        """The peer asks for a piece; False: too many wait already. Asked again it may become more urgent."""
        key = (shared.artifact_id, piece)
        with self._changed:
            old = self._jobs.get(key)
            if old is not None:
                if rank < old.rank:
                    self._push(old, rank)
                return True
            if len(self._jobs) >= JOBS_MAX or self._last:
                return False
            job = self._jobs[key] = Job(shared, piece, rank, length)
            self._push(job, rank)
            return True

    def _push(self, job: Job, rank: int) -> None:
        job.rank = rank
        self._number += 1
        heappush(self._order, (rank, self._number, job))
        self._changed.notify()

    def cancel(self, artifact_id: str, pieces: Sequence[int] | None = None) -> None:
        """The peer does not want these (None: any) any more; of one that is half sent it is told the end."""
        with self._changed:
            keys = [(artifact_id, piece) for piece in pieces] if pieces is not None else [
                key for key in self._jobs if key[0] == artifact_id
            ]  # fmt: skip
            for job in filter(None, (self._jobs.pop(key, None) for key in keys)):
                self._abort(job)

    def give_up(self, job: Job) -> None:
        """The rest of it cannot be sent."""
        with self._changed:
            if self._jobs.pop(job.key, None) is job:
                self._abort(job)

    def _abort(self, job: Job) -> None:
        job.cancelled = True
        if job.begun and not self._last:
            self._frames.append(encode(DataHead(*job.key, offset=job.sent, length=0, aborted=True)))
            self._changed.notify()

    def finish(self, frame: Frame) -> None:
        """Send what waits of frames, then this one, and nothing after it."""
        with self._changed:
            if not self._last:
                self._last = True
                self._frames.append(encode(frame))
                self._changed.notify()

    def close(self) -> None:
        """The taking thread ends at once."""
        with self._changed:
            self._last = self._closed = True
            self._changed.notify()

    def take(self) -> tuple[bytes, Job | None] | None:
        """Frames that wait, and the piece of which a block is to be sent next; None at the end. Blocks."""
        with self._changed:
            while True:
                if self._closed:
                    return None
                frames = self._take_frames()
                if self._last:
                    self._closed = True
                    return frames, None
                job = self._first()
                if job is not None:
                    job.begun = True
                if frames or job is not None:
                    return frames, job
                self._changed.wait()

    def frames_until(self, end_s: float) -> bytes | None:
        """As `take`, frames only, until that time has come: empty then; None at the end."""
        with self._changed:
            while not self._last:
                if frames := self._take_frames():
                    return frames
                left_s = end_s - self._now_s()
                if left_s <= 0.0:
                    return b""
                self._changed.wait(left_s)
            return None if self._closed else b""

    def advance(self, job: Job, count: int) -> None:
        """So many bytes more of it have left."""
        with self._changed:
            job.sent += count
            if job.sent == job.length and self._jobs.get(job.key) is job:
                del self._jobs[job.key]

    def _take_frames(self) -> bytes:
        if self._have:
            for artifact_id, pieces in self._have.items():
                for at in range(0, len(pieces), PIECES_PER_FRAME_MAX):
                    self._frames.append(encode(Have(artifact_id, tuple(pieces[at : at + PIECES_PER_FRAME_MAX]))))
            self._have.clear()
        if not self._frames:
            return b""
        frames, self._frames, self._frame_bytes = self._frames, [], 0
        return b"".join(frames)

    def _first(self) -> Job | None:
        while self._order:
            rank, _, job = self._order[0]
            if not job.cancelled and job.sent < job.length and job.rank == rank:
                return job
            heappop(self._order)
        return None

    @property
    def jobs(self) -> int:
        """Pieces that wait."""
        with self._changed:
            return len(self._jobs)


__all__ = ["FRAME_BYTES_MAX", "JOBS_MAX", "Job", "Outbox", "Overflow"]
