"""Which node has how much of which artifact, and how fast bytes reach it: as nodes' caches tell it, never stored.

Pure. Leader-local: a new leader hears all of it again with each CacheHello. Losing contact is not losing the bytes: a
node whose session ended counts on, marked as stale, for `STALE_KEPT_S`, and is forgotten then. Updates are O(1) for
each artifact that is told; counters are kept, never counted. Memory is bounded: a holding costs about 0.4 kB, a node
has at most CACHED_ARTIFACTS_PER_NODE_MAX, all nodes together at most CACHED_ARTIFACTS_MAX.

Invariant: `holders(a)[n] is node(n).holdings[a]`, and `counts(a)` is their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from sys import intern
from types import MappingProxyType
from typing import Final

from fal_contract.limits import CACHE_RATES_PER_NODE_MAX, CACHED_ARTIFACTS_MAX, CACHED_ARTIFACTS_PER_NODE_MAX
from fal_scheduler.core.told import Endpoint

STALE_KEPT_S: Final = 60.0
_NOBODY: Final[Mapping[str, Holding]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Holding:
    """An artifact on a node, as told last; the fields are the wire's (CachedArtifact). Bytes, bytes per second."""

    artifact_id: str
    bytes: int
    bytes_disk: int = 0
    bytes_memory: int = 0
    ready: bool = False
    wanted: bool = False
    manifest_digest: str = ""
    model: str = ""
    kind: str = ""
    rate_bytes_s: int = 0
    bytes_from_origin: int = 0
    bytes_from_peers: int = 0
    waits_for: str = ""
    pinned_by: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every byte is there, attested or not: nothing more is fetched."""
        return self.ready or 0 < self.bytes <= self.bytes_disk

    @property
    def fetching(self) -> bool:
        """Whether bytes are on their way."""
        return self.wanted and not self.complete

    @property
    def staging(self) -> bool:
        """Whether it is on its way to READY."""
        return self.wanted and not self.ready


@dataclass(frozen=True, slots=True)
class Room:
    """What a cache may take and has taken, in bytes."""

    disk_bytes_max: int = 0
    disk_bytes_used: int = 0
    memory_bytes_max: int = 0
    memory_bytes_used: int = 0


@dataclass(slots=True)
class CacheNode:
    """What a node's cache told. `left_at_s`: monotonic moment at which its session ended, None while it is up."""

    node_id: str
    endpoints: tuple[Endpoint, ...] = ()
    holdings: dict[str, Holding] = field(default_factory=dict)
    rates: dict[str, int] = field(default_factory=dict)
    unreachable: frozenset[str] = frozenset()
    room: Room = Room()
    capabilities: Mapping[str, str] = field(default_factory=dict)
    manifests: frozenset[str] = frozenset()
    left_at_s: float | None = None
    refused: int = 0  # artifacts that were told beyond the bounds
    fetching: dict[str, None] = field(default_factory=dict)  # artifacts that are wanted and not complete
    fed_bytes_s: int = 0  # the most that all its fetches together were measured at

    @property
    def stale(self) -> bool:
        """Whether its session has ended."""
        return self.left_at_s is not None


@dataclass(frozen=True, slots=True)
class Counts:
    """Nodes that have all of an artifact READY, nodes to which it is on its way, bytes that they read at the origin."""

    nodes_ready: int = 0
    nodes_staging: int = 0
    bytes_from_origin: int = 0


@dataclass(slots=True)
class Changed:
    """What an update means for others. Dicts without values are ordered sets.

    `members`: artifacts of which a node became or ceased to be a holder, or began or ceased to fetch.
    `copies`: nodes for whom the set of last copies may be another.
    """

    members: dict[str, None] = field(default_factory=dict)
    copies: dict[str, None] = field(default_factory=dict)
    reach: bool = False  # the node's endpoints are others, or it reaches an origin now or no more
    unreached: dict[str, None] = field(default_factory=dict)  # nodes that it reaches now, or reaches no more


class _Total:
    __slots__ = ("holders", "origin", "ready", "staging")

    def __init__(self) -> None:
        self.holders: dict[str, Holding] = {}
        self.ready: dict[str, None] = {}
        self.staging = 0
        self.origin = 0


class ResidencyTable:
    """All nodes and artifacts of one leader."""

    def __init__(self) -> None:
        self._nodes: dict[str, CacheNode] = {}
        self._totals: dict[str, _Total] = {}
        self._unreached: dict[str, set[str]] = {}  # node -> those that told that they cannot reach it
        self._size = 0

    # --- told -------------------------------------------------------------------------------------------------------

    def hello(
        self,
        node_id: str,
        holdings: Iterable[Holding],
        *,
        endpoints: Iterable[Endpoint] = (),
        room: Room = Room(),
        capabilities: Mapping[str, str] | None = None,
        manifests: Iterable[str] = (),
    ) -> Changed:
        """A session begins with everything that the node has; what it had before and does not tell is gone."""
        node_id = intern(node_id)
        changed = Changed()
        known = self._nodes.get(node_id)
        told = tuple(endpoints)
        changed.reach = known is None or known.endpoints != told
        told = known.endpoints if known is not None and not changed.reach else told
        changed.unreached.update(dict.fromkeys(sorted(known.unreachable) if known else ()))
        node = known or CacheNode(node_id)
        self._nodes[node_id] = node
        node.endpoints, node.room, node.left_at_s = told, room, None
        node.capabilities = dict(capabilities or {})
        node.manifests, node.refused = frozenset(manifests), 0
        self._set_unreachable(node, frozenset())
        stays = {holding.artifact_id: holding for holding in holdings}
        for artifact_id in [i for i in node.holdings if i not in stays]:
            self._drop(node, artifact_id, changed)
        for holding in stays.values():
            self._put(node, holding, changed)
        return changed

    def report(
        self,
        node_id: str,
        *,
        holdings: Iterable[Holding] = (),
        gone: Iterable[str] = (),
        rates: Mapping[str, int] | None = None,
        unreachable: Iterable[str] | None = None,
        room: Room | None = None,
        capabilities: Mapping[str, str] | None = None,
    ) -> Changed:
        """What changed on a node that said hello. `rates`: bytes per second towards it, by source."""
        node, changed = self._nodes[node_id], Changed()
        for artifact_id in gone:
            self._drop(node, artifact_id, changed)
        for holding in holdings:
            self._put(node, holding, changed)
        for source, rate in (rates or {}).items():
            known = node.rates.pop(source, None)  # the newest go to the end, the oldest go first
            if source.startswith("origin:") and (known == 0) != (rate == 0):
                changed.reach = True
            node.rates[intern(source)] = rate
            if len(node.rates) > CACHE_RATES_PER_NODE_MAX:
                del node.rates[next(iter(node.rates))]
        if unreachable is not None:
            peers = frozenset(intern(peer) for peer in unreachable)
            changed.unreached.update(dict.fromkeys(sorted(peers ^ node.unreachable)))
            self._set_unreachable(node, peers)
        if room is not None:
            node.room = room
        if capabilities is not None:
            node.capabilities = dict(capabilities)
        return changed

    def left(self, node_id: str, now_s: float) -> None:
        """Its session ended; what it told stands for a while."""
        node = self._nodes.get(node_id)
        if node is not None:
            node.left_at_s = now_s

    def expire(self, now_s: float) -> list[tuple[str, Changed]]:
        """Forget nodes that stayed away, and what that means for others; call it every few seconds."""
        gone = [x for x in self._nodes.values() if x.left_at_s is not None and now_s - x.left_at_s > STALE_KEPT_S]
        forgotten = []
        for node in gone:
            changed = Changed()
            self._forget(node, changed)
            forgotten.append((node.node_id, changed))
        return forgotten

    def forget(self, node_id: str) -> Changed:
        """A node is revoked: nothing of it counts any more."""
        changed = Changed()
        node = self._nodes.get(node_id)
        if node is not None:
            self._forget(node, changed)
        return changed

    def _forget(self, node: CacheNode, changed: Changed) -> None:
        for artifact_id in list(node.holdings):
            self._drop(node, artifact_id, changed)
        changed.unreached.update(dict.fromkeys(sorted(node.unreachable)))
        self._set_unreachable(node, frozenset())
        del self._nodes[node.node_id]

    def _set_unreachable(self, node: CacheNode, peers: frozenset[str]) -> None:
        for peer in node.unreachable - peers:
            self._unreached[peer].discard(node.node_id)
            if not self._unreached[peer]:
                del self._unreached[peer]
        for peer in peers - node.unreachable:
            self._unreached.setdefault(peer, set()).add(node.node_id)
        node.unreachable = peers

    def _put(self, node: CacheNode, holding: Holding, changed: Changed) -> None:
        artifact_id = holding.artifact_id
        before = node.holdings.get(artifact_id)
        if before is None and (
            len(node.holdings) >= CACHED_ARTIFACTS_PER_NODE_MAX or self._size >= CACHED_ARTIFACTS_MAX
        ):
            node.refused += 1
            return
        if before is not None and holding.bytes_from_origin < before.bytes_from_origin:
            # A cache that restarted counts from zero; what was read was read.
            holding = replace(holding, bytes_from_origin=before.bytes_from_origin)
        total = self._totals.get(artifact_id)
        if total is None:
            total = self._totals[artifact_id] = _Total()
        self._size += before is None
        node.holdings[artifact_id] = total.holders[node.node_id] = holding
        total.origin += holding.bytes_from_origin - (before.bytes_from_origin if before else 0)
        total.staging += holding.staging - (before is not None and before.staging)
        if holding.fetching:
            node.fetching[artifact_id] = None
            node.fed_bytes_s = max(node.fed_bytes_s, sum(node.holdings[i].rate_bytes_s for i in node.fetching))
        else:
            node.fetching.pop(artifact_id, None)
        if before is None or (before.complete, before.fetching) != (holding.complete, holding.fetching):
            changed.members[artifact_id] = None
        if holding.ready != (before is not None and before.ready):
            self._set_ready(total, node.node_id, holding.ready, changed)

    def _drop(self, node: CacheNode, artifact_id: str, changed: Changed) -> None:
        before = node.holdings.pop(artifact_id, None)
        if before is None:
            return
        node.fetching.pop(artifact_id, None)
        total = self._totals[artifact_id]
        del total.holders[node.node_id]
        self._size -= 1
        total.origin -= before.bytes_from_origin
        total.staging -= before.staging
        changed.members[artifact_id] = None
        if before.ready:
            self._set_ready(total, node.node_id, False, changed)
        if not total.holders:
            del self._totals[artifact_id]

    @staticmethod
    def _set_ready(total: _Total, node_id: str, ready: bool, changed: Changed) -> None:
        """Whoever is alone with a copy, before or after, must know."""
        changed.copies[node_id] = None
        if len(total.ready) == 1:
            changed.copies.update(total.ready)
        if ready:
            total.ready[node_id] = None
        else:
            total.ready.pop(node_id, None)
        if len(total.ready) == 1:
            changed.copies.update(total.ready)

    # --- asked ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._size

    def node(self, node_id: str) -> CacheNode | None:
        """What the node told; do not change it."""
        return self._nodes.get(node_id)

    def nodes(self) -> Iterator[CacheNode]:
        """All that are known, stale ones too."""
        return iter(self._nodes.values())

    def holders(self, artifact_id: str) -> Mapping[str, Holding]:
        """Who has some of it, by node id; do not keep it."""
        total = self._totals.get(artifact_id)
        return total.holders if total is not None else _NOBODY

    def unreached_by(self, node_id: str) -> frozenset[str]:
        """Nodes that tried to connect to it and cannot."""
        return frozenset(self._unreached.get(node_id, ()))

    def counts(self, artifact_id: str) -> Counts:
        """For operators."""
        total = self._totals.get(artifact_id)
        return Counts(len(total.ready), total.staging, total.origin) if total is not None else Counts()

    def last_copies(self, node_id: str) -> list[str]:
        """Artifacts that nobody else has READY, in order."""
        node = self._nodes.get(node_id)
        if node is None:
            return []
        return sorted(i for i, x in node.holdings.items() if x.ready and len(self._totals[i].ready) == 1)


__all__ = ["STALE_KEPT_S", "CacheNode", "Changed", "Counts", "Holding", "ResidencyTable", "Room"]
