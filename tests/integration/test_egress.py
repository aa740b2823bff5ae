"""Egress for real: what containers reach and what not, both walls, and what every kind of end leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.driver_cases import oci_missing
from egress_world import METADATA, NAMES, NODE, NODE_PRIVATE, PRIVATE, PUBLIC, TRY, World, world
from fal_agent.probe import UnixProber
from fal_contract.errors import Code, FalError
from fal_runtime import host_image
from fal_runtime.driver import ContainerSpec, Egress
from fal_runtime.network.egress import EgressNetwork, Settings
from fal_runtime.network.namespaces import command, inside
from fal_runtime.network.policy import Network
from fal_runtime.network.reach import Port, close
from fal_runtime.network.subnets import claim
from fal_runtime.oci.driver import OciDriver
from fal_runtime.process_supervisor import start_ticks

pytestmark = [
    pytest.mark.root,
    pytest.mark.netns,
    pytest.mark.skipif(not Path("/usr/lib/cni/ptp").exists(), reason="needs containernetworking-plugins"),
]
PYTHON = host_image.this_layout().python
NO = "no: "


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    tmp_path.chmod(0o711)
    with world(tmp_path) as made:
        yield made
        close()
        assert made.leftovers() == []


async def _tried(driver: OciDriver, id: str) -> dict[str, str]:
    status = await driver.wait(id)
    lines = [line.text async for line in driver.logs(id, tail_lines=50, follow=False)]
    assert status.exit_code == 0, lines
    found: dict[str, str] = json.loads(lines[-1])
    return found


def _spec(name: str, *targets: str, allow: tuple[str, ...] = (), deny: tuple[str, ...] = ()) -> ContainerSpec:
    argv = (PYTHON, "-c", TRY, *targets)
    return ContainerSpec(f"{name}-{os.urandom(4).hex()}", argv, network="egress", egress=Egress(allow, deny))


@pytest.mark.oci
@pytest.mark.skipif(bool(oci_missing()), reason="no containers here")
def test_a_container_reaches_what_its_policy_names_and_nothing_of_the_node(here: World, tmp_path: Path) -> None:
    async def main() -> tuple[list[dict[str, str]], str]:
        driver = OciDriver(tmp_path / "state", run_dir=tmp_path / "run")
        try:
            found = await driver.probe()
            assert "egress" in found.features, found.details
            other = ContainerSpec("other", (PYTHON, "-m", "http.server", "80"), network="egress")
            await driver.create(other)
            await driver.start("other")
            address = _address(tmp_path)
            targets = (f"{PUBLIC}:8080", "any.example:8080", f"{METADATA}:8080", f"{PRIVATE}:8080", f"{NODE}:9000",
                       f"{NODE_PRIVATE}:9000", "10.222.0.1:9000", f"{address}:80", "127.0.0.1:9000")  # fmt: skip
            specs = [
                _spec("all", *targets),
                _spec("only", *targets, allow=(f"{PRIVATE}/32",)),
                _spec("denied", *targets, allow=("192.168.77.0/24", "0.0.0.0/0"), deny=(f"{PRIVATE}/32",)),
                _spec("bold", *targets, allow=(f"{METADATA}/32", "10.222.0.0/16", f"{NODE}/32", "127.0.0.0/8")),
            ]
            status = await driver.status("other")
            assert status is not None
            assert status.pid is not None
            inner = Port(80, status.pid, start_ticks(status.pid))
            async with asyncio.timeout(30):  # its port is reached inside, although nothing reaches its address
                while await UnixProber().ask(inner, "/", 20):  # noqa: ASYNC110  (another process)
                    await asyncio.sleep(0.02)
            for spec in specs:
                await driver.create(spec)
                await driver.start(spec.id)
            return [await _tried(driver, spec.id) for spec in specs], address
        finally:
            await driver.clean(frozenset())
            driver.close()

    (everything, only, denied, bold), other = here.run(main())
    assert everything.pop(f"{PUBLIC}:8080") == f"reached {NODE}", "under the node's address"
    assert everything.pop("any.example:8080") == f"reached {NODE}", "by name"
    assert only.pop(f"{PRIVATE}:8080") == f"reached {NODE_PRIVATE}"
    assert denied.pop(f"{PUBLIC}:8080").startswith("reached")
    assert denied.pop("any.example:8080").startswith("reached")
    left = [*everything.items(), *only.items(), *denied.items(), *bold.items()]
    assert [(target, what) for target, what in left if not what.startswith(NO)] == []
    assert any(target.startswith(other) for target, _ in left)


@pytest.mark.oci
@pytest.mark.skipif(bool(oci_missing()), reason="no containers here")
def test_a_container_sees_its_own_interfaces_and_the_nodes_name_servers(here: World, tmp_path: Path) -> None:
    look = "ls /sys/class/net; cat /etc/resolv.conf; echo 1 > /sys/class/net/eth0/mtu; grep -cv lo /proc/net/if_inet6"
    spec = ContainerSpec("look", ("/bin/sh", "-c", f"({look}) 2>&1; ip link del eth0 2>&1; exit 0"), network="egress")

    async def main() -> list[str]:
        driver = OciDriver(tmp_path / "state", run_dir=tmp_path / "run")
        try:
            await driver.create(spec)
            await driver.start(spec.id)
            await driver.wait(spec.id)
            return [line.text async for line in driver.logs(spec.id, tail_lines=50, follow=False)]
        finally:
            await driver.clean(frozenset())
            driver.close()

    eth0, lo, server, search, write, inet6, delete = here.run(main())
    assert [eth0, lo, server, search] == ["eth0", "lo", f"nameserver {NAMES}", "search example"]
    assert "Read-only" in write or "Permission denied" in write
    assert inet6 == "0", "no IPv6 that a packet could leave by"
    assert "Operation not permitted" in delete


def _address(folder: Path) -> str:
    (result,) = (folder / "run").glob("net-*/result/other")
    address: str = json.loads(result.read_text())["ips"][0]["address"].partition("/")[0]
    return address


def test_without_its_own_rules_a_container_still_meets_the_nodes(here: World, tmp_path: Path) -> None:
    """As root in its namespace, which no container is: rules flushed, and another source address taken."""
    network = EgressNetwork(tmp_path, "s1")

    def look() -> tuple[dict[str, str], list[bytes]]:
        one, two = network.open("one", Egress()), network.open("two", Egress())
        for chain in ("OUTPUT", "INPUT"):
            for setup in (one, two):
                inside(setup.netns, lambda c=chain: command(("iptables", "-w", "-P", c, "ACCEPT")))  # type: ignore[misc]
                inside(setup.netns, lambda c=chain: command(("iptables", "-w", "-F", c)))  # type: ignore[misc]
        server = inside(two.netns, lambda: subprocess.Popen([sys.executable, "-m", "http.server", "80"]))
        try:
            targets = (f"{PUBLIC}:8080", f"{METADATA}:8080", f"{NODE}:9000", "10.222.0.1:9000", f"{two.address}:80")
            free = here.tries(one.netns, *targets)

            came = _heard_outside(here, one.netns)
        finally:
            server.kill()
            server.wait()
            network.clean(frozenset())
        return free, came

    free, came = inside(here.node, look)
    assert free.pop(f"{PUBLIC}:8080") == f"reached {NODE}"
    assert [what for what in free.values() if not what.startswith(NO)] == []
    assert came == [b"honest"], "what was sent before it, from addresses that are not its own, went nowhere"


def _heard_outside(here: World, netns: Path) -> list[bytes]:
    """What comes out of packets with false sources and, after them, an honest one."""

    def send() -> None:
        for source in ("10.222.0.77", "10.222.0.3", "8.8.8.8", ""):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                if source:
                    command(("ip", "address", "add", f"{source}/32", "dev", "eth0"))
                    sock.bind((source, 0))
                sock.sendto(source.encode() or b"honest", (PUBLIC, 8081))

    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((PUBLIC, 8081))
        sock.settimeout(10)
        return sock

    with inside(here.outside, listen) as heard:
        inside(netns, send)
        came = [heard.recv(64)]
        while came[-1] != b"honest":
            came.append(heard.recv(64))
        return came


@pytest.mark.parametrize("step", ["create", "add", "rules", "close"])
def test_what_a_killed_agent_leaves_is_found_and_taken_away(here: World, tmp_path: Path, step: str) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
from fal_runtime.driver import Egress
from fal_runtime.network import egress, namespaces
network = egress.EgressNetwork(Path({str(tmp_path)!r}), "s1")
network.open("kept", Egress())
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def after(owner, name):
    real = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: (real(*a, **k), die()))
match {step!r}:
    case "create":
        after(namespaces, "create")
    case "add":
        after(egress.Plugins, "add")
    case "rules":
        after(namespaces, "inside")
    case "close":
        network.open("lost", Egress())
        after(egress.Plugins, "delete")
        network.close("lost")
network.open("lost", Egress())
"""

    def look() -> tuple[int, list[str], str, list[str]]:
        ended = subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode
        after = EgressNetwork(tmp_path, "s1")
        words = after.clean(frozenset({"kept"}))
        kept = here.tries(after.netns("kept"), f"{PUBLIC}:8080", f"{METADATA}:8080")
        assert kept[f"{METADATA}:8080"].startswith(NO)
        after.check("kept")
        return ended, words, kept[f"{PUBLIC}:8080"], after.clean(frozenset())

    ended, words, kept, last = inside(here.node, look)
    assert ended == -signal.SIGKILL
    assert words[0] == "network of lost"
    assert kept == f"reached {NODE}", "what is kept goes on"
    assert last == ["network of kept"]
    assert not list(tmp_path.glob("net-*"))


def test_why_a_node_has_no_egress_is_said(here: World, tmp_path: Path) -> None:
    def look() -> tuple[str, str, str]:
        missing = EgressNetwork(tmp_path, "s1", Settings(plugin_folders=("/nowhere",))).probe()
        command(("ip", "route", "add", "10.222.64.0/24", "dev", "lan0"))
        clash = EgressNetwork(tmp_path, "s1").probe()
        elsewhere = EgressNetwork(tmp_path, "s1", Settings(subnet="10.223.0.0/24")).probe()
        return missing, clash, elsewhere

    missing, clash, elsewhere = inside(here.node, look)
    assert "CNI plugin ptp is not in /nowhere" in missing
    assert "10.222.64.0/24 dev lan0" in clash
    assert "--egress-subnet" in clash
    assert elsewhere == ""
    assert not list(tmp_path.glob("net-*"))


def test_rules_that_somebody_flushed_are_back_with_the_next_container(here: World, tmp_path: Path) -> None:
    network = EgressNetwork(tmp_path, "s1")

    switch = Path("/proc/sys/net/ipv4/ip_forward")

    def look() -> tuple[str, str]:
        switch.write_text("0")  # a new namespace takes over what its machine had set
        network.open("one", Egress())
        forwarding = switch.read_text().strip()
        for table in ("filter", "nat"):
            command(("iptables", "-w", "-t", table, "-F"))
        two = network.open("two", Egress())
        reached = here.tries(two.netns, f"{PUBLIC}:8080")[f"{PUBLIC}:8080"]
        network.clean(frozenset())
        assert switch.read_text().strip() == "0", "as it was before"
        return forwarding, reached

    assert inside(here.node, look) == ("1", f"reached {NODE}")


def test_agents_of_one_node_take_different_parts_of_the_range(tmp_path: Path) -> None:
    whole, journal = Network("10.9.0.0/26"), tmp_path / "claims.json"
    owners = [tmp_path / str(number) for number in range(4)]
    for owner in owners:
        owner.mkdir()
    held = [claim(journal, owner, whole) for owner in owners]
    assert len(set(held)) == 4
    assert [claim(journal, owner, whole) for owner in owners] == held, "the same when asked again"
    with pytest.raises(FalError) as full:
        claim(journal, tmp_path / "late", whole)
    assert full.value.code is Code.NO_CAPACITY
    owners[2].rmdir()
    assert claim(journal, tmp_path / "late", whole) == held[2], "whose owner is gone is free"


def test_agents_that_begin_and_end_together_leave_the_node_as_it_was(here: World, tmp_path: Path) -> None:
    def look() -> tuple[list[str], str]:
        agents = [EgressNetwork(tmp_path, f"s{number}") for number in range(4)]
        said: list[str] = []
        # A thread begins in the namespace of the thread that starts it.
        threads = [threading.Thread(target=lambda a=a: said.append(a.probe() + a.probe())) for a in agents]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return said, Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()

    assert inside(here.node, look) == (["", "", "", ""], "0")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("net-")) == []
