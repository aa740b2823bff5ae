"""Swarms as their members are told them: who is a neighbour, where to dial it, with which ticket.

A swarm is kept only while some node fetches the artifact; its members are all nodes that have some of it. Changes are
taken in at once for the first, then once a window that grows with the swarm, at most CHANGES_AT_ONCE_MAX in one turn of
the loop; only nodes whose neighbours changed are told (`core.neighbours`). A node that fetches is told all neighbours.
One that fetches nothing waits to be dialled; it is told of its fetching neighbours once one of them cannot dial it.

Must not talk to nodes itself: `tell` says that a node's word is due, `message` builds it when the node takes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

from fal_contract.clock import Clock
from fal_contract.limits import SWARM_WINDOW_S
from fal_contract.origin_source import origin_source
from fal_contract.ticket import TICKET_TTL_S
from fal_contract.v1 import agent_pb2, weights_pb2
from fal_scheduler.core.artifact_standing import standing_of
from fal_scheduler.core.cache_paths import needs_tls, shared_endpoints
from fal_scheduler.core.neighbours import Neighbour, SwarmMember, SwarmView
from fal_scheduler.core.records import Pool
from fal_scheduler.core.residency import CacheNode, Changed, Holding, ResidencyTable
from fal_scheduler.core.state import State
from fal_scheduler.core.tickets import RENEW_AFTER_S, TicketOffice
from fal_scheduler.core.told import Endpoint

CHANGES_AT_ONCE_MAX: Final = 32
CARDS_MAX: Final = 50_000
MEMBERS_A_SECOND: Final = 2500  # a swarm of so many is told at most once in a second more
DRIFT: Final = 1.25  # a region that grew or shrank by this factor is told its size again
_UNREACHED_MIN: Final = 2  # of its own region: then a node's endpoints are held for wrong


@dataclass(slots=True)
class _Told:
    """What a node holds if all went well. `signature`: of what was told; `tickets`: by server, with their ends."""

    signature: int = 0
    tickets: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    expires_s: float = 0.0  # Unix seconds; of the first ticket that ends
    size: int = 0


@dataclass(slots=True)
class _Swarm:
    view: SwarmView
    pending: dict[str, bool] = field(
        default_factory=dict
    )  # node -> its neighbours must hear of it whatever the view says
    fetching: set[str] = field(default_factory=set)
    regions: set[str] = field(default_factory=set)  # of members, now or once
    announced: dict[str, int] = field(default_factory=dict)  # region -> its size as told last
    quiet_until_s: float = float("-inf")
    handle: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True)
class _Card:
    """A node as nodes of one pool are told it. `number`: a new one for each content."""

    number: int
    message: weights_pb2.SwarmMember
    endpoints: tuple[Endpoint, ...]
    here: Pool | None
    there: Pool | None


class Swarms:
    """All swarms of one leader. `tell(node_id, artifact_id)`: this node's `message` is due."""

    def __init__(
        self,
        table: ResidencyTable,
        view: Callable[[], State],
        office: TicketOffice,
        *,
        clock: Clock,
        tell: Callable[[str, str], None],
    ) -> None:
        self._table = table
        self._view = view
        self._office = office
        self._clock = clock
        self._tell = tell
        self._swarms: dict[str, _Swarm] = {}
        self._told: dict[str, dict[str, _Told]] = {}  # node -> artifact
        self._cards: dict[tuple[str, str], _Card] = {}  # (pool of who is told, node)
        self._card_number = 0
        self._revision = 0

    # --- what changes -----------------------------------------------------------------------------------------------

    def changed(self, node_id: str, changed: Changed) -> None:
        """The table took in what a node told."""
        for artifact_id in changed.members:
            self._note(artifact_id, node_id)
        if changed.reach:
            for artifact_id in self._swarms_of(node_id):
                self._note(artifact_id, node_id, moved=True)
        for peer in changed.unreached:
            for artifact_id in self._swarms_of(peer):
                self._note(artifact_id, peer, moved=True)
                if node_id in self._table.holders(artifact_id):
                    self._tell(peer, artifact_id)

    def session_began(self, node_id: str) -> None:
        """A new stream knows nothing: its node is told everything again."""
        self._told.pop(node_id, None)
        for artifact_id in self._swarms_of(node_id):
            self._tell(node_id, artifact_id)

    def model_changed(self, artifact_id: str) -> None:
        """It was registered, or must go."""
        if not self._staged(artifact_id):
            self._end(artifact_id)
            return
        for node_id, holding in self._table.holders(artifact_id).items():
            if holding.fetching:
                self._note(artifact_id, node_id)
                return  # the first brings all others

    def renew(self) -> None:
        """Tickets at half their life are made anew; call it about once a minute."""
        limit_s = self._clock.wall_s() + TICKET_TTL_S - RENEW_AFTER_S
        for node_id, artifacts in self._told.items():
            for artifact_id, told in artifacts.items():
                if told.tickets and told.expires_s < limit_s:
                    told.signature = 0
                    self._tell(node_id, artifact_id)

    def _swarms_of(self, node_id: str) -> list[str]:
        node = self._table.node(node_id)
        if node is None:
            return []
        if len(node.holdings) < len(self._swarms):
            return [artifact_id for artifact_id in node.holdings if artifact_id in self._swarms]
        return [artifact_id for artifact_id in self._swarms if artifact_id in node.holdings]

    def _staged(self, artifact_id: str) -> bool:
        return standing_of(self._view().catalog, artifact_id).model is not None

    def _note(self, artifact_id: str, node_id: str, *, moved: bool = False) -> None:
        swarm = self._swarms.get(artifact_id)
        if swarm is None:
            holders = self._table.holders(artifact_id)
            holding = holders.get(node_id)
            if holding is None or not holding.fetching or not self._staged(artifact_id):
                return
            swarm = self._swarms[artifact_id] = _Swarm(SwarmView(artifact_id))
            swarm.pending.update(dict.fromkeys(holders, False))
        swarm.pending[node_id] = moved or swarm.pending.get(node_id, False)
        self._schedule(artifact_id, swarm)

    def _schedule(self, artifact_id: str, swarm: _Swarm) -> None:
        if swarm.handle is None:
            loop = asyncio.get_running_loop()
            delay_s = max(0.0, swarm.quiet_until_s - loop.time())
            swarm.handle = loop.call_later(delay_s, self._flush, artifact_id)

    def _flush(self, artifact_id: str) -> None:
        """Take in what changed and say who must be told."""
        swarm = self._swarms[artifact_id]
        swarm.handle = None
        due: dict[str, None] = {}
        for node_id in list(islice(swarm.pending, CHANGES_AT_ONCE_MAX)):
            moved = swarm.pending.pop(node_id)
            due[node_id] = None
            due.update(dict.fromkeys(sorted(self._take(swarm, artifact_id, node_id))))
            if moved:
                due.update((one.node_id, None) for one in swarm.view.neighbours_of(node_id))
        due.update(dict.fromkeys(self._drifted(swarm)))
        if not swarm.pending:
            swarm.quiet_until_s = (
                asyncio.get_running_loop().time() + SWARM_WINDOW_S + len(swarm.view) / MEMBERS_A_SECOND
            )
            if not swarm.fetching:
                self._end(artifact_id)
                return
        else:
            self._schedule(artifact_id, swarm)
        for node_id in due:
            self._tell(node_id, artifact_id)

    def _take(self, swarm: _Swarm, artifact_id: str, node_id: str) -> frozenset[str]:
        """Bring one member up to date; nodes whose neighbours changed."""
        node, holding = self._table.node(node_id), self._table.holders(artifact_id).get(node_id)
        record = self._view().nodes.get(node_id)
        if node is None or holding is None or record is None or record.revoked:
            swarm.fetching.discard(node_id)
            self._told.get(node_id, {}).pop(artifact_id, None)
            if node is None:
                self._told.pop(node_id, None)
            return swarm.view.drop(node_id)
        (swarm.fetching.add if holding.fetching else swarm.fetching.discard)(node_id)
        pool = self._pool(node_id)
        member = SwarmMember(
            node_id=node_id,
            region=pool.region if pool is not None else "",
            zone=pool.domain if pool is not None else record.pool,
            pool=record.pool,
            complete=holding.complete,
            dialled=self._dialled(node),
            reaches_origin=self._reaches_origin(node, artifact_id),
        )
        known = swarm.view.member(node_id) if node_id in swarm.view else None
        swarm.regions.add(member.region)
        affected = swarm.view.put(member)
        # That somebody is complete its neighbours learn from itself; where nothing else changed they need no word.
        same = known is not None and replace(known, complete=member.complete) == member
        return frozenset() if same else affected

    def _drifted(self, swarm: _Swarm) -> list[str]:
        """Members of regions whose size is no longer about what was told."""
        drifted: dict[str, int] = {}
        for region in swarm.regions:
            size = swarm.view.region_members(region)
            if not size / DRIFT <= swarm.announced.get(region, 0) <= size * DRIFT:
                drifted[region] = size
        swarm.announced.update(drifted)
        return [i for i in sorted(swarm.fetching) if self._region(i) in drifted] if drifted else []

    def _end(self, artifact_id: str) -> None:
        swarm = self._swarms.pop(artifact_id, None)
        if swarm is None:
            return
        if swarm.handle is not None:
            swarm.handle.cancel()
        for node_id in (*self._table.holders(artifact_id), *swarm.pending):
            self._told.get(node_id, {}).pop(artifact_id, None)

    def close(self) -> None:
        """No timer is left behind."""
        for artifact_id in list(self._swarms):
            self._end(artifact_id)

    # --- what a node is told ----------------------------------------------------------------------------------------

    def message(self, node_id: str, artifact_id: str) -> weights_pb2.Swarm | None:
        """The node's neighbours now; None when it knows them already."""
        swarm, node = self._swarms.get(artifact_id), self._table.node(node_id)
        holding = self._table.holders(artifact_id).get(node_id)
        if swarm is None or node is None or holding is None or node_id not in swarm.view:
            return None
        told = self._told.setdefault(node_id, {}).setdefault(artifact_id, _Told())
        others = self._beside(swarm, node, holding, artifact_id, told)
        if not others and not told.tickets and not holding.fetching:
            return None  # one that fetches alone is told, too: that it is the one that reads the origin
        here, size = self._pool(node_id), swarm.view.region_members(self._region(node_id))
        seed = node_id in swarm.view.seeds
        shown = [self._card(here, other) for other, _ in others]
        signature = hash(
            (seed, tuple((card.number, as_seed) for card, (_, as_seed) in zip(shown, others, strict=True)))
        )
        if signature == told.signature and size / DRIFT <= told.size <= size * DRIFT:
            return None
        wall_s = self._clock.wall_s()
        members = [
            self._member(card, node_id, other.node_id, as_seed, told, artifact_id, wall_s)
            for card, (other, as_seed) in zip(shown, others, strict=True)
        ]
        told.signature, told.size = signature, size
        told.tickets = {one.node_id: (one.ticket, one.ticket_expires_s) for one in members}
        told.expires_s = min((one.ticket_expires_s for one in members), default=0.0)
        self._revision += 1
        return weights_pb2.Swarm(
            artifact_id=artifact_id,
            revision=(self._view().term << 32) + self._revision,
            members=members,
            seed=seed,
            region_members=size,
        )

    def _beside(
        self, swarm: _Swarm, node: CacheNode, holding: Holding, artifact_id: str, told: _Told
    ) -> list[tuple[CacheNode, bool]]:
        """Neighbours that a node is told, and which are seeds. One that fetches nothing keeps what it was told, as
        long as nobody new needs its call."""
        holders = self._table.holders(artifact_id)
        beside = [
            (other, neighbour.seed)
            for neighbour in swarm.view.neighbours_of(node.node_id)
            if neighbour.node_id in holders and (other := self._table.node(neighbour.node_id)) is not None
        ]
        if holding.fetching:
            return beside
        fetching = [(other, seed) for other, seed in beside if holders[other.node_id].fetching]
        calls = [other for other, _ in fetching if not self._dials(other, node) and other.endpoints]
        if told.signature and all(other.node_id in told.tickets for other in calls):
            return [(other, seed) for other, seed in beside if other.node_id in told.tickets]
        if not calls:
            told.tickets = {}  # nothing to be renewed
            return []
        return fetching

    def _member(
        self, card: _Card, caller: str, server: str, seed: bool, told: _Told, artifact_id: str, wall_s: float
    ) -> weights_pb2.SwarmMember:
        ticket, expires_s = told.tickets.get(server, (b"", 0.0))
        if expires_s - wall_s < RENEW_AFTER_S or expires_s - wall_s > TICKET_TTL_S:
            expires_s = float(int(wall_s + TICKET_TTL_S))
            ticket = self._office.ticket(
                server=server, caller=caller, artifact_id=artifact_id, expires_s=expires_s, wall_s=wall_s
            )
        member = weights_pb2.SwarmMember(seed=seed, ticket=ticket, ticket_expires_s=expires_s)
        member.MergeFrom(card.message)
        member.complete = self._table.holders(artifact_id)[server].complete
        return member

    def _card(self, here: Pool | None, other: CacheNode) -> _Card:
        """What nodes of one pool are told of a node, in every swarm; made once, as long as nothing of it changes."""
        there = self._pool(other.node_id)
        key = (here.name if here is not None else "", other.node_id)
        card = self._cards.get(key)
        if card is not None and card.endpoints is other.endpoints and card.here is here and card.there is there:
            return card
        if len(self._cards) >= CARDS_MAX:
            self._cards.clear()
        self._card_number += 1
        message = weights_pb2.SwarmMember(
            node_id=other.node_id,
            endpoints=[
                agent_pb2.Endpoint(network=x.network, host=x.host, port=x.port)
                for x in shared_endpoints(here, there, other.endpoints)
            ],
            pool=there.name if there is not None else "",
            region=there.region if there is not None else "",
            zone=there.domain if there is not None else "",
            egress_gib_price_micros=there.egress_gib_price_micros if there is not None else 0,
            tls=needs_tls(here, there),
        )
        card = self._cards[key] = _Card(self._card_number, message, other.endpoints, here, there)
        return card

    def _pool(self, node_id: str) -> Pool | None:
        state = self._view()
        node = state.nodes.get(node_id)
        return state.pools.get(node.pool) if node is not None else None

    def _region(self, node_id: str) -> str:
        pool = self._pool(node_id)
        return pool.region if pool is not None else ""

    def _dials(self, caller: CacheNode, server: CacheNode) -> bool:
        if server.node_id in caller.unreachable:
            return False
        return bool(shared_endpoints(self._pool(caller.node_id), self._pool(server.node_id), server.endpoints))

    def _dialled(self, node: CacheNode) -> bool:
        """Whether connections to it can be opened; several of its own region that cannot speak for all."""
        if not node.endpoints:
            return False
        region = self._region(node.node_id)
        return sum(1 for i in self._table.unreached_by(node.node_id) if self._region(i) == region) < _UNREACHED_MIN

    def _reaches_origin(self, node: CacheNode, artifact_id: str) -> bool:
        """False where it told that the origin gave it nothing at all."""
        model = standing_of(self._view().catalog, artifact_id).model
        return model is None or node.rates.get(origin_source(model.resolved_uri or model.uri)) != 0

    def neighbours(self, node_id: str, artifact_id: str) -> tuple[Neighbour, ...]:
        """Who is beside a node, told or not; none where the artifact has no swarm."""
        swarm = self._swarms.get(artifact_id)
        return swarm.view.neighbours_of(node_id) if swarm is not None else ()

    def statistics(self) -> dict[str, int]:
        """Swarms, and members of all of them."""
        return {"swarms": len(self._swarms), "swarm_members": sum(len(x.view) for x in self._swarms.values())}


__all__ = ["Swarms"]
