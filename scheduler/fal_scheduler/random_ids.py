"""Fresh ids for the core, which draws nothing itself. Called by the engine; must not repeat within one source."""

from __future__ import annotations

from random import Random

from fal_contract.ids import random_suffix


class RandomIds:
    """Fresh ids from a source of randomness."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._drawn: list[str] = []

    def suffix(self) -> str:
        """40 random bits as 8 characters."""
        self._drawn.append(random_suffix(self._rng))
        return self._drawn[-1]

    def take_drawn(self) -> list[str]:
        """What was drawn since the last call, in order."""
        drawn, self._drawn = self._drawn, []
        return drawn
