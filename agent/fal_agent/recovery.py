"""After the agent's own restart: journal and driver together say what runs here.

Invariants: nothing that runs is stopped or started anew; the driver's word on a container wins over the journal's; a
container without a journal entry is an orphan, named by the assignment kept beside it, or by its id alone; only
remains of dead containers that nobody will ask about are cleaned. Called once by fal_agent.node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fal_agent import launch
from fal_agent.aftermath import exit_of
from fal_agent.core.assignments import Assignment
from fal_agent.core.tasks import Exit, Phase, Task, exited
from fal_agent.journal_codec import Recorded
from fal_agent.tools import Tools
from fal_agent.wire import assignment_of
from fal_contract.clock import Clock
from fal_contract.errors import FalError
from fal_contract.ids import owned_of
from fal_runtime import driver as runtime

_NAMED_MAX: Final = 20
_READY_GRACE_S: Final = 10.0  # the agent was away: one that is ready must have the time to say so


async def take_back(recorded: Recorded, tools: Tools) -> list[Task]:
    """The tasks to go on with, by runner id; dead leftovers are cleaned on the way."""
    found = {status.id: status for status in await tools.driver.list()}
    tasks: dict[str, Task] = {}
    for task in recorded.tasks.values():
        status = found.pop(launch.container_id(task.runner_id), None)
        tasks[task.runner_id] = resumed(task, status, tools.clock)
    for status in found.values():
        if status.phase is runtime.Phase.EXITED:
            continue
        orphan = _orphan(status, tools)
        tasks[orphan.runner_id] = orphan
    keep = frozenset(launch.container_id(id) for id in tasks) | {
        status.id for status in found.values() if status.phase is not runtime.Phase.EXITED
    }
    if words := await tools.driver.clean(keep):
        more = f" and {len(words) - _NAMED_MAX} more" if len(words) > _NAMED_MAX else ""
        text = f"left by dead containers and taken away: {', '.join(words[:_NAMED_MAX])}{more}"
        tools.on_event("CLEANED", "containers", text)
    return [task for _, task in sorted(tasks.items())]


def resumed(task: Task, status: runtime.ContainerStatus | None, clock: Clock) -> Task:
    """A journaled task after a restart, given what the driver knows of its container."""
    if task.phase >= Phase.EXITED:
        return task
    if status is None:
        if task.phase < Phase.STARTED:
            return replace(task, phase=Phase.ADMITTED)  # made, or being made, when a power loss took it
        return exited(
            task, Exit(reason="the container has vanished while the agent was away", finished_at_s=clock.wall_s())
        )
    match status.phase:
        case runtime.Phase.CREATED:
            return replace(task, phase=Phase.ADMITTED)  # weights may not be attached yet; every move is idempotent
        case runtime.Phase.EXITED:
            return exited(task, exit_of(status, clock))
        case runtime.Phase.RUNNING:
            return _running(task, status, clock)


def _running(task: Task, status: runtime.ContainerStatus, clock: Clock) -> Task:
    started_at_s = status.started_at_s or task.started_at_s or clock.wall_s()
    left_s = task.assignment.startup_timeout_s - max(0.0, clock.wall_s() - started_at_s)
    # One that served goes on serving: only the proxy is told again.
    phase = Phase.READY if task.ready_at_s else Phase.STARTED
    ready_by_s = clock.monotonic_s() + max(_READY_GRACE_S, left_s)
    taken_back = phase is Phase.READY
    return replace(task, phase=phase, started_at_s=started_at_s, ready_by_s=ready_by_s, taken_back=taken_back)


def _orphan(status: runtime.ContainerStatus, tools: Tools) -> Task:
    started_at_s = status.started_at_s or 0.0
    kept = launch.find_assignment(tools.places, status.id)
    if kept is not None:
        try:
            task = Task(assignment_of(kept), orphan=True, started_at_s=started_at_s)
            return resumed(replace(task, phase=Phase.STARTED), status, tools.clock)
        except FalError:
            pass  # kept by another version: only the name is certain
    try:
        runner_id = owned_of(status.id)
    except ValueError:
        runner_id = f"unknown/{status.id}"
    phase = Phase.STARTED if status.phase is runtime.Phase.RUNNING else Phase.CREATED
    bare = Assignment(id="", term=0, runner_id=runner_id)
    return Task(bare, phase=phase, known=False, orphan=True, started_at_s=started_at_s)
