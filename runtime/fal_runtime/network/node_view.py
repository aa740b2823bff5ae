"""What the node's network looks like: its own addresses, the interface towards the world, routes, name servers.

Read afresh for every container, because leases are renewed and interfaces come and go. Blocking; called by `egress`.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fal_runtime.driver import driver_failed
from fal_runtime.network.namespaces import command
from fal_runtime.network.policy import Network, resolvers_of

RESOLV_CONF: Final = Path("/etc/resolv.conf")
UPSTREAM: Final = Path("/run/systemd/resolve/resolv.conf")  # what systemd's stub resolver asks
IP_FORWARD: Final = Path("/proc/sys/net/ipv4/ip_forward")
MTU_DEFAULT: Final = 1500


@dataclass(frozen=True, slots=True)
class NodeView:
    """`addresses` are all of the node but those in `whole`; `clash` is a route that containers would hide, or empty."""

    addresses: tuple[str, ...]
    mtu: int
    clash: str
    resolvers: tuple[str, ...]
    resolv_conf: str


def look(whole: Network) -> NodeView:
    """The node as it is now. DRIVER_FAILED when `ip` (iproute2) does not answer."""
    links = _json("ip", "-json", "-4", "address", "show")
    routes = _json("ip", "-json", "-4", "route", "show", "table", "main")
    addresses = [info["local"] for link in links for info in link.get("addr_info", ()) if "local" in info]
    uplink = next((route.get("dev") for route in routes if route.get("dst") == "default"), None)
    mtu = next((int(link["mtu"]) for link in links if link.get("ifname") == uplink), MTU_DEFAULT)
    said = _text(RESOLV_CONF)
    outside = tuple(sorted({a for a in addresses if ipaddress.IPv4Address(a) not in whole}))
    return NodeView(outside, mtu, _clash(routes, whole), resolvers_of(said, _text(UPSTREAM)), said)


def _clash(routes: list[dict[str, Any]], whole: Network) -> str:
    """The first route to a part of `whole` that is none of ours: ours lead to one address over a veth."""
    for route in routes:
        if route.get("dst") in (None, "default"):
            continue
        network = ipaddress.IPv4Network(route["dst"], strict=False)
        ours = network.prefixlen == 32 and str(route.get("dev", "")).startswith("veth")
        # A wider network that contains ours is where packets to hosts of that network go: it would lose a part.
        if network.overlaps(whole) and not ours:
            return f"{route['dst']} dev {route.get('dev', '?')}"
    return ""


def _json(*argv: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(command(argv) or "[]")
    except ValueError as error:
        raise driver_failed(f"{' '.join(argv)}: {error}", remedy="Install iproute2 5.0 or newer.") from error
    return [item for item in found if isinstance(item, dict)]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
