"""What stands for peers and mount where there are none: no identity yet, no root, switched off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fal_contract.errors import Code, FalError
from fal_fsd.core.messages import Claim, Lease, Place
from fal_fsd.peers.address import PeerAddress
from fal_fsd.ports import Part


class NoPeers:
    """What `peers.net.PeerNet` is, without anybody."""

    def join(self, part: Part) -> None:
        """Nobody to join."""

    def leave(self, artifact_id: str) -> None:
        """Nobody to leave."""

    def ask(self, node_id: str, artifact_id: str, pieces: Sequence[int], *, urgent: bool) -> None:
        """Never called: no peer was told up."""

    def withdraw(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None:
        """Never called: nothing was asked."""

    def tell_have(self, artifact_id: str, pieces: Sequence[int], claims: Sequence[Claim] = ()) -> None:
        """Nobody to tell."""

    def tell_lease(self, artifact_id: str, lease: Lease, *, ended: bool) -> None:
        """Nobody to tell."""

    def set_ticket_keys(self, keys: Sequence[bytes]) -> None:
        """Nobody calls."""

    def set_members(self, artifact_id: str, members: Sequence[PeerAddress]) -> None:
        """Nobody to dial without an identity."""

    def set_scheduled(self, scheduled: bool) -> None:
        """No tickets."""

    def set_trusted_network(self, trusted: bool) -> None:
        """There is no port."""

    def set_place(self, place: Place) -> None:
        """There are no links."""

    async def quiet(self, artifact_id: str) -> None:
        """Nothing is being sent."""

    async def fetch_manifest(self, node_id: str, id: str) -> bytes:
        raise FalError(Code.UNAVAILABLE, f"{node_id} is not connected", remedy="Join this node to a cluster.")

    def drop(self, node_id: str, reason: str) -> None:
        """Nobody to drop."""


class NoMount:
    """`ports.InFlight` that says why it is none."""

    def __init__(self, why: str) -> None:
        self._why = why

    @property
    def available(self) -> str:
        return self._why

    async def open(self, part: Part) -> Path:
        raise FalError(Code.FAILED_PRECONDITION, self._why, remedy="Wait until the artifact is ready.")

    def arrived(self, artifact_id: str, piece: int) -> None:
        """No reads wait."""

    def fail(self, artifact_id: str, reason: str) -> None:
        """No reads wait."""

    def cancel_reads(self, pids: Sequence[int]) -> int:
        return 0

    def shows(self, artifact_id: str) -> bool:
        return False

    def take_access(self, artifact_id: str) -> list[int]:
        return []

    async def close(self, artifact_id: str) -> None:
        """Nothing is open."""


__all__ = ["NoMount", "NoPeers"]
