"""The connected peers of one swarm: what each holds, what is asked of it, how fast it is. Pure.

Invariant: a piece is asked of at most one peer; `asked` is the set of all that are. Rates are bytes over busy seconds
(from the later of the ask and the arrival before it until the piece is here), both fading, so that a queue counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from fal_fsd.core.bits import Counter, bits_of, hash_of
from fal_fsd.core.messages import Place

RATE_GUESS: Final = 50e6  # bytes per second of a peer of which nothing is known, where nothing is known of any
_FADE: Final = 0.8
_SECONDS_MIN: Final = 1e-3
NEAR: Final = 1  # the farthest distance that is within this node's region


@dataclass(slots=True)
class Source:
    """A connected peer. `queue`: asked pieces and when, in order; `bits`: what it holds."""

    place: Place
    distance: int  # 0 the same zone, 1 the same region, 2 another one
    bits: int
    seed: bool = False
    hash: int = 0
    queue: dict[int, float] = field(default_factory=dict)
    urgent: int = 0  # of the asked ones, those asked first of all
    bytes_asked: int = 0
    last_s: float = float("-inf")
    blocked_until_s: float = float("-inf")
    rate: float = 0.0  # bytes per second; 0: nothing is known
    _bytes: float = 0.0
    _seconds: float = 0.0

    @property
    def node_id(self) -> str:
        return self.place.node_id

    @property
    def pushes(self) -> bool:
        """It is an operator who pushes."""
        return _pushes(self.node_id)

    def measured(self, length: float, seconds: float) -> None:
        """So many bytes took so long; a stall is none in some time."""
        self._bytes = self._bytes * _FADE + length
        self._seconds = self._seconds * _FADE + seconds
        self.rate = max(self._bytes, 1.0) / max(self._seconds, _SECONDS_MIN)

    def busy_s(self, now_s: float) -> float:
        """How long the first piece of the queue is on its way."""
        first_s = next(iter(self.queue.values()), now_s)
        return now_s - max(first_s, self.last_s)


class Sources:
    """All of them."""

    def __init__(self, me: Place, lengths: Sequence[int]) -> None:
        self.me = me
        self._lengths = lengths
        self.length_max = max(lengths, default=1)
        self._every = (1 << len(lengths)) - 1
        self._all: dict[str, Source] = {}
        self._places: dict[str, tuple[Place, bool]] = {}
        self._told = False
        self.everywhere = Counter()  # holders of each piece
        self.inside = Counter()  # those of this node's region
        self.asked = 0
        self.bytes_asked = 0
        self.changed = True  # connections or places, since whoever looks set it to False
        self.rate_total = 0.0  # as of the last `rate_typical`
        self._typical: float | None = None

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._all

    def __iter__(self) -> Iterator[Source]:
        return iter(self._all.values())

    def __len__(self) -> int:
        return len(self._all)

    def get(self, node_id: str) -> Source | None:
        return self._all.get(node_id)

    @property
    def told(self) -> dict[str, tuple[Place, bool]]:
        """What the scheduler told of others: where they are, and whether they are seeds."""
        return self._places

    def set_places(self, places: dict[str, tuple[Place, bool]]) -> None:
        """The scheduler's word."""
        self._places, self._told, self.changed = places, True, True
        for source in list(self._all.values()):
            place, seed = places.get(source.node_id, (source.place, source.seed))
            source.seed = seed
            if place != source.place:
                self._count(source, -1)
                source.place, source.distance = place, self._distance(place, known=True)
                self._count(source, +1)

    def up(self, node_id: str, bits: int) -> Source:
        """It is connected and holds these."""
        known = node_id in self._places
        place, seed = self._places.get(node_id, (Place(node_id), False))
        source = Source(place, self._distance(place, known=known), bits & self._every, seed, hash_of(node_id))
        self._all[node_id] = source
        self.changed, self._typical = True, None
        self._count(source, +1)
        return source

    def down(self, node_id: str) -> None:
        """It is gone; nothing is asked of it any more. Idempotent."""
        if (source := self._all.pop(node_id, None)) is not None:
            self._count(source, -1)
            self.asked &= ~bits_of(source.queue)
            self.bytes_asked -= source.bytes_asked
            self.changed, self._typical = True, None

    def has(self, source: Source, bits: int) -> int:
        """It holds these, too; those that are new of it."""
        new = bits & ~source.bits & self._every
        source.bits |= new
        self.everywhere.add(new)
        if source.distance <= NEAR:
            self.inside.add(new)
        return new

    def has_not(self, source: Source, bits: int) -> None:
        """It holds these no longer."""
        gone = bits & source.bits
        source.bits &= ~gone
        self.everywhere.remove(gone)
        if source.distance <= NEAR:
            self.inside.remove(gone)

    def ask(self, source: Source, piece: int, now_s: float, *, urgent: bool = False) -> None:
        """`piece` is asked of it from now on."""
        source.queue[piece] = now_s
        source.bytes_asked += self._lengths[piece]
        self.bytes_asked += self._lengths[piece]
        source.urgent |= urgent << piece
        self.asked |= 1 << piece

    def unask(self, source: Source, piece: int) -> bool:
        """It is asked no longer; True when it was."""
        if source.queue.pop(piece, None) is None:
            return False
        source.bytes_asked -= self._lengths[piece]
        self.bytes_asked -= self._lengths[piece]
        source.urgent &= ~(1 << piece)
        self.asked &= ~(1 << piece)
        return True

    def asked_of(self, piece: int) -> Source | None:
        """Of whom it is asked."""
        if not self.asked >> piece & 1:
            return None
        return next((source for source in self if piece in source.queue), None)

    def arrived(self, source: Source, piece: int, seconds: float, now_s: float) -> None:
        """It sent `piece`, so long after it was asked."""
        asked_s = source.queue.get(piece, now_s - seconds)
        source.measured(self._lengths[piece], now_s - max(asked_s, source.last_s))
        self._typical = None
        source.last_s = now_s
        self.unask(source, piece)

    def stalled(self, source: Source, seconds: float) -> None:
        """Nothing came of it for so long."""
        source.measured(0.0, seconds)
        self._typical = None

    @property
    def rate_typical(self) -> float:
        """The mean of all that were measured, or a guess."""
        if self._typical is None:
            rates = [source.rate for source in self if source.rate]
            self.rate_total = sum(rates)
            self._typical = self.rate_total / len(rates) if rates else RATE_GUESS
        return self._typical

    def holders(self, piece: int) -> list[Source]:
        """Who has it."""
        return [source for source in self if source.bits >> piece & 1]

    def _distance(self, place: Place, *, known: bool) -> int:
        if _pushes(place.node_id):
            return 1
        if not known and self._told and self.me.region:
            return 2  # until the scheduler tells: no bytes cross a region by mistake
        if known and place.region != self.me.region:
            return 2
        return 0 if known and place.zone == self.me.zone else 1

    def _count(self, source: Source, by: int) -> None:
        for counter in (self.everywhere, self.inside)[: 2 if source.distance <= NEAR else 1]:
            (counter.add if by > 0 else counter.remove)(source.bits)


def _pushes(node_id: str) -> bool:
    """An operator (`ROLE/NAME+…`) is connected to this node alone: nobody else brings what it has."""
    return "/" in node_id


__all__ = ["NEAR", "RATE_GUESS", "Source", "Sources"]
