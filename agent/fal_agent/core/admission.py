"""Whether this node may start a runner. Pure.

Invariant: whatever a scheduler believes, a GPU is never given to two live runners, nor while something else uses
its memory; orphans hold theirs like any runner. Fractional runners of one team may share one, up to the whole of it;
only the first of them finds it idle. Called by fal_agent.node for every assignment of an unknown runner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fal_agent.core.assignments import Assignment, Goal
from fal_agent.core.tasks import Task
from fal_contract.errors import Code
from fal_contract.ids import team_of
from fal_contract.limits import ASSIGNMENTS_PER_NODE_MAX, GPU_IDLE_MEMORY_BYTES_MAX

GPU_MILLI: Final = 1000  # a whole GPU


@dataclass(frozen=True, slots=True)
class GpuView:
    """A GPU as the inventory sees it now. `unhealthy` says why it may not be used, empty when it may."""

    id: str
    unhealthy: str = ""
    memory_used_bytes: int = 0
    pids: tuple[int, ...] = ()
    changed_at: int = 0  # generation of the inventory with which it came, or its fitness changed last


@dataclass(frozen=True, slots=True)
class NodeView:
    """What admission looks at. 0 memory or CPU means unknown: not checked."""

    gpus: Mapping[str, GpuView]
    memory_bytes: int = 0
    cpu_milli: int = 0
    images: bool = False  # containers can be made of images, besides the node's own system
    networks: frozenset[str] = frozenset({"none", "egress", "host"})
    term_seen: int = 0
    distrust: str = ""  # why the leader's word does not count; empty when it does


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not. `code` is a stable word, `reason` is for an operator."""

    code: str
    reason: str


def admit(assignment: Assignment, node: NodeView, tasks: Iterable[Task], *, leader_term: int) -> Refusal | None:
    """None when the runner may start. `tasks` are all of this node; one for the same runner is not counted.

    `leader_term` is the term of the message that carried the assignment; it fences deposed leaders. The
    assignment's own term may be older (a former leader placed it), never newer.
    """
    if node.distrust:
        return Refusal(Code.FAILED_PRECONDITION, node.distrust)
    if leader_term < node.term_seen or assignment.term > leader_term:
        return Refusal(
            Code.STALE_TERM,
            f"assignment of term {assignment.term} from a leader of term {leader_term}; term {node.term_seen} was seen",
        )
    if assignment.goal is not Goal.RUN:
        return Refusal(Code.NOT_FOUND, f"nothing runs here to {assignment.goal.name.lower()}")
    if assignment.image != "host" and not node.images:
        return Refusal(Code.FAILED_PRECONDITION, f"the node's driver cannot run image {assignment.image!r}")
    if assignment.network not in node.networks:
        return Refusal(Code.FAILED_PRECONDITION, f"the node's driver has no network {assignment.network!r}")
    live = [task for task in tasks if task.live and task.runner_id != assignment.runner_id]
    if len(live) >= ASSIGNMENTS_PER_NODE_MAX:
        return Refusal(Code.NO_CAPACITY, f"the node holds {len(live)} runners, the most that it may")
    return _gpus(assignment, node, live) or _memory_and_cpu(assignment, node, live)


def _gpus(assignment: Assignment, node: NodeView, live: list[Task]) -> Refusal | None:
    if len(set(assignment.gpus)) != len(assignment.gpus):
        return Refusal(Code.INVALID, "a GPU is named twice in the assignment")
    holders: dict[str, list[Task]] = {}
    for task in live:
        for gpu in task.assignment.gpus:
            holders.setdefault(gpu, []).append(task)
    for gpu in assignment.gpus:
        view = node.gpus.get(gpu)
        if view is None:
            return Refusal(Code.NOT_FOUND, f"GPU {gpu} is not in this node")
        beside = holders.get(gpu, [])
        if beside and (refusal := _beside(assignment, gpu, beside)) is not None:
            return refusal
        if view.unhealthy:
            return Refusal(Code.FAILED_PRECONDITION, f"GPU {gpu} is quarantined: {view.unhealthy}")
        if not beside and (busy := in_use(view)) is not None:  # what those beside it use is theirs
            return Refusal(Code.CONFLICT, busy)
        if 0 < assignment.inventory_generation < view.changed_at:
            decided, since = assignment.inventory_generation, view.changed_at
            why = f"GPU {gpu} has changed (generation {since} of the inventory) since it was given (on {decided})"
            return Refusal(Code.CONFLICT, why)
    return None


def _beside(assignment: Assignment, gpu: str, holders: list[Task]) -> Refusal | None:
    """Why a runner may not share the GPU with those that hold it: all must be fractional and of one team."""
    whole = next(
        (task for task in holders if not task.assignment.gpu_milli), None if assignment.gpu_milli else holders[0]
    )
    if whole is not None:
        return Refusal(Code.CONFLICT, f"GPU {gpu} is held by runner {whole.runner_id}")
    team = team_of(assignment.runner_id)
    other = next((task for task in holders if team_of(task.runner_id) != team), None)
    if other is not None:
        return Refusal(Code.CONFLICT, f"GPU {gpu} is shared by runners of team {team_of(other.runner_id)}")
    held = sum(task.assignment.gpu_milli for task in holders)
    if held + assignment.gpu_milli > GPU_MILLI:
        return Refusal(
            Code.NO_CAPACITY, f"{assignment.gpu_milli} thousandths of GPU {gpu} asked, {GPU_MILLI - held} not reserved"
        )
    return None


def in_use(gpu: GpuView) -> str | None:
    """Why a GPU without a runner is not free yet, or None when it is."""
    if gpu.pids:
        return f"GPU {gpu.id} is in use by process {', '.join(map(str, gpu.pids))}"
    if gpu.memory_used_bytes > GPU_IDLE_MEMORY_BYTES_MAX:
        return f"GPU {gpu.id} has {gpu.memory_used_bytes >> 20} MiB of its memory in use and no runner"
    return None


def _memory_and_cpu(assignment: Assignment, node: NodeView, live: list[Task]) -> Refusal | None:
    memory_bytes = sum(task.assignment.memory_bytes for task in live)
    if node.memory_bytes and memory_bytes + assignment.memory_bytes > node.memory_bytes:
        free = max(0, node.memory_bytes - memory_bytes)
        return Refusal(Code.NO_CAPACITY, f"{assignment.memory_bytes >> 20} MiB asked, {free >> 20} MiB not reserved")
    cpu_milli = sum(task.assignment.cpu_milli for task in live)
    if node.cpu_milli and cpu_milli + assignment.cpu_milli > node.cpu_milli:
        free = max(0, node.cpu_milli - cpu_milli)
        return Refusal(Code.NO_CAPACITY, f"{assignment.cpu_milli} mCPU asked, {free} not reserved")
    return None
