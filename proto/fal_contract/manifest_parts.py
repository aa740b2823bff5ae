"""Parts of manifests: checked types of their keys, and the tables inside an app's manifest. Pure.

Used by `fal_contract.manifest` only.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from fal_contract import limits
from fal_contract.errors import FalError
from fal_contract.ids import check_name
from fal_contract.v1 import state_pb2

GIB: Final = 1 << 30
MIB: Final = 1 << 20
OPEN_FILES_MAX: Final = 65_536
SCRATCH_GIB: Final = 1.0

Name = Annotated[str, AfterValidator(lambda value: _name(value))]
OwnedName = Annotated[str, AfterValidator(lambda value: _owned(value))]
LabelText = Annotated[str, StringConstraints(max_length=limits.LABEL_CHARS_MAX)]
Labels = Annotated[dict[LabelText, LabelText], Field(max_length=limits.LABELS_MAX)]
Network = Annotated[str, AfterValidator(lambda value: _network(value))]
Version = Annotated[str, AfterValidator(lambda value: _version(value))]
Text = Annotated[str, StringConstraints(min_length=1, max_length=limits.LABEL_CHARS_MAX)]


def _name(value: str) -> str:
    try:
        return check_name(value, field="name")
    except FalError as error:
        raise ValueError(f"not a name. {error.remedy}") from None


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
