"""What an operator settles: orphans, held stops, a suspicious store, nodes that are not what they seem.

Pure. Called by `step`; every function returns one line for people about each thing that it settled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fal_contract.errors import invalid
from fal_scheduler.core.commands import adopt_to_stop
from fal_scheduler.core.events import AssignmentChanged, Confirm, NodeChanged, Reply
from fal_scheduler.core.news import tell_orphans
from fal_scheduler.core.records import AssignmentRef, Binding, Goal, Meta, Node, Pool, Runner
from fal_scheduler.core.told import Hold, NodeLive, RunnerStatus
from fal_scheduler.core.work import Work

ADOPTING_POOL: Final = "default"  # of nodes that a new store does not know
WHAT: Final = ("adopt", "stop", "stops", "store", "node")


def confirm(work: Work, event: Confirm) -> Reply:
    """Settle what `event.what` names; INVALID for another word. A big cluster may need it said again."""
    match event.what:
        case "adopt":
            lines = _orphans(work, event.subject, adopt=True)
        case "stop":
            lines = _orphans(work, event.subject, adopt=False)
        case "stops":
            lines = _stops(work, event.subject)
        case "store":
            lines = _store(work)
        case "node":
            lines = _nodes(work, event.subject)
        case _:
            raise invalid("what", event.what, "is not known", remedy=f"Use one of {', '.join(WHAT)}.")
    for line in lines:
        work.log("CONFIRMED", event.subject or event.what, line)
    return Reply("done", event.subject, lines=tuple(lines))


def _orphans(work: Work, subject: str, *, adopt: bool) -> list[str]:
    state = work.state
    lines: list[str] = []
    for node_id, runner_id in list(state.orphans):
        if subject and subject not in (runner_id, node_id):
            continue
        if state.live[node_id].hold:
            lines.append(f"{runner_id}: not settled, {node_id} is held; confirm the store or the node first")
        elif work.full:
            lines.append("more orphans are left: confirm again")
            break
        elif adopt:
            lines.append(_adopt(work, node_id, state.live[node_id].orphans[runner_id]))
        else:
            status = state.live[node_id].orphans[runner_id]
            adopt_to_stop(work, node_id, status, Goal.STOP, "an orphan; an operator confirmed the stop")
            lines.append(f"{runner_id}: is being stopped")
    tell_orphans(work)
    return lines


def _adopt(work: Work, node_id: str, status: RunnerStatus) -> str:
    state = work.state
    if status.runner_id in state.runners:
        return f"{status.runner_id}: not adopted, a runner of this name is on another node; stop one of them"
    app = state.apps.get(status.app)
    if app is None or app.deleting or (status.app, status.revision) not in state.revisions:
        return f"{status.runner_id}: not adopted, {status.app} revision {status.revision} is not in the store"
    assignment = status.assignment_id
    if not assignment or assignment in state.runners_by_assignment:
        assignment = work.ids.suffix()
    runner = Runner(
        id=status.runner_id,
        share_group=status.share_group or status.app,
        bindings=(Binding(status.app, status.revision, status.residencies[0].id if status.residencies else ""),),
        created_at_s=status.started_at_s,
        node=node_id,
        gpus=status.gpus,
        assignment=AssignmentRef(assignment, min(status.term, state.term)),
        residencies=status.residencies,
        goal_reason="adopted",
        memory_bytes=status.memory_bytes,
        cpu_milli=status.cpu_milli,
        gpu_milli=status.gpu_milli,
    )
    work.put(runner, None)
    return f"{runner.id}: adopted"


def _stops(work: Work, subject: str) -> list[str]:
    state = work.state
    lines = []
    for app_id in list(state.stops_held):
        if subject in ("", app_id):
            del state.stops_held[app_id]
            state.asked[app_id] = state.dirty[app_id] = None
            lines.append(f"{app_id}: the stops held back go ahead")
    if not state.stops_held:
        work.settle("MASS_STOP", "cluster")
    return lines


def _store(work: Work) -> list[str]:
    """This store is the right one: a new life begins, in which nothing told of an earlier one is suspicious."""
    state = work.state
    meta = state.meta
    assert meta is not None, "the engine makes it before the first event"
    held = [live for live in state.live.values() if live.hold is Hold.STORE]
    if not held and not state.hold_all:
        return []
    told = state.suspicion.epoch_seen if state.suspicion is not None else 0
    epoch = max([meta.epoch, told, *(live.epoch_seen for live in held)]) + 1
    work.put(replace(meta, epoch=epoch, suspicion=None), meta)
    lines = [f"the store is confirmed; the cluster's epoch is {epoch}"]
    state.hold_all, state.suspicion = "", None
    work.settle("STORE_OLDER", "store")
    work.settle("STORE_FOREIGN", "store")
    for live in held:
        work.settle("STORE_NEW", live.node_id)
        lines.append(f"{live.node_id}: follows this store")
        _release(work, live)
    for app_id in state.apps:
        state.dirty[app_id] = None
    tell_orphans(work)
    return lines


def _nodes(work: Work, subject: str) -> list[str]:
    state = work.state
    lines = []
    for live in list(state.live.values()):
        if live.hold in (Hold.FOREIGN, Hold.CLONE) and subject in ("", live.node_id, _name(work, live)):
            if live.hold is Hold.FOREIGN:
                _accept(work, state.meta, live.cluster_id)
                work.settle("FOREIGN_NODE", live.node_id)
            else:
                live.past_boots = ()
                work.settle("CLONE", live.node_id)
            lines.append(f"{live.node_id}: belongs here")
            _release(work, live)
    tell_orphans(work)
    return lines


def _accept(work: Work, meta: Meta | None, cluster_id: str) -> None:
    assert meta is not None, "the engine makes it before the first event"
    if cluster_id not in (*meta.accepted_clusters, meta.cluster_id):
        work.put(replace(meta, accepted_clusters=(*meta.accepted_clusters, cluster_id)), meta)


def _name(work: Work, live: NodeLive) -> str:
    node = work.state.nodes.get(live.node_id)
    return node.name if node is not None else ""


def _release(work: Work, live: NodeLive) -> None:
    """End a hold. Runners of the store that the node does not run are gone: they are forgotten and replaced."""
    state = work.state
    live.hold, live.hold_reason = Hold.NONE, ""
    if live.node_id not in state.nodes:
        if ADOPTING_POOL not in state.pools:
            work.put(Pool(ADOPTING_POOL, generation=1), None)
        work.put(Node(live.node_id, live.node_id, ADOPTING_POOL, joined_at_s=work.moment.wall_s), None)
    state.refresh_node(live.node_id)
    for runner_id in list(state.runners_by_node.get(live.node_id, ())):
        status = live.statuses.get(runner_id)
        if status is None or status.ended:
            work.drop(state.runners[runner_id])
        else:
            work.emit(AssignmentChanged(live.node_id, runner_id))
    work.capacity_grew()
    work.emit(NodeChanged(live.node_id))
