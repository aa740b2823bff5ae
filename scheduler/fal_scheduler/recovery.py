"""From records in a store to a State: what a new leader does before its first event.

Raises VERSION_MISMATCH or CORRUPT, naming the key, where a record cannot be read, FAILED_PRECONDITION where the store
is marked as moved or half filled: the scheduler then does not start.
Records that break a rule do not stop it: they come back as violations and are frozen (`degraded`). Called by the
engine only.
"""

from __future__ import annotations

from collections.abc import Mapping

from fal_scheduler.codec import decode
from fal_scheduler.core import invariants, learnt_shards, suspicion
from fal_scheduler.core.events import Logged
from fal_scheduler.core.invariants import Violation
from fal_scheduler.core.records import META_KEY, Change, Meta
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Alarm
from fal_scheduler.core.waiting import enter
from fal_scheduler.store_mark import check_mark


def recover(records: Mapping[str, bytes], *, term: int, revision: int, now_s: float) -> tuple[State, list[Violation]]:
    """The state that the records say, as the leader of `term` finds it at `now_s` (monotonic)."""
    check_mark(records)
    state = State()
    state.term, state.store_revision, state.term_began_s = term, revision, now_s
    for key in sorted(records):
        state.apply(Change(key, None, decode(key, records[key])))
    suspicion.resume(state)
    learnt_shards.load(state.learning, state.learnt.values())
    state.dirty.update(dict.fromkeys(state.apps))
    for runner in state.runners.values():
        asked = state.revisions.get((runner.app, runner.revision))
        if not runner.node and asked is not None:
            enter(state, runner.app, asked.spec, runner.created_at_s)
    state.grace_over = not state.runners  # there is nothing that a new leader could take for unused
    state.settled = not any(not node.revoked for node in state.nodes.values())
    return state, [found for part in invariants.audit(state) for found in part]


def first_meta(cluster_id: str, incarnation: str, *, wall_s: float) -> Change:
    """What makes an empty store a cluster's: `incarnation` is random, so that nodes tell this store from any other."""
    return Change(META_KEY, None, Meta(cluster_id, 1, incarnation, wall_s))


def suspect_foreign(state: State, cluster_id: str, *, wall_s: float) -> list[Logged]:
    """Hold everything back where the store belongs to another cluster than our CA; what an operator should read."""
    if state.meta is None or state.meta.cluster_id == cluster_id:
        return []
    why = f"the store belongs to cluster {state.meta.cluster_id}, our CA to {cluster_id}"
    remedy = "Point the scheduler at its own store; or `falctl operator confirm store`."
    state.hold_all = why
    state.alarms["STORE_FOREIGN", "store"] = Alarm("STORE_FOREIGN", "store", why, remedy, wall_s)
    return [Logged("STORE_FOREIGN", "store", f"{why}. {remedy}", wall_s)]
