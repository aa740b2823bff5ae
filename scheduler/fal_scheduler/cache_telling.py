"""Tells the core what weight caches told, as far as placement looks at it: rounded, coalesced, bounded.

An event a node and second at most, the first at once; progress in steps of a twentieth or 256 MiB, rates to about a
tenth: so that the log of what decisions rest on stays small. A fetch that begins or ends, and what comes or goes, does
not wait for the second where the node has told little of late: a placement right after it must know. What was told
last is read in the core's own facts, so nothing is kept here but which artifacts of which nodes are due. Made by
`CacheSessions`; must not decide anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fal_contract.clock import Clock
from fal_contract.limits import CACHE_FACTS_PER_NODE_MAX
from fal_scheduler.core.cache_events import CachedFact, CacheTold
from fal_scheduler.core.residency import CacheNode, Holding, ResidencyTable
from fal_scheduler.core.state import State

TELL_EVERY_S: Final = 1.0
TURN_EVERY_S: Final = 0.1  # of what turned …
TURNS_AHEAD_MAX: Final = 32  # … so many of one node at once, and then
TURN_COSTS_S: Final = 0.5  # … two a second
PROGRESS_PERC: Final = 5
PROGRESS_BYTES: Final = 256 << 20
_RATE_BITS: Final = 4  # of a rate that are kept: steps of 6 to 12 percent


@dataclass(slots=True)
class _Due:
    """What a node's next event is about. Dicts without values are ordered sets.

    `turns_s`: when the events that did not wait for their second will be outweighed.
    """

    artifacts: dict[str, None] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    told_at_s: float = float("-inf")
    turns_s: float = float("-inf")


class CacheTelling:
    """See the module. One for all caches of one leader."""

    def __init__(
        self, table: ResidencyTable, view: Callable[[], State], offer: Callable[[CacheTold], None], clock: Clock
    ) -> None:
        self._table = table
        self._view = view
        self._offer = offer
        self._clock = clock
        self._due: dict[str, _Due] = {}
        self.told = 0

    def hello(self, node_id: str) -> None:
        """A session began: everything that the node has, those on their way first, then the largest."""
        node = self._table.node(node_id)
        if node is None:
            return
        first = sorted(node.holdings.values(), key=lambda one: (not one.fetching, -one.bytes, one.artifact_id))
        put = {one.artifact_id: fact_of(one) for one in first[:CACHE_FACTS_PER_NODE_MAX]}
        due = self._due.setdefault(node_id, _Due())
        due.artifacts.clear()
        rates = {source: rounded(rate) for source, rate in node.rates.items()}
        self._send(due, CacheTold(node_id, self._now_s(), put, rates=rates, fed_bytes_s=_fed(node), whole=True))

    def report(self, node_id: str, artifacts: Iterable[str], sources: Iterable[str]) -> None:
        """Something was told of these; what matters of it goes on now, or when the node's second is over."""
        due = self._due.setdefault(node_id, _Due())
        due.artifacts.update(dict.fromkeys(artifacts))
        due.sources.update(dict.fromkeys(sources))
        now_s, loop = self._now_s(), asyncio.get_running_loop()
        wait_s = due.told_at_s + TELL_EVERY_S - now_s
        soon_s = max(0.0, due.told_at_s + TURN_EVERY_S - now_s)
        early = due.timer is not None and due.timer.when() <= loop.time() + soon_s
        few = due.turns_s <= now_s + (TURNS_AHEAD_MAX - 1) * TURN_COSTS_S
        if wait_s > soon_s and few and not early and self._turned(node_id, due.artifacts):
            due.turns_s = max(due.turns_s, now_s) + TURN_COSTS_S
            wait_s = soon_s
            if due.timer is not None:
                due.timer.cancel()
                due.timer = None
        if due.timer is None:
            if wait_s <= 0:
                self._tell(node_id)
            else:
                due.timer = loop.call_later(wait_s, self._tell, node_id)

    def _turned(self, node_id: str, artifacts: Iterable[str]) -> bool:
        """Whether one of these came, went, began or ceased to be fetched, or became ready."""
        node, facts = self._table.node(node_id), self._view().cache_facts
        for artifact in artifacts:
            holding = node.holdings.get(artifact) if node is not None else None
            last = facts.holders.get(artifact, {}).get(node_id)
            if (holding is None) != (last is None):
                return True
            if holding is not None and last is not None and (holding.ready, holding.fetching) != _state(last):
                return True
        return False

    def left(self, node_id: str) -> None:
        """A node's cache is forgotten."""
        due = self._due.pop(node_id, None)
        if due is not None and due.timer is not None:
            due.timer.cancel()
        if due is not None or node_id in self._view().cache_facts.nodes:
            self._offer(CacheTold(node_id, self._now_s(), left=True))

    def close(self) -> None:
        """Nothing is told any more."""
        for due in self._due.values():
            if due.timer is not None:
                due.timer.cancel()
        self._due.clear()

    def _tell(self, node_id: str) -> None:
        due, node = self._due[node_id], self._table.node(node_id)
        due.timer = None
        if node is None:
            return
        facts = self._view().cache_facts
        known = facts.nodes.get(node_id)
        held: Mapping[str, None] = known.held if known is not None else {}
        put: dict[str, CachedFact] = {}
        gone: list[str] = []
        for artifact in due.artifacts:
            holding, last = node.holdings.get(artifact), facts.holders.get(artifact, {}).get(node_id)
            if holding is None:
                gone += [artifact] if artifact in held else []
            elif matters(fact := fact_of(holding), last, holding.bytes) and (
                last is not None or len(held) + len(put) < CACHE_FACTS_PER_NODE_MAX
            ):
                put[artifact] = fact
        before = known.told if known is not None else {}
        rates = {one: rounded(node.rates[one]) for one in due.sources if one in node.rates}
        rates = {one: rate for one, rate in rates.items() if before.get(one) != rate}
        due.artifacts.clear()
        due.sources.clear()
        fed = _fed(node)
        if put or gone or rates or fed != (known.fed_bytes_s if known is not None else 0):
            self._send(due, CacheTold(node_id, self._now_s(), put, tuple(gone), rates, fed))

    def _send(self, due: _Due, event: CacheTold) -> None:
        due.told_at_s = event.arrived_s
        self.told += 1
        self._offer(event)

    def _now_s(self) -> float:
        return self._clock.monotonic_s()


def fact_of(holding: Holding) -> CachedFact:
    """What placement looks at of a holding."""
    fetching = holding.fetching
    return CachedFact(
        holding.bytes_disk,
        holding.bytes_memory,
        holding.ready,
        fetching,
        max(0, holding.bytes - holding.bytes_disk) if fetching else 0,
        rounded(holding.rate_bytes_s) if fetching else 0,
    )


def matters(fact: CachedFact, last: CachedFact | None, size: int) -> bool:
    """Whether a fact differs from the last one by enough to be told."""
    if last is None or _state(fact) != _state(last):
        return True
    step = min(max(size * PROGRESS_PERC // 100, 1), PROGRESS_BYTES)
    moved = max(abs(fact.bytes_here - last.bytes_here), abs(fact.bytes_memory - last.bytes_memory))
    return moved >= step or fact.rate_bytes_s != last.rate_bytes_s


def _state(fact: CachedFact) -> tuple[bool, bool]:
    return fact.ready, fact.fetching


def rounded(rate: int) -> int:
    """A rate to its first four bits."""
    shift = max(0, rate.bit_length() - _RATE_BITS)
    return (rate + (1 << shift >> 1)) >> shift << shift


def _fed(node: CacheNode) -> int:
    return rounded(node.fed_bytes_s)


__all__ = [
    "TELL_EVERY_S", "TURNS_AHEAD_MAX", "TURN_COSTS_S", "TURN_EVERY_S", "CacheTelling", "fact_of", "matters", "rounded",
]  # fmt: skip
