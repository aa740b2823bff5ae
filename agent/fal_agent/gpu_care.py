"""Keeps watch over the node's GPUs: every look judged, faults told and remembered, diagnoses made, orders carried out.

Stands between the inventory and the rest of the agent as `ports.Machine`: what it shows of a GPU is what the driver
says under what this module knows of it. Decisions are core/gpu_health's. A fault is on disk (`gpu_file`) soon after it
was found, so that neither a restart of the agent nor a new leader gives a bad GPU out again; a leader is told by the
inventory. One GPU is diagnosed at a time. Made by fal_agent.agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from fal_agent.core import gpu_health
from fal_agent.core.gpu_health import Fault, Health, Look, Stage
from fal_agent.core.tasks import Task
from fal_agent.core.xids import XidClass, xid_of
from fal_agent.gpu_file import GpuFile, Mark
from fal_agent.gpu_looks import GpuLooks, look_of
from fal_agent.inventory.machine import InventoryMachine
from fal_agent.inventory.model import Checked, DeviceEvent, Devices, Snapshot
from fal_agent.ports import MachineView, OnEvent
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, not_found
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2
from fal_runtime.driver import Driver

_XID_EVENT_S: Final = 60.0  # the same XID of a GPU is an event so often at most
_SHOW: Final = "Look at `falctl gpu show`."
_log = get_logger("fal.gpus")


class GpuCare:
    """See the module's docstring. `check`: another than the provider's own. `changed` is set when a look is wanted."""

    def __init__(
        self,
        machine: InventoryMachine,
        devices: Devices,
        *,
        clock: Clock,
        on_event: OnEvent,
        file: GpuFile,
        driver: Driver | None = None,
        may_reset: bool = True,
        check: Callable[[str], asyncio.Future[Checked]] | None = None,
    ) -> None:
        self.changed = asyncio.Event()
        self._machine = machine
        self._devices = devices
        self._clock = clock
        self._on_event = on_event
        self._file = file
        self._seer = GpuLooks(driver, clock)
        self._may_reset = may_reset
        self._check = check or devices.check
        self._tasks: Callable[[], Iterable[Task]] = lambda: ()
        self._health: dict[str, Health] = {}
        self._looks: dict[str, Look] = {}
        self._marks: dict[str, Mark] = {}
        self._shown: object = None
        self._generation = 0
        self._heard: dict[tuple[str, int], float] = {}
        self._cutting: dict[str, None] = {}  # devices
        self._seen = False
        self._diagnoses: dict[str, asyncio.Task[list[str]]] = {}
        self._orders: dict[tuple[str, ...], asyncio.Task[list[str]]] = {}
        self._saving: asyncio.Task[None] | None = None

    def start(self, tasks: Callable[[], Iterable[Task]]) -> None:
        """Begin: take up what was remembered, listen to the driver. `tasks`: all runners of the node, now."""
        self._tasks = tasks
        kept = self._file.load(now_s=self._clock.monotonic_s())
        self._health, self._marks, self._generation = dict(kept.health), dict(kept.marks), kept.generation
        for health in self._health.values():
            if not health.ok:
                self._on_event("GPU_FAULT", health.gpu_id, f"still {_state(health)}: {health.text}")
        self._devices.listen(self._hear)

    async def close(self) -> None:
        """End what is under way; a check of a GPU is killed, and begun anew by the next agent."""
        jobs = [*self._diagnoses.values(), *self._orders.values()]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self._save()

    # ---- ports.Machine

    async def look(self) -> MachineView:
        """What is there now, as far as it may be used."""
        view = await self._machine.look()
        snapshot = self._machine.last
        if snapshot is not None and snapshot.answers and not self._machine.problem:
            await self._judge(snapshot)
        return self._overlay(view)

    def _overlay(self, view: MachineView) -> MachineView:
        inventory = agent_pb2.Inventory()
        inventory.CopyFrom(view.inventory)
        gpus = dict(view.gpus)
        for gpu in inventory.gpus:
            why = self._show(gpu)
            if why:
                gpus[gpu.id] = replace(gpus[gpu.id], unhealthy=why)
        self._count(view.inventory.generation, inventory)
        inventory.generation = self._generation
        for id_, mark in self._marks.items():
            if id_ in gpus:
                gpus[id_] = replace(gpus[id_], changed_at=mark.generation)
        return replace(view, inventory=inventory, gpus=gpus)

    def _show(self, gpu: agent_pb2.Gpu) -> str:
        """Write into `gpu` what is known of it; why it may not be used, empty when it may."""
        health = self._health.get(gpu.id)
        if health is not None and not health.ok:
            gpu.health, gpu.health_reason = agent_pb2.GPU_HEALTH_QUARANTINED, health.text
            gpu.health_state, gpu.health_since_s, gpu.diagnoses = str(health.stage), health.since_s, health.tries
            gpu.health_class = str(health.fault or "") if health.quarantined else ""
        elif (gpu.parent_id or gpu.id) in self._cutting:
            gpu.health, gpu.health_reason = agent_pb2.GPU_HEALTH_QUARANTINED, "its MIG layout is being changed"
        return gpu.health_reason if gpu.health == agent_pb2.GPU_HEALTH_QUARANTINED else ""

    def _count(self, base: int, inventory: agent_pb2.Inventory) -> None:
        """Raise the generation where something that is told has changed, and note which GPUs are others than before."""
        shown = (base, [(g.id, g.health, g.health_reason, g.health_state, g.diagnoses) for g in inventory.gpus])
        fresh = {
            gpu.id: f"{gpu.model}/{gpu.memory_bytes}/{gpu.parent_id}/{gpu.mig_profile}/{gpu.health}"
            for gpu in inventory.gpus
        }
        changed = {id_ for id_, print_ in fresh.items() if id_ not in self._marks or self._marks[id_].print != print_}
        gone = self._marks.keys() - fresh.keys()
        if shown == self._shown and not changed and not gone:
            return
        self._shown = shown
        self._generation += 1
        for id_ in gone:
            del self._marks[id_]
        for id_ in changed:
            self._marks[id_] = Mark(fresh[id_], self._generation)
        self._save_soon()

    # ---- judging

    async def _judge(self, snapshot: Snapshot) -> None:
        looks = await self._seer.of(snapshot, self._tasks())
        now_s, wall_s = self._clock.monotonic_s(), self._clock.wall_s()
        self._looks = {look.gpu_id: look for look in looks}
        for look in looks:
            health = self._health.get(look.gpu_id) or Health(look.gpu_id)
            self._set(gpu_health.see(health, look, now_s=now_s, wall_s=wall_s))
        for id_ in [id_ for id_, health in self._health.items() if id_ not in self._looks and health.ok]:
            del self._health[id_]  # of a layout that was cut anew
        self._diagnose_due()

    def _hear(self, event: DeviceEvent) -> None:
        """The driver told of something."""
        if event.kind == "xid":
            hit = [one for one in self._looks.values() if event.gpu_id in (one.gpu_id, one.device_id)]
            holders = {id_ for one in hit for id_ in one.holders}
            for look in hit:
                self._xid(look, event.code, sole=len(holders) == 1)
        self.changed.set()

    def _xid(self, look: Look, code: int, *, sole: bool) -> None:
        """`sole`: no other runner can have caused it."""
        now_s, wall_s = self._clock.monotonic_s(), self._clock.wall_s()
        last_s = self._heard.get((look.gpu_id, code))
        if last_s is None or now_s - last_s >= _XID_EVENT_S:
            self._heard[look.gpu_id, code] = now_s
            known = xid_of(code)
            whose = f"; runner {look.holder} holds it" if look.holder else ""
            self._on_event("GPU_XID", look.gpu_id, f"XID {code} ({known.kind}): {known.text}{whose}")
        blamed = look.holder if sole or xid_of(code).kind is not XidClass.APPLICATION else ""
        health = self._health.get(look.gpu_id) or Health(look.gpu_id)
        self._set(gpu_health.xid(health, code, runner=blamed, now_s=now_s, wall_s=wall_s))

    def _set(self, health: Health) -> None:
        before = self._health.get(health.gpu_id) or Health(health.gpu_id)
        self._health[health.gpu_id] = health
        if gpu_health.keep(before) != gpu_health.keep(health):
            self._save_soon()
        if (before.stage, before.fault) == (health.stage, health.fault):
            return
        self.changed.set()
        match health.stage:
            case Stage.OK:
                self._on_event("GPU_VERIFIED", health.gpu_id, f"may be used again: {health.verdict}")
            case Stage.DIAGNOSING:
                self._on_event("GPU_DIAGNOSING", health.gpu_id, health.reason)
            case _:
                self._on_event("GPU_FAULT", health.gpu_id, f"{_state(health)}: {health.text}")

    # ---- diagnoses

    def _diagnose_due(self) -> None:
        if not self._seen:  # the first look comes before the agent knows its containers
            self._seen = True
            return
        if self._diagnoses or self._cutting:
            return
        now_s = self._clock.monotonic_s()
        for look in self._looks.values():
            health = self._health[look.gpu_id]
            if gpu_health.due(health, look, now_s=now_s):
                self._diagnose(health, asked=False)
                return

    def _diagnose(self, health: Health, *, asked: bool) -> asyncio.Task[list[str]]:
        self._set(gpu_health.begin(health, asked=asked))
        job = asyncio.create_task(self._examine(health.gpu_id), name=f"diagnose {health.gpu_id}")
        self._diagnoses[health.gpu_id] = job
        job.add_done_callback(lambda _: self._diagnosed(health.gpu_id))
        return job

    def _diagnosed(self, gpu_id: str) -> None:
        self._diagnoses.pop(gpu_id, None)
        self.changed.set()

    async def _examine(self, gpu_id: str) -> list[str]:
        """One diagnose; a line for each step. Whatever happens, the GPU leaves DIAGNOSING."""
        lines: list[str] = []
        passed, verdict = False, "the diagnose was interrupted"
        try:
            passed, verdict = await self._steps(gpu_id, lines)
        except FalError as exc:
            verdict = exc.what
        except Exception as exc:  # a mistake of ours must not hold a GPU for ever
            _log.exception("unexpected", gpu=gpu_id)
            verdict = f"internal error: {exc!r}"
        finally:
            now_s, wall_s = self._clock.monotonic_s(), self._clock.wall_s()
            health = gpu_health.finish(self._health[gpu_id], passed=passed, verdict=verdict, now_s=now_s, wall_s=wall_s)
            self._set(health)
            lines.append(("passed: " if health.ok else "failed: ") + health.verdict)
        return lines

    async def _steps(self, gpu_id: str, lines: list[str]) -> tuple[bool, str]:
        look = self._looks[gpu_id]
        if self._health[gpu_id].wants_reset:
            await self._reset(look)
            lines.append(f"device {look.device_id} was reset")
        look = await self._idle(gpu_id)
        lines.append(f"idle: no process, {look.memory_used_bytes >> 20} MiB of memory in use")
        checked = await self._check(gpu_id)
        lines.append(f"check: {checked.text}")
        if not checked.passed:
            return False, checked.text
        after = self._raw(await self._snapshot(), gpu_id)
        if after.uncorrected > look.uncorrected:
            return False, f"{after.uncorrected - look.uncorrected} memory errors came while it was checked"
        lines.append("error counters: steady")
        if after.throttled:
            return False, f"at work it was slowed down ({', '.join(after.throttled)})"
        return True, checked.text

    async def _reset(self, look: Look) -> None:
        if not self._may_reset:
            what = f"GPU {look.device_id} needs a reset, and this agent may not do that (gpu_reset)"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Restart the machine.")
        used = [one.gpu_id for one in self._looks.values() if one.device_id == look.device_id and one.holder]
        if used:
            what = f"device {look.device_id} needs a reset, and {', '.join(used)} of it is in use"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="It is tried again.")
        await self._devices.reset(look.device_id)

    async def _idle(self, gpu_id: str) -> Look:
        """It as it is now, with nobody on it and nothing in its counters. FAILED_PRECONDITION else."""
        look = self._raw(await self._snapshot(), gpu_id)
        why = gpu_health.blocked(replace(self._health[gpu_id], signs={}), look) or gpu_health.memory_fault(look)
        if why:
            raise FalError(Code.FAILED_PRECONDITION, why, remedy="It is tried again.")
        return look

    async def _snapshot(self) -> Snapshot:
        await self._machine.look()
        snapshot = self._machine.last
        if snapshot is None or self._machine.problem:
            raise FalError(Code.UNAVAILABLE, self._machine.problem or "nothing was seen yet", remedy=_SHOW)
        return snapshot

    def _raw(self, snapshot: Snapshot, gpu_id: str) -> Look:
        """As the driver says it, without the processes' kinship."""
        gpu = next((one for one in snapshot.gpus if one.id == gpu_id), None)
        holders = [task.runner_id for task in self._tasks() if task.live and gpu_id in task.assignment.gpus]
        return look_of(gpu, holders) if gpu is not None else Look(gpu_id, present=False)

    # ---- orders

    async def order(self, order: agent_pb2.GpuOrder) -> agent_pb2.GpuOrderResult:
        """Carry an order out; the same one again joins it. Never raises but for cancellation, which stops nothing."""
        key = (order.gpu, order.action, *order.layout)
        job = self._orders.get(key)
        if job is None:
            job = self._orders[key] = asyncio.create_task(self._carry_out(order), name=f"order {order.action}")
            job.add_done_callback(lambda done: self._ordered(key, done))
        try:
            lines = await asyncio.shield(job)
        except FalError as exc:
            return agent_pb2.GpuOrderResult(id=order.id, error=exc.what, remedy=exc.remedy)
        return agent_pb2.GpuOrderResult(id=order.id, lines=lines)

    def _ordered(self, key: tuple[str, ...], done: asyncio.Task[list[str]]) -> None:
        self._orders.pop(key, None)
        if not done.cancelled():
            done.exception()  # seen, should nobody wait any more

    async def _carry_out(self, order: agent_pb2.GpuOrder) -> list[str]:
        await self.look()
        match order.action:
            case "release":
                return await self._release(order.gpu)
            case "clear":
                return self._clear(order.gpu)
            case "mig":
                return await self._cut(order.gpu, list(order.layout))
        what = f"order {order.action!r} is unknown to this agent"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Upgrade the agent.")

    async def _release(self, gpu_id: str) -> list[str]:
        job = self._diagnoses.get(gpu_id)
        if job is None:
            health, look = self._known(gpu_id)
            why = gpu_health.blocked(health, look)
            if health.ok and look.holder:
                return [f"{why}, and its node finds no fault: it was not looked at"]
            if why:
                remedy = "Wait until it is free; --force gives it back as it is."
                raise FalError(Code.FAILED_PRECONDITION, f"GPU {gpu_id} cannot be looked at: {why}", remedy=remedy)
            job = self._diagnose(health, asked=True)
        lines = await asyncio.shield(job)
        if not self._health[gpu_id].ok:
            what = f"GPU {gpu_id} was looked at and stays quarantined: {'; '.join(lines)}"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Repair it; --force gives it back as it is.")
        return lines

    def _clear(self, gpu_id: str) -> list[str]:
        health, _ = self._known(gpu_id)
        if (job := self._diagnoses.get(gpu_id)) is not None:
            job.cancel()
        if health.ok:
            return ["its node finds no fault"]
        self._set(gpu_health.clear(health, wall_s=self._clock.wall_s()))
        return [f"given back unseen; it was {_state(health)}: {health.text}"]

    async def _cut(self, gpu_id: str, layout: Sequence[str]) -> list[str]:
        parts = [look for look in self._looks.values() if look.device_id == gpu_id]
        if not parts:
            raise not_found("GPU", gpu_id, remedy="Name a device of this node.")
        for look in parts:
            why = gpu_health.blocked(self._health[look.gpu_id], look)
            if look.gpu_id in self._diagnoses:
                why = "it is being diagnosed"
            elif not why and self._health[look.gpu_id].quarantined:
                why = f"it is quarantined: {self._health[look.gpu_id].text}"
            if why:
                remedy = "Quarantine it, and wait until its runners are gone."
                what = f"GPU {gpu_id} cannot be cut: of {look.gpu_id}, {why}"
                raise FalError(Code.FAILED_PRECONDITION, what, remedy=remedy)
        self._cutting[gpu_id] = None
        self.changed.set()
        try:
            await self._devices.set_mig(gpu_id, layout)
        finally:
            del self._cutting[gpu_id]
            self.changed.set()
        await self.look()
        made = [gpu for gpu in (self._machine.last.gpus if self._machine.last else ()) if gpu.parent_id == gpu_id]
        return [f"{gpu.id} {gpu.model}" for gpu in made] or [f"{gpu_id} is whole"]

    def _known(self, gpu_id: str) -> tuple[Health, Look]:
        look = self._looks.get(gpu_id)
        if look is None:
            raise not_found("GPU", gpu_id, remedy="falctl gpu list shows what the node has.")
        return self._health[gpu_id], look

    # ---- over a restart

    def _save_soon(self) -> None:
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save(), name="keep GPU health")

    async def _save(self) -> None:
        """Keep it; again where it changed meanwhile. On a full disk it is tried with the next change."""
        await self._file.save(lambda: (self._health, self._marks, self._generation))


def _state(health: Health) -> str:
    return f"{health.stage} ({health.fault})" if health.fault not in (None, Fault.SUSPECT) else str(health.stage)


__all__ = ["GpuCare"]
