"""The cluster in memory: records, what was told, and the indexes over both.

Pure. `State.apply` is the one function that changes records, and it can be undone (`Change.undone`), which is how a
batch whose commit failed is taken back. Everything told lives in `live` and is changed by `core.news` and
`core.liveness` through the methods here. All others read. No clock, no I/O, no randomness.

Invariant: every index (runners by node and app, GPU occupancy, the fleet's columns) follows from records and `live`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fal_contract.ids import team_of
from fal_scheduler.core.cache_facts import CacheFacts
from fal_scheduler.core.catalog import Catalog
from fal_scheduler.core.demand import Demand
from fal_scheduler.core.fleet import Fleet, NodeFacts
from fal_scheduler.core.gpu_faults import as_placed
from fal_scheduler.core.learning import Learning
from fal_scheduler.core.learnt_record import Learnt
from fal_scheduler.core.records import (
    App,
    CacheEntry,
    Change,
    Meta,
    Model,
    Node,
    Pool,
    Quota,
    Revision,
    Revocation,
    Runner,
    Scaling,
    Secret,
    Suspicion,
    Wish,
)
from fal_scheduler.core.tokens import JoinToken
from fal_scheduler.core.told import Alarm, Backoff, BuildFailure, Health, Hold, Inventory, NodeLive, RunnerStatus
from fal_scheduler.core.usage_records import Usage, UsageDay
from fal_scheduler.core.waiting_line import Need, Waiting

if TYPE_CHECKING:
    from fal_scheduler.core.expectations import Expectation

K = TypeVar("K")

EXPLANATIONS_PER_TICK_MAX: Final = 20  # each looks at every node


@dataclass(frozen=True, slots=True)
class Pending:
    """Why a runner has no node: what placement found when it was tried last."""

    reason: str
    feasible: int = 0
    refused: tuple[tuple[str, int], ...] = ()
    nearest_miss: str = ""
    found_at_s: float = 0.0  # monotonic


class State:
    """All that the scheduler knows. Read it freely; call the methods from the core only."""

    def __init__(self) -> None:
        # Records, as stored (the newest batch may still be on its way to the store).
        self.meta: Meta | None = None
        self.pools: dict[str, Pool] = {}
        self.nodes: dict[str, Node] = {}
        self.tokens: dict[str, JoinToken] = {}
        self.revocations: dict[str, Revocation] = {}
        self.apps: dict[str, App] = {}
        self.revisions: dict[tuple[str, int], Revision] = {}
        self.catalog = Catalog()  # models, wishes, cache entries
        self.runners: dict[str, Runner] = {}
        self.secrets: dict[str, Secret] = {}
        self.quotas: dict[str, Quota] = {}  # by team
        self.learnt: dict[str, Learnt] = {}  # as it was saved last; `learning` is what counts
        self.usage: dict[str, Usage] = {}  # of containers, by assignment; not folded yet
        self.usage_days: dict[tuple[str, int], UsageDay] = {}  # by day and part
        # Indexes. Dicts without values are ordered sets.
        self.runners_by_app: dict[str, dict[str, None]] = {}
        self.runners_by_node: dict[str, dict[str, None]] = {}
        self.runners_by_group: dict[tuple[str, str], dict[str, None]] = {}  # by team and share group
        self.runners_by_assignment: dict[str, dict[str, None]] = {}  # one each, unless an invariant is broken
        self.draining: dict[str, None] = {}  # nodes with a drain under way
        self.rolling: dict[str, None] = {}  # apps with a rollout under way
        self.held_milli: dict[str, int] = {}  # by team: thousandths of GPUs that its runners hold
        self.fleet = Fleet()
        # Told.
        self.live: dict[str, NodeLive] = {}
        self.orphans: dict[tuple[str, str], None] = {}  # (node id, runner id)
        self.demand = Demand()  # what gateways ask for, how runners are used
        self.cache_facts = CacheFacts()  # what nodes' weight caches hold, and rates, as far as placement looks
        self.facts_at_ms = 0  # monotonic, as of when they are read: of the last step while something was under way
        self.learning = Learning()  # how long parts of a start take
        self.predictions: dict[str, Expectation] = {}  # of runners that are not ready yet
        self.outcomes: dict[str, Expectation] = {}  # of those that became ready last
        self.lifetimes: dict[str, int] = {}  # by app: seconds that its runners lived, the last ones most
        self._make_decided()
        self._make_waiting()
        self._make_own()

    def _make_decided(self) -> None:
        """What this leader decided for itself."""
        self.backoffs: dict[str, Backoff] = {}  # by app
        self.apps_version = 0  # rises with every change of an app's record
        self.sharing_barred_s: dict[str, float] = {}  # by app: shares no runner before then, monotonic
        self.refusals: dict[str, int] = {}  # by app: how often in a row a node has turned a runner away
        self.failures: dict[str, RunnerStatus] = {}  # last words of runners that crashed and wait to be replaced
        self.pending: dict[tuple[str, int], Pending] = {}  # by app and revision with runners that have no node
        self.abandoned: dict[str, None] = {}  # runners of lost nodes that may be replaced
        self.abandoned_recent: dict[str, deque[float]] = {}  # by failure domain: when they became so, monotonic
        self.returned: dict[str, None] = {}  # runners that were replaced, and whose node then came back
        self.alarms: dict[tuple[str, str], Alarm] = {}
        self.build_failures: dict[tuple[str, str], BuildFailure] = {}  # by namespace and key, the newest last
        self.frozen: dict[str, str] = {}  # ids that broke an invariant -> the violation
        self.absent_due: dict[str, str] = {}  # runners that a node has no more -> assignment, likewise
        self.ends_due: dict[str, None] = {}  # nodes that told of more ends than one step could take in
        self.usage_due_s = 0.0  # when the ledger is looked after next, monotonic
        self.settled = True  # False while a new leader waits for its nodes to say what they run
        self.hold_all = ""  # why nothing at all is started or stopped by itself
        self.suspicion: Suspicion | None = None  # meta's, or what is yet to be written there
        self.dirty: dict[str, None] = {}  # apps to be reconciled
        self.reconciled_at_s: dict[str, float] = {}  # by app of many runners: when last, monotonic
        self.explanations_left = EXPLANATIONS_PER_TICK_MAX
        self.asked: dict[str, None] = {}  # apps whose stops an operator's command asks for, until they are done
        self.stops_held: dict[str, None] = {}  # apps with stops that wait for a confirm
        self.stops_recent: deque[float] = deque()  # when this leader stopped runners by itself

    def _make_waiting(self) -> None:
        """What waits for a place, and for whom places are kept."""
        self.waiting = Waiting()  # apps with runners that have no node
        self.capacity_at_s = 0.0  # when what placement looks at changed last; older reasons are worked out anew
        self.freed: dict[str, None] = {}  # nodes on which something became free since waiters were looked at
        self.freed_all = False  # something changed that concerns every waiter
        self.awake: dict[Need, None] = {}  # classes of waiters that may find a place now
        self.reserved: dict[str, str] = {}  # nodes that are kept free, and for which app
        self.reserved_at_s: dict[str, float] = {}  # since when, monotonic
        self.preempt_at_s: dict[str, float] = {}  # by app: when it may look for victims again, monotonic

    def _make_own(self) -> None:
        """What is the leader's own."""
        self.term = 0
        self.store_revision = 0
        self.term_began_s = self.stall_total_s = 0.0
        self.grace_over = False  # after the first minutes of the term

    # --- records ----------------------------------------------------------------------------------------------------

    def apply(self, change: Change) -> None:
        """Make one change and bring every index along."""
        before, after = change.before, change.after
        match after if after is not None else before:
            case Runner():
                assert before is None or isinstance(before, Runner)
                assert after is None or isinstance(after, Runner)
                self._set_runner(before, after)
            case Node() as node:
                _set(self.nodes, node.id, after)
                self.draining.pop(node.id, None)
                if isinstance(after, Node) and after.drain is not None:
                    self.draining[node.id] = None
                self.refresh_node(node.id)
            case Pool() as pool:
                _set(self.pools, pool.name, after)
                for node in [node for node in self.nodes.values() if node.pool == pool.name]:
                    self.refresh_node(node.id)
            case App() as app:
                self.apps_version += 1
                _set(self.apps, app.id, after)
                self.rolling.pop(app.id, None)
                if isinstance(after, App) and after.rollout is not None:
                    self.rolling[app.id] = None
            case Revision() as revision:
                _set(self.revisions, (revision.app, revision.number), after)
                if revision.spec.build is not None:
                    _set(self.catalog.builds, revision.app, revision.spec.build if after is not None else None)
            case Model():
                assert before is None or isinstance(before, Model)
                assert after is None or isinstance(after, Model)
                self.catalog.set_model(before, after)
            case Wish():
                assert before is None or isinstance(before, Wish)
                assert after is None or isinstance(after, Wish)
                self.catalog.set_wish(before, after)
            case CacheEntry() as entry:
                _set(self.catalog.cache_entries, (entry.namespace, entry.key), after)
            case Quota() as quota:
                _set(self.quotas, quota.team, after)
            case Usage() as usage:
                _set(self.usage, usage.assignment, after)
            case UsageDay() as day:
                _set(self.usage_days, (day.day, day.part), after)
            case Secret() as secret:
                _set(self.secrets, secret.id, after)
            case JoinToken() as token:
                _set(self.tokens, token.id, after)
            case Learnt() as learnt:
                _set(self.learnt, learnt.shard, after)
            case Revocation() as revocation:
                _set(self.revocations, revocation.serial, after)
            case Meta():
                assert after is None or isinstance(after, Meta)
                self.meta = after

    def _set_runner(self, before: Runner | None, after: Runner | None) -> None:
        if before is not None:
            if before.node:
                _discard(self.runners_by_node, before.node, before.id)
                held = before.gpus, before.memory_bytes, before.cpu_milli
                self.fleet.release(before.node, before.id, *held, before.apps)
                self._hold_milli(before, -1)
            if before.assignment is not None:
                _discard(self.runners_by_assignment, before.assignment.id, before.id)
            if after is None:
                del self.runners[before.id]
                _discard(self.runners_by_group, _group_of(before), before.id)
            for app_id in before.apps:
                if after is None or app_id not in after.apps:
                    _discard(self.runners_by_app, app_id, before.id)
        if after is not None:
            self.runners[after.id] = after
            self.runners_by_group.setdefault(_group_of(after), {})[after.id] = None
            for app_id in after.apps:
                self.runners_by_app.setdefault(app_id, {})[after.id] = None
            if after.assignment is not None:
                self.runners_by_assignment.setdefault(after.assignment.id, {})[after.id] = None
            if after.node:
                self._settle_orphan(after.node, after.id)
                self.runners_by_node.setdefault(after.node, {})[after.id] = None
                holds = after.gpus, after.memory_bytes, after.cpu_milli, after.gpu_milli
                self.fleet.hold(after.node, after.id, *holds, after.apps)
                self._hold_milli(after, 1)
        if before is not None and before.node and (after is None or after.node != before.node):
            self._return_orphan(before)

    def _hold_milli(self, runner: Runner, sign: int) -> None:
        """What its team holds of GPUs."""
        team = team_of(runner.app)
        held = self.held_milli.get(team, 0) + sign * len(runner.gpus) * (runner.gpu_milli or 1000)
        _set(self.held_milli, team, held or None)

    def _settle_orphan(self, node_id: str, runner_id: str) -> None:
        """A container that was an orphan has a record now: its hold is the record's."""
        if (node_id, runner_id) in self.orphans:
            live = self.live[node_id]
            status = live.orphans[runner_id]
            self.forget_orphan(node_id, runner_id)
            live.statuses[runner_id] = status

    def _return_orphan(self, gone: Runner) -> None:
        """A record goes while its container is still told of: without a record it would be an orphan."""
        live = self.live.get(gone.node)
        status = live.statuses.get(gone.id) if live is not None else None
        if status is not None and live is not None and not status.ended:
            del live.statuses[gone.id]
            live.told_at_s.pop(gone.id, None)
            self.add_orphan(live.node_id, status)

    # --- told -------------------------------------------------------------------------------------------------------

    def live_of(self, node_id: str) -> NodeLive:
        """What is known of a node; made when it is first heard of."""
        live = self.live.get(node_id)
        if live is None:
            live = self.live[node_id] = NodeLive(node_id)
        return live

    def add_orphan(self, node_id: str, status: RunnerStatus) -> None:
        """A container that no record names. It keeps its GPUs and memory."""
        self.forget_orphan(node_id, status.runner_id)
        self.live_of(node_id).orphans[status.runner_id] = status
        self.orphans[node_id, status.runner_id] = None
        holds = status.gpus, status.memory_bytes, status.cpu_milli, status.gpu_milli
        self.fleet.hold(node_id, status.runner_id, *holds, (status.app,))

    def forget_orphan(self, node_id: str, runner_id: str) -> None:
        """The orphan is gone, or has a record now. Nothing happens where there is none."""
        if (node_id, runner_id) in self.orphans:
            del self.orphans[node_id, runner_id]
            status = self.live[node_id].orphans.pop(runner_id)
            self.fleet.release(node_id, runner_id, status.gpus, status.memory_bytes, status.cpu_milli, (status.app,))

    def status_of(self, runner: Runner) -> RunnerStatus | None:
        """What the runner's node told of this assignment last."""
        live = self.live.get(runner.node)
        return live.statuses.get(runner.id) if live is not None else None

    def refresh_node(self, node_id: str) -> None:
        """Bring the fleet's columns up to the node's record, pool, health, hold and inventory."""
        node, live = self.nodes.get(node_id), self.live.get(node_id)
        if node is None:
            self.fleet.drop_node(node_id)
            return
        pool = self.pools.get(node.pool)
        inventory = live.inventory if live is not None and live.inventory is not None else Inventory()
        self.fleet.set_node(
            NodeFacts(
                node_id=node_id,
                ready=live is not None and live.health is Health.READY and not node.revoked,
                cordoned=node.cordoned,
                held=node_id in self.frozen or (live is not None and live.hold is not Hold.NONE),
                isolates=live is not None and live.capabilities.isolates,
                driver=live.capabilities.driver if live is not None else "",
                pool=node.pool,
                labels={**(pool.labels if pool is not None else {}), **node.labels},
                cpu_milli=inventory.cpu_milli,
                memory_bytes=inventory.memory_bytes,
                gpus=as_placed(inventory.gpus, node.quarantined_gpus),
                features=frozenset(live.capabilities.features) if live is not None else frozenset(),
                host_network=pool is not None and pool.allow_host_network,
                driver_version=inventory.driver_version,
                cuda_version=inventory.cuda_version,
                domain=self.domain_of(node_id),
                gpu_hour_price_micros=pool.gpu_hour_price_micros if pool is not None else 0,
                reclaim_per_hour_ppm=pool.reclaim_per_hour_ppm if pool is not None else 0,
            )
        )

    # --- registered -------------------------------------------------------------------------------------------------

    @property
    def models(self) -> dict[str, Model]:
        """Models by id; read only."""
        return self.catalog.models

    @property
    def models_by_artifact(self) -> dict[str, tuple[str, ...]]:
        """Ids of the models with an artifact."""
        return self.catalog.by_artifact

    @property
    def models_by_digest(self) -> dict[str, tuple[str, ...]]:
        """Ids of the models with a manifest digest."""
        return self.catalog.by_digest

    @property
    def wishes(self) -> dict[str, dict[str, Wish]]:
        """Wishes by model and target; read only."""
        return self.catalog.wishes

    # --- derived ----------------------------------------------------------------------------------------------------

    def domain_of(self, node_id: str) -> str:
        """A node's failure domain: its pool's zone, else the pool."""
        node = self.nodes.get(node_id)
        pool = self.pools.get(node.pool) if node is not None else None
        return pool.domain if pool is not None else (node.pool if node is not None else "")

    def health_of(self, node_id: str) -> Health:
        """A node's health as an operator sees it."""
        node, live = self.nodes.get(node_id), self.live.get(node_id)
        if node is not None and node.revoked:
            return Health.REVOKED
        return live.health if live is not None else Health.JOINED

    def revision_of(self, app: App) -> Revision:
        """The revision that should run."""
        return self.revisions[(app.id, app.revision)]

    def scaling_of(self, app: App) -> Scaling:
        """Scaling in force: the revision's under the values set at run time."""
        scaling = self.revision_of(app).spec.scaling
        return app.scale.over(scaling) if app.scale is not None else scaling

    def scaling_for(self, runner: Runner) -> Scaling | None:
        """Scaling in force for a runner: its own revision's under the values set at run time."""
        app, revision = self.apps.get(runner.app), self.revisions.get((runner.app, runner.revision))
        if app is None or app.scale is None or revision is None:
            return revision.spec.scaling if revision is not None else None
        return app.scale.over(revision.spec.scaling)

    def find_node(self, name: str) -> Node | None:
        """A node by id or, where exactly one has it, by name."""
        node = self.nodes.get(name)
        if node is not None:
            return node
        named = [node for node in self.nodes.values() if node.name == name]
        return named[0] if len(named) == 1 else None


def _set(table: dict[Any, Any], key: object, value: object | None) -> None:
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def _group_of(runner: Runner) -> tuple[str, str]:
    return team_of(runner.id), runner.share_group


def _discard(index: dict[K, dict[str, None]], key: K, member: str) -> None:
    members = index[key]
    members.pop(member, None)
    if not members:
        del index[key]
