"""Socket settings of every data connection.

A request may compute for minutes without a byte on its connection, and a NAT forgets a flow that is silent for 30 s;
so the kernel probes every silent connection, which also finds a peer that is gone.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

KEEPALIVE_IDLE_S: Final = 10
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_PROBES: Final = 3  # a dead peer is noticed within 25 s
_USER_TIMEOUT_MS: Final = 25_000


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Probe the connection while it is silent; end it when sent bytes stay unacknowledged. TCP only, else nothing."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
