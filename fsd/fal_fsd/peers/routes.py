"""Whom to dial, and when again: one route a node, whatever it shares with us. Pure.

Both sides may dial; of two connections the one stays that the smaller node id dialled, so the larger waits a moment
before it dials, and dials only who did not come. After a failure: full jitter between 0 and min(cap, base · 2^n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fal_contract.limits import RECONNECT_BASE_S, RECONNECT_CAP_S
from fal_fsd.core.messages import Place
from fal_fsd.peers.address import PeerAddress
from fal_fsd.peers.wire import TICKETS_MAX

LARGER_WAITS_S: Final = 0.1
BAN_S: Final = 600.0
STEADY_S: Final = 10.0  # a connection that ended earlier was a failure
Uniform = Callable[[float, float], float]


@dataclass(slots=True)
class Route:
    """How a node is reached. `unreachable`: it was dialled and never answered since it is known."""

    node_id: str
    endpoints: tuple[tuple[str, int], ...]
    tls: bool
    place: Place
    tickets: dict[str, bytes] = field(default_factory=dict, repr=False)  # ours at it, by artifact id
    next_at_s: float = 0.0
    failures: int = 0
    dialling: bool = False
    unreachable: bool = False


class Routes:
    """All members of all swarms that we were told of. `uniform(a, b)`: chance."""

    def __init__(self, node_id: str, uniform: Uniform) -> None:
        self._node_id = node_id
        self._uniform = uniform
        self._members: dict[str, dict[str, PeerAddress]] = {}
        self._routes: dict[str, Route] = {}
        self.banned: dict[str, tuple[str, float]] = {}

    def set_members(self, artifact_id: str, members: Sequence[PeerAddress], now_s: float) -> None:
        """The scheduler's word on one swarm, as a whole."""
        told = {member.node_id: member for member in members if member.node_id != self._node_id}
        before = self._members.pop(artifact_id, {})
        if told:
            self._members[artifact_id] = told
        for node_id in sorted(before.keys() | told.keys()):
            self._rebuild(node_id, now_s)

    def _rebuild(self, node_id: str, now_s: float) -> None:
        known = [(id, told[node_id]) for id, told in self._members.items() if node_id in told]
        if not known:
            self._routes.pop(node_id, None)
            return
        newest = max((member for _, member in known), key=lambda member: member.ticket_expires_s)
        route = self._routes.get(node_id)
        if route is None:
            wait_s = LARGER_WAITS_S if self._node_id > node_id else 0.0
            route = self._routes[node_id] = Route(
                node_id, newest.endpoints, newest.tls, newest.place, next_at_s=now_s + wait_s
            )
        elif route.endpoints != newest.endpoints:
            route.next_at_s, route.failures, route.unreachable = now_s, 0, False
        route.endpoints, route.place = newest.endpoints, newest.place
        route.tls = any(member.tls for _, member in known)
        route.tickets = {id: member.ticket for id, member in known if member.ticket}

    def knows(self, node_id: str, artifact_id: str) -> bool:
        """Whether the scheduler told us that this node is in this swarm."""
        return node_id in self._members.get(artifact_id, ())

    def route(self, node_id: str) -> Route | None:
        """How it is reached."""
        return self._routes.get(node_id)

    def members_tls(self) -> Mapping[str, bool]:
        """Every known node: whether connections with it must be TLS."""
        return {route.node_id: route.tls for route in self._routes.values()}

    def due(self, now_s: float, connected: Callable[[str], bool], wanted: Callable[[str], bool]) -> Iterable[Route]:
        """Who should be dialled now. `wanted`: artifacts whose swarm we are in."""
        for route in self._routes.values():
            if route.dialling or route.next_at_s > now_s or not route.endpoints or route.node_id in self.banned:
                continue
            if not connected(route.node_id) and any(wanted(id) for id in route.tickets):
                yield route

    def next_at_s(self, connected: Callable[[str], bool]) -> float | None:
        """When `due` may find somebody who waits now."""
        times = (
            x.next_at_s for x in self._routes.values() if x.endpoints and not x.dialling and not connected(x.node_id)
        )
        return min(times, default=None)

    def tickets_of(self, route: Route, wanted: Callable[[str], bool]) -> tuple[tuple[str, bytes], ...]:
        """What is shown in the first frame."""
        return tuple((id, ticket) for id, ticket in route.tickets.items() if wanted(id))[:TICKETS_MAX]

    def answered(self, node_id: str) -> None:
        """A connection with it stands, whoever dialled."""
        if route := self._routes.get(node_id):
            route.unreachable = False

    def ended(self, node_id: str, now_s: float, *, dialled: bool, reached: bool, lived_s: float) -> None:
        """A connection has ended, or could not be made. `reached`: it answered; `lived_s`: after its greeting."""
        route = self._routes.get(node_id)
        if route is None:
            return
        if lived_s >= STEADY_S:
            route.failures = 0
        elif dialled:
            route.failures += 1
        if dialled:
            route.dialling = False
            route.unreachable = not reached
        cap_s = min(RECONNECT_CAP_S, RECONNECT_BASE_S * 2.0 ** min(route.failures, 16))
        route.next_at_s = now_s + self._uniform(0.0, cap_s)

    def ban(self, node_id: str, reason: str, now_s: float) -> None:
        """No connection with it for BAN_S."""
        self.banned[node_id] = (reason, now_s + BAN_S)

    def lift_bans(self, now_s: float) -> bool:
        """Forget old ones; whether there were any."""
        old = [node_id for node_id, (_, until_s) in self.banned.items() if until_s <= now_s]
        for node_id in old:
            del self.banned[node_id]
        return bool(old)

    @property
    def unreachable(self) -> list[str]:
        """Members that were dialled and did not answer, in order."""
        return sorted(route.node_id for route in self._routes.values() if route.unreachable)


__all__ = ["BAN_S", "Route", "Routes"]
