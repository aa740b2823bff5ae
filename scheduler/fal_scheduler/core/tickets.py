"""Tickets of the bulk port as the scheduler gives them out: one key a serving node, changed every day. Pure.

Every leader makes the same keys, from one secret of the cluster (`CertificateAuthority.derive`), so a change of leader
costs no ticket. A node checks with the keys of today, tomorrow and yesterday: it is told the next key a day before
the first ticket is made with it, and knows the last one as long as its tickets are good.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from fal_contract.ticket import TICKET_TTL_S, make_ticket, node_key

GENERATION_S: Final = 86400.0
RENEW_AFTER_S: Final = TICKET_TTL_S / 2
_CACHED_MAX: Final = 8192
TICKET_PURPOSE: Final = "tickets of the bulk port 1"


class TicketOffice:
    """Makes keys and tickets from the cluster's secret. Keys are cached: one HMAC a node and day."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._keys: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def keys(self, node_id: str, wall_s: float) -> tuple[bytes, ...]:
        """What the node checks with, the current first."""
        now = int(wall_s // GENERATION_S)
        return tuple(self._key(node_id, generation) for generation in (now, now + 1, now - 1))

    def ticket(self, *, server: str, caller: str, artifact_id: str, expires_s: float, wall_s: float) -> bytes:
        """Lets `caller` take part in the swarm of `artifact_id` at `server`, until `expires_s` (Unix seconds)."""
        key = self._key(server, int(wall_s // GENERATION_S))
        return make_ticket(key, caller=caller, artifact_id=artifact_id, expires_s=expires_s)

    @staticmethod
    def generation(wall_s: float) -> int:
        """Rises when nodes must be told new keys."""
        return int(wall_s // GENERATION_S)

    def _key(self, node_id: str, generation: int) -> bytes:
        known = self._keys.get((node_id, generation))
        if known is None:
            known = self._keys[node_id, generation] = node_key(self._secret, node_id, generation)
            if len(self._keys) > _CACHED_MAX:
                self._keys.popitem(last=False)
        return known


__all__ = ["GENERATION_S", "RENEW_AFTER_S", "TICKET_PURPOSE", "TicketOffice"]
