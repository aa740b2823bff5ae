"""Under which addresses others reach a process of this node: what the operator wrote, else what the kernel would use.

Used by fal-agent (for its proxy) and fal-fsd (for its bulk port), which announce themselves the same way.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from fal_contract.errors import invalid
from fal_contract.ids import check_name
from fal_contract.limits import LABEL_CHARS_MAX


def parse_address(text: str) -> tuple[str, str, int]:
    """`NETWORK=HOST[:PORT]` → network, host, port (0 when absent). IPv6 in brackets. Raises INVALID."""
    network, equals, rest = text.partition("=")
    host, port = rest, "0"
    if rest.startswith("["):
        host, _, tail = rest[1:].partition("]")
        port = tail.removeprefix(":") or "0"
    elif ":" in rest:
        host, _, port = rest.rpartition(":")
    if not equals or not network or not host or not port.isdigit() or int(port) > 65535 or len(host) > LABEL_CHARS_MAX:
        raise invalid("addresses", text, "is not NETWORK=HOST[:PORT]", remedy="For instance lan=10.0.0.7:9400.")
    check_name(network, field="addresses")
    return network, host, int(port)


def check_schedulers(addresses: Sequence[str]) -> None:
    """Raise INVALID naming the first that is not host:port."""
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise invalid("schedulers", address, "is not host:port", remedy="Give the scheduler's rpc address.")


def address_towards(schedulers: Sequence[str]) -> str:
    """Our address on the way to the first scheduler, loopback where there is none; nothing is sent."""
    if not schedulers:
        return "127.0.0.1"
    host, _, port = schedulers[0].rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[4])
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


__all__ = ["address_towards", "check_schedulers", "parse_address"]
