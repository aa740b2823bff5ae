"""Which of the nodes that could take a runner is best. Integers only, total, deterministic.

Pure. For each row that is feasible:

    wishes_ms   unmet wishes × max(5 s, 20 % of the best ready_ms): preferred labels, one each; preferred affinity, one;
                preferred anti-affinity, one for each such app there; `spread`, one for each runner of its own there
    money       GPUs × price × expected hold + reclaim risk, in millionths of a dollar. Reclaim risk: what a reclaim
                costs (the best ready_ms × what a second of waiting is worth) × how many are expected during the hold

    urgent (somebody waits):   ready_ms + wishes_ms, where all within max(1 s, 15 % of the best ready_ms) of the best
                               count as equal; then money
    with a wait value:         (ready_ms + wishes_ms) × wait value + money, one cost
    nobody waits:              money + wishes_ms × wait value; then ready_ms, in the same band

and then, for all: fewest runners of the app in the failure domain, least fragmentation, best fit (fewest GPUs left
free, then MiB), node id. A wish counts for more than the band is wide, so that it is never lost in it; and the reclaim
risk is of the best time, not of each node's own, so that nodes of one price stay equal and what comes after decides.

`first` is what `Placer.place` takes, `order` is for explanations; a property test holds that they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fal_scheduler.core.fleet import WHOLE, Bools, Fleet, Ints
from fal_scheduler.core.records import Spec

Rows = NDArray[np.intp]
ReadyFn = Callable[[Spec, Sequence[str]], Ints]  # milliseconds until the first output, one a node named
FragmentsFn = Callable[[Spec, Rows], Ints]  # higher is better

BAND_MS: Final = 1000
BAND_PERC: Final = 15
WISH_MS: Final = 5000
WISH_PERC: Final = 20
HOLD_S: Final = 1800  # of an app none of whose runners has ended yet
HOLD_MAX_S: Final = 30 * 86_400
WAIT_VALUE_MICROS_S: Final = 1000  # of an app that does not say
READY_MAX_MS: Final = 1_000_000_000
_LOSS_MAX_MICROS = 1_000_000_000
_MIB_BITS = 28


@dataclass(frozen=True, slots=True)
class Ask:
    """Who asks for a place and how. `avoid`: node ids; `hold_s`: how long its runners live, 0: unknown."""

    app: str = ""
    team: str = ""
    urgent: bool = True
    avoid: frozenset[str] = frozenset()
    now_s: float = 0.0
    hold_s: int = 0


ANYBODY: Final = Ask()


class Ranking:
    """The terms of feasible rows (ascending), all of one machine type."""

    def __init__(
        self,
        fleet: Fleet,
        rows: Rows,
        spec: Spec,
        ask: Ask,
        ready_ms: Ints,
        unmet: Ints,
        fragments: FragmentsFn | None = None,
    ) -> None:
        """`ready_ms` and `unmet` (wishes): one a row of `rows`."""
        self._fleet, self.rows, self._spec, self._ask, self._fragments = fleet, rows, spec, ask, fragments
        self.ready_ms: Ints = np.minimum(ready_ms, READY_MAX_MS)
        self.best_ms = int(self.ready_ms.min())
        self.wishes_ms: Ints = unmet * max(WISH_MS, self.best_ms * WISH_PERC // 100)
        self._band_ms = max(BAND_MS, self.best_ms * BAND_PERC // 100)
        self._wait = spec.placement.wait_value_micros_s or WAIT_VALUE_MICROS_S
        self.money = self._money()
        counts = fleet.domains_of_app.get(ask.app, {})
        self.crowd: Ints = np.zeros(len(rows), np.int64)
        for domain, count in counts.items():
            self.crowd[fleet.domain[rows] == domain] = count

    def _money(self) -> Ints:
        fleet, rows, spec = self._fleet, self.rows, self._spec
        hold_s = min(self._ask.hold_s or HOLD_S, HOLD_MAX_S)
        milli = spec.num_gpus * (spec.gpu_milli or WHOLE)
        loss = min(self.best_ms * self._wait // 1000, _LOSS_MAX_MICROS)
        price: Ints = fleet.price[rows] * milli // WHOLE * hold_s // 3600
        risk: Ints = fleet.reclaim[rows] * hold_s // 3600 * loss // 1_000_000
        return price + risk

    def _keys(self) -> list[Ints]:
        """What decides before fragmentation, the first first."""
        if not self._ask.urgent:
            money = self.money + self.wishes_ms * self._wait // 1000
            return [money, self._banded(self.ready_ms), self.crowd]
        if self._spec.placement.wait_value_micros_s:
            return [(self.ready_ms + self.wishes_ms) * self._wait // 1000 + self.money, self.crowd]
        return [self._banded(self.ready_ms + self.wishes_ms), self.money, self.crowd]

    def _banded(self, cost_ms: Ints) -> Ints:
        best: int = cost_ms.min()
        found: Ints = np.where(cost_ms <= best + self._band_ms, 0, cost_ms)
        return found

    def _fragmentation(self, at: Rows) -> Ints:
        if self._fragments is None or len(at) == 1:
            return np.zeros(len(at), np.int64)
        return -self._fragments(self._spec, self.rows[at])

    def _left(self, at: Rows) -> Ints:
        """Best fit: GPUs left free, then MiB left."""
        rows = self.rows[at]
        mib = np.minimum(self._fleet.memory_free[rows] >> 20, (1 << _MIB_BITS) - 1)
        left: Ints = (self._fleet.free[rows] << _MIB_BITS) + mib
        return left

    def first(self) -> tuple[int, int]:
        """Where in `rows` the best one is, and how many were equal to it before fragmentation decided."""
        if len(self.rows) == 1:
            return 0, 1
        at: Rows = np.arange(len(self.rows))
        for key in self._keys():
            values = key[at]
            at = at[values == values.min()]
        equal = len(at)
        for rule in (self._fragmentation, self._left):
            if len(at) > 1:
                values = rule(at)
                at = at[values == values.min()]
        return int(at[0]), equal

    def order(self) -> list[int]:
        """Places in `rows`, the best first."""
        everywhere: Rows = np.arange(len(self.rows))
        # Fragmentation is relative to what is compared, but a score of its own for each row: it sorts alike.
        keys = [*self._keys(), self._fragmentation(everywhere), self._left(everywhere), self.rows]
        return [int(at) for at in np.lexsort(keys[::-1])]

    def why(self, at: int, equal: int = 0) -> tuple[tuple[str, int], ...]:
        """The terms of one row, by name; zeros are left out, but for the time."""
        terms = {
            "ready_ms": int(self.ready_ms[at]),
            "best_ready_ms": self.best_ms,
            "wishes_ms": int(self.wishes_ms[at]),
            "money_micros": int(self.money[at]),
            "in_domain": int(self.crowd[at]),
            "gpus_left": int(self._fleet.free[self.rows[at]]),
            "feasible": len(self.rows),
            "equal": equal,
        }
        return tuple((name, value) for name, value in terms.items() if value or name == "ready_ms")


def unmet_wishes(fleet: Fleet, rows: Rows, spec: Spec, ask: Ask, labels_missing: Ints | None) -> Ints:
    """How many wishes of `spec` each row leaves unmet. `labels_missing`: preferred labels, one a row of the fleet."""
    rules = spec.placement
    unmet: Ints = np.zeros(len(rows), np.int64)
    if labels_missing is not None:
        unmet += labels_missing[rows]
    if rules.affinity_preferred:
        unmet += ~fleet.rows_running(rules.affinity_preferred)[rows]
    for app in rules.anti_affinity_preferred:
        unmet += fleet.rows_running((app,))[rows]
    if rules.spread == "node":
        counts: Ints = np.zeros(len(fleet.node_ids), np.int64)
        for node_id, count in fleet.nodes_of_app.get(ask.app, {}).items():
            if (own := fleet.rows_of.get(node_id)) is not None:
                counts[own.start : own.stop] = count
        unmet += counts[rows]
    elif rules.spread == "domain":
        domains = fleet.domain[rows]
        for domain, count in fleet.domains_of_app.get(ask.app, {}).items():
            unmet[domains == domain] += count
    return unmet


__all__ = ["ANYBODY", "Ask", "Bools", "FragmentsFn", "Ranking", "ReadyFn", "Rows", "unmet_wishes"]
