"""Whether a node, or the store itself, is what it seems: clones, foreign nodes, new and older stores.

Pure. Nothing here stops a container: a suspicion only holds back what would be started or stopped by itself, until
an operator confirms (design, section 5, rule 4; pitfalls 6 and 24). Called by `news` and `confirm`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fal_scheduler.core.events import Confirm, Event, NodeChanged, NodeHello
from fal_scheduler.core.records import Suspicion
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Alarm, Hold, NodeLive
from fal_scheduler.core.work import Work

BOOTS_REMEMBERED: Final = 8
TERM_MAX: Final = 1 << 62  # stores keep terms as signed 64-bit numbers

_CONFIRM_STORE = "If this store is the right one, `falctl operator confirm store`; then settle its orphans."
_CONFIRM_NODE = "If it belongs here, `falctl operator confirm node NODE`; else revoke it."


def term_needed(state: State, event: Event) -> int:
    """The least term that this leader must have before it assigns anything after `event`; 0: no demand.

    A Hello of a node that we trust demands one above the term it saw; a confirm the same for all nodes it may release.
    """
    if isinstance(event, NodeHello):
        ours = _is_ours(state, event.cluster_id)
        return event.term_seen + 1 if ours and event.term_seen < TERM_MAX else 0
    if isinstance(event, Confirm) and event.what in ("store", "node"):
        seen = [live.term_seen for live in state.live.values() if live.hold is not Hold.NONE]
        return max((term for term in seen if term < TERM_MAX), default=-1) + 1
    return 0


def _is_ours(state: State, cluster_id: str) -> bool:
    meta = state.meta
    return meta is None or cluster_id in ("", meta.cluster_id, *meta.accepted_clusters)


def is_clone(live: NodeLive, hello: NodeHello) -> bool:
    """Whether `hello` shows a second live machine under this id: a boot that was superseded speaks again."""
    return hello.boot_id in live.past_boots


def remember_boot(live: NodeLive, boot_id: str) -> None:
    """A new boot supersedes the one before."""
    if live.boot_id and live.boot_id != boot_id:
        live.past_boots = (*live.past_boots, live.boot_id)[-BOOTS_REMEMBERED:]
    live.boot_id = boot_id


def judge(work: Work, live: NodeLive) -> None:
    """Decide the hold of a node that has just said Hello, and suspect the store where it saw a newer one."""
    if live.hold is Hold.CLONE:
        return  # only a confirm ends it
    state, meta = work.state, work.state.meta
    assert meta is not None, "the engine makes it before the first event"
    node = state.nodes.get(live.node_id)
    name = node.name if node is not None else live.node_id
    hold, reason = Hold.NONE, ""
    if not _is_ours(state, live.cluster_id):
        hold, reason = Hold.FOREIGN, f"{name} worked for cluster {live.cluster_id}"
        work.alarm("FOREIGN_NODE", live.node_id, reason, _CONFIRM_NODE)
    elif node is None:
        hold, reason = Hold.STORE, f"{name} holds our certificate, but this store does not know it"
        work.alarm("STORE_NEW", live.node_id, reason, _CONFIRM_STORE)
    elif live.epoch_seen > meta.epoch:
        hold, reason = Hold.STORE, f"{name} has seen epoch {live.epoch_seen}, this store is of epoch {meta.epoch}"
        _suspect_store(work, live, reason)
    elif live.epoch_seen == meta.epoch and live.incarnation not in ("", meta.incarnation):
        # A node that runs nothing loses nothing by following another store.
        if live.statuses or live.orphans:
            hold, reason = Hold.STORE, f"{name} runs containers for another store"
            work.alarm("STORE_NEW", live.node_id, reason, _CONFIRM_STORE)
    elif live.incarnation and live.epoch_seen == meta.epoch and live.store_revision_seen > state.store_revision:
        seen = live.store_revision_seen
        hold, reason = Hold.STORE, f"{name} has seen revision {seen}, this store is at {state.store_revision}"
        _suspect_store(work, live, reason)
    elif live.incarnation and live.epoch_seen == meta.epoch and _may_be_of_a_newer_copy(state, live):
        hold, reason = Hold.STORE, f"{name} may have worked for a newer copy of this store"
    live.hold, live.hold_reason = hold, reason


def judge_again(work: Work) -> None:
    """After a commit did not happen: a hold that an operator's confirm ended in it stands again.

    Nodes that are held stay so; what was found right stays right, because a store's revision only rises.
    """
    state = work.state
    if state.meta is not None and state.meta.suspicion is not None and state.suspicion is None:
        state.suspicion = state.meta.suspicion
        _stands(work, state.suspicion)
    for live in work.state.live.values():
        if live.session_id and live.hold is Hold.NONE:
            judge(work, live)
            if live.hold is not Hold.NONE:
                work.state.refresh_node(live.node_id)
                work.emit(NodeChanged(live.node_id))


def keep(work: Work) -> None:
    """Make durable what is suspected of the store: what is committed from now on makes it look newer than it is."""
    state, meta = work.state, work.state.meta
    if meta is not None and state.suspicion is not None and state.suspicion != meta.suspicion:
        work.put(replace(meta, suspicion=state.suspicion), meta)


def resume(state: State) -> None:
    """A leader begins on a store that one before it suspected, and no operator has confirmed."""
    if state.meta is None or (found := state.meta.suspicion) is None:
        return
    state.suspicion, state.hold_all = found, found.reason
    state.alarms["STORE_OLDER", "store"] = Alarm(
        "STORE_OLDER", "store", found.reason, _CONFIRM_STORE, found.noticed_at_s
    )


def _suspect_store(work: Work, live: NodeLive, reason: str) -> None:
    """The store is older than what a node saw: nothing starts or stops by itself anywhere. The newest seen counts."""
    state, known = work.state, work.state.suspicion
    found = Suspicion(
        reason, state.store_revision, live.store_revision_seen, live.epoch_seen, noticed_at_s=work.moment.wall_s
    )
    if known is None:
        state.suspicion = found
    elif (found.epoch_seen, found.revision_seen) > (known.epoch_seen, known.revision_seen):
        state.suspicion = replace(found, store_revision=known.store_revision, noticed_at_s=known.noticed_at_s)
    assert state.suspicion is not None
    _stands(work, state.suspicion)


def _stands(work: Work, found: Suspicion) -> None:
    work.state.hold_all = found.reason
    work.alarm("STORE_OLDER", "store", found.reason, _CONFIRM_STORE)


def _may_be_of_a_newer_copy(state: State, live: NodeLive) -> bool:
    """Whether what the node saw is above the store's revision of when it was suspected, though not above today's."""
    return state.suspicion is not None and live.store_revision_seen > state.suspicion.store_revision


def quarantine_clone(work: Work, live: NodeLive) -> None:
    """Two machines live under one id: neither gets anything until an operator says which is right."""
    live.hold, live.hold_reason = Hold.CLONE, "two machines use its identity"
    remedy = f"Revoke it (`falctl node revoke {live.node_id}`) and join each machine anew."
    work.alarm("CLONE", live.node_id, f"two machines live under node id {live.node_id}", remedy)
