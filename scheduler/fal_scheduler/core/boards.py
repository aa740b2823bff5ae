"""How the GPUs of one kind in one node are joined, and which of them a runner gets.

Pure. A `Board` is the matrix of links between GPUs by their place in the driver's order, so that equal machines share
one and what was worked out for one holds for all. `choose` is exact up to 16 free GPUs (every subset is looked at,
12,870 at most, and remembered); beyond that, which only MIG instances reach, and those have no links, it grows a set
from each start. A set is better when it has more NVLinks inside, then more pairs under one PCIe switch, then more pairs
in one NUMA node, then when it leaves more links among the free ones that stay; then the driver's first.

Used by `fleet`, `place` and `explain`. Must know nothing of nodes and runners.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fal_scheduler.core.told import Gpu

NVLINK: Final = "nvlink"
PCIE: Final = "pcie"
NUMA: Final = "numa"
EXACT_MAX: Final = 16
_REMEMBERED_MAX: Final = 4096
# Of a pair, so that sums over 120 pairs stay apart: links, then switch, then NUMA node.
_LINK, _SWITCH, _NEAR = 1 << 20, 1 << 10, 1

Matrix = NDArray[np.int64]


class Board:
    """Links between `size` GPUs. `joined[rule]`: pairs that satisfy a rule; `weights`: what a pair is worth."""

    __slots__ = ("_known", "joined", "number", "size", "weights")

    def __init__(self, weights: Matrix, joined: dict[str, NDArray[np.bool_]]) -> None:
        self.weights = weights
        self.joined = joined
        self.size = len(weights)
        digest = blake2b(weights.tobytes() + b"".join(joined[rule].tobytes() for rule in sorted(joined)), digest_size=8)
        self.number = int.from_bytes(digest.digest(), "big") >> 1  # the same in every process: columns hold it
        self._known: dict[tuple[int, int, str], tuple[int, ...] | None] = {}

    def choose(self, free: Sequence[int], count: int, rule: str = "") -> tuple[int, ...] | None:
        """Places of the best `count` of `free` (ascending) where every pair satisfies `rule`; None where none do."""
        if count > len(free):
            return None
        if count == 0:
            return ()
        key = (sum(1 << at for at in free), count, rule)
        if key not in self._known:
            if len(self._known) >= _REMEMBERED_MAX:
                self._known.clear()
            look = self._exact if len(free) <= EXACT_MAX else self._grown
            self._known[key] = look(free, count, rule)
        return self._known[key]

    def _exact(self, free: Sequence[int], count: int, rule: str) -> tuple[int, ...] | None:
        sets = _subsets(len(free), count)
        at = np.array(free)
        weights = self.weights[np.ix_(at, at)]
        reach = sets @ weights
        inside = (reach * sets).sum(axis=1) // 2
        ok = np.ones(len(sets), np.bool_)
        if rule and count > 1:
            apart = (~self.joined[rule][np.ix_(at, at)]).astype(np.int64)
            np.fill_diagonal(apart, 0)
            ok = ((sets @ apart) * sets).sum(axis=1) == 0
        if not ok.any():
            return None
        broken = reach.sum(axis=1) - 2 * inside  # from the chosen to the free ones that stay
        best = ok & (inside == inside[ok].max())
        best &= broken == broken[best].min()
        first = int(np.flatnonzero(best)[0])
        return tuple(free[one] for one in np.flatnonzero(sets[first]).tolist())

    def _grown(self, free: Sequence[int], count: int, rule: str) -> tuple[int, ...] | None:
        found: tuple[int, tuple[int, ...]] | None = None
        for start in free:
            chosen, worth = [start], 0
            while len(chosen) < count:
                rest = [at for at in free if at not in chosen]
                if rule:
                    rest = [at for at in rest if all(self.joined[rule][at, have] for have in chosen)]
                if not rest:
                    break
                gains = [int(self.weights[at, chosen].sum()) for at in rest]
                worth += max(gains)
                chosen.append(rest[gains.index(max(gains))])
            if len(chosen) == count and (found is None or worth > found[0]):
                found = worth, tuple(sorted(chosen))
            if found is not None and not self.weights.any():
                break  # nothing is joined: all sets are equal
        return found[1] if found is not None else None


def layout_of(gpus: Sequence[Gpu]) -> tuple[object, ...]:
    """What the board of these GPUs follows from; equal ones make equal boards."""
    place = {gpu.id: at for at, gpu in enumerate(gpus)}
    return tuple(
        (gpu.numa_node, tuple((place.get(link.peer_id), link.kind, link.count) for link in gpu.links)) for gpu in gpus
    )


def board_of(gpus: Sequence[Gpu]) -> Board:
    """The board of GPUs in this order. A link that one side tells counts for both."""
    size = len(gpus)
    weights = np.zeros((size, size), np.int64)
    joined = {rule: np.zeros((size, size), np.bool_) for rule in (NVLINK, PCIE, NUMA)}
    place = {gpu.id: at for at, gpu in enumerate(gpus)}
    for at, gpu in enumerate(gpus):
        for link in gpu.links:
            other = place.get(link.peer_id)
            if other is None or other == at:
                continue
            if link.kind == "NVLINK":
                joined[NVLINK][at, other] = joined[PCIE][at, other] = True
                weights[at, other] = max(weights[at, other], link.count * _LINK)
            elif link.kind == "PCIE_SWITCH":
                joined[PCIE][at, other] = joined[NUMA][at, other] = True
                weights[at, other] = max(weights[at, other], _SWITCH)
            elif link.kind == "PCIE_HOST":
                joined[NUMA][at, other] = True
    nodes = np.array([gpu.numa_node for gpu in gpus], np.int64)
    joined[NUMA] |= (nodes[:, None] == nodes) & (nodes >= 0)
    for rule in joined:
        joined[rule] |= joined[rule].T
        np.fill_diagonal(joined[rule], False)
    weights = np.maximum(weights, weights.T) + joined[NUMA] * _NEAR
    return Board(weights, joined)


@lru_cache(maxsize=256)
def _subsets(size: int, count: int) -> Matrix:
    """Every choice of `count` of `size` as a row of ones and zeros, in order of the places chosen."""
    chosen = np.array(list(combinations(range(size), count)), np.int64)
    sets = np.zeros((len(chosen), size), np.int64)
    np.put_along_axis(sets, chosen, 1, axis=1)
    sets.setflags(write=False)
    return sets
