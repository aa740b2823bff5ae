"""What the engine asks of a store. Pure: types, the protocol, the checks that every store makes first.

Invariants that all stores keep (one contract suite, tests/contract/test_store.py, holds them to it):

- A commit happens as a whole or not at all, and is durable before `commit` returns.
- A commit happens only while its guard is true: the guard's holder is the leader and the guard's term is the
  stored term. A deposed leader can therefore harm nothing.
- The revision rises by exactly one per commit and is stored with it; a restored older copy has a lower one.
- The term rises with every campaign and is durable before the campaign returns.

Called by the engine (commit, load) and the leader module (campaign, lost). Must not interpret values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import COMMIT_BYTES_MAX, COMMIT_OPERATIONS_MAX, STORE_KEY_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Write:
    """One operation of a commit: set `key` to `value`, or delete it where `value` is None."""

    key: str  # a text path such as "team/default/runner/default/digits-7k2m9q4c"
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Guard:
    """The leadership that a commit is bound to. `token` is the store's own proof, opaque to callers."""

    term: int
    holder: str
    token: bytes


@dataclass(frozen=True, slots=True)
class Loaded:
    """All records as of one revision."""

    revision: int
    records: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """A scheduler that is up, as it tells the others: `addresses` are host:port of its gRPC listener."""

    name: str  # the holder's name in campaigns
    addresses: tuple[str, ...] = ()
    started_at_s: float = 0.0  # Unix seconds
    software: str = ""


@dataclass(frozen=True, slots=True)
class Roster:
    """Who leads (a member's name, empty: nobody) in which term, and who is up, by name."""

    leader: str
    term: int
    members: tuple[Member, ...]

    def addresses_of(self, name: str) -> tuple[str, ...]:
        """Where a member listens; nothing where it is not known."""
        return next((one.addresses for one in self.members if one.name == name), ())


class Store(Protocol):
    """Durable records with one leader at a time. All calls belong to the loop that opened the store.

    Every call is bounded in time except `campaign` and `lost`, which wait for others; cancel those.
    After STORE_UNKNOWN the next commit is refused (STORE_FAILED) until `load` has shown what really happened.
    """

    name: str  # "memory", "sqlite", "etcd": for logs and metrics

    async def open(self) -> None:
        """Check the store and be ready for `load` and `campaign`.

        Raises CORRUPT or VERSION_MISMATCH, having changed nothing; UNAVAILABLE where it cannot be reached.
        """
        ...

    async def campaign(self, holder: str, *, term_min: int = 0) -> Guard:
        """Wait until this process leads. The new term is max(stored, term_min - 1) + 1, durable before returning.

        Once at a time: a store that leads refuses (FAILED_PRECONDITION) until it has resigned or lost.
        """
        ...

    async def raise_term(self, guard: Guard, term: int) -> Guard:
        """Make the term at least `term` (an agent told of a higher one), durable before returning.

        The guard given is void afterwards, the one returned takes its place. A term that is not above the
        guard's changes nothing. Raises NOT_LEADER.
        """
        ...

    async def resign(self, guard: Guard) -> None:
        """Stop leading so that another may at once; nothing happens where the guard leads no longer."""
        ...

    async def lost(self, guard: Guard) -> None:
        """Return when the guard no longer leads: deposed, lease expired, resigned or closed."""
        ...

    async def load(self) -> Loaded:
        """A consistent snapshot of all records; leaders and standbys may call it."""
        ...

    async def commit(self, guard: Guard, writes: Sequence[Write]) -> int:
        """Do all `writes` at once, return the new revision.

        Raises INVALID (bounds, before anything), NOT_LEADER and STORE_FAILED (it did not happen),
        STORE_UNKNOWN (it may have happened: stop leading, load again). Safe when called concurrently;
        cancelling the call does not take the commit back.
        """
        ...

    async def announce(self, member: Member) -> None:
        """Tell the other schedulers that we are up; forgotten MEMBER_TTL_S after the last call, or with `close`.

        Raises UNAVAILABLE or STORE_FAILED. Never a commit: no revision changes.
        """
        ...

    async def roster(self) -> Roster:
        """Who leads and who is up. Raises as `announce`. A leader that crashed is named until its lease ends."""
        ...

    async def close(self) -> None:
        """Resign where leading, end every background task, release files and connections. May be repeated."""
        ...

    def statistics(self) -> Mapping[str, float]:
        """Counters and gauges by name, for metrics: commits, operations, bytes, commit_s_sum, failed, unknown …"""
        ...


def check_writes(writes: Sequence[Write]) -> int:
    """Refuse (INVALID) a commit that some store could not do; return its bytes (keys and values)."""
    if not 1 <= len(writes) <= COMMIT_OPERATIONS_MAX:
        raise invalid(
            "writes",
            len(writes),
            f"is not between 1 and {COMMIT_OPERATIONS_MAX} operations",
            remedy="Split the plan into several commits, each consistent by itself.",
        )
    keys: set[str] = set()
    size = 0
    for write in writes:
        key_size = len(write.key.encode())
        if not 1 <= key_size <= STORE_KEY_BYTES_MAX or not write.key.isprintable():
            raise invalid(
                "writes.key",
                write.key,
                f"is not 1 to {STORE_KEY_BYTES_MAX} bytes of printable text",
                remedy="Build keys from checked names.",
            )
        if write.key in keys:
            raise invalid("writes.key", write.key, "is written twice", remedy="Keep the last write of each key.")
        keys.add(write.key)
        size += key_size + (len(write.value) if write.value is not None else 0)
    if size > COMMIT_BYTES_MAX:
        raise invalid(
            "writes",
            size,
            f"is more than {COMMIT_BYTES_MAX} bytes",
            remedy="Keep large things beside the store and their digests in it, or split the commit.",
        )
    return size


def not_leader(guard: Guard, why: str) -> FalError:
    """The guard of a commit failed; nothing happened."""
    return FalError(
        Code.NOT_LEADER,
        f"{guard.holder!r} with term {guard.term} does not lead: {why}",
        remedy="Stop leading; campaign again before the next commit.",
    )


def leads_already(holder: str) -> FalError:
    """Refusal of a second campaign through the same store."""
    return FalError(Code.FAILED_PRECONDITION, f"{holder!r} campaigns while it leads", remedy="Resign first.")


def load_first(store: str) -> FalError:
    """Refusal of a commit on top of one whose outcome is not known."""
    return FalError(
        Code.STORE_FAILED,
        f"the outcome of an earlier {store} commit is not known",
        remedy="Stop leading, load the records again, then campaign.",
    )


class CommitCounters:
    """What every store counts, under the same names."""

    __slots__ = ("bytes", "commit_s_max", "commit_s_sum", "commits", "failed", "operations", "unknown")

    def __init__(self) -> None:
        self.commits = self.operations = self.bytes = self.failed = self.unknown = 0
        self.commit_s_sum = self.commit_s_max = 0.0

    def committed(self, operations: int, size: int, took_s: float) -> None:
        """One commit of `size` bytes returned after `took_s` seconds."""
        self.commits += 1
        self.operations += operations
        self.bytes += size
        self.commit_s_sum += took_s
        self.commit_s_max = max(self.commit_s_max, took_s)

    def refused(self, error: FalError) -> None:
        """One commit ended with `error`."""
        if error.code is Code.STORE_UNKNOWN:
            self.unknown += 1
        else:
            self.failed += 1

    def as_mapping(self) -> dict[str, float]:
        """The counters by name."""
        return {name: float(getattr(self, name)) for name in self.__slots__}
