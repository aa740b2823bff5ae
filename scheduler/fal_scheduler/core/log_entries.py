"""What stands in a decision log: one frozen dataclass for everything that ever changes a State.

Pure. The engine tells each to its `Recorder` in the order in which it happened; `core.replayer` does them again. What
was decided stands beside what it was decided from, whole and not as a digest: a replay can then say what differs, and a
log written before a field was added still compares.

Order is all: nothing else than these may change a State. Whoever adds a way adds an entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fal_contract.errors import FalError
from fal_scheduler.core.events import Effect, Event, Moment, Outcome, Reply
from fal_scheduler.core.invariants import Violation
from fal_scheduler.core.records import Change, Record
from fal_scheduler.core.state import State


@dataclass(frozen=True, slots=True)
class Loaded:
    """A term begins: records as the store held them, by key. `now_s`: monotonic."""

    records: Mapping[str, bytes]
    term: int
    revision: int
    now_s: float


@dataclass(frozen=True, slots=True)
class Whole:
    """A segment begins in the middle of a term: everything (`core.snapshot`), and changes that are not yet durable."""

    state: Mapping[str, Any]
    unacknowledged: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Founded:
    """An empty store was given its first record."""

    change: Change
    revision: int


@dataclass(frozen=True, slots=True)
class Suspected:
    """The store was compared with the cluster of our CA, and found to be another's."""

    cluster_id: str
    wall_s: float


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step. `ids`: drawn in it, in order; `changes`: key and record after (None: removed).

    `error`: "CODE: message" of the FalError, "INVARIANT: rules" where rules would have been broken; else empty.
    """

    event: Event
    now_s: float
    wall_s: float
    ids: tuple[str, ...] = ()
    changes: tuple[tuple[str, Record | None], ...] = ()
    effects: tuple[Effect, ...] = ()
    reply: Reply | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Beats:
    """Heartbeats that changed nothing but when their nodes were heard: (node, session, monotonic seconds)."""

    told: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """The oldest `changes` changes are durable since store revision `revision`."""

    changes: int
    revision: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A commit did not happen: all `changes` changes that were not durable were undone."""

    changes: int
    now_s: float
    wall_s: float
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class TakenBack:
    """The last step would have broken a rule and was taken back."""

    now_s: float
    wall_s: float
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class Froze:
    """What broke a rule was frozen."""

    violations: tuple[Violation, ...]
    now_s: float
    wall_s: float
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class TermRaised:
    """A node had seen a higher term than ours."""

    term: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The term ended in order: a digest for each table of the State (`core.snapshot.fingerprints`)."""

    fingerprints: Mapping[str, str]


Entry = (
    Loaded | Whole | Founded | Suspected | Stepped | Beats | Committed | Failed | TakenBack | Froze | TermRaised | Ended
)


class Recorder(Protocol):
    """What the engine tells of all that changes its State. No call raises or waits."""

    def began(self, state: State, loaded: Loaded | None) -> None:
        """A term begins on `state`, which is what `loaded` says; None: it is taken down as it is."""
        ...

    def stepped(
        self, event: Event, moment: Moment, ids: Sequence[str], outcome: Outcome | None, error: FalError | None = None
    ) -> None:
        """A step: its outcome, or why it was refused."""
        ...

    def note(self, entry: Entry) -> None:
        """Anything else."""
        ...

    def close(self) -> None:
        """The term is over."""
        ...


class NoRecorder:
    """Records nothing."""

    def began(self, state: State, loaded: Loaded | None) -> None:
        """See Recorder."""

    def stepped(
        self, event: Event, moment: Moment, ids: Sequence[str], outcome: Outcome | None, error: FalError | None = None
    ) -> None:
        """See Recorder."""

    def note(self, entry: Entry) -> None:
        """See Recorder."""

    def close(self) -> None:
        """See Recorder."""


__all__ = [
    "Beats", "Committed", "Ended", "Entry", "Failed", "Founded", "Froze", "Loaded", "NoRecorder", "Recorder", "Stepped",
    "Suspected", "TakenBack", "TermRaised", "Whole",
]  # fmt: skip
