"""Bulk ports of several nodes on loopback, each other's members, with tickets as the scheduler makes them."""

from __future__ import annotations

import asyncio
import functools
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fal_contract.artifact import Artifact
from fal_contract.clock import ManualClock, SystemClock
from fal_contract.identity import Identity, Role
from fal_contract.ticket import make_ticket, node_key
from fal_fsd.core.messages import Place
from fal_fsd.core.rates import BandwidthLimits
from fal_fsd.peers.address import PeerAddress
from fal_fsd.peers.frames import Bye, Frame, Hello, HelloOk, Join
from fal_fsd.peers.net import PeerNet
from fal_fsd.peers.wire import Decoder, encode
from fal_scheduler.ca import CertificateAuthority
from fsd_fakes import Contents, FakePart, RecordingEvents

SECRET = b"s" * 32
CLUSTER = "c-000000000000"
TICKET_S = 3600.0


class MovedClock(ManualClock):
    """The machine's clock, which a test moves on."""

    def __init__(self) -> None:
        super().__init__(wall_s=0.0)
        self._real = SystemClock()

    def wall_s(self) -> float:
        return self._real.wall_s() + super().wall_s()

    def monotonic_s(self) -> float:
        return self._real.monotonic_s() + super().monotonic_s()


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine function."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


def key_of(node_id: str) -> bytes:
    """The ticket key of a node."""
    return node_key(SECRET, node_id, 1)


def ticket(clock: ManualClock, artifact_id: str, *, caller: str, at: str, for_s: float = TICKET_S) -> bytes:
    """What the scheduler tells `caller` to show at node `at`."""
    return make_ticket(key_of(at), caller=caller, artifact_id=artifact_id, expires_s=clock.wall_s() + for_s)


class Ca:
    """A throw-away CA."""

    def __init__(self, folder: Path, clock: ManualClock) -> None:
        self._clock = clock
        self.ca = CertificateAuthority.create(folder, cluster_id=CLUSTER, now_s=clock.wall_s())

    def identity(self, name: str, role: Role = Role.NODE) -> Identity:
        """A fresh certificate."""
        return self.ca.new_identity(role=role, name=name, now_s=self._clock.wall_s())


class Node:
    """One node: its port, part and events."""

    def __init__(
        self, rig: Rig, node_id: str, part: FakePart, identity: Identity | None, limits: BandwidthLimits
    ) -> None:
        self.node_id = node_id
        self.part = part
        self.events = RecordingEvents()
        self.identity = identity
        self.manifests: dict[str, bytes] = {}
        self.port = 0
        self.place = Place(node_id, pool="p", region="r")
        self.net = PeerNet(
            node_id=node_id,
            events=self.events,
            clock=rig.clock,
            rng=random.Random(f"{rig.seed}/{node_id}"),
            identity=self._identity if identity is not None else None,
            cluster_id=CLUSTER,
            limits=limits,
            place=self.place,
            manifest_source=self.manifests.get,
        )

    def _identity(self) -> Identity:
        assert self.identity is not None
        return self.identity


class Rig:
    """All nodes of a test. Its clock can be moved."""

    def __init__(self, artifact: Artifact, contents: Contents) -> None:
        self.artifact = artifact
        self.contents = contents
        self.clock = MovedClock()
        self.nodes: dict[str, Node] = {}
        self.seed = 7

    @property
    def id(self) -> str:
        return self.artifact.id

    async def add(
        self,
        node_id: str,
        pieces: Sequence[int] | None = (),
        *,
        artifact: Artifact | None = None,
        identity: Identity | None = None,
        limits: BandwidthLimits | None = None,
        join: bool = True,
    ) -> Node:
        """A node that has these pieces (None: all), listens and takes part."""
        part = FakePart(artifact or self.artifact, self.contents, pieces)
        node = self.nodes[node_id] = Node(self, node_id, part, identity, limits or BandwidthLimits())
        (bound,) = await node.net.start()
        node.port = bound.port
        node.net.set_ticket_keys([key_of(node_id)])
        if join:
            node.net.join(part)
        return node

    def address(self, to: Node, *, caller: str, dial: bool = True, tls: bool = False) -> PeerAddress:
        """A member as the scheduler tells it to `caller`."""
        endpoints = (("127.0.0.1", to.port),) if dial else ()
        shown = ticket(self.clock, self.id, caller=caller, at=to.node_id)
        return PeerAddress(to.node_id, endpoints, shown, self.clock.wall_s() + TICKET_S, tls, to.place)

    def meet(self, *dialling: tuple[str, str], tls: bool = False) -> None:
        """Tell all of all others; only these (caller, dialled) pairs dial. Without any: everybody."""
        for node in self.nodes.values():
            members = [
                self.address(
                    other, caller=node.node_id, dial=not dialling or (node.node_id, other.node_id) in dialling, tls=tls
                )
                for other in self.nodes.values()
                if other is not node
            ]
            node.net.set_members(self.id, members)

    async def up(self, *node_ids: str) -> None:
        """Wait until each of these sees every other."""
        for me in node_ids:
            for other in node_ids:
                if me != other:
                    await self.nodes[me].events.until(functools.partial(_is_up, other))

    async def close(self) -> None:
        """All of them."""
        for node in self.nodes.values():
            await node.net.close()
        for node in self.nodes.values():
            node.part.close()


@asynccontextmanager
async def rig(artifact: Artifact, contents: Contents) -> AsyncIterator[Rig]:
    """Close what was opened, also after a failure."""
    made = Rig(artifact, contents)
    try:
        yield made
    finally:
        await made.close()


def _is_up(other: str, events: RecordingEvents) -> bool:
    return bool(events.named("peer_up", other))


class RawPeer:
    """The other side of a connection, by hand; blocking, so used through `asyncio.to_thread`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(20.0)
        self.sock = sock
        self.decoder = Decoder()
        self.decoder.meta_allowed = True
        self.got: list[Frame | bytes] = []

    @classmethod
    def dial(cls, port: int) -> RawPeer:
        return cls(socket.create_connection(("127.0.0.1", port), timeout=20.0))

    def send(self, *frames: Frame | bytes) -> None:
        self.sock.sendall(b"".join(frame if isinstance(frame, bytes) else encode(frame) for frame in frames))

    def read_until(self, done: Callable[[Frame | bytes], bool]) -> Frame | bytes | None:
        """The first thing for which `done` is true; None at the end of the connection."""
        while True:
            for at, item in enumerate(self.got):
                if done(item):
                    del self.got[: at + 1]
                    return item
            self.got.clear()
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.got = [bytes(x) if isinstance(x, memoryview) else x for x in self.decoder.feed(memoryview(data))]

    def read(self, kind: type[Frame]) -> Frame | None:
        """The next frame of this kind."""
        found = self.read_until(lambda item: isinstance(item, kind))
        assert not isinstance(found, bytes)
        return found

    def greet(self, rig: Rig, to: Node, *, caller: str = "raw", shown: bytes | None = None) -> Frame | None:
        """HELLO with a good ticket (or `shown`); what comes back."""
        good = ticket(rig.clock, rig.id, caller=caller, at=to.node_id) if shown is None else shown
        self.send(Hello(CLUSTER, caller, "f-raw", ((rig.id, good),)))
        found = self.read_until(lambda item: not isinstance(item, bytes))
        assert not isinstance(found, bytes)
        return found

    def join(self, rig: Rig, bitmap: bytes) -> None:
        """Greeted already: say what is here, and wait until the other side has, too."""
        self.send(Join(rig.id, bitmap))
        self.read(Join)

    def close(self) -> None:
        self.sock.close()

    def ended(self) -> str:
        """Read to the end; what BYE said, if anything."""
        last = self.read_until(lambda item: isinstance(item, Bye))
        return last.reason if isinstance(last, Bye) else ""


__all__ = ["CLUSTER", "Ca", "HelloOk", "Node", "RawPeer", "Rig", "key_of", "on_loop", "rig", "ticket"]
