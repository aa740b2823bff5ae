"""Processes inside one virtual loop: what a task starts belongs to its process, and kill -9 ends all of it at once.

A process is a context variable that tasks inherit. `Process.kill` cancels every task of it; what their `finally`
blocks still try has no effect, because machine, network and store ask `alive` first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar, copy_context
from typing import Any

from fal_contract.errors import FalError

_current: ContextVar[Process | None] = ContextVar("process", default=None)


class Process:
    """One operating-system process as the simulation sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.crashes: list[str] = []  # tasks that ended with what is no FalError
        self._tasks: dict[asyncio.Task[Any], None] = {}  # a set in order of birth, so that a seed repeats

    def spawn(self, job: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run `job` in this process."""
        context = copy_context()
        context.run(_current.set, self)
        return context.run(asyncio.get_running_loop().create_task, job, name=f"{self.name}: {name}")

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Called for every task made in this process."""
        self._tasks[task] = None
        task.add_done_callback(self._done)
        if not self.alive:
            task.get_loop().call_soon(task.cancel)

    def _done(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, FalError | asyncio.CancelledError):
            self.crashes.append(f"{task.get_name()}: {error!r}")

    def kill(self) -> None:
        """No orderly end: every task stops where it waits."""
        self.alive = False
        for task in list(self._tasks):
            task.cancel()

    async def gone(self) -> None:
        """After `kill`: until its last task has unwound."""
        while self._tasks:  # noqa: ASYNC110  (tasks may still be made while others unwind)
            await asyncio.sleep(0.001)


def outside(job: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run `job` in no process, wherever it is asked for: something of the world."""
    context = copy_context()
    context.run(_current.set, None)
    return context.run(asyncio.get_running_loop().create_task, job)


def install(loop: asyncio.AbstractEventLoop) -> None:
    """Let the loop know which process makes a task."""

    def make(loop: asyncio.AbstractEventLoop, job: Coroutine[Any, Any, Any], **more: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(job, loop=loop, **more)
        process = _current.get()
        if process is not None:
            process.adopt(task)
        return task

    loop.set_task_factory(make)  # type: ignore[arg-type]  # the stubs want a Future of a generator too
