"""Drives one runner: performs the move that core/tasks.py owes, tells what it saw, asks again.

Invariants: one move at a time per runner; a changed goal or an exited container interrupts a move, every move may be
interrupted and repeated; ending this object (the agent's own end) never touches the container. Errors that may pass
(fsd or proxy away) are tried again with backoff; others before the start end the runner, after it are tried again.
Made by fal_agent.node, one for each runner.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from fal_agent import build_output, launch, liveness, serving
from fal_agent.aftermath import exit_of, gpu_in_use, log_tail
from fal_agent.arrivals import PASSING, Arrivals
from fal_agent.core.assignments import Assignment, Goal
from fal_agent.core.entries import allowed
from fal_agent.core.tasks import (
    Action,
    Phase,
    Task,
    advance,
    assign,
    collected,
    exited,
    fail,
    leaves_output,
    ready,
    started,
    step,
)
from fal_agent.part_times import PartTimes, part_of
from fal_agent.ports import Usage
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.residents import Residents
from fal_agent.runner_secrets import RunnerSecrets
from fal_agent.tools import Tools, together
from fal_agent.usage_count import UsageCount
from fal_agent.wire import parse, probe_of
from fal_contract.errors import Code, FalError
from fal_contract.limits import GPU_RELEASE_TIMEOUT_S, STAGE_TIMEOUT_S
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2
from fal_runtime import driver as runtime

_READY_POLL_MIN_S: Final = 0.02
_READY_POLL_MAX_S: Final = 0.5
_READY_POLL_SHARE: Final = 0.1  # of what it took so far: readiness is seen no later than that, and predicted as well
_RETRY_MIN_S: Final = 0.1
_RETRY_MAX_S: Final = 10.0
_RELEASE_POLL_S: Final = 0.5
_DRAIN_POLL_S: Final = 1.0
_log = get_logger("agent.runner")


class Runner:
    """One runner of this node. `on_change` is called after everything that a report would tell."""

    def __init__(self, task: Task, tools: Tools, on_change: Callable[[str], None]) -> None:
        self.task = task
        self._unsaved = False  # the journal lacks what the last move came to
        self._trying = ""  # what is being tried again
        self._said = ""  # why the last readiness probe was not answered
        self._entry: RunnerEntry | None = None
        self._count = UsageCount(tools.clock)
        self._tools = tools
        self._on_change = on_change
        self._news = asyncio.Event()
        self._idle = asyncio.Event()  # set whenever the counts change
        self._secrets = RunnerSecrets(task.runner_id, tools.secrets, tools.driver)
        self._refused: dict[str, str] = {}  # entries of the compile cache that it must not see
        self.wounds = liveness.Wounds(tools.driver, tools.on_event, self.id, launch.container_id(self.id))
        self._arrivals = Arrivals(task.runner_id, tools, on_failed=self._weights_failed)
        self.residents = Residents(task.runner_id, tools, self._arrivals, lambda: self.task, on_change)
        self._exit_watch: asyncio.Task[None] | None = None
        self._job: asyncio.Task[None] | None = None

    # ---- what the node calls

    @property
    def id(self) -> str:
        return self.task.runner_id

    @property
    def trouble(self) -> str:
        """What goes wrong for the moment, for operators. A readiness probe that fails is not worth a report."""
        return self._trying or (self._said if self.task.phase is Phase.STARTED else "")

    def run(self) -> None:
        """Begin driving. A container that runs already is watched from now on."""
        if Phase.STARTED <= self.task.phase < Phase.EXITED:
            self._watch_exit()
            self._arrivals.follow(parse(self.task.assignment).artifacts, used=self.task.phase >= Phase.READY)
        if self.task.phase is Phase.SERVING:
            self.residents.start()
        self._job = asyncio.create_task(self._drive(), name=f"runner {self.id}")

    def assign(self, assignment: Assignment) -> bool:
        """The scheduler spoke of this runner. True when that changed something."""
        self.residents.poke()
        return self._see(assign(self.task, assignment))

    def mark_orphan(self, orphan: bool) -> bool:
        return self._see(replace(self.task, orphan=orphan))

    def count(self, usage: Usage) -> None:
        """The proxy told new counts."""
        changed = self._count.count(usage)
        self._idle.set()
        if changed:
            self._on_change(self.id)

    @property
    def usage(self) -> Usage:
        """The counts, with the age of the last request as of now."""
        return self._count.now

    @property
    def entry(self) -> RunnerEntry | None:
        """How the proxy reaches it; None before it was registered."""
        return replace(self._entry, draining=self.task.goal > Goal.RUN) if self._entry else None

    async def close(self) -> None:
        """Stop driving; the container goes on."""
        await self.residents.close()
        await self._arrivals.close()
        for job in (self._job, self._exit_watch):
            if job is not None:
                job.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await job

    async def over(self) -> None:
        """Until it is gone."""
        assert self._job is not None
        await asyncio.shield(self._job)

    # ---- the loop

    async def _drive(self) -> None:
        retry_s = _RETRY_MIN_S
        while self.task.live:
            await self._keep()
            self._news.clear()
            action = step(self.task, self._now_s())
            move = self._perform(action) if action is not None else self._attend()
            try:
                await self._unless_news(action, move)
                self._trouble("")
                retry_s = _RETRY_MIN_S
            except FalError as exc:
                if self._gave_up(action, exc):
                    continue
                retry_s = await self._pause(action, exc.what, retry_s)
            except Exception as exc:
                # A mistake of ours must not strand a runner without a reason.
                _log.exception("unexpected", runner=self.id, move=str(action or "watch"))
                retry_s = await self._pause(action, f"internal error: {exc!r}", retry_s)
        await self._keep()

    async def _pause(self, action: Action | None, what: str, retry_s: float) -> float:
        """Say what is wrong and wait before the next try; returns the wait after that."""
        self._trouble(f"{action or 'watch'}: {what}; tried again")
        await self._unless_news(action, asyncio.sleep(retry_s))
        return min(_RETRY_MAX_S, 2 * retry_s)

    async def _keep(self) -> None:
        """Make durable what the last move came to, before the next. Not part of a move: news would interrupt it."""
        if self._unsaved:
            self._unsaved = False
            await self._tools.save(self.task)

    async def _unless_news(self, action: Action | None, move: Awaitable[None]) -> None:
        """Perform `move`, but end it when news came that make another move due."""
        job = asyncio.ensure_future(move)
        news: asyncio.Task[bool] | None = None
        try:
            while not job.done():
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait({job, news}, return_when=asyncio.FIRST_COMPLETED)
                if job.done():
                    break
                self._news.clear()
                if action is None or step(self.task, self._now_s()) is not action:
                    return
            await job
        finally:
            for rest in (job, news):
                if rest is not None and not rest.done():
                    rest.cancel()
                    with contextlib.suppress(asyncio.CancelledError, FalError):
                        await rest

    def _gave_up(self, action: Action | None, exc: FalError) -> bool:
        """True when the error ends the runner."""
        if action not in (Action.STAGE, Action.CREATE, Action.START) or exc.code in PASSING:
            return False
        self._see(fail(self.task, f"{action}: {exc}"))
        return True

    def _see(self, task: Task) -> bool:
        """Take over what was observed."""
        if task == self.task:
            return False
        self.task = task
        self._news.set()
        self._on_change(self.id)
        return True

    def _trouble(self, text: str) -> None:
        if text != self._trying:
            self._trying = text
            self._on_change(self.id)

    def _left_s(self) -> float:
        return max(0.0, self.task.ready_by_s - self._now_s())

    def _now_s(self) -> float:
        return self._tools.clock.monotonic_s()

    # ---- the moves

    async def _perform(self, action: Action) -> None:
        match action:
            case Action.STAGE:
                await self._stage()
            case Action.CREATE:
                await self._create()
            case Action.START:
                await self._start()
            case Action.PROBE:
                await self._probe_ready()
            case Action.EXPIRE:
                limit_s = self.task.assignment.startup_timeout_s
                late = "did not end" if self.task.assignment.build else "not ready"
                said = "" if self.task.assignment.build else f" (startup_timeout): {self._said}"
                self._see(fail(self.task, f"{late} within {limit_s:g} s{said}"))
            case Action.REGISTER:
                await self._register()
            case Action.DRAIN:
                await self._drain()
            case Action.STOP | Action.KILL:
                await self._stop(action)
            case Action.COLLECT:
                await self._collect()
            case Action.REMOVE:
                await self._tools.driver.remove(launch.container_id(self.id))
                self._see(advance(self.task, Phase.REMOVED))
            case Action.RELEASE:
                await self._release()

    async def _stage(self) -> None:
        """Weights arrive while the container is made."""
        began_s, took = self._now_s(), PartTimes(self._now_s)
        message = self._message()
        try:
            async with asyncio.timeout(STAGE_TIMEOUT_S):
                weights = [took.timed(part_of(a), self._arrivals.stage(a)) for a in message.artifacts]
                await together(weights, took.timed("make", self._make(message)))
        except TimeoutError:
            raise FalError(
                Code.RUNNER_FAILED, f"weights did not arrive in {STAGE_TIMEOUT_S:g} s", remedy="Look at their origin."
            ) from None
        task = replace(self.task, phases=(*self.task.phases, *took.told(("weights", "make"))))
        self._see(advance(task, Phase.STAGED, move=Action.STAGE, seconds=self._now_s() - began_s))

    def _message(self) -> agent_pb2.Assignment:
        """Its assignment, without entries of the compile cache that it must not see."""
        message, refused = allowed(parse(self.task.assignment), self._tools.ca_key())
        for model, why in refused.items():
            if self._refused.get(model) != why:
                self._tools.on_event("CACHE_REFUSED", self.id, f"entry {model}: {why}")
        self._refused = refused
        return message

    async def _make(self, message: agent_pb2.Assignment) -> None:
        view = (self._tools.view() or await self._tools.machine.look()) if message.gpus else None
        devices = launch.devices(message.gpus, view) if view is not None else launch.NO_DEVICES
        build_output.make(self._tools.places, message)
        port = serving.port_of(message, self._tools.driver, self._tools.places)
        spec = launch.container_spec(message, self._tools.driver, self._tools.places, devices, port)
        image = await self._arrivals.image(message.artifacts)
        spec = replace(spec, image=image, secrets=await self._secrets.of(message))
        spec = self._tools.packer.completed(spec, message, self._tools.driver)
        launch.keep_assignment(self._tools.places, message)
        await self._tools.create(spec)

    async def _create(self) -> None:
        began_s = self._now_s()
        message = self._message()
        if await self._tools.driver.status(launch.container_id(self.id)) is None:
            await self._make(message)  # made while staging, and lost with an earlier life of this machine
        for artifact in message.artifacts:
            await self._arrivals.attach(artifact)
        self._see(advance(self.task, Phase.CREATED, move=Action.CREATE, seconds=self._now_s() - began_s))

    async def _start(self) -> None:
        began_s = self._now_s()
        id = launch.container_id(self.id)
        await self._tools.driver.start(id)
        status = await self._tools.driver.status(id)
        at_s = (status.started_at_s if status else None) or self._tools.clock.wall_s()
        self._see(started(self.task, now_s=self._now_s(), started_at_s=at_s, seconds=self._now_s() - began_s))
        self._watch_exit()
        self._secrets.forget()
        self._unsaved = True

    async def _probe_ready(self) -> None:
        began_s = self._now_s()
        probe = probe_of(self.task.assignment)
        where, poll_s = await serving.address_of(self.task, self._tools), _READY_POLL_MIN_S
        while self.task.orphan or self._now_s() < self.task.ready_by_s:
            why = await self._tools.prober.ask(where, probe.ready_path, probe.timeout_s)
            if not why:
                self._see(ready(self.task, ready_at_s=self._tools.clock.wall_s(), seconds=self._now_s() - began_s))
                self._unsaved = True
                return
            self._said = why
            left_s = math.inf if self.task.orphan else self._left_s()
            await asyncio.sleep(min(poll_s, left_s))
            poll_s = min(max(_READY_POLL_MIN_S, (self._now_s() - began_s) * _READY_POLL_SHARE), _READY_POLL_MAX_S)

    async def _register(self) -> None:
        self._arrivals.used()
        self._entry = await serving.entry_of(self.task, self._tools)
        await self._tools.proxy.put(self._entry)
        self._see(advance(self.task, Phase.SERVING))
        self.residents.start()

    async def _attend(self) -> None:
        """Nothing is owed: while it serves, ask from time to time whether it lives."""
        if self.task.assignment.build and self.task.phase is Phase.STARTED:
            await self._attend_build()
            return
        if self.task.phase is not Phase.SERVING or not self.task.known:
            await self._news.wait()
            return
        probe, where = probe_of(self.task.assignment), await serving.address_of(self.task, self._tools)
        why = await liveness.watch(
            probe,
            lambda: self._tools.prober.ask(where, probe.live_path, probe.timeout_s),
            self.wounds,
            self._trouble,
            self._tools.rng,
            lambda: not self.task.orphan,
        )
        self._see(fail(self.task, why))

    async def _attend_build(self) -> None:
        """Until its time is over (its exit is news), or its output is too much."""
        message = parse(self.task.assignment)
        if why := await build_output.watch(self._tools, message, self._left_s):
            self._see(fail(self.task, why))

    async def _drain(self) -> None:
        """No new requests; those under way have their time."""
        await self._tools.proxy.drain(self.id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.task.assignment.request_timeout_s):
                while True:
                    self._idle.clear()
                    self.count(await self._tools.proxy.usage(self.id))
                    if not self.usage.in_flight:
                        break
                    self._idle.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_DRAIN_POLL_S):
                            await self._idle.wait()
        self._see(advance(self.task, Phase.DRAINED))

    async def _stop(self, action: Action) -> None:
        with contextlib.suppress(FalError):
            await self._tools.proxy.drain(self.id)
        id, driver = launch.container_id(self.id), self._tools.driver
        try:
            if action is Action.KILL:
                await self._arrivals.cancel_reads()
                status = await driver.kill(id)
            else:
                status = await driver.stop(id, grace_s=self.task.assignment.termination_grace_s)
        except FalError as exc:
            if exc.code is not Code.NOT_FOUND:
                raise
            self._exit_seen(None)
        else:
            self._exit_seen(status)

    def _weights_failed(self, why: str) -> None:
        self._see(fail(self.task, why))

    async def _collect(self) -> None:
        """Exit code and last lines must be durable before the container is removed."""
        with contextlib.suppress(FalError):  # a proxy that is away is told when it is back
            await self._tools.proxy.remove(self.id)
        output, error = b"", ""
        if leaves_output(self.task):
            message = parse(self.task.assignment)
            output, error = await build_output.take_in(self._tools.places, self._tools.cache, message)
        tail = await log_tail(self._tools.driver, launch.container_id(self.id))
        self._see(collected(self.task, tail, output=output, output_error=error))
        self._unsaved = True

    async def _release(self) -> None:
        """A GPU is free again only when its container is gone and its memory is."""
        until_s = self._now_s() + GPU_RELEASE_TIMEOUT_S
        while (busy := await gpu_in_use(self._tools.machine, self.task.assignment)) is not None:
            if self._now_s() >= until_s:
                self._tools.on_event("GPU_NOT_RELEASED", self.id, f"{busy}; quarantined until it is free")
                break
            self._trouble(f"waits for GPU memory: {busy}")
            await asyncio.sleep(_RELEASE_POLL_S)
        await self.residents.close()
        await self._arrivals.abandon()
        await self._tools.cache.unpin(self.id)
        launch.drop_assignment(self._tools.places, self.id)
        serving.drop_port(self._tools.places, self.id)
        if self.task.assignment.build:
            await build_output.remove(self._tools.places, self.id)
        self._see(advance(self.task, Phase.GONE))
        self._unsaved = True

    # ---- the container's end

    def _watch_exit(self) -> None:
        if self._exit_watch is None:
            self._exit_watch = asyncio.create_task(self._wait_exit(), name=f"exit of {self.id}")

    async def _wait_exit(self) -> None:
        retry_s = _RETRY_MIN_S
        while self.task.phase < Phase.EXITED:
            try:
                self._exit_seen(await self._tools.driver.wait(launch.container_id(self.id)))
            except FalError as exc:
                if exc.code is Code.NOT_FOUND:
                    self._exit_seen(None)
                    return
                await asyncio.sleep(retry_s)
                retry_s = min(_RETRY_MAX_S, 2 * retry_s)

    def _exit_seen(self, status: runtime.ContainerStatus | None) -> None:
        self._see(exited(self.task, exit_of(status, self._tools.clock)))
