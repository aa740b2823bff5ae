"""Runners leave a node: replaced first, drained then, stopped at the deadline. Pure.

A drain is in the node's record, so that a new leader goes on with it. Each app brings its own runners away
(`stops.relieve`): one that leaves goes on serving until another serves in its place, so many at once as the app's
disturbed share allows (`disruption`). Placement finds the place, and prefers one that is warm for the model. Where
there is none, the runner stays until the deadline; then it is stopped, and this is said.

When the node is empty, its drain is over: it stays cordoned, is used again, is rebooted or is forgotten, as asked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fal_contract.errors import Code, FalError, invalid, not_found
from fal_contract.limits import LABEL_CHARS_MAX, LABELS_MAX, NOTICE_MARGIN_S
from fal_scheduler.core import gpu_faults, usage
from fal_scheduler.core.events import NodeChanged, Reply, Revoked
from fal_scheduler.core.node_events import (
    CancelDrain,
    DeclareLost,
    DrainNode,
    LabelNode,
    NodeCommand,
    NodeNotice,
    RebootDue,
    RebootRefused,
    RemoveNode,
)
from fal_scheduler.core.records import Drain, Goal, Node, Revocation
from fal_scheduler.core.state import State
from fal_scheduler.core.stops import stop
from fal_scheduler.core.told import Health
from fal_scheduler.core.work import Work

DRAIN: Final = "drain"
MAINTENANCE: Final = "maintenance"
REBOOT: Final = "reboot"
REMOVE: Final = "remove"
SPOT: Final = "spot"
NOTICE: Final = "notice"
REBOOTS: Final = "reboot"  # what agents that may reboot their machine say that they can
ASKED: Final = (DRAIN, MAINTENANCE, REBOOT, REMOVE)
NOTICED: Final = (SPOT, NOTICE)
_REBOOT_REMEDY: Final = "Set reboot_command in its settings; or drain it with `falctl node maintenance` and do it."
_REBOOT_ALARM: Final = "NODE_NOT_REBOOTED"


def command(work: Work, event: NodeCommand) -> Reply:
    """Carry out an operator's command. Raises NOT_FOUND, INVALID, FAILED_PRECONDITION."""
    match event:
        case DrainNode():
            return _drain(work, event)
        case CancelDrain():
            return _cancel(work, event)
        case LabelNode():
            return _label(work, event)
        case RemoveNode():
            return _remove(work, event)
        case DeclareLost():
            return _declare_lost(work, event)


def _node(state: State, name: str) -> Node:
    node = state.find_node(name)
    if node is None:
        raise not_found("node", name, remedy="List them with `falctl node list`; use the id where names repeat.")
    if node.revoked:
        raise FalError(
            Code.FAILED_PRECONDITION, f"node {node.name} is revoked", remedy="It never comes back; `falctl node rm`."
        )
    return node


def _drain(work: Work, event: DrainNode) -> Reply:
    node = _node(work.state, event.node)
    if event.kind not in ASKED:
        raise invalid("kind", event.kind, "is no kind of drain", remedy=f"Use one of {', '.join(ASKED)}.")
    if event.deadline_s is not None and not event.deadline_s > 0.0:
        raise invalid("deadline", event.deadline_s, "is not in the future", remedy="Use a positive time, or --force.")
    live = work.state.live.get(node.id)
    if event.kind == REBOOT and live is not None and live.session_id and REBOOTS not in live.capabilities.features:
        what = f"the agent of node {node.name} may not reboot its machine"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy=_REBOOT_REMEDY)
    wall_s = work.moment.wall_s
    drain = Drain(
        event.kind,
        event.reason,
        wall_s,
        wall_s + event.deadline_s if event.deadline_s is not None else 0.0,
        event.force,
        not event.uncordon,
        event.actor,
    )
    if (have := node.drain) is not None:  # what its cloud has said goes on counting
        told = (have.kind, have.reason, have.deadline_at_s)
        told = told if have.kind in NOTICED else (have.notice, have.notice_reason, have.notice_at_s)
        drain = replace(drain, notice=told[0], notice_reason=told[1], notice_at_s=told[2])
    begin(work, node, drain)
    runners = len(work.state.runners_by_node.get(node.id, ()))
    return Reply("changed", node.id, lines=(f"{runners} runners",))


def begin(work: Work, node: Node, drain: Drain) -> None:
    """Cordon the node and let its runners leave."""
    reason = drain.reason or {SPOT: "the cloud takes it back", NOTICE: "its cloud works on it"}.get(drain.kind, "")
    work.put(replace(node, cordoned=True, cordon_reason=reason or f"{drain.kind} by an operator", drain=drain), node)
    work.state.refresh_node(node.id)
    work.log("NODE_DRAINING", node.id, f"{drain.kind}: {reason or 'by an operator'}")
    for runner_id in work.state.runners_by_node.get(node.id, ()):
        work.state.dirty[work.state.runners[runner_id].app] = None
    if drain.force:
        _stop_all(work, node, f"{node.name} is drained by force")
    _finish(work, work.state.nodes[node.id])


def _cancel(work: Work, event: CancelDrain) -> Reply:
    node = _node(work.state, event.node)
    if node.drain is None and not node.cordoned:
        return Reply("unchanged", node.id)
    work.put(replace(node, drain=None, cordoned=False, cordon_reason=""), node)
    work.state.refresh_node(node.id)
    work.capacity_grew()
    for runner_id in work.state.runners_by_node.get(node.id, ()):
        work.state.dirty[work.state.runners[runner_id].app] = None  # replacements on their way are not needed
    work.log("NODE_DRAIN_CANCELLED", node.id, "it may be used again")
    return Reply("changed", node.id)


def _label(work: Work, event: LabelNode) -> Reply:
    node = _node(work.state, event.node)
    for name, value in event.put.items():
        if not name or max(len(name), len(value)) > LABEL_CHARS_MAX:
            raise invalid("labels", f"{name}={value}", "is no label", remedy=f"Use 1 to {LABEL_CHARS_MAX} characters.")
    labels = {name: value for name, value in node.labels.items() if name not in event.drop} | dict(event.put)
    if len(labels) > LABELS_MAX:
        raise invalid("labels", len(labels), "are too many", remedy=f"A node has at most {LABELS_MAX}.")
    if labels == node.labels:
        return Reply("unchanged", node.id)
    work.put(replace(node, labels=labels), node)
    work.capacity_grew()
    work.log("NODE_LABELLED", node.id, ", ".join(f"{name}={value}" for name, value in sorted(labels.items())))
    return Reply("changed", node.id)


def _remove(work: Work, event: RemoveNode) -> Reply:
    state = work.state
    node = state.find_node(event.node)
    if node is None:
        raise not_found("node", event.node, remedy="List them with `falctl node list`; use the id where names repeat.")
    runners = list(state.runners_by_node.get(node.id, ()))
    gone = node.revoked or state.health_of(node.id) in (Health.LOST, Health.JOINED)
    if runners and not event.force:
        what = f"node {node.name} has {len(runners)} runners"
        remedy = f"`falctl node drain {node.name}` first; --force gives them up."
        raise FalError(Code.FAILED_PRECONDITION, what, remedy=remedy)
    if not gone and not node.cordoned and not event.force:
        what = f"node {node.name} is in use: neither cordoned nor lost"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy=f"`falctl node drain {node.name}` first, or --force.")
    _forget(work, node)
    return Reply("done", node.id, lines=(f"{len(runners)} runners given up",))


def _forget(work: Work, node: Node) -> None:
    """The node's certificates are refused from now on; its record and those of its runners go."""
    state = work.state
    subject = f"node/{node.id}"
    before = state.revocations.get(node.id)
    if before is None:
        work.put(Revocation(node.id, subject, work.moment.wall_s, "removed"), before)
        work.emit(Revoked(subject))
    if not give_up(work, node.id):  # the next tick goes on
        drain = Drain(REMOVE, "given up", work.moment.wall_s, force=True, keep_cordoned=True)
        work.put(replace(node, revoked=True, cordoned=True, drain=drain), node)
        return
    work.drop(state.nodes[node.id])
    gpu_faults.forget(work, node.id)
    state.live.pop(node.id, None)
    work.emit(NodeChanged(node.id))
    work.log("NODE_REMOVED", node.id, f"{node.name} is forgotten")


def give_up(work: Work, node_id: str) -> bool:
    """Forget the records of a node's runners, of which nothing counts any more that it tells; True where all are gone.

    One commit has room for so many: those of a revoked node that are left go with the next ticks.
    """
    state = work.state
    live = state.live.get(node_id)
    if live is not None:
        for runner_id in list(live.orphans):
            state.forget_orphan(node_id, runner_id)
    for runner_id in list(state.runners_by_node.get(node_id, ())):
        if work.full:
            return False
        usage.note_end(work, state.runners[runner_id])
        if live is not None:  # else its container would be an orphan now
            live.statuses.pop(runner_id, None)
            live.told_at_s.pop(runner_id, None)
        work.drop(state.runners[runner_id])
    if live is not None:
        live.statuses.clear()
        live.told_at_s.clear()
    return True


def _declare_lost(work: Work, event: DeclareLost) -> Reply:
    state = work.state
    pool = state.pools.get(event.pool)
    if pool is None:
        raise not_found("pool", event.pool, remedy="List them with `falctl pool list`.")
    silent = [
        node.id
        for node in state.nodes.values()
        if node.pool == pool.name and state.health_of(node.id) in (Health.UNKNOWN, Health.LOST)
    ]
    if not silent:
        what = f"no node of pool {pool.name} is silent"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="See `falctl node list`.")
    after = replace(pool, lost_declared_at_s=work.moment.wall_s, generation=pool.generation + 1)
    work.put(after, pool)
    work.log("POOL_DECLARED_LOST", pool.name, f"{len(silent)} silent nodes are lost: their runners are replaced")
    return Reply("changed", pool.name, after.generation, (f"{len(silent)} nodes",))


# --- by itself ------------------------------------------------------------------------------------------------------


def told(work: Work, event: NodeNotice | RebootRefused) -> None:
    """News of a node; of a session that is not the newest it counts nothing."""
    live = work.state.live.get(event.node_id)
    if live is None or live.session_id != event.session_id:
        return
    if isinstance(event, NodeNotice):
        notice(work, event)
    else:
        _not_rebooted(work, event)


def hello(work: Work, node_id: str) -> None:
    """A session begins: a node that has yet to reboot is told again, and knows by the boot id whether it has."""
    node, live = work.state.nodes.get(node_id), work.state.live[node_id]
    if node is not None and node.drain is not None and node.drain.boot_id == live.boot_id:
        work.emit(RebootDue(node_id, live.boot_id))


def _not_rebooted(work: Work, event: RebootRefused) -> None:
    node = work.state.nodes.get(event.node_id)
    if node is None or node.drain is None or node.drain.boot_id != event.boot_id:
        return
    work.put(_after(work, node, keep=True, reason=f"not rebooted: {event.error}"), node)
    remedy = f"{event.remedy} Then `falctl node uncordon {node.name}`."
    work.alarm(_REBOOT_ALARM, node.id, f"node {node.name} was not rebooted: {event.error}", remedy)


def _settle(work: Work) -> None:
    """Nobody waits any more for machines that were not rebooted."""
    state = work.state
    for kind, node_id in [key for key in state.alarms if key[0] == _REBOOT_ALARM]:
        node = state.nodes.get(node_id)
        if node is None or not node.cordoned or node.drain is not None:
            work.settle(kind, node_id)


def notice(work: Work, event: NodeNotice) -> None:
    """A cloud's word about a node, which the node passed on. Beside an operator's drain its deadline counts, too."""
    node = work.state.nodes.get(event.node_id)
    if node is None:
        return
    have = node.drain
    if not event.kind:
        if have is not None and have.kind in NOTICED:
            _withdrawn(work, node, have)
        elif have is not None and have.notice:
            work.put(replace(node, drain=replace(have, notice="", notice_reason="", notice_at_s=0.0)), node)
            work.log("NODE_NOTICE_WITHDRAWN", node.id, f"{have.notice}; its {have.kind} goes on")
        return
    if event.kind not in NOTICED:
        return
    deadline_s = max(1.0, work.moment.wall_s + event.within_s) if event.within_s >= 0.0 else 0.0
    if have is not None and have.kind not in NOTICED:
        if have.notice != event.kind or abs(have.notice_at_s - deadline_s) >= NOTICE_MARGIN_S:
            both = replace(have, notice=event.kind, notice_reason=event.reason, notice_at_s=deadline_s)
            work.put(replace(node, drain=both), node)
            work.log("NODE_NOTICED", node.id, f"{event.kind} beside its {have.kind}: {event.reason}")
        return
    if have is not None and have.kind == event.kind and abs(have.deadline_at_s - deadline_s) < NOTICE_MARGIN_S:
        return
    before = have.keep_cordoned if have is not None else node.cordoned
    begin(work, node, Drain(event.kind, event.reason, work.moment.wall_s, deadline_s, keep_cordoned=before))


def _withdrawn(work: Work, node: Node, drain: Drain) -> None:
    """The node is used again, but for one that somebody had cordoned before."""
    if drain.keep_cordoned:
        work.put(replace(node, drain=None, cordon_reason="cordoned before it was noticed"), node)
        work.log("NODE_DRAIN_CANCELLED", node.id, "it stays cordoned")
    else:
        _cancel(work, CancelDrain(node.id))


def tick(work: Work) -> None:
    """Deadlines that are over, and nodes that are empty."""
    state, wall_s = work.state, work.moment.wall_s
    _settle(work)
    for node_id in list(state.runners_by_node):
        if (one := state.nodes.get(node_id)) is not None and one.revoked:
            give_up(work, node_id)
    for node_id in list(state.draining):
        node = state.nodes[node_id]
        drain = node.drain
        assert drain is not None
        if node.revoked:
            _finish(work, node)
            continue
        over = _over(drain, wall_s)
        if drain.force or over:
            _stop_all(work, node, f"the {over or drain.kind} of {node.name} has reached its deadline")
        _finish(work, node)


def _over(drain: Drain, wall_s: float) -> str:
    """The kind whose deadline is over: the drain's own, or its notice's; empty: neither."""
    for kind, deadline_at_s in ((drain.kind, drain.deadline_at_s), (drain.notice, drain.notice_at_s)):
        # What the cloud takes back must have ended before it does.
        margin_s = NOTICE_MARGIN_S if kind in NOTICED else 0.0
        if 0.0 < deadline_at_s <= wall_s + margin_s:
            return kind
    return ""


def _after(work: Work, node: Node, *, keep: bool, reason: str) -> Node:
    """The node when its operator's drain is over: as asked, or drained by what its cloud told meanwhile."""
    drain = node.drain
    if drain is None or not drain.notice:
        return replace(node, drain=None, cordoned=keep, cordon_reason=reason)
    told = Drain(drain.notice, drain.notice_reason, work.moment.wall_s, drain.notice_at_s, keep_cordoned=keep)
    return replace(node, drain=told, cordoned=True, cordon_reason=reason or drain.notice_reason or drain.notice)


def _stop_all(work: Work, node: Node, why: str) -> None:
    for runner_id in list(work.state.runners_by_node.get(node.id, ())):
        runner = work.state.runners[runner_id]
        if runner.goal < Goal.STOP and not work.full:  # the next tick goes on
            stop(work, runner, Goal.STOP, why)


def _finish(work: Work, node: Node) -> None:
    """An empty node's drain is over; one that was noticed stays until the machine goes, or the notice does."""
    state, drain = work.state, node.drain
    live = state.live.get(node.id)
    held = bool(state.runners_by_node.get(node.id)) or (live is not None and bool(live.orphans))
    if drain is None or held or drain.kind in NOTICED or work.full:
        return
    if drain.kind == REMOVE:
        _forget(work, node)
        return
    if drain.kind == REBOOT and not _rebooted(work, node, drain):
        return
    keep = drain.keep_cordoned and drain.kind != REBOOT
    reason = f"drained: {drain.reason or drain.kind}" if keep else ""
    work.put(_after(work, node, keep=keep, reason=reason), node)
    state.refresh_node(node.id)
    if not state.nodes[node.id].cordoned:
        work.capacity_grew()
    work.log("NODE_DRAINED", node.id, "nothing runs on it any more")


def _rebooted(work: Work, node: Node, drain: Drain) -> bool:
    """Whether the machine is back under another boot id; it is told to reboot once, whoever leads.

    The boot id that is to end is in the record before the order goes out, so that a later leader neither orders it
    again for the next boot, nor takes a machine that was never told for one that has rebooted.
    """
    live = work.state.live.get(node.id)
    if live is None or not live.boot_id:
        return False
    if not drain.boot_id and live.health is Health.READY and not live.hold:
        work.put(replace(node, drain=replace(drain, boot_id=live.boot_id)), node)
        work.emit(RebootDue(node.id, live.boot_id))
        work.log("NODE_REBOOTING", node.id, "it is empty")
        return False
    return drain.boot_id not in ("", live.boot_id)
