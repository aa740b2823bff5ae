"""Which pieces may come while something starts from an artifact that arrives. Pure.

A start reads a part of an image, and its program wants the processor while it does. So meanwhile only these come: what
readers wait for, what is told to come first (a recorded start), some pieces beyond each that a reader asked for (twice
as many where it reads on in order), and one of the rest every `Policy.start_trickle_s`, so that the swarm never stands
still. All of it comes once the start is over, told or by its bound; nothing is held back from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fal_fsd.core.bits import first_from, hash_of, mix, span
from fal_fsd.core.policy import Pieces, Policy

_AHEAD_MAX: Final = 64  # pieces; of 256 KiB 16 MiB
_DAY_S: Final = 86_400.0


class Starting:
    """See the module's docstring. Sets are as in core/bits.py."""

    def __init__(self, me: str, pieces: Pieces, policy: Policy) -> None:
        self._me = hash_of(me)
        self._pieces = pieces
        self._policy = policy
        self._over_s = float("-inf")
        self._trickle_s = float("-inf")  # when the next of the rest may come
        self._let = 0  # those beyond readers, and of the rest
        self._turn = 0

    def begin(self, now_s: float, bound_s: float) -> None:
        """Something starts from it; over after `bound_s` at the latest."""
        self._over_s = now_s + min(bound_s, _DAY_S)
        self._trickle_s = now_s + self._policy.start_trickle_s

    def end(self) -> None:
        """It is up."""
        self._over_s, self._let = float("-inf"), 0

    def wanted(self, pieces: Iterable[int]) -> None:
        """A reader waits for these: what lies beyond them is likely to be next."""
        if not self.under_way:
            return
        for piece in pieces:
            width = min(piece, _AHEAD_MAX)
            gaps = ~(self._let >> (piece - width)) & span(0, width)
            run = width - gaps.bit_length()  # of those that were let in before, just in front of this one
            count = min(max(2 * run, self._policy.start_ahead_pieces), _AHEAD_MAX)
            self._let |= span(piece, count + 1) & self._pieces.every

    def allowed(self, now_s: float) -> int:
        """Pieces that may be asked for without a reader that waits for them."""
        pieces = self._pieces
        if now_s >= self._over_s:
            self.end()
            return pieces.every
        made = self._let | pieces.first_bits
        rest = pieces.missing & ~made
        if rest and now_s >= self._trickle_s:
            self._trickle_s = now_s + self._policy.start_trickle_s
            self._turn += 1
            self._let |= 1 << first_from(rest, mix(self._me, self._turn) % pieces.count)
            made |= self._let
        return made

    @property
    def under_way(self) -> bool:
        """Whether something is held back."""
        return self._over_s != float("-inf")

    @property
    def next_at_s(self) -> float | None:
        """When more may come though nothing happened; None: nothing is held back."""
        return min(self._over_s, self._trickle_s) if self.under_way else None


__all__ = ["Starting"]
