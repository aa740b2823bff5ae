"""Which certificates are refused before their date. Pure.

A revocation names a serial, or a subject (`role/name`): then every certificate of that subject that was issued until
it is refused, and one that an admin issues afterwards is good again. Used by the scheduler's guard and by fal-proxy,
so that both refuse the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fal_contract.errors import Code, FalError
from fal_contract.identity import PeerIdentity


@dataclass(frozen=True, slots=True)
class RevokedPeer:
    """One revocation. `revoked_at_s`: seconds since 1970."""

    serial: str
    subject: str
    revoked_at_s: float


class RevokedPeers:
    """All revocations that are known, as a look-up."""

    def __init__(self, peers: Iterable[RevokedPeer] = ()) -> None:
        self.peers = tuple(peers)
        self._serials = frozenset(peer.serial for peer in self.peers)
        self._subjects: dict[str, float] = {}
        for peer in self.peers:
            self._subjects[peer.subject] = max(peer.revoked_at_s, self._subjects.get(peer.subject, 0.0))

    def is_revoked(self, peer: PeerIdentity) -> bool:
        """Whether this certificate is refused."""
        if peer.serial in self._serials:
            return True
        revoked_at_s = self._subjects.get(peer.subject)
        return revoked_at_s is not None and peer.issued_at_s <= revoked_at_s

    def check(self, peer: PeerIdentity) -> None:
        """Raise UNAUTHENTICATED when it is."""
        if self.is_revoked(peer):
            raise FalError(
                Code.UNAUTHENTICATED,
                f"the certificate {peer.serial} of {peer.subject} was revoked",
                remedy="Ask an admin for a new one.",
            )
