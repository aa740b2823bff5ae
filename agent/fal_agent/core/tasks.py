"""One runner on this node: where it is, and the one move owed next. Pure.

Invariants: phases only increase (IDLE and RUNNING are told from the count of requests, they are not phases);
every action is idempotent, so a task may be driven again from any phase after a kill -9; a task stops only by its
goal or by its own failure, an orphan only by a goal. Called by fal_agent.runner, which performs the actions and tells
what it saw.

A build task is never asked whether it is ready: STARTED ends with its exit, or at `ready_by_s`.

    ADMITTED -STAGE-> STAGED -CREATE-> CREATED -START-> STARTED -PROBE-> READY -REGISTER-> SERVING
    SERVING -DRAIN-> DRAINED -STOP-> EXITED -COLLECT-> COLLECTED -REMOVE-> REMOVED -RELEASE-> GONE
    any phase before EXITED -container exits, fails or never ran-> EXITED
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum

from fal_agent.core.assignments import Assignment, Goal


class Phase(IntEnum):
    """What is known to have happened."""

    ADMITTED = 1
    STAGED = 2  # weights present and pinned
    CREATED = 3  # the container exists, nothing runs
    STARTED = 4  # its process runs; the model is loading
    READY = 5  # it answered its readiness probe
    SERVING = 6  # the proxy sends it requests
    DRAINED = 7  # the proxy sends none, none is under way
    EXITED = 8  # no process
    COLLECTED = 9  # exit code and last lines are known, the proxy has forgotten it
    REMOVED = 10  # nothing of the container is left
    GONE = 11  # GPUs and pins are free again


class Action(StrEnum):
    """A move. EXPIRE and the moves after EXITED are the agent's own; the rest needs the driver, fsd or proxy."""

    STAGE = "stage"
    CREATE = "create"
    START = "start"
    PROBE = "setup"
    EXPIRE = "expire"
    REGISTER = "register"
    DRAIN = "drain"
    STOP = "stop"
    KILL = "kill"
    COLLECT = "collect"
    REMOVE = "remove"
    RELEASE = "release"


class RunnerState(IntEnum):
    """As told to the scheduler; the numbers are `fal.v1.RunnerState`'s."""

    STAGING = 2
    SETUP = 3
    IDLE = 4
    RUNNING = 5
    DRAINING = 6
    TERMINATING = 7
    TERMINATED = 8


@dataclass(frozen=True, slots=True)
class Exit:
    """How the container ended. Times are Unix seconds; `code` is None when it was lost or nothing ran."""

    code: int | None = None
    oom_killed: bool = False
    reason: str = ""
    finished_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """A runner's life. `known` is False for a container of which only the id is known: it is left alone.

    `ready_by_s` is monotonic; `started_at_s` and `ready_at_s` are Unix seconds, 0 before they happened.
    """

    assignment: Assignment
    phase: Phase = Phase.ADMITTED
    known: bool = True
    orphan: bool = False  # in no assignment set that this session sent
    failure: str = ""  # why the task gave up by itself
    ready_by_s: float = 0.0
    started_at_s: float = 0.0
    ready_at_s: float = 0.0
    taken_back: bool = False  # it served before the agent's restart
    exit: Exit | None = None
    log_tail: tuple[str, ...] = ()
    phases: tuple[tuple[str, float], ...] = ()  # name of the move, seconds
    output: bytes = b""  # of a build task: the manifest (serialised) of what fsd took in
    output_error: str = ""  # why nothing was taken in

    @property
    def runner_id(self) -> str:
        return self.assignment.runner_id

    @property
    def goal(self) -> Goal:
        """The scheduler's goal, or STOP once the task has failed."""
        return max(self.assignment.goal, Goal.STOP) if self.failure else self.assignment.goal

    @property
    def live(self) -> bool:
        """True while it holds its GPUs and memory."""
        return self.phase < Phase.GONE


_RISE = {
    Phase.ADMITTED: Action.STAGE,
    Phase.STAGED: Action.CREATE,
    Phase.CREATED: Action.START,
    Phase.STARTED: Action.PROBE,
    Phase.READY: Action.REGISTER,
}
_FALL = {Phase.EXITED: Action.COLLECT, Phase.COLLECTED: Action.REMOVE, Phase.REMOVED: Action.RELEASE}


def step(task: Task, now_s: float) -> Action | None:
    """The one move owed now, or None: wait for news."""
    if task.phase >= Phase.EXITED:
        return _FALL.get(task.phase)
    match task.goal:
        case Goal.KILL:
            return Action.KILL
        case Goal.STOP:
            return Action.STOP
        case Goal.DRAIN:
            return Action.DRAIN if task.phase is Phase.SERVING else Action.STOP
        case Goal.RUN:
            if not task.known:
                return None
            if task.phase is Phase.STARTED and now_s >= task.ready_by_s and not task.orphan:
                return Action.EXPIRE
            if task.phase is Phase.STARTED and task.assignment.build:
                return None
            return _RISE.get(task.phase)


def advance(task: Task, phase: Phase, *, move: Action | None = None, seconds: float = 0.0) -> Task:
    """`phase` was seen. Late news (a phase already passed) changes nothing."""
    if phase <= task.phase:
        return task
    phases = (*task.phases, (move.value, seconds)) if move is not None else task.phases
    return replace(task, phase=phase, phases=phases)


def started(task: Task, *, now_s: float, started_at_s: float, seconds: float) -> Task:
    """The container's process runs; the readiness deadline begins."""
    if task.phase >= Phase.STARTED:
        return task
    task = replace(task, started_at_s=started_at_s, ready_by_s=now_s + task.assignment.startup_timeout_s)
    return advance(task, Phase.STARTED, move=Action.START, seconds=seconds)


def ready(task: Task, *, ready_at_s: float, seconds: float) -> Task:
    """The readiness probe was answered."""
    if task.phase >= Phase.READY:
        return task
    return advance(replace(task, ready_at_s=ready_at_s), Phase.READY, move=Action.PROBE, seconds=seconds)


def exited(task: Task, exit: Exit) -> Task:
    """The container has no process, or never had one."""
    if task.phase >= Phase.EXITED:
        return task
    return advance(replace(task, exit=exit), Phase.EXITED)


def leaves_output(task: Task) -> bool:
    """Whether it is a build task that has done what it was to do."""
    done = task.exit is not None and task.exit.code == 0 and not task.failure
    return done and task.assignment.build and task.assignment.goal is Goal.RUN


def collected(task: Task, log_tail: tuple[str, ...], *, output: bytes = b"", output_error: str = "") -> Task:
    """What it left was read."""
    if task.phase is not Phase.EXITED:
        return task
    return advance(replace(task, log_tail=log_tail, output=output, output_error=output_error), Phase.COLLECTED)


def fail(task: Task, why: str) -> Task:
    """The task gives up; the first reason stays. Before anything ran it is over at once."""
    if task.phase >= Phase.EXITED or task.failure:
        return task
    task = replace(task, failure=why)
    if task.phase < Phase.CREATED:
        return exited(task, Exit(reason=why))
    return task


def assign(task: Task, assignment: Assignment) -> Task:
    """The scheduler spoke of this runner again. Goals only rise; an older term or a finished task changes nothing.

    A new assignment id adopts the container as it is (an operator adopted an orphan, or a new store knows it).
    """
    have = task.assignment
    if assignment.term < have.term:
        return task
    merged = replace(assignment, goal=max(assignment.goal, have.goal)) if task.phase < Phase.EXITED else have
    if merged.goal is have.goal:
        merged = replace(merged, goal_reason=have.goal_reason or merged.goal_reason)
    if task.known and assignment.id != have.id:
        # What the container holds does not change by being adopted.
        merged = replace(merged, gpus=have.gpus, gpu_milli=have.gpu_milli)
        merged = replace(merged, memory_bytes=have.memory_bytes, cpu_milli=have.cpu_milli)
    # One that nobody knew has run for who knows how long: there is no deadline to be ready by.
    ready_by_s = task.ready_by_s if task.known else math.inf
    return replace(task, assignment=merged, orphan=False, known=True, ready_by_s=ready_by_s)


def state_of(task: Task, in_flight: int) -> RunnerState:
    """The state that the scheduler and operators see."""
    if task.phase is Phase.GONE:
        return RunnerState.TERMINATED
    if task.phase >= Phase.EXITED or task.goal >= Goal.STOP:
        return RunnerState.TERMINATING
    if task.goal is Goal.DRAIN:
        return RunnerState.DRAINING
    if task.phase < Phase.STARTED:
        return RunnerState.STAGING
    # One that is new is not offered before the proxy knows it; one that was taken back, the proxy still serves.
    if task.phase is Phase.SERVING or (task.phase is Phase.READY and task.taken_back and task.known):
        return RunnerState.RUNNING if in_flight else RunnerState.IDLE
    return RunnerState.SETUP


def why(task: Task) -> str:
    """One sentence for an operator: what it waits for or why it ended. Empty while it serves."""
    if task.failure or task.output_error:
        return task.failure or task.output_error
    if task.phase >= Phase.EXITED and task.exit is not None:
        return task.exit.reason or (f"exited with code {task.exit.code}" if task.exit.code is not None else "exited")
    if task.assignment.goal > Goal.RUN:
        return task.assignment.goal_reason or f"told to {task.assignment.goal.name.lower()}"
    if not task.known:
        return "a container without an entry in the journal: left alone"
    return {
        Phase.ADMITTED: "weights are on their way",
        Phase.STAGED: "the container is being made",
        Phase.CREATED: "the container is being started",
        Phase.STARTED: "the build task runs" if task.assignment.build else "the worker is loading",
    }.get(task.phase, "")
