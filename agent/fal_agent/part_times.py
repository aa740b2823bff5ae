"""How long things took that went on beside each other; told with a runner's phases, learnt from by the scheduler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from fal_contract.v1 import agent_pb2


class PartTimes:
    """Seconds by part, the longest of those under one name."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._took_s: dict[str, float] = {}

    async def timed(self, part: str, work: Awaitable[object]) -> None:
        """Await `work` and keep how long that took; nothing is kept where it fails, or where the part has no name."""
        began_s = self._now_s()
        await work
        if part:
            self._took_s[part] = max(self._took_s.get(part, 0.0), self._now_s() - began_s)

    def told(self, parts: Iterable[str]) -> list[tuple[str, float]]:
        """Those of `parts` that there were, in this order."""
        return [(part, self._took_s[part]) for part in parts if part in self._took_s]


def part_of(artifact: agent_pb2.Artifact) -> str:
    """The part "weights": what a container waits for as a whole; without entries of the compile cache it can start."""
    return "" if artifact.stream or artifact.kind in ("cache", "image") else "weights"


__all__ = ["PartTimes", "part_of"]
