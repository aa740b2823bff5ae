"""Requests around the pure core: one gateway queues them, ready runners take them, nodes tell of it; in virtual time.

Built on `core_world`: every step of the core is checked by it. A second of `run` is: requests end, waiting ones are
given to runners with room, the gateway tells what waits, nodes tell what changed, containers come a phase further, a
tick. Used by tests of scaling.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from core_world import World, spec_of
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.events import ApplyApp
from fal_scheduler.core.records import Goal, Runner, RunnerState, Scaling

STARTING = (RunnerState.STAGING, RunnerState.SETUP)


@dataclass
class Waiting:
    """A request in the gateway's queue."""

    app: str
    since_s: float
    takes_s: float


@dataclass
class Serving:
    """See the module. `starts_s`: how long a container takes from its assignment to ready."""

    world: World = field(default_factory=lambda: World(Random(1), nodes=4))
    starts_s: float = 4.0
    queue: list[Waiting] = field(default_factory=list)
    busy: dict[str, list[float]] = field(default_factory=dict)  # runner -> when its requests end
    used_s: dict[str, float] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)
    seen_s: dict[str, float] = field(default_factory=dict)
    waits_s: list[float] = field(default_factory=list)
    arrived: dict[str, int] = field(default_factory=dict)  # not told yet
    counts: list[int] = field(default_factory=list)  # runners of the app that `run` was given, second by second
    told: tuple[AppDemand, ...] = ()
    ends: dict[str, str] = field(default_factory=dict)  # runner -> why it was asked to end

    def deploy(self, app: str = "default/a", *, gpus: int = 1, **scaling: float) -> None:
        """An app with these scaling values; `max_concurrency` is 8 unless given."""
        spec, _ = spec_of(gpus=gpus)
        spec = replace(spec, scaling=Scaling(**{"max_concurrency": 8, **scaling}))  # type: ignore[arg-type]
        self.world.step(ApplyApp(app, spec, f"digest of {spec!r}"))
        self.world.settle()

    def runners(self, app: str = "default/a") -> list[Runner]:
        """Those that should run, in order of id."""
        state = self.world.state
        found = [state.runners[id_] for id_ in state.runners_by_app.get(app, ())]
        return sorted((one for one in found if one.goal is Goal.RUN), key=lambda one: one.id)

    def ready(self, app: str = "default/a") -> list[Runner]:
        """Those that take requests."""
        statuses = ((one, self.world.state.status_of(one)) for one in self.runners(app))
        return [one for one, status in statuses if status is not None and status.serves]

    def ask(self, count: int, *, app: str = "default/a", takes_s: float = 5.0) -> None:
        """So many requests come now."""
        self.queue += [Waiting(app, self.world.now_s, takes_s) for _ in range(count)]
        self.arrived[app] = self.arrived.get(app, 0) + count

    def run(self, seconds: int, *, app: str = "default/a", rate: float = 0.0, takes_s: float = 5.0) -> None:
        """Time passes, a second at a time; `rate`: requests of the app in each, evenly spread."""
        owed = 0.0
        for _ in range(seconds):
            owed += rate
            self.ask(int(owed), app=app, takes_s=takes_s)
            owed -= int(owed)
            self._second()
            self.counts.append(len(self.runners(app)))

    def _second(self) -> None:
        world = self.world
        self._end_requests()
        self._give_requests()
        self.tell()
        world.settle()
        self._note_ends()
        for node_id, node in world.nodes.items():
            world.deliver(node_id)
            for runner_id, status in list(node.containers.items()):
                since_s = self.seen_s.setdefault(runner_id, world.now_s)
                if status.state in STARTING and world.now_s - since_s >= self.starts_s:
                    node.advance(runner_id)
                if status.state is RunnerState.DRAINING and not self.busy.get(runner_id):
                    node.advance(runner_id)
            self._tell_usage(node_id)
            world.report(node_id)
        world.settle()
        world.tick(1.0)
        self._note_ends()

    def _note_ends(self) -> None:
        for runner in self.world.state.runners.values():
            if runner.goal is not Goal.RUN:
                self.ends.setdefault(runner.id, runner.goal_reason)

    def _end_requests(self) -> None:
        for runner_id, ends in self.busy.items():
            left = [end_s for end_s in ends if end_s > self.world.now_s]
            if len(left) != len(ends):
                self.served[runner_id] = self.served.get(runner_id, 0) + len(ends) - len(left)
                self.used_s[runner_id] = self.world.now_s
                ends[:] = left

    def _give_requests(self) -> None:
        state = self.world.state
        for one in list(self.queue):
            room = {
                runner.id: len(self.busy.get(runner.id, ()))
                for runner in self.ready(one.app)
                if len(self.busy.get(runner.id, ()))
                < state.revision_of(state.apps[one.app]).spec.scaling.max_multiplexing
            }
            if room:
                runner_id = min(room, key=lambda id_: (room[id_], id_))
                self.busy.setdefault(runner_id, []).append(self.world.now_s + one.takes_s)
                self.waits_s.append(self.world.now_s - one.since_s)
                self.queue.remove(one)

    def tell(self) -> None:
        """The gateway tells its demand, if it changed."""
        world = self.world
        apps = sorted({*(one.app for one in self.queue), *(runner.app for runner in world.state.runners.values())})
        demands = []
        for app in apps:
            waiting = [one for one in self.queue if one.app == app]
            slots = sum(len(self.busy.get(runner.id, ())) for runner in self.runners(app))
            age_s = max((world.now_s - one.since_s for one in waiting), default=0.0)
            arrived = self.arrived.pop(app, 0)
            if slots or waiting or arrived:
                demands.append(AppDemand(app, "", "", slots, len(waiting), round(age_s * 1000), 0, arrived))
        if tuple(demands) != self.told:
            self.told = tuple(demands)
            world.step(DemandTold("g1", self.told, world.now_s))

    def _tell_usage(self, node_id: str) -> None:
        world, node = self.world, self.world.nodes[node_id]
        for runner_id, status in list(node.containers.items()):
            under_way = len(self.busy.get(runner_id, ()))
            used_s = self.used_s.get(runner_id)
            age_s = -1.0 if used_s is None else world.now_s - used_s
            changed = (under_way, self.served.get(runner_id, 0)) != (status.in_flight, status.served)
            node.containers[runner_id] = replace(
                status, in_flight=under_way, served=self.served.get(runner_id, 0), last_used_age_s=age_s
            )
            if changed:
                node.changed[runner_id] = None
