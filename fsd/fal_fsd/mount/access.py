"""Which pieces of an artifact readers touched, in order of first use. Pure.

Only what was asked for counts, not what is fetched ahead of a reader. Thread-safe through its users' lock.
"""

from __future__ import annotations

from collections.abc import Iterable

from fal_contract.limits import IMAGE_FIRST_PIECES_MAX


class Access:
    """See the module's docstring. What comes after the bound is not remembered."""

    def __init__(self, pieces_max: int = IMAGE_FIRST_PIECES_MAX) -> None:
        self._pieces_max = pieces_max
        self._seen: dict[int, None] = {}

    def note(self, pieces: Iterable[int]) -> None:
        """A read touched these."""
        for piece in pieces:
            if len(self._seen) >= self._pieces_max:
                return
            self._seen.setdefault(piece)

    def pieces(self) -> list[int]:
        """Since it was made."""
        return list(self._seen)
