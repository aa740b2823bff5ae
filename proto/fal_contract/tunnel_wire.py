"""The lines that a tunnel adds to HTTP/1.1. Pure.

The node that dials sends `FAL-TUNNEL/1 NODE` first. `FAL-TUNNEL/1 bye`, between two answers, asks the gateway to send
nothing more on this connection; empty lines between messages, from either side, only keep it awake.
"""

from __future__ import annotations

import re
from typing import Final

from fal_contract.errors import Code, FalError

GREETING_BYTES_MAX: Final = 128
TUNNEL_BYE: Final = b"FAL-TUNNEL/1 bye\r\n"
_GREETING: Final = re.compile(rb"FAL-TUNNEL/1 ([A-Za-z0-9][A-Za-z0-9._@-]{0,62})\r\n")


def tunnel_greeting(node_id: str) -> bytes:
    """The first line of a tunnel."""
    return b"FAL-TUNNEL/1 %s\r\n" % node_id.encode()


def read_greeting(line: bytes) -> str:
    """The node id in a greeting. FalError(INVALID) when it is none."""
    match = _GREETING.fullmatch(line)
    if not match or line == TUNNEL_BYE:
        raise FalError(Code.INVALID, "the peer did not open a tunnel", remedy="Only fal-proxy dials this port.")
    return match[1].decode()
