"""A cluster around the pure core, without I/O: simulated nodes run containers and tell what they see.

Shared by property tests and crash-point tests. Everything is drawn from one `Random`, so that a seed repeats a run.
The nodes follow the agent's contract: assignments are admitted once, a container that is in no assignment runs on, and
only a goal stops one. `check` compares the core's state with an independent reading of records and containers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from fal_contract.errors import FalError
from fal_scheduler.codec import decode, encode
from fal_scheduler.core import invariants, tokens
from fal_scheduler.core.cache_events import CachedFact, CacheTold
from fal_scheduler.core.catalog import Catalog
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.events import (
    ApplyApp,
    ApplyPool,
    Confirm,
    CordonNode,
    CreateToken,
    DeleteApp,
    Event,
    GatewayReach,
    Moment,
    NodeDisconnected,
    NodeHello,
    NodeReport,
    Outcome,
    Proceed,
    RedeemToken,
    ScaleApp,
    StopRunner,
    Tick,
)
from fal_scheduler.core.fleet import Fleet
from fal_scheduler.core.gpu_events import QuarantineGpu, ReleaseGpu
from fal_scheduler.core.model_events import (
    AddModel,
    AttestModel,
    CollectModels,
    RefuseModel,
    RevokeModel,
    StageModel,
)
from fal_scheduler.core.node_events import (
    CancelDrain,
    DeclareLost,
    DrainNode,
    LabelNode,
    NodeNotice,
    RebootRefused,
)
from fal_scheduler.core.place import Placer
from fal_scheduler.core.quota_events import SetQuota, UnsetQuota
from fal_scheduler.core.records import (
    Change,
    Goal,
    Meta,
    Model,
    PlacementRules,
    Pool,
    Record,
    Resources,
    RolloutPolicy,
    Runner,
    RunnerState,
    ScaleOverride,
    Scaling,
    Spec,
    Wish,
    key_of,
)
from fal_scheduler.core.rollout_events import SetRevision, SetRollout
from fal_scheduler.core.state import State
from fal_scheduler.core.step import Core
from fal_scheduler.core.suspicion import term_needed
from fal_scheduler.core.told import Capabilities, Gpu, GpuLink, Inventory, NodeLive, Resident, RunnerStatus
from fal_scheduler.core.views import runner_phase

GIB = 1 << 30
# Where apps of random histories want to be.
RULES = (
    *(PlacementRules() for _ in range(5)),
    PlacementRules(spread="node", anti_affinity=("other/app1",)),
    PlacementRules(spread="domain", labels_preferred={"disk": "nvme"}),
    PlacementRules(anti_affinity=("default/app0",), gpu_topology="nvlink"),
    PlacementRules(affinity_preferred=("default/app1",), wait_value_micros_s=5000),
)
MODELS = ("default/m0", "default/m1", "default/m2")
_FORWARD = {
    RunnerState.STAGING: RunnerState.SETUP,
    RunnerState.SETUP: RunnerState.IDLE,
    RunnerState.IDLE: RunnerState.RUNNING,
    RunnerState.RUNNING: RunnerState.IDLE,
}


class CountingIds:
    """Ids that count."""

    def __init__(self) -> None:
        self._next = 0

    def suffix(self) -> str:
        self._next += 1
        return f"{self._next:08d}"


def sim_gpus(node: str, count: int, model: str, gib: int, *, paired: bool = False) -> tuple[Gpu, ...]:
    """GPUs of one node; `paired` joins 0 with 1, 2 with 3 … by NVLink."""
    return tuple(
        Gpu(
            f"GPU-{node}-{at}",
            model,
            gib * GIB,
            index=at,
            links=(GpuLink(f"GPU-{node}-{at ^ 1}", "NVLINK", 4),) if paired and (at ^ 1) < count else (),
        )
        for at in range(count)
    )


def spec_of(
    *,
    gpus: int = 1,
    model: str = "",
    least: int = 1,
    most: int = 8,
    memory_gib: int = 1,
    tag: str = "",
    gpu_milli: int = 0,
    placement: PlacementRules | None = None,
) -> tuple[Spec, str]:
    """A spec and a digest that tells it from others."""
    spec = Spec(
        image="host",
        env={"TAG": tag} if tag else {},
        num_gpus=gpus,
        machine_type=(model,) if model else (),
        resources=Resources(1000, memory_gib * GIB),
        scaling=Scaling(min_concurrency=least, max_concurrency=most),
        gpu_milli=gpu_milli if gpus == 1 else 0,
        placement=placement or PlacementRules(),
    )
    return spec, f"digest of {spec!r}"


def admitted(runner: Runner) -> RunnerStatus:
    """What a node says of an assignment that it has just taken."""
    assert runner.assignment is not None
    return RunnerStatus(
        runner.id,
        RunnerState.STAGING,
        assignment_id=runner.assignment.id,
        term=runner.assignment.term,
        app=runner.app,
        revision=runner.revision,
        gpus=runner.gpus,
        share_group=runner.share_group,
        memory_bytes=runner.memory_bytes,
        cpu_milli=runner.cpu_milli,
        gpu_milli=runner.gpu_milli,
    )


@dataclass
class SimNode:
    """A machine whose agent follows the contract. `told` are statuses that the next report carries."""

    id: str
    inventory: Inventory
    session: int = 0
    connected: bool = False
    boot_id: str = ""
    term_seen: int = 0
    containers: dict[str, RunnerStatus] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)  # GPUs that two containers would have held
    changed_at: dict[str, int] = field(default_factory=dict)  # GPU → generation at which its fitness changed last
    retold: bool = False  # the inventory is told with the next report
    broken: set[str] = field(default_factory=set)  # models that do not load into a live worker

    def assign(self, runners: tuple[Runner, ...], *, term: int) -> None:
        """The whole assignment set, as Complete brings it."""
        if term < self.term_seen:
            return
        self.term_seen = term
        for runner in runners:
            self.put(runner)

    def put(self, runner: Runner) -> None:
        """One assignment: start it, or bring its goal along."""
        assert runner.assignment is not None
        have = self.containers.get(runner.id)
        if have is not None and have.ended and have.assignment_id != runner.assignment.id:
            have = None  # that one is over, and this is another assignment
        if have is None and runner.goal is Goal.RUN:
            self._admit(runner)
        elif have is None or have.ended:
            state = RunnerStatus(runner.id, RunnerState.TERMINATED, runner.assignment.id, reason="not here")
            self._set(have or state)
        elif runner.goal >= Goal.STOP:
            self._set(replace(have, state=RunnerState.TERMINATED, exit_code=143, reason=runner.goal_reason))
        elif runner.goal is Goal.DRAIN and have.state is not RunnerState.DRAINING:
            self._set(replace(have, state=RunnerState.DRAINING))
        elif have.serves and "/" not in runner.share_group:
            self._load(runner, have)

    def _load(self, runner: Runner, have: RunnerStatus) -> None:
        """What its worker has follows its assignment: what it began with is there, others come a step later."""
        told = {one.id: one for one in have.residents}
        found = []
        for at, one in enumerate(runner.residencies):
            if one.id not in told and (told or at):
                found.append(Resident(one.id, "staging"))
            elif one.id not in told:
                found.append(Resident(one.id, "loaded"))
            elif told[one.id].state != "staging":
                found.append(told[one.id])
            elif one.model in self.broken:
                found.append(Resident(one.id, "failed", "shapes differ"))
            else:
                found.append(Resident(one.id, "loaded", load_seconds=0.5))
        if tuple(found) != have.residents:
            self._set(replace(have, residents=tuple(found), app=runner.app, revision=runner.revision))

    def drop(self, runner_id: str) -> None:
        """The scheduler has forgotten it: an ended one is forgotten here too."""
        have = self.containers.get(runner_id)
        if have is not None and have.ended:
            del self.containers[runner_id]
            self.gone.append(runner_id)

    def _admit(self, runner: Runner) -> None:
        assert runner.assignment is not None
        there = [one for one in self.containers.values() if not one.ended]
        overlap = {gpu for gpu in runner.gpus if not _fits_beside(runner, [one for one in there if gpu in one.gpus])}
        status = admitted(runner)
        stale = {gpu for gpu in runner.gpus if 0 < runner.assignment.inventory_generation < self.changed_at.get(gpu, 0)}
        sick = {gpu.id for gpu in self.inventory.gpus if not gpu.healthy}
        if stale or not sick.isdisjoint(runner.gpus):
            status = replace(status, state=RunnerState.TERMINATED, refused=True, reason="GPU has changed", gpus=())
        elif overlap:
            self.doubled += sorted(overlap)
            status = replace(status, state=RunnerState.TERMINATED, refused=True, reason="GPU is held", gpus=())
        self._set(status)

    def _set(self, status: RunnerStatus) -> None:
        self.containers[status.runner_id] = status
        self.changed[status.runner_id] = None

    def advance(self, runner_id: str) -> None:
        """One container comes one phase further; a draining one ends."""
        have = self.containers[runner_id]
        if have.state is RunnerState.DRAINING:
            self._set(replace(have, state=RunnerState.TERMINATED, exit_code=0))
        elif have.state in _FORWARD:
            self._set(replace(have, state=_FORWARD[have.state]))

    def crash(self, runner_id: str) -> None:
        """One container exits by itself."""
        have = self.containers[runner_id]
        if not have.ended:
            self._set(replace(have, state=RunnerState.TERMINATED, exit_code=1, reason="exit code 1"))

    def wound(self, runner_id: str) -> None:
        """The monitor of one container that serves dies."""
        have = self.containers[runner_id]
        if have.serves:
            self._set(replace(have, wounded=True, reason="conmon died"))

    def judge(self, gpu_id: str, fault: str) -> None:
        """A GPU is found to be faulty, or with no fault to be well."""
        generation = self.inventory.generation + 1
        gpus = tuple(
            replace(gpu, healthy=not fault, health_class=fault, health_reason=f"it is {fault}" if fault else "")
            if gpu.id == gpu_id
            else gpu
            for gpu in self.inventory.gpus
        )
        self.inventory = replace(self.inventory, generation=generation, gpus=gpus)
        self.changed_at[gpu_id] = generation
        self.retold = True

    def use(self, runner_id: str, in_flight: int) -> None:
        """So many requests are under way in one container that serves; those of before have ended."""
        have = self.containers[runner_id]
        if have.serves and in_flight != have.in_flight:
            age_s = -1.0 if in_flight and not have.served else 0.0
            self._set(replace(have, in_flight=in_flight, served=have.served + have.in_flight, last_used_age_s=age_s))

    def hello(self, now_s: float, meta: Meta) -> NodeHello:
        """A new session with everything."""
        self.session += 1
        self.connected = True
        self.retold = False
        self.changed.clear()
        self.gone.clear()
        return NodeHello(
            self.id,
            f"{self.id}-s{self.session}",
            self.boot_id or f"boot-{self.id}",
            now_s,
            cluster_id=meta.cluster_id,
            epoch_seen=meta.epoch,
            term_seen=self.term_seen,
            incarnation=meta.incarnation,
            inventory=self.inventory,
            statuses=tuple(self.containers.values()),
            capabilities=Capabilities(features=("reboot",)),
        )

    def report(self, now_s: float) -> NodeReport:
        """What changed since the last one."""
        statuses = tuple(self.containers[id_] for id_ in self.changed if id_ in self.containers)
        inventory, self.retold = self.inventory if self.retold else None, False
        told = NodeReport(
            self.id, f"{self.id}-s{self.session}", now_s, statuses=statuses, gone=tuple(self.gone), inventory=inventory
        )
        self.changed.clear()
        self.gone.clear()
        return told


def _fits_beside(runner: Runner, holders: list[RunnerStatus]) -> bool:
    """Whether a GPU with these holders may be given to the runner as well."""
    if not holders:
        return True
    teams = {one.runner_id.split("/")[0] for one in holders} | {runner.id.split("/")[0]}
    shares = [runner.gpu_milli, *(one.gpu_milli for one in holders)]
    return all(shares) and sum(shares) <= 1000 and len(teams) == 1


class World:
    """Core and nodes. `step` does one event and checks everything after it."""

    def __init__(self, rng: Random, *, nodes: int = 4) -> None:
        self.rng = rng
        self.now_s = 1000.0
        self.core = self._core()
        self.nodes: dict[str, SimNode] = {}
        self.steps = 0
        self._found(nodes)

    def _core(self) -> Core:
        state = State()
        state.term, state.term_began_s, state.grace_over = 1, self.now_s - 400.0, True
        state.apply(Change("meta", None, Meta("c1", 1, "store-1", 0.0)))
        return Core(state, Placer(state.fleet), CountingIds())

    def core_of(self, state: State) -> Core:
        """The next leader's, which draws ids that none before has drawn."""
        return Core(state, Placer(state.fleet), self.core.ids)

    def _found(self, nodes: int) -> None:
        for pool, zone in (("east", "z1"), ("west", "z2")):
            price, reclaim_ppm = (3_000_000, 0) if pool == "east" else (2_000_000, 20_000)
            self.step(ApplyPool(Pool(pool, zone=zone, gpu_hour_price_micros=price, reclaim_per_hour_ppm=reclaim_ppm)))
            token = tokens.create(
                f"t-{pool}", "secret", pool=pool, ttl_s=86400.0, uses=1000, created_by="op", now_s=self.wall_s
            )
            self.step(CreateToken(token))
        for at in range(nodes):
            node_id = f"n-{at}"
            self.step(RedeemToken(f"t-{'east' if at % 2 else 'west'}", "secret", node_id, f"node{at}"))
            model, gib = (("H100-80GB", 80), ("A100-40GB", 40))[at % 3 == 2]
            gpus = sim_gpus(node_id, 2 + 2 * (at % 2), model, gib, paired=True)
            self.nodes[node_id] = SimNode(node_id, Inventory(1, gpus, "555", "12.4", 16_000, 64 * GIB))
            self.hello(node_id)

    @property
    def state(self) -> State:
        return self.core.state

    @property
    def wall_s(self) -> float:
        return 1_700_000_000.0 + self.now_s

    def step(self, event: Event) -> Outcome | None:
        """One event; None where it was refused. Also: taken back and done again, it comes to the same."""
        state = self.state
        needed = term_needed(state, event)
        state.term = max(state.term, needed)
        before = _records(state)
        remedy = ""
        outcome: Outcome | None
        try:
            outcome = self.core.step(event, Moment(self.now_s, self.wall_s))
        except FalError as refusal:
            remedy = refusal.remedy
            outcome = None
        if outcome is None:
            assert remedy, "an error without a remedy"
            assert _records(state) == before, "a refused command changed something"
            self.check()
            return None
        self.check_changes(outcome, before)
        if outcome.changes or outcome.effects:  # a heartbeat of a healthy node does neither
            self.check()
        self.steps += 1
        return outcome

    def settle(self) -> None:
        """Let a big plan go on until nothing is left to do."""
        for _ in range(1000):
            if not self.state.dirty:
                return
            self.step(Proceed())
        raise AssertionError(f"never done: {list(self.state.dirty)}")

    # --- nodes ------------------------------------------------------------------------------------------------------

    def hello(self, node_id: str) -> None:
        """A node begins a session and is told its assignments."""
        meta = self.state.meta
        assert meta is not None
        self.step(self.nodes[node_id].hello(self.now_s, meta))
        self.deliver(node_id)

    def deliver(self, node_id: str) -> None:
        """The node learns all of its assignments, and forgets what the scheduler forgot."""
        state, node = self.state, self.nodes[node_id]
        live = state.live.get(node_id)
        if not node.connected or (live is not None and live.hold):
            return
        mine = tuple(state.runners[id_] for id_ in state.runners_by_node.get(node_id, ()))
        node.assign(mine, term=state.term)
        for runner_id in [id_ for id_ in node.containers if id_ not in state.runners]:
            node.drop(runner_id)

    def report(self, node_id: str) -> None:
        """A node tells what changed, if its line stands."""
        if self.nodes[node_id].connected:
            self.step(self.nodes[node_id].report(self.now_s))

    def cut(self, node_id: str) -> None:
        """A node's line breaks."""
        node = self.nodes[node_id]
        node.connected = False
        self.step(NodeDisconnected(node_id, f"{node_id}-s{node.session}"))

    def tick(self, seconds_s: float) -> None:
        """Time passes; connected nodes have sent heartbeats."""
        self.now_s += seconds_s
        for node_id, node in self.nodes.items():
            if node.connected:
                self.step(NodeReport(node_id, f"{node_id}-s{node.session}", self.now_s))
        self.step(Tick())

    def heal(self, rounds: int = 60) -> None:
        """Faults stop; agents do their work until everything rests."""
        for node_id, node in self.nodes.items():
            if not node.connected:
                self.hello(node_id)
        for gateway_id in ("g1", "g2"):
            self.step(DemandTold(gateway_id, (), self.now_s))
        for node_id, node in self.nodes.items():
            for gpu in node.inventory.gpus:
                node.judge(gpu.id, "")
                self.step(ReleaseGpu(node_id, gpu.id))
            self.report(node_id)
        for node in self.nodes.values():
            for runner_id in list(node.containers):
                node.use(runner_id, 0)
        for what in ("node", "store", "stop", "stops"):
            self.step(Confirm(what))
        self.step(UnsetQuota("default"))
        for node_id in self.nodes:
            self.step(CancelDrain(node_id))
        for app_id in list(self.state.rolling):
            for action in ("resume", "promote"):
                self.step(SetRollout(app_id, action))
        for _ in range(rounds):
            self.settle()
            for node_id, node in self.nodes.items():
                self.deliver(node_id)
                for runner_id, status in list(node.containers.items()):
                    if status.state in (RunnerState.STAGING, RunnerState.SETUP, RunnerState.DRAINING):
                        node.advance(runner_id)
                self.report(node_id)
            self.step(Confirm("stops"))
            self.tick(15.0)

    # --- checks -----------------------------------------------------------------------------------------------------

    def check_changes(self, outcome: Outcome, before: dict[str, object]) -> None:
        """Changes say exactly what became of the records, and come back the same from their bytes."""
        for change in outcome.changes:
            assert before.get(change.key) == change.before
            if change.after is None:
                before.pop(change.key, None)
            else:
                before[change.key] = change.after
                assert decode(change.key, encode(change.after)) == change.after
        assert before == _records(self.state)

    def check(self) -> None:
        """Everything that must hold after every step."""
        state = self.state
        assert not [found for part in invariants.audit(state) for found in part]
        _check_promises(self)
        check_indexes(state)
        for runner in state.runners.values():
            phase = runner_phase(state, runner)
            assert phase.reason or phase.state in (RunnerState.IDLE, RunnerState.RUNNING), (runner, phase)
        for node in self.nodes.values():
            assert not node.doubled, f"{node.id} was asked to share {node.doubled}"


def _check_promises(world: World) -> None:
    """By the records and the machines alone: a GPU is promised to one runner, and exists."""
    promised: dict[str, list[Runner]] = {}
    for runner in world.state.runners.values():
        for gpu in runner.gpus:
            promised.setdefault(gpu, []).append(runner)
            assert gpu in {one.id for one in world.nodes[runner.node].inventory.gpus}
    for gpu, runners in promised.items():
        ids = [runner.id for runner in runners]
        whole = len(ids) == 1 or all(runner.gpu_milli for runner in runners)
        assert whole, f"{gpu} is promised to {ids}"
        assert sum(runner.gpu_milli for runner in runners) <= 1000, f"{gpu} is promised to {ids}"
        assert len({id_.split("/")[0] for id_ in ids}) == 1, f"{gpu} is shared by teams: {ids}"
    for node in world.nodes.values():
        memory = sum(one.memory_bytes for one in world.state.runners.values() if one.node == node.id)
        assert memory <= node.inventory.memory_bytes


def check_indexes(state: State) -> None:
    """Every index follows from records and what was told."""
    by_app: dict[str, set[str]] = {}
    by_node: dict[str, set[str]] = {}
    by_group: dict[tuple[str, str], set[str]] = {}
    for runner in state.runners.values():
        for app_id in runner.apps:
            by_app.setdefault(app_id, set()).add(runner.id)
        by_group.setdefault((runner.id.partition("/")[0], runner.share_group), set()).add(runner.id)
        if runner.node:
            by_node.setdefault(runner.node, set()).add(runner.id)
    assert {key: set(ids) for key, ids in state.runners_by_app.items()} == by_app
    assert {key: set(ids) for key, ids in state.runners_by_node.items()} == by_node
    assert {key: set(ids) for key, ids in state.runners_by_group.items()} == by_group
    told = {(live.node_id, runner_id) for live in state.live.values() for runner_id in live.orphans}
    assert set(state.orphans) == told
    fresh = Fleet()
    for facts in state.fleet.facts.values():
        fresh.set_node(facts)
    for runner in state.runners.values():
        if runner.node:
            holds = runner.gpus, runner.memory_bytes, runner.cpu_milli, runner.gpu_milli
            fresh.hold(runner.node, runner.id, *holds, runner.apps)
    for node_id, runner_id in state.orphans:
        status = state.live[node_id].orphans[runner_id]
        holds = status.gpus, status.memory_bytes, status.cpu_milli, status.gpu_milli
        fresh.hold(node_id, runner_id, *holds, (status.app,))
    catalog = Catalog()
    for model in state.models.values():
        catalog.set_model(None, model)
    assert {k: set(ids) for k, ids in catalog.by_artifact.items()} == {
        k: set(v) for k, v in state.models_by_artifact.items()
    }
    assert {k: set(ids) for k, ids in catalog.by_digest.items()} == {
        k: set(v) for k, v in state.models_by_digest.items()
    }
    for kind in ("", "model", "lora"):
        assert catalog.page(kind=kind, limit=100) == state.catalog.page(kind=kind, limit=100)
    have, expected = state.fleet.fresh(), fresh.fresh()
    for column, values in vars(expected).items():
        if isinstance(values, np.ndarray):
            assert (getattr(have, column) == values).all(), column
    assert have.nodes_of_app == expected.nodes_of_app
    assert have.domains_of_app == expected.domains_of_app
    assert have.occupancy.keys() >= expected.occupancy.keys()


def records_of(state: State) -> list[Record]:
    """All that the store has."""
    return [record for record in _records(state).values() if record is not None]  # type: ignore[misc]


def _records(state: State) -> dict[str, object]:
    tables = (state.pools, state.nodes, state.tokens, state.revocations, state.apps, state.revisions)
    found: dict[str, object] = {"meta": state.meta}
    more = (state.models, state.runners, state.usage, state.usage_days, state.quotas, state.learnt)
    for table in (*tables, *more):
        found.update({key_of(record): record for record in table.values()})  # type: ignore[attr-defined]
    found.update({key_of(wish): wish for wish in state.catalog.all_wishes()})
    return found


def random_step(world: World) -> None:
    """One random thing happens, to operators, nodes or the line between."""
    rng, state = world.rng, world.state
    node_id = rng.choice(sorted(world.nodes))
    node = world.nodes[node_id]
    app_id = rng.choice(("default/app0", "default/app1", "default/app2", "default/app3", "other/app0", "other/app1"))
    match rng.randrange(29):
        case 28:
            _random_gpu_step(world, node_id)
        case 26 | 27:
            _random_demand(world, app_id)
        case 0 | 1:
            spec, digest = spec_of(
                gpus=rng.choice((0, 1, 1, 2, 4)),
                model=rng.choice(("", "", "H100-80GB", "A100-40GB", "B200-180GB")),
                least=rng.randrange(4),
                memory_gib=rng.choice((1, 8, 30)),
                tag=str(rng.randrange(3)),
                gpu_milli=rng.choice((0, 0, 0, 300, 500)),
                placement=rng.choice(RULES),
            )
            if rng.randrange(2) == 0:
                spec, digest = replace(spec, model=rng.choice(MODELS)), f"{digest} with a model"
            if rng.randrange(3) == 0:
                spec, digest = replace(spec, priority=rng.choice((-20, 20))), f"{digest} of some priority"
            if rng.randrange(2) == 0:
                policy = RolloutPolicy(
                    strategy=rng.choice(("", "", "", "recreate")),
                    canary_perc=rng.choice((0, 0, 30)),
                    no_rollback=rng.randrange(4) == 0,
                    deadline_s=rng.choice((0.0, 30.0)),
                    canary_hold_s=rng.choice((0.0, 10.0)),
                )
                spec, digest = replace(spec, rollout=policy), f"{digest} with {policy}"
            world.step(ApplyApp(app_id, spec, digest, rng.choice((None, None, 0, 1))))
        case 2:
            world.step(ScaleApp(app_id, ScaleOverride(min_concurrency=rng.randrange(6)), reset=rng.randrange(5) == 0))
        case 3:
            if rng.randrange(5) < 2:
                world.step(DeleteApp(app_id))
        case 4:
            world.step(CordonNode(node_id, rng.randrange(5) < 2, "test"))
        case 5:
            if state.runners:
                world.step(StopRunner(rng.choice(sorted(state.runners)), kill=rng.randrange(2) == 0))
        case 6:
            if node.connected:
                world.cut(node_id)
        case 7:
            world.hello(node_id)
        case 8 | 9:
            world.tick(rng.choice((1.0, 1.0, 5.0, 20.0, 70.0)))
        case 10:
            running = [id_ for id_, one in node.containers.items() if not one.ended]
            if running:
                node.crash(rng.choice(running))
        case 11 | 12:
            free = {gpu.id for gpu in node.inventory.gpus} - {
                gpu for one in node.containers.values() for gpu in one.gpus
            }
            promised = {gpu for one in state.runners.values() for gpu in one.gpus}
            if free - promised:
                _plant_orphan(world, node, min(free - promised))
        case 14:
            world.step(Confirm(rng.choice(("adopt", "stop", "stops", "store", "node"))))
        case 15 | 16 | 17:
            _random_model_step(world)
        case 25:
            running = sorted(id_ for id_, one in node.containers.items() if one.serves)
            if running:
                node.wound(rng.choice(running))
        case 23:
            _random_node_step(world, node_id)
        case 24 if rng.randrange(2):
            world.step(SetRollout(app_id, rng.choice(("pause", "resume", "promote", "abort"))))
        case 24:
            world.step(SetRevision(app_id, rng.randrange(4)))
        case 13:
            world.step(GatewayReach("g1", {node_id: "direct"}, world.now_s))
        case _:
            world.deliver(node_id)
            for runner_id in list(node.containers):
                if rng.randrange(10) < 7:
                    node.advance(runner_id)
            world.report(node_id)


def _random_demand(world: World, app_id: str) -> None:
    """A gateway tells what waits, or that nothing does; requests begin and end on runners."""
    rng = world.rng
    gateway_id = rng.choice(("g1", "g2"))
    if rng.randrange(4) == 0:
        world.step(DemandTold(gateway_id, (), world.now_s))
    else:
        queued, slots = rng.randrange(4), rng.randrange(3)
        asked = AppDemand(app_id, "", "", slots, queued, rng.randrange(60_000), rng.randrange(-1, 2), rng.randrange(3))
        world.step(DemandTold(gateway_id, (asked,), world.now_s))
    for node_id, node in world.nodes.items():
        for runner_id in list(node.containers):
            node.use(runner_id, rng.randrange(2))
        world.report(node_id)


def _reboot_or_not(world: World, node_id: str, live: NodeLive) -> None:
    """A node that was told to reboot does, or says why not."""
    node = world.state.nodes.get(node_id)
    if node is None or node.drain is None or not node.drain.boot_id:
        return
    if world.rng.randrange(2):
        told = node.drain.boot_id
        world.step(RebootRefused(node_id, live.session_id, told, "no power", "Go and look.", world.now_s))
        return
    world.nodes[node_id].boot_id = f"boot-{node_id}-{world.steps}"
    world.hello(node_id)


def _random_node_step(world: World, node_id: str) -> None:
    """A drain, its end, a notice, a label: what becomes of nodes that are there."""
    rng, live = world.rng, world.state.live.get(node_id)
    match rng.randrange(6):
        case 0:
            kind, deadline_s = rng.choice(("drain", "maintenance", "reboot")), rng.choice((None, 30.0))
            world.step(
                DrainNode(node_id, kind, deadline_s, force=rng.randrange(6) == 0, uncordon=rng.randrange(2) == 0)
            )
        case 1:
            world.step(CancelDrain(node_id))
        case 2 if live is not None:
            kind, within_s = rng.choice(("spot", "notice", "")), rng.choice((60.0, -1.0))
            world.step(NodeNotice(node_id, live.session_id, kind, within_s, "told by the cloud", world.now_s))
        case 3 if live is not None and rng.randrange(2):
            _reboot_or_not(world, node_id, live)
        case 3:
            world.step(LabelNode(node_id, {"rack": str(rng.randrange(3))}))
        case 4 if rng.randrange(2):
            world.step(SetQuota("default", 1000 * rng.randrange(8), rng.randrange(2) == 0))
        case 4:
            world.step(UnsetQuota("default"))
        case _:
            world.step(DeclareLost(rng.choice(("east", "west"))))


def _random_gpu_step(world: World, node_id: str) -> None:
    """A GPU's fault is found or passes, told at once or later; an operator takes one out or gives it back."""
    rng, node = world.rng, world.nodes[node_id]
    gpu = rng.choice(node.inventory.gpus).id
    match rng.randrange(6):
        case 0:
            world.step(QuarantineGpu(node_id, gpu, "test"))
        case 1:
            world.step(ReleaseGpu(node_id, gpu))
        case 2:
            node.judge(gpu, "")
        case _:
            node.judge(gpu, rng.choice(("reset", "dead", "foreign", "slow")))
    if rng.randrange(2):
        world.report(node_id)


def _random_cache_news(world: World, node_id: str, artifact: str) -> None:
    """A cache tells what it holds and how fast bytes come, or is forgotten."""
    rng = world.rng
    if rng.randrange(8) == 0:
        world.step(CacheTold(node_id, world.now_s, left=True))
        return
    ready = rng.randrange(2) == 0
    fact = CachedFact(rng.randrange(10**9), 0, ready, not ready, 0 if ready else rng.randrange(10**9))
    rates = {"origin:b": rng.randrange(10**9), "peer:n-0": rng.randrange(10**9)}
    whole = rng.randrange(4) == 0
    world.step(CacheTold(node_id, world.now_s, {artifact: fact}, rates=rates, fed_bytes_s=10**9, whole=whole))


def _random_model_step(world: World) -> None:
    """Operators and the registrar do something about a model."""
    rng = world.rng
    id_ = rng.choice(MODELS)
    artifact = f"{rng.randrange(3)}" * 64
    match rng.randrange(13):
        case 10 | 11 | 12:
            _random_cache_news(world, rng.choice(sorted(world.nodes)), artifact)
        case 0 | 1 | 2 | 3:
            world.step(AddModel(Model(id_, rng.choice(("model", "lora")), "s3://b/m", artifact_id=artifact)))
        case 4:
            world.step(AttestModel(id_, artifact, 1, 1))
        case 5 | 6:
            world.step(RefuseModel(id_, "wrong bytes"))
        case 7:
            world.step(StageModel(Wish(id_, rng.choice(("pool/east", "node/node1", "replicas")), rng.randrange(2))))
        case 8:
            world.step(CollectModels(MODELS))
        case 9:
            world.step(RevokeModel(id_, "licence ended"))


def _plant_orphan(world: World, node: SimNode, gpu: str) -> None:
    """A container that the store does not know, on a GPU that nobody was promised. Told before anything else."""
    runner_id = f"default/orphan-{world.rng.randrange(10**6)}"
    status = RunnerStatus(runner_id, RunnerState.IDLE, f"a-{runner_id}", 1, "default/app0", 1, gpus=(gpu,))
    if node.connected:
        node.containers[runner_id] = status
        node.changed[runner_id] = None
        world.report(node.id)
