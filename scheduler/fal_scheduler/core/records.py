"""What is stored: one frozen dataclass per record of `state.proto`, and the key of each.

Pure. The field names are the proto's, so that `codec` can be checked against it; meanings stand in the proto.
What a revision asks for is in `core.spec_records`, and found here, too. Used by every part of the scheduler. Must not
know how records are encoded or where they are kept.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Final

from fal_contract.ids import name_of, team_of
from fal_scheduler.core.drain_record import Drain as Drain
from fal_scheduler.core.learnt_record import Learnt
from fal_scheduler.core.spec_records import HOST_IMAGE as HOST_IMAGE
from fal_scheduler.core.spec_records import BuildTask as BuildTask
from fal_scheduler.core.spec_records import PlacementRules as PlacementRules
from fal_scheduler.core.spec_records import Probe as Probe
from fal_scheduler.core.spec_records import Resources as Resources
from fal_scheduler.core.spec_records import RolloutPolicy as RolloutPolicy
from fal_scheduler.core.spec_records import Scaling as Scaling
from fal_scheduler.core.spec_records import Spec as Spec
from fal_scheduler.core.tokens import JoinToken
from fal_scheduler.core.usage_records import Usage as Usage
from fal_scheduler.core.usage_records import UsageDay as UsageDay


class Goal(IntEnum):
    """What the scheduler wants of a container. The numbers are the wire's; a goal only ever rises."""

    RUN = 1
    DRAIN = 2
    STOP = 3
    KILL = 4


class RunnerState(IntEnum):
    """Where a runner is in its life. The numbers are the wire's."""

    PENDING = 1
    STAGING = 2
    SETUP = 3
    IDLE = 4
    RUNNING = 5
    DRAINING = 6
    TERMINATING = 7
    TERMINATED = 8
    CRASH_BACKOFF = 9
    UNKNOWN = 10


class ModelState(IntEnum):
    """How far a model's content is known. The numbers are the wire's."""

    REGISTERED = 1
    ATTESTED = 2
    REFUSED = 3
    REVOKED = 4


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why the store is taken for an old copy of itself, since when, and the newest that a node has told."""

    reason: str
    store_revision: int
    revision_seen: int
    epoch_seen: int
    noticed_at_s: float


@dataclass(frozen=True, slots=True)
class Meta:
    """The cluster's life."""

    cluster_id: str
    epoch: int
    incarnation: str
    created_at_s: float
    accepted_clusters: tuple[str, ...] = ()
    suspicion: Suspicion | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """A group of nodes with one answer to: cloud, region, failure domain, price, networks."""

    name: str
    cloud: str = ""
    region: str = ""
    zone: str = ""
    gpu_hour_price_micros: int = 0
    egress_gib_price_micros: int = 0
    networks: tuple[str, ...] = ()
    spot: bool = False
    cache_bytes: int = 0
    trusted_network: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    generation: int = 0
    allow_host_network: bool = False
    reclaim_per_hour_ppm: int = 0
    lost_declared_at_s: float = 0.0

    @property
    def domain(self) -> str:
        """The failure domain: the zone, else the pool itself."""
        return self.zone or self.name


@dataclass(frozen=True, slots=True)
class Node:
    """A machine with an agent, as far as operators decided about it."""

    id: str
    name: str
    pool: str
    cordoned: bool = False
    cordon_reason: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    joined_at_s: float = 0.0
    token_id: str = ""
    revoked: bool = False
    drain: Drain | None = None
    quarantined_gpus: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Revocation:
    """A certificate, and all of its subject's earlier ones, that are refused before their date."""

    serial: str
    subject: str
    revoked_at_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ScaleOverride:
    """Scaling values set at run time; None leaves the revision's."""

    min_concurrency: int | None = None
    max_concurrency: int | None = None
    keep_alive_s: float | None = None
    concurrency_buffer: int | None = None
    concurrency_buffer_perc: int | None = None
    scaling_delay_s: float | None = None
    request_timeout_s: float | None = None
    forecast_concurrency: int | None = None

    def over(self, scaling: Scaling) -> Scaling:
        """`scaling` with what is set here in place of its own."""
        return replace(scaling, **self._set)

    def under(self, asked: ScaleOverride) -> ScaleOverride:
        """This, with what `asked` sets in place of its own."""
        return replace(self, **asked._set)

    @property
    def _set(self) -> dict[str, Any]:
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        return {name: value for name, value in values if value is not None}


@dataclass(frozen=True, slots=True)
class Rollout:
    """A revision takes over from another. Times: Unix seconds. `progress_at_s`: a runner of it last became ready."""

    from_revision: int
    to_revision: int
    phase: str
    paused: bool = False
    reason: str = ""
    began_at_s: float = 0.0
    phase_at_s: float = 0.0
    failures: int = 0
    canary_perc: int = 0
    progress_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class App:
    """What an operator deploys."""

    id: str
    revision: int
    scale: ScaleOverride | None = None
    generation: int = 1
    deleting: bool = False
    created_at_s: float = 0.0
    rollout: Rollout | None = None


@dataclass(frozen=True, slots=True)
class Revision:
    """One deploy of an app; never changes."""

    app: str
    number: int
    spec: Spec
    digest: str
    created_at_s: float = 0.0
    created_by: str = ""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of an image beside its files; `first_pieces` in order of first use by a recorded start."""

    source: str
    digest: str
    format: str
    platform: str = ""
    first_pieces: tuple[int, ...] = ()
    layer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A named artifact: a checkpoint, LoRA, image or compile cache. There are many: the codec shares equal strings.

    `artifact_id` is empty only in a record of the first release that no leader has completed yet.
    """

    id: str
    kind: str
    uri: str
    state: ModelState = ModelState.REGISTERED
    manifest_digest: str = ""
    bytes: int = 0
    files: int = 0
    created_at_s: float = 0.0
    reason: str = ""
    revision: str = ""
    artifact_id: str = ""
    resolved_uri: str = ""
    attestation: str = ""
    attested_by: str = ""
    allow_pickle: bool = False
    image: ImageFacts | None = None

    @property
    def withdrawn(self) -> bool:
        """Whether nothing may be started with it: refused or revoked."""
        return self.state in (ModelState.REFUSED, ModelState.REVOKED)


@dataclass(frozen=True, slots=True)
class Wish:
    """Where a model should be, whatever runs. `target`: "pool/NAME", "node/ID" or "replicas"; `expires_at_s` 0: never.

    An operator's record; which nodes it means at a moment is `core.wishes`.
    """

    model: str
    target: str
    replicas: int = 0
    tier: str = "disk"
    expires_at_s: float = 0.0
    created_by: str = ""
    created_at_s: float = 0.0

    def ended(self, now_s: float) -> bool:
        """Whether its time is over; `now_s`: wall clock."""
        return 0.0 < self.expires_at_s <= now_s


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An entry of the compile cache: immutable, signed by the scheduler. `namespace`: "cluster" or "team/NAME"."""

    namespace: str
    key: str
    model: str
    manifest_digest: str
    bytes: int = 0
    task: str = ""
    created_at_s: float = 0.0
    signature: builtins.bytes = b""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Secret:
    """A team's secret, sealed; `bytes`: of the value."""

    id: str
    sealed: builtins.bytes = field(repr=False)
    generation: int = 1
    created_at_s: float = 0.0
    updated_at_s: float = 0.0
    updated_by: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Quota:
    """GPUs that a team may hold; with `borrow` more, while nobody within their quota waits."""

    team: str
    gpu_milli: int
    borrow: bool = True
    generation: int = 1


@dataclass(frozen=True, slots=True)
class Residency:
    """A model loaded in a runner; of a LoRA `base` is the model that it is loaded into."""

    id: str
    model: str
    manifest_digest: str = ""
    base: str = ""


@dataclass(frozen=True, slots=True)
class Binding:
    """An app revision served by a residency."""

    app: str
    revision: int
    residency: str = ""


@dataclass(frozen=True, slots=True)
class AssignmentRef:
    """Names one assignment: its unique id and the term of the leader that made it."""

    id: str
    term: int
    inventory_generation: int = 0  # of its node, that it was decided on; 0: unknown


@dataclass(frozen=True, slots=True)
class Runner:
    """One container with its GPUs: reservation, assignment, residencies and bindings in one record."""

    id: str
    share_group: str
    bindings: tuple[Binding, ...]
    created_at_s: float
    node: str = ""
    gpus: tuple[str, ...] = ()
    assignment: AssignmentRef | None = None
    residencies: tuple[Residency, ...] = ()
    goal: Goal = Goal.RUN
    goal_reason: str = ""
    memory_bytes: int = 0
    cpu_milli: int = 0
    gpu_milli: int = 0  # of each of its GPUs; 0: all
    priority: int = 0

    @property
    def app(self) -> str:
        """The app that it serves (CHAIN binds one to one)."""
        return self.bindings[0].app

    def revision_for(self, app_id: str) -> int:
        """Number of the revision of an app that it serves; 0: none."""
        return next((one.revision for one in self.bindings if one.app == app_id), 0)

    @property
    def apps(self) -> tuple[str, ...]:
        """Every app that it serves, each once."""
        return tuple(dict.fromkeys(binding.app for binding in self.bindings))

    @property
    def revision(self) -> int:
        """Number of the revision that it serves."""
        return self.bindings[0].revision


Record = (
    Meta
    | Pool
    | Node
    | JoinToken
    | Revocation
    | App
    | Revision
    | Model
    | Wish
    | CacheEntry
    | Runner
    | Secret
    | Learnt
    | Usage
    | Quota
    | UsageDay
)

META_KEY: Final = "meta"


def _owned_key(kind: str) -> Callable[[Any], str]:
    return lambda record: f"team/{team_of(record.id)}/{kind}/{name_of(record.id)}"


_KEYS: Final[dict[type, Callable[[Any], str]]] = {
    Runner: _owned_key("runner"),
    App: _owned_key("app"),
    Model: _owned_key("model"),
    Secret: _owned_key("secret"),
    Wish: lambda one: f"team/{team_of(one.model)}/wish/{name_of(one.model)}/{one.target}",
    CacheEntry: lambda one: f"cache/{one.namespace}/{one.key}",
    Revision: lambda one: f"team/{team_of(one.app)}/revision/{name_of(one.app)}/{one.number:08d}",
    Node: lambda one: f"node/{one.id}",
    Pool: lambda one: f"pool/{one.name}",
    JoinToken: lambda one: f"token/{one.id}",
    Revocation: lambda one: f"revoked/{one.serial}",
    Quota: lambda one: f"quota/{one.team}",
    Usage: lambda one: f"usage/{one.assignment}",
    UsageDay: lambda one: f"usage-day/{one.day}/{one.part:03d}",
    Meta: lambda one: META_KEY,
    Learnt: lambda one: f"learnt/{one.shard}",
}


def key_of(record: Record) -> str:
    """The store's key of `record`, as fixed at the head of state.proto."""
    return _KEYS[type(record)](record)


def runner_key(runner_id: str) -> str:
    """The store's key of a runner that may not exist."""
    team, _, name = runner_id.partition("/")
    return f"team/{team}/runner/{name}"


@dataclass(frozen=True, slots=True)
class Change:
    """One record made (`before` is None), changed or removed (`after` is None). Both are never None."""

    key: str
    before: Record | None
    after: Record | None

    def undone(self) -> Change:
        """The change that takes this one back."""
        return Change(self.key, self.after, self.before)
