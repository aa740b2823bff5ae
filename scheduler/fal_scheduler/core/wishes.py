"""Which nodes a wish means at this moment. Pure and deterministic: equal facts give equal sets on every leader.

"pool/P" and "node/N" mean exactly those nodes, full disks and silent ones too: their caches say what holds them up.
"replicas" means so many nodes, chosen to move as little as possible: those that have it, then those that have most of
it, then those chosen before; only then new ones, spread over failure domains, by room (in powers of two, so that a
choice does not swing with every file), ties by a hash of artifact and node. A cordoned or silent node keeps what it
has and counts, but is not chosen anew. Expired wishes and models that are not REGISTERED or ATTESTED mean nothing.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from fal_scheduler.core.records import Model, ModelState, Wish
from fal_scheduler.core.residency import Holding

_STAGED = frozenset({ModelState.REGISTERED, ModelState.ATTESTED})


@dataclass(frozen=True, slots=True)
class WishNode:
    """A node as a wish sees it. `open`: healthy and not cordoned. `alive`: known not to be lost or revoked."""

    id: str
    pool: str
    domain: str
    open: bool = True
    alive: bool = True
    room_bytes: int = 0  # that artifacts may still take, counting what may be evicted

    @property
    def room_class(self) -> int:
        """Coarse: a power of two."""
        return max(self.room_bytes, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Wanted:
    """One artifact that should be on a node. `expires_at_s`: Unix seconds, 0: until it is taken back."""

    model: str
    artifact_id: str
    tier: str
    expires_at_s: float


class WishNodes:
    """All nodes, arranged once for many wishes.

    `settled`: False while a new leader has not heard all caches; until then no node is chosen for a replica that may
    well exist on a node that is about to say so.
    """

    def __init__(self, nodes: Iterable[WishNode], *, settled: bool = True) -> None:
        self.settled = settled
        self.by_id: dict[str, WishNode] = {node.id: node for node in sorted(nodes, key=lambda x: x.id)}
        self.by_pool: dict[str, list[str]] = {}
        for node in self.by_id.values():
            if node.alive:
                self.by_pool.setdefault(node.pool, []).append(node.id)


def meant(
    wish: Wish, model: Model, nodes: WishNodes, holders: Mapping[str, Holding], before: Set[str] = frozenset()
) -> tuple[str, ...]:
    """Node ids of one wish that has not expired, in order. `before`: those it meant last."""
    if model.state not in _STAGED:
        return ()
    kind, _, name = wish.target.partition("/")
    if kind == "pool":
        return tuple(nodes.by_pool.get(name, ()))
    if kind == "node":
        node = nodes.by_id.get(name)
        return (name,) if node is not None and node.alive else ()
    return tuple(sorted(_replicas(wish.replicas, model, nodes, holders, before)))


def _replicas(
    count: int, model: Model, nodes: WishNodes, holders: Mapping[str, Holding], before: Set[str]
) -> list[str]:
    """Greedy: holders by how much they hold, then those chosen before, then new ones where fewest are."""
    keep = [i for i in {*holders, *before} if (node := nodes.by_id.get(i)) is not None and node.alive]
    keep = [i for i in keep if _has_any(holders.get(i)) or nodes.by_id[i].open]
    keep.sort(key=lambda i: (*_held(holders.get(i)), i not in before, _draw(model.artifact_id, i)))
    chosen = [i for i in keep if _has_any(holders.get(i)) or i in before][:count]
    if len(chosen) < count and nodes.settled:
        chosen += _fresh(count - len(chosen), chosen, model, nodes)
    return chosen


def _has_any(holding: Holding | None) -> bool:
    return holding is not None and (holding.complete or holding.wanted or holding.bytes_disk > 0)


def _held(holding: Holding | None) -> tuple[bool, int]:
    """Sorts before what holds less."""
    if holding is None:
        return True, 0
    return not holding.complete, -holding.bytes_disk


def _fresh(count: int, chosen: list[str], model: Model, nodes: WishNodes) -> list[str]:
    """New nodes: the domain with the fewest of them first, in it the roomiest."""
    taken = set(chosen)
    queues: dict[str, list[tuple[bool, int, str, str]]] = {}
    for node in nodes.by_id.values():
        if node.open and node.alive and node.id not in taken:
            fits = node.room_bytes >= model.bytes
            key = (not fits, -node.room_class, _draw(model.artifact_id, node.id), node.id)
            queues.setdefault(node.domain, []).append(key)
    per_domain = Counter(nodes.by_id[i].domain for i in chosen)
    for queue in queues.values():
        heapq.heapify(queue)
    heads = [(queue[0][0], per_domain[domain], *queue[0][1:3], domain) for domain, queue in queues.items()]
    heapq.heapify(heads)
    found: list[str] = []
    while heads and len(found) < count:
        domain = heapq.heappop(heads)[-1]
        queue = queues[domain]
        found.append(heapq.heappop(queue)[-1])
        per_domain[domain] += 1
        if queue:
            heapq.heappush(heads, (queue[0][0], per_domain[domain], *queue[0][1:3], domain))
    return found


def _draw(artifact_id: str, node_id: str) -> str:
    return hashlib.blake2b(f"{artifact_id} {node_id}".encode(), digest_size=8).hexdigest()


def wanted_of(wishes: Iterable[Wish], model: Model, now_s: float) -> list[Wish]:
    """Wishes of one model that hold now (`now_s`: wall clock)."""
    return [wish for wish in wishes if not wish.ended(now_s)] if model.state in _STAGED else []


def merge(one: Wanted, other: Wanted) -> Wanted:
    """Two wishes for one artifact on one node: the hotter tier, the longer life."""
    tier = "memory" if "memory" in (one.tier, other.tier) else "disk"
    ends = (one.expires_at_s, other.expires_at_s)
    return Wanted(min(one.model, other.model), one.artifact_id, tier, 0.0 if 0.0 in ends else max(ends))


__all__ = ["Wanted", "WishNode", "WishNodes", "meant", "merge", "wanted_of"]
