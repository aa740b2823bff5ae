"""What the prediction reads, for one node or for many at once: the same formula does for both.

Pure. `OneNode` gives Python integers, `ManyNodes` columns of int64; where a value must be chosen by a condition the
formula says `pick`, `most`, `least`. Integer division rounds down in both, so that both come to the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np

from fal_contract.limits import SMALL_ARTIFACT_BYTES
from fal_scheduler.core.learning import MILLI
from fal_scheduler.core.ready_columns import Columns, Ints
from fal_scheduler.core.robust_line import PPM

Number = Any  # an int, or a column of int64
Truth = Any  # a bool, or a column of bool

MEMORY, DISK, PEER, ORIGIN = range(4)
TIERS: Final = ("memory", "disk", "peer", "origin")
LOADED_FROM: Final = ("memory", "disk", "arrived", "arrived")  # what has just come lies in the page cache
X_MAX: Final = 1 << 32  # of what is learnt over: seven weeks in ms, 4 TiB in KiB
LARGE_AT_ONCE: Final = 3  # a cache's lanes (fal_fsd.lanes)
SMALL_AT_ONCE: Final = 8


class Held(Protocol):
    """An artifact on a node. `known`: 1 where some of it is; `ready`: 1 or 0; `rate`: at which it arrives."""

    known: Number
    here: Number
    memory: Number
    ready: Number
    rate: Number
    others: Number  # nodes with some of it that can be reached


class NodesView(Protocol):
    """See the module."""

    columns: Columns
    zero: Number

    def pick(self, condition: Truth, yes: Number, no: Number) -> Number: ...
    def most(self, one: Number, other: Number) -> Number: ...
    def least(self, one: Number, other: Number) -> Number: ...
    def held(self, artifact: str) -> Held: ...
    def origin(self, source: str) -> Number: ...
    @property
    def peer(self) -> Number: ...
    @property
    def fed(self) -> Number: ...
    @property
    def ahead_bytes(self) -> Number: ...
    @property
    def ahead_count(self) -> Number: ...
    def by_driver(self, part: str, x: Number, subject: str) -> Number: ...
    def by_source(self, part: str, x: Number, tier: Number, source: str) -> tuple[Number, Number]: ...
    def by_gpu(self, part: str, x: Number, subject: str, gpus: bool, tier: Number | None) -> Number: ...
    def everywhere(self, part: str) -> Number: ...


def source_family(part: str, tier: int, source: str) -> str:
    """What is learnt of bytes from there: each origin by itself, peers together."""
    return f"{part}/{TIERS[tier]}/{source if tier == ORIGIN else ''}"


def ahead(view: NodesView, size: int) -> Number:
    """Bytes that come to each node before or beside `size` more of them.

    Fetches under way share the line evenly, so that each takes as much of it as the new one until one is done; beyond
    a cache's lanes the new one waits.
    """
    lanes = SMALL_AT_ONCE if size < SMALL_ARTIFACT_BYTES else LARGE_AT_ONCE
    shared = view.least(view.ahead_bytes, view.ahead_count * size)
    return view.pick(view.ahead_count < lanes, shared, view.ahead_bytes)


class _HeldValues:
    __slots__ = ("here", "known", "memory", "others", "rate", "ready")

    def __init__(self, columns: Columns, artifact: str, rows: Any) -> None:
        have = columns.artifact(artifact)
        self.known, self.here, self.memory = have.known[rows], have.here[rows], have.memory[rows]
        self.ready, self.rate = have.ready[rows], have.rate[rows]
        self.others = columns.holders(have)[columns.pool[rows]] - self.known


class OneNode:
    """One row. Subjects' ratios come from the table itself."""

    zero: Number = 0

    def __init__(self, columns: Columns, row: int) -> None:
        self.columns, self._row = columns, row
        self._learning = columns.state.learning
        self._subjects = (f"pool/{columns.pools[int(columns.pool[row])]}", f"node/{columns.node_ids[row]}")

    @staticmethod
    def pick(condition: Truth, yes: Number, no: Number) -> Number:
        """See NodesView."""
        return yes if condition else no

    @staticmethod
    def most(one: Number, other: Number) -> Number:
        """See NodesView."""
        return max(one, other)

    @staticmethod
    def least(one: Number, other: Number) -> Number:
        """See NodesView."""
        return min(one, other)

    def held(self, artifact: str) -> Held:
        """See NodesView."""
        found = _HeldValues(self.columns, artifact, self._row)
        for name in found.__slots__:
            setattr(found, name, int(getattr(found, name)))
        return found

    def origin(self, source: str) -> Number:
        """See NodesView."""
        return int(self.columns.origin(source)[self._row])

    @property
    def peer(self) -> Number:
        """See NodesView."""
        return int(self.columns.peer()[self._row])

    @property
    def fed(self) -> Number:
        """See NodesView."""
        return int(self.columns.fed[self._row])

    @property
    def ahead_bytes(self) -> Number:
        """See NodesView."""
        return int(self.columns.ahead_bytes[self._row])

    @property
    def ahead_count(self) -> Number:
        """See NodesView."""
        return int(self.columns.ahead_count[self._row])

    @property
    def driver(self) -> str:
        """Of the node."""
        return self.columns.drivers[int(self.columns.driver[self._row])]

    @property
    def gpu(self) -> str:
        """Model of its first GPU."""
        return self.columns.gpus[int(self.columns.gpu[self._row])]

    def by_driver(self, part: str, x: Number, subject: str) -> Number:
        """See NodesView."""
        return self._at(f"{part}/{self.driver}", x, subject)

    def by_source(self, part: str, x: Number, tier: Number, source: str) -> tuple[Number, Number]:
        """See NodesView."""
        family = source_family(part, tier, source)
        return self._learning.known(family), self._at(family, x, "")

    def by_gpu(self, part: str, x: Number, subject: str, gpus: bool, tier: Number | None) -> Number:
        """See NodesView."""
        middle = "" if tier is None else f"{LOADED_FROM[tier]}/"
        return self._at(f"{part}/{middle}{self.gpu if gpus else ''}", x, subject)

    def everywhere(self, part: str) -> Number:
        """See NodesView."""
        return self._at(part, 0, "")

    def _at(self, family: str, x: int, subject: str) -> int:
        return self._learning.at(family, min(x, X_MAX), (subject, *self._subjects) if subject else self._subjects)


class ManyNodes:
    """Some rows, or all of them."""

    def __init__(self, columns: Columns, rows: Ints | None = None) -> None:
        self.columns = columns
        self._rows: Any = slice(None) if rows is None else rows
        self._count = len(columns.node_ids) if rows is None else len(rows)
        self.zero: Number = np.zeros(self._count, np.int64)

    @staticmethod
    def pick(condition: Truth, yes: Number, no: Number) -> Number:
        """See NodesView."""
        return np.where(condition, yes, no)

    @staticmethod
    def most(one: Number, other: Number) -> Number:
        """See NodesView."""
        return np.maximum(one, other)

    @staticmethod
    def least(one: Number, other: Number) -> Number:
        """See NodesView."""
        return np.minimum(one, other)

    def held(self, artifact: str) -> Held:
        """See NodesView."""
        return _HeldValues(self.columns, artifact, self._rows)

    def origin(self, source: str) -> Number:
        """See NodesView."""
        return self.columns.origin(source)[self._rows]

    @property
    def peer(self) -> Number:
        """See NodesView."""
        return self.columns.peer()[self._rows]

    @property
    def fed(self) -> Number:
        """See NodesView."""
        return self.columns.fed[self._rows]

    @property
    def ahead_bytes(self) -> Number:
        """See NodesView."""
        return self.columns.ahead_bytes[self._rows]

    @property
    def ahead_count(self) -> Number:
        """See NodesView."""
        return self.columns.ahead_count[self._rows]

    def by_driver(self, part: str, x: Number, subject: str) -> Number:
        """See NodesView."""
        columns = self.columns
        return self._chosen(columns.driver[self._rows], [f"{part}/{one}" for one in columns.drivers], x, subject)

    def by_source(self, part: str, x: Number, tier: Number, source: str) -> tuple[Number, Number]:
        """See NodesView."""
        families = [source_family(part, at, source) for at in range(len(TIERS))]
        known = np.array([self.columns.state.learning.known(family) for family in families], np.int64)
        return known[tier], self._chosen(tier, families, x, "")

    def by_gpu(self, part: str, x: Number, subject: str, gpus: bool, tier: Number | None) -> Number:
        """See NodesView."""
        names = self.columns.gpus if gpus else [""]
        index = self.columns.gpu[self._rows] if gpus else self.zero
        if tier is None:
            return self._chosen(index, [f"{part}/{one}" for one in names], x, subject)
        families = [f"{part}/{source}/{one}" for one in names for source in LOADED_FROM]
        return self._chosen(index * len(LOADED_FROM) + tier, families, x, subject)

    def everywhere(self, part: str) -> Number:
        """See NodesView."""
        return self._of(part, 0, "")

    def _chosen(self, index: Ints, names: Sequence[str], x: Number, subject: str) -> Ints:
        """`names[index]` of each row."""
        made: dict[str, Ints] = {}
        found: Ints | None = None
        for at in np.flatnonzero(np.bincount(index, minlength=len(names))).tolist():
            name = names[at]
            if name not in made:
                made[name] = self._of(name, x, subject)
            found = made[name] if found is None else np.where(index == at, made[name], found)
        return found if found is not None else np.zeros(0, np.int64)

    def _of(self, family: str, x: Number, subject: str) -> Ints:
        columns = self.columns
        learning = columns.state.learning
        line = learning.line(family)
        y: Number = line.base + np.minimum(x, X_MAX) * line.slope_ppm // PPM
        if subject:
            y = y * learning.ratio_milli(family, subject) // MILLI
        of_pool, of_node = columns.ratios(family)
        if of_pool is not None:
            y = y * of_pool[columns.pool[self._rows]] // MILLI
        if of_node is not None:
            y = y * of_node[self._rows] // MILLI
        found: Ints = np.broadcast_to(np.asarray(y, np.int64), self._count)
        return found


__all__ = [
    "DISK", "LOADED_FROM", "MEMORY", "ORIGIN", "PEER", "TIERS", "ManyNodes", "NodesView", "Number", "OneNode", "Truth",
    "ahead", "source_family",
]  # fmt: skip
