"""The bulk port of a node: implements `fal_fsd.ports.Peers` over the connections of `fal_fsd.peers.connection`.

Everything here runs on the event loop and never blocks; bytes move in the connections' threads. One connection a pair
of nodes carries all artifacts, data both ways, whoever dialled. Both sides say JOIN for a swarm; each gets `peer_up`
when it has joined and heard the other's JOIN. A peer may join a swarm when its ticket for it is good, or when the
scheduler told us that it is a member. Deadlines are watched over by `tick`, which calls itself.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_contract.ids import random_suffix
from fal_fsd.core.messages import Claim, Lease, Place
from fal_fsd.core.rates import BandwidthLimits, RateMeter, link_class
from fal_fsd.peers.address import PeerAddress
from fal_fsd.peers.claims import Signers
from fal_fsd.peers.connection import Connection, Dial, Hub
from fal_fsd.peers.frames import Frame, Meta, Ping
from fal_fsd.peers.gate import Gate, TlsMode
from fal_fsd.peers.inbox import Outcome
from fal_fsd.peers.mailbox import Mailbox
from fal_fsd.peers.manifests import Manifests, Source
from fal_fsd.peers.outbox import Overflow
from fal_fsd.peers.pacer import Pacer
from fal_fsd.peers.routes import Routes
from fal_fsd.peers.sockets import Contexts
from fal_fsd.peers.swarming import Swarming
from fal_fsd.peers.wire import WireError
from fal_fsd.ports import Part, PeerEvents

CONNECTIONS_MAX: Final = 64
GREETING_MAX: Final = 32  # accepted and not let in yet; the oldest makes room
DIALS_MAX: Final = 16  # at once
GREETING_TIMEOUT_S: Final = 10.0
STALL_TIMEOUT_S: Final = 20.0
PING_S: Final = 10.0
SILENCE_MAX_S: Final = 25.0
LAST_WORD_S: Final = 1.0  # to read why it ends
TICK_S: Final = 0.5
RENEWAL_S: Final = 120.0  # in which peers are told new tickets once a scheduler is back
METERS_MAX: Final = 1024
ENDED_KEPT: Final = 8
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the bulk port is bound. `tls`: it can speak TLS; the first byte says whether a caller does."""

    host: str
    port: int
    tls: bool


@dataclass(frozen=True, slots=True)
class PeerLine:
    """One connected peer. `rate_bytes_s`: measured towards us; `asked`: pieces outstanding at it; `queued`: at us."""

    node_id: str
    tls: bool
    dialled: bool
    rate_bytes_s: float
    bytes_received: int
    bytes_sent: int
    asked: int
    queued: int
    swarms: int


@dataclass(frozen=True, slots=True)
class PeersStatus:
    """`unreachable`: members that were dialled and did not answer; `dropped`: node id → reason."""

    peers: tuple[PeerLine, ...]
    unreachable: tuple[str, ...]
    dropped: dict[str, str]
    bytes_sent: int
    bytes_received: int


class PeerNet:
    """See the module's docstring. `identity`: asked at each handshake, so a renewed certificate is used; None: clear
    text only, and claims are not checked. `listen`: (host, port), port 0: any; None: it only dials.
    `manifest_source(id)` is called in a thread."""

    def __init__(
        self,
        *,
        node_id: str,
        events: PeerEvents,
        clock: Clock,
        rng: random.Random,
        identity: Callable[[], Identity] | None = None,
        ca_pem: bytes | None = None,
        cluster_id: str = "",
        limits: BandwidthLimits | None = None,
        listen: tuple[str, int] | None = ("127.0.0.1", 0),
        tls: TlsMode = "auto",
        place: Place | None = None,
        manifest_source: Source | None = None,
    ) -> None:
        self.node_id = node_id
        self._clock = clock
        self._identity = identity
        self._listen = listen
        self._place = place or Place(node_id)
        now = identity() if identity is not None else None
        gate = Gate(node_id, now.peer.cluster_id if now else cluster_id, tls=tls, identified=now is not None)
        self.pacer = Pacer(limits or BandwidthLimits(), clock)
        contexts = Contexts(identity) if identity is not None else None
        signers = Signers(ca_pem or (now.ca_pem if now else None))
        cache_id = f"f-{random_suffix(rng, 8)}"
        self._hub = Hub(node_id, cache_id, gate, signers, contexts, self.pacer, clock, Mailbox(), self)
        self._gate = gate
        self._routes = Routes(node_id, rng.uniform)
        self._manifests = Manifests(manifest_source)
        self._live: dict[str, Connection] = {}
        self._swarming = Swarming(self._hub, events, self._routes, self._live)
        self._all: set[Connection] = set()
        self._ended: deque[Connection] = deque(maxlen=ENDED_KEPT)  # their threads may not be quite gone
        self._meters: dict[str, RateMeter] = {}
        self._listeners: list[socket.socket] = []
        self._timer: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._started = self._closing = False
        self._cert_pem = b""
        self._renewed_from_s: float | None = float("-inf")
        self._sent_before = 0
        self._received_before = 0

    async def start(self) -> list[Listening]:
        """Listen. Raises UNAVAILABLE when the port is taken."""
        self._loop = asyncio.get_running_loop()
        self._hub.mailbox.bind(self._loop)
        self._started = True
        bound = [] if self._listen is None else [self._bind(*self._listen)]
        self.tick()
        return bound

    def _bind(self, host: str, port: int) -> Listening:
        try:
            listener = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
            )
        except OSError as error:
            raise FalError(
                Code.UNAVAILABLE,
                f"the bulk port {host}:{port} cannot be opened: {error.strerror}",
                remedy="Choose another with --bulk-port, or 0 for any.",
                field="bulk_port",
            ) from None
        listener.setblocking(False)
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._accept, listener)
        return Listening(host, listener.getsockname()[1], tls=self._hub.contexts is not None)

    async def close(self) -> None:
        """Say goodbye and end all threads. Idempotent."""
        self._closing = True
        if not self._started:
            return
        if self._timer is not None:
            self._timer.cancel()
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        for artifact_id in list(self._hub.parts):
            self._swarming.leave(artifact_id)
        for connection in list(self._all):
            connection.finish("the node stops")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._until_empty(), LAST_WORD_S)
        for connection in list(self._all):
            connection.abort("the node stops")
        await self._until_empty()
        for connection in self._ended:
            connection.join_threads(LAST_WORD_S)  # they have told their end: this is the rest of it
        await self._manifests.close()

    async def _until_empty(self) -> None:
        while self._all:
            self._empty.clear()
            await self._empty.wait()

    # What the scheduler says.

    def set_ticket_keys(self, keys: Sequence[bytes]) -> None:
        """Under which callers' tickets are checked, the current first."""
        self._gate.keys = tuple(keys)

    def set_trusted_network(self, trusted: bool) -> None:
        """Whether clear text is taken from callers of whom we were not told (CacheWelcome.trusted_network)."""
        self._gate.trusted_network = trusted or self._identity is None

    def set_place(self, place: Place) -> None:
        """Where this node is: decides which limit holds for a link."""
        self._place = place
        for connection in self._live.values():
            self._classify(connection)

    def set_scheduled(self, scheduled: bool) -> None:
        """Whether somebody renews tickets; while not, and a moment after, what stands does not end for an old one."""
        if not scheduled or self._renewed_from_s is None:
            self._renewed_from_s = self._clock.monotonic_s() + RENEWAL_S if scheduled else None

    def set_members(self, artifact_id: str, members: Sequence[PeerAddress]) -> None:
        """Who is in this swarm, as a whole; who can be dialled is, once we have joined it."""
        self._routes.set_members(artifact_id, members, self._clock.monotonic_s())
        self._gate.members_tls = self._routes.members_tls()
        self._swarming.renewed(artifact_id)
        self._wake()

    # ports.Peers

    def join(self, part: Part) -> None:
        self._swarming.join(part)
        self._wake()

    def leave(self, artifact_id: str) -> None:
        self._swarming.leave(artifact_id)

    def ask(self, node_id: str, artifact_id: str, pieces: Sequence[int], *, urgent: bool) -> None:
        self._swarming.ask(node_id, artifact_id, pieces, urgent=urgent)

    def withdraw(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None:
        self._swarming.withdraw(node_id, artifact_id, pieces)

    def tell_have(self, artifact_id: str, pieces: Sequence[int], claims: Sequence[Claim] = ()) -> None:
        if claims:
            self._show_certificate()
        self._swarming.tell_have(artifact_id, pieces, claims)

    def tell_lease(self, artifact_id: str, lease: Lease, *, ended: bool) -> None:
        self._swarming.tell_lease(artifact_id, lease, ended=ended)

    def drop(self, node_id: str, reason: str) -> None:
        self._routes.ban(node_id, reason, self._clock.monotonic_s())
        self._set_banned()
        if (connection := self._live.pop(node_id, None)) is not None:
            self._swarming.down(connection, reason)
            connection.finish(f"dropped: {reason}")

    # Beyond the port.

    async def quiet(self, artifact_id: str) -> None:
        """After `leave`: wait until no thread is in the part; then it may be closed. No peer can delay it."""
        await self._swarming.quiet(artifact_id)

    async def fetch_manifest(self, node_id: str, id: str) -> bytes:
        """A manifest by artifact id or digest (64 hexadecimal digits), unchecked. NOT_FOUND, UNAVAILABLE, TIMEOUT."""
        connection = self._live.get(node_id)
        if connection is None:
            raise FalError(Code.UNAVAILABLE, f"{node_id} is not connected", remedy="Ask another node.")
        return await self._manifests.fetch(connection, id)

    def status(self) -> PeersStatus:
        """As it is now."""
        lines = [
            PeerLine(
                node_id, c.tls, c.dialled, c.inbox.meter.rate_bytes_s, c.bytes_received, c.bytes_sent, c.inbox.count,
                c.outbox.jobs, len(c.shared),
            )
            for node_id, c in sorted(self._live.items())
        ]  # fmt: skip
        return PeersStatus(
            tuple(lines),
            tuple(self._routes.unreachable),
            {node_id: reason for node_id, (reason, _) in self._routes.banned.items()},
            self._sent_before + sum(c.bytes_sent for c in self._all),
            self._received_before + sum(c.bytes_received for c in self._all),
        )

    def rate_of(self, node_id: str) -> float:
        """Measured bytes per second from this node, 0 before the first piece."""
        meter = self._meters.get(node_id)
        return meter.rate_bytes_s if meter is not None else 0.0

    # connection.Hooks

    def opened(self, connection: Connection) -> None:
        node_id = connection.node_id
        if self._closing or node_id in self._routes.banned:
            connection.finish("dropped" if node_id in self._routes.banned else "the node stops")
            return
        old = self._live.get(node_id)
        if old is None and len(self._live) >= CONNECTIONS_MAX:
            connection.finish("too many connections")
            return
        if old is not None:
            loser = old if self._newer_stays(old, connection) else connection
            self._swarming.down(loser, "another connection stays")
            loser.finish("another connection stays")
            if loser is connection:
                return
        self._live[node_id] = connection
        self._routes.answered(node_id)
        self._classify(connection)
        while node_id not in self._meters and len(self._meters) >= METERS_MAX:
            del self._meters[next(iter(self._meters))]
        connection.inbox.meter = self._meters.setdefault(node_id, RateMeter())
        self._swarming.opened(connection)

    def framed(self, connection: Connection, frame: Frame) -> None:
        if self._live.get(connection.node_id) is not connection:
            return
        try:
            if isinstance(frame, Meta):
                self._manifests.framed(connection, frame)
            else:
                self._swarming.framed(connection, frame)
        except (WireError, Overflow) as error:
            del self._live[connection.node_id]
            self._swarming.down(connection, str(error))
            connection.finish(str(error))

    def outcome(self, connection: Connection, outcome: Outcome) -> None:
        self._swarming.outcome(connection, outcome)

    def closed(self, connection: Connection, reason: str) -> None:
        self._all.discard(connection)
        self._ended.append(connection)
        self._sent_before += connection.bytes_sent
        self._received_before += connection.bytes_received
        self._empty.set()
        if self._live.get(connection.node_id) is connection:
            del self._live[connection.node_id]
        self._swarming.down(connection, reason)
        self._manifests.closed(connection, reason)
        now_s = self._clock.monotonic_s()
        if connection.node_id:
            self._routes.ended(
                connection.node_id, now_s, dialled=connection.dialled, reached=connection.reached,
                lived_s=now_s - connection.begun_s if connection.open else 0.0,
            )  # fmt: skip
            if connection.lied:
                self._routes.ban(connection.node_id, reason, now_s)
                self._set_banned()
        _LOG.info("connection with %s ended: %s", connection.node_id or "a caller", reason)
        self._wake()

    # Deadlines.

    def tick(self) -> None:
        """Look after connections, and dial who is due."""
        if self._closing:
            return
        now_s, wall_s = self._clock.monotonic_s(), self._clock.wall_s()
        for connection in list(self._all):
            self._watch(connection, now_s, wall_s)
        if self._routes.lift_bans(now_s):
            self._set_banned()
        self._dial_due(now_s)
        self._schedule(now_s)

    def _watch(self, connection: Connection, now_s: float, wall_s: float) -> None:
        if connection.closing_s is not None:
            if now_s - connection.closing_s > LAST_WORD_S:
                connection.abort("it did not end by itself")
            return
        if not connection.open:
            if now_s - connection.begun_s > GREETING_TIMEOUT_S:
                connection.abort(f"no greeting within {GREETING_TIMEOUT_S:.0f} s")
            return
        sending_s = connection.sending_since_s
        if now_s - connection.last_heard_s > SILENCE_MAX_S:
            connection.abort(f"silent for {SILENCE_MAX_S:.0f} s")
        elif sending_s is not None and now_s - sending_s > SILENCE_MAX_S:
            connection.abort(f"took nothing for {SILENCE_MAX_S:.0f} s")
        elif connection.inbox.silent_s() > STALL_TIMEOUT_S:
            connection.abort(f"stalled: nothing of what was asked came for {STALL_TIMEOUT_S:.0f} s")
        elif now_s - connection.last_sent_s >= PING_S and sending_s is None:
            connection.last_sent_s = now_s
            connection.send(Ping())
        self._swarming.attested(connection)
        if self._renewed_from_s is not None and now_s >= self._renewed_from_s:
            self._swarming.expire(connection, wall_s)

    def _dial_due(self, now_s: float) -> None:
        parts = self._hub.parts
        dials = sum(1 for connection in self._all if connection.dialled and not connection.open)
        room = min(DIALS_MAX - dials, CONNECTIONS_MAX - len(self._live))
        for route in list(self._routes.due(now_s, self._live.__contains__, parts.__contains__))[: max(room, 0)]:
            route.dialling = True
            tickets = self._routes.tickets_of(route, parts.__contains__)
            dial = Dial(route.node_id, route.endpoints, self._gate.dials_tls(route.tls), tickets)
            self._begin(Connection(self._hub, dial=dial))

    def _schedule(self, now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due_s = self._routes.next_at_s(self._live.__contains__)
        wait_s = TICK_S if due_s is None else min(max(due_s - now_s, 0.02), TICK_S)
        self._timer = self._loop.call_later(wait_s, self.tick)

    def _wake(self) -> None:
        """Somebody may be dialled now."""
        if self._started and not self._closing:
            now_s = self._clock.monotonic_s()
            self._dial_due(now_s)
            self._schedule(now_s)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return  # the caller is gone, or descriptors are short: the tick closes who does not greet
        greeting = [c for c in self._all if not c.open and not c.dialled]
        if len(greeting) >= GREETING_MAX:
            min(greeting, key=lambda c: c.begun_s).abort("others want to come in")
        self._begin(Connection(self._hub, accepted=sock))

    def _begin(self, connection: Connection) -> None:
        self._all.add(connection)
        connection.start()

    def _newer_stays(self, old: Connection, new: Connection) -> bool:
        """Both sides come to the same answer: of two dialled by different sides, the one of the smaller node id."""
        if old.dialled == new.dialled:
            return True
        return new.dialled == (self.node_id < new.node_id)

    def _classify(self, connection: Connection) -> None:
        if (route := self._routes.route(connection.node_id)) is not None:
            connection.link = link_class(self._place, route.place)

    def _set_banned(self) -> None:
        self._gate.banned = {node_id: reason for node_id, (reason, _) in self._routes.banned.items()}

    def _show_certificate(self) -> None:
        """Our own claims can be checked by others."""
        if self._identity is not None and (pem := self._identity().cert_pem) != self._cert_pem:
            self._hub.signers.add_pem(pem)
            self._cert_pem = pem


__all__ = ["Listening", "PeerLine", "PeerNet", "PeersStatus"]
