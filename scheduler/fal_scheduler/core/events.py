"""What the core is told (commands and news) and what it answers (changes, effects, a reply).

Pure. Commands are durable: `Engine.submit` answers after their commit. News are told again by whoever told them and
are never stored as such: `Engine.offer`. Effects are facts for the edges, given out only after the commit that made
them true; nothing in the core performs anything.

Ids that must be fresh come with the event or from an `IdSource`; time comes as a `Moment`. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fal_scheduler.core.build_events import BuildCommand, BuildEnded
from fal_scheduler.core.cache_events import CacheTold, PeerReach
from fal_scheduler.core.demand_events import DemandTold
from fal_scheduler.core.gpu_events import GpuCommand
from fal_scheduler.core.model_events import (
    AddModel,
    AttestModel,
    CollectModels,
    IdentifyModel,
    RefuseModel,
    RevokeModel,
    StageModel,
    UnstageModel,
)
from fal_scheduler.core.node_events import NodeCommand, NodeNotice, RebootDue, RebootRefused
from fal_scheduler.core.pack_events import AccessTold, PackCommand
from fal_scheduler.core.quota_events import QuotaCommand
from fal_scheduler.core.records import Change, Pool, ScaleOverride, Spec
from fal_scheduler.core.rollout_events import RolloutCommand
from fal_scheduler.core.secret_events import SecretCommand
from fal_scheduler.core.tokens import JoinToken
from fal_scheduler.core.told import Capabilities, Endpoint, Inventory, RunnerStatus


@dataclass(frozen=True, slots=True)
class Moment:
    """One reading of both clocks: `now_s` monotonic for durations, `wall_s` for stamps."""

    now_s: float
    wall_s: float


class IdSource(Protocol):
    """Where fresh ids come from; the engine's is random, a test's counts."""

    def suffix(self) -> str:
        """A fresh lower-case suffix for runners and assignments."""
        ...


# --- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ApplyPool:
    """Make or change a pool. `expected_generation`: 0 with a new pool; None: whatever is there. CONFLICT otherwise."""

    pool: Pool
    expected_generation: int | None = None
    actor: str = ""


@dataclass(frozen=True, slots=True)
class ApplyApp:
    """Deploy. The spec has been validated; model and LoRAs must be registered (NOT_FOUND).

    `digest`: `fal_contract.manifest.spec_digest`; equal to the current revision's: unchanged.
    """

    id: str
    spec: Spec
    digest: str
    expected_generation: int | None = None
    actor: str = ""
    reset_scale: bool = False  # forget scaling values set at run time


@dataclass(frozen=True, slots=True)
class ScaleApp:
    """Set scaling values at run time; `reset` first forgets those set before."""

    id: str
    scale: ScaleOverride
    reset: bool = False
    actor: str = ""


@dataclass(frozen=True, slots=True)
class DeleteApp:
    """Stop an app's runners, then forget it and its revisions."""

    id: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class CordonNode:
    """Stop or allow new placements on a node, named by id or name."""

    node: str
    cordon: bool
    reason: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class RevokeNode:
    """Refuse a node's certificates from now on. `serial`: its present certificate's, where known."""

    node: str
    reason: str = ""
    serial: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class RevokeCaller:
    """Refuse the certificates of a person or gateway (`role/name`) that were issued until now."""

    subject: str
    reason: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class CreateToken:
    """Keep a join token, made at the edge (`core.tokens.create`); its pool must exist."""

    token: JoinToken
    actor: str = ""


@dataclass(frozen=True, slots=True)
class RevokeToken:
    """Refuse a token from now on."""

    id: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class RedeemToken:
    """A machine joins: checks the token, lowers its uses and makes the node's record, in one commit.

    `node_id` is fresh, drawn by the caller. `Reply.subject` is the node's id.
    """

    token_id: str
    secret: str
    node_id: str
    node_name: str


@dataclass(frozen=True, slots=True)
class StopRunner:
    """Stop a runner or orphan; the app replaces a runner while it still wants one."""

    id: str
    kill: bool = False
    reason: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Confirm:
    """Settle what waits: "adopt", "stop", "stops", "store" or "node". Empty subject: all. Lines come in the reply."""

    what: str
    subject: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class AcceptCluster:
    """Take nodes whose journal names another cluster into this one."""

    cluster_id: str
    actor: str = ""


Command = (
    ApplyPool
    | ApplyApp
    | ScaleApp
    | DeleteApp
    | AddModel
    | AttestModel
    | RefuseModel
    | IdentifyModel
    | RevokeModel
    | StageModel
    | UnstageModel
    | CollectModels
    | CordonNode
    | RevokeNode
    | RevokeCaller
    | CreateToken
    | RevokeToken
    | RedeemToken
    | StopRunner
    | Confirm
    | AcceptCluster
    | BuildCommand
    | PackCommand
    | SecretCommand
    | RolloutCommand
    | QuotaCommand
    | NodeCommand
    | GpuCommand
)


# --- news -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeHello:
    """A session begins with everything the node knows. `arrived_s`: monotonic, stamped at the socket.

    Sessions `submit` it (and await) so that the term is raised and holds are known before the first assignment.
    """

    node_id: str
    session_id: str
    boot_id: str
    arrived_s: float
    agent_id: str = ""
    cluster_id: str = ""
    epoch_seen: int = 0
    term_seen: int = 0
    incarnation: str = ""
    store_revision_seen: int = 0
    inventory: Inventory = field(default_factory=Inventory)
    statuses: tuple[RunnerStatus, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    capabilities: Capabilities = field(default_factory=Capabilities)
    software: str = ""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What changed on a node; an empty one is a heartbeat. Reports of a session that is not the newest are ignored."""

    node_id: str
    session_id: str
    arrived_s: float
    statuses: tuple[RunnerStatus, ...] = ()
    gone: tuple[str, ...] = ()
    inventory: Inventory | None = None
    tunnels: tuple[str, ...] | None = None
    access: tuple[AccessTold, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeDisconnected:
    """The stream broke; silence is counted from what was heard last."""

    node_id: str
    session_id: str


@dataclass(frozen=True, slots=True)
class GatewayReach:
    """Nodes that a gateway reaches now, by "direct" or "tunnel"; nodes left out are not reached."""

    gateway_id: str
    paths: Mapping[str, str]
    arrived_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes (the engine sends one a second). `stall_s`: our own stall since the last tick.

    `recheck`: a batch was taken back, so what its news asked for must be done again. `at_s`: when it was sent, for a
    tick that waited for the store: what arrived since then is not taken in yet, so nobody may be judged silent by it.
    """

    stall_s: float = 0.0
    recheck: bool = False
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Proceed:
    """A step left work behind (a big plan takes several); the engine sends it when it has nothing else."""


_OfNodes = NodeHello | NodeReport | NodeDisconnected | NodeNotice | RebootRefused | PeerReach
News = _OfNodes | GatewayReach | DemandTold | Tick | Proceed | CacheTold
Event = Command | News


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a command.

    `outcome`: "created", "changed", "unchanged" or "done"; `subject`: id of the object; `generation`: its generation
    after, where it has one; `lines`: for people (Confirm). The object itself stands in the view.
    """

    outcome: str
    subject: str
    generation: int = 0
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AssignmentChanged:
    """The assignment of a runner on a node was made, changed or removed: look it up with `Engine.assignment`."""

    node_id: str
    runner_id: str


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A node's record, health, hold, inventory or endpoints changed."""

    node_id: str


@dataclass(frozen=True, slots=True)
class HelloNeeded:
    """News of a node may have been let go as late that were not: it must say Hello again, with everything it knows."""

    node_id: str


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """A runner's state, goal, slots or place changed, or it is gone."""

    runner_id: str


@dataclass(frozen=True, slots=True)
class AppChanged:
    """An app's record, revision or scaling changed, or it is gone."""

    app_id: str


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """A model was registered, attested, refused, revoked or forgotten."""

    model_id: str


@dataclass(frozen=True, slots=True)
class WishesChanged:
    """Wishes for a model were made, changed or ended."""

    model_id: str


@dataclass(frozen=True, slots=True)
class AlarmsChanged:
    """An alarm was raised or settled."""


@dataclass(frozen=True, slots=True)
class Revoked:
    """Certificates of `subject` ("role/name") are refused from now on; cut its streams."""

    subject: str


@dataclass(frozen=True, slots=True)
class Logged:
    """Something happened that an operator may read. `number` is given by the event log; 0 until then."""

    kind: str
    subject: str
    message: str
    wall_s: float
    actor: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    number: int = 0


Effect = (
    AssignmentChanged
    | NodeChanged
    | HelloNeeded
    | RouteChanged
    | AppChanged
    | ModelChanged
    | WishesChanged
    | BuildEnded
    | AlarmsChanged
    | Revoked
    | RebootDue
    | Logged
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step did: already applied to the state; `changes` are to be committed, `effects` given out after."""

    changes: tuple[Change, ...] = ()
    effects: tuple[Effect, ...] = ()
    reply: Reply | None = None
