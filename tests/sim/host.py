"""A machine of the simulation: it survives its agent's death, and the agent on it is the real one.

Containers, weight cache, proxy, GPUs and disk stay when the agent is killed; a reboot takes the containers. The checker
is told of every container that starts or ends, and of every assignment set that the agent took in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Protocol

from agent_fakes import FakeCache, FakeHardware, FakeProber, FakeProxy, MemoryJournal
from fal_agent.core.assignments import Complete, Delta
from fal_agent.core.tasks import Task
from fal_agent.node import Facts, Node
from fal_agent.ports import Places, Usage
from fal_agent.proxy.messages import ProxyStats, RunnerStats
from fal_agent.reboot import never
from fal_agent.session import Dialer, Session
from fal_agent.tools import Tools
from fal_contract.v1 import agent_pb2
from fal_runtime.driver import ContainerSpec
from fal_runtime.fake import FakeDriver, Machine, Script
from sim.network import Stream
from sim.process import Process
from virtual_time import LoopClock

LOOK_S = 5.0
PUSH_S = 1.0


class Watcher(Protocol):
    """Who checks what happens on machines."""

    def container_started(self, host: Host, runner_id: str, gpus: tuple[str, ...]) -> None: ...

    def container_stopped(self, host: Host, runner_id: str, *, ready: bool) -> None: ...

    def took_in(
        self, host: Host, message: Complete | Delta, before: dict[str, Task], after: dict[str, Task]
    ) -> None: ...


def runner_of(spec: ContainerSpec) -> str:
    """Which runner a container is."""
    return spec.env["FAL_RUNNER_ID"]


def gpus_of(spec: ContainerSpec) -> tuple[str, ...]:
    """Which GPUs a container was given."""
    return tuple(gpu for gpu in spec.env["CUDA_VISIBLE_DEVICES"].split(",") if gpu)


class WatchedMachine(Machine):
    """Tells the checker what really happens."""

    def __init__(self, host: Host) -> None:
        super().__init__(clock=host.clock, script_of=host.script_of)
        self._host = host

    def start(self, id: str) -> None:
        """See Machine."""
        spec = self.containers[id].spec
        self._host.watcher.container_started(self._host, runner_of(spec), gpus_of(spec))
        super().start(id)

    def exit(self, id: str, exit_code: int, reason: str = "", *, oom_killed: bool = False) -> None:
        """See Machine. Only the driver gives the reasons "stopped" and "killed"."""
        container = self.containers.get(id)
        if container is not None and container.status.pid is not None and reason in ("stopped", "killed"):
            ready = id in self._host.ready
            self._host.watcher.container_stopped(self._host, runner_of(container.spec), ready=ready)
        self._host.ready.discard(id)
        super().exit(id, exit_code, reason, oom_killed=oom_killed)


class NotingProber(FakeProber):
    """Remembers which containers have answered that they are ready."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)  # type: ignore[arg-type]  # it needs machine and clock only
        self._host = host

    async def ask(self, socket: Path, path: str, timeout_s: float) -> str:
        """See Prober."""
        why = await super().ask(socket, path, timeout_s)
        if not why:
            for container in self._host.machine.containers.values():
                if container.spec.socket_dir == socket.parent and container.status.pid is not None:
                    self._host.ready.add(container.spec.id)
        return why


class WatchedNode(Node):
    """The agent's node, with the checker at its ear."""

    host: Host

    async def receive(self, message: Complete | Delta) -> None:
        """See Node."""
        before = {task.runner_id: task for task in self.tasks()}
        await super().receive(message)
        after = {task.runner_id: task for task in self.tasks()}
        self.host.watcher.took_in(self.host, message, before, after)


@dataclass(eq=False)
class Host:
    """One machine. `moody`: containers may be slow, crash and refuse to start."""

    node_id: str
    root: Path
    gpus: int
    rng: Random
    watcher: Watcher
    boots: int = 1
    starts: int = 0
    term_seen: int = 0  # the newest term that the agent took in, as the checker counts it
    moody: bool = True
    process: Process | None = None
    node: Node | None = None
    ready: set[str] = field(default_factory=set)  # containers that answered a readiness probe
    sick_since_s: dict[str, float] = field(default_factory=dict)  # GPUs that must not be given to a new runner
    gpu_model: str = "H100-80GB"
    on_reboot: Callable[[], None] | None = None  # carries out an order to reboot; None: the agent may not
    stream: Stream | None = None  # of the session that the agent has now; None: it talks to a ghost, or to nobody

    def __post_init__(self) -> None:
        self.clock = LoopClock()
        self.machine = WatchedMachine(self)
        self.disk: list[bytes] = []
        self.cache = FakeCache()
        self.proxy = FakeProxy()
        self.prober = NotingProber(self)
        self.hardware = FakeHardware(self.gpus, 64 << 30)
        self.places = Places(self.root / "s", self.root / "m", self.root / "r", ("worker",))
        self.journal = MemoryJournal(self.disk)

    def script_of(self, spec: ContainerSpec) -> Script:
        """How a new container behaves."""
        rng = self.rng
        if not self.moody:
            return Script(create_s=0.05, start_s=0.05, ready_after_s=rng.uniform(0.1, 2.0))
        quick = Script(
            create_s=rng.uniform(0.0, 1.0),
            start_s=rng.uniform(0.0, 0.5),
            ready_after_s=rng.uniform(0.1, 8.0),
            ignore_term=rng.random() < 0.1,
        )
        mood = rng.random()
        if mood < 0.03:
            return replace(quick, exit_after_s=rng.uniform(0.0, 2.0), exit_code=1)
        if mood < 0.05:
            return replace(quick, refuse_start="no such device")
        return quick

    def live(self) -> dict[str, tuple[str, ...]]:
        """Runner ids and GPUs of the containers that run."""
        running = (c for c in self.machine.containers.values() if c.status.pid is not None)
        return {runner_of(c.spec): gpus_of(c.spec) for c in running}

    def serving(self) -> set[str]:
        """Runner ids of the containers that run and are ready."""
        return {runner_of(self.machine.containers[id].spec) for id in self.ready if id in self.machine.containers}

    # ---- the GPUs

    def break_gpu(self, gpu: str) -> None:
        """It must not be given to a new runner; one that holds it goes on."""
        self.hardware.unhealthy[gpu] = "ECC errors"
        self.hardware.generation += 1
        self.sick_since_s[gpu] = self.clock.monotonic_s()

    def mend_gpus(self) -> None:
        """All are healthy again."""
        if self.hardware.unhealthy:
            self.hardware.unhealthy.clear()
            self.hardware.generation += 1
        self.sick_since_s.clear()

    # ---- the agent

    def start_agent(self, dial: Dialer) -> None:
        """A new agent process."""
        assert self.process is None
        self.starts += 1
        journal = MemoryJournal(self.disk)
        journal.write_s = 0.002
        capabilities = agent_pb2.Capabilities(
            driver="fake", isolates=True, runtime="fake 1", cgroup="none", features=["reboot"] if self.on_reboot else []
        )
        tools = Tools(
            driver=FakeDriver(self.machine), cache=self.cache, proxy=self.proxy, prober=self.prober,
            machine=self.hardware, places=self.places, clock=self.clock, rng=Random(self.rng.getrandbits(64)),
            on_event=lambda *_: None, save=_unset, reboot=self._reboot,
        )  # fmt: skip
        facts = Facts(self.node_id, f"boot-{self.boots}", f"agent-{self.starts}", capabilities)
        self.node = node = WatchedNode(facts, tools, journal)  # type: ignore[arg-type]  # a journal without a file
        node.host = self
        self.process = Process(self.node_id)
        session = Session(node, dial, Random(self.rng.getrandbits(64)))
        self.process.spawn(self._agent(node, session), name="agent")

    async def _agent(self, node: Node, session: Session) -> None:
        await node.start()
        async with asyncio.TaskGroup() as group:
            group.create_task(session.run())
            group.create_task(self._look(node))
            group.create_task(self._push(node))

    async def _look(self, node: Node) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await node.look()

    async def _push(self, node: Node) -> None:
        """The proxy tells its counts."""
        told: dict[str, Usage] = {}
        while True:
            await asyncio.sleep(PUSH_S)
            if told != self.proxy.usages:
                told = dict(self.proxy.usages)
                rows = (
                    RunnerStats(id, 1, False, usage.in_flight, usage.served, 0, 0, usage.last_used_age_s)
                    for id, usage in sorted(told.items())
                )
                node.count(ProxyStats("p-1", 0, tuple(rows), ()))

    async def _reboot(self) -> None:
        if self.on_reboot is None:
            await never()
        else:
            self.on_reboot()

    def kill_agent(self) -> None:
        """kill -9; containers go on."""
        if self.process is not None:
            self.process.kill()
            self.process = self.node = None

    def power_off(self) -> None:
        """The machine is gone with its containers; its disk is not."""
        self.kill_agent()
        self.machine.reboot()
        self.ready.clear()
        self.proxy.entries.clear()
        self.proxy.usages.clear()
        self.hardware.used.clear()
        self.boots += 1


async def _unset(_: object) -> None:
    raise AssertionError("the node sets this")
