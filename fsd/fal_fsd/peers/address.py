"""A neighbour as the bulk port needs to know it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fal_contract.v1 import weights_pb2
from fal_fsd.core.messages import Member, Place


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A member of one swarm. `endpoints`: (host, port), none: it dials us. `ticket`: ours at it, for this artifact."""

    node_id: str
    endpoints: tuple[tuple[str, int], ...] = ()
    ticket: bytes = field(default=b"", repr=False)
    ticket_expires_s: float = 0.0
    tls: bool = False
    place: Place = field(default_factory=lambda: Place(""))


def peer_addresses(message: weights_pb2.Swarm) -> list[PeerAddress]:
    """The members of a swarm as the scheduler tells them."""
    return [
        PeerAddress(
            node_id=member.node_id,
            endpoints=tuple((endpoint.host, endpoint.port) for endpoint in member.endpoints),
            ticket=member.ticket,
            ticket_expires_s=member.ticket_expires_s,
            tls=member.tls,
            place=Place(member.node_id, member.pool, member.region, member.zone, member.egress_gib_price_micros),
        )
        for member in message.members
    ]


def members_of(message: weights_pb2.Swarm, addresses: Sequence[PeerAddress]) -> list[Member]:
    """The same as `core.swarm` takes them; `addresses`: what `peer_addresses` made of the message."""
    return [
        Member(address.place, seed=told.seed, complete=told.complete)
        for told, address in zip(message.members, addresses, strict=True)
    ]


__all__ = ["PeerAddress", "members_of", "peer_addresses"]
