"""What a runner works with, and how several of its moves are made at once. Put together by fal_agent.agent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from cryptography.hazmat.primitives.asymmetric import ec

from fal_agent import worker_control
from fal_agent.core.tasks import Task
from fal_agent.gpu_orders import CarryOut, no_gpus
from fal_agent.packing import Packer
from fal_agent.ports import Control, Machine, MachineView, OnAccess, OnEvent, Places, Prober, ProxyPort, WeightCache
from fal_agent.reboot import Reboot, never
from fal_agent.runner_secrets import AskSecrets
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_runtime import driver as runtime


async def _no_scheduler(runner_id: str) -> Mapping[str, bytes]:
    raise FalError(Code.UNAVAILABLE, "no scheduler is known", remedy="It is asked again.")


@dataclass(frozen=True, slots=True)
class Tools:
    """The world, and how the node hears of changes. `save` makes a task durable, best effort: the driver knows too.

    `view`: the machine as the node saw it last, when it admitted a runner or later; None: look at it.
    `secrets` asks the scheduler for a runner's. `ca_key`: whose signature makes an entry of the compile
    cache good; None: nobody's.
    """

    driver: runtime.Driver
    cache: WeightCache
    proxy: ProxyPort
    prober: Prober
    machine: Machine
    places: Places
    clock: Clock
    rng: Random
    on_event: OnEvent
    save: Callable[[Task], Awaitable[None]]
    on_access: OnAccess = lambda access: None
    view: Callable[[], MachineView | None] = lambda: None
    ca_key: Callable[[], ec.EllipticCurvePublicKey | None] = lambda: None
    secrets: AskSecrets = _no_scheduler
    packer: Packer = field(default_factory=Packer)
    on_created: Callable[[runtime.ContainerSpec], None] = lambda spec: None
    gpu_order: CarryOut = no_gpus
    control: Control = worker_control.ask
    reboot: Reboot = never

    async def create(self, spec: runtime.ContainerSpec) -> None:
        """Have the driver make it; what was made once is kept ready (`fal_agent.spares`)."""
        await self.driver.create(spec)
        self.on_created(spec)


async def together(stages: Sequence[Awaitable[object]], make: Awaitable[None]) -> None:
    """All at once; the first error cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for job in (*stages, make):
                group.create_task(_awaited(job))
    except BaseExceptionGroup as errors:
        # Not `except*`: what is raised below that leaves it inside another group, on some releases of Python 3.11.
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


async def _awaited(job: Awaitable[object]) -> None:
    await job
