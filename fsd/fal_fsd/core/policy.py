"""The numbers by which a swarm is run, and what all its parts know of the pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

FIRST_WINDOW: Final = 16  # pieces of those that come first are asked for in any order
_FIRST_LOOK: Final = 1024  # more than are ever under way at once


@dataclass(frozen=True, slots=True)
class Policy:
    """Figures of the decisions; the defaults are those that the simulation bears out. Tests switch rules off."""

    # Asking peers.
    window_bytes_min: int = 4 << 20  # asked of one peer at once, at least (and at least two pieces) …
    window_bytes_max: int = 64 << 20  # … and at most (or two pieces)
    window_pieces: int = 2  # at least
    window_s: float = 0.25  # what it sends in so many seconds
    total_pieces: int = 6  # asked of all peers at once …
    total_bytes_min: int = 4 << 20  # … or so much …
    total_s: float = 0.05  # … or what all send in so many seconds
    stuck_min_s: float = 2.0
    stuck_factor: float = 4.0  # times the expected
    penalty_max_s: float = 10.0  # a stuck peer is not asked for so long
    refused_min_s: float = 0.05
    banned_s: float = 600.0  # a peer that sent bad bytes
    slow_factor: float = 2.0  # a peer so much slower than the typical one is slow: what only it has leaves it once
    slow_patience_s: float = 5.0
    full_look_s: float = 0.1  # slow peers are looked at so often though enough is asked for
    # Crossing regions.
    importers: bool = True  # False: everyone may ask other regions
    import_patience_s: float = 20.0  # per rank, before the next one brings a piece into the region
    reader_far_s: float = 3.0  # a reader waits so long before its node asks another region out of turn
    # The origin.
    seeds_meant: int = 16
    begin_s: float = 0.5  # a seed waits at most so long, times its rank, for the first pieces of others
    streams_max: int = 8  # ranges that one node reads at once
    stripe_bytes: int = 16 << 20
    unspread_pieces: int = 2  # a seed has so many that few others have, or those of so many seconds, then it
    unspread_s: float = 0.25  # takes no more
    fencing: bool = True  # False: weaker leases are not given up
    lease_patience_s: float = 10.0  # and four times what it should take, before a silent lease is taken over
    connect_grace_s: float = 5.0  # seeds that the scheduler told count, though not connected yet
    promote_quiet_s: float = 10.0  # nothing came and nobody has more: the node reads the origin unasked
    promote_rank_s: float = 2.0  # later for each peer that would be first
    promote_seeded_s: float = 60.0  # where seeds are connected and bring nothing
    reader_origin_s: float = 5.0  # a reader waits so long before its node reads the origin out of turn
    tick_s: float = 0.5
    reader_tick_s: float = 0.1  # while a reader waits
    # While something starts from an artifact that arrives (core/starting.py).
    start_ahead_pieces: int = 8  # beyond each that a reader asked for, at least
    start_trickle_s: float = 0.1  # one piece of the rest comes so often


@dataclass(slots=True)
class Pieces:
    """The pieces of one artifact, as this node has them; sets as in core/bits.py."""

    lengths: Sequence[int]
    missing: int
    wanted: dict[int, int] = field(default_factory=dict)  # how many readers wait for it
    waits_since_s: dict[int, float] = field(default_factory=dict)  # of those that are wanted and missing
    from_origin: int = 0  # read by this node
    first: tuple[int, ...] = ()  # come before all others, in about this order
    first_bits: int = 0  # the same as a set
    _done: int = 0  # of `first`, from its beginning, are here

    def prefer(self, first: Sequence[int]) -> None:
        """Bring these first. What is no piece is left out."""
        self.first = tuple(dict.fromkeys(piece for piece in first if 0 <= piece < len(self.lengths)))
        self.first_bits, self._done = 0, 0
        for piece in self.first:
            self.first_bits |= 1 << piece

    def lost(self, piece: int) -> None:
        """It is missing again."""
        self.missing |= 1 << piece
        self.from_origin &= ~(1 << piece)
        self._done = 0

    def preferred(self, bits: int) -> int:
        """Of `bits` those to bring now: the next few of `first`, else the rest of it, else all.

        A few and not the very next, so that nodes that begin together take different ones of each other's and trade.
        """
        if not bits & self.first_bits:
            return bits
        while self._done < len(self.first) and not self.missing >> self.first[self._done] & 1:
            self._done += 1
        soon, count = 0, 0
        for piece in self.first[self._done : self._done + _FIRST_LOOK]:
            if bits >> piece & 1:
                soon |= 1 << piece
                count += 1
                if count >= FIRST_WINDOW:
                    break
        return soon or bits & self.first_bits

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def every(self) -> int:
        return (1 << len(self.lengths)) - 1


__all__ = ["Pieces", "Policy"]
