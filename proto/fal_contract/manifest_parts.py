"""Parts of manifests: checked types of their keys, and the tables inside an app's manifest. Pure.

Used by `fal_contract.manifest` only.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from fal_contract import limits
from fal_contract.errors import FalError
from fal_contract.ids import check_label, check_name
from fal_contract.v1 import state_pb2

GIB: Final = 1 << 30
MIB: Final = 1 << 20
OPEN_FILES_MAX: Final = 65_536
SCRATCH_GIB: Final = 1.0

Name = Annotated[str, AfterValidator(lambda value: _name(value))]
OwnedName = Annotated[str, AfterValidator(lambda value: _owned(value))]
LabelText = Annotated[str, StringConstraints(max_length=limits.LABEL_CHARS_MAX)]
LabelName = Annotated[str, AfterValidator(lambda value: _label(value))]
Labels = Annotated[dict[LabelName, LabelText], Field(max_length=limits.LABELS_MAX)]
Network = Annotated[str, AfterValidator(lambda value: _network(value))]
Version = Annotated[str, AfterValidator(lambda value: _version(value))]
Text = Annotated[str, StringConstraints(min_length=1, max_length=limits.LABEL_CHARS_MAX)]
Apps = Annotated[list[OwnedName], Field(max_length=32)]


def _name(value: str) -> str:
    try:
        return check_name(value, field="name")
    except FalError as error:
        raise ValueError(f"not a name. {error.remedy}") from None


def _label(value: str) -> str:
    try:
        return check_label(value, field="labels")
    except FalError as error:
        raise ValueError(f"no name of a label. {error.remedy}") from None


def _owned(value: str) -> str:
    team, slash, name = value.partition("/")
    if slash:
        _name(team)
        _name(name)
    else:
        _name(value)
    return value


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        raise ValueError(f"is not a network such as 203.0.113.0/24 ({error})") from None


def _version(value: str) -> str:
    if value and not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,5}){0,3}", value):
        raise ValueError('is not a version; write it as "550.54"')
    return value


class Table(BaseModel):
    """A table whose unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class ResourcesManifest(Table):
    """What the container may use besides GPUs."""

    cpu: float = Field(default=1.0, ge=0, le=1024, description="cores; 0: no limit")
    memory_gib: float = Field(default=4.0, ge=0, le=16384, description="GiB of memory; 0: no limit")
    pids: int = Field(default=512, ge=1, le=1_000_000, description="processes and threads")
    shm_gib: float = Field(default=0.0625, ge=0, le=1024, description="GiB of /dev/shm")
    open_files: int = Field(default=OPEN_FILES_MAX, ge=16, le=1 << 20, description="open files of a process")
    locked_memory_gib: float = Field(
        default=0.0, ge=0, le=16384, description="GiB that may be locked (pinned host memory); 0: the kernel's default"
    )
    io_mib_s: float = Field(
        default=0.0, ge=0, le=1 << 20, description="MiB per second read from, and written to, disks; 0: no limit"
    )
    scratch_gib: float = Field(
        default=SCRATCH_GIB,
        ge=0,
        le=1024,
        description="GiB written over the image at most, in memory; 0: read-only",
    )

    def to_proto(self) -> state_pb2.Resources:
        """The message."""
        return state_pb2.Resources(
            cpu_milli=round(self.cpu * 1000),
            memory_bytes=round(self.memory_gib * GIB),
            pids_max=self.pids,
            shm_bytes=round(self.shm_gib * GIB),
            open_files_max=0 if self.open_files == OPEN_FILES_MAX else self.open_files,  # equal digests, as before
            locked_memory_bytes=round(self.locked_memory_gib * GIB),
            io_bytes_s=round(self.io_mib_s * MIB),
            scratch_bytes=None if self.scratch_gib == SCRATCH_GIB else round(self.scratch_gib * GIB),
        )

    @staticmethod
    def values(resources: state_pb2.Resources) -> dict[str, Any]:
        """The keys of the table from a message, to be checked."""
        return {
            "cpu": resources.cpu_milli / 1000,
            "memory_gib": resources.memory_bytes / GIB,
            "pids": resources.pids_max,
            "shm_gib": resources.shm_bytes / GIB,
            "open_files": resources.open_files_max or OPEN_FILES_MAX,
            "locked_memory_gib": resources.locked_memory_bytes / GIB,
            "io_mib_s": resources.io_bytes_s / MIB,
            "scratch_gib": resources.scratch_bytes / GIB if resources.HasField("scratch_bytes") else SCRATCH_GIB,
        }


class PlacementManifest(Table):
    """Where runners of the app should and should not be, beyond what they need."""

    labels_preferred: Labels = Field(default_factory=dict, description="labels that a node should carry")
    affinity: Apps = Field(default_factory=list, description="a node must run one of these apps")
    affinity_preferred: Apps = Field(default_factory=list, description="a node should run one of these apps")
    anti_affinity: Apps = Field(default_factory=list, description="a node must run none of these apps")
    anti_affinity_preferred: Apps = Field(default_factory=list, description="a node should run none of these apps")
    spread: Literal["", "node", "domain"] = Field(
        default="", description='"node" or "domain": its own runners are kept apart as far as possible'
    )
    gpu_topology: Literal["", "nvlink", "pcie", "numa"] = Field(
        default="", description="how its GPUs must be joined; empty: as well as possible"
    )
    wait_value: float = Field(
        default=0.0, ge=0, le=1000, description="US dollars that a second of waiting for a first output is worth"
    )

    def to_proto(self, qualified: Callable[[str], str]) -> state_pb2.PlacementRules | None:
        """The message; none where nothing is set. `qualified` gives an app its team."""
        message = state_pb2.PlacementRules(
            labels_preferred=self.labels_preferred,
            affinity=map(qualified, self.affinity),
            affinity_preferred=map(qualified, self.affinity_preferred),
            anti_affinity=map(qualified, self.anti_affinity),
            anti_affinity_preferred=map(qualified, self.anti_affinity_preferred),
            spread=self.spread,
            gpu_topology=self.gpu_topology,
            wait_value_micros_s=round(self.wait_value * 1_000_000),
        )
        return message if message.ByteSize() else None

    @staticmethod
    def values(rules: state_pb2.PlacementRules) -> dict[str, Any]:
        """The keys of the table from a message, to be checked."""
        return {
            "labels_preferred": dict(rules.labels_preferred),
            "affinity": list(rules.affinity),
            "affinity_preferred": list(rules.affinity_preferred),
            "anti_affinity": list(rules.anti_affinity),
            "anti_affinity_preferred": list(rules.anti_affinity_preferred),
            "spread": rules.spread,
            "gpu_topology": rules.gpu_topology,
            "wait_value": rules.wait_value_micros_s / 1_000_000,
        }


class RolloutManifest(Table):
    """How a new revision takes over (fal: deployment_strategy)."""

    strategy: Literal["rolling", "recreate"] = Field(
        default="rolling", description='"rolling": replaced first; "recreate": stopped first'
    )
    canary_perc: int = Field(
        default=0,
        ge=0,
        le=100,
        description="percent of runners that serve a new revision until it is promoted",
    )
    canary_hold: float = Field(
        default=0.0, ge=0, le=604800, description="seconds without a failure that promote a canary; 0: an operator does"
    )
    max_disturbed_perc: int = Field(
        default=limits.DISTURBED_PERC, ge=1, le=100, description="percent of its runners that may be disturbed at once"
    )
    rollback: bool = Field(default=True, description="a revision that fails is rolled back by itself")
    deadline: float = Field(
        default=limits.ROLLOUT_DEADLINE_S, gt=0, le=604800, description="seconds until a new revision must serve"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RolloutManifest:
        if self.strategy == "recreate" and self.canary_perc:
            raise ValueError(
                f'canary_perc = {self.canary_perc} needs the old revision beside the new one; set strategy = "rolling"'
            )
        if self.canary_hold and not self.canary_perc:
            raise ValueError(f"canary_hold = {self.canary_hold} means nothing without a canary; set canary_perc")
        return self

    def to_proto(self) -> state_pb2.RolloutPolicy | None:
        """The message; none where nothing differs from the defaults."""
        message = state_pb2.RolloutPolicy(
            strategy="" if self.strategy == "rolling" else self.strategy,
            canary_perc=self.canary_perc,
            max_disturbed_perc=0 if self.max_disturbed_perc == limits.DISTURBED_PERC else self.max_disturbed_perc,
            no_rollback=not self.rollback,
            deadline_s=0.0 if self.deadline == limits.ROLLOUT_DEADLINE_S else self.deadline,
            canary_hold_s=self.canary_hold,
        )
        return message if message.ByteSize() else None

    @staticmethod
    def values(policy: state_pb2.RolloutPolicy) -> dict[str, Any]:
        """The keys of the table from a message, to be checked."""
        return {
            "strategy": policy.strategy or "rolling",
            "canary_perc": policy.canary_perc,
            "max_disturbed_perc": policy.max_disturbed_perc or limits.DISTURBED_PERC,
            "rollback": not policy.no_rollback,
            "deadline": policy.deadline_s or limits.ROLLOUT_DEADLINE_S,
            "canary_hold": policy.canary_hold_s,
        }


class ProbeManifest(Table):
    """How the worker is asked whether it lives and is ready (fal's defaults)."""

    ready_path: Annotated[str, StringConstraints(pattern=r"^/[!-~]*$", max_length=256)] = Field(
        default="/readyz", description="HTTP path that answers 200 when requests may be sent"
    )
    live_path: Annotated[str, StringConstraints(pattern=r"^/[!-~]*$", max_length=256)] = Field(
        default="/livez", description="HTTP path that answers 200 while the process is sane"
    )
    interval_s: float = Field(default=15.0, ge=0.1, le=3600, description="seconds between probes once ready")
    timeout_s: float = Field(default=5.0, ge=0.1, le=60, description="seconds one probe may take")
    failures_max: int = Field(default=3, ge=1, le=100, description="failed probes in a row that make it unhealthy")

    def to_proto(self) -> state_pb2.Probe:
        """The message."""
        return state_pb2.Probe(
            ready_path=self.ready_path,
            live_path=self.live_path,
            interval_s=self.interval_s,
            timeout_s=self.timeout_s,
            failures_max=self.failures_max,
        )

    @staticmethod
    def values(probe: state_pb2.Probe) -> dict[str, Any]:
        """The keys of the table from a message, to be checked."""
        return {
            "ready_path": probe.ready_path,
            "live_path": probe.live_path,
            "interval_s": probe.interval_s,
            "timeout_s": probe.timeout_s,
            "failures_max": probe.failures_max,
        }
