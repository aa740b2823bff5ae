"""From records in a store to a State: what a new leader does before its first event.

Raises VERSION_MISMATCH or CORRUPT, naming the key, where a record cannot be read: the scheduler then does not start.
Records that break a rule do not stop it: they come back as violations and are frozen (`degraded`). Called by the
engine only.
"""

from __future__ import annotations

from collections.abc import Mapping

from fal_scheduler.codec import decode
from fal_scheduler.core import invariants
from fal_scheduler.core.invariants import Violation
from fal_scheduler.core.records import Change
from fal_scheduler.core.state import State


def recover(records: Mapping[str, bytes], *, term: int, revision: int, now_s: float) -> tuple[State, list[Violation]]:
    """The state that the records say, as the leader of `term` finds it at `now_s` (monotonic)."""
    state = State()
    state.term, state.store_revision, state.term_began_s = term, revision, now_s
    for key in sorted(records):
        state.apply(Change(key, None, decode(key, records[key])))
    state.dirty.update(dict.fromkeys(state.apps))
    state.waiting.update(dict.fromkeys(runner.app for runner in state.runners.values() if not runner.node))
    state.settled = not any(not node.revoked for node in state.nodes.values())
    return state, [found for part in invariants.audit(state) for found in part]
