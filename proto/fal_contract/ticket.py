"""Tickets of the bulk port: short-lived, for one caller and one artifact, checked with the server's own key. Pure.

The scheduler derives each node's key from one secret of the cluster, so that it need not store them and every leader
makes the same ones; a node learns its own key only, so a stolen node reads what it holds and nothing else. A ticket is

    EXPIRES (8 bytes, big endian, Unix seconds) · HMAC-SHA-256(key of the server, head · caller · artifact · EXPIRES)
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

TICKET_TTL_S: Final = 3600.0
TICKET_BYTES: Final = 8 + 32
_HEAD: Final = b"fal-ticket 1\n"


def node_key(secret: bytes, node_id: str, generation: int) -> bytes:
    """The key of a serving node. `generation` counts up with the scheduler's rotation; 32 bytes."""
    return hmac.digest(secret, f"fal-ticket-key 1\n{node_id}\n{generation}\n".encode(), "sha256")


def make_ticket(key: bytes, *, caller: str, artifact_id: str, expires_s: float) -> bytes:
    """A ticket that lets node `caller` take part in the swarm of `artifact_id` at the node with `key`."""
    stamp = int(expires_s).to_bytes(8, "big")
    return stamp + _mac(key, caller, artifact_id, stamp)


def check_ticket(keys: Sequence[bytes], ticket: bytes, *, caller: str, artifact_id: str, now_s: float) -> str:
    """Empty when the ticket is good, else why not. Constant time in the secret parts."""
    if len(ticket) != TICKET_BYTES:
        return "it has the wrong length"
    stamp, mac = ticket[:8], ticket[8:]
    if int.from_bytes(stamp, "big") < now_s:
        return "it has expired"
    if not any(hmac.compare_digest(mac, _mac(key, caller, artifact_id, stamp)) for key in keys):
        return "it was not made for this caller, artifact and node"
    return ""


def _mac(key: bytes, caller: str, artifact_id: str, stamp: bytes) -> bytes:
    text = _HEAD + f"{caller}\n{artifact_id}\n".encode() + stamp
    return hmac.new(key, text, hashlib.sha256).digest()


__all__ = ["TICKET_BYTES", "TICKET_TTL_S", "check_ticket", "make_ticket", "node_key"]
