"""One connection of the bulk port: a thread that receives, one that sends, and what both sides have agreed on.

The receiving thread dials or takes the accepted socket over, shakes hands, reads frames and writes pieces; the sending
thread drains the outbox. What decisions are made of is told to the event loop through the mailbox, in order; at most
EVENTS_MAX of one connection wait there, then its receiving thread waits. Nobody but these threads blocks on the socket;
`Hooks.closed` is the last that is told of a connection, and then both have ended.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from fal_contract.clock import Clock
from fal_contract.errors import FalError
from fal_contract.identity import PeerIdentity, Role
from fal_fsd.core.rates import LinkClass
from fal_fsd.peers import sockets
from fal_fsd.peers.claims import BadClaim, Claimed, Signers
from fal_fsd.peers.frames import (
    Busy,
    Bye,
    Cancel,
    Cert,
    Claims,
    DataHead,
    Frame,
    Hello,
    HelloOk,
    NotHere,
    Ping,
    Pong,
    Refused,
    Req,
)  # fmt: skip
from fal_fsd.peers.gate import Gate, Refusal
from fal_fsd.peers.inbox import Inbox, Outcome
from fal_fsd.peers.mailbox import Mailbox
from fal_fsd.peers.outbox import Job, Outbox, Overflow
from fal_fsd.peers.pacer import Fit, Pacer
from fal_fsd.peers.reader import Reader
from fal_fsd.peers.shared import URGENT, SharedPart
from fal_fsd.peers.wire import BLOCK_BYTES_MAX, Decoder, WireError, encode
from fal_fsd.ports import Part

CONNECT_TIMEOUT_S: Final = 5.0
ADDRESSES_MAX: Final = 4  # tried of one peer
EVENTS_MAX: Final = 256
PACED_BLOCK_BYTES: Final = 256 << 10  # where a limit holds: smooth
BUSY_RETRY_MS: Final = 500
_LOG = logging.getLogger(__name__)


class Hooks(Protocol):
    """Told on the event loop, in order for each connection."""

    def opened(self, connection: Connection) -> None: ...

    def framed(self, connection: Connection, frame: Frame) -> None: ...

    def outcome(self, connection: Connection, outcome: Outcome) -> None: ...

    def closed(self, connection: Connection, reason: str) -> None: ...


@dataclass(slots=True)
class Hub:
    """What all connections of a node share."""

    node_id: str
    cache_id: str
    gate: Gate
    signers: Signers
    contexts: sockets.Contexts | None
    pacer: Pacer
    clock: Clock
    mailbox: Mailbox
    hooks: Hooks
    parts: dict[str, SharedPart] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dial:
    """Whom to call. `tickets`: shown in the first frame."""

    node_id: str
    endpoints: tuple[tuple[str, int], ...]
    tls: bool
    tickets: tuple[tuple[str, bytes], ...] = field(repr=False)


class Connection:
    """See the module's docstring. `shared`: artifacts whose swarm both sides have joined, kept by the loop."""

    def __init__(self, hub: Hub, *, dial: Dial | None = None, accepted: socket.socket | None = None) -> None:
        self.dialled = dial is not None
        self.node_id = dial.node_id if dial is not None else ""
        self.granted: dict[str, float] = {}  # the peer's good tickets: artifact id → until when
        self.shared: dict[str, SharedPart] = {}
        self.joined: set[str] = set()  # what we have told it that we take part in
        self.provisional: set[str] = set()  # joined before it was attested: what has no claim was not told
        self.shown: dict[str, bytes] = {}  # our tickets that it has seen
        self.certs_sent: set[bytes] = set()
        self.link = LinkClass.OTHER
        self.gives_only = False  # an operator's push
        self.tls = False
        self.open = False
        self.reached = False  # the other side answered, be it with a refusal
        self.lied = False  # it showed what nobody of this cluster signed
        self.closing_s: float | None = None
        self.begun_s = self.last_heard_s = self.last_sent_s = hub.clock.monotonic_s()
        self.sending_since_s: float | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self.outbox = Outbox(hub.clock.monotonic_s)
        self.inbox = Inbox("", self._tell_outcome, self._expect, hub.clock.monotonic_s)
        self.decoder = Decoder()
        self._hub = hub
        self._dial = dial
        self._sock = accepted
        self._aborted = False
        self._reason = ""
        self._claimed: dict[str, Claimed] = {}
        self._room = threading.Semaphore(EVENTS_MAX)
        self._fit = Fit(BLOCK_BYTES_MAX)
        self._reader: Reader | None = None
        self._sender: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="peer-receive", daemon=True)

    # Called on the event loop.

    def start(self) -> None:
        """Begin to connect or to listen to the other side."""
        self._thread.start()

    def send(self, frame: Frame) -> None:
        """Put a frame; a peer that does not read is given up."""
        try:
            self.outbox.send(frame)
        except Overflow as error:
            self.abort(str(error))

    def finish(self, reason: str) -> None:
        """Say why, then end. `abort` must follow after a while: the peer may not read."""
        if self.closing_s is None:
            self.closing_s = self._hub.clock.monotonic_s()
            self._reason = self._reason or reason
            self.outbox.finish(Bye(reason))
            if not self.open:
                self.abort(reason)

    def abort(self, reason: str) -> None:
        """End at once."""
        self._reason = self._reason or reason
        self._aborted = True
        self.outbox.close()
        if (sock := self._sock) is not None:
            sockets.shut_down(sock)

    def join_threads(self, timeout_s: float) -> bool:
        """Wait for both threads; whether they have ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # The receiving thread.

    def _run(self) -> None:
        stream: sockets.Stream | None = None
        reason = "the peer closed the connection"
        try:
            stream, peer = self._connect()
            self._read(stream, peer)
        except (WireError, Refusal, BadClaim, Overflow, FalError) as error:
            reason = str(error)
            self.lied = isinstance(error, BadClaim)
            self._say_last(stream, error)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        except Exception as error:  # a bug of ours must not leave the connection half alive
            _LOG.exception("a connection of the bulk port failed")
            reason = f"internal error: {error!r}"
        self._end(stream, self._reason or reason)

    def _say_last(self, stream: sockets.Stream | None, error: Exception) -> None:
        """Best effort: the other side's operator reads why."""
        if self.open:
            self.outbox.finish(Bye(str(error)))
        elif stream is not None and not self.dialled:
            with suppress(OSError):
                stream.send(encode(Refused(str(error) if isinstance(error, Refusal) else "not understood")))

    def _end(self, stream: sockets.Stream | None, reason: str) -> None:
        if self._sender is not None:
            self._sender.join(0.2)  # a last word may be on its way
        self.outbox.close()
        if (sock := self._sock) is not None:
            sockets.shut_down(sock)
        if self._sender is not None:
            self._sender.join()
        if self._reader is not None:
            self._reader.close()
        self.inbox.end()
        if stream is not None:
            stream.close()
        if sock is not None:
            sock.close()
        self._hub.mailbox.post(self._hub.hooks.closed, self, reason)

    def _connect(self) -> tuple[sockets.Stream, PeerIdentity | None]:
        if self._dial is not None:
            sock = self._reach(self._dial.endpoints)
            tls: bool | None = self._dial.tls
        else:
            assert self._sock is not None
            sock = self._hold(self._sock)
            tls = sockets.starts_tls(sock)
        if tls is None:
            raise OSError("the peer closed the connection")
        if not tls:
            return sockets.PlainStream(sock), None
        if self._hub.contexts is None:
            raise Refusal("this node has no certificate, it speaks clear text only")
        context = self._hub.contexts.client() if self.dialled else self._hub.contexts.server()
        self.tls = True
        return sockets.shake_hands(sock, context, server=not self.dialled, hold=self._hold)

    def _reach(self, endpoints: Sequence[tuple[str, int]]) -> socket.socket:
        """Connect to the first address that answers."""
        failure = OSError("the peer has no address")
        for host, port in endpoints[:ADDRESSES_MAX]:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                failure = error
                continue
            for family, kind, protocol, _, address in found[:ADDRESSES_MAX]:
                if self._aborted:
                    raise OSError(self._reason)
                sock = self._hold(socket.socket(family, kind, protocol))
                try:
                    sock.settimeout(CONNECT_TIMEOUT_S)
                    sock.connect(address)
                    sock.settimeout(None)
                    return sock
                except OSError as error:
                    sock.close()
                    failure = error
        raise failure

    def _hold(self, sock: socket.socket) -> socket.socket:
        """From now on this is what `abort` shuts down."""
        self._sock = sock
        if self._aborted:
            sockets.shut_down(sock)
        return sock

    def _read(self, stream: sockets.Stream, peer: PeerIdentity | None) -> None:
        if self._dial is not None:
            hub = self._hub
            stream.send(encode(Hello(hub.gate.cluster_id, hub.node_id, hub.cache_id, self._dial.tickets)))
        self._reader = Reader(stream, self._heard)
        while data := self._reader.read():
            for item in self.decoder.feed(data):
                if isinstance(item, memoryview):
                    self.bytes_received += len(item)
                    self.inbox.data(item)
                elif self.open:
                    self._on_frame(item)
                else:
                    self._on_greeting(item, stream, peer)

    def _heard(self) -> None:
        self.last_heard_s = self._hub.clock.monotonic_s()

    def _on_greeting(self, frame: Frame, stream: sockets.Stream, peer: PeerIdentity | None) -> None:
        hub, now_s = self._hub, self._hub.clock.wall_s()
        self.reached = True
        if isinstance(frame, Hello) and not self.dialled:
            self.granted = hub.gate.admit(frame, peer, now_s=now_s)
            self.node_id = frame.node_id
            self.gives_only = peer is not None and peer.role is not Role.NODE
            self.outbox.send(HelloOk(hub.node_id, hub.cache_id))
        elif isinstance(frame, HelloOk) and self.dialled:
            hub.gate.check_answer(frame, peer, self.node_id, now_s=now_s)
        elif isinstance(frame, Refused | Bye) and self.dialled:
            raise Refusal(f"refused by {self.node_id}: {frame.reason}")
        else:
            raise WireError(f"{type(frame).__name__} is no greeting")
        self.inbox.source = self.node_id
        self.open = True
        self._sender = threading.Thread(target=self._send, args=(stream,), name="peer-send", daemon=True)
        self._sender.start()
        self._post(hub.hooks.opened, self)

    def _on_frame(self, frame: Frame) -> None:
        match frame:
            case DataHead():
                self.inbox.head(frame)
            case Req() if (shared := self.shared.get(frame.artifact_id)) is not None:
                self.serve(shared, frame)
            case Cancel():
                self.outbox.cancel(frame.artifact_id, frame.pieces)
            case Cert():
                self._hub.signers.add(frame.der)
            case Claims():
                self._on_claims(frame)
            case Ping():
                self.outbox.send(Pong())
            case Pong():
                pass
            case Hello() | HelloOk():
                raise WireError("a second greeting")
            case Bye():
                raise OSError(f"{self.node_id} closed: {frame.reason}")
            case _:
                self._post(self._hub.hooks.framed, self, frame)

    def serve(self, shared: SharedPart, frame: Req) -> None:
        """Queue what is asked for; refuse the rest at once. Also called on the loop. Raises WireError."""
        absent, busy = [], []
        rank = URGENT if frame.urgent else shared.rank
        with shared.use() as part:
            for piece in frame.pieces:
                if piece >= shared.lengths.count:
                    raise WireError(f"it asks for piece {piece} of {shared.lengths.count}")
                if part is None or self.gives_only or not part.has(piece):
                    absent.append(piece)
                elif not self.outbox.want(shared, piece, shared.lengths.length(piece), rank):
                    busy.append(piece)
        if absent:
            self.outbox.send(NotHere(frame.artifact_id, tuple(absent)))
        if busy:
            self.outbox.send(Busy(frame.artifact_id, tuple(busy), BUSY_RETRY_MS))

    def _on_claims(self, frame: Claims) -> None:
        """Check signatures here: they take the processor's time, not the loop's."""
        shared = self._hub.parts.get(frame.artifact_id)
        if shared is None or shared.part.artifact.attested or not self._hub.signers.checks:
            return
        claimed = self._claimed.get(frame.artifact_id)
        if claimed is None or claimed.of is not shared:
            claimed = self._claimed[frame.artifact_id] = Claimed(shared)
        for claim in frame.claims:
            self._hub.signers.check(frame.artifact_id, claim)
            claimed.note(claim.piece, claim.digest)
        self._post(self._hub.hooks.framed, self, frame)

    def _expect(self, part: Part, piece: int) -> tuple[bool, bytes | None]:
        """Whether a piece may be taken, and the digest that it must have; None: the attested one, or any."""
        if part.artifact.attested or not self._hub.signers.checks:
            return True, None
        claimed = self._claimed.get(part.artifact.id)
        digest = claimed.digest(piece) if claimed is not None else None
        return digest is not None, digest

    def _tell_outcome(self, outcome: Outcome) -> None:
        self._post(self._hub.hooks.outcome, self, outcome)

    def _post(self, call: Callable[..., None], *told: object) -> None:
        while not self._room.acquire(timeout=0.5):
            if self._aborted:
                return  # the end is told all the same
        self._hub.mailbox.post(self._posted, call, told)

    def _posted(self, call: Callable[..., None], told: tuple[object, ...]) -> None:
        self._room.release()
        call(*told)

    # The sending thread.

    def _send(self, stream: sockets.Stream) -> None:
        try:
            while (work := self.outbox.take()) is not None:
                frames, job = work
                if frames:
                    self._send_frames(stream, frames)
                if job is not None:
                    self._send_block(stream, job)
        except (OSError, Overflow) as error:
            self.abort(f"sending failed: {error}")
        except Exception as error:
            _LOG.exception("a connection of the bulk port failed")
            self.abort(f"internal error: {error!r}")
        finally:
            self.outbox.close()
            if (sock := self._sock) is not None:
                sockets.shut_down(sock, socket.SHUT_WR)  # what was sent is still read

    def _send_frames(self, stream: sockets.Stream, frames: bytes) -> None:
        self.sending_since_s = self._hub.clock.monotonic_s()
        stream.send(frames)
        self.sending_since_s, self.last_sent_s = None, self._hub.clock.monotonic_s()

    def _send_block(self, stream: sockets.Stream, job: Job) -> None:
        """One block of a piece. While a limit holds it back, frames go on."""
        paced = self._hub.pacer.limited(self.link)
        length = min(PACED_BLOCK_BYTES if paced else BLOCK_BYTES_MAX, self._fit.block_bytes, job.length - job.sent)
        if paced:
            start_s = self._hub.clock.monotonic_s() + self._hub.pacer.take(self.link, length)
            while frames := self.outbox.frames_until(start_s):
                self._send_frames(stream, frames)
            if frames is None or job.cancelled:
                return
        with job.shared.use() as part:
            place = part.locate(job.piece) if part is not None else None
            # A descriptor of our own: the part may be closed while a slow peer takes the block.
            fd = os.dup(place[0]) if place is not None else -1
        if place is None:
            self.outbox.give_up(job)
            self.outbox.send(NotHere(job.shared.artifact_id, (job.piece,)))
            return
        try:
            head = DataHead(job.shared.artifact_id, job.piece, job.sent, length, job.sent + length == job.length)
            begun_s = self.sending_since_s = self._hub.clock.monotonic_s()
            stream.send_file(encode(head), fd, place[1] + job.sent, length, self._progress)
        finally:
            os.close(fd)
        self.sending_since_s, self.last_sent_s = None, self._hub.clock.monotonic_s()
        if self._fit.sent(length, self.last_sent_s - begun_s):
            stream.bound_unsent(min(self._fit.block_bytes, sockets.UNSENT_BYTES_MAX))
        self.bytes_sent += length
        self.outbox.advance(job, length)

    def _progress(self) -> None:
        self.sending_since_s = self._hub.clock.monotonic_s()
