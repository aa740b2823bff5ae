"""A machine of the light fleet: what an agent and its containers do, without any code of the agent. Pure.

It keeps the agent's contract: an assignment is admitted once, in order of terms, and only onto GPUs that are free; a
container lives on without a scheduler; only a goal, a crash or the machine's own end stops one; everything is told
anew in a Hello. Times are the world's, in seconds; the wall clock of a machine may be wrong by `skew_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from core_world import admitted
from fal_scheduler.core.events import NodeHello, NodeReport
from fal_scheduler.core.records import Goal, Meta, Runner, RunnerState
from fal_scheduler.core.told import Capabilities, Inventory, RunnerStatus

WALL_START_S = 1_700_000_000.0
NEVER = -1.0
FEATURES = Capabilities(features=("reboot",))
_LIVE = (
    RunnerState.STAGING,
    RunnerState.SETUP,
    RunnerState.IDLE,
    RunnerState.RUNNING,
    RunnerState.DRAINING,
    RunnerState.TERMINATING,
)


@dataclass(slots=True)
class Box:
    """One container, or one that was refused. `started_s`, `ended_s`: when its process began and ended."""

    runner: Runner
    status: RunnerStatus
    made_s: float
    goal: Goal = Goal.RUN
    started_s: float = NEVER
    ended_s: float = NEVER
    used_s: float = NEVER
    busy_s: float = 0.0
    busy_since_s: float = 0.0
    in_flight: int = 0
    served: int = 0
    routed: bool = False  # a scheduler was told that it serves, so gateways know of it

    @property
    def live(self) -> bool:
        """Whether it holds its GPUs."""
        return not self.status.ended

    @property
    def serves(self) -> bool:
        """Whether requests may be sent to it."""
        return self.status.serves

    def gpu_seconds(self, now_s: float) -> float:
        """Since its process began, times its GPUs."""
        if self.started_s == NEVER:
            return 0.0
        until_s = self.ended_s if self.ended_s != NEVER else now_s
        return (until_s - self.started_s) * len(self.runner.gpus)

    def use(self, in_flight: int, now_s: float) -> bool:
        """So many requests are under way from now on. True where that is another number."""
        if in_flight == self.in_flight:
            return False
        if self.in_flight:
            self.busy_s += now_s - self.busy_since_s
            self.used_s = now_s
            self.served += max(0, self.in_flight - in_flight)
        self.busy_since_s = now_s
        if in_flight:
            self.used_s = now_s
        self.in_flight = in_flight
        return True

    def told(self, now_s: float, skew_s: float) -> RunnerStatus:
        """As its node would tell it now."""
        busy_s = self.busy_s + (now_s - self.busy_since_s if self.in_flight else 0.0)
        return replace(
            self.status,
            in_flight=self.in_flight,
            served=self.served,
            last_used_age_s=NEVER if self.used_s == NEVER else now_s - self.used_s,
            started_at_s=WALL_START_S + skew_s + self.started_s if self.started_s != NEVER else 0.0,
            gpu_seconds=self.gpu_seconds(now_s),
            busy_seconds=busy_s,
        )


@dataclass(slots=True)
class FleetNode:
    """See the module. `up`: the machine runs; `muted`: nothing passes between it and the scheduler."""

    id: str
    pool: str
    zone: str
    inventory: Inventory
    beat_s: float = 0.0  # phase of its heartbeats
    skew_s: float = 0.0
    up: bool = True
    muted: bool = False
    agent_up: bool = True
    gone_for_good: bool = False
    boot: int = 0
    session: int = 0
    connected: bool = False
    term_seen: int = 0
    incarnation: str = ""
    boxes: dict[str, Box] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    forgotten: dict[str, None] = field(default_factory=dict)
    changed_at: dict[str, int] = field(default_factory=dict)  # GPU -> generation at which its fitness changed last
    retold: bool = False
    refused_terms: int = 0

    @property
    def talks(self) -> bool:
        """Whether what it says reaches a scheduler."""
        return self.up and self.agent_up and not self.muted

    @property
    def session_id(self) -> str:
        """Of its newest session."""
        return f"{self.id}-s{self.session}"

    def live(self) -> list[Box]:
        """Containers that hold something."""
        return [box for box in self.boxes.values() if box.live]

    # --- from the scheduler -----------------------------------------------------------------------------------------

    def take(self, runner: Runner, term: int, now_s: float) -> Box | None:
        """One assignment, told by the leader of `term`. The box, where something about it is to be done now."""
        assert runner.assignment is not None
        if term < self.term_seen:
            self.refused_terms += 1
            return None
        self.term_seen = term
        have = self.boxes.get(runner.id)
        if have is not None and not have.live and have.status.assignment_id != runner.assignment.id:
            have = None
        if have is None and runner.goal is Goal.RUN:
            return self._admit(runner, now_s)
        if have is None:
            status = RunnerStatus(runner.id, RunnerState.TERMINATED, runner.assignment.id, reason="not here")
            self.boxes[runner.id] = Box(runner, status, now_s, ended_s=now_s)
            self.changed[runner.id] = None
            return None
        if not have.live:
            self.changed[runner.id] = None  # told again
            return None
        if runner.goal > have.goal:
            have.goal, have.runner = runner.goal, runner
            return have
        return None

    def _admit(self, runner: Runner, now_s: float) -> Box | None:
        assert runner.assignment is not None
        status = admitted(runner)
        why = self._refusal(runner)
        if why:
            status = replace(status, state=RunnerState.TERMINATED, refused=True, reason=why, gpus=())
        box = self.boxes[runner.id] = Box(runner, status, now_s)
        self.changed[runner.id] = None
        return None if why else box

    def _refusal(self, runner: Runner) -> str:
        assert runner.assignment is not None
        generation = runner.assignment.inventory_generation
        sick = {gpu.id for gpu in self.inventory.gpus if not gpu.healthy}
        if any(0 < generation < self.changed_at.get(gpu, 0) for gpu in runner.gpus) or not sick.isdisjoint(runner.gpus):
            return "GPU has changed"
        for gpu in runner.gpus:
            if not may_share(runner, [box.runner for box in self.live() if gpu in box.status.gpus]):
                return "GPU is held"
        return ""

    def drop(self, runner_id: str) -> None:
        """The scheduler has forgotten it: an ended one is forgotten here, too."""
        box = self.boxes.get(runner_id)
        if box is not None and not box.live:
            del self.boxes[runner_id]
            self.changed.pop(runner_id, None)
            self.forgotten[runner_id] = None

    # --- by itself --------------------------------------------------------------------------------------------------

    def become(self, box: Box, state: RunnerState, now_s: float, *, reason: str = "", exit_code: int = 0) -> None:
        """A container is in another state."""
        if state is RunnerState.SETUP:
            box.started_s = now_s
        if state is RunnerState.TERMINATED:
            box.use(0, now_s)
            box.ended_s = now_s
            box.status = replace(box.status, state=state, reason=reason, exit_code=exit_code)
        else:
            box.status = replace(box.status, state=state)
        self.changed[box.runner.id] = None

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

    # --- to the scheduler -------------------------------------------------------------------------------------------

    def hello(self, arrived_s: float, meta: Meta, now_s: float) -> NodeHello:
        """A new session, with everything."""
        self.session += 1
        self.connected, self.retold = True, False
        self.changed.clear()
        self.forgotten.clear()
        for box in self.boxes.values():
            box.routed = box.routed or box.serves
        told = NodeHello(
            self.id,
            self.session_id,
            f"boot-{self.id}-{self.boot}",
            arrived_s,
            cluster_id=meta.cluster_id,
            epoch_seen=meta.epoch,
            term_seen=self.term_seen,
            incarnation=self.incarnation,
            inventory=self.inventory,
            statuses=tuple(box.told(now_s, self.skew_s) for box in self.boxes.values()),
            capabilities=FEATURES,
        )
        self.incarnation = meta.incarnation
        return told

    def report(self, arrived_s: float, now_s: float) -> NodeReport:
        """What changed since the last one."""
        boxes = [self.boxes[id_] for id_ in self.changed if id_ in self.boxes]
        for box in boxes:
            box.routed = box.routed or box.serves
        inventory, self.retold = self.inventory if self.retold else None, False
        statuses = tuple(box.told(now_s, self.skew_s) for box in boxes)
        told = NodeReport(
            self.id, self.session_id, arrived_s, statuses=statuses, gone=tuple(self.forgotten), inventory=inventory
        )
        self.changed.clear()
        self.forgotten.clear()
        return told


def may_share(runner: Runner, holders: list[Runner]) -> bool:
    """Whether a GPU with these holders may be the runner's as well."""
    if not holders:
        return True
    teams = {one.id.split("/")[0] for one in (*holders, runner)}
    shares = [one.gpu_milli for one in (*holders, runner)]
    return all(shares) and sum(shares) <= 1000 and len(teams) == 1
