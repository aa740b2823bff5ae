"""Who may fetch now: a few large transfers, some more small ones, and whoever a reader waits for.

Invariant: a lane never holds more than its bound, but for transfers with a waiting reader, which pass (they are in the
middle of a container's start; there are as many as there are unfinished mounts that somebody reads). Those that
wait get their turn by class, then by age. One event loop. Used by fal_fsd.transfer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from fal_contract.limits import SMALL_ARTIFACT_BYTES

LARGE_MAX: Final = 3  # more only take each other's bandwidth: the first is ready later, the last no sooner
SMALL_MAX: Final = 8


class Claimant(Protocol):
    """What the order depends on; read each time that there is room."""

    @property
    def bytes_total(self) -> int: ...

    @property
    def read(self) -> bool:
        """A reader waits for pieces of it."""
        ...

    @property
    def asked_for(self) -> bool:
        """A runner waits for it; else it is only wished."""
        ...


@dataclass(eq=False, slots=True)
class _Turn:
    claimant: Claimant
    number: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def small(self) -> bool:
        return self.claimant.bytes_total < SMALL_ARTIFACT_BYTES

    @property
    def order(self) -> tuple[bool, bool, int]:
        return (not self.claimant.read, not self.claimant.asked_for, self.number)


class Lanes:
    """See the module's docstring."""

    def __init__(self, *, large_max: int = LARGE_MAX, small_max: int = SMALL_MAX) -> None:
        self._max = {False: large_max, True: small_max}
        self._held = {False: 0, True: 0}
        self._waiting: list[_Turn] = []
        self._count = 0

    @asynccontextmanager
    async def turn(self, claimant: Claimant) -> AsyncIterator[None]:
        """Held for as long as the context is open."""
        self._count += 1
        turn = _Turn(claimant, self._count)
        self._waiting.append(turn)
        self.look()
        try:
            await turn.granted.wait()
            yield
        finally:
            if turn.granted.is_set():
                self._held[turn.small] -= 1
            else:
                self._waiting.remove(turn)
            self.look()

    def look(self) -> None:
        """Grant what can be granted; also to be called when a claimant's `read` has changed."""
        for turn in sorted(self._waiting, key=lambda x: x.order):
            if self._held[turn.small] < self._max[turn.small] or turn.claimant.read:
                self._held[turn.small] += 1
                self._waiting.remove(turn)
                turn.granted.set()

    def why(self, claimant: Claimant) -> str:
        """What it waits for, for people; empty when it does not."""
        if not any(turn.claimant is claimant for turn in self._waiting):
            return ""
        small = claimant.bytes_total < SMALL_ARTIFACT_BYTES
        return f"{self._held[small]} other artifacts are being fetched on this node"


__all__ = ["LARGE_MAX", "SMALL_MAX", "Claimant", "Lanes"]
