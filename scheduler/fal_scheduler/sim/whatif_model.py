"""A modelled fleet around the production core, in virtual time: what `falctl sim whatif` compares.

Pure. The core decides (scaling, placement, victims); nodes, gateways and requests are modelled:

- a runner is ready as long after its assignment as the log's runners of its app were (median; first on a node or not),
  a request takes the log's mean; requests go to the ready runner with the fewest under way, else they wait in turn;
- operators' commands of the log are given again at their times; nodes join when they did and neither fail nor fall
  silent; runners never crash. What the log saw of that is in neither side of a comparison.

The same input gives the same figures: ids count, time is the model's own, nothing is drawn.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fal_contract.errors import FalError
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.events import (
    AssignmentChanged,
    Event,
    Moment,
    NodeHello,
    NodeReport,
    Proceed,
    Tick,
)
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import Change, Goal, Node, Runner, RunnerState, key_of
from fal_scheduler.core.state import State
from fal_scheduler.core.step import BrokenInvariant, Core
from fal_scheduler.core.told import RunnerStatus
from fal_scheduler.sim.whatif_log import Durations

TICK_S: Final = 1.0
BEAT_S: Final = 5.0
TELL_S: Final = 0.25  # between two words of a gateway
GATEWAY: Final = "whatif"
_PROCEED_MAX: Final = 10_000


class _Ids:
    """Ids that count."""

    def __init__(self) -> None:
        self._next = 0

    def suffix(self) -> str:
        self._next += 1
        return f"w{self._next:07d}"


@dataclass(slots=True)
class Container:
    """A runner on its node. `under_way`: requests, as (arrived, number)."""

    runner: Runner
    status: RunnerStatus
    began_s: float
    busy_s: float = 0.0
    under_way: dict[int, float] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return self.status.serves


@dataclass(slots=True)
class Outcome:
    """Figures of one run. Waits in seconds; GPU seconds from assignment to end; cost in millionths of the currency."""

    waits: list[float] = field(default_factory=list)
    unserved: int = 0  # still waiting at the end
    refused: int = 0  # for apps that were not there
    starts: int = 0
    loads: int = 0  # starts that load a model
    gpu_s: float = 0.0
    busy_gpu_s: float = 0.0
    cost_micros: float = 0.0
    seconds: float = 0.0


class Fleet:
    """See the module. `run` once."""

    def __init__(self, state: State, durations: Durations, *, start_s: float, offset_s: float) -> None:
        """`start_s`: wall clock at which the state was taken; `offset_s`: that less the state's monotonic reading."""
        self.state = state
        self.core = Core(state, Placer(state.fleet), _Ids())
        self.now_s = start_s
        self.outcome = Outcome()
        self._durations = durations
        self._offset_s = offset_s
        self._todo: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._hellos: dict[str, NodeHello] = {}
        self._nodes: dict[str, dict[str, Container]] = {}
        self._by_app: dict[str, dict[str, Container]] = {}
        self._waiting: dict[str, deque[tuple[float, int]]] = {}  # app -> (arrived, number)
        self._arrived: dict[str, int] = {}  # since the last word
        self._tell_due = False
        self._told_at_s = 0.0
        self._told_apps: dict[str, None] = {}
        self._warm: dict[tuple[str, str], None] = {}

    # --- setting up -------------------------------------------------------------------------------------------------

    def at(self, at_s: float, do: Callable[..., None], *arguments: Any) -> None:
        """Do something at that time (wall clock)."""
        self._count += 1
        heapq.heappush(self._todo, (max(at_s, self.now_s), self._count, do, arguments))

    def join(self, node: Node) -> None:
        """A node's record comes to be."""
        if node.id not in self.state.nodes and node.pool in self.state.pools:
            self.state.apply(Change(key_of(node), None, node))

    def leave(self, node_id: str) -> None:
        """A node and what runs there were never there."""
        for runner_id in list(self.state.runners_by_node.get(node_id, ())):
            runner = self.state.runners[runner_id]
            self.state.apply(Change(key_of(runner), runner, None))
        self.state.live.pop(node_id, None)
        node = self.state.nodes[node_id]
        self.state.apply(Change(key_of(node), node, None))

    def hello(self, hello: NodeHello) -> None:
        """A node says what it has and runs."""
        if hello.node_id not in self.state.nodes or hello.node_id in self._nodes:
            return
        meta = self.state.meta
        assert meta is not None
        told = replace(
            hello, session_id=f"w-{hello.node_id}", arrived_s=self._monotonic_s, cluster_id=meta.cluster_id,
            epoch_seen=0, term_seen=0, incarnation="", store_revision_seen=0,
        )  # fmt: skip
        self._hellos[hello.node_id] = told
        self._nodes[hello.node_id] = {}
        for status in told.statuses:
            runner = self.state.runners.get(status.runner_id)
            if runner is not None and runner.node == hello.node_id and not status.ended:
                settled = replace(status, in_flight=0)
                self._add(Container(runner, settled, self.now_s))
                if not settled.serves:
                    self.at(self.now_s + self._durations.start_s(runner.app, warm=True), self._ready, runner.id)
        mine = tuple(one.status for one in self._nodes[hello.node_id].values())
        self.step(replace(told, statuses=mine))
        for runner_id in list(self.state.runners_by_node.get(hello.node_id, ())):
            self._assigned(hello.node_id, runner_id)

    def command(self, command: Event) -> None:
        """An operator does something, or a cache tells; what is refused here is left out."""
        self.step(command)

    def request(self, app: str, number: int) -> None:
        """A request arrives."""
        if app not in self.state.apps:
            self.outcome.refused += 1
            return
        self._arrived[app] = self._arrived.get(app, 0) + 1
        self._waiting.setdefault(app, deque()).append((self.now_s, number))
        self._serve(app)
        self._tell_soon()

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self, end_s: float) -> Outcome:
        """Until `end_s` (wall clock)."""
        began_s = self.now_s
        self.at(self.now_s, self._tick)
        self.at(self.now_s + BEAT_S, self._beat)
        while self._todo and self._todo[0][0] <= end_s:
            self.now_s, _, do, arguments = heapq.heappop(self._todo)
            do(*arguments)
        self.now_s = end_s
        for containers in self._nodes.values():
            for container in list(containers.values()):
                self._account(container)
        for queue in self._waiting.values():
            self.outcome.unserved += len(queue)
            self.outcome.waits += [end_s - arrived_s for arrived_s, _ in queue]
        self.outcome.seconds = end_s - began_s
        return self.outcome

    @property
    def _monotonic_s(self) -> float:
        return self.now_s - self._offset_s

    def step(self, event: Event) -> None:
        """One event, and what it left behind, as the engine does it; assignments go to their nodes."""
        todo: Event = event
        for _ in range(_PROCEED_MAX):
            try:
                outcome = self.core.step(todo, Moment(self._monotonic_s, self.now_s))
            except (FalError, BrokenInvariant):
                self.core.taken_back(Moment(self._monotonic_s, self.now_s))
                return
            self.state.store_revision += bool(outcome.changes)
            for effect in outcome.effects:
                if isinstance(effect, AssignmentChanged):
                    self._assigned(effect.node_id, effect.runner_id)
            if not self.state.dirty:
                return
            todo = Proceed()

    def _tick(self) -> None:
        self.step(Tick())
        self.at(self.now_s + TICK_S, self._tick)

    def _beat(self) -> None:
        for node_id in self._nodes:
            self._report(node_id)
        self.at(self.now_s + BEAT_S, self._beat)

    def _report(self, node_id: str, *statuses: RunnerStatus, gone: tuple[str, ...] = ()) -> None:
        session = self._hellos[node_id].session_id
        self.step(NodeReport(node_id, session, self._monotonic_s, statuses=statuses, gone=gone))

    # --- nodes ------------------------------------------------------------------------------------------------------

    def _add(self, container: Container) -> None:
        runner = container.runner
        self._nodes[runner.node][runner.id] = container
        self._by_app.setdefault(runner.app, {})[runner.id] = container
        self._warm[runner.node, runner.app] = None

    def _assigned(self, node_id: str, runner_id: str) -> None:
        """The scheduler wants something else of a runner. Done after the step, as a delta is."""
        self.at(self.now_s, self._deliver, node_id, runner_id)

    def _deliver(self, node_id: str, runner_id: str) -> None:
        if node_id not in self._nodes:
            return
        runner, have = self.state.runners.get(runner_id), self._nodes[node_id].get(runner_id)
        if runner is None or runner.node != node_id:
            return
        if have is None:
            if runner.goal is Goal.RUN and runner.assignment is not None:
                self._start(runner)
            elif runner.goal > Goal.RUN:
                self._report(node_id, _ended(runner, None))
        elif runner.goal >= Goal.STOP:
            self._end(have)
        elif runner.goal is Goal.DRAIN and have.status.state is not RunnerState.DRAINING:
            self._tell(have, replace(have.status, state=RunnerState.DRAINING))
            if not have.under_way:
                self._end(have)

    def _start(self, runner: Runner) -> None:
        assert runner.assignment is not None
        warm = (runner.node, runner.app) in self._warm
        spec = self.state.revisions[runner.app, runner.revision].spec
        self.outcome.starts += 1
        self.outcome.loads += bool(spec.model)
        status = RunnerStatus(
            runner.id, RunnerState.STAGING, assignment_id=runner.assignment.id, term=runner.assignment.term,
            app=runner.app, revision=runner.revision, started_at_s=self.now_s, gpus=runner.gpus,
            max_multiplexing=spec.scaling.max_multiplexing, residencies=runner.residencies,
            share_group=runner.share_group, memory_bytes=runner.memory_bytes, cpu_milli=runner.cpu_milli,
        )  # fmt: skip
        container = Container(runner, status, self.now_s)
        self._add(container)
        self._tell(container, status)
        self.at(self.now_s + self._durations.start_s(runner.app, warm=warm), self._ready, runner.id)

    def _ready(self, runner_id: str) -> None:
        container = self._find(runner_id)
        if container is None or container.status.state not in (RunnerState.STAGING, RunnerState.SETUP):
            return
        self._tell(container, replace(container.status, state=RunnerState.IDLE, ready_at_s=self.now_s))
        self._serve(container.runner.app)

    def _find(self, runner_id: str) -> Container | None:
        return next((one[runner_id] for one in self._nodes.values() if runner_id in one), None)

    def _tell(self, container: Container, status: RunnerStatus) -> None:
        container.status = status
        self._report(container.runner.node, status)

    def _end(self, container: Container) -> None:
        """A container is gone; what was under way in it waits again."""
        runner = container.runner
        if self._nodes[runner.node].pop(runner.id, None) is None:
            return
        del self._by_app[runner.app][runner.id]
        self._account(container)
        for number, arrived_s in container.under_way.items():
            self._waiting.setdefault(runner.app, deque()).appendleft((arrived_s, number))
        container.under_way.clear()
        self._report(runner.node, _ended(runner, container.status))
        self._report(runner.node, gone=(runner.id,))
        self._serve(runner.app)

    def _account(self, container: Container) -> None:
        runner = container.runner
        gpus = len(runner.gpus) * (getattr(runner, "gpu_milli", 0) or 1000) / 1000
        gpu_s = gpus * (self.now_s - container.began_s)
        node = self.state.nodes.get(runner.node)
        pool = self.state.pools.get(node.pool) if node is not None else None
        self.outcome.gpu_s += gpu_s
        self.outcome.busy_gpu_s += gpus * container.busy_s
        self.outcome.cost_micros += gpu_s / 3600 * (pool.gpu_hour_price_micros if pool is not None else 0)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _serve(self, app: str) -> None:
        """Requests that wait go to runners that are ready."""
        queue = self._waiting.get(app)
        while queue:
            free = [
                one for one in self._by_app.get(app, {}).values()
                if one.open and len(one.under_way) < max(1, one.status.max_multiplexing)
            ]  # fmt: skip
            if not free:
                break
            container = min(free, key=lambda one: len(one.under_way))
            arrived_s, number = queue.popleft()
            self.outcome.waits.append(self.now_s - arrived_s)
            container.under_way[number] = arrived_s
            self._use(container)
            self.at(self.now_s + self._durations.request_s(app), self._done, container, number, self.now_s)
        self._tell_soon()

    def _use(self, container: Container, *, served: int = 0) -> None:
        busy = len(container.under_way)
        state = container.status.state
        if state is not RunnerState.DRAINING:
            state = RunnerState.RUNNING if busy else RunnerState.IDLE
        self._tell(
            container,
            replace(
                container.status,
                state=state,
                in_flight=busy,
                served=container.status.served + served,
                last_used_age_s=0.0,
            ),
        )

    def _done(self, container: Container, number: int, since_s: float) -> None:
        if container.under_way.pop(number, None) is None:
            return  # it was interrupted
        container.busy_s += (self.now_s - since_s) / max(1, container.status.max_multiplexing)
        self._use(container, served=1)
        if container.status.state is RunnerState.DRAINING and not container.under_way:
            self._end(container)
        self._serve(container.runner.app)

    def _tell_soon(self) -> None:
        if not self._tell_due:
            self._tell_due = True
            self.at(max(self.now_s, self._told_at_s + TELL_S), self._tell_demand)

    def _tell_demand(self) -> None:
        self._tell_due, self._told_at_s = False, self.now_s
        apps = {**self._told_apps, **dict.fromkeys(self._arrived)}
        demands = tuple(one for app in apps if (one := self._demand_of(app)) is not None)
        self._told_apps = {one.app: None for one in demands}
        self._arrived.clear()
        self.step(DemandTold(GATEWAY, demands, self._monotonic_s))

    def _demand_of(self, app: str) -> AppDemand | None:
        queue = self._waiting.get(app, ())
        slots = sum(len(one.under_way) for one in self._by_app.get(app, {}).values())
        arrived = self._arrived.get(app, 0)
        if not (queue or slots or arrived):
            return None
        age_ms = int((self.now_s - min(at_s for at_s, _ in queue)) * 1000) if queue else 0
        return AppDemand(app, in_flight=slots, queued=len(queue), oldest_age_ms=age_ms, arrived=arrived)


def _ended(runner: Runner, status: RunnerStatus | None) -> RunnerStatus:
    assignment = runner.assignment.id if runner.assignment is not None else ""
    status = status or RunnerStatus(runner.id, RunnerState.TERMINATED, assignment, app=runner.app)
    return replace(status, state=RunnerState.TERMINATED, in_flight=0, exit_code=0, reason="ended")


__all__ = ["Fleet", "Outcome"]
