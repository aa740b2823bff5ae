"""The node: what runs here, what the scheduler wants, what it is told.

Invariants: the scheduler's word passes core/standing.py and core/admission.py before it touches anything; an
admission is durable before its runner starts; a container that no set names is an orphan: kept, told, never stopped
for that. Nothing here knows of streams: fal_agent.session calls `welcome`, `receive`, `hello`, `take_report`, so the
simulation runs the same code. One event loop; `receive` is not called twice at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace

from fal_agent import launch, recovery, wire
from fal_agent.core.admission import NodeView, Refusal, admit
from fal_agent.core.assignments import Assignment, Assignments, Complete, Delta, Goal, receive
from fal_agent.core.notice import Announced
from fal_agent.core.standing import Leader, Standing, distrust, obey, stale, works_for
from fal_agent.core.tasks import Phase, Task
from fal_agent.journal import Journal
from fal_agent.journal_codec import Forget, Record
from fal_agent.ports import MachineView, Usage
from fal_agent.proxy.messages import ProxyStats, RunnerEntry
from fal_agent.runner import Runner
from fal_agent.told import NoticeTold, inventory_told
from fal_agent.tools import Tools
from fal_contract.errors import Code, FalError, not_found
from fal_contract.limits import ACCESS_LISTS_MAX, NODE_EVENTS_MAX
from fal_contract.v1 import agent_pb2
from fal_contract.versions import FEATURES, WIRE_MAX, WIRE_MIN
from fal_runtime.container_use import ContainerUse
from fal_runtime.driver import LogLine
from fal_runtime.driver import Phase as ContainerPhase
from fal_runtime.exec_session import ExecSession, Terminal


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the agent runs."""

    node_id: str
    boot_id: str
    agent_id: str
    capabilities: agent_pb2.Capabilities
    networks: frozenset[str] = frozenset({"none", "egress", "host"})
    software: str = ""


class Node:
    """See the module's docstring. `tools.save` and `tools.on_event` are set by the node itself."""

    def __init__(self, facts: Facts, tools: Tools, journal: Journal) -> None:
        self.changed = asyncio.Event()  # something to report
        self.endpoints: tuple[agent_pb2.Endpoint, ...] = ()
        self._facts = facts
        self._tools = replace(
            tools, save=self._save, on_event=self.event, on_access=self._accessed, view=lambda: self._view
        )
        self._journal = journal
        self._standing = journal.recorded().standing
        self._leader: Leader | None = None
        self._set = Assignments()
        self._runners: dict[str, Runner] = {}
        self._refused: dict[str, agent_pb2.RunnerStatus] = {}
        self._dirty: dict[str, None] = {}  # runner ids in the order of change
        self._gone: list[str] = []
        self._events: deque[agent_pb2.NodeEvent] = deque(maxlen=NODE_EVENTS_MAX)
        self._view = MachineView(agent_pb2.Inventory(), {})
        self._told_generation = -1
        self._told_quarantine: frozenset[str] = frozenset()
        self._tunnels: tuple[str, ...] = ()
        self._told_tunnels: tuple[str, ...] = ()
        self._access: deque[agent_pb2.AccessList] = deque(maxlen=ACCESS_LISTS_MAX)
        self._notice = NoticeTold()
        self._saving: set[asyncio.Task[None]] = set()

    # ---- life

    async def start(self) -> None:
        """Take back what runs here, then go on with it. Nothing is stopped."""
        self._view = await self._tools.machine.look()
        tasks = await recovery.take_back(self._journal.recorded(), self._tools)
        for task in tasks:
            self._runners[task.runner_id] = Runner(task, self._tools, self._note)
            if not task.known:
                self.event("ORPHAN", task.runner_id, "a container without an entry in the journal: kept")
        for runner in self._runners.values():
            runner.run()

    async def close(self) -> None:
        """Stop driving; containers go on."""
        await asyncio.gather(*(runner.close() for runner in self._runners.values()), *self._saving)

    def event(self, kind: str, subject: str, message: str) -> None:
        """Something that an operator may want to know; kept for the scheduler while it is away, up to a bound."""
        now_s = self._tools.clock.wall_s()
        self._events.append(agent_pb2.NodeEvent(time_s=now_s, kind=kind, subject=subject, message=message))
        self.changed.set()

    def _accessed(self, access: agent_pb2.AccessList) -> None:
        """A start of an image was recorded."""
        self._access.append(access)
        self.changed.set()

    def announce(self, announced: Announced | None) -> None:
        """What is announced for the machine now; None: nothing."""
        self._notice.set(announced)
        self.changed.set()

    def in_setup(self) -> bool:
        """Is a runner being made, or not ready yet?"""
        return any(r.task.phase < Phase.READY and r.task.goal is Goal.RUN for r in self._runners.values())

    async def look(self) -> None:
        """Look at the machine again; a change is told. Call it from time to time."""
        self._view = await self._tools.machine.look()
        if self._inventory_news() is not None:
            self.changed.set()

    # ---- what the session brings

    def hello(self) -> agent_pb2.Hello:
        """Everything; a session begins with it, so nothing older is left to report."""
        facts = self._facts
        self._dirty.clear()
        self._gone.clear()
        self._set = Assignments()
        self._leader = None
        self._told_tunnels = self._tunnels
        inventory = self._inventory()
        self._told(inventory)
        hello = agent_pb2.Hello(
            versions=agent_pb2.Versions(min=WIRE_MIN, max=WIRE_MAX, features=sorted(FEATURES), software=facts.software),
            node_id=facts.node_id,
            boot_id=facts.boot_id,
            agent_id=facts.agent_id,
            wall_s=self._tools.clock.wall_s(),
            inventory=inventory,
            runners=[self._status(runner) for _, runner in sorted(self._runners.items())],
            endpoints=self.endpoints,
            capabilities=facts.capabilities,
        )
        wire.standing_into(hello, self._standing)
        self._notice.into_hello(hello, now_s=hello.wall_s)
        return hello

    def welcome(self, leader: Leader) -> None:
        """The scheduler answered. A foreign or older one is listened to and not obeyed."""
        self._leader = leader
        if why := distrust(self._standing, leader):
            self.event("DISTRUSTED", leader.cluster_id, why)

    async def receive(self, message: Complete | Delta) -> None:
        """The assignment set changed. Raises Gap and STALE_TERM: the session starts over."""
        leader = self._leader
        if leader is None:
            raise FalError(Code.FAILED_PRECONDITION, "assignments came before a welcome", remedy="Upgrade the peer.")
        doubt = distrust(self._standing, leader)
        if not doubt and (error := stale(self._standing, message.term)) is not None:
            raise error
        self._set = receive(self._set, message)
        put = self._set.by_runner.values() if isinstance(message, Complete) else message.put
        if doubt:
            self._turn_away(put, Refusal(Code.FAILED_PRECONDITION, doubt))
            return
        standing = obey(self._standing, leader, message.term)
        fresh = [a for a in put if self._is_new(a)]
        if any(a.gpus for a in fresh):
            self._view = await self._tools.machine.look()
        told = [a for a in put if a not in fresh]
        admitted = self._admit(fresh, standing, message.term)
        changed = [self._runners[a.runner_id] for a in told if self._tell(a)]
        forgotten = self._orphans_and_forgotten()
        if not any(runner.task.orphan for runner in self._runners.values()):
            standing = works_for(standing, leader, message.store_revision)
        await self._commit(standing, admitted, changed, forgotten)
        self.changed.set()

    async def tell_term(self) -> None:
        """The proxy learns the leader's term. Best effort: it is told again when it comes back."""
        try:
            await self._tools.proxy.set_term(self._standing.term)
        except FalError as exc:
            self.event("PROXY_SILENT", "fal-proxy", exc.what)

    async def gateways(self, message: agent_pb2.GatewaySet) -> None:
        try:
            await self._tools.proxy.set_gateways(wire.gateways_of(message))
        except FalError as exc:
            self.event("PROXY_SILENT", "fal-proxy", exc.what)

    async def revocations(self, message: agent_pb2.RevocationSet) -> None:
        """Callers that the proxy refuses. It is told again when it comes back."""
        try:
            await self._tools.proxy.set_revoked(wire.revoked_of(message))
        except FalError as exc:
            self.event("PROXY_SILENT", "fal-proxy", exc.what)

    def take_report(self) -> agent_pb2.Report:
        """What changed since the last report; empty: a heartbeat."""
        self.changed.clear()
        report = agent_pb2.Report(assignments_revision=self._set.revision)
        for id in self._dirty:
            if (runner := self._runners.get(id)) is not None:
                report.runners.append(self._status(runner))
                if runner.task.orphan and not runner.task.live:
                    self._forget_later(runner)
                    report.gone.append(id)
            elif (refused := self._refused.get(id)) is not None:
                report.runners.append(refused)
        report.gone.extend(self._gone)
        self._dirty.clear()
        self._gone.clear()
        if (inventory := self._inventory_news()) is not None:
            self._told(inventory)
            report.inventory.CopyFrom(inventory)
        report.tunnels.extend(self._tunnels)
        self._told_tunnels = self._tunnels
        self._notice.into_report(report, now_s=self._tools.clock.wall_s())
        report.access.extend(self._access)
        self._access.clear()
        report.events.extend(self._events)
        self._events.clear()
        return report

    async def logs(
        self, runner_id: str, *, tail_lines: int, follow: bool, since_s: float = 0.0
    ) -> AsyncIterator[LogLine]:
        """A runner's output; of one that is gone what the driver kept, else its last lines."""
        runner, id = self._runners.get(runner_id), launch.container_id(runner_id)
        try:
            async for line in self._tools.driver.logs(id, tail_lines=tail_lines, follow=follow, since_s=since_s):
                yield line
        except FalError as exc:
            if exc.code is not Code.NOT_FOUND:
                raise
            if runner is None:
                remedy = "falctl runner list shows which node it is on; output of ended ones is kept for a day."
                raise not_found("runner", runner_id, remedy=remedy) from None
            if runner.task.phase < Phase.REMOVED:
                raise
            for text in runner.task.log_tail[len(runner.task.log_tail) - tail_lines :] if tail_lines else ():
                yield LogLine(0.0, "stdout", text)

    async def exec(self, runner_id: str, command: tuple[str, ...], terminal: Terminal | None) -> ExecSession:
        """Run a command in its container."""
        return await self._tools.driver.exec(self._container(runner_id), command, terminal=terminal)

    async def gpu_order(self, order: agent_pb2.GpuOrder) -> agent_pb2.GpuOrderResult:
        """Carry out an order about one GPU, then tell what it has changed."""
        result = await self._tools.gpu_order(order)
        await self.look()
        return result

    async def reboot(self, boot_id: str) -> None:
        """Reboot the machine where it is still of that boot. FAILED_PRECONDITION: it may not, or something runs."""
        if boot_id != self._facts.boot_id:
            return
        doubt = distrust(self._standing, self._leader) if self._leader is not None else "no leader is known"
        if doubt:
            raise FalError(Code.FAILED_PRECONDITION, doubt, remedy="Look at the alarms in `falctl status`.")
        if live := [runner.id for runner in self._runners.values() if runner.task.live]:
            what = f"{len(live)} runners are left on it, {live[0]} among them"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Drain it first.")
        await self._tools.reboot()

    async def top(self, runner_id: str) -> ContainerUse:
        """What its container uses."""
        return await self._tools.driver.top(self._container(runner_id))

    async def why_ended(self, runner_id: str) -> str:
        """Why its container does not run; empty while it does."""
        runner = self._runners.get(runner_id)
        status = await self._tools.driver.status(launch.container_id(runner_id)) if runner is not None else None
        if status is None:
            return "it is gone"
        return "" if status.phase is not ContainerPhase.EXITED else status.reason or "it has exited"

    def _container(self, runner_id: str) -> str:
        """Its container's id. NOT_FOUND, FAILED_PRECONDITION: it has none yet, or none any more."""
        runner = self._runners.get(runner_id)
        if runner is None:
            raise not_found("runner", runner_id, remedy="falctl runner list shows which node it is on.")
        if not Phase.CREATED <= runner.task.phase < Phase.REMOVED:
            what = f"runner {runner_id} has no container now"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="falctl runner show tells why.")
        return launch.container_id(runner_id)

    # ---- what the proxy tells

    def count(self, stats: ProxyStats) -> None:
        """The proxy pushed its counters."""
        for row in stats.runners:
            if (runner := self._runners.get(row.runner_id)) is not None:
                runner.count(Usage(row.in_flight, row.served, row.last_used_age_s, row.busy_s))
        self._tunnels = stats.tunnels
        if self._tunnels != self._told_tunnels:
            self.changed.set()

    def entries(self) -> list[RunnerEntry]:
        """What the proxy should serve, for a proxy that came back."""
        live = (runner.entry for runner in self._runners.values() if runner.task.phase < Phase.EXITED)
        return [entry for entry in live if entry is not None]

    def kept(self) -> frozenset[str]:
        """Runners that a proxy may know from before a restart of this agent: not to be taken out of it."""
        return frozenset(id for id, runner in self._runners.items() if runner.task.phase < Phase.EXITED)

    # ---- inside

    @property
    def standing(self) -> Standing:
        return self._standing

    def tasks(self) -> list[Task]:
        return [runner.task for runner in self._runners.values()]

    def _is_new(self, assignment: Assignment) -> bool:
        """True when it asks for a runner that is not here (or is over, and this is another assignment)."""
        runner = self._runners.get(assignment.runner_id)
        if runner is not None:
            return not runner.task.live and runner.task.assignment.id != assignment.id
        refused = self._refused.get(assignment.runner_id)
        return refused is None or refused.assignment_id != assignment.id

    def _tell(self, assignment: Assignment) -> bool:
        """Tell a runner that is here. A refusal stays one: a repeated message must not start what was given away."""
        self._note(assignment.runner_id)
        runner = self._runners.get(assignment.runner_id)
        return runner is not None and runner.assign(assignment)

    def _admit(self, fresh: Sequence[Assignment], standing: Standing, term: int) -> list[Task]:
        view = NodeView(
            gpus=self._view.gpus,
            memory_bytes=self._view.memory_bytes,
            cpu_milli=self._view.cpu_milli,
            images="images" in self._facts.capabilities.features,
            networks=self._facts.networks,
            term_seen=standing.term,
        )
        tasks = self.tasks()
        admitted: list[Task] = []
        for assignment in fresh:
            refusal = admit(assignment, view, [*tasks, *admitted], leader_term=term)
            if refusal is None:
                admitted.append(Task(assignment))
            else:
                self._turn_away([assignment], refusal)
        return admitted

    def _turn_away(self, assignments: Iterable[Assignment], refusal: Refusal) -> None:
        for assignment in assignments:
            if assignment.runner_id not in self._runners:
                self._refused[assignment.runner_id] = wire.refused(assignment, refusal.code, refusal.reason)
                self._note(assignment.runner_id)

    def _orphans_and_forgotten(self) -> list[Runner]:
        """Mark runners that no set names; returns those that are over and may be forgotten."""
        forgotten = []
        for id, runner in self._runners.items():
            orphan = id not in self._set.by_runner
            if orphan and not runner.task.live:
                forgotten.append(runner)
            elif orphan != runner.task.orphan:
                runner.mark_orphan(orphan)
                if orphan:
                    self.event("ORPHAN", id, "the scheduler does not know this runner: kept")
        for id in [id for id in self._refused if id not in self._set.by_runner]:
            del self._refused[id]
        return forgotten

    async def _commit(
        self, standing: Standing, admitted: list[Task], changed: list[Runner], forgotten: list[Runner]
    ) -> None:
        """Make it durable, then begin. On a full disk nothing new begins; what runs is obeyed on."""
        records: list[Record] = [*admitted, *(r.task for r in changed), *(Forget(r.id) for r in forgotten)]
        if records or standing != self._standing:
            try:
                await self._journal.write(standing, *records)
            except FalError as exc:
                self.event("JOURNAL_FULL", self._facts.node_id, str(exc))
                for task in admitted:
                    self._turn_away([task.assignment], Refusal(exc.code, str(exc)))
                admitted = []
        self._standing = standing
        for runner in forgotten:
            del self._runners[runner.id]
            self._gone.append(runner.id)
        for task in admitted:
            self._refused.pop(task.runner_id, None)
            if task.runner_id in self._gone:
                self._gone.remove(task.runner_id)  # its former life was; told now it would mean this one
            runner = self._runners[task.runner_id] = Runner(task, self._tools, self._note)
            runner.run()
            self._note(task.runner_id)

    def _forget_later(self, runner: Runner) -> None:
        del self._runners[runner.id]
        # Lost with a crash it is only told once more.
        saving = asyncio.create_task(self._save(Forget(runner.id)))
        self._saving.add(saving)
        saving.add_done_callback(self._saving.discard)

    async def _save(self, record: Record) -> None:
        """Durable, best effort: the driver remembers what matters most, and the disk may have room again later."""
        try:
            await self._journal.write(record)
        except FalError as exc:
            self.event("JOURNAL_FULL", self._facts.node_id, str(exc))

    def _note(self, runner_id: str) -> None:
        self._dirty[runner_id] = None
        self.changed.set()

    def _status(self, runner: Runner) -> agent_pb2.RunnerStatus:
        status = wire.status_of(runner.task, runner.usage, now_wall_s=self._tools.clock.wall_s())
        if runner.trouble and runner.task.live:
            status.reason = f"{status.reason}: {runner.trouble}" if status.reason else runner.trouble
        status.wounded = runner.wounds.wounded and runner.task.live
        runner.residents.tell(status)
        return status

    def _inventory(self) -> agent_pb2.Inventory:
        held = {gpu for task in self.tasks() if task.live for gpu in task.assignment.gpus}
        return inventory_told(self._view, held)

    def _told(self, inventory: agent_pb2.Inventory) -> None:
        self._told_generation = inventory.generation
        self._told_quarantine = _quarantined(inventory)

    def _inventory_news(self) -> agent_pb2.Inventory | None:
        inventory = self._inventory()
        same = inventory.generation == self._told_generation and _quarantined(inventory) == self._told_quarantine
        return None if same else inventory


def _quarantined(inventory: agent_pb2.Inventory) -> frozenset[str]:
    return frozenset(gpu.id for gpu in inventory.gpus if gpu.health == agent_pb2.GPU_HEALTH_QUARANTINED)
