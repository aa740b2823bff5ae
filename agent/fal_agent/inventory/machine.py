"""The inventory as the rest of the agent uses it: `ports.Machine` over any provider.

When a look fails (a hung driver), the last one is shown with every GPU unfit, so that nothing new is placed and
what runs is left alone. Who asks while a look is under way shares the next one with all others who do: fifty runners
that start at once cost two looks, and nobody sees what was there before he asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fal_agent.core.admission import GpuView
from fal_agent.inventory.cdi import GpuNames
from fal_agent.inventory.host import read_host
from fal_agent.inventory.model import Devices, Gpu, Inventory, Snapshot
from fal_agent.inventory.nvml import NvmlInventory
from fal_agent.inventory.sim_faults import FAULT_FILE
from fal_agent.inventory.simulated import SimulatedInventory
from fal_agent.inventory.spec import parse_sim_gpus
from fal_agent.ports import MachineView
from fal_contract.errors import FalError
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2

_log = get_logger("fal.inventory")


def open_inventory(*, sim_gpus: str, node_name: str, state_dir: Path) -> Devices:
    """The provider that the options ask for. `sim_gpus` empty: NVML. Raises INVALID for a bad specification."""
    if sim_gpus:
        return SimulatedInventory(
            parse_sim_gpus(sim_gpus),
            node_name=node_name,
            read_host=lambda: read_host(state_dir),
            fault_file=state_dir / FAULT_FILE,
        )
    return NvmlInventory(read_host=lambda: read_host(state_dir))


class InventoryMachine:
    """Implements `ports.Machine`."""

    def __init__(
        self,
        inventory: Inventory,
        *,
        on_problem: Callable[[str], None] = lambda message: None,
        names: GpuNames | None = None,
    ) -> None:
        self._inventory = inventory
        self._on_problem = on_problem
        self._names = names
        self._cdi: Mapping[str, str] = {}
        self._last: Snapshot | None = None
        self._problem = self._failed = ""
        self._raised = 0  # generations that were added here, for looks that failed
        self._looking: asyncio.Task[MachineView] | None = None  # the last that has begun
        self._next: asyncio.Task[MachineView] | None = None  # has not begun: more may join

    async def look(self) -> MachineView:
        """What is there now. Raises FalError only when there never was a successful look."""
        if self._next is None:
            self._next = asyncio.create_task(self._look_in_turn(), name="look at the machine")
            self._next.add_done_callback(_retrieved)
        return await asyncio.shield(self._next)

    async def _look_in_turn(self) -> MachineView:
        if self._looking is not None and not self._looking.done():
            await asyncio.wait({self._looking})
        self._looking, self._next = self._next, None
        return await self._look()

    async def _look(self) -> MachineView:
        try:
            snapshot = await self._inventory.snapshot()
        except FalError as error:
            if self._last is None:
                raise
            self._failed = error.what
            self._say(str(error))
            unfit = tuple(replace(gpu, degraded=gpu.degraded or error.what) for gpu in self._last.gpus)
            return self._view(replace(self._last, gpus=unfit, problem=error.what))
        self._last, self._failed = snapshot, ""
        self._say(snapshot.problem)
        if self._names is not None and any(gpu.device_nodes for gpu in snapshot.gpus):
            self._cdi = await asyncio.to_thread(self._names.refresh, snapshot)
        return self._view(snapshot)

    @property
    def last(self) -> Snapshot | None:
        """What was seen last; None before the first look that succeeded."""
        return self._last

    @property
    def problem(self) -> str:
        """Why the last look failed; empty when it did not."""
        return self._failed

    async def close(self) -> None:
        """Let go of the driver."""
        await self._inventory.close()

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            self._raised += 1
            self._problem = problem
            if problem:
                _log.warning("inventory_problem", message=problem)
                self._on_problem(problem)

    def _view(self, snapshot: Snapshot) -> MachineView:
        told = told_of(snapshot)
        told.generation += self._raised
        return MachineView(
            inventory=told,
            gpus={
                gpu.id: GpuView(
                    id=gpu.id, unhealthy=gpu.degraded, memory_used_bytes=gpu.memory_used_bytes, pids=gpu.pids
                )
                for gpu in snapshot.gpus
            },
            memory_bytes=snapshot.host.memory_bytes,
            cpu_milli=snapshot.host.cpu_cores * 1000,
            devices={gpu.id: gpu.device_nodes for gpu in snapshot.gpus},
            cdi=self._cdi,
        )


def _retrieved(look: asyncio.Task[MachineView]) -> None:
    """Its error is told to whoever still waits; when nobody does it is none."""
    if not look.cancelled():
        look.exception()


def told_of(snapshot: Snapshot) -> agent_pb2.Inventory:
    """The snapshot as the scheduler is told it."""
    return agent_pb2.Inventory(
        generation=snapshot.generation,
        gpus=[_gpu(gpu) for gpu in snapshot.gpus],
        driver_version=snapshot.driver_version,
        cuda_version=snapshot.cuda_version,
        cpu_milli=snapshot.host.cpu_cores * 1000,
        memory_bytes=snapshot.host.memory_bytes,
        disk_free_bytes=snapshot.host.disk_free_bytes,
        kernel=snapshot.host.kernel,
    )


def _gpu(gpu: Gpu) -> agent_pb2.Gpu:
    return agent_pb2.Gpu(
        id=gpu.id,
        index=gpu.index,
        model=gpu.model,
        product=gpu.product,
        memory_bytes=gpu.memory_bytes,
        memory_used_bytes=gpu.memory_used_bytes,
        pci_bus_id=gpu.pci_bus_id,
        numa_node=gpu.numa_node,
        links=[agent_pb2.GpuLink(peer_id=link.peer_id, kind=str(link.kind), count=link.count) for link in gpu.links],
        mig_profile=gpu.mig_profile,
        parent_id=gpu.parent_id,
        ecc_uncorrected=gpu.ecc.volatile_uncorrected,
        temperature_c=max(0, gpu.temperature_c),
        power_w=max(0, gpu.power_w),
        health=agent_pb2.GPU_HEALTH_OK if gpu.ok else agent_pb2.GPU_HEALTH_QUARANTINED,
        health_reason=gpu.degraded,
    )
