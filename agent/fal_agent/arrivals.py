"""Weights of one runner: shown to its container while they arrive, replaced by plain files once they are whole.

Invariants: a container sees an artifact only through `Driver.attach_model`; an unfinished one is attached only where
the app said so (`artifact.stream`) and this node has a mount for it, else `attach` waits until it is ready. What was
attached unfinished is followed until the plain tree stands in its place, also after a restart of the agent; where it
can never be finished, `on_failed` is told once. Made by fal_agent.runner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from fal_agent import launch
from fal_agent.ports import OnEvent, WeightCache
from fal_contract.errors import Code, FalError
from fal_contract.limits import CACHE_ENTRY_WAIT_S
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2
from fal_runtime.driver import Driver

_RETRY_MIN_S: Final = 0.2
_RETRY_MAX_S: Final = 10.0
# fsd or the driver may be away for a moment; everything else is about the content.
PASSING: Final = frozenset({Code.UNAVAILABLE, Code.TIMEOUT, Code.BUSY})
_log = get_logger("agent.arrivals")


class Arrivals:
    """The artifacts of one runner. `close` ends the following, never a mount."""

    def __init__(
        self,
        runner_id: str,
        cache: WeightCache,
        driver: Driver,
        *,
        on_failed: Callable[[str], None],
        on_event: OnEvent,
    ) -> None:
        self._runner_id = runner_id
        self._cache = cache
        self._driver = driver
        self._on_failed = on_failed
        self._on_event = on_event
        self._without: set[str] = set()  # entries of the compile cache that did not come
        self._following: dict[str, asyncio.Task[None]] = {}

    async def stage(self, artifact: agent_pb2.Artifact) -> Path | None:
        """Where a container can begin to read it; nothing, for an entry of the compile cache that does not come."""
        if artifact.kind == "cache":
            return await self._stage_entry(artifact)
        if artifact.stream:
            path, _ = await self._cache.view(artifact, self._runner_id)
            return path
        return await self._cache.stage(artifact, self._runner_id)

    async def _stage_entry(self, artifact: agent_pb2.Artifact) -> Path | None:
        self._without.discard(artifact.model)
        try:
            async with asyncio.timeout(CACHE_ENTRY_WAIT_S):
                return await self._cache.stage(artifact, self._runner_id)
        except TimeoutError:
            kind, why = "CACHE_MISSED", f"it did not come in {CACHE_ENTRY_WAIT_S:g} s"
        except FalError as exc:
            kind, why = ("CACHE_MISSED" if exc.code in PASSING else "CACHE_REFUSED"), str(exc)
        self._without.add(artifact.model)
        self._on_event(kind, self._runner_id, f"entry {artifact.cache_key[:12]} of {artifact.namespace}: {why}")
        return None

    async def attach(self, artifact: agent_pb2.Artifact) -> None:
        """Show it to the container, in the form that it has now. Raises what fsd and the driver raise."""
        if artifact.model in self._without:
            return
        if not artifact.stream:
            await self._show(artifact, await self._cache.stage(artifact, self._runner_id))
            return
        path, ready = await self._cache.view(artifact, self._runner_id)
        await self._show(artifact, path)
        if not ready:
            self.follow([artifact])

    def follow(self, artifacts: Iterable[agent_pb2.Artifact]) -> None:
        """Put the plain tree in the place of each streamed one as soon as it is whole. Idempotent."""
        for artifact in artifacts:
            if artifact.stream and artifact.model not in self._following:
                name = f"weights of {self._runner_id}: {artifact.model}"
                self._following[artifact.model] = asyncio.create_task(self._follow(artifact), name=name)

    @property
    def arriving(self) -> list[str]:
        """Models that the container still reads through the mount."""
        return sorted(model for model, task in self._following.items() if not task.done())

    async def close(self) -> None:
        """Stop following; fsd goes on for as long as the runner's pin stands."""
        for task in self._following.values():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._following.clear()

    async def _follow(self, artifact: agent_pb2.Artifact) -> None:
        retry_s = _RETRY_MIN_S
        while True:
            try:
                path = await self._cache.stage(artifact, self._runner_id)
                await self._show(artifact, path)
                _log.info("weights_whole", runner=self._runner_id, model=artifact.model)
                return
            except FalError as exc:
                if exc.code not in PASSING:
                    self._on_failed(f"weights of {artifact.model} cannot be finished: {exc}")
                    return
            await asyncio.sleep(retry_s)
            retry_s = min(_RETRY_MAX_S, 2 * retry_s)

    async def _show(self, artifact: agent_pb2.Artifact, source: Path) -> None:
        container = launch.container_id(self._runner_id)
        await self._driver.attach_model(container, launch.model_name(artifact.model), source)


def processes_of(pid: int | None, *, proc: Path = Path("/proc")) -> list[int]:
    """A container's first process and all below it, as the host numbers them; those that ended meanwhile are left out.

    Of at most 4096 processes, so that a fork bomb costs us nothing more.
    """
    found: list[int] = []
    todo = [pid] if pid else []
    while todo and len(found) < 4096:
        next_pid = todo.pop()
        found.append(next_pid)
        for task in _children_files(proc / str(next_pid) / "task"):
            with contextlib.suppress(OSError, ValueError):
                todo += [int(word) for word in task.read_text().split()]
    return found


def _children_files(folder: Path) -> list[Path]:
    try:
        return [task / "children" for task in folder.iterdir()]
    except OSError:
        return []
