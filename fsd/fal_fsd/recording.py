"""Recorded starts: which pieces of an image a start reads, also where the image is whole already.

A whole artifact is shown through a mount of its own for that, until its pieces are asked for. Invariant: a mount that
is made here is closed here, at the latest by the next process (it takes over and closes what nobody waits for). Used by
fal_fsd.service.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from fal_contract.artifact import Artifact
from fal_fsd.mount.sources import FolderPart
from fal_fsd.ports import InFlight

RECORDINGS_MAX: Final = 16


class Recordings:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._parts: dict[str, FolderPart] = {}

    async def open(self, mount: InFlight, artifact: Artifact, folder: Path) -> Path | None:
        """Where the finished artifact is shown and watched; None where that cannot be: use the plain folder."""
        part = self._parts.get(artifact.id)
        if part is None:
            if mount.available or len(self._parts) >= RECORDINGS_MAX:
                return None
            part = self._parts[artifact.id] = FolderPart(artifact, folder)
        return await mount.open(part)

    async def take(self, mount: InFlight, artifact_id: str) -> list[int]:
        """What was read since the mount was made, in order of first use; ends the recording."""
        pieces = mount.take_access(artifact_id)
        if (part := self._parts.pop(artifact_id, None)) is not None:
            await mount.close(artifact_id)  # what is open reads on, from descriptors of its own
            await asyncio.to_thread(part.close)
        return pieces


__all__ = ["RECORDINGS_MAX", "Recordings"]
