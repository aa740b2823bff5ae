"""What the scheduler wishes to be on this node: followed as a whole set, one after another, and tried again.

Invariants: one task follows, so that an older set never undoes what a newer one began; a wish that could not be
followed, or whose transfer failed, is tried again every RETRY_S for as long as it stands. Used by fal_fsd.node.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final, Protocol

from fal_contract.artifact import Artifact
from fal_contract.errors import FalError
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2, weights_pb2
from fal_fsd.transfer import Phase, Transfer

WISH_OWNER: Final = "wish"
RETRY_S: Final = 60.0
_log = get_logger("fsd.wishes")


class WishSide(Protocol):
    """The node."""

    async def resolve(self, message: agent_pb2.Artifact) -> Artifact: ...

    async def begin_wish(self, artifact: Artifact, wish: weights_pb2.Wished) -> Transfer | Path:
        """Pinned for WISH_OWNER until the wish ends, in its tier."""
        ...

    async def want_tier(self, artifact_id: str, tier: str) -> None:
        """Another tier from now on."""
        ...

    async def end_wishes(self, keep: set[str]) -> None:
        """Let go of all artifacts but these."""
        ...

    async def id_of(self, id_: str) -> str: ...

    def wish_failed(self, model: str, why: str) -> None: ...


class Wishes:
    """See the module's docstring. `run` is a task of the node."""

    def __init__(self, side: WishSide) -> None:
        self._side = side
        self._revision = 0
        self._wished: dict[str, weights_pb2.Wished] = {}
        self._begun: dict[str, Transfer] = {}
        self._failed: set[str] = set()
        self._in_memory: set[str] = set()
        self._due = asyncio.Event()

    def new_session(self) -> None:
        """Revisions count anew."""
        self._revision = 0

    def told(self, message: weights_pb2.WishSet) -> None:
        """The whole set; an older one is ignored."""
        if message.revision < self._revision:
            return
        self._revision = message.revision
        self._wished = {x.artifact.artifact_id or x.artifact.manifest_digest: x for x in message.wishes}
        self._due.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S):
                    await self._due.wait()
            try:
                if self._due.is_set():
                    self._due.clear()
                    await self._follow_all()
                else:
                    await self._follow_lacking()
            except (FalError, OSError) as exc:
                _log.warning("wishes_not_followed", error=str(exc))

    async def _follow_all(self) -> None:
        keep: set[str] = set()
        self._begun = {key: transfer for key, transfer in self._begun.items() if key in self._wished}
        self._failed.clear()
        await self._lower()
        for key, wish in self._wished.items():
            keep.add(await self._follow(key, wish))
            if self._due.is_set():
                return  # there is a newer set: nothing is let go of by this one
        await self._side.end_wishes(keep)

    async def _lower(self) -> None:
        """What leaves the memory makes room first: what comes may not fit beside it."""
        hot = {key for key, wish in self._wished.items() if wish.tier == "memory"}
        for key in sorted(self._in_memory - hot):
            await self._side.want_tier(await self._side.id_of(key), "disk")
        self._in_memory = hot

    async def _follow_lacking(self) -> None:
        broken = {key for key, x in self._begun.items() if x.task.done() and x.phase is not Phase.READY}
        for key in sorted(broken | self._failed):
            self._begun.pop(key, None)
            self._failed.discard(key)
            if key in self._wished and not self._due.is_set():
                await self._follow(key, self._wished[key])

    async def _follow(self, key: str, wish: weights_pb2.Wished) -> str:
        """Its artifact id."""
        try:
            artifact = await self._side.resolve(wish.artifact)
            found = await self._side.begin_wish(artifact, wish)
        except (FalError, OSError) as exc:
            self._failed.add(key)
            self._side.wish_failed(wish.artifact.model, str(exc))
            return await self._side.id_of(key)
        if isinstance(found, Transfer):
            self._begun[key] = found
        return artifact.id


__all__ = ["RETRY_S", "WISH_OWNER", "WishSide", "Wishes"]
