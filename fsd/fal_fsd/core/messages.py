"""What the swarm's decisions are made of: members, leases, claims, and what is to be done. Pure.

Shared by core/swarm.py (decides), peers (carries) and the simulation. Node ids are strings; pieces are numbers over all
files of one artifact (fal_contract.pieces).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ORIGIN: Final = "origin"  # a source that is no node


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is; equal strings mean the same rack, pool or region. `egress_price`: of a GiB, millionths."""

    node_id: str
    pool: str = ""
    region: str = ""
    zone: str = ""
    egress_price: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """A neighbour in a swarm, as the scheduler tells it."""

    place: Place
    seed: bool = False  # among those that read the origin
    complete: bool = False

    @property
    def node_id(self) -> str:
        return self.place.node_id


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to read pieces [first, first+count) from the origin. A higher epoch fences a lower one."""

    first: int
    count: int
    epoch: int
    holder: str

    @property
    def pieces(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who read a piece from the origin before anybody attested it. `signature`: ECDSA of the signer's node key."""

    piece: int
    digest: bytes
    signer: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class Ask:
    """Request these pieces of a peer; urgent ones are sent before everything else."""

    node_id: str
    pieces: tuple[int, ...]
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Tell a peer that these pieces are not wanted any more."""

    node_id: str
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadOrigin:
    """Read the lease's missing pieces from the origin, in this order."""

    lease: Lease
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopOrigin:
    """End that read: another holds a higher epoch, or the pieces came from elsewhere."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell all connected seeds of this lease. `ended`: it is given back."""

    lease: Lease
    ended: bool = False


@dataclass(frozen=True, slots=True)
class DropPeer:
    """End the connection and do not dial again for a while; `reason` is reported to operators."""

    node_id: str
    reason: str


Action = Ask | Withdraw | ReadOrigin | StopOrigin | Tell | DropPeer

__all__ = [
    "ORIGIN",
    "Action",
    "Ask",
    "Claim",
    "DropPeer",
    "Lease",
    "Member",
    "Place",
    "ReadOrigin",
    "StopOrigin",
    "Tell",
    "Withdraw",
]
