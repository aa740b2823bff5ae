"""What the transfers of one node share: disk, peers, mount, origins, signer; and whom they tell. Protocols, one record.

Tests put fakes in the place of peers, mount, origins and news; the disk is always the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fal_contract.clock import Clock
from fal_contract.v1 import weights_pb2
from fal_fsd.attest import Signer
from fal_fsd.core.messages import Claim, Place
from fal_fsd.disk.store import DiskStore
from fal_fsd.lanes import Lanes
from fal_fsd.lease_reads import OriginReader
from fal_fsd.ports import InFlight
from fal_fsd.surroundings import PeerSide
from fal_fsd.tally import Totals


class TransferNews(Protocol):
    """Whom a transfer tells what the scheduler and operators should know. Called on the event loop."""

    def changed(self, artifact_id: str, *, at_once: bool) -> None:
        """Its view (`CachedArtifact`) is another. `at_once`: its state, not just its progress."""
        ...

    def event(self, kind: str, subject: str, message: str) -> None: ...

    def claims(self, artifact_id: str, claims: Sequence[Claim]) -> None:
        """This node read these pieces from the origin."""
        ...

    def attestation(self, attestation: weights_pb2.Attestation) -> None:
        """This node has hashed all of it."""
        ...

    @property
    def scheduled(self) -> bool:
        """True: there is a scheduler, which tells members of swarms and attests; else this node is alone."""
        ...


OpenOrigin = Callable[[str], OriginReader]


@dataclass(frozen=True)
class Tools:
    """See the module's docstring. `signer` gives None while this node has no identity."""

    place: Callable[[], Place]
    clock: Clock
    store: DiskStore
    peers: PeerSide
    mount: InFlight
    open_origin: OpenOrigin
    signer: Callable[[], Signer | None]
    lanes: Lanes
    news: TransferNews
    claims_folder: Path
    totals: Totals = field(default_factory=Totals)


__all__ = ["OpenOrigin", "Tools", "TransferNews"]
