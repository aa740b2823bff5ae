"""What a container with network "egress" may reach, as rules for iptables-restore. Pure.

Two walls, each enough alone for what is always blocked. The first is inside the container's own network namespace,
which belongs to the node's user namespace, so that nothing in the container can change it: it holds the app's policy.
The second is on the node, the same for all containers of one agent: metadata services, the node itself and other
containers. Both end with the namespace or with `node_rules_gone`; no rule of one container is ever on the node.

Order within a container: deny, then name servers (port 53 only), then what is always blocked, then private networks
that `allow` names, then all other private ones, then `allow` or everything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fal_runtime.driver import Egress

Network = ipaddress.IPv4Network

# This host, loopback, link-local (with the metadata services of most clouds), those of Alibaba, Azure and Oracle
# elsewhere, multicast, reserved and broadcast.
ALWAYS_BLOCKED: Final = tuple(
    Network(text)
    for text in (
        *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),
        *("224.0.0.0/4", "240.0.0.0/4"),
    )
)
# Not on the Internet (RFC 1918, 6598, 6890, 2544): only where `allow` names a part of one of them.
PRIVATE: Final = tuple(
    Network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.0.0/24", "198.18.0.0/15")
)
_REJECT: Final = "REJECT --reject-with icmp-admin-prohibited"
RESOLVERS_MAX: Final = 3  # as many as the C library asks
_CHAINS: Final = (
    *(("filter", "FORWARD", "FAL-F-", False), ("filter", "INPUT", "FAL-I-", False)),
    *(("nat", "POSTROUTING", "FAL-N-", False), ("filter", "FORWARD", "FAL-L-", True)),
)


@dataclass(frozen=True, slots=True)
class Node:
    """What rules need to know of the node: `whole` is the range of all its agents' containers, `ours` this agent's."""

    whole: Network
    ours: Network
    addresses: tuple[str, ...] = ()  # its own, IPv4
    resolvers: tuple[str, ...] = ()  # name servers that containers may ask
    forwarded_before: bool = True  # it was a router before there were containers


@dataclass(frozen=True, slots=True)
class Jump:
    """A chain of ours, and the built-in one that leads to it."""

    table: str
    builtin: str
    chain: str
    last: bool = False  # after the rules of others, not before them


def container_rules(address: str, egress: Egress, node: Node) -> str:
    """Rules of the container at `address` for its own namespace, as input of iptables-restore: all of the table."""
    allow, deny = networks_v4(egress.allow), networks_v4(egress.deny)
    named = [network for network in allow if any(network.subnet_of(private) for private in PRIVATE)]
    rest = [network for network in allow if network not in named]
    lines = ["*filter", ":INPUT DROP [0:0]", ":FORWARD DROP [0:0]", ":OUTPUT DROP [0:0]"]
    lines += ["-A INPUT -i lo -j ACCEPT", "-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]
    lines += ["-A OUTPUT -o lo -j ACCEPT", f"-A OUTPUT ! -s {address}/32 -j DROP"]
    lines += [f"-A OUTPUT -d {network} -j {_REJECT}" for network in deny]
    lines += [f"-A OUTPUT {match} -j ACCEPT" for match in _name_servers(node.resolvers)]
    lines += [f"-A OUTPUT -d {network} -j {_REJECT}" for network in always_blocked(node)]
    lines += [f"-A OUTPUT -d {network} -j ACCEPT" for network in named]
    lines += [f"-A OUTPUT -d {network} -j {_REJECT}" for network in PRIVATE]
    lines += [f"-A OUTPUT -d {network} -j ACCEPT" for network in rest]
    lines += [f"-A OUTPUT -j {_REJECT if egress.allow else 'ACCEPT'}", "COMMIT", ""]
    return "\n".join(lines)


def node_rules(scope: str, node: Node) -> str:
    """Rules on the node for all containers of one agent, for `iptables-restore --noflush`: its chains, made anew."""
    forward, inward, nat, last = (jump.chain for jump in jumps(scope))
    ask = _name_servers(node.resolvers)
    blocked = (node.whole, *ALWAYS_BLOCKED)
    lines = ["*filter", f":{forward} - [0:0]", f":{inward} - [0:0]", f":{last} - [0:0]"]
    lines += [f"-A {forward} -d {node.ours} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]
    lines += [f"-A {forward} -d {node.ours} -j DROP"]
    lines += [f"-A {forward} -s {node.ours} {match} -j ACCEPT" for match in ask]
    lines += [f"-A {forward} -s {node.ours} -d {network} -j DROP" for network in blocked]
    lines += [f"-A {forward} -s {node.ours} -j ACCEPT"]
    if not node.forwarded_before:
        # The kernel forwards for all or for nobody; what nobody accepts and it did not forward before stays here.
        lines += [f"-A {last} ! -s {node.whole} -m conntrack --ctstate NEW -j DROP"]
    lines += [f"-A {inward} -s {node.ours} {match} -j ACCEPT" for match in ask]
    lines += [f"-A {inward} -s {node.ours} -j DROP", f"-A {inward} -d {node.ours} -j DROP", "COMMIT"]
    lines += ["*nat", f":{nat} - [0:0]", f"-A {nat} -s {node.ours} ! -d {node.whole} -j MASQUERADE", "COMMIT", ""]
    return "\n".join(lines)


def jumps(scope: str) -> tuple[Jump, Jump, Jump, Jump]:
    """Where the node's own chains lead to ours. A chain's name has at most 28 characters."""
    one, two, three, four = (Jump(table, builtin, f"{prefix}{scope}", last) for table, builtin, prefix, last in _CHAINS)
    return one, two, three, four


def always_blocked(node: Node) -> tuple[Network, ...]:
    """What no app reaches, whatever it is allowed (but for name servers, on port 53)."""
    return (node.whole, *ALWAYS_BLOCKED, *(Network(address) for address in node.addresses))


def networks_v4(texts: Iterable[str]) -> list[Network]:
    """The IPv4 networks among `texts`; containers have no IPv6, so those of IPv6 need no rule."""
    found = [ipaddress.ip_network(text) for text in texts]
    return [network for network in found if isinstance(network, Network)]


def _name_servers(resolvers: Iterable[str]) -> list[str]:
    return [f"-d {address}/32 -p {kind} --dport 53" for address in resolvers for kind in ("udp", "tcp")]


def resolvers_of(resolv_conf: str, upstream: str = "") -> tuple[str, ...]:
    """The IPv4 name servers of a resolv.conf; where it names a stub on loopback, those that the stub asks."""
    found = _named(resolv_conf)
    if any(ipaddress.IPv4Address(address).is_loopback for address in found):
        found = [address for address in found if not ipaddress.IPv4Address(address).is_loopback] + _named(upstream)
    distinct = dict.fromkeys(a for a in found if not ipaddress.IPv4Address(a).is_loopback)
    return tuple(distinct)[:RESOLVERS_MAX]


def _named(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            found.append(str(ipaddress.IPv4Address(words[1])))
        except ValueError:
            continue  # IPv6, which containers have not
    return found


def resolv_conf_inside(resolvers: Iterable[str], resolv_conf: str) -> str:
    """The container's resolv.conf: these servers, with the node's search list and options."""
    kept = [line for line in resolv_conf.splitlines() if line.split(" ")[0] in ("search", "domain", "options")]
    return "\n".join([*(f"nameserver {address}" for address in resolvers), *kept, ""])


def split(whole: Network, pieces: int) -> list[Network]:
    """`whole` in equal parts, at most `pieces`, each of at least 16 addresses. Each agent of a node takes one."""
    bits = min(max(0, pieces.bit_length() - 1), max(0, 28 - whole.prefixlen))
    return list(whole.subnets(prefixlen_diff=bits))
