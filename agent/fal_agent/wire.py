"""The scheduler's messages ↔ the agent's own values. Pure but for protobuf; the only place that does this.

Bad values from a scheduler of another version become INVALID with the field's name, never an exception from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from fal_agent.core.assignments import Assignment, Complete, Delta, Goal
from fal_agent.core.standing import Leader, Standing
from fal_agent.core.tasks import Task, state_of, why
from fal_agent.ports import Usage
from fal_agent.proxy.messages import GatewayEntry
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import (
    ASSIGNMENTS_PER_NODE_MAX,
    LOG_LINE_BYTES_MAX,
    LOG_TAIL_LINES_MAX,
    REQUEST_TIMEOUT_S,
    STARTUP_TIMEOUT_S,
)
from fal_contract.revocation import RevokedPeer
from fal_contract.v1 import agent_pb2, state_pb2

_PROBE_TIMEOUT_S: Final = 5.0
_PROBE_INTERVAL_S: Final = 15.0
_PROBE_FAILURES_MAX: Final = 3


def assignment_of(message: agent_pb2.Assignment) -> Assignment:
    """Raises INVALID for what no agent could follow."""
    if not message.id or "/" not in message.runner_id:
        raise invalid("runner_id", message.runner_id, "names no runner", remedy="Write team/name.")
    try:
        goal = Goal(message.goal)
    except ValueError:
        raise invalid("goal", message.goal, "is unknown to this agent", remedy="Upgrade the agent.") from None
    scaling, resources = message.spec.scaling, message.spec.resources
    return Assignment(
        id=message.id,
        term=message.term,
        runner_id=message.runner_id,
        goal=goal,
        goal_reason=message.goal_reason,
        app=message.app,
        revision=message.revision,
        share_group=message.share_group,
        gpus=tuple(message.gpus),
        memory_bytes=resources.memory_bytes,
        cpu_milli=resources.cpu_milli,
        max_multiplexing=max(1, scaling.max_multiplexing),
        startup_timeout_s=scaling.startup_timeout_s or STARTUP_TIMEOUT_S,
        request_timeout_s=scaling.request_timeout_s or REQUEST_TIMEOUT_S,
        termination_grace_s=message.spec.termination_grace_s,
        image=message.spec.image or "host",
        network=message.spec.network or "none",
        build=message.spec.HasField("build"),
        inventory_generation=message.inventory_generation,
        gpu_milli=message.gpu_milli,
        wire=message.SerializeToString(),
    )


def complete_of(message: agent_pb2.Complete) -> Complete:
    if len(message.assignments) > ASSIGNMENTS_PER_NODE_MAX:
        raise invalid(
            "assignments",
            len(message.assignments),
            "are too many for a node",
            remedy=f"A node holds at most {ASSIGNMENTS_PER_NODE_MAX}.",
        )
    return Complete(
        message.revision, message.term, message.store_revision, tuple(assignment_of(a) for a in message.assignments)
    )


def delta_of(message: agent_pb2.Delta) -> Delta:
    return Delta(
        message.base,
        message.revision,
        message.term,
        message.store_revision,
        tuple(assignment_of(a) for a in message.put),
        tuple(message.drop),
    )


def leader_of(message: agent_pb2.Welcome) -> Leader:
    return Leader(
        message.cluster_id, message.epoch, message.term, message.incarnation, tuple(message.accepted_clusters)
    )


def gateways_of(message: agent_pb2.GatewaySet) -> list[GatewayEntry]:
    return [
        GatewayEntry(gateway.gateway_id, tuple((endpoint.host, endpoint.port) for endpoint in gateway.endpoints))
        for gateway in message.gateways
    ]


def revoked_of(message: agent_pb2.RevocationSet) -> list[RevokedPeer]:
    return [RevokedPeer(one.serial, one.subject, one.revoked_at_s) for one in message.revoked]


def parse(assignment: Assignment) -> agent_pb2.Assignment:
    """The assignment as it came. CORRUPT when a journal or side file holds something else."""
    try:
        return agent_pb2.Assignment.FromString(assignment.wire)
    except DecodeError as exc:
        raise FalError(
            Code.CORRUPT,
            f"the stored assignment of {assignment.runner_id} is not readable: {exc}",
            remedy="Stop the runner; the scheduler starts another.",
        ) from None


def probe_of(assignment: Assignment) -> state_pb2.Probe:
    """How to ask its worker, with defaults for what the app does not say."""
    given = parse(assignment).spec.probe
    return state_pb2.Probe(
        ready_path=given.ready_path or "/readyz",
        live_path=given.live_path or "/livez",
        interval_s=given.interval_s or _PROBE_INTERVAL_S,
        timeout_s=given.timeout_s or _PROBE_TIMEOUT_S,
        failures_max=given.failures_max or _PROBE_FAILURES_MAX,
    )


def status_of(task: Task, usage: Usage, *, now_wall_s: float) -> agent_pb2.RunnerStatus:
    """What the scheduler is told of a runner. A runner of which only the id is known has no residencies."""
    assignment = task.assignment
    status = agent_pb2.RunnerStatus(
        runner_id=assignment.runner_id,
        assignment_id=assignment.id,
        term=assignment.term,
        app=assignment.app,
        revision=assignment.revision,
        state=state_of(task, usage.in_flight),  # type: ignore[arg-type]  # same numbers, tested
        reason=why(task),
        log_tail=cut_lines(task.log_tail),
        started_at_s=task.started_at_s,
        ready_at_s=task.ready_at_s,
        served=usage.served,
        in_flight=usage.in_flight,
        last_used_age_s=usage.last_used_age_s,
        gpu_seconds=gpu_seconds(task, now_wall_s),
        busy_seconds=usage.busy_s,
        gpus=assignment.gpus,
        phases=[agent_pb2.Phase(name=name, seconds=seconds) for name, seconds in task.phases],
        max_multiplexing=assignment.max_multiplexing,
        share_group=assignment.share_group,
        memory_bytes=assignment.memory_bytes,
        cpu_milli=assignment.cpu_milli,
        gpu_milli=assignment.gpu_milli,
    )
    if task.exit is not None:
        status.oom_killed = task.exit.oom_killed
        if task.exit.code is not None:
            status.exit_code = task.exit.code
    if task.output:
        status.output.ParseFromString(task.output)
    if task.ready_at_s and assignment.wire:
        status.residencies.extend(_residencies(assignment))
    return status


def refused(assignment: Assignment, code: str, reason: str) -> agent_pb2.RunnerStatus:
    """The status of a runner that the admission turned away."""
    return agent_pb2.RunnerStatus(
        runner_id=assignment.runner_id,
        assignment_id=assignment.id,
        term=assignment.term,
        app=assignment.app,
        revision=assignment.revision,
        state=state_pb2.RUNNER_STATE_TERMINATED,
        reason=f"{code}: {reason}",
        refused=True,
        last_used_age_s=-1,
    )


def gpu_seconds(task: Task, now_wall_s: float) -> float:
    """GPUs times seconds from the container's start to its end or now. A clock set back never makes it negative."""
    if not task.started_at_s:
        return 0.0
    until_s = task.exit.finished_at_s if task.exit is not None and task.exit.finished_at_s else now_wall_s
    return len(task.assignment.gpus) * max(0.0, until_s - task.started_at_s)


def standing_into(hello: agent_pb2.Hello, standing: Standing) -> None:
    hello.cluster_id = standing.cluster_id
    hello.epoch_seen = standing.epoch
    hello.term_seen = standing.term
    hello.incarnation = standing.incarnation
    hello.store_revision_seen = standing.store_revision


def cut_lines(lines: Sequence[str]) -> list[str]:
    """The last lines, each within its bound."""
    return [cut(line) for line in lines[-LOG_TAIL_LINES_MAX:]]


def cut(line: str) -> str:
    raw = line.encode(errors="replace")
    return line if len(raw) <= LOG_LINE_BYTES_MAX else raw[:LOG_LINE_BYTES_MAX].decode(errors="ignore")


def _residencies(assignment: Assignment) -> list[state_pb2.Residency]:
    # One model a runner here; its id within the runner is the model's name.
    models = [a for a in parse(assignment).artifacts if a.kind in ("", "model")]
    return [state_pb2.Residency(id=a.model, model=a.model, manifest_digest=a.manifest_digest) for a in models]
