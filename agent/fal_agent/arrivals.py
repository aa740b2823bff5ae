"""Weights and image of one runner: shown to its container as they arrive, replaced by plain files once whole.

Invariants: a container sees an artifact only through `Driver.attach_model`; an unfinished one is attached only where
the app said so (`artifact.stream`) and this node has a mount for it, else `attach` waits until it is ready. What was
attached unfinished is followed until the plain tree stands in its place, also after a restart of the agent; where it
can never be finished, `on_failed` is told once. An image is not attached: the container is made of it (`image`), and
`Driver.image_finished` puts the plain file beneath; the whole is asked for once the runner is ready, or after a bound.
The first starts of an image are recorded: then it is read through the mount until the runner is ready (`used`), even
where it is whole. Made by fal_agent.runner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from fal_agent import launch
from fal_agent.tools import Tools
from fal_contract.errors import Code, FalError
from fal_contract.limits import CACHE_ENTRY_WAIT_S, IMAGE_START_S
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2
from fal_runtime.driver import Image

_RETRY_MIN_S: Final = 0.2
_RETRY_MAX_S: Final = 10.0
_ACCESS_PIECES_MIN: Final = 8  # mounting alone reads three; nothing is gained by the order of so few
# fsd or the driver may be away for a moment; everything else is about the content.
PASSING: Final = frozenset({Code.UNAVAILABLE, Code.TIMEOUT, Code.BUSY})
_log = get_logger("agent.arrivals")


class Arrivals:
    """The artifacts of one runner. `close` ends the following, never a mount; `abandon` is for a runner's end."""

    def __init__(self, runner_id: str, tools: Tools, *, on_failed: Callable[[str], None]) -> None:
        self._runner_id = runner_id
        self._cache = tools.cache
        self._driver = tools.driver
        self._on_failed = on_failed
        self._on_event = tools.on_event
        self._on_access = tools.on_access
        self._used = asyncio.Event()
        self._without: set[str] = set()  # entries of the compile cache that did not come
        self._following: dict[str, asyncio.Task[None]] = {}
        self._recorded: set[str] = set()  # artifacts whose reads fsd records for this runner
        self._inside: dict[str, str] = {}  # by model, where the container sees it

    async def stage(self, artifact: agent_pb2.Artifact) -> Path | None:
        """Where a container can begin to read it; nothing, for an entry of the compile cache that does not come."""
        if artifact.kind == "cache":
            return await self._stage_entry(artifact)
        if artifact.stream:
            path, _ = await self._view(artifact)
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
        path, ready = await self._view(artifact)
        if artifact.kind != "image" or ready:
            await self._show(artifact, path)
        if not ready:
            self.follow([artifact])

    async def show(self, artifact: agent_pb2.Artifact) -> str:
        """Stage it and attach it to the live container; where its folder is inside."""
        await self.attach(artifact)
        return self._inside[artifact.model]

    async def drop(self, artifact: agent_pb2.Artifact) -> None:
        """The live container needs it no longer: it is taken out of its view, and no pin of this runner holds it."""
        if (task := self._following.pop(artifact.model, None)) is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        container = launch.container_id(self._runner_id)
        await self._driver.detach_model(container, launch.model_name(artifact.model))
        await self._cache.unpin(self._runner_id, artifact.artifact_id or artifact.manifest_digest)
        self._inside.pop(artifact.model, None)

    async def image(self, artifacts: Iterable[agent_pb2.Artifact]) -> Image | None:
        """What the container is made of, as soon as it can be read; None: the node's own system."""
        for artifact in artifacts:
            if artifact.kind == "image":
                path, ready = await self._view(artifact)
                return Image(artifact.artifact_id or artifact.manifest_digest, path, ready)
        return None

    def used(self) -> None:
        """The runner is ready: what it has read of its image until now is its start."""
        self._used.set()

    def follow(self, artifacts: Iterable[agent_pb2.Artifact], *, used: bool = False) -> None:
        """Put the plain tree in the place of each streamed one as soon as it is whole. Idempotent.

        `used`: the runner is ready, as after a restart of the agent.
        """
        if used:
            self._used.set()
        for artifact in artifacts:
            if artifact.stream and artifact.model not in self._following:
                if _recorded(artifact):
                    self._recorded.add(artifact.artifact_id)  # perhaps by the agent before us
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

    async def cancel_reads(self) -> None:
        """A process that waits for weights cannot be killed before its wait ends (a D state inside FUSE)."""
        if self.arriving:
            with contextlib.suppress(FalError):
                status = await self._driver.status(launch.container_id(self._runner_id))
                await self._cache.cancel_reads(processes_of(status.pid if status else None))

    async def abandon(self) -> None:
        """The runner has ended: stop following, and end the recordings that nobody asked for."""
        await self.close()
        while self._recorded:
            with contextlib.suppress(FalError):  # fsd ends them by itself, later
                await self._cache.take_access(self._recorded.pop())

    async def _view(self, artifact: agent_pb2.Artifact) -> tuple[Path, bool]:
        if _recorded(artifact):
            self._recorded.add(artifact.artifact_id)
        return await self._cache.view(artifact, self._runner_id, record=_recorded(artifact))

    async def _follow(self, artifact: agent_pb2.Artifact) -> None:
        retry_s = _RETRY_MIN_S
        await self._start_over(artifact)
        while True:
            try:
                if _recorded(artifact):
                    await self._tell_access(artifact)
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

    async def _start_over(self, artifact: agent_pb2.Artifact) -> None:
        """Who asks fsd for a whole image ends its holding back of what a start does not read."""
        if artifact.kind == "image":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if _recorded(artifact) else IMAGE_START_S):
                    await self._used.wait()

    async def _tell_access(self, artifact: agent_pb2.Artifact) -> None:
        pieces = await self._cache.take_access(artifact.artifact_id)
        self._recorded.discard(artifact.artifact_id)
        if len(pieces) >= _ACCESS_PIECES_MIN:
            access = agent_pb2.AccessList(artifact_id=artifact.artifact_id, pieces=pieces, runner_id=self._runner_id)
            self._on_access(access)

    async def _show(self, artifact: agent_pb2.Artifact, source: Path) -> None:
        if artifact.kind == "image":
            await self._driver.image_finished(Image(artifact.artifact_id or artifact.manifest_digest, source))
            return
        container = launch.container_id(self._runner_id)
        name = launch.model_name(artifact.model)
        self._inside[artifact.model] = await self._driver.attach_model(container, name, source)


def _recorded(artifact: agent_pb2.Artifact) -> bool:
    """Nobody has told yet in which order this image is read."""
    return artifact.kind == "image" and bool(artifact.artifact_id) and not artifact.first_pieces


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
