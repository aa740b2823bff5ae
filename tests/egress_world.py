"""A node and the world outside it, as two network namespaces of this test; nothing of the machine's own is touched.

    outside  198.51.100.10 (public), 169.254.169.254 (metadata), 198.51.100.53 (name server), 192.168.77.1 (private)
             TCP 8080 says the caller's address; UDP 53 answers every name with 198.51.100.10
    node     203.0.113.2 (default route), 192.168.77.2; TCP 9000 is a daemon of the node

`World.run` runs a coroutine with its loop in the node's namespace, so a driver there makes its rules there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fal_runtime.network import namespaces, node_view
from fal_runtime.network.namespaces import command, inside

PUBLIC, METADATA, PRIVATE, NAMES = "198.51.100.10", "169.254.169.254", "192.168.77.1", "198.51.100.53"
NODE, NODE_PRIVATE = "203.0.113.2", "192.168.77.2"
TIMEOUT_S = 60.0

T = TypeVar("T")

_OUTSIDE = f"""
import socket, threading
def tcp():
    server = socket.create_server(("0.0.0.0", 8080))
    print("ready", flush=True)
    while True:
        conn, peer = server.accept()
        with conn:
            conn.sendall(peer[0].encode())
def udp():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("{NAMES}", 53))
    while True:
        asked, peer = sock.recvfrom(2048)
        end = asked.index(b"\\0", 12) + 5
        kind = asked[end - 4:end - 2]
        good = kind == b"\\0\\1"
        answer = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4" + socket.inet_aton("{PUBLIC}") if good else b""
        head = asked[:2] + b"\\x81\\x80\\0\\1" + (b"\\0\\1" if good else b"\\0\\0") + b"\\0\\0\\0\\0"
        sock.sendto(head + asked[12:end] + answer, peer)
threading.Thread(target=udp, daemon=True).start()
tcp()
"""
_DAEMON = """
import socket
server = socket.create_server(("0.0.0.0", 9000))
print("ready", flush=True)
while True:
    server.accept()[0].close()
"""
# Run in a container: tries every address and name given, all at once; prints what came of each.
TRY = """
import json, socket, sys, concurrent.futures as f
def reach(target):
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.5) as sock:
            return "reached " + sock.recv(64).decode()
    except OSError as error:
        return "no: " + type(error).__name__
with f.ThreadPoolExecutor(16) as pool:
    print(json.dumps(dict(zip(sys.argv[1:], pool.map(reach, sys.argv[1:])))), flush=True)
"""


class World:
    """See the module's docstring."""

    def __init__(self, folder: Path) -> None:
        self.node, self.outside = folder / "node", folder / "outside"

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run on a loop in the node's namespace, for a bounded time."""

        async def bounded() -> T:
            async with asyncio.timeout(TIMEOUT_S):
                return await main

        return inside(self.node, lambda: asyncio.run(bounded()))

    def leftovers(self) -> list[str]:
        """Interfaces and rules of ours on the node."""

        def look() -> list[str]:
            links = [link["ifname"] for link in json.loads(command(("ip", "-json", "link", "show")))]
            rules = [line for line in command(("iptables-save",)).splitlines() if "FAL-" in line]
            return sorted({*links} - {"lo", "up0", "lan0"}) + rules

        return inside(self.node, look)

    def tries(self, netns: Path, *targets: str) -> dict[str, str]:
        """What a process in this namespace reaches, without a container around it."""
        said = inside(netns, lambda: command((sys.executable, "-c", TRY, *targets)))
        found: dict[str, str] = json.loads(said)
        return found


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """Make the namespaces and their servers; end them whatever happened."""
    made = World(folder)
    before = node_view.RESOLV_CONF
    resolv_conf = folder / "resolv.conf"
    resolv_conf.write_text(f"nameserver {NAMES}\nsearch example\n")
    with contextlib.ExitStack() as stack:
        for path in (made.node, made.outside):
            namespaces.create(path, {})
            stack.callback(namespaces.delete, path)
        _wire(made)
        for path, program in ((made.outside, _OUTSIDE), (made.node, _DAEMON)):
            stack.enter_context(_server(path, program))
        vars(node_view)["RESOLV_CONF"] = resolv_conf
        stack.callback(vars(node_view).__setitem__, "RESOLV_CONF", before)
        yield made


def _wire(made: World) -> None:
    def ip(*words: str) -> None:
        command(("ip", *words))

    def node() -> None:
        for name, address in (("up0", NODE), ("lan0", NODE_PRIVATE)):
            ip("link", "add", name, "type", "veth", "peer", "name", name, "netns", str(made.outside))
            ip("address", "add", f"{address}/24", "dev", name)
            ip("link", "set", name, "up")

    def outside() -> None:
        for name, address in (("up0", "203.0.113.1"), ("lan0", PRIVATE)):
            ip("address", "add", f"{address}/24", "dev", name)
            ip("link", "set", name, "up")
        for address in (PUBLIC, METADATA, NAMES):
            ip("address", "add", f"{address}/32", "dev", "lo")

    inside(made.node, node)
    inside(made.outside, outside)
    inside(made.node, lambda: ip("route", "add", "default", "via", "203.0.113.1"))


@contextlib.contextmanager
def _server(netns: Path, program: str) -> Iterator[None]:
    process = inside(netns, lambda: subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE))
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
