"""What nodes and gateways tell and nobody stores: it is told again after every start of a leader.

Pure. Values are frozen; `NodeLive` is the one mutable object, owned by `State` and changed only by the core.
Times named `*_at_s` on live objects are monotonic readings of the engine's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fal_scheduler.core.records import Residency, RunnerState


class Health(StrEnum):
    """How a node is, as `falctl node list` shows it."""

    JOINED = "joined"  # has a record, was never heard by this leader
    READY = "ready"
    UNKNOWN = "unknown"  # silent; its runners may well serve
    LOST = "lost"  # silent for so long that its runners are replaced
    REVOKED = "revoked"

    @property
    def text(self) -> str:
        """As the end of a sentence that begins with the node's name."""
        match self:
            case Health.JOINED:
                return "has not been heard since this scheduler took over"
            case Health.UNKNOWN:
                return "is silent; its runners may well serve on"
            case Health.LOST:
                return "is lost: silent for so long that its runners are replaced"
            case _:
                return f"is {self}"


class Hold(StrEnum):
    """Why nothing is started or stopped on a node by itself until an operator confirms."""

    NONE = ""
    CLONE = "clone"  # two live machines say that they are this node
    FOREIGN = "foreign"  # its journal belongs to another cluster
    STORE = "store"  # it worked for another store, or saw a newer state of this one


@dataclass(frozen=True, slots=True)
class GpuLink:
    """How two GPUs of a node are joined."""

    peer_id: str
    kind: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU or MIG instance; `healthy` is False while it must not be given to new runners."""

    id: str
    model: str
    memory_bytes: int
    index: int = 0
    healthy: bool = True
    health_reason: str = ""
    links: tuple[GpuLink, ...] = ()
    memory_used_bytes: int = 0
    pci_bus_id: str = ""
    numa_node: int = -1
    mig_profile: str = ""
    parent_id: str = ""
    ecc_uncorrected: int = 0
    temperature_c: int = 0
    product: str = ""
    power_w: int = 0
    health_class: str = ""  # what it is quarantined for; empty: nothing, it is at most not for new runners just now
    health_since_s: float = 0.0  # Unix seconds; 0: no fault
    health_state: str = ""  # "suspect", "quarantined" or "diagnosing"
    diagnoses: int = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a machine has."""

    generation: int = 0
    gpus: tuple[Gpu, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    cpu_milli: int = 0
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a node's proxy can be reached on one network."""

    network: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a probe of the container runtime found."""

    driver: str = ""
    isolates: bool = False
    runtime: str = ""
    user_namespaces: bool = False
    cgroup: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resident:
    """A model or LoRA in a worker, or on its way into it; the fields are the wire's (agent.proto)."""

    id: str
    state: str
    reason: str = ""
    bytes: int = 0
    stage_seconds: float = 0.0
    load_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """A runner as its node sees it; the fields are the wire's (agent.proto)."""

    runner_id: str
    state: RunnerState
    assignment_id: str = ""
    term: int = 0
    app: str = ""
    revision: int = 0
    reason: str = ""
    exit_code: int | None = None
    oom_killed: bool = False
    log_tail: tuple[str, ...] = ()
    started_at_s: float = 0.0
    ready_at_s: float = 0.0
    served: int = 0
    in_flight: int = 0
    last_used_age_s: float = -1.0
    gpu_seconds: float = 0.0
    gpus: tuple[str, ...] = ()
    phases: tuple[tuple[str, float], ...] = ()
    max_multiplexing: int = 0
    residencies: tuple[Residency, ...] = ()
    share_group: str = ""
    memory_bytes: int = 0
    cpu_milli: int = 0
    refused: bool = False
    output: bytes = b""  # of a build task: the manifest (serialised) of what its node took in
    busy_seconds: float = 0.0  # with a request under way
    gpu_milli: int = 0  # of each of its GPUs; 0: all
    wounded: bool = False  # it serves, but its container's monitor died; `reason` says so
    residents: tuple[Resident, ...] = ()  # where they may change

    @property
    def serves(self) -> bool:
        """Whether requests may be sent to it."""
        return self.state in (RunnerState.IDLE, RunnerState.RUNNING)

    @property
    def ended(self) -> bool:
        """Whether its container is gone, or was refused and never was."""
        return self.refused or self.state is RunnerState.TERMINATED


@dataclass(slots=True)
class NodeLive:
    """What this leader knows of a node beyond its record. Changed by `core.told_news` and `core.liveness` only."""

    node_id: str
    health: Health = Health.JOINED
    hold: Hold = Hold.NONE
    hold_reason: str = ""
    session_id: str = ""  # of the newest session; messages of others are late news
    connected: bool = False
    boot_id: str = ""
    past_boots: tuple[str, ...] = ()  # superseded; one that comes back is a clone
    agent_id: str = ""
    software: str = ""
    cluster_id: str = ""
    incarnation: str = ""
    epoch_seen: int = 0
    term_seen: int = 0
    store_revision_seen: int = 0
    heard_at_s: float = 0.0
    stall_at_heard_s: float = 0.0  # State.stall_total_s when it was heard
    reached: dict[str, tuple[str, float]] = field(default_factory=dict)  # gateway -> (path, monotonic seconds)
    witness: str = ""  # the node of another failure domain whose cache still reached it, while it was silent
    witnessed_at_s: float = 0.0
    tunnels: tuple[str, ...] = ()
    inventory: Inventory | None = None
    endpoints: tuple[Endpoint, ...] = ()
    capabilities: Capabilities = Capabilities()
    statuses: dict[str, RunnerStatus] = field(default_factory=dict)  # runners of the store, by id
    told_at_s: dict[str, float] = field(default_factory=dict)  # when that was, monotonic
    orphans: dict[str, RunnerStatus] = field(default_factory=dict)  # containers that the store does not know


@dataclass(frozen=True, slots=True)
class Backoff:
    """Failures in a row of an app's runners; the next start waits until `until_s` (monotonic)."""

    failures: int
    until_s: float
    until_wall_s: float
    last: RunnerStatus


@dataclass(frozen=True, slots=True)
class BuildFailure:
    """Why the last build of a cache entry failed. `lines`: its last output."""

    reason: str
    runner: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that an operator must settle or know."""

    kind: str
    subject: str
    message: str
    remedy: str
    since_s: float
