"""Network namespaces around one router, for end-to-end tests: links, masquerade, cuts, and a door from outside.

`with network() as net` makes namespaces named after this process, and deletes them whatever happened. Nothing is added
to the namespace that the tests run in: what must be reached from it goes through a `Door`, a listener on loopback whose
outgoing connections are made inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_COUNTER = itertools.count()
ROUTER, CORE = "router", "core"
CORE_ADDRESS = "10.77.0.1"
MTU = 1400
IDLE_CUT_S = 30
BURST_BYTES = 64 << 10
_QUEUE_MS = 100


class Network:
    """A router namespace and others, each on a link of its own to it."""

    def __init__(self) -> None:
        self._prefix = f"fe2e-{os.getpid()}-{next(_COUNTER)}"
        self._made: list[str] = []
        self._doors: list[Door] = []

    def file(self, name: str) -> Path:
        """What setns() and nsenter take."""
        return Path("/run/netns") / f"{self._prefix}-{name}"

    def enter(self, name: str) -> list[str]:
        """Words before a command that make it run inside; mounts and cgroups stay those of the machine."""
        return ["nsenter", f"--net={self.file(name)}"]

    def inside(self, name: str, *command: str) -> str:
        """Run a short command inside. Raises AssertionError with what it said."""
        return _run(*self.enter(name), *command)

    def make(self) -> None:
        """The router and the core, where scheduler and gateway are."""
        forget_dead_runs()
        self._namespace(ROUTER)
        self.inside(ROUTER, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.attach(CORE, "10.77.0", mtu=1500)

    def attach(self, name: str, net: str, *, mtu: int = 1500) -> str:
        """A namespace with the address NET.1/24, its default route through the router at NET.254; returns it."""
        self._namespace(name)
        port = f"to-{name}"
        own = ["ip", "-n", self.file(name).name]
        router = ["ip", "-n", self.file(ROUTER).name]
        _run(*own, "link", "add", "eth0", "mtu", str(mtu), "type", "veth",
             "peer", "name", port, "mtu", str(mtu), "netns", self.file(ROUTER).name)  # fmt: skip
        _run(*own, "addr", "add", f"{net}.1/24", "dev", "eth0")
        _run(*router, "addr", "add", f"{net}.254/24", "dev", port)
        _run(*own, "link", "set", "eth0", "up")
        _run(*router, "link", "set", port, "up")
        _run(*own, "route", "add", "default", "via", f"{net}.254")
        return f"{net}.1"

    def behind_masquerade(self, name: str, net: str) -> str:
        """As `attach`, behind a NAT that lets nothing in, has MTU 1400 and forgets connections idle for 30 s."""
        address = self.attach(name, net, mtu=MTU)
        self.inside(ROUTER, "iptables", "-t", "nat", "-A", "POSTROUTING", "-s", f"{net}.0/24", "-j", "MASQUERADE")
        for rule in (
            ["-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"],
            ["-o", f"to-{name}", "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP"],
        ):
            self.inside(ROUTER, "iptables", "-A", "FORWARD", *rule)
        for key, value in (("timeout_established", IDLE_CUT_S), ("loose", 0)):
            self.inside(ROUTER, "sysctl", "-qw", f"net.netfilter.nf_conntrack_tcp_{key}={value}")
        return address

    def shape(self, name: str, *, up_bytes_s: float, down_bytes_s: float) -> None:
        """Bound what the namespace sends and receives, in bytes per second with the heads of packets; again: anew.

        Packets leave in bundles of half a burst, as network cards take them: one by one they only cost CPU.
        """
        bundle = "gso_max_size", str(BURST_BYTES // 2)
        _run("ip", "-n", self.file(name).name, "link", "set", "dev", "eth0", *bundle)
        words = ("qdisc", "replace", "dev"), ("root", "tbf", "burst", str(BURST_BYTES), "latency", f"{_QUEUE_MS}ms")
        for namespace, device, rate in ((name, "eth0", up_bytes_s), (ROUTER, f"to-{name}", down_bytes_s)):
            _run("tc", "-n", self.file(namespace).name, *words[0], device, *words[1], "rate", f"{round(rate * 8)}bit")

    def sent_bytes(self, name: str) -> int:
        """What the namespace has sent so far, with the heads of packets."""
        told = json.loads(_run("ip", "-n", self.file(name).name, "-s", "-j", "link", "show", "eth0"))
        return int(told[0]["stats64"]["tx"]["bytes"])

    def cut(self, name: str) -> None:
        """Pull the plug: the router's end of the link goes down."""
        _run("ip", "-n", self.file(ROUTER).name, "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        _run("ip", "-n", self.file(ROUTER).name, "link", "set", f"to-{name}", "up")

    def block(self, name: str, port: int) -> None:
        """Drop what a namespace sends to this TCP port and what comes back, and nothing else."""
        for rule in self._rules(name, port):
            self.inside(ROUTER, "iptables", "-I", "FORWARD", *rule)

    def unblock(self, name: str, port: int) -> None:
        for rule in self._rules(name, port):
            self.inside(ROUTER, "iptables", "-D", "FORWARD", *rule)

    def _rules(self, name: str, port: int) -> list[list[str]]:
        tcp = ["-p", "tcp", "-j", "DROP"]
        return [["-i", f"to-{name}", *tcp, "--dport", str(port)], ["-o", f"to-{name}", *tcp, "--sport", str(port)]]

    def door(self, name: str, port: int) -> int:
        """A port of our own loopback that leads to a port of loopback inside."""
        door = Door(self.file(name), port)
        self._doors.append(door)
        return door.port

    def socket(self, name: str) -> socket.socket:
        """A TCP socket that lives inside; the caller closes it."""
        with entered(self.file(name)):
            return socket.socket()

    def delete(self) -> None:
        """Doors and namespaces, with everything in them."""
        for door in self._doors:
            door.close()
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)

    def _namespace(self, name: str) -> None:
        full = self.file(name).name
        _run("ip", "netns", "add", full)
        self._made.append(full)
        _run("ip", "-n", full, "link", "set", "lo", "up")


def forget_dead_runs() -> None:
    """Remove the names of namespaces and the empty cgroups that a killed test process left. Nothing is ended."""
    left = [*Path("/run/netns").glob("fe2e-*"), *Path("/sys/fs/cgroup").glob("*/fe2e-*")]
    for path in left:
        if Path(f"/proc/{path.name.split('-')[1]}").exists():
            continue
        if path.parent.name == "netns":
            subprocess.run(["ip", "netns", "del", path.name], check=False, timeout=30)
        else:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextmanager
def network() -> Iterator[Network]:
    """Router and core; deleted at the end."""
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.delete()


@contextmanager
def entered(namespace: Path) -> Iterator[None]:
    """This thread is in another network namespace; sockets made meanwhile stay there."""
    libc = ctypes.CDLL(None, use_errno=True)

    def move(fd: int) -> None:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")

    with open("/proc/thread-self/ns/net", "rb") as home, namespace.open("rb") as there:
        move(there.fileno())
        try:
            yield
        finally:
            move(home.fileno())


class Door:
    """Listens on our loopback, connects to loopback inside a namespace, and passes bytes; a thread of its own."""

    def __init__(self, namespace: Path, target: int) -> None:
        self._namespace = namespace
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name=f"door-{target}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])
        self._thread.join(10)

    def _run(self) -> None:
        accepting = self._loop.create_task(self._accept())
        self._tasks.add(accepting)
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(accepting)
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._listener.close()
        self._loop.close()

    async def _accept(self) -> None:
        while True:
            outer, _ = await self._loop.sock_accept(self._listener)
            task = self._loop.create_task(self._pass(outer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, outer: socket.socket) -> None:
        with entered(self._namespace):
            inner = socket.socket()
        inner.setblocking(False)
        outer.setblocking(False)
        with outer, inner:
            try:
                await self._loop.sock_connect(inner, ("127.0.0.1", self._target))
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._copy(outer, inner))
                    both.create_task(self._copy(inner, outer))
            except* OSError:
                pass

    async def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        while data := await self._loop.sock_recv(source, 1 << 16):
            await self._loop.sock_sendall(sink, data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
