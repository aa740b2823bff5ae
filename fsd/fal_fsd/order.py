"""In which order the pieces of one artifact are brought: told once, and again to each swarm that takes another's place.

One event loop. Used by fal_fsd.fetching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fal_fsd.core.swarm import Swarm


class Order:
    """`changed` is called after each word that the swarm may act on."""

    def __init__(self, now_s: Callable[[], float], changed: Callable[[], None]) -> None:
        self._now_s = now_s
        self._changed = changed
        self._swarm: Swarm | None = None
        self._first: Sequence[int] = ()
        self._start_s: float | None = None  # a start's bound on the clock; -inf: it is over

    def tell(self, swarm: Swarm) -> None:
        """From now on this one is told; it hears all of it."""
        self._swarm = swarm
        swarm.prefer(self._first)
        now_s = self._now_s()
        if self._start_s is not None and self._start_s > now_s:
            swarm.start_begins(now_s, self._start_s - now_s)

    def prefer(self, first: Sequence[int]) -> None:
        """Pieces that come first, see core/swarm.py; who asks last wins."""
        if first:
            self._first = first
            if self._swarm is not None:
                self._swarm.prefer(first)
            self._changed()

    def start_begins(self, bound_s: float) -> None:
        """Something starts from it as it arrives. Only the first that does is waited for, so it ends."""
        if self._start_s is None:
            now_s = self._now_s()
            self._start_s = now_s + bound_s
            if self._swarm is not None:
                self._swarm.start_begins(now_s, bound_s)
            self._changed()

    def start_ends(self) -> None:
        """It is up, or is not waited for any more."""
        if self._start_s is not None:
            self._start_s = float("-inf")
            if self._swarm is not None:
                self._swarm.start_ends()
            self._changed()


__all__ = ["Order"]
