"""What is asked after a container's end: how it ended, what it said last, whether its GPUs are free.

Called by fal_agent.runner and fal_agent.recovery; changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from fal_agent.core.admission import in_use
from fal_agent.core.assignments import Assignment
from fal_agent.core.tasks import Exit
from fal_agent.ports import Machine
from fal_contract.clock import Clock
from fal_contract.errors import FalError
from fal_contract.limits import LOG_TAIL_LINES_MAX
from fal_runtime.driver import ContainerStatus, Driver

_LOG_TIMEOUT_S: Final = 5.0


def exit_of(status: ContainerStatus | None, clock: Clock) -> Exit:
    """How the driver says that it ended; None: the container has vanished."""
    if status is None:
        return Exit(reason="the container has vanished", finished_at_s=clock.wall_s())
    return Exit(status.exit_code, status.oom_killed, status.reason, status.finished_at_s or clock.wall_s())


async def log_tail(driver: Driver, container: str) -> tuple[str, ...]:
    """Its last lines; what can be had of them when the driver fails or is slow."""
    lines: list[str] = []
    with contextlib.suppress(FalError, TimeoutError):
        async with asyncio.timeout(_LOG_TIMEOUT_S):
            async for line in driver.logs(container, tail_lines=LOG_TAIL_LINES_MAX, follow=False):
                lines.append(line.text)
    return tuple(lines)


async def gpu_in_use(machine: Machine, ended: Assignment) -> str | None:
    """Why one of the GPUs of a runner that has ended is not free yet, or None when all are.

    The memory of a share cannot be told from that of those beside it: such a GPU is looked at when nobody holds it.
    """
    if not ended.gpus or ended.gpu_milli:
        return None
    view = await machine.look()
    reasons = (in_use(view.gpus[gpu]) for gpu in ended.gpus if gpu in view.gpus)
    return next((reason for reason in reasons if reason), None)
