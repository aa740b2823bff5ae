"""Which requests a node admits, and what became of them. Pure.

The node is the authority: whoever granted what, a runner never has more than `max_multiplexing` requests at once, and
a ticket of a leader older than the last two is refused. After a hand-over, requests that still run in the
predecessor (`inherited`) count like our own, until it tells that they ended.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from fal_agent.proxy.messages import RunnerEntry, RunnerStats
from fal_contract.errors import Code


class Outcome(Enum):
    """How a request ended."""

    SERVED = "served"  # a whole answer below 500
    FAILED = "failed"  # no whole answer, or 500 and above
    CANCELLED = "cancelled"  # the client went away
    NOT_RUN = "not run"  # the worker refused it; counted nowhere


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request was not admitted; it surely did not run."""

    code: Code
    what: str
    free: int = 0  # slots that are free, for BUSY


@dataclass(slots=True)
class _Runner:
    entry: RunnerEntry
    in_flight: int = 0
    inherited: int = 0
    served: int = 0
    failed: int = 0
    cancelled: int = 0
    last_used_s: float | None = None
    busy_s: float = 0.0  # with at least one request under way, up to busy_since_s
    busy_since_s: float | None = None
    removed: bool = False  # forgotten, but requests are under way

    @property
    def busy(self) -> int:
        return self.in_flight + self.inherited

    def busy_until_s(self, now_s: float) -> float:
        """Seconds in which it had a request under way."""
        return self.busy_s + (max(0.0, now_s - self.busy_since_s) if self.busy_since_s is not None else 0.0)

    def settle(self, now_s: float) -> None:
        """Its requests changed in number."""
        self.busy_s = self.busy_until_s(now_s)
        self.busy_since_s = now_s if self.busy else None


@dataclass(frozen=True, slots=True)
class HandedRunner:
    """A runner as it goes from a proxy to its successor."""

    entry: RunnerEntry
    in_flight: int
    served: int
    failed: int
    cancelled: int
    last_used_age_s: float
    busy_s: float = 0.0


class SlotTable:
    """The runners of this node. `now_s` is monotonic."""

    def __init__(self) -> None:
        self._runners: dict[str, _Runner] = {}
        self._terms = (0, 0)  # the last two

    @property
    def term(self) -> int:
        """The newest leader's term that was told."""
        return self._terms[0]

    @property
    def terms(self) -> tuple[int, int]:
        """The last two, newest first."""
        return self._terms

    def set_terms(self, newest: int, before: int) -> None:
        """Take both back from a state file or a predecessor."""
        self._terms = (newest, before)

    def set_term(self, term: int) -> bool:
        """A leader's term was told; True when it is new. An older one changes nothing."""
        if term <= self._terms[0]:
            return False
        self._terms = (term, self._terms[0])
        return True

    def put(self, entry: RunnerEntry) -> None:
        """Add or change a runner; what is under way counts on."""
        have = self._runners.get(entry.runner_id)
        if have is None:
            self._runners[entry.runner_id] = _Runner(entry)
        else:
            have.entry, have.removed = entry, False

    def drain(self, runner_id: str) -> bool:
        """False when the runner is unknown."""
        have = self._runners.get(runner_id)
        if have is None or have.removed:
            return False
        have.entry = replace(have.entry, draining=True)
        return True

    def remove(self, runner_id: str) -> bool:
        """False when the runner is unknown."""
        have = self._runners.get(runner_id)
        if have is None or have.removed:
            return False
        have.removed = True
        self._forget_if_idle(runner_id, have)
        return True

    def serves(self, runner_id: str) -> bool:
        """Whether it is known and not forgotten."""
        have = self._runners.get(runner_id)
        return have is not None and not have.removed

    def admit(self, runner_id: str, ticket_term: int, now_s: float) -> RunnerEntry | Refused:
        """Take a slot, or say why not. An admitted request must be released, once."""
        have = self._runners.get(runner_id)
        if have is None or have.removed:
            return Refused(Code.NOT_FOUND, f"runner {runner_id} is not here")
        if ticket_term < self._terms[1]:
            what = (
                f"the ticket is of term {ticket_term}, the last two leaders' are {self._terms[0]} and {self._terms[1]}"
            )
            return Refused(Code.STALE_TERM, what)
        if have.entry.draining:
            return Refused(Code.DRAINING, f"runner {runner_id} takes no new requests")
        if have.busy >= have.entry.max_multiplexing:
            return Refused(Code.BUSY, f"all {have.entry.max_multiplexing} slots of runner {runner_id} are in use")
        have.in_flight += 1
        if have.busy_since_s is None:
            have.busy_since_s = now_s
        return have.entry

    def release(self, runner_id: str, outcome: Outcome, now_s: float) -> None:
        """An admitted request ended."""
        have = self._runners[runner_id]
        assert have.in_flight > 0, f"{runner_id} released more requests than it was given"
        have.in_flight -= 1
        self._count(runner_id, have, outcome, now_s)

    def release_inherited(self, runner_id: str, outcome: Outcome, now_s: float) -> None:
        """A request ended in the predecessor. Late news about what is forgotten is dropped."""
        have = self._runners.get(runner_id)
        if have is None or have.inherited == 0:
            return
        have.inherited -= 1
        self._count(runner_id, have, outcome, now_s)

    def drop_inherited(self, now_s: float) -> None:
        """The predecessor is gone, and what ran in it with it."""
        for runner_id, have in list(self._runners.items()):
            while have.inherited:
                self.release_inherited(runner_id, Outcome.FAILED, now_s)

    def hand_over(self, now_s: float) -> list[HandedRunner]:
        """Everything for a successor; removed runners too while requests are under way."""
        return [
            HandedRunner(
                replace(have.entry, draining=have.entry.draining or have.removed),
                have.busy, have.served, have.failed, have.cancelled, _age(have, now_s), have.busy_until_s(now_s),
            )
            for have in self._runners.values()
        ]  # fmt: skip

    def take_over(self, handed: HandedRunner, now_s: float) -> None:
        """The other side of `hand_over`."""
        self._runners[handed.entry.runner_id] = _Runner(
            handed.entry,
            inherited=handed.in_flight,
            served=handed.served,
            failed=handed.failed,
            cancelled=handed.cancelled,
            last_used_s=None if handed.last_used_age_s < 0 else now_s - handed.last_used_age_s,
            busy_s=handed.busy_s,
            busy_since_s=now_s if handed.in_flight else None,
        )

    def entries(self) -> tuple[RunnerEntry, ...]:
        """The runners that are served."""
        return tuple(have.entry for have in self._runners.values() if not have.removed)

    def slots_total(self) -> int:
        """Requests that all runners together take at once."""
        return sum(have.entry.max_multiplexing for have in self._runners.values() if not have.removed)

    def in_flight_total(self) -> int:
        """Requests under way in this process."""
        return sum(have.in_flight for have in self._runners.values())

    def stats(self, now_s: float) -> tuple[RunnerStats, ...]:
        """Counters of every runner that is served."""
        return tuple(
            RunnerStats(
                runner_id, have.entry.max_multiplexing, have.entry.draining, have.busy, have.served, have.failed,
                have.cancelled, _age(have, now_s), have.busy_until_s(now_s),
            )
            for runner_id, have in self._runners.items()
            if not have.removed
        )  # fmt: skip

    def _count(self, runner_id: str, have: _Runner, outcome: Outcome, now_s: float) -> None:
        have.last_used_s = now_s
        have.settle(now_s)
        match outcome:
            case Outcome.SERVED:
                have.served += 1
            case Outcome.FAILED:
                have.failed += 1
            case Outcome.CANCELLED:
                have.cancelled += 1
            case Outcome.NOT_RUN:
                pass
        self._forget_if_idle(runner_id, have)

    def _forget_if_idle(self, runner_id: str, have: _Runner) -> None:
        if have.removed and have.busy == 0:
            del self._runners[runner_id]


def _age(have: _Runner, now_s: float) -> float:
    return -1.0 if have.last_used_s is None else max(0.0, now_s - have.last_used_s)
