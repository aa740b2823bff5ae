"""Which node has how much of which artifact and how fast bytes reach it, as far as placement must know.

Pure. A part of `State`, filled by `CacheTold` and by placements (`expect`), read by `ready_at`. What a node told with
its last message stands until it tells otherwise or is forgotten. Kept as plain dicts, so that a snapshot holds it.

Caches tell progress now and then; meanwhile what is under way to a node comes on at the rate that it told
(`came_on`, as of `State.facts_at_ms`): half of what a small model lacked may be there by the next placement.

Memory: about 0.2 kB for each (artifact, node); a node has at most CACHE_FACTS_PER_NODE_MAX, told by its edge.
Invariants: `holders[a][n]` exists exactly when `nodes[n].held` has `a`; `under_way[a]` are the nodes that fetch `a` or
were given a runner that needs it; nothing empty is kept. `log` names what changed, so that columns follow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median_low
from typing import Final

from fal_scheduler.core.cache_events import CachedFact, CacheTold

_MS: Final = 1000
LOG_MAX: Final = 8192  # changes that columns may lag behind before they are made anew
SUM_SAMPLES_MAX: Final = 15
STEADY_COUNT: Final = 16  # words of a rate that its mean is of
BELIEVED_COUNT: Final = 4  # before a mean may say how much a source can give
TIME_STEP_MS: Final = 250  # so that what is computed from facts is computed anew four times a second at most
CAME_ON_MS_MAX: Final = 15_000  # what was not told for longer is not known


@dataclass(slots=True)
class CacheNodeFacts:
    """Of one node. `expected`: bytes of artifacts that a placement needs there.

    `told`: bytes per second by source, as told last; `rates`: the mean of what was told, of the last STEADY_COUNT
    weighed most, and of how many (`counts`): a cache measures pieces that come in bundles, so what it tells swings.
    `told_ms`: monotonic, of its last message.
    """

    told: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    rates: dict[str, int] = field(default_factory=dict)
    fed_bytes_s: int = 0
    held: dict[str, None] = field(default_factory=dict)
    fetching: dict[str, None] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)
    told_ms: int = 0


class CacheFacts:
    """All nodes and artifacts. `version` counts changes; the last of them are in `log` as (node, artifact or "")."""

    def __init__(self) -> None:
        self.holders: dict[str, dict[str, CachedFact]] = {}
        self.nodes: dict[str, CacheNodeFacts] = {}
        self.under_way: dict[str, dict[str, None]] = {}
        self.sums: dict[str, tuple[int, ...]] = {}  # source -> bytes per second that it gave several nodes together
        self.flows: dict[str, tuple[int, int]] = {}  # source -> nodes that fetch, and what it gives them together
        self.best: dict[str, int] = {}  # source -> the most that it gave one node
        self.version = 0
        self.log: deque[tuple[str, str]] = deque(maxlen=LOG_MAX)

    # --- told -------------------------------------------------------------------------------------------------------

    def take(self, event: CacheTold) -> None:
        """Bring the facts up to what a node told."""
        if event.left:
            self._forget(event.node_id)
            return
        node = self.nodes.setdefault(event.node_id, CacheNodeFacts())
        node.told_ms = int(event.arrived_s * _MS)
        self._flow(node, -1)
        for artifact in [i for i in node.held if i not in event.put] if event.whole else event.gone:
            self._drop(event.node_id, node, artifact)
        for artifact, fact in event.put.items():
            self._put(event.node_id, node, artifact, fact)
        if event.fed_bytes_s is not None:
            node.fed_bytes_s = event.fed_bytes_s
        for source, rate in event.rates.items():
            node.told[source] = rate
            self._steady(node, source, rate)
        self._flow(node, 1)
        self._note(event.node_id, "")
        for source in event.rates:
            if self.flows.get(source, (0, 0))[0] > 1:
                self.sums[source] = (*self.sums.get(source, ()), self.flows[source][1])[-SUM_SAMPLES_MAX:]

    def expect(self, node_id: str, artifact: str, size: int) -> None:
        """A runner was placed there that needs it: it will be fetched, if it is not there already."""
        fact = self.holders.get(artifact, {}).get(node_id)
        node = self.nodes.setdefault(node_id, CacheNodeFacts())
        if fact is None and artifact not in node.expected:
            node.expected[artifact] = size
            self.under_way.setdefault(artifact, {})[node_id] = None
            self._note(node_id, artifact)

    def settle(self, node_id: str, artifact: str) -> None:
        """Nothing is expected there any more: the runner is ready, or gone."""
        node = self.nodes.get(node_id)
        if node is not None and node.expected.pop(artifact, None) is not None:
            self._under_way(node_id, node, artifact)
            self._note(node_id, artifact)

    def _put(self, node_id: str, node: CacheNodeFacts, artifact: str, fact: CachedFact) -> None:
        self.holders.setdefault(artifact, {})[node_id] = fact
        node.held[artifact] = None
        node.expected.pop(artifact, None)
        if fact.fetching:
            node.fetching[artifact] = None
        else:
            node.fetching.pop(artifact, None)
        self._under_way(node_id, node, artifact)
        self._note(node_id, artifact)

    def _drop(self, node_id: str, node: CacheNodeFacts, artifact: str) -> None:
        if artifact not in node.held:
            return
        del node.held[artifact], self.holders[artifact][node_id]
        if not self.holders[artifact]:
            del self.holders[artifact]
        node.fetching.pop(artifact, None)
        self._under_way(node_id, node, artifact)
        self._note(node_id, artifact)

    def _under_way(self, node_id: str, node: CacheNodeFacts, artifact: str) -> None:
        if artifact in node.fetching or artifact in node.expected:
            self.under_way.setdefault(artifact, {})[node_id] = None
        elif node_id in (there := self.under_way.get(artifact, {})):
            del there[node_id]
            if not there:
                del self.under_way[artifact]

    def _forget(self, node_id: str) -> None:
        node = self.nodes.get(node_id)
        if node is None:
            return
        self._flow(node, -1)
        for artifact in list(node.held):
            self._drop(node_id, node, artifact)
        for artifact in list(node.expected):
            self.settle(node_id, artifact)
        del self.nodes[node_id]
        self._note(node_id, "")

    def _note(self, node_id: str, artifact: str) -> None:
        self.version += 1
        self.log.append((node_id, artifact))

    def _steady(self, node: CacheNodeFacts, source: str, rate: int) -> None:
        """Bring the mean along. 0 (it does not answer) counts at once, and so does what comes after it."""
        before = node.rates.get(source, 0)
        count = min(node.counts.get(source, 0) + 1, STEADY_COUNT) if rate and before else 1
        node.counts[source] = count
        node.rates[source] = mean = before + (rate - before) // count if rate else 0
        if count >= BELIEVED_COUNT or source not in self.best:
            self.best[source] = max(self.best.get(source, 0), mean)

    def _flow(self, node: CacheNodeFacts, sign: int) -> None:
        """What a node's sources give it counts while it fetches."""
        if not node.fetching:
            return
        for source, rate in node.told.items():
            if rate:
                count, total = self.flows.get(source, (0, 0))
                if count + sign:
                    self.flows[source] = count + sign, total + sign * rate
                else:
                    del self.flows[source]

    # --- asked ------------------------------------------------------------------------------------------------------

    def capacity(self, source: str) -> int:
        """Bytes per second that a source gives all nodes together, as far as was seen; 0: it was never measured.

        The median of what several nodes had of it at once, as single sums are taken from rates of different moments.
        """
        seen = self.sums.get(source)
        return max(median_low(seen) if seen else 0, self.best.get(source, 0))

    def remaining(self, artifact: str, node_id: str, at_ms: int) -> int:
        """Bytes that are still to come to a node which fetches it or is expected to. `at_ms`: see `came_on`."""
        fact, node = self.holders.get(artifact, {}).get(node_id), self.nodes.get(node_id)
        if fact is not None and node is not None:
            return max(0, fact.bytes_left - came_on(node, coming(node, fact), at_ms)) if fact.fetching else 0
        return node.expected.get(artifact, 0) if node is not None else 0

    def under_way_to(self, node_id: str) -> tuple[int, int, int]:
        """Bytes that were still to come when the node told it last, at how many a second, and bytes only expected."""
        node = self.nodes.get(node_id)
        if node is None:
            return 0, 0, 0
        facts = [self.holders[artifact][node_id] for artifact in node.fetching]
        return sum(x.bytes_left for x in facts), sum(coming(node, x) for x in facts), sum(node.expected.values())


def time_step(now_s: float) -> int:
    """Monotonic milliseconds, rounded down to TIME_STEP_MS."""
    return int(now_s * _MS) // TIME_STEP_MS * TIME_STEP_MS


def came_on(node: CacheNodeFacts, rate: int, at_ms: int) -> int:
    """Bytes that have come at this rate from what the node told last until `at_ms` (monotonic)."""
    return rate * min(max(0, at_ms - node.told_ms), CAME_ON_MS_MAX) // _MS


def coming(node: CacheNodeFacts, fact: CachedFact) -> int:
    """Bytes per second of a fetch; one that has just begun gets its share of what its node had of its best source."""
    if fact.rate_bytes_s:
        return fact.rate_bytes_s
    usual = max((rate for source, rate in node.rates.items() if source != "disk"), default=0)
    return usual // max(len(node.fetching), 1)


__all__ = ["CAME_ON_MS_MAX", "TIME_STEP_MS", "CacheFacts", "CacheNodeFacts", "coming", "time_step"]
