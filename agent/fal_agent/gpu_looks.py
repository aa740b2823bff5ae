"""A snapshot of the GPUs as core/gpu_health looks at it: with who holds each, and whose processes are on it.

Called by fal_agent.gpu_care at every look. Processes are looked at only where a held GPU has some; why a container does
not end only where it should have ended long ago.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from fal_agent import launch
from fal_agent.core.assignments import Goal
from fal_agent.core.gpu_health import Look, fellows_clock_mhz
from fal_agent.core.tasks import Phase, Task
from fal_agent.gpu_processes import strangers, unkillable
from fal_agent.inventory.model import Gpu, LinkKind, Snapshot
from fal_contract.clock import Clock
from fal_contract.errors import FalError
from fal_contract.limits import GPU_STUCK_S
from fal_runtime.driver import Driver

_STATUS_TIMEOUT_S: Final = 5.0


class GpuLooks:
    """`driver` None: nothing is known of containers' processes."""

    def __init__(self, driver: Driver | None, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock
        self._ending: dict[str, float] = {}  # runners that were told to end, since when

    async def of(self, snapshot: Snapshot, tasks: Iterable[Task]) -> list[Look]:
        """One for each GPU, in the snapshot's order."""
        holders: dict[str, list[Task]] = {}
        for task in tasks:
            for id_ in task.assignment.gpus if task.live else ():
                holders.setdefault(id_, []).append(task)
        self._mind_ending(task for held in holders.values() for task in held)
        looks = [await self._of(gpu, holders.get(gpu.id, [])) for gpu in snapshot.gpus]
        return [replace(look, fellows_clock_mhz=fellows_clock_mhz(look, looks)) for look in looks]

    async def _of(self, gpu: Gpu, holders: Sequence[Task]) -> Look:
        foreign: tuple[int, ...] = ()
        if gpu.pids and holders:
            firsts = [await self._first_process(task) for task in holders]
            foreign = await asyncio.to_thread(strangers, gpu.pids, firsts)
        stuck = ""
        for task in holders:
            if self._overdue(task) and not stuck:
                stuck = await asyncio.to_thread(unkillable, await self._first_process(task), gpu.pids)
        return look_of(gpu, [task.runner_id for task in holders], foreign=foreign, stuck=stuck)

    def _mind_ending(self, holders: Iterable[Task]) -> None:
        """Remember since when containers with GPUs have been told to end."""
        ending = {
            task.runner_id for task in holders if task.goal >= Goal.STOP and Phase.CREATED <= task.phase < Phase.EXITED
        }
        now_s = self._clock.monotonic_s()
        self._ending = {id_: self._ending.get(id_, now_s) for id_ in sorted(ending)}

    def _overdue(self, task: Task) -> bool:
        """Whether it should have ended long ago."""
        since_s = self._ending.get(task.runner_id)
        late_s = task.assignment.termination_grace_s + GPU_STUCK_S
        return since_s is not None and self._clock.monotonic_s() - since_s >= late_s

    async def _first_process(self, task: Task) -> int | None:
        if self._driver is None:
            return None
        with contextlib.suppress(FalError, TimeoutError):
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                status = await self._driver.status(launch.container_id(task.runner_id))
                return status.pid if status is not None else None
        return None


def look_of(gpu: Gpu, holders: Sequence[str], *, foreign: tuple[int, ...] = (), stuck: str = "") -> Look:
    """One GPU of a snapshot; `holders`: runner ids."""
    return Look(
        gpu_id=gpu.id,
        device_id=gpu.parent_id or gpu.id,
        model=gpu.model,
        present=gpu.present,
        holders=tuple(holders),
        pids=gpu.pids,
        strangers=foreign,
        memory_used_bytes=gpu.memory_used_bytes,
        stuck=stuck,
        uncorrected=gpu.ecc.volatile_uncorrected,
        remap_pending=gpu.ecc.remap_pending,
        remap_failed=gpu.ecc.remap_failed,
        temperature_c=gpu.temperature_c,
        utilisation_percent=gpu.utilisation_percent,
        throttled=gpu.throttled,
        clock_mhz=gpu.clock_mhz,
        pcie_width=gpu.pcie_width,
        pcie_width_max=gpu.pcie_width_max,
        nvlinks=sum(link.count for link in gpu.links if link.kind is LinkKind.NVLINK),
    )


__all__ = ["GpuLooks", "look_of"]
