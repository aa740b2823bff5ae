"""The fake driver: scripted containers in memory, for tests and simulation.

Invariant: it keeps every promise of `fal_runtime.driver.Driver` (the contract suite runs on it) and waits only through
asyncio, so it works on a virtual-time loop. `Machine` plays the node: a driver made anew on the same machine, as after
an agent's restart, sees the same containers. No process is started, no file touched but log lines in memory.
"""

from __future__ import annotations

import asyncio
import builtins
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fal_contract.clock import Clock, SystemClock
from fal_runtime.container_use import COMMAND_BYTES_MAX, ContainerUse, ProcessUse
from fal_runtime.driver import (
    MODELS_DIR_INSIDE,
    Capabilities,
    ContainerSpec,
    ContainerStatus,
    Image,
    LogLine,
    Phase,
    Prepared,
    Resources,
    check_model_name,
    check_spec,
    driver_failed,
    not_running,
    unknown_container,
)
from fal_runtime.exec_session import ExecSession, Terminal, check_exec, checked_terminal
from fal_runtime.fake_exec import FakeExec

LOG_LINES_MAX: Final = 1000
ENDED_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Script:
    """How a container behaves; the default runs until it is told to stop.

    `exit_after_s` seconds after its start it exits with `exit_code`; `refuse_create` and `refuse_start` are the words
    of a DRIVER_FAILED; `ignore_term` waits for SIGKILL; `ready_after_s` is for the fakes of the proxy (None: never).
    """

    exit_after_s: float | None = None
    exit_code: int = 0
    oom_killed: bool = False
    refuse_create: str = ""
    refuse_start: str = ""
    ignore_term: bool = False
    term_exit_code: int = 0
    create_s: float = 0.0
    start_s: float = 0.0
    ready_after_s: float | None = 0.0
    lines: tuple[str, ...] = ()


@dataclass(slots=True)
class _Container:
    spec: ContainerSpec
    script: Script
    status: ContainerStatus
    lines: deque[LogLine] = field(default_factory=lambda: deque(maxlen=LOG_LINES_MAX))
    lines_total: int = 0
    models: dict[str, Path] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


ScriptOf = Callable[[ContainerSpec], Script]


class Machine:
    """The node under one or more fake drivers: containers live here, not in the driver.

    `script_of` chooses a script per container when it is created.
    """

    def __init__(self, *, clock: Clock | None = None, script_of: ScriptOf | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.script_of: ScriptOf = script_of or (lambda _spec: Script())
        self.containers: dict[str, _Container] = {}
        self.ended: dict[str, _Container] = {}  # whose output is kept
        self.prepared: list[Resources] = []
        self.prepared_used = 0
        self.running_max = 0  # the most that ever ran at once
        self.images_finished: list[Image] = []  # as the driver was told
        self._pid = 1000

    def create(self, spec: ContainerSpec, script: Script) -> None:
        self.containers[spec.id] = _Container(spec, script, ContainerStatus(spec.id, Phase.CREATED))

    def start(self, id: str) -> None:
        container = self.containers[id]
        self._pid += 1
        now_s = self.clock.wall_s()
        container.status = replace(container.status, phase=Phase.RUNNING, pid=self._pid, started_at_s=now_s)
        self.running_max = max(self.running_max, len(self.running()))
        for text in container.script.lines:
            self.log(id, text)
        if container.script.exit_after_s is not None:
            loop = asyncio.get_running_loop()
            code = container.script.exit_code
            container.timer = loop.call_later(container.script.exit_after_s, self.exit, id, code)
        self._notify(container)

    def exit(self, id: str, exit_code: int, reason: str = "", *, oom_killed: bool = False) -> None:
        """The container's first process ends now; a test may call this to crash a container."""
        container = self.containers.get(id)
        if container is None or container.status.phase is Phase.EXITED:
            return
        if container.timer is not None:
            container.timer.cancel()
        container.status = replace(
            container.status,
            phase=Phase.EXITED,
            pid=None,
            finished_at_s=self.clock.wall_s(),
            exit_code=exit_code,
            oom_killed=oom_killed or container.script.oom_killed,
            reason=reason or f"exited with code {exit_code}",
        )
        container.ended.set()
        self._notify(container)

    def log(self, id: str, text: str) -> None:
        """The container writes one line to its standard output."""
        container = self.containers[id]
        container.lines.append(LogLine(self.clock.wall_s(), "stdout", text))
        container.lines_total += 1
        self._notify(container)

    def models_of(self, id: str) -> Mapping[str, Path]:
        return MappingProxyType(self.containers[id].models)

    def running(self) -> list[str]:
        return sorted(id for id, c in self.containers.items() if c.status.phase is Phase.RUNNING)

    def drop(self, id: str) -> None:
        container = self.containers.pop(id, None)
        if container is not None:
            if container.lines:
                self.ended[id] = container
                while len(self.ended) > ENDED_MAX:
                    del self.ended[next(iter(self.ended))]
            self._notify(container)

    def reboot(self) -> None:
        """Power loss: every container is gone, without a trace."""
        for id in list(self.containers):
            self.exit(id, 137, "power lost")
            self.drop(id)

    @staticmethod
    def _notify(container: _Container) -> None:
        container.changed.set()
        container.changed = asyncio.Event()


class FakeDriver:
    """See the module's docstring. `isolates` can be set, as an agent may treat both kinds differently."""

    name: Final = "fake"

    def __init__(self, machine: Machine | None = None, *, isolates: bool = True) -> None:
        self.machine = machine or Machine()
        self.isolates: Final = isolates

    async def probe(self) -> Capabilities:
        return Capabilities(
            driver=self.name,
            isolates=self.isolates,
            runtime="fake 1",
            user_namespaces=False,
            idmapped_mounts=False,
            cgroup="none",
            seccomp=False,
            nosymfollow=False,
            details=MappingProxyType({"note": "scripted containers in memory; nothing runs"}),
        )

    async def prepare(self, wanted: Sequence[Prepared]) -> None:
        self.machine.prepared = [one.spec.resources for one in wanted for _ in range(one.count)]

    async def create(self, spec: ContainerSpec) -> None:
        check_spec(spec)
        if spec.id in self.machine.containers:
            return
        if spec.resources in self.machine.prepared:  # the fake's only notion of a shape
            self.machine.prepared.remove(spec.resources)
            self.machine.prepared_used += 1
        script = self.machine.script_of(spec)
        if script.create_s:
            await asyncio.sleep(script.create_s)
        if script.refuse_create:
            raise driver_failed(f"container {spec.id} was not created: {script.refuse_create}", remedy="Try again.")
        self.machine.create(spec, script)

    async def start(self, id: str) -> None:
        container = self._get(id)
        if container.status.phase is not Phase.CREATED:
            return
        if container.script.start_s:
            await asyncio.sleep(container.script.start_s)
        if container.script.refuse_start:
            raise driver_failed(f"container {id} did not start: {container.script.refuse_start}", remedy="Try again.")
        if self.machine.containers.get(id) is container and container.status.phase is Phase.CREATED:
            self.machine.start(id)

    async def status(self, id: str) -> ContainerStatus | None:
        container = self.machine.containers.get(id)
        return container.status if container else None

    async def list(self) -> builtins.list[ContainerStatus]:
        return [self.machine.containers[id].status for id in sorted(self.machine.containers)]

    async def wait(self, id: str) -> ContainerStatus:
        container = self._get(id)
        while container.status.phase is not Phase.EXITED:
            if self.machine.containers.get(id) is not container:
                raise unknown_container(id)
            await container.changed.wait()
        return container.status

    async def stop(self, id: str, *, grace_s: float) -> ContainerStatus:
        container = self._get(id)
        if container.status.phase is Phase.RUNNING and not container.script.ignore_term:
            self.machine.exit(id, container.script.term_exit_code, "stopped")
        elif container.status.phase is Phase.RUNNING:
            try:
                async with asyncio.timeout(grace_s):
                    await self.wait(id)
            except TimeoutError:
                pass
        return await self.kill(id)

    async def kill(self, id: str) -> ContainerStatus:
        container = self._get(id)
        reason = "killed before it started" if container.status.phase is Phase.CREATED else "killed"
        self.machine.exit(id, 137, reason)
        return container.status

    async def remove(self, id: str) -> None:
        if id in self.machine.containers:
            await self.kill(id)
            self.machine.drop(id)

    async def logs(
        self, id: str, *, tail_lines: int, follow: bool, since_s: float = 0.0
    ) -> AsyncGenerator[LogLine, None]:
        container = self.machine.containers.get(id) or self.machine.ended.get(id) or self._get(id)
        seen = container.lines_total - min(max(tail_lines, 0), len(container.lines))
        while True:
            changed = container.changed
            fresh = min(container.lines_total - seen, len(container.lines))
            seen = container.lines_total
            for line in list(container.lines)[len(container.lines) - fresh :]:
                if line.time_s >= since_s:
                    yield line
            if not follow or container.status.phase is Phase.EXITED or id not in self.machine.containers:
                return
            await changed.wait()

    async def exec(self, id: str, command: tuple[str, ...], *, terminal: Terminal | None = None) -> ExecSession:
        container = self._get(id)
        check_exec(command)
        if container.status.phase is not Phase.RUNNING:
            raise not_running(id, container.status)
        if command[:1] == ("/no/such/program",):
            raise driver_failed(f"{command[0]}: no such file or directory", remedy="Check the command's path.")
        words = command[3:] if command else ("say=a shell", "cat")
        return FakeExec(words, checked_terminal(terminal), container.ended)

    async def top(self, id: str) -> ContainerUse:
        container, now_s = self._get(id), self.machine.clock.wall_s()
        pid = container.status.pid
        if pid is None:
            return ContainerUse(now_s)
        command = " ".join(container.spec.command)[:COMMAND_BYTES_MAX]
        row = ProcessUse(pid, 1, 0, "S", 0.0, 1 << 20, 1, command)
        return ContainerUse(now_s, 0.0, 1 << 20, container.spec.resources.memory_bytes, 1, processes=(row,))

    async def attach_model(self, id: str, name: str, source: Path) -> str:
        self._get(id).models[check_model_name(name)] = source
        return f"{MODELS_DIR_INSIDE}/{name}"

    async def detach_model(self, id: str, name: str) -> None:
        self._get(id).models.pop(check_model_name(name), None)

    async def image_finished(self, image: Image) -> None:
        self.machine.images_finished.append(image)

    def inside(self, spec: ContainerSpec, target: str) -> str:
        return target

    async def clean(self, keep: frozenset[str]) -> builtins.list[str]:
        removed = [id for id in sorted(self.machine.containers) if id not in keep]
        for id in removed:
            await self.remove(id)
        return [f"container {id}" for id in removed]

    def _get(self, id: str) -> _Container:
        container = self.machine.containers.get(id)
        if container is None:
            raise unknown_container(id)
        return container
