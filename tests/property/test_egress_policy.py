"""What egress rules let through, by an interpreter of the rules that knows nothing of how they were made."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_runtime.driver import Egress
from fal_runtime.network.policy import (
    ALWAYS_BLOCKED,
    PRIVATE,
    Node,
    container_rules,
    jumps,
    node_rules,
    resolv_conf_inside,
    resolvers_of,
    split,
)

OURS, WHOLE = IPv4Network("10.222.16.0/20"), IPv4Network("10.222.0.0/16")
ADDRESS = "10.222.16.9"
METADATA = ("169.254.169.254", "169.254.169.253", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192")

addresses = st.one_of(
    st.integers(0, (1 << 32) - 1).map(IPv4Address),
    st.sampled_from([IPv4Address(text) for text in (*METADATA, "10.0.0.1", "192.168.7.7", "127.0.0.1", "8.8.8.8")]),
    st.sampled_from([*ALWAYS_BLOCKED, *PRIVATE, WHOLE]).flatmap(
        lambda network: st.integers(0, network.num_addresses - 1).map(lambda n: network[n])
    ),
)
networks = st.one_of(
    st.builds(lambda a, bits: str(IPv4Network((a, bits), strict=False)), addresses, st.integers(0, 32)),
    st.sampled_from(["0.0.0.0/0", "169.254.0.0/16", "10.0.0.0/8", "192.168.0.0/16", "2001:db8::/32"]),
)
nodes = st.builds(
    lambda own, resolvers: Node(WHOLE, OURS, tuple(map(str, own)), tuple(map(str, resolvers))),
    st.lists(addresses, max_size=3),
    st.lists(addresses.filter(lambda a: not a.is_loopback), max_size=3),
)
policies = st.builds(
    lambda allow, deny: Egress(tuple(allow), tuple(deny)),
    st.lists(networks, max_size=4),
    st.lists(networks, max_size=4),
)


def verdict(
    text: str, chain: str, to: IPv4Address, *, source: str = ADDRESS, port: int = 443, state: str = "NEW", end: str = ""
) -> str:
    """What a chain does with a TCP packet: the first rule that matches decides, else the chain's policy or `end`."""
    for line in text.splitlines():
        words = line.split()
        if line.startswith(f":{chain} ") and words[1] != "-":
            end = words[1]
        if words[:2] != ["-A", chain]:
            continue
        if _matches(words[2 : words.index("-j")], to, source, port, state):
            return words[words.index("-j") + 1]
    return end


def _matches(words: list[str], to: IPv4Address, source: str, port: int, state: str) -> bool:
    good, negated = True, False
    while words:
        word = words.pop(0)
        if word == "!":
            negated = True
            continue
        value = words.pop(0)
        match word:
            case "-d":
                found = to in IPv4Network(value)
            case "-s":
                found = IPv4Address(source) in IPv4Network(value)
            case "-p":
                found = value == "tcp"
            case "--dport":
                found = port == int(value)
            case "--ctstate":
                found = state in value.split(",")
            case "-o" | "-i":
                found = value == "lo" and to.is_loopback
            case "-m":
                found = True
            case _:
                raise AssertionError(f"the interpreter does not know {word}")
        good = good and (found is not negated)
        negated = False
    return good


@settings(max_examples=400, deadline=None)
@given(policies, nodes, addresses)
def test_nothing_that_is_always_blocked_is_ever_reached(egress: Egress, node: Node, to: IPv4Address) -> None:
    blocked = [*ALWAYS_BLOCKED, WHOLE, *map(IPv4Network, node.addresses)]
    if not any(to in network for network in blocked) or to.is_loopback:
        return
    text = container_rules(ADDRESS, egress, node)
    assert verdict(text, "OUTPUT", to) in ("REJECT", "DROP")
    if str(to) not in node.resolvers:
        assert verdict(text, "OUTPUT", to, port=53) in ("REJECT", "DROP")
    # Whatever the container's own rules say, the node forwards nothing there either; its own addresses are no forward.
    if str(to) not in node.addresses or to in WHOLE:
        assert verdict(node_rules("s", node), "FAL-F-s", to, end="RETURN") == "DROP"
    assert verdict(node_rules("s", node), "FAL-I-s", to, end="RETURN") == "DROP"


@settings(max_examples=400, deadline=None)
@given(policies, nodes, addresses)
def test_the_policy_is_what_its_words_say(egress: Egress, node: Node, to: IPv4Address) -> None:
    text = container_rules(ADDRESS, egress, node)
    if any(to in IPv4Network(each) for each in map(str, [*ALWAYS_BLOCKED, WHOLE, *node.addresses])):
        return
    allow = [n for n in map(ipaddress.ip_network, egress.allow) if isinstance(n, IPv4Network)]
    deny = [n for n in map(ipaddress.ip_network, egress.deny) if isinstance(n, IPv4Network)]
    private = [n for n in PRIVATE if to in n]
    if private:
        allowed = any(to in network and any(network.subnet_of(p) for p in PRIVATE) for network in allow)
    else:
        allowed = not egress.allow or any(to in network for network in allow)
    expected = allowed and not any(to in network for network in deny)
    assert (verdict(text, "OUTPUT", to) == "ACCEPT") == expected
    if str(to) in node.resolvers and not any(to in network for network in deny):
        assert verdict(text, "OUTPUT", to, port=53) == "ACCEPT"


@settings(deadline=None)
@given(nodes, addresses, addresses)
def test_a_foreign_source_and_a_new_connection_inwards_are_dropped(
    node: Node, source: IPv4Address, to: IPv4Address
) -> None:
    text = container_rules(ADDRESS, Egress(), node)
    if str(source) != ADDRESS and not to.is_loopback:
        assert verdict(text, "OUTPUT", to, source=str(source)) == "DROP"
    if not to.is_loopback:
        assert verdict(text, "INPUT", to, source=str(source)) == "DROP"
        assert verdict(text, "INPUT", to, source=str(source), state="ESTABLISHED") == "ACCEPT"
    outside = node_rules("s", node)
    assert verdict(outside, "FAL-F-s", OURS[9], source=str(source), end="RETURN") == "DROP", "new, to a container"
    assert verdict(outside, "FAL-F-s", OURS[9], source=str(source), state="ESTABLISHED") == "ACCEPT"


def test_the_node_forwards_for_others_as_it_did_before() -> None:
    for before in (True, False):
        text = node_rules("s", Node(WHOLE, OURS, forwarded_before=before))
        one, other = IPv4Address("8.8.8.8"), "192.168.1.1"
        assert verdict(text, "FAL-F-s", one, source=other, end="RETURN") == "RETURN"
        assert verdict(text, "FAL-L-s", one, source=other, end="RETURN") == ("RETURN" if before else "DROP")
        assert verdict(text, "FAL-L-s", one, source=str(OURS[3]), end="RETURN") == "RETURN"
    assert all(len(jump.chain) <= 28 for jump in jumps("0" * 8))


@pytest.mark.parametrize(
    ("said", "upstream", "expected"),
    [
        ("nameserver 10.0.0.2\nnameserver 10.0.0.2\n", "", ("10.0.0.2",)),
        ("nameserver 127.0.0.53\noptions edns0\n", "nameserver 192.168.1.1\n", ("192.168.1.1",)),
        ("nameserver 127.0.0.1\n", "", ()),
        ("nameserver ::1\nnameserver 9.9.9.9\n# nameserver 1.1.1.1\nnameserver\n", "nameserver 8.8.8.8", ("9.9.9.9",)),
        ("".join(f"nameserver 1.0.0.{n}\n" for n in range(1, 6)), "", ("1.0.0.1", "1.0.0.2", "1.0.0.3")),
    ],
)
def test_name_servers_are_those_that_a_container_can_ask(said: str, upstream: str, expected: tuple[str, ...]) -> None:
    assert resolvers_of(said, upstream) == expected


def test_the_containers_resolv_conf_keeps_search_and_options() -> None:
    text = resolv_conf_inside(("9.9.9.9",), "nameserver 127.0.0.53\nsearch a.example b.example\noptions edns0\n")
    assert text == "nameserver 9.9.9.9\nsearch a.example b.example\noptions edns0\n"


@pytest.mark.parametrize(
    ("whole", "parts", "of"), [("10.222.0.0/16", 16, 20), ("10.9.0.0/26", 4, 28), ("10.9.0.0/28", 1, 28)]
)
def test_a_range_is_split_in_equal_parts(whole: str, parts: int, of: int) -> None:
    found = split(IPv4Network(whole), 16)
    assert len(found) == parts
    assert {part.prefixlen for part in found} == {of}
