"""What an operator asked of a container: the parts of a revision, one frozen dataclass a message of `state.proto`.

Pure. Part of `core.records`, where everybody finds them; the meanings stand in the proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fal_contract.limits import (
    DISTURBED_PERC,
    REQUEST_TIMEOUT_S,
    ROLLOUT_DEADLINE_S,
    STARTUP_TIMEOUT_S,
    TERMINATION_GRACE_S,
)

HOST_IMAGE: Final = "host"  # the node's own system


@dataclass(frozen=True, slots=True)
class Resources:
    """What a container may use; 0 means no limit for CPU and memory."""

    cpu_milli: int = 0
    memory_bytes: int = 0
    pids_max: int = 0
    shm_bytes: int = 0
    open_files_max: int = 0
    locked_memory_bytes: int = 0
    io_bytes_s: int = 0
    scratch_bytes: int | None = None  # None: the default


@dataclass(frozen=True, slots=True)
class Scaling:
    """fal's scaling knobs, with fal's names and defaults."""

    keep_alive_s: float = 10.0
    min_concurrency: int = 0
    max_concurrency: int = 1
    concurrency_buffer: int = 0
    concurrency_buffer_perc: int = 0
    scaling_delay_s: float = 0.0
    max_multiplexing: int = 1
    request_timeout_s: float = REQUEST_TIMEOUT_S
    startup_timeout_s: float = STARTUP_TIMEOUT_S
    forecast_concurrency: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """How a worker is asked whether it lives and is ready."""

    ready_path: str = "/readyz"
    live_path: str = "/livez"
    interval_s: float = 5.0
    timeout_s: float = 5.0
    failures_max: int = 3


@dataclass(frozen=True, slots=True)
class BuildTask:
    """What a task that runs once leaves: an entry of the compile cache, or (`image` is its id) an image.

    `namespace`: "cluster" or "team/NAME"; of an image "image". `source`, `auth_secret`, `platform`: of an image only.
    """

    namespace: str
    key: str
    bytes_max: int
    facts: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    source: str = ""
    auth_secret: str = ""
    platform: str = ""


@dataclass(frozen=True, slots=True)
class PlacementRules:
    """Where runners should and should not be, beyond what they need. Apps are `team/name`."""

    labels_preferred: Mapping[str, str] = field(default_factory=dict)
    affinity: tuple[str, ...] = ()
    affinity_preferred: tuple[str, ...] = ()
    anti_affinity: tuple[str, ...] = ()
    anti_affinity_preferred: tuple[str, ...] = ()
    spread: str = ""
    gpu_topology: str = ""
    wait_value_micros_s: int = 0


@dataclass(frozen=True, slots=True)
class RolloutPolicy:
    """How a new revision takes over; 0: the default, see the properties."""

    strategy: str = ""
    canary_perc: int = 0
    max_disturbed_perc: int = 0
    no_rollback: bool = False
    deadline_s: float = 0.0
    canary_hold_s: float = 0.0

    @property
    def recreate(self) -> bool:
        """Whether old runners stop before new ones start."""
        return self.strategy == "recreate"

    @property
    def rollback(self) -> bool:
        """Whether the revision before runs again when this one fails."""
        return not self.no_rollback

    @property
    def disturbed_perc(self) -> int:
        """Percent of its runners that may be disturbed at once."""
        return self.max_disturbed_perc or DISTURBED_PERC

    @property
    def serves_within_s(self) -> float:
        """Seconds that a new revision may take until it serves, counted from its last runner that became ready."""
        return self.deadline_s or ROLLOUT_DEADLINE_S


@dataclass(frozen=True, slots=True)
class Spec:
    """What an operator asked for; immutable inside a revision."""

    image: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    loras: tuple[str, ...] = ()
    machine_type: tuple[str, ...] = ()
    num_gpus: int = 0
    gpu_memory_bytes_min: int = 0
    resources: Resources = Resources()
    pools: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    network: str = "none"
    scaling: Scaling = Scaling()
    probe: Probe = Probe()
    termination_grace_s: float = TERMINATION_GRACE_S
    share_group: str = ""
    stream_weights: bool = False
    allow_provisional: bool = False
    compile_caches: tuple[str, ...] = ()
    build: BuildTask | None = None
    port: int = 0
    socket: str = ""
    driver_version_min: str = ""
    cuda_version_min: str = ""
    egress_allow: tuple[str, ...] = ()
    egress_deny: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    gpu_milli: int = 0  # of each of its GPUs; 0: all
    mig_profile: str = ""
    priority: int = 0
    placement: PlacementRules = PlacementRules()
    rollout: RolloutPolicy = RolloutPolicy()

    @property
    def fractional(self) -> bool:
        """Whether it shares its GPU with others of its team."""
        return self.gpu_milli > 0

    @property
    def models(self) -> tuple[str, ...]:
        """Every model and LoRA that it names."""
        return (self.model, *self.loras) if self.model else self.loras

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Every model, LoRA and image that it names: what must be on a node before it runs there."""
        return (*self.models, self.image) if self.image != HOST_IMAGE else self.models

    @property
    def own_server(self) -> bool:
        """Whether something else than our worker answers its requests."""
        return bool(self.command or self.port or self.socket or self.image not in ("", HOST_IMAGE))

    @property
    def packs(self) -> bool:
        """Whether it is a task that packs an image."""
        return self.build is not None and self.build.image != ""


__all__ = [
    "HOST_IMAGE",
    "BuildTask",
    "PlacementRules",
    "Probe",
    "Resources",
    "RolloutPolicy",
    "Scaling",
    "Spec",
]
