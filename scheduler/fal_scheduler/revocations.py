"""Which certificates are refused before their date, as the guard asks for every call and stream.

A revocation names a serial, or a subject: then every certificate of that subject that was issued before is refused.
Follows the engine's view; a standby, which has none, refuses nothing here and answers NOT_LEADER instead.
"""

from __future__ import annotations

from fal_contract.identity import PeerIdentity, Role
from fal_scheduler.core.state import State


class RevocationIndex:
    """Serials and subjects, rebuilt when a revocation is made."""

    def __init__(self) -> None:
        self._serials: frozenset[str] = frozenset()
        self._subjects: dict[str, float] = {}
        self._nodes: frozenset[str] = frozenset()

    def refresh(self, state: State) -> None:
        """Read the view anew."""
        self._serials = frozenset(state.revocations)
        self._subjects = {}
        for one in state.revocations.values():
            self._subjects[one.subject] = max(one.revoked_at_s, self._subjects.get(one.subject, 0.0))
        self._nodes = frozenset(node.id for node in state.nodes.values() if node.revoked)

    def is_revoked(self, peer: PeerIdentity) -> bool:
        """Whether this certificate is refused."""
        if peer.serial in self._serials or (peer.role is Role.NODE and peer.name in self._nodes):
            return True
        revoked_at_s = self._subjects.get(peer.subject)
        return revoked_at_s is not None and peer.issued_at_s <= revoked_at_s
