"""Leases of origin ranges, as one node knows them: its own and those that it was told of. Pure.

A lease (epoch, holder) is fenced by any that overlaps it and is stronger: a higher epoch, or the same and the smaller
hash of holder and first piece (both sides of a race find the same winner). A lease ends with its last piece, on its
holder's word, with its holder, or when nothing of it was seen for too long; its epoch is remembered as long as any of
its pieces is missing, so that the next one is higher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fal_fsd.core.bits import hash_of, mix, span
from fal_fsd.core.messages import Lease

LEASES_MAX: Final = 4096  # of others, of one artifact; more are forgotten, oldest first
EPOCH_MAX: Final = 1 << 31  # a peer that tells higher ones is not believed


@dataclass(slots=True)
class Held:
    """A lease that goes on."""

    lease: Lease
    bits: int
    heard_s: float  # when it was told, or one of its pieces came
    over: bool = False  # ended, dead or stale: it counts only for the epoch


def stronger(one: Lease, other: Lease) -> bool:
    """Whether `one` fences `other`."""
    if one.epoch != other.epoch:
        return one.epoch > other.epoch
    return (mix(hash_of(one.holder), one.first), one.holder) < (mix(hash_of(other.holder), other.first), other.holder)


class LeaseBook:
    """Leases of one artifact."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._others: dict[tuple[str, int], Held] = {}
        self.mine: dict[int, Held] = {}  # by first piece

    def others(self) -> int:
        """Pieces that somebody else reads."""
        made = 0
        for held in self._others.values():
            if not held.over:
                made |= held.bits
        return made

    def own(self) -> int:
        """Pieces that this node reads."""
        made = 0
        for held in self.mine.values():
            made |= held.bits
        return made

    def alive(self, lease: Lease) -> bool:
        """Whether it is one of this node's."""
        held = self.mine.get(lease.first)
        return held is not None and held.lease == lease

    def take(self, first: int, count: int, now_s: float) -> Lease:
        """A lease of this node's own, stronger than all that were ever told of these pieces."""
        bits = span(first, count)
        epoch = 1 + max((x.lease.epoch for x in self._others.values() if x.bits & bits), default=0)
        lease = Lease(first, count, epoch, self._me)
        self.mine[first] = Held(lease, bits, now_s)
        return lease

    def give_up(self, lease: Lease) -> bool:
        """True when it was this node's."""
        if not self.alive(lease):
            return False
        del self.mine[lease.first]
        return True

    def told(self, lease: Lease, ended: bool, now_s: float) -> tuple[bool, list[Lease], list[Lease]]:
        """Take another's in: (whether it is news, own leases that it fences, own leases that fence it)."""
        if lease.holder == self._me or not 0 < lease.epoch < EPOCH_MAX:
            return False, [], []
        key = (lease.holder, lease.first)
        known = self._others.get(key)
        if ended:
            if known is None or known.lease.epoch != lease.epoch or known.over:
                return False, [], []
            known.over = True
            return True, [], []
        if known is not None and known.lease.epoch >= lease.epoch:
            return False, [], []
        bits = span(lease.first, lease.count)
        if fences := [held.lease for held in self.mine.values() if held.bits & bits and stronger(held.lease, lease)]:
            return False, [], fences
        for held in self._others.values():
            if held.bits & bits and stronger(lease, held.lease):
                held.over = True
            elif held.bits & bits and not held.over:
                return False, [], []
        if len(self._others) >= LEASES_MAX:
            del self._others[next(iter(self._others))]
        self._others[key] = Held(lease, bits, now_s)
        return True, [held.lease for held in self.mine.values() if held.bits & bits], []

    def holder_gone(self, node_id: str) -> None:
        """Its leases are free at once."""
        for held in self._others.values():
            if held.lease.holder == node_id:
                held.over = True

    def seen(self, bits: int, now_s: float) -> None:
        """These pieces came up somewhere: their leases go on."""
        for held in self._others.values():
            if held.bits & bits:
                held.heard_s = now_s

    def prune(self, missing: int) -> None:
        """Forget leases of which no piece is missing anywhere here."""
        for key in [key for key, held in self._others.items() if not held.bits & missing]:
            del self._others[key]

    def quiet(self) -> list[Held]:
        """Others' leases that go on, to be judged by how long nothing was heard of them."""
        return [held for held in self._others.values() if not held.over]


__all__ = ["EPOCH_MAX", "LEASES_MAX", "Held", "LeaseBook", "stronger"]
