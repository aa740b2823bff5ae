"""How placements fragment the fleet: the published score (`core.fragmentation`) on the fleet's own columns.

Pure. The typical tasks are what the cluster's apps ask for, each app as often as it may have runners: that follows from
the records alone, so that a new leader and a replay score alike; it needs no history and forgets none. Where many rows
are compared, a demand's scores of all rows are kept and brought along. A share that other teams' runners leave counts
as free, which it is for that team.

Read by placement, after time, price and spread. Must change nothing but its caches.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

import numpy as np

from fal_scheduler.core.fleet import WHOLE, Fleet, Ints
from fal_scheduler.core.fragmentation import Demand, Fragmentation, Shares
from fal_scheduler.core.place import fits_class
from fal_scheduler.core.ranking import Rows
from fal_scheduler.core.records import App, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.typical import TypicalTasks

DIRECT_MAX: Final = 256  # rows are scored when asked; of more, the scores of all rows are kept
RUNNERS_COUNTED_MAX: Final = 100  # of one app: a large limit is no forecast
_DEMANDS_MAX = 256


class FleetFragments:
    """Scores for the fleet of one State; `score` has the shape that `Placer.place` takes."""

    def __init__(self, *, direct_max: int = DIRECT_MAX) -> None:
        self._direct_max = direct_max
        self._fleet: Fleet | None = None
        self._made: tuple[int, int, int] | None = None
        self._kinds: list[tuple[str, int, str]] = []
        self._shares = Shares(0, 0)
        self._fragmentation: Fragmentation | None = None
        self._kept: dict[Demand, tuple[int, Ints]] = {}  # rows touched until then, scores
        self._of_fleet: tuple[int, int] | None = None
        self._typical: list[tuple[Demand, int]] = []
        self._asks: dict[str, tuple[App, Demand | None, int]] = {}  # by app, as its record was then

    def follow(self, state: State) -> FleetFragments:
        """Bring it up to the state's apps and nodes."""
        fleet = self._fleet = state.fleet.fresh()
        made = (fleet.version, fleet.epoch, state.apps_version)
        if made != self._made:
            self._made = made
            self._make(state, fleet)
        return self

    def _make(self, state: State, fleet: Fleet) -> None:
        """An app that came or changed costs a look at each app's record, and more only where it changes what is
        typical."""
        same_fleet = self._of_fleet == (fleet.version, fleet.epoch)
        if not same_fleet:
            self._asks.clear()
            _, first, group = np.unique(fleet.kind, return_index=True, return_inverse=True)
            self._kinds = [fleet.classes[row] for row in first]
            # The fleet's own columns: what it brings along is seen here.
            self._shares = Shares(0, 0)
            self._shares.cpu_free, self._shares.gpu_free = fleet.cpu_free, fleet.shares
            self._shares.kind = group.ravel().astype(np.int16)
            self._of_fleet = (fleet.version, fleet.epoch)
        typical = self._typical_tasks(state)
        if not same_fleet or typical != self._typical:
            self._typical = typical
            self._fragmentation = Fragmentation(self._shares, typical) if typical and self._kinds else None
            self._kept.clear()

    def _typical_tasks(self, state: State) -> list[tuple[Demand, int]]:
        before, self._asks = self._asks, {}
        times_of: dict[Demand, int] = {}
        for app in state.apps.values():
            have = before.get(app.id)
            if have is None or have[0] is not app:
                have = self._ask(state, app)
            self._asks[app.id] = have
            _, demand, times = have
            if demand is not None:
                times_of[demand] = times_of.get(demand, 0) + times
        tasks = TypicalTasks()
        for demand, times in times_of.items():
            tasks.observe(demand, times)
        return tasks.typical()

    def _ask(self, state: State, app: App) -> tuple[App, Demand | None, int]:
        spec = state.revision_of(app).spec
        if app.deleting or spec.build is not None:
            return app, None, 0
        runners = state.scaling_of(app).max_concurrency
        return app, self._demand(spec), max(1, min(runners, RUNNERS_COUNTED_MAX))

    def _demand(self, spec: Spec) -> Demand:
        if spec.num_gpus == 0:
            return Demand(spec.resources.cpu_milli, 0, 0)
        types = spec.machine_type or ("",)
        kinds = tuple(at for at, kind in enumerate(self._kinds) if any(fits_class(kind, spec, one) for one in types))
        return Demand(spec.resources.cpu_milli, spec.gpu_milli or WHOLE, spec.num_gpus, kinds or (len(self._kinds),))

    def score(self, spec: Spec, rows: Rows) -> Ints:
        """Of feasible rows, 0..100, higher is better; all alike where no app says what is typical."""
        fleet = self._fleet
        if self._fragmentation is None or fleet is None:
            return np.zeros(len(rows), np.int64)
        # Kinds are a filter that these rows have passed; of other rows the score means nothing.
        demand = self._demand(spec)._replace(kinds=())
        if len(rows) <= self._direct_max:
            return self._fragmentation.score(demand, rows)[0]
        have = self._kept.pop(demand, None)
        if have is None:
            if len(self._kept) >= _DEMANDS_MAX:
                self._kept.pop(next(iter(self._kept)))
            everywhere: Rows = np.arange(len(fleet.node_ids))
            scores = self._fragmentation.score(demand, everywhere)[0]
        else:
            seen, scores = have
            changed: Rows = np.unique(np.array(fleet.touched[seen:], np.intp))
            if changed.size:
                scores[changed] = self._fragmentation.score(demand, changed)[0]
        self._kept[demand] = len(fleet.touched), scores
        found: Ints = scores[rows]
        return found


_OF_STATE: WeakKeyDictionary[State, FleetFragments] = WeakKeyDictionary()


def fragments_of(state: State) -> FleetFragments:
    """The scores of a state, made once for it."""
    have = _OF_STATE.get(state)
    if have is None:
        have = _OF_STATE[state] = FleetFragments()
    return have.follow(state)


__all__ = ["FleetFragments", "fragments_of"]
