"""Who does what of an artifact, by rendezvous hashing: origin ranges over seeds, imports over a region's seeds. Pure.

Pieces are grouped in stripes of a few, stripes into at most `SHARES_MAX` shares (stripe number modulo shares); each
share is ranked over the nodes by a hash of (node, share). Everyone who knows the same nodes computes the same; a node
that comes or goes moves only its own shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fal_fsd.core.bits import hash_of, mix

SHARES_MAX: Final = 128


class Shares:
    """The cut of `pieces` pieces into stripes and shares. Immutable."""

    def __init__(self, pieces: int, stripe_pieces: int) -> None:
        self.pieces = pieces
        self.stripe_pieces = stripe_pieces
        stripes = -(-pieces // stripe_pieces)
        self.count = max(min(stripes, SHARES_MAX), 1)
        every, one = (1 << pieces) - 1, (1 << stripe_pieces) - 1
        base = 0
        for stripe in range(0, stripes, self.count):
            base |= one << stripe * stripe_pieces
        self._sets = tuple(base << share * stripe_pieces & every for share in range(self.count))

    def stripe_of(self, piece: int) -> tuple[int, int]:
        """First piece of its stripe, and how many pieces that has at most."""
        return piece - piece % self.stripe_pieces, self.stripe_pieces

    def owned(self, nodes: Iterable[str]) -> dict[str, int]:
        """For every node the pieces whose first owner it is."""
        return {node_id: sets[0] for node_id, sets in self.ranked(nodes, 1).items()}

    def ranked(self, nodes: Iterable[str], ranks: int) -> dict[str, list[int]]:
        """For every node, per rank below `ranks`, the pieces for which it has that rank."""
        hashes = {node_id: hash_of(node_id) for node_id in nodes}
        made = {node_id: [0] * ranks for node_id in hashes}
        for share, pieces in enumerate(self._sets):
            order = sorted(hashes, key=lambda node_id: mix(hashes[node_id], share))
            for rank, node_id in enumerate(order[:ranks]):
                made[node_id][rank] |= pieces
        return made


__all__ = ["SHARES_MAX", "Shares"]
