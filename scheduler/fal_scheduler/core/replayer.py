"""Does a decision log again: the production core on the entries of one term, decision compared with decision.

Pure. `Replayer.take` does one entry and returns how what is decided now differs from what was decided then, or None.
Ids come from the log. A join token's secret is not in the log; `RIGHT` and `WRONG` stand for it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from fal_contract.errors import Code, FalError
from fal_scheduler.core import snapshot
from fal_scheduler.core.events import Event, Moment, NodeReport, Outcome, RedeemToken
from fal_scheduler.core.log_entries import (
    Beats,
    Committed,
    Ended,
    Entry,
    Failed,
    Founded,
    Froze,
    Loaded,
    Stepped,
    Suspected,
    TakenBack,
    TermRaised,
    Whole,
)
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import Change
from fal_scheduler.core.state import State
from fal_scheduler.core.step import BrokenInvariant, Core
from fal_scheduler.core.tokens import JoinToken

RIGHT: Final = "right"
WRONG: Final = "wrong"
_TEXT_CHARS_MAX: Final = 2000


@dataclass(frozen=True, slots=True)
class Difference:
    """The first part of an entry's outcome that came out otherwise: `part`, then, now (as text)."""

    part: str
    then: str
    now: str


class LoggedIds:
    """The ids that were drawn then. Drawing more is a difference by itself, and gets ids that no log holds."""

    def __init__(self) -> None:
        self.left: deque[str] = deque()
        self.missing = 0

    def suffix(self) -> str:
        """See IdSource."""
        if self.left:
            return self.left.popleft()
        self.missing += 1
        return f"replayed-{self.missing}"


class Replayer:
    """One term. `found(loaded)` makes the state of a term's begin; `suspect(state, cluster, wall)` what the engine does
    with a store of another cluster: both are edges' code. `make_core` builds the core, or one with planted changes."""

    def __init__(
        self,
        *,
        found: Callable[[Loaded], State],
        suspect: Callable[[State, str, float], object],
        make_core: Callable[[State, LoggedIds], Core] | None = None,
    ) -> None:
        self._found = found
        self._suspect = suspect
        self._ids = LoggedIds()
        self._make_core = make_core or (lambda state, ids: Core(state, Placer(state.fleet), ids))
        self._core: Core | None = None
        self._unacknowledged: deque[Change] = deque()

    @property
    def state(self) -> State:
        """As far as it was done. Raises FalError before the first entry."""
        return self._the_core().state

    def take(self, entry: Entry) -> Difference | None:
        """Do one entry."""
        match entry:
            case Stepped():
                return self._step(entry)
            case Beats():
                return self._beats(entry)
            case Committed():
                return self._committed(entry)
            case Loaded():
                self._begin(self._found(entry), ())
            case Whole():
                return self._whole(entry)
            case Founded():
                self.state.store_revision = entry.revision
                self.state.apply(entry.change)
            case Suspected():
                self._suspect(self.state, entry.cluster_id, entry.wall_s)
            case TermRaised():
                self.state.term = entry.term
            case Failed():
                return self._failed(entry)
            case TakenBack():
                now = self._the_core().taken_back(Moment(entry.now_s, entry.wall_s))
                return _compare([("effects", entry.effects, now.effects)])
            case Ended():
                return self._ended(entry)
            case Froze():
                now = self._the_core().freeze(list(entry.violations), Moment(entry.now_s, entry.wall_s))
                return _compare([("effects", entry.effects, now.effects)])
        return None

    def _the_core(self) -> Core:
        if self._core is None:
            raise FalError(Code.CORRUPT, "the log has no snapshot before its events", remedy="Take a whole segment.")
        return self._core

    def _begin(self, state: State, unacknowledged: Sequence[Change]) -> None:
        self._core = self._make_core(state, self._ids)
        self._unacknowledged = deque(unacknowledged)

    def _whole(self, entry: Whole) -> Difference | None:
        """A new segment of the term under way: its head must be what the one before came to."""
        state = snapshot.restore(entry.state)
        differing = snapshot.differences(state, self.state) if self._core is not None else []
        self._begin(state, entry.unacknowledged)
        if not differing:
            return None
        return Difference("state at the segment's head", "as its snapshot says", f"differs in {', '.join(differing)}")

    def _ended(self, entry: Ended) -> Difference | None:
        """Tables whose classes or fields another release changed are not compared."""
        now = snapshot.fingerprints(self.state)
        differing = [
            name
            for name, then in entry.fingerprints.items()
            if name in now and now[name] != then and not _of_another_release(then, now[name])
        ]
        return (
            Difference("state at the term's end", "as it was", f"differs in {', '.join(differing)}")
            if differing
            else None
        )

    def _step(self, entry: Stepped) -> Difference | None:
        core, moment = self._the_core(), Moment(entry.now_s, entry.wall_s)
        self._ids.left, self._ids.missing = deque(entry.ids), 0
        event, secret_back = _with_secret(core.state, entry.event)
        outcome, error = Outcome(), ""
        try:
            outcome = core.step(event, moment)
        except FalError as refusal:
            error = describe(refusal)
        except BrokenInvariant as broken:
            error = describe(FalError(Code.INVARIANT, str(broken), remedy=""))
        except Exception as crash:  # of a core that is not the one that wrote the log
            error = f"crashed: {crash!r}"
        outcome = secret_back(outcome)
        self._unacknowledged.extend(outcome.changes)
        changes = tuple((change.key, change.after) for change in outcome.changes)
        return _compare(
            [
                ("error", entry.error, error),
                ("ids drawn", len(entry.ids), len(entry.ids) - len(self._ids.left) + self._ids.missing),
                ("changes", entry.changes, changes),
                ("effects", entry.effects, outcome.effects),
                ("reply", entry.reply, outcome.reply),
            ]
        )

    def _beats(self, entry: Beats) -> Difference | None:
        core = self._the_core()
        for node_id, session_id, arrived_s in entry.told:
            outcome = core.step(NodeReport(node_id, session_id, arrived_s), Moment(arrived_s, 0.0))
            if outcome.changes or outcome.effects:
                return Difference(f"heartbeat of {node_id}", "nothing", _text(outcome))
        return None

    def _committed(self, entry: Committed) -> Difference | None:
        if entry.changes > len(self._unacknowledged):
            return Difference("changes that wait", f"at least {entry.changes}", str(len(self._unacknowledged)))
        for _ in range(entry.changes):
            self._unacknowledged.popleft()
        self.state.store_revision = entry.revision
        return None

    def _failed(self, entry: Failed) -> Difference | None:
        undone = list(self._unacknowledged)
        self._unacknowledged.clear()
        for change in reversed(undone):
            self.state.apply(change.undone())
        now = self._the_core().taken_back(Moment(entry.now_s, entry.wall_s), undone)
        return _compare([("changes undone", entry.changes, len(undone)), ("effects", entry.effects, now.effects)])


def _of_another_release(then: str, now: str) -> bool:
    """Whether both hold objects, of classes with other fields."""
    shapes = then.partition(".")[0], now.partition(".")[0]
    return all(shapes) and shapes[0] != shapes[1]


def describe(error: FalError) -> str:
    """A refusal as the log holds it."""
    return f"{error.code}: {error.what}"


def redacted(state: State, event: Event) -> Event:
    """The event without what no log may hold: a join token's secret gives way to whether it is right."""
    if not isinstance(event, RedeemToken):
        return event
    token = state.tokens.get(event.token_id)
    right = token is not None and hashlib.sha256(event.secret.encode()).digest() == token.secret_sha256
    return replace(event, secret=RIGHT if right else WRONG)


def _with_secret(state: State, event: Event) -> tuple[Event, Callable[[Outcome], Outcome]]:
    """For a join: lend its token a secret that is known here, and what takes it back out of state and outcome."""
    token = state.tokens.get(event.token_id) if isinstance(event, RedeemToken) else None
    if token is None:
        return event, lambda outcome: outcome
    real, lent = token.secret_sha256, hashlib.sha256(RIGHT.encode()).digest()
    state.tokens[token.id] = replace(token, secret_sha256=lent)

    def back(outcome: Outcome) -> Outcome:
        state.tokens[token.id] = replace(state.tokens[token.id], secret_sha256=real)
        changes = tuple(Change(one.key, _real(one.before, real), _real(one.after, real)) for one in outcome.changes)
        return replace(outcome, changes=changes)

    return event, back


def _real(record: Any, secret_sha256: bytes) -> Any:
    return replace(record, secret_sha256=secret_sha256) if isinstance(record, JoinToken) else record


def _compare(parts: Sequence[tuple[str, object, object]]) -> Difference | None:
    for part, then, now in parts:
        if then != now:
            return _narrow(part, then, now)
    return None


def _narrow(part: str, then: object, now: object) -> Difference:
    """Of two sequences only the first item that differs."""
    if isinstance(then, tuple) and isinstance(now, tuple):
        for at in range(max(len(then), len(now))):
            left, right = then[at : at + 1], now[at : at + 1]
            if left != right:
                return Difference(f"{part}, number {at + 1}", _item(left), _item(right))
    return Difference(part, _text(then), _text(now))


def _item(slice_: Sequence[object]) -> str:
    return _text(slice_[0]) if slice_ else "nothing"


def _text(value: object) -> str:
    text = str(value) if isinstance(value, str | int) else repr(value)
    return text if len(text) <= _TEXT_CHARS_MAX else f"{text[:_TEXT_CHARS_MAX]}…"


__all__ = ["RIGHT", "WRONG", "Difference", "LoggedIds", "Replayer", "describe", "redacted"]
