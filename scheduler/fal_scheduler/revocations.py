"""Which certificates are refused before their date, as the guard asks for every call and stream.

The rule is `fal_contract.revocation`'s; a node's record says by itself whether it is revoked. Follows the engine's
view; a standby, which has none, refuses nothing here and answers NOT_LEADER instead.
"""

from __future__ import annotations

from fal_contract.identity import PeerIdentity, Role
from fal_contract.revocation import RevokedPeer, RevokedPeers
from fal_scheduler.core.state import State


class RevocationIndex:
    """Serials and subjects, rebuilt when a revocation is made."""

    def __init__(self) -> None:
        self._peers = RevokedPeers()
        self._nodes: frozenset[str] = frozenset()

    def refresh(self, state: State) -> None:
        """Read the view anew."""
        self._peers = RevokedPeers(
            RevokedPeer(one.serial, one.subject, one.revoked_at_s) for one in state.revocations.values()
        )
        self._nodes = frozenset(node.id for node in state.nodes.values() if node.revoked)

    def is_revoked(self, peer: PeerIdentity) -> bool:
        """Whether this certificate is refused."""
        return self._peers.is_revoked(peer) or (peer.role is Role.NODE and peer.name in self._nodes)
