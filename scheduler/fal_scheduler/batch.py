"""Changes on their way to the store: what one commit holds, and what to do when it is acknowledged or not.

Used by the engine only. Knows nothing of how a store works but its bounds (100 operations, 1 MiB).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from fal_contract.errors import Code, FalError
from fal_contract.limits import COMMIT_BYTES_MAX, COMMIT_OPERATIONS_MAX
from fal_scheduler.codec import encode
from fal_scheduler.core.events import Effect, Reply
from fal_scheduler.core.records import Change, Record, Runner, key_of, runner_key
from fal_scheduler.store.interface import Write


@dataclass(slots=True)
class Batch:
    """Steps that are committed together, in order."""

    writes: dict[str, bytes | None] = field(default_factory=dict)  # the last one of each key
    size: int = 0  # bytes of keys and values
    befores: dict[str, Record | None] = field(default_factory=dict)  # of each key, before the whole batch
    changes: list[Change] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    waiting: list[tuple[asyncio.Future[Reply], Reply]] = field(default_factory=list)

    def add(self, changes: Sequence[Change], encoded: dict[str, bytes | None], effects: Sequence[Effect]) -> None:
        """Take a step in; `encoded` is `encode_changes(changes)`."""
        for change in changes:
            self.befores.setdefault(change.key, change.before)
        for key, value in encoded.items():
            self.size += _size(key, value) - (_size(key, self.writes[key]) if key in self.writes else 0)
            self.writes[key] = value
        self.changes += changes
        self.effects += effects

    def takes(self, encoded: dict[str, bytes | None]) -> bool:
        """Whether a step with these writes fits in as well."""
        if not self.writes:
            return True
        operations = len(self.writes) + sum(1 for key in encoded if key not in self.writes)
        size = self.size + sum(_size(key, value) for key, value in encoded.items())
        return operations <= COMMIT_OPERATIONS_MAX and size <= COMMIT_BYTES_MAX

    def operations(self) -> list[Write]:
        """For the store."""
        return [Write(key, value) for key, value in self.writes.items()]

    def succeed(self) -> None:
        """Answer everybody who waits for this batch."""
        for future, reply in self.waiting:
            if not future.done():
                future.set_result(reply)

    def fail(self, error: Exception) -> None:
        """Refuse everybody who waits for this batch."""
        for future, _ in self.waiting:
            if not future.done():
                future.set_exception(error)


def encode_changes(changes: Sequence[Change]) -> dict[str, bytes | None]:
    """The last value of each key that changed."""
    last = {change.key: change.after for change in changes}
    return {key: None if record is None else encode(record) for key, record in last.items()}


def durable_runner(batches: Sequence[Batch], runner_id: str, present: Runner | None) -> Runner | None:
    """A runner as the store is known to hold it: `present` but for unacknowledged `batches`, the oldest first."""
    if not batches:
        return present
    key = key_of(present) if present is not None else runner_key(runner_id)
    for batch in batches:
        if key in batch.befores:
            before = batch.befores[key]
            return before if isinstance(before, Runner) else None
    return present


def were_on(batches: Sequence[Batch], node_id: str) -> list[str]:
    """Ids of runners that were on a node before these batches."""
    befores = (before for batch in batches for before in batch.befores.values())
    return [before.id for before in befores if isinstance(before, Runner) and before.node == node_id]


def _size(key: str, value: bytes | None) -> int:
    return len(key.encode()) + (len(value) if value is not None else 0)


def outcome_unknown(why: FalError) -> FalError:
    """What the commit in flight is answered with when leadership ends for another reason than that commit."""
    if why.code is not Code.NOT_LEADER:
        return why
    what = f"it is not known whether the change was stored: {why.what}"
    return FalError(Code.STORE_UNKNOWN, what, remedy="Look whether it was, then try again.")


def did_nothing(why: FalError) -> FalError:
    """What everything behind it is answered with: it surely never happens, so the next leader may be asked."""
    if why.code is not Code.STORE_UNKNOWN:
        return why
    return FalError(Code.NOT_LEADER, f"leadership was lost: {why.what}", remedy="Try again; ask the new leader.")
