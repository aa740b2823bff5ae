"""Recorded starts: which pieces of an image a start reads, also where the image is whole already.

A whole artifact is shown through a mount of its own for that, until its pieces are asked for, or for `RECORDING_S`
after it was last opened: who opened it may have gone without a word. Invariant: a mount that is made here is closed
here, at the latest by the next process (it takes over and closes what nobody waits for). Used by fal_fsd.service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from fal_contract.artifact import Artifact
from fal_contract.errors import FalError
from fal_contract.limits import STARTUP_TIMEOUT_S
from fal_contract.telemetry import get_logger
from fal_fsd.mount.sources import FolderPart
from fal_fsd.ports import InFlight

RECORDINGS_MAX: Final = 16
RECORDING_S: Final = 2 * STARTUP_TIMEOUT_S  # what takes longer is read on, unrecorded
_T = TypeVar("_T")
_log = get_logger("fsd.recording")


class Recordings:
    """See the module's docstring. Belongs to one event loop."""

    def __init__(self, *, bound_s: float = RECORDING_S) -> None:
        self._bound_s = bound_s
        self._parts: dict[str, FolderPart] = {}
        self._ends: dict[str, asyncio.TimerHandle] = {}
        self._lock = asyncio.Lock()  # what is opened and closed at once would leave a part that nobody knows
        self._work: set[asyncio.Task[Any]] = set()

    async def open(self, mount: InFlight, artifact: Artifact, folder: Path) -> Path | None:
        """Where the finished artifact is shown and watched; None where that cannot be: use the plain folder."""
        # Who gives up must not leave half a recording.
        return await asyncio.shield(self._spawn(self._open(mount, artifact, folder)))

    async def _open(self, mount: InFlight, artifact: Artifact, folder: Path) -> Path | None:
        async with self._lock:
            if mount.available or (artifact.id not in self._parts and len(self._parts) >= RECORDINGS_MAX):
                return None
            part = self._parts.get(artifact.id) or FolderPart(artifact, folder)
            try:
                path = await mount.open(part)
            except FalError as exc:
                if artifact.id not in self._parts:
                    await asyncio.to_thread(part.close)
                _log.warning("not_recorded", artifact=artifact.id, why=str(exc))
                return None
            self._parts[artifact.id] = part
            self._forget_end(artifact.id)
            self._ends[artifact.id] = asyncio.get_running_loop().call_later(
                self._bound_s, self._over, mount, artifact.id
            )
            return path

    async def take(self, mount: InFlight, artifact_id: str) -> list[int]:
        """What was read since the mount was made, in order of first use; ends the recording."""
        return await asyncio.shield(self._spawn(self._take(mount, artifact_id)))

    async def _take(self, mount: InFlight, artifact_id: str) -> list[int]:
        async with self._lock:
            self._forget_end(artifact_id)
            pieces = mount.take_access(artifact_id)
            if (part := self._parts.pop(artifact_id, None)) is not None:
                await mount.close(artifact_id)  # what is open reads on, from descriptors of its own
                await asyncio.to_thread(part.close)
            return pieces

    def _over(self, mount: InFlight, artifact_id: str) -> None:
        _log.warning("recording_over", artifact=artifact_id, why=f"nobody asked for it in {self._bound_s:g} s")
        self._spawn(self._take(mount, artifact_id))

    def _forget_end(self, artifact_id: str) -> None:
        if (end := self._ends.pop(artifact_id, None)) is not None:
            end.cancel()

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task


__all__ = ["RECORDINGS_MAX", "RECORDING_S", "Recordings"]
