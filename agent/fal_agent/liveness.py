"""Whether a runner that serves still does: its liveness probe, and what its container went through meanwhile.

Called by fal_agent.runner for each serving runner; changes nothing. A container whose monitor died serves on: that is
better than none, so it is told, and the scheduler starts another before it drains this one. A process that was killed
for memory while the main one lives on is told once per kill.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final, Protocol

from fal_agent.ports import OnEvent
from fal_contract.errors import FalError
from fal_runtime.driver import ContainerStatus, Driver, Phase

_LOOK_TIMEOUT_S: Final = 5.0


class Timing(Protocol):
    """The parts of a probe that matter here."""

    @property
    def interval_s(self) -> float:
        """Between two questions."""
        ...

    @property
    def failures_max(self) -> int:
        """So many in a row are too many."""
        ...


class Wounds:
    """What a container that runs went through; each is an event once."""

    def __init__(self, driver: Driver, on_event: OnEvent, runner_id: str, container: str) -> None:
        self._driver = driver
        self._on_event = on_event
        self._runner_id = runner_id
        self._container = container
        self._told: set[str] = set()
        self.wounded = False  # once its monitor is dead it stays so

    async def look(self) -> str:
        """What an operator should read beside its state; empty: nothing."""
        status: ContainerStatus | None = None
        with contextlib.suppress(FalError, TimeoutError):
            async with asyncio.timeout(_LOOK_TIMEOUT_S):
                status = await self._driver.status(self._container)
        if status is None or status.phase is not Phase.RUNNING:
            return ""
        if status.oom_killed:
            self._tell("OUT_OF_MEMORY", "the kernel killed a process of it for its memory limit; the main one runs on")
        if status.reason:
            self.wounded = True
            self._tell("CONTAINER_WOUNDED", f"{status.reason}; it serves on until another has taken its place")
        return status.reason

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._on_event(kind, self._runner_id, text)


async def watch(
    timing: Timing,
    ask: Callable[[], Awaitable[str]],
    wounds: Wounds,
    trouble: Callable[[str], None],
    rng: Random,
    may_fail: Callable[[], bool],
) -> str:
    """Ask from time to time, until it failed too often in a row; returns why. `trouble` hears what is wrong now."""
    failures = 0
    if wound := await wounds.look():
        trouble(wound)
    await asyncio.sleep(rng.uniform(0, timing.interval_s))  # a full node's probes spread out
    while True:
        why = await ask()
        failures = failures + 1 if why else 0
        said = f"liveness probe failed {failures} of {timing.failures_max} times: {why}" if why else ""
        trouble(said or await wounds.look())
        if failures >= timing.failures_max and may_fail():
            return f"liveness probe failed {failures} times in a row: {why}"
        await asyncio.sleep(timing.interval_s)
