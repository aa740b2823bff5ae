"""Protobuf messages ↔ the core's dataclasses, for what sessions and APIs say and hear.

Dataclasses carry the wire's field names, so one pair of functions does for all of them; where the shapes differ
(`RunnerStatus`, `Gpu`) the conversion is written out. Input has come through TLS from a known role, yet is not
trusted: unknown enum values and ids that could not be ours raise INVALID. No I/O. The store's encoding is `codec`'s.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache
from typing import Any, Final, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from google.protobuf.message import Message

from fal_contract.errors import invalid
from fal_contract.limits import (
    ASSIGNMENTS_PER_NODE_MAX,
    LOG_TAIL_LINES_MAX,
    NODE_EVENTS_MAX,
    NOTICE_REASON_CHARS_MAX,
    NOTICE_WITHIN_MAX_S,
    REVOCATIONS_TOLD_MAX,
)
from fal_contract.v1 import agent_pb2, cluster_pb2
from fal_scheduler.core.events import NodeHello, NodeReport
from fal_scheduler.core.node_events import NodeNotice, RebootRefused
from fal_scheduler.core.pack_events import AccessTold
from fal_scheduler.core.records import Residency, Revocation, RunnerState
from fal_scheduler.core.told import Alarm, Capabilities, Endpoint, Gpu, GpuLink, Inventory, Resident, RunnerStatus

T = TypeVar("T")
M = TypeVar("M", bound=Message)

GPUS_PER_NODE_MAX: Final = 1024
_STATE_NAMES: Final = "PENDING … UNKNOWN"


# --- any dataclass whose fields are the wire's ------------------------------------------------------------------------


def fill(message: M, value: Any, *, skip: frozenset[str] = frozenset()) -> M:
    """Copy a dataclass into a message, field by field of the same name; None leaves a field unset."""
    for field in fields(value):
        item = getattr(value, field.name)
        if item is None or field.name in skip:
            continue
        if is_dataclass(item):
            part = getattr(message, field.name)
            part.SetInParent()
            fill(part, item)
        elif isinstance(item, Mapping):
            getattr(message, field.name).update(item)
        elif isinstance(item, tuple):
            target = getattr(message, field.name)
            for one in item:
                if is_dataclass(one):
                    fill(target.add(), one)
                else:
                    target.append(one)
        else:
            setattr(message, field.name, int(item) if isinstance(item, IntEnum) else item)
    return message


def read(cls: type[T], message: Message) -> T:
    """The inverse of `fill`. Raises INVALID for an enum value that this release does not know."""
    return cls(**{name: _read_field(kind, message, name) for name, kind in _kinds(cls).items()})  # type: ignore[arg-type]


@cache
def _kinds(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _read_field(kind: Any, message: Message, name: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if not message.HasField(name):
            return None
        (kind,) = (arg for arg in get_args(kind) if arg is not types.NoneType)
        origin = get_origin(kind)
    value = getattr(message, name)
    if origin is tuple:
        of: type[Any] = get_args(kind)[0]
        return tuple(_read_item(of, one) for one in value)
    if origin is not None:  # a mapping
        return dict(value)
    return _read_item(kind, value, name)


def _read_item(kind: type[Any], value: Any, name: str = "") -> Any:
    if is_dataclass(kind):
        return read(cast("type[Any]", kind), value)
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        try:
            return kind(value)
        except ValueError:
            raise invalid(name, value, "is not known", remedy="Bring both sides to neighbouring releases.") from None
    return value


# --- what nodes tell ------------------------------------------------------------------------------------------------


def hello_of(hello: agent_pb2.Hello, *, session_id: str, arrived_s: float) -> NodeHello:
    """The core's form of a Hello. Raises INVALID naming the field."""
    if not hello.boot_id:
        raise invalid("boot_id", "", "is missing", remedy="Tell the id of this start of the machine.")
    return NodeHello(
        node_id=hello.node_id,
        session_id=session_id,
        boot_id=hello.boot_id,
        arrived_s=arrived_s,
        agent_id=hello.agent_id,
        cluster_id=hello.cluster_id,
        epoch_seen=hello.epoch_seen,
        term_seen=hello.term_seen,
        incarnation=hello.incarnation,
        store_revision_seen=hello.store_revision_seen,
        inventory=inventory_of(hello.inventory),
        statuses=tuple(status_of(status) for status in hello.runners),
        endpoints=tuple(read(Endpoint, endpoint) for endpoint in hello.endpoints),
        capabilities=read(Capabilities, hello.capabilities),
        software=hello.versions.software,
    )


def report_of(report: agent_pb2.Report, *, node_id: str, session_id: str, arrived_s: float) -> NodeReport:
    """The core's form of a Report."""
    if len(report.access) > ASSIGNMENTS_PER_NODE_MAX:
        most = ASSIGNMENTS_PER_NODE_MAX
        raise invalid("access", len(report.access), "are too many", remedy=f"Tell at most {most} at once.")
    if len(report.events) > NODE_EVENTS_MAX:
        raise invalid("events", len(report.events), "are too many", remedy=f"Tell at most {NODE_EVENTS_MAX} at once.")
    return NodeReport(
        node_id=node_id,
        session_id=session_id,
        arrived_s=arrived_s,
        statuses=tuple(status_of(status) for status in report.runners),
        gone=tuple(report.gone),
        inventory=inventory_of(report.inventory) if report.HasField("inventory") else None,
        tunnels=tuple(report.tunnels),
        access=tuple(AccessTold(one.artifact_id, one.runner_id, tuple(one.pieces)) for one in report.access),
    )


def notice_of(notice: agent_pb2.Notice, *, node_id: str, session_id: str, arrived_s: float) -> NodeNotice:
    """The core's form of a Notice. Raises INVALID for a kind that is none."""
    if notice.kind not in ("", "spot", "notice"):
        raise invalid("notice.kind", notice.kind, "is no kind of notice", remedy="Tell spot or notice.")
    within_s = notice.within_s if notice.within_s < NOTICE_WITHIN_MAX_S else -1.0  # also not a number
    reason = notice.reason[:NOTICE_REASON_CHARS_MAX]
    return NodeNotice(node_id, session_id, notice.kind, within_s, reason, arrived_s)


def refusal_of(refusal: agent_pb2.RebootRefusal, *, node_id: str, session_id: str, arrived_s: float) -> RebootRefused:
    """The core's form of a RebootRefusal."""
    error, remedy = (text[:NOTICE_REASON_CHARS_MAX] for text in (refusal.error, refusal.remedy))
    return RebootRefused(node_id, session_id, refusal.boot_id, error, remedy, arrived_s)


def status_of(status: agent_pb2.RunnerStatus) -> RunnerStatus:
    """A runner as its node tells it."""
    try:
        state = RunnerState(status.state)
    except ValueError:
        raise invalid("state", int(status.state), "is no state", remedy=f"Tell one of {_STATE_NAMES}.") from None
    team, slash, name = status.runner_id.partition("/")
    if not (team and slash and name) or "/" in name:
        raise invalid("runner_id", status.runner_id, "is no runner id", remedy="Runner ids look like team/app-suffix.")
    return RunnerStatus(
        runner_id=status.runner_id,
        state=state,
        assignment_id=status.assignment_id,
        term=status.term,
        app=status.app,
        revision=status.revision,
        reason=status.reason,
        exit_code=status.exit_code if status.HasField("exit_code") else None,
        oom_killed=status.oom_killed,
        log_tail=tuple(status.log_tail)[-LOG_TAIL_LINES_MAX:],
        started_at_s=status.started_at_s,
        ready_at_s=status.ready_at_s,
        served=status.served,
        in_flight=status.in_flight,
        last_used_age_s=status.last_used_age_s,
        gpu_seconds=status.gpu_seconds,
        gpus=tuple(status.gpus),
        phases=tuple((phase.name, phase.seconds) for phase in status.phases),
        max_multiplexing=status.max_multiplexing,
        residencies=tuple(read(Residency, one) for one in status.residencies),
        share_group=status.share_group,
        memory_bytes=status.memory_bytes,
        cpu_milli=status.cpu_milli,
        gpu_milli=status.gpu_milli,
        busy_seconds=status.busy_seconds,
        refused=status.refused,
        output=status.output.SerializeToString() if status.HasField("output") else b"",
        wounded=status.wounded,
        residents=tuple(read(Resident, one) for one in status.residents),
    )


def status_to(status: RunnerStatus) -> agent_pb2.RunnerStatus:
    """The inverse of `status_of`."""
    message = fill(agent_pb2.RunnerStatus(), status, skip=frozenset({"phases", "output"}))
    if status.output:
        message.output.ParseFromString(status.output)
    for name, seconds in status.phases:
        message.phases.add(name=name, seconds=seconds)
    return message


def inventory_of(inventory: agent_pb2.Inventory) -> Inventory:
    """What a machine has."""
    if len(inventory.gpus) > GPUS_PER_NODE_MAX:
        raise invalid(
            "inventory.gpus", len(inventory.gpus), "are too many", remedy=f"A node has at most {GPUS_PER_NODE_MAX}."
        )
    return Inventory(
        generation=inventory.generation,
        gpus=tuple(_gpu_of(gpu) for gpu in inventory.gpus),
        driver_version=inventory.driver_version,
        cuda_version=inventory.cuda_version,
        cpu_milli=inventory.cpu_milli,
        memory_bytes=inventory.memory_bytes,
        disk_free_bytes=inventory.disk_free_bytes,
        kernel=inventory.kernel,
    )


def inventory_to(inventory: Inventory) -> agent_pb2.Inventory:
    """The inverse of `inventory_of`."""
    message = fill(agent_pb2.Inventory(), inventory, skip=frozenset({"gpus"}))
    message.gpus.extend(gpu_to(gpu) for gpu in inventory.gpus)
    return message


def gpu_to(gpu: Gpu) -> agent_pb2.Gpu:
    """One GPU, for an operator."""
    message = fill(agent_pb2.Gpu(), gpu, skip=frozenset({"healthy"}))
    message.health = agent_pb2.GPU_HEALTH_OK if gpu.healthy else agent_pb2.GPU_HEALTH_QUARANTINED
    return message


def _gpu_of(gpu: agent_pb2.Gpu) -> Gpu:
    return Gpu(
        id=gpu.id,
        model=gpu.model,
        memory_bytes=gpu.memory_bytes,
        index=gpu.index,
        healthy=gpu.health == agent_pb2.GPU_HEALTH_OK,
        health_reason=gpu.health_reason,
        links=tuple(read(GpuLink, link) for link in gpu.links),
        memory_used_bytes=gpu.memory_used_bytes,
        pci_bus_id=gpu.pci_bus_id,
        numa_node=gpu.numa_node,
        mig_profile=gpu.mig_profile,
        parent_id=gpu.parent_id,
        ecc_uncorrected=gpu.ecc_uncorrected,
        temperature_c=gpu.temperature_c,
        product=gpu.product,
        power_w=gpu.power_w,
        health_class=gpu.health_class,
        health_since_s=gpu.health_since_s,
        health_state=gpu.health_state,
        diagnoses=gpu.diagnoses,
    )


def endpoint_to(endpoint: Endpoint) -> agent_pb2.Endpoint:
    """An address of a node's proxy."""
    return agent_pb2.Endpoint(network=endpoint.network, host=endpoint.host, port=endpoint.port)


def alarm_to(alarm: Alarm) -> cluster_pb2.Alarm:
    """An alarm for an operator."""
    return fill(cluster_pb2.Alarm(), alarm)


def revocations_to(revocations: Iterable[Revocation]) -> agent_pb2.RevocationSet:
    """What proxies must refuse: revocations of callers, the newest first, at most REVOCATIONS_TOLD_MAX."""
    of_callers = [one for one in revocations if not one.subject.startswith("node/")]
    of_callers.sort(key=lambda one: (-one.revoked_at_s, one.serial))
    return agent_pb2.RevocationSet(
        revoked=[
            agent_pb2.RevokedCertificate(serial=one.serial, subject=one.subject, revoked_at_s=one.revoked_at_s)
            for one in of_callers[:REVOCATIONS_TOLD_MAX]
        ]
    )


__all__ = [
    "alarm_to",
    "endpoint_to",
    "fill",
    "gpu_to",
    "hello_of",
    "inventory_of",
    "inventory_to",
    "notice_of",
    "read",
    "refusal_of",
    "report_of",
    "revocations_to",
    "status_of",
    "status_to",
]
