"""The full audit of all rules, a slice at a time so that the loop is never held; a new round once a minute."""

from __future__ import annotations

from collections.abc import Iterator

from fal_scheduler.core import invariants
from fal_scheduler.core.invariants import Violation
from fal_scheduler.core.state import State


class Auditor:
    """Called by the engine at each tick."""

    def __init__(self, *, interval_s: float, now_s: float) -> None:
        self._interval_s = interval_s
        self._next_round_s = now_s + interval_s
        self._round: Iterator[list[Violation]] | None = None

    def slice(self, state: State, now_s: float) -> list[Violation]:
        """The next slice's violations; nothing between two rounds."""
        if self._round is None:
            if now_s < self._next_round_s:
                return []
            self._next_round_s = now_s + self._interval_s
            self._round = invariants.audit(state)
        found = next(self._round, None)
        if found is None:
            self._round = None
        return found or []
