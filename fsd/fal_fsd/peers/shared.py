"""A part while threads of the bulk port use it: who left a swarm can wait until no thread touches its files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fal_contract.limits import SMALL_ARTIFACT_BYTES
from fal_fsd.ports import Part

URGENT: Final = 0
SMALL: Final = 1
LARGE: Final = 2


class SharedPart:
    """A part and how many threads are using it. `rank`: of its pieces that nobody waits for, in a sender's queue."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.artifact_id = part.artifact.id
        self.lengths = part.artifact.layout
        self.digests: dict[int, bytes] = {}  # what the first to claim a piece said; one copy for all connections
        self.rank = SMALL if part.artifact.bytes_total < SMALL_ARTIFACT_BYTES else LARGE
        self._lock = threading.Lock()
        self._users = 0
        self._left = False
        self._when_idle: list[Callable[[], None]] = []

    @contextmanager
    def use(self) -> Iterator[Part | None]:
        """The part for the time of the block, or None when we have left its swarm."""
        with self._lock:
            part = None if self._left else self.part
            self._users += part is not None
        try:
            yield part
        finally:
            if part is not None:
                self._release()

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            calls = self._take_calls()
        for call in calls:
            call()

    def leave(self) -> None:
        """Nobody begins to use it from now on."""
        with self._lock:
            self._left = True

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call it, from any thread, once nobody uses it; for one that was left."""
        with self._lock:
            self._when_idle.append(call)
            calls = self._take_calls()
        for each in calls:
            each()

    def _take_calls(self) -> list[Callable[[], None]]:
        if self._users or not self._left:
            return []
        calls, self._when_idle = self._when_idle, []
        return calls


__all__ = ["LARGE", "SMALL", "URGENT", "SharedPart"]
