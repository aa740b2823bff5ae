"""Keep-warm by value across memory and disk, and staging ahead of need: what caches are told by no operator's word.

Every WARM_LOOK_S: which artifacts each cache should keep in memory (`core.warm_tiers`, by what `core.warm_worth` says
they are worth there), and which a forecast wants on a node's disk before their app is asked for. Both go down as
wishes that no store keeps, beside operators' wishes, which come first: what they lock counts against the memory. Every
VALUES_EVERY_S each cache is told what its artifacts are worth on disk, for its eviction.

A new leader takes over what a cache keeps because of a wish that no operator made, and takes nothing of it away in
its first 300 s. Made by `CacheSessions`; changes no State: placement hears of the outcome by what caches tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fal_contract.clock import Clock
from fal_contract.limits import FAILOVER_GRACE_S, VALUES_EVERY_S, WARM_LOOK_S
from fal_contract.v1 import weights_pb2
from fal_scheduler.cache_wishes import WishKeeper
from fal_scheduler.core.place import Placer
from fal_scheduler.core.ready_columns import Columns
from fal_scheduler.core.ready_needs import artifact_of
from fal_scheduler.core.records import Model
from fal_scheduler.core.residency import CacheNode, ResidencyTable
from fal_scheduler.core.state import State
from fal_scheduler.core.warm_tiers import Ahead, Keepable, chosen, room_for
from fal_scheduler.core.warm_worth import (
    Asked,
    MemoryWorth,
    Suited,
    artifact_values,
    asked_for,
    rates_of,
    suited_nodes,
)
from fal_scheduler.core.wishes import Wanted

WISH_OWNER: Final = "wish"  # of a cache's pin
NODES_A_TURN: Final = 64  # of the event loop
Rates = dict[str, tuple[Model, int]]  # by artifact: arrivals of the apps that use it


@dataclass(slots=True)
class _Warm:
    """One node. `memory`: artifacts kept there, in order of value; `values`: what its cache was told, and when."""

    memory: dict[str, None] = field(default_factory=dict)
    ahead: Ahead = field(default_factory=Ahead)
    values: dict[str, int] | None = None


class Warmth:
    """See the module. One for all caches of one leader. `push(node_id, message)`: False without a session."""

    def __init__(
        self,
        table: ResidencyTable,
        view: Callable[[], State],
        wishes: WishKeeper,
        *,
        clock: Clock,
        push: Callable[[str, weights_pb2.CacheDown], bool],
    ) -> None:
        self._table = table
        self._view = view
        self._wishes = wishes
        self._clock = clock
        self._push = push
        self._nodes: dict[str, _Warm] = {}
        self._columns = Columns(view())  # of our own: what placement keeps in mind of its own is not pushed out
        self._values_at_s = clock.monotonic_s()

    def session_began(self, node_id: str) -> None:
        """It is told all values anew; in a leader's first time what it keeps by a wish that nobody made is kept on."""
        node, state = self._table.node(node_id), self._view()
        warm = self._nodes.get(node_id)
        if warm is not None:
            warm.values = None
        if node is None or not self._new(state):
            return
        warm = warm or self._nodes.setdefault(node_id, _Warm())
        wished, until_s = self._wishes.wished_on(node_id), self._clock.wall_s() + FAILOVER_GRACE_S
        for artifact, holding in sorted(node.holdings.items()):
            if WISH_OWNER not in holding.pinned_by or artifact in wished or _model(state, artifact) is None:
                continue
            if holding.bytes_memory:
                warm.memory[artifact] = None
            elif artifact not in warm.ahead.until_s:
                warm.ahead.hold(artifact, holding.bytes, until_s)
        self._tell(state, node_id, warm)

    def _new(self, state: State) -> bool:
        """Whether this leader may not know yet what is asked for; also where it began without a runner."""
        return self._clock.monotonic_s() - state.term_began_s < FAILOVER_GRACE_S

    async def run(self) -> None:
        """Look again and again, until cancelled; one app or some nodes in a turn of the loop."""
        while True:
            await asyncio.sleep(WARM_LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Work everything out anew and tell what is another."""
        state = self._view()
        if not state.settled:
            return
        if self._columns.state is not state:
            self._columns = Columns(state)
        wall_s = self._clock.wall_s()
        asked = asked_for(state, wall_s)
        rates = rates_of(asked)
        kept = {node_id: list(warm.memory) for node_id, warm in self._nodes.items() if warm.memory}
        worth, placer = MemoryWorth(kept), Placer(state.fleet)
        for one in asked:
            if one.app_id in state.apps:
                suited = suited_nodes(state, placer, one, wall_s)
                worth.add(self._columns.fresh(), one, suited)
                self._stage_ahead(state, one, suited, rates, wall_s)
            await asyncio.sleep(0)
        for count, node_id in enumerate(sorted({*worth.found, *self._nodes}), start=1):
            self._settle(state, node_id, worth.found.get(node_id, {}), wall_s)
            if count % NODES_A_TURN == 0:
                await asyncio.sleep(0)
        if self._clock.monotonic_s() - self._values_at_s >= VALUES_EVERY_S:
            self._values_at_s = self._clock.monotonic_s()
            await self._tell_values(rates)

    def _stage_ahead(self, state: State, one: Asked, suited: Suited, rates: Rates, wall_s: float) -> None:
        """What the forecast wants on the best nodes and is neither there nor on its way, within each node's budget."""
        for node_id in suited.node_ids[: suited.copies]:
            node = self._table.node(node_id)
            if node is None or node.stale:
                continue
            wished = self._wishes.wished_on(node_id)
            warm = self._nodes.setdefault(node_id, _Warm())
            for model in one.models:
                artifact = artifact_of(model)
                fact = state.cache_facts.holders.get(artifact, {}).get(node_id)
                lacks = fact is None or not (fact.ready or fact.fetching)
                if artifact in wished:
                    continue
                if artifact in warm.ahead.until_s or (lacks and _room_for(node, model, rates)):
                    warm.ahead.want(artifact, model.bytes, wall_s, node.room.disk_bytes_max)

    def _settle(self, state: State, node_id: str, found: dict[str, Keepable], wall_s: float) -> None:
        warm, node = self._nodes.setdefault(node_id, _Warm()), self._table.node(node_id)
        if node is None:
            self._nodes.pop(node_id)
            self._wishes.set_automatic(node_id, {})
            return
        wished = self._wishes.wished_on(node_id)
        hold = self._new(state)
        if hold:
            found = {**self._held(state, warm, node), **found}
        free = [one for one in found.values() if wished.get(one.artifact) != "memory"]
        keep = chosen(free, _memory_budget(node, warm, wished), warm.memory, hold=hold)
        warm.memory = dict.fromkeys(keep)
        warm.ahead.expire(wall_s)
        self._tell(state, node_id, warm)

    def _held(self, state: State, warm: _Warm, node: CacheNode) -> dict[str, Keepable]:
        """What is kept already, though nobody has asked for it since this leader began."""
        have = {artifact: node.holdings.get(artifact) for artifact in warm.memory}
        return {id_: Keepable(id_, one.bytes, 0) for id_, one in have.items() if one is not None and _model(state, id_)}

    def _tell(self, state: State, node_id: str, warm: _Warm) -> None:
        wanted: dict[str, Wanted] = {}
        for artifact in warm.memory:
            if (model := _model(state, artifact)) is not None:
                wanted[model.id] = Wanted(model.id, artifact, "memory", 0.0)
        for artifact, until_s in warm.ahead.until_s.items():
            model = _model(state, artifact)
            if model is not None and model.id not in wanted:
                wanted[model.id] = Wanted(model.id, artifact, "disk", until_s)
        self._wishes.set_automatic(node_id, wanted)

    async def _tell_values(self, rates: Rates) -> None:
        """To every cache what its artifacts are worth, where that is another than it was told."""
        by_node: dict[str, dict[str, int]] = {node.node_id: {} for node in self._table.nodes() if not node.stale}
        for artifact, (model, rate) in rates.items():
            for node_id, worth in artifact_values(self._columns.fresh(), model, rate).items():
                if node_id in by_node:
                    by_node[node_id][artifact] = worth
            await asyncio.sleep(0)
        for count, (node_id, values) in enumerate(by_node.items(), start=1):
            if count % NODES_A_TURN == 0:
                await asyncio.sleep(0)
            warm = self._nodes.setdefault(node_id, _Warm())
            if values == warm.values or (warm.values is None and not values):
                continue
            if self._push(node_id, weights_pb2.CacheDown(values=weights_pb2.ArtifactValues(values=values))):
                warm.values = values

    def statistics(self) -> dict[str, int]:
        """What is kept in memory and staged ahead by itself, on all nodes."""
        return {
            "warm_memory": sum(len(one.memory) for one in self._nodes.values()),
            "warm_ahead": sum(len(one.ahead.until_s) for one in self._nodes.values()),
        }


def _model(state: State, artifact: str) -> Model | None:
    names = state.models_by_artifact.get(artifact) or state.models_by_digest.get(artifact)
    return state.models[names[0]] if names else None


def _room_for(node: CacheNode, model: Model, rates: Rates) -> bool:
    free = node.room.disk_bytes_max - node.room.disk_bytes_used
    evictable = [one for one in node.holdings.values() if not one.pinned_by and not one.wanted]
    others = [(one.bytes_disk, rates[id_][1] if (id_ := one.artifact_id) in rates else 0) for one in evictable]
    return room_for(model.bytes, rates[artifact_of(model)][1], free, others)


def _memory_budget(node: CacheNode, warm: _Warm, wished: dict[str, str]) -> int:
    """Bytes that may be locked for what we choose: not what operators wish there, nor what runners asked for."""
    others = 0
    for artifact, holding in node.holdings.items():
        if wished.get(artifact) == "memory":
            others += holding.bytes
        elif artifact not in warm.memory:
            others += holding.bytes_memory
    return max(0, node.room.memory_bytes_max - others)


__all__ = ["Warmth"]
