"""A fleet of hundreds of machines for days of virtual time: the production core around modelled nodes and requests.

    world = FleetWorld(seed, nodes=200); world.run(hours=48)     # raises Broken, with the rule and the last events

Lighter than `sim.cluster`, which runs the agents' real code: here a machine is a `FleetNode`, a leader is the core with
a `FleetStore` around it, and requests are numbers (how many of an app are under way or wait), not messages. One seed
decides everything; `digest` is of all that was done. Faults and operators are `fleet_faults`, rules `fleet_checker`.

A run is made of chapters: faults and commands, then a calm in which everything heals and must come to rest.
`load`: what is asked at most, as a share of the fleet, roughly.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from core_world import GIB, CountingIds, sim_gpus
from fal_scheduler.core import tokens
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.events import (
    ApplyApp,
    ApplyPool,
    CreateToken,
    Event,
    NodeDisconnected,
    RedeemToken,
)
from fal_scheduler.core.quota_events import SetQuota
from fal_scheduler.core.records import (
    Change,
    Goal,
    Meta,
    PlacementRules,
    Pool,
    Resources,
    Revision,
    RolloutPolicy,
    Runner,
    RunnerState,
    Scaling,
    Spec,
)
from fal_scheduler.core.told import Inventory
from sim.fleet_checker import FleetChecker
from sim.fleet_faults import Faults
from sim.fleet_leader import FleetStore, Leader
from sim.fleet_node import Box, FleetNode

POOLS: Final = (  # name, zone, GPU, GiB, GPUs a node, share of the nodes, spot
    ("h100", "z1", "H100-80GB", 80, 4, 4, False),
    ("a100", "z2", "A100-40GB", 40, 2, 3, False),
    ("spot", "z3", "L40S-48GB", 48, 1, 3, True),
)
GATEWAYS: Final = 5
FLUSH_S: Final = 0.1
LEVEL_EVERY_S: Final = (300.0, 1200.0)
LAST_EVENTS: Final = 40
DAY_S: Final = 86_400.0


class Broken(AssertionError):
    """A rule was broken."""


@dataclass(slots=True)
class App:
    """One app of the fleet and what is asked of it. `level`: requests that are under way or wait."""

    id: str
    at: int
    kind: str
    spec: Spec
    peak: int = 0
    phase_s: float = 0.0
    takes_s: float = 20.0
    level: int = 0
    queued: int = 0
    queued_since_s: float = 0.0
    arrived: float = 0.0
    changed_s: float = 0.0
    version: int = 0
    bad: dict[int, None] = field(default_factory=dict)  # versions whose containers end in their setup
    boxes: dict[str, Box] = field(default_factory=dict)  # live ones on machines that run, by runner
    levels: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=16))

    @property
    def gateway(self) -> int:
        """Which gateway its requests come through."""
        return self.at % GATEWAYS

    def most_lately(self, now_s: float, within_s: float) -> int:
        """The highest level of the last seconds."""
        return max((level for at_s, level in self.levels if now_s - at_s <= within_s), default=0)


class FleetWorld:
    """See the module. `now_s` is the world's time from 0; wall clocks are apart from it by their skew."""

    def __init__(self, seed: int, *, nodes: int = 200, apps: int = 40, load: float = 1.0, elide: bool = True) -> None:
        self.rng = Random(seed)
        self.seed, self.elide = seed, elide
        self.now_s = 0.0
        self.ids = CountingIds()
        self.store = FleetStore()
        self.store.commit([Change("meta", None, Meta("c1", 1, "store-1", 0.0))])
        self.nodes: dict[str, FleetNode] = {}
        self.apps: dict[str, App] = {}
        self.homes: dict[str, dict[str, None]] = {}  # runner -> machines with a live container of it
        self.last: deque[str] = deque(maxlen=LAST_EVENTS)
        self._hash = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._flushes: dict[str, None] = {}
        self._tellings: dict[int, None] = {}
        self._told: dict[int, tuple[AppDemand, ...]] = {}
        self.chaos = False
        self.checker = FleetChecker(self)
        self.leader: Leader | None = None
        self.offsets = Random(seed + 1)
        self.take_over()
        self._found(nodes)
        self.faults = Faults(self)
        self._deploy(apps, load)

    # --- time -------------------------------------------------------------------------------------------------------

    def after(self, wait_s: float, act: Callable[[], None]) -> None:
        """Do something later."""
        self._order += 1
        heapq.heappush(self._heap, (self.now_s + wait_s, self._order, act))

    def soon(self, act: Callable[[], None]) -> None:
        """Do something next."""
        self.after(0.0, act)

    def run(self, *, hours: float, chapter_hours: float = 6.0, calm_s: float = 2700.0) -> None:
        """Chapters of faults and calm."""
        end_s = self.now_s + hours * 3600.0
        while self.now_s < end_s - 1.0:
            chapter_s = min(chapter_hours * 3600.0, end_s - self.now_s)
            self.chaos = True
            self.until(self.now_s + max(0.0, chapter_s - calm_s))
            self.chaos = False
            self.faults.heal()
            self.until(self.now_s + min(calm_s, chapter_s))
            self.checker.everything()
            self.checker.at_rest()

    def until(self, end_s: float) -> None:
        """Let time pass."""
        while True:
            item_s = self._heap[0][0] if self._heap else math.inf
            tick_s = self.leader.next_tick_s() if self.leader is not None and not self.leader.deaf else math.inf
            if min(item_s, tick_s) > end_s:
                self.now_s = end_s
                return
            if tick_s < item_s:
                self.now_s = max(self.now_s, tick_s)
                assert self.leader is not None
                self.leader.tick()
            else:
                self.now_s, _, act = heapq.heappop(self._heap)
                act()

    def trace(self, what: str) -> None:
        """Something was done: part of the digest, and of what is shown when a rule breaks."""
        line = f"{self.now_s:.2f} {what}"
        self.last.append(line)
        self._hash.update(line.encode())

    @property
    def digest(self) -> str:
        """Of everything done so far."""
        return self._hash.hexdigest()

    # --- schedulers -------------------------------------------------------------------------------------------------

    def offer(self, event: Event) -> None:
        """The leader is told, where there is one."""
        if self.leader is not None:
            self.leader.offer(event)

    def take_over(self, *, skew_s: float = 0.0) -> None:
        """A scheduler leads on what the store has. Nodes find it within some seconds."""
        self.leader = Leader(self, offset_s=self.offsets.uniform(0.0, 1e6), skew_s=skew_s)
        self.trace(f"term {self.store.term}")
        for node in self.nodes.values():
            node.connected = False
            self.after(self.rng.uniform(0.05, 3.0), lambda node=node: self.connect(node.id))
        self._told.clear()
        for gateway in range(GATEWAYS):
            self.tell(gateway)

    # --- founding ---------------------------------------------------------------------------------------------------

    def _found(self, count: int) -> None:
        rng = self.rng
        kinds = [pool for pool in POOLS for _ in range(pool[5])]
        for name, zone, _, _, _, _, spot in POOLS:
            price = 2_000_000 if spot else 3_000_000
            self.offer(ApplyPool(Pool(name, zone=zone, spot=spot, gpu_hour_price_micros=price)))
            token = tokens.create(
                f"t-{name}", "secret", pool=name, ttl_s=86400.0, uses=1000, created_by="op", now_s=1_700_000_000.0
            )
            self.offer(CreateToken(token))
        for at in range(count):
            name, zone, model, gib, gpus, _, _ = kinds[at % len(kinds)]
            node_id = f"n-{at:03d}"
            inventory = Inventory(1, sim_gpus(node_id, gpus, model, gib), "555", "12.4", 64_000, 256 * GIB)
            node = FleetNode(node_id, name, zone, inventory, rng.uniform(0.0, 5.0), rng.uniform(-2.0, 2.0))
            self.nodes[node_id] = node
            self.offer(RedeemToken(f"t-{name}", "secret", node_id, f"node{at:03d}"))
            self.connect(node_id)

    def _deploy(self, count: int, load: float) -> None:
        slots = sum(len(node.inventory.gpus) for node in self.nodes.values())
        for team, share, borrow in (("media", 0.3, True), ("batch", 0.2, True), ("strict", 0.1, False)):
            self.offer(SetQuota(team, int(slots * share) * 1000, borrow))
        for at in range(count):
            app = make_app(self.rng, at, load * slots / max(1, count))
            self.apps[app.id] = app
            self.apply(app)
            self.after(self.rng.uniform(0.0, 300.0), lambda app=app: self._level(app))

    def apply(self, app: App) -> None:
        """Deploy its spec as it is now."""
        self.offer(ApplyApp(app.id, app.spec, f"digest of {app.spec!r}"))

    # --- nodes ------------------------------------------------------------------------------------------------------

    def silent(self) -> list[FleetNode]:
        """Machines that say nothing."""
        return [node for node in self.nodes.values() if not (node.connected and node.talks)]

    def connect(self, node_id: str) -> None:
        """A node finds the leader and says Hello."""
        node, leader = self.nodes[node_id], self.leader
        if not node.talks:
            return
        if leader is None or leader.deaf:
            self.after(1.0, lambda: self.connect(node_id))
            return
        meta = leader.state.meta
        assert meta is not None
        leader.hear(node)
        leader.heard_s[node_id] = self.now_s
        leader.offer(node.hello(leader.now_s, meta, self.now_s))
        leader.deliver_all(node)
        self._routes(node.live())

    def cut(self, node: FleetNode, *, noticed: bool) -> None:
        """A node's line breaks; `noticed`: at once."""
        if self.leader is not None:
            self.leader.hear(node)
        node.muted, node.connected = True, False
        if noticed:
            self.offer(NodeDisconnected(node.id, node.session_id))

    def mend(self, node: FleetNode) -> None:
        """Its line stands again."""
        if node.muted:
            node.muted = False
            self.connect(node.id)

    def crash(self, node: FleetNode) -> None:
        """The machine stops; what ran on it is gone."""
        if self.leader is not None:
            self.leader.hear(node)
        node.up, node.connected = False, False
        for box in node.live():
            self._end(node, box, "the machine went down", 137)

    def boot(self, node: FleetNode) -> None:
        """The machine starts again."""
        if not node.up:
            node.up, node.boot = True, node.boot + 1
            self.connect(node.id)

    def reboot(self, node_id: str) -> None:
        """The scheduler told an empty machine to reboot."""
        node = self.nodes[node_id]
        if node.up:
            self.crash(node)
            self.after(self.rng.uniform(30.0, 200.0), lambda: self.boot(node))

    def assigned(self, node: FleetNode, runner: Runner, term: int) -> None:
        """A node is told an assignment."""
        box = node.take(runner, term, self.now_s)
        if box is not None:
            match box.goal:
                case Goal.RUN:
                    self._start(node, box)
                case Goal.DRAIN:
                    self._drain(node, box)
                case _:
                    wait_s = 0.0 if box.goal is Goal.KILL else self.rng.uniform(0.2, 5.0)
                    self._then(node, box, wait_s, lambda: self._end(node, box, runner.goal_reason, 143))
        self.flush(node)

    def dropped(self, node: FleetNode, runner_id: str) -> None:
        """A node is told that a runner is forgotten."""
        node.drop(runner_id)
        self.flush(node)

    def flush(self, node: FleetNode) -> None:
        """The node reports within a moment."""
        if (node.changed or node.forgotten or node.retold) and node.id not in self._flushes:
            self._flushes[node.id] = None
            self.after(FLUSH_S, lambda: self._flush(node))

    def _flush(self, node: FleetNode) -> None:
        self._flushes.pop(node.id, None)
        leader = self.leader
        if leader is None or not (node.connected and node.talks) or not (node.changed or node.forgotten or node.retold):
            return
        fresh = [box for id_ in node.changed if (box := node.boxes.get(id_)) is not None and not box.routed]
        leader.offer(node.report(leader.now_s, self.now_s))
        self._routes([box for box in fresh if box.routed])

    def _routes(self, boxes: list[Box]) -> None:
        """Gateways learn of runners that serve."""
        for app_id in dict.fromkeys(box.runner.app for box in boxes):
            if app_id in self.apps:
                self.spread(self.apps[app_id])

    # --- containers -------------------------------------------------------------------------------------------------

    def _then(self, node: FleetNode, box: Box, wait_s: float, act: Callable[[], None]) -> None:
        """Later, if the container still lives."""

        def due() -> None:
            if box.live and node.boxes.get(box.runner.id) is box:
                act()
                self.flush(node)

        self.after(wait_s, due)

    def _start(self, node: FleetNode, box: Box) -> None:
        app = self.apps.get(box.runner.app)
        self.homes.setdefault(box.runner.id, {})[node.id] = None
        self.checker.started(node, box)
        if app is not None:
            app.boxes[box.runner.id] = box

        def set_up() -> None:
            if box.goal is Goal.RUN:
                node.become(box, RunnerState.SETUP, self.now_s)
                version = int(self.version_of(box))
                if app is not None and version in app.bad:
                    self._then(node, box, self.rng.uniform(2.0, 10.0), lambda: self._end(node, box, "exit code 1", 1))
                else:
                    self._then(node, box, self.rng.uniform(3.0, 40.0), ready)

        def ready() -> None:
            if box.goal is Goal.RUN:
                node.become(box, RunnerState.IDLE, self.now_s)

        self._then(node, box, self.rng.uniform(0.5, 30.0), set_up)

    def version_of(self, box: Box) -> str:
        """The version that its revision's environment names."""
        found = self.store.records.get(_revision_key(box.runner))
        return found.spec.env.get("V", "0") if isinstance(found, Revision) else "0"

    def _drain(self, node: FleetNode, box: Box) -> None:
        app = self.apps.get(box.runner.app)
        starting = not box.serves
        node.become(box, RunnerState.DRAINING, self.now_s)
        takes_s = self.rng.uniform(0.1, app.takes_s) if app is not None and box.in_flight and not starting else 0.2
        self._then(node, box, takes_s, lambda: self._end(node, box, "drained", 0))
        if app is not None:
            self.spread(app)

    def _end(self, node: FleetNode, box: Box, reason: str, exit_code: int) -> None:
        self.checker.ended(node, box, reason)
        node.become(box, RunnerState.TERMINATED, self.now_s, reason=reason, exit_code=exit_code)
        homes = self.homes.get(box.runner.id)
        if homes is not None:
            homes.pop(node.id, None)
            if not homes:
                del self.homes[box.runner.id]
        app = self.apps.get(box.runner.app)
        if app is not None:
            app.boxes.pop(box.runner.id, None)
            self.spread(app)

    def fail(self, node: FleetNode, box: Box, reason: str = "exit code 1") -> None:
        """A container ends by itself."""
        self._end(node, box, reason, 1)
        self.flush(node)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _level(self, app: App) -> None:
        """What is asked of an app changes with the hour."""
        if app.id not in self.apps:
            return
        app.arrived += app.level * (self.now_s - app.changed_s) / app.takes_s
        app.changed_s = self.now_s
        app.levels.append((self.now_s, app.level))
        app.level = level_of(self.rng, app, self.now_s)
        app.levels.append((self.now_s, app.level))
        self.spread(app)
        self.tell(app.gateway)
        self.after(self.rng.uniform(*LEVEL_EVERY_S), lambda: self._level(app))

    def spread(self, app: App) -> None:
        """Give the requests that are asked for to containers that serve, in order; the rest waits."""
        left, each = app.level, app.spec.scaling.max_multiplexing
        for runner_id in sorted(app.boxes):
            box = app.boxes[runner_id]
            if not box.routed or not box.serves or box.goal is not Goal.RUN:
                continue
            share = min(left, each)
            left -= share
            if box.use(share, self.now_s):
                node = self.nodes[box.runner.node]
                node.changed[runner_id] = None
                self.flush(node)
        if left != app.queued:
            if not app.queued:
                app.queued_since_s = self.now_s
            app.queued = left
            self.tell(app.gateway)

    def tell(self, gateway: int) -> None:
        """A gateway tells its demand within a moment."""
        if gateway not in self._tellings:
            self._tellings[gateway] = None
            self.after(FLUSH_S / 2, lambda: self._tell(gateway))

    def _tell(self, gateway: int) -> None:
        self._tellings.pop(gateway, None)
        leader = self.leader
        if leader is None:
            return
        demands = []
        for app in self.apps.values():
            arrived = int(app.arrived)
            if app.gateway == gateway and (app.level or arrived):
                app.arrived -= arrived
                age_ms = round((self.now_s - app.queued_since_s) * 1000) if app.queued else 0
                slots = app.level - app.queued
                demands.append(AppDemand(app.id, "", "", slots, app.queued, age_ms, app.spec.priority, arrived))
        told = tuple(demands)
        if told != self._told.get(gateway):
            self._told[gateway] = told
            leader.offer(DemandTold(f"g{gateway}", told, leader.now_s))


def _revision_key(runner: Runner) -> str:
    team, _, name = runner.app.partition("/")
    return f"team/{team}/revision/{name}/{runner.revision:08d}"


def make_app(rng: Random, at: int, share: float) -> App:
    """One of the kinds of apps; `share`: GPUs that there are for each app."""
    kind = ("steady", "diurnal", "bursty", "forecast", "shared", "batch", "diurnal", "spread")[at % 8]
    team = {"batch": "batch", "bursty": "media", "forecast": "media", "shared": "strict"}.get(kind, "default")
    gpus = rng.choice((1, 1, 1, 2)) if kind in ("steady", "diurnal", "batch") else 1
    peak = max(2, round(share * rng.uniform(0.5, 1.2) / gpus))
    mux = rng.choice((1, 1, 2))
    scaling = Scaling(
        min_concurrency=rng.randrange(1, 4) if kind in ("steady", "spread") else 0,
        max_concurrency=peak * 2 if kind == "batch" else peak,
        keep_alive_s=rng.choice((10.0, 60.0, 300.0)),
        concurrency_buffer=1 if kind == "steady" else 0,
        scaling_delay_s=rng.choice((0.0, 0.0, 5.0)),
        max_multiplexing=mux,
        forecast_concurrency=2 if kind == "forecast" else 0,
    )
    spec = Spec(
        image="host",
        env={"V": "0"},
        num_gpus=gpus,
        machine_type=rng.choice(((), ("H100-80GB",), ("A100-40GB", "H100-80GB"))) if kind != "batch" else (),
        resources=Resources(1000, 4 * GIB),
        scaling=scaling,
        gpu_milli=400 if kind == "shared" else 0,
        priority={"batch": -20, "steady": 10}.get(kind, 0),
        placement=PlacementRules(spread="node") if kind == "spread" else PlacementRules(),
        rollout=RolloutPolicy(deadline_s=600.0),
    )
    return App(f"{team}/app{at:02d}", at, kind, spec, peak * mux, rng.uniform(0.0, DAY_S), rng.uniform(5.0, 60.0))


def level_of(rng: Random, app: App, now_s: float) -> int:
    """Requests at once that are asked of an app at an hour."""
    wave = 0.5 - 0.5 * math.cos(2 * math.pi * (now_s + app.phase_s) / DAY_S)
    match app.kind:
        case "bursty":
            return rng.randrange(app.peak + 1) if rng.random() < 0.3 else 0
        case "batch":
            return app.peak * 2 if rng.random() < 0.6 else 0
        case "forecast":
            return rng.choice((0, 0, 1, 2)) if wave > 0.3 else 0
        case "steady":
            return max(1, round(app.peak * (0.5 + 0.3 * wave) + rng.uniform(-1.0, 1.0)))
        case _:
            return max(0, round(app.peak * wave * rng.uniform(0.7, 1.1)))


def with_version(spec: Spec, version: int, policy: RolloutPolicy) -> Spec:
    """The next revision of a spec."""
    return replace(spec, env={"V": str(version)}, rollout=policy)
