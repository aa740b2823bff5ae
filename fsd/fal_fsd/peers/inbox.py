"""Pieces that were asked of one peer, and their bytes on the way in.

Invariant: a piece that was asked for ends in exactly one of `Came`, `Bad`, `Refused`, a withdrawal or the connection's
end; then its writer is closed. One that is withdrawn while it is being counted still tells `Came`. Bytes that nobody
wants (withdrawn, or the part has no use for them) are passed over.

`ask` and `withdraw` are called on the event loop, the rest by the thread that receives. Withdrawing never waits for
the disk: who finds the writer in use leaves its end to the thread that uses it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from fal_contract.errors import FalError
from fal_fsd.core.rates import RateMeter
from fal_fsd.peers.frames import DataHead
from fal_fsd.peers.shared import SharedPart
from fal_fsd.peers.wire import WireError
from fal_fsd.ports import BadPiece, Part, PieceWriter

UNASKED_BYTES_MAX: Final = 256 << 20  # withdrawn pieces may still be on their way, but not so many
OPEN_MAX: Final = 8  # pieces half received; a sender of ours has 3 at most
REFUSED_RETRY_S: Final = 1.0
TAKEN_RETRY_S: Final = 0.2
Key = tuple[str, int]


@dataclass(eq=False, slots=True)
class _Wanted:
    """A piece that was asked for. `writer` from its first byte on."""

    shared: SharedPart
    piece: int
    asked_s: float
    writer: PieceWriter | None = None
    at: int = 0
    busy: bool = False  # the receiving thread is in its writer
    dead: bool = False  # nobody wants it any more


@dataclass(frozen=True, slots=True)
class Came:
    """It was checked and written. `seconds` since it was asked for."""

    artifact_id: str
    piece: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Bad:
    """Its bytes were wrong."""

    artifact_id: str
    piece: int


@dataclass(frozen=True, slots=True)
class Refused:
    """It will not come. `stop`: tell the peer; `error`: what the disk said."""

    artifact_id: str
    piece: int
    retry_s: float
    stop: bool = False
    error: Exception | None = None


Outcome = Came | Bad | Refused
Expect = Callable[[Part, int], tuple[bool, bytes | None]]


@dataclass(slots=True)
class Inbox:
    """See the module's docstring. `expect(part, piece)`: whether it may be taken, and the digest that it must have."""

    source: str
    tell: Callable[[Outcome], None]
    expect: Expect
    now_s: Callable[[], float]
    meter: RateMeter = field(default_factory=RateMeter)
    last_byte_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _wanted: dict[Key, _Wanted] = field(default_factory=dict)
    _current: _Wanted | None = None
    _current_head: DataHead | None = None
    _block_left: int = 0
    _unasked_bytes: int = 0
    _metered_s: float = 0.0

    def ask(self, shared: SharedPart, pieces: Sequence[int]) -> list[int]:
        """Note that these are asked now; those that were asked before are left out of the answer."""
        now_s = self.now_s()
        with self._lock:
            fresh = [piece for piece in pieces if (shared.artifact_id, piece) not in self._wanted]
            for piece in fresh:
                self._wanted[shared.artifact_id, piece] = _Wanted(shared, piece, now_s)
        return fresh

    def withdraw(self, artifact_id: str, pieces: Sequence[int] | None = None) -> list[int]:
        """Nobody wants these (None: any of it) any more; which there were."""
        with self._lock:
            if pieces is None:
                pieces = [piece for id, piece in self._wanted if id == artifact_id]
            ended = [self._wanted.pop((artifact_id, piece), None) for piece in pieces]
            found = [wanted for wanted in ended if wanted is not None]
            for wanted in found:
                wanted.dead = True
            idle = [wanted for wanted in found if not wanted.busy]
        for wanted in idle:
            _abort(wanted)
        return [wanted.piece for wanted in found]

    @property
    def count(self) -> int:
        """Pieces that are outstanding."""
        return len(self._wanted)

    def silent_s(self) -> float:
        """Seconds since something that was asked for should have come: 0 when nothing is outstanding."""
        with self._lock:
            if not self._wanted:
                return 0.0
            oldest_s = min(wanted.asked_s for wanted in self._wanted.values())
        return self.now_s() - max(oldest_s, self.last_byte_s)

    def head(self, head: DataHead) -> None:
        """A block begins. Raises WireError."""
        if self._block_left:
            raise WireError("a block is cut off")
        key = (head.artifact_id, head.piece)
        wanted = self._wanted.get(key)
        if head.aborted:
            if wanted is not None:
                self._restart(wanted)
            return
        self._current, self._current_head, self._block_left = wanted, head, head.length
        if wanted is None:
            return
        self._unasked_bytes = 0
        length = wanted.shared.lengths.length(head.piece)
        end = head.offset + head.length
        if head.offset and wanted.writer is None:
            self._current = None  # of an answer that was withdrawn; the next begins with offset 0
            return
        if head.offset != wanted.at or end > length or head.last != (end == length):
            raise WireError(f"a block of piece {head.piece} does not follow the one before")
        if wanted.writer is None:
            self._open(wanted)

    def data(self, view: memoryview) -> None:
        """The next bytes of the block."""
        self._block_left -= len(view)
        self.last_byte_s = self.now_s()
        wanted, head = self._current, self._current_head
        if wanted is None or wanted.dead:
            self._unasked_bytes += len(view)
            if self._unasked_bytes > UNASKED_BYTES_MAX:
                raise WireError("the peer sends what nobody asked for")
            return
        self._write(wanted, view)
        if head is not None and head.last and not self._block_left and not wanted.dead:
            self._finish(wanted)

    def end(self) -> None:
        """The connection is over; called by the receiving thread, last."""
        with self._lock:
            ended = list(self._wanted.values())
            self._wanted.clear()
        for wanted in ended:
            wanted.dead = True
            _abort(wanted)

    def _restart(self, wanted: _Wanted) -> None:
        """What came of it belongs to a request that was withdrawn; it comes anew, or NOT_HERE follows."""
        with self._lock:
            writer, wanted.writer, wanted.at = wanted.writer, None, 0
        if writer is not None:
            writer.abort()

    def _open(self, wanted: _Wanted) -> None:
        if sum(1 for each in list(self._wanted.values()) if each.writer is not None) >= OPEN_MAX:
            raise WireError("too many pieces are half sent")
        key = (wanted.shared.artifact_id, wanted.piece)
        with wanted.shared.use() as part:
            if part is None:
                return self._end(wanted, Refused(*key, 0.0, stop=True))
            allowed, digest = self.expect(part, wanted.piece)
            if not allowed:  # nobody says what it should be; its announcement may be on the way
                return self._end(wanted, Refused(*key, REFUSED_RETRY_S, stop=True))
            try:
                writer = part.writer(wanted.piece, source=self.source, expect=digest)
            except (OSError, FalError) as error:
                return self._end(wanted, Refused(*key, REFUSED_RETRY_S, stop=True, error=error))
            if writer is None:  # another peer writes it just now, or did
                return self._end(wanted, Refused(*key, TAKEN_RETRY_S, stop=True))
            with self._lock:
                wanted.writer = writer
                dead = wanted.dead
            if dead:
                _abort(wanted)
        return None

    def _write(self, wanted: _Wanted, view: memoryview) -> None:
        writer = self._enter(wanted)
        if writer is None:
            return
        failure: Exception | None = None
        try:
            with wanted.shared.use() as part:
                if part is None:
                    wanted.dead = True
                else:
                    writer.write(view)
                    wanted.at += len(view)
        except (OSError, FalError) as error:
            failure = error
        finally:
            self._leave(wanted)
        if failure is not None:
            key = (wanted.shared.artifact_id, wanted.piece)
            self._end(wanted, Refused(*key, REFUSED_RETRY_S, stop=True, error=failure))

    def _finish(self, wanted: _Wanted) -> None:
        writer = self._enter(wanted)
        if writer is None:
            return
        key = (wanted.shared.artifact_id, wanted.piece)
        outcome: Outcome
        try:
            with wanted.shared.use() as part:
                if part is None:
                    outcome = Refused(*key, 0.0)
                else:
                    writer.finish()
                    outcome = Came(*key, self.now_s() - wanted.asked_s)
                    self._measure(wanted)
        except BadPiece:
            outcome = Bad(*key)
        except (OSError, FalError) as error:
            outcome = Refused(*key, REFUSED_RETRY_S, error=error)
        finally:
            self._leave(wanted)
        self._end(wanted, outcome)

    def _enter(self, wanted: _Wanted) -> PieceWriter | None:
        with self._lock:
            wanted.busy = not wanted.dead and wanted.writer is not None
            return wanted.writer if wanted.busy else None

    def _leave(self, wanted: _Wanted) -> None:
        with self._lock:
            wanted.busy = False
            dead = wanted.dead
        if dead:
            _abort(wanted)

    def _end(self, wanted: _Wanted, outcome: Outcome) -> None:
        """Its one end, unless somebody withdrew it in the meantime."""
        with self._lock:
            first = self._wanted.pop((wanted.shared.artifact_id, wanted.piece), None) is wanted
            wanted.dead = True
        _abort(wanted)
        if first or isinstance(outcome, Came):
            self.tell(outcome)

    def _measure(self, wanted: _Wanted) -> None:
        now_s = self.now_s()
        begun_s = max(wanted.asked_s, self._metered_s)
        self.meter.add(wanted.at, now_s - begun_s)
        self._metered_s = now_s


def _abort(wanted: _Wanted) -> None:
    if wanted.writer is not None:
        wanted.writer.abort()  # fine after finish


__all__ = ["Bad", "Came", "Inbox", "Outcome", "Refused"]
