"""What is told of nodes and caches as numpy columns, one row a node in order of id, brought along change by change.

Pure. Derived from a `State` and nothing else: made anew, the columns are the same to the bit, so that a replay from a
snapshot decides as the leader did. Read by `ready_at` only. Rates in bytes per second, -1: never measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any, Final
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from fal_scheduler.core.cache_facts import CAME_ON_MS_MAX, CacheFacts
from fal_scheduler.core.learning import MILLI, Learning
from fal_scheduler.core.records import Pool
from fal_scheduler.core.state import State

Ints = NDArray[np.int64]
ARTIFACTS_KEPT_MAX: Final = 64  # with columns of their own: 40 bytes for each node
SOURCES_KEPT_MAX: Final = 64
FAMILIES_KEPT_MAX: Final = 128
_MS: Final = 1000


class ArtifactColumns:
    """One artifact. `known`: 1 where some of it is; `rate`: at which it arrives; `at_pool`: holders of each pool."""

    def __init__(self, rows: int, pools: int) -> None:
        self.known: Ints = np.zeros(rows, np.int64)
        self.here: Ints = np.zeros(rows, np.int64)
        self.memory: Ints = np.zeros(rows, np.int64)
        self.ready: Ints = np.zeros(rows, np.int64)
        self.rate: Ints = np.zeros(rows, np.int64)
        self.at_pool: Ints = np.zeros(pools, np.int64)


class Columns:
    """See the module. `fresh` before reading; columns are made when they are first asked for."""

    def __init__(self, state: State) -> None:
        self._state = ref(state)  # who holds the columns by the state would else keep it for ever
        self._fleet_version = -1
        self._made = 0
        self._facts: CacheFacts | None = None
        self._learning: Learning | None = None
        self.at_ms = 0  # what comes on with time is as of then
        self.facts_seen = self._learning_seen = 0
        self._rebuild()

    @property
    def state(self) -> State:
        """What they follow."""
        state = self._state()
        assert state is not None
        return state

    # --- following the state ----------------------------------------------------------------------------------------

    def fresh(self) -> Columns:
        """Bring everything that was made up to the state."""
        state = self.state
        behind = state.cache_facts.version - self.facts_seen
        if (
            self._fleet_version != state.fleet.version
            or self._facts is not state.cache_facts
            or behind > len(state.cache_facts.log)
            or any(state.pools.get(name) is not record for name, record in self._pool_records)
        ):
            self._rebuild()
            return self
        if behind:
            self._follow_facts([state.cache_facts.log[-at] for at in range(behind, 0, -1)])
            self.facts_seen = state.cache_facts.version
        self._follow_time()
        self._follow_learning()
        return self

    def stamp(self, artifacts: Sequence[str], sources: Sequence[str]) -> tuple[object, ...]:
        """Equal to an earlier one: nothing changed for rows but for those that `changed_since` names."""
        self.peer()
        for source in sources:
            self.origin(source)
        gaps = tuple(self._gaps.get(source) for source in ("", *sources))
        holders = tuple(self.artifact(artifact).at_pool.tobytes() for artifact in artifacts)
        return self._made, self.state.learning.version, gaps, holders

    def changed_since(self, facts_version: int, at_ms: int) -> Ints | None:
        """Rows of nodes with news since then, in order; None where that is not known any more.

        Where time has passed since `at_ms`, that is news for all to which something comes.
        """
        facts = self.state.cache_facts
        behind = facts.version - facts_version
        if behind > len(facts.log):
            return None
        nodes = {facts.log[-at][0]: None for at in range(behind, 0, -1)}
        rows = np.array(sorted(self.row_of[one] for one in nodes if one in self.row_of), np.int64)
        return rows if at_ms == self.at_ms else np.union1d(rows, np.flatnonzero(self._coming))

    def _rebuild(self) -> None:
        self._made += 1
        state = self.state
        fleet = state.fleet
        self.node_ids = sorted(fleet.facts)
        self.row_of = {node_id: row for row, node_id in enumerate(self.node_ids)}
        facts = [fleet.facts[node_id] for node_id in self.node_ids]
        self.pools = sorted({one.pool for one in facts})
        self.drivers = sorted({one.driver for one in facts})
        self.gpus = sorted({one.gpus[0].model if one.gpus else "" for one in facts})
        pool_at = {name: at for at, name in enumerate(self.pools)}
        driver_at = {name: at for at, name in enumerate(self.drivers)}
        gpu_at = {name: at for at, name in enumerate(self.gpus)}
        rows = len(facts)
        self.pool = np.fromiter((pool_at[one.pool] for one in facts), np.int64, rows)
        self.driver = np.fromiter((driver_at[one.driver] for one in facts), np.int64, rows)
        self.gpu = np.fromiter((gpu_at[one.gpus[0].model if one.gpus else ""] for one in facts), np.int64, rows)
        self._pool_records = [(name, state.pools.get(name)) for name in self.pools]
        self._reach = _reach(state.pools, self.pools)
        self.fed: Ints = np.zeros(rows, np.int64)
        self.usual: Ints = np.full(rows, -1, np.int64)
        self.ahead_bytes: Ints = np.zeros(rows, np.int64)
        self._left: Ints = np.zeros(rows, np.int64)  # of what is fetched, as told
        self._coming: Ints = np.zeros(rows, np.int64)  # bytes of it per second
        self._expected: Ints = np.zeros(rows, np.int64)  # not begun yet
        self._told_ms: Ints = np.zeros(rows, np.int64)
        self.ahead_count: Ints = np.zeros(rows, np.int64)
        self.disk: Ints = np.full(rows, -1, np.int64)
        self._artifacts: dict[str, ArtifactColumns] = {}
        self._sources: dict[str, Ints] = {}
        self._filled: dict[str, Ints] = {}  # sources' columns where gaps are filled
        self._gaps: dict[str, bytes] = {}  # what gaps were filled with, by source
        self._ratios: dict[str, tuple[Ints, Ints]] = {}
        self._fleet_version = fleet.version
        self._facts, self.facts_seen = state.cache_facts, state.cache_facts.version
        self.at_ms = state.facts_at_ms
        self._learning, self._learning_seen = state.learning, state.learning.version
        for node_id in state.cache_facts.nodes:
            self._follow_node(node_id)

    def _follow_facts(self, changes: list[tuple[str, str]]) -> None:
        nodes: dict[str, None] = {}
        for node_id, artifact in changes:
            nodes[node_id] = None
            if artifact in self._artifacts and node_id in self.row_of:
                self._follow_artifact(self._artifacts[artifact], artifact, node_id)
        for node_id in nodes:
            self._follow_node(node_id)

    def _follow_node(self, node_id: str) -> None:
        row, facts = self.row_of.get(node_id), self.state.cache_facts
        if row is None:
            return
        node = facts.nodes.get(node_id)
        rates: Mapping[str, int] = node.rates if node is not None else {}
        peers = [rate for source, rate in rates.items() if rate and source.startswith("peer:")]
        usual = median_low(peers) if peers else -1
        if usual != self.usual[row]:
            self.usual[row] = usual
            self._filled.pop("", None)
        self.fed[row] = node.fed_bytes_s if node is not None else 0
        self.disk[row] = rates.get("disk", -1)
        for source, column in self._sources.items():
            rate = rates.get(source, -1)
            if rate != column[row]:
                column[row] = rate
                self._filled.pop(source, None)
        self._left[row], self._coming[row], self._expected[row] = facts.under_way_to(node_id)
        self._told_ms[row] = node.told_ms if node is not None else 0
        self.ahead_count[row] = len(node.fetching) + len(node.expected) if node is not None else 0
        self._come_on(row)

    def _follow_time(self) -> None:
        if self.at_ms != self.state.facts_at_ms:
            self.at_ms = self.state.facts_at_ms
            self._come_on(slice(None))

    def _come_on(self, rows: Any) -> None:
        """What was under way less what has come since."""
        since_ms = np.clip(self.at_ms - self._told_ms[rows], 0, CAME_ON_MS_MAX)
        came = np.minimum(self._left[rows], self._coming[rows] * since_ms // _MS)
        self.ahead_bytes[rows] = self._left[rows] - came + self._expected[rows]

    def _follow_artifact(self, columns: ArtifactColumns, artifact: str, node_id: str) -> None:
        row = self.row_of[node_id]
        fact = self.state.cache_facts.holders.get(artifact, {}).get(node_id)
        holds = fact is not None and (fact.ready or fact.bytes_here > 0)
        columns.at_pool[self.pool[row]] += int(holds) - columns.known[row]
        columns.known[row] = int(holds)
        columns.here[row] = fact.bytes_here if fact is not None else 0
        columns.memory[row] = fact.bytes_memory if fact is not None else 0
        columns.ready[row] = int(fact.ready) if fact is not None else 0
        columns.rate[row] = fact.rate_bytes_s if fact is not None and fact.fetching else 0

    def _follow_learning(self) -> None:
        learning = self.state.learning
        behind = learning.version - self._learning_seen
        if self._learning is not learning or behind > len(learning.log):
            self._ratios.clear()
        else:
            for at in range(behind, 0, -1):
                family, subject = learning.log[-at]
                if family in self._ratios:
                    self._follow_ratio(family, subject)
        self._learning, self._learning_seen = learning, learning.version

    def _follow_ratio(self, family: str, subject: str) -> None:
        of_pool, of_node = self._ratios[family]
        kind, _, name = subject.partition("/")
        if not subject:
            if family not in self.state.learning.families:
                del self._ratios[family]
        elif kind == "node" and name in self.row_of:
            of_node[self.row_of[name]] = self.state.learning.ratio_milli(family, subject)
        elif kind == "pool" and name in self.pools:
            of_pool[self.pools.index(name)] = self.state.learning.ratio_milli(family, subject)

    # --- columns ----------------------------------------------------------------------------------------------------

    def artifact(self, artifact: str) -> ArtifactColumns:
        """Columns of one artifact."""
        have = self._artifacts.pop(artifact, None)
        if have is None:
            have = ArtifactColumns(len(self.node_ids), len(self.pools))
            for node_id in self.state.cache_facts.holders.get(artifact, ()):
                if node_id in self.row_of:
                    self._follow_artifact(have, artifact, node_id)
        self._artifacts[artifact] = have
        if len(self._artifacts) > ARTIFACTS_KEPT_MAX:
            del self._artifacts[next(iter(self._artifacts))]
        return have

    def origin(self, source: str) -> Ints:
        """Bytes per second from an origin: a node's own, else its pool's, region's, everybody's median; -1: nobody's.

        0: it does not answer there. A folder ("origin:file") may be another machine's: once somebody has read it, it
        answers there and where it was measured only.
        """
        own = self._sources.pop(source, None)
        if own is None:
            own = np.full(len(self.node_ids), -1, np.int64)
            for node_id, node in self.state.cache_facts.nodes.items():
                if node_id in self.row_of and (rate := node.rates.get(source)) is not None:
                    own[self.row_of[node_id]] = rate
            self._filled.pop(source, None)
        self._sources[source] = own
        if len(self._sources) > SOURCES_KEPT_MAX:
            oldest = next(iter(self._sources))
            del self._sources[oldest]
            self._filled.pop(oldest, None)
        if source not in self._filled:
            self._filled[source] = (self._folder if source == "origin:file" else self._fill)(source, own)
        return self._filled[source]

    def peer(self) -> Ints:
        """What one peer usually sends to each node: the median of those measured there, else of its pool …; -1."""
        if "" not in self._filled:
            self._filled[""] = self._fill("", self.usual)
        return self._filled[""]

    def _fill(self, source: str, own: Ints) -> Ints:
        """Gaps take the lower median of measured rates of their pool, else their region, else of all."""
        measured = own > 0
        self._gaps[source] = b""
        if not measured.any():
            return own
        everybody = _median_low(own[measured])
        regions = [self._region(name) for name in self.pools]
        by_pool: Ints = np.full(len(self.pools), everybody, np.int64)
        for at, region in enumerate(regions):
            same_region = np.isin(self.pool, [i for i, other in enumerate(regions) if other == region])
            for rows in (measured & (self.pool == at), measured & same_region):
                if rows.any():
                    by_pool[at] = _median_low(own[rows])
                    break
        self._gaps[source] = by_pool.tobytes()
        return np.where(own < 0, by_pool[self.pool], own)

    def _folder(self, source: str, own: Ints) -> Ints:
        """Nobody knows who has it before somebody has read it; from then on gaps are 0."""
        anybody = bool((own > 0).any())
        self._gaps[source] = b"read" if anybody else b""
        return np.where(own < 0, 0, own) if anybody else own

    def _region(self, pool: str) -> str:
        record = self.state.pools.get(pool)
        return record.region if record is not None else ""

    def holders(self, columns: ArtifactColumns) -> Ints:
        """How many nodes with some of it each pool has a network to."""
        counts: Ints = self._reach @ columns.at_pool
        return counts

    def ratios(self, family: str) -> tuple[Ints | None, Ints | None]:
        """Thousandths of each pool and of each node; None where nothing of that kind was learnt."""
        have = self.state.learning.families.get(family)
        if have is None or not have.ratios:
            return None, None
        if family not in self._ratios:
            self._ratios[family] = (
                np.full(len(self.pools), MILLI, np.int64),
                np.full(len(self.node_ids), MILLI, np.int64),
            )
            for subject in have.ratios:
                self._follow_ratio(family, subject)
            if len(self._ratios) > FAMILIES_KEPT_MAX:
                del self._ratios[next(iter(self._ratios))]
        return self._ratios[family]


def _median_low(values: Ints) -> int:
    at = (len(values) - 1) // 2
    return int(np.partition(values, at)[at])


def _reach(pools: Mapping[str, Pool], names: list[str]) -> Ints:
    """1 where two pools share a network; those that declare none may reach everybody (`cache_paths`)."""
    reach = np.zeros((len(names), len(names)), np.int64)
    for at, name in enumerate(names):
        for other_at, other in enumerate(names):
            one, two = pools.get(name), pools.get(other)
            apart = one is not None and two is not None and one.networks and two.networks and name != other
            reach[at, other_at] = not (apart and one and two and not set(one.networks) & set(two.networks))
    return reach


__all__ = ["ArtifactColumns", "Columns", "Ints"]
