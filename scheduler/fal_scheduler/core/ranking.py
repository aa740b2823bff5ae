"""Which of the nodes that could take a runner is best. Integers only, total, deterministic.

Pure. For each row that is feasible:

    wishes_ms   unmet wishes × max(5 s, 20 % of the best ready_ms): preferred labels, one each; preferred affinity, one;
                preferred anti-affinity, one for each such app there; `spread`, one for each runner of its own there
    money       GPUs × price × expected hold + reclaim risk, in millionths of a dollar. Reclaim risk: what a reclaim
                costs (the best ready_ms × what a second of waiting is worth) × how many are expected during the hold

    urgent (somebody waits):   ready_ms + wishes_ms, where all within max(1 s, 15 % of the best ready_ms) of the best
                               count as equal; then money
    with a wait value:         (ready_ms + wishes_ms) × wait value + money, one cost
    nobody waits:              money + wishes_ms × wait value; then ready_ms, in steps as wide as that band

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
Key = Callable[[Rows], Ints]  # of places in a ranking's rows: the lower, the better

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
        unmet: Ints | None,
        fragments: FragmentsFn | None = None,
    ) -> None:
        """`ready_ms` and `unmet` (wishes; None: there are none): one a row of `rows`."""
        self._fleet, self.rows, self._spec, self._ask, self._fragments = fleet, rows, spec, ask, fragments
        self.ready_ms: Ints = np.minimum(ready_ms, READY_MAX_MS)
        self.best_ms = int(self.ready_ms.min())
        self._unmet = unmet
        self._wish_ms = max(WISH_MS, self.best_ms * WISH_PERC // 100)
        self._band_ms = max(BAND_MS, self.best_ms * BAND_PERC // 100)
        self._wait = spec.placement.wait_value_micros_s or WAIT_VALUE_MICROS_S

    def wishes_ms(self, at: Rows) -> Ints:
        """What the unmet wishes of these count for."""
        return self._unmet[at] * self._wish_ms if self._unmet is not None else np.zeros(len(at), np.int64)

    def money(self, at: Rows) -> Ints:
        """Micros for the expected hold of these, reclaims included."""
        fleet, rows, spec = self._fleet, self.rows[at], self._spec
        hold_s = min(self._ask.hold_s or HOLD_S, HOLD_MAX_S)
        milli = spec.num_gpus * (spec.gpu_milli or WHOLE)
        loss = min(self.best_ms * self._wait // 1000, _LOSS_MAX_MICROS)
        price: Ints = fleet.price[rows] * milli // WHOLE * hold_s // 3600
        risk: Ints = fleet.reclaim[rows] * hold_s // 3600 * loss // 1_000_000
        return price + risk

    def crowd(self, at: Rows) -> Ints:
        """Runners of the app in the failure domains of these."""
        found: Ints = np.zeros(len(at), np.int64)
        counts = self._fleet.domains_of_app.get(self._ask.app)
        if counts:
            domains = self._fleet.domain[self.rows[at]]
            for domain, count in counts.items():
                found[domains == domain] = count
        return found

    def _keys(self) -> list[Key]:
        """What decides before fragmentation, the first first; each for some of the rows."""
        if not self._ask.urgent:
            return [
                lambda at: self.money(at) + self.wishes_ms(at) * self._wait // 1000,
                lambda at: self.ready_ms[at] // self._band_ms,
                self.crowd,
            ]
        if self._spec.placement.wait_value_micros_s:
            return [
                lambda at: (self.ready_ms[at] + self.wishes_ms(at)) * self._wait // 1000 + self.money(at),
                self.crowd,
            ]
        return [lambda at: self._banded(self.ready_ms[at] + self.wishes_ms(at)), self.money, self.crowd]

    def _banded(self, cost_ms: Ints) -> Ints:
        """Costs, those that count as equal to the best of them as 0."""
        found: Ints = np.where(cost_ms <= cost_ms.min() + self._band_ms, 0, cost_ms)
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
        at, equal = np.arange(len(self.rows)), 0
        for rule in (*self._keys(), None, self._fragmentation, self._left):
            if rule is None:
                equal = len(at)
            elif len(at) > 1:
                values = rule(at)
                at = at[values == values.min()]
        return int(at[0]), equal

    def order(self) -> list[int]:
        """Places in `rows`, the best first."""
        everywhere: Rows = np.arange(len(self.rows))
        rules = (*self._keys(), self._fragmentation, self._left)
        keys = [*(rule(everywhere) for rule in rules), everywhere]
        return [int(at) for at in np.lexsort(keys[::-1])]

    def why(self, at: int, equal: int = 0) -> tuple[tuple[str, int], ...]:
        """The terms of one row, by name; zeros are left out, but for the time."""
        one: Rows = np.array([at])
        terms = {
            "ready_ms": int(self.ready_ms[at]),
            "best_ready_ms": self.best_ms,
            "wishes_ms": int(self.wishes_ms(one)[0]),
            "money_micros": int(self.money(one)[0]),
            "in_domain": int(self.crowd(one)[0]),
            "gpus_left": int(self._fleet.free[self.rows[at]]),
            "feasible": len(self.rows),
            "equal": equal,
        }
        return tuple((name, value) for name, value in terms.items() if value or name == "ready_ms")


def unmet_wishes(fleet: Fleet, rows: Rows, spec: Spec, ask: Ask, labels_missing: Ints | None) -> Ints | None:
    """How many wishes of `spec` each row leaves unmet; None where it has none.

    `labels_missing`: how many preferred labels each row of the fleet lacks.
    """
    rules = spec.placement
    if labels_missing is None and not (rules.affinity_preferred or rules.anti_affinity_preferred or rules.spread):
        return None
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
