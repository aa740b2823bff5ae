"""What neighbours of a swarm say to each other, and what the node is told of it. On the event loop.

A JOIN carries what its sender has; of an artifact that nobody has attested it carries nothing, and claims followed by
HAVE say it. `down` takes a connection out of all swarms at once; pieces that its threads still bring count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from fal_contract.errors import FalError
from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import Claim, Lease
from fal_fsd.peers.claims import Signers
from fal_fsd.peers.connection import Connection, Hub
from fal_fsd.peers.frames import (
    Busy,
    Cancel,
    Cert,
    Claims,
    Frame,
    Have,
    Join,
    LeaseTold,
    Leave,
    NotHere,
    Refused,
    Req,
)  # fmt: skip
from fal_fsd.peers.gate import expiry_s
from fal_fsd.peers.inbox import Bad, Came, Outcome
from fal_fsd.peers.routes import Routes
from fal_fsd.peers.shared import SharedPart
from fal_fsd.peers.wire import CLAIMS_PER_FRAME_MAX, WireError
from fal_fsd.ports import Part, PeerEvents

ASKED_MAX: Final = 512  # outstanding at one peer
LATER_S: Final = 0.5
JOINED_MAX: Final = 4096  # swarms


class Swarming:
    """See the module's docstring. `live`: the one connection with each node."""

    def __init__(self, hub: Hub, events: PeerEvents, routes: Routes, live: Mapping[str, Connection]) -> None:
        self._hub = hub
        self._events = events
        self._routes = routes
        self._live = live
        self._claims: dict[str, dict[int, Claim]] = {}
        self._leaving: dict[str, SharedPart] = {}

    @property
    def _signers(self) -> Signers:
        return self._hub.signers

    # What the node wants.

    def join(self, part: Part) -> None:
        """Take part; again with another part of the same artifact: from now on with that."""
        artifact_id = part.artifact.id
        old = self._hub.parts.get(artifact_id)
        if old is not None:
            if old.part is part:
                return
            self.leave(artifact_id)
        shared = self._hub.parts[artifact_id] = SharedPart(part)
        for connection in self._live.values():
            if self._may(connection, artifact_id):
                self._say_join(connection, shared, reply=False)

    def leave(self, artifact_id: str) -> None:
        """Take part no longer. No thread begins to use the part; `quiet` waits for those that do."""
        shared = self._hub.parts.pop(artifact_id, None)
        if shared is None:
            return
        shared.leave()
        self._leaving[artifact_id] = shared
        shared.when_idle(lambda: self._hub.mailbox.post(self._left, shared))
        self._claims.pop(artifact_id, None)
        for connection in self._live.values():
            connection.outbox.cancel(artifact_id)
            connection.inbox.withdraw(artifact_id)
            connection.shared.pop(artifact_id, None)
            if artifact_id in connection.joined:
                connection.joined.discard(artifact_id)
                connection.send(Leave(artifact_id))

    def _left(self, shared: SharedPart) -> None:
        if self._leaving.get(shared.artifact_id) is shared:
            del self._leaving[shared.artifact_id]

    async def quiet(self, artifact_id: str) -> None:
        """Wait until no thread touches the files of an artifact that was left."""
        shared = self._leaving.get(artifact_id)
        if shared is None:
            return
        idle = asyncio.Event()
        shared.when_idle(lambda: self._hub.mailbox.post(idle.set))
        await idle.wait()

    def renewed(self, artifact_id: str) -> None:
        """Members or tickets of a swarm have changed."""
        shared = self._hub.parts.get(artifact_id)
        if shared is None:
            return
        for connection in self._live.values():
            ticket = self._ticket(connection, artifact_id)
            joined = artifact_id in connection.joined
            if joined and ticket and ticket != connection.shown.get(artifact_id):
                self._say_join(connection, shared, reply=True)
            elif not joined and self._may(connection, artifact_id):
                self._say_join(connection, shared, reply=False)

    def ask(self, node_id: str, artifact_id: str, pieces: Sequence[int], *, urgent: bool) -> None:
        """Request pieces; what cannot be asked is refused a moment later."""
        connection = self._live.get(node_id)
        shared = connection.shared.get(artifact_id) if connection is not None else None
        if connection is None or shared is None:
            self._refuse_soon(node_id, artifact_id, pieces, 0.0)
            return
        room = max(ASKED_MAX - connection.inbox.count, 0)
        if over := pieces[room:]:
            self._refuse_soon(node_id, artifact_id, over, LATER_S)
        if asked := tuple(pieces[:room]):
            fresh = connection.inbox.ask(shared, asked)
            if fresh or urgent:
                connection.send(Req(artifact_id, asked if urgent else tuple(fresh), urgent))

    def _refuse_soon(self, node_id: str, artifact_id: str, pieces: Sequence[int], retry_s: float) -> None:
        soon = asyncio.get_running_loop().call_soon
        soon(self._events.piece_refused, node_id, artifact_id, tuple(pieces), retry_s)

    def withdraw(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None:
        """Take requests back."""
        if (connection := self._live.get(node_id)) is not None:
            self._cancel(connection, artifact_id, connection.inbox.withdraw(artifact_id, pieces))

    def tell_have(self, artifact_id: str, pieces: Sequence[int], claims: Sequence[Claim]) -> None:
        """To all who know that we take part."""
        shared = self._hub.parts.get(artifact_id)
        if shared is None:
            return
        if claims and not shared.part.artifact.attested:
            known = self._claims.setdefault(artifact_id, {})
            known.update((claim.piece, claim) for claim in claims)
        for connection in self._live.values():
            if artifact_id in connection.joined:
                self._say_claims(connection, artifact_id, claims)
                connection.outbox.have(artifact_id, pieces)

    def tell_lease(self, artifact_id: str, lease: Lease, *, ended: bool) -> None:
        """To all who know that we take part."""
        for connection in self._live.values():
            if artifact_id in connection.joined:
                connection.send(LeaseTold(artifact_id, lease, ended))

    # Connections.

    def opened(self, connection: Connection) -> None:
        """It is the one with its node from now on."""
        for artifact_id, shared in self._hub.parts.items():
            if self._may(connection, artifact_id):
                self._say_join(connection, shared, reply=False)

    def down(self, connection: Connection, reason: str) -> None:
        """It counts no longer."""
        ended, connection.shared = list(connection.shared), {}
        for artifact_id in ended:
            self._events.peer_down(connection.node_id, artifact_id, reason)

    def attested(self, connection: Connection) -> None:
        """Tell what needed claims until now and has none."""
        for artifact_id in list(connection.provisional):
            shared = self._hub.parts.get(artifact_id)
            if shared is None or artifact_id not in connection.joined:
                connection.provisional.discard(artifact_id)
            elif shared.part.artifact.attested:
                connection.provisional.discard(artifact_id)
                self._claims.pop(artifact_id, None)
                connection.outbox.have(artifact_id, shared.part.have)

    def expire(self, connection: Connection, now_wall_s: float) -> None:
        """End what only a ticket allowed that has expired."""
        for artifact_id in list(connection.shared):
            if connection.granted.get(artifact_id, 0.0) < now_wall_s and not self._routes.knows(
                connection.node_id, artifact_id
            ):
                connection.granted.pop(artifact_id, None)
                connection.joined.discard(artifact_id)
                connection.send(Leave(artifact_id))
                self._part_from(connection, artifact_id, "its ticket has expired")

    def _part_from(self, connection: Connection, artifact_id: str, reason: str) -> None:
        connection.outbox.cancel(artifact_id)
        connection.inbox.withdraw(artifact_id)
        if connection.shared.pop(artifact_id, None) is not None:
            self._events.peer_down(connection.node_id, artifact_id, reason)

    # What peers say.

    def framed(self, connection: Connection, frame: Frame) -> None:
        """A frame that is not the threads' business. Raises WireError, Overflow."""
        match frame:
            case Join():
                self._on_join(connection, frame)
            case Leave():
                self._part_from(connection, frame.artifact_id, "it left")
            case Refused():
                connection.joined.discard(frame.artifact_id)
                self._part_from(connection, frame.artifact_id, frame.reason)
            case Have() | Claims() | LeaseTold():
                if (shared := connection.shared.get(frame.artifact_id)) is not None:
                    self._on_told(connection, shared, frame)
            case Busy():
                self._refused(connection, frame.artifact_id, frame.pieces, frame.retry_ms / 1000.0)
            case NotHere():
                self._refused(connection, frame.artifact_id, frame.pieces, 0.0)
            case Req():  # it came before the JOIN that allows it was looked at
                if (shared := connection.shared.get(frame.artifact_id)) is not None:
                    connection.serve(shared, frame)
                else:
                    connection.send(NotHere(frame.artifact_id, frame.pieces))
            case _:
                raise WireError(f"{type(frame).__name__} is out of place")

    def _on_join(self, connection: Connection, frame: Join) -> None:
        artifact_id = frame.artifact_id
        fault = ""
        if frame.ticket:
            now_s = self._hub.clock.wall_s()
            fault = self._hub.gate.fault(frame.ticket, connection.node_id, artifact_id, now_s=now_s)
            if not fault and len(connection.granted) < JOINED_MAX:
                connection.granted[artifact_id] = expiry_s(frame.ticket)
        if not self._may(connection, artifact_id):
            connection.send(Refused(f"its ticket is refused: {fault}" if fault else "it shows no ticket", artifact_id))
            return
        shared = self._hub.parts.get(artifact_id)
        if shared is None:
            return  # when we join, we say so
        try:
            have = Bitmap.of_bytes(shared.lengths.count, frame.bitmap)
        except FalError as error:
            raise WireError(error.what) from None
        if not frame.reply or artifact_id not in connection.joined:
            self._say_join(connection, shared, reply=True)
        if artifact_id not in connection.shared:
            connection.shared[artifact_id] = shared
            self._events.peer_up(connection.node_id, artifact_id, have)
        elif have:
            self._events.peer_has(connection.node_id, artifact_id, tuple(have))

    def _on_told(self, connection: Connection, shared: SharedPart, frame: Have | Claims | LeaseTold) -> None:
        count, node_id = shared.lengths.count, connection.node_id
        match frame:
            case Have(artifact_id, pieces):
                if max(pieces) >= count:
                    raise WireError(f"it has piece {max(pieces)} of {count}")
                self._events.peer_has(node_id, artifact_id, pieces)
            case Claims(artifact_id, claims):
                self._events.claims_told(node_id, artifact_id, claims)
            case LeaseTold(artifact_id, lease, ended):
                if lease.first + lease.count > count:
                    raise WireError(f"its lease ends at piece {lease.first + lease.count} of {count}")
                self._events.lease_told(node_id, artifact_id, lease, ended)

    def _refused(self, connection: Connection, artifact_id: str, pieces: Sequence[int], retry_s: float) -> None:
        if ended := connection.inbox.withdraw(artifact_id, pieces):
            self._events.piece_refused(connection.node_id, artifact_id, tuple(ended), retry_s)

    def outcome(self, connection: Connection, outcome: Outcome) -> None:
        """A piece that was asked for has come, or has not."""
        artifact_id, node_id = outcome.artifact_id, connection.node_id
        if artifact_id not in self._hub.parts:
            return
        if isinstance(outcome, Came):
            self._events.piece_came(node_id, artifact_id, outcome.piece, outcome.seconds)
        elif isinstance(outcome, Bad):
            self._events.piece_bad(node_id, artifact_id, outcome.piece)
        else:
            if outcome.stop:
                self._cancel(connection, artifact_id, [outcome.piece])
            if outcome.error is not None:
                self._events.disk_failed(artifact_id, outcome.error)
            if artifact_id in connection.shared:
                self._events.piece_refused(node_id, artifact_id, (outcome.piece,), outcome.retry_s)

    # What we say.

    def _may(self, connection: Connection, artifact_id: str) -> bool:
        return artifact_id in connection.granted or self._routes.knows(connection.node_id, artifact_id)

    def _ticket(self, connection: Connection, artifact_id: str) -> bytes:
        route = self._routes.route(connection.node_id)
        return route.tickets.get(artifact_id, b"") if route is not None else b""

    def _say_join(self, connection: Connection, shared: SharedPart, *, reply: bool) -> None:
        artifact_id, part = shared.artifact_id, shared.part
        ticket = connection.shown[artifact_id] = self._ticket(connection, artifact_id)
        connection.joined.add(artifact_id)
        have = part.have
        if part.artifact.attested or not self._signers.checks:
            connection.send(Join(artifact_id, bytes(have), ticket, reply))
            return
        connection.provisional.add(artifact_id)
        connection.send(Join(artifact_id, bytes(Bitmap(have.size)), ticket, reply))
        claims = [claim for piece, claim in self._claims.get(artifact_id, {}).items() if piece in have]
        self._say_claims(connection, artifact_id, claims)
        connection.outbox.have(artifact_id, [claim.piece for claim in claims])

    def _say_claims(self, connection: Connection, artifact_id: str, claims: Sequence[Claim]) -> None:
        for signer in {claim.signer for claim in claims}:
            for der in self._signers.certs_of(signer):
                if der not in connection.certs_sent:
                    connection.certs_sent.add(der)
                    connection.send(Cert(der))
        for some in _chunks(claims, CLAIMS_PER_FRAME_MAX):
            connection.send(Claims(artifact_id, tuple(some)))

    @staticmethod
    def _cancel(connection: Connection, artifact_id: str, pieces: Sequence[int]) -> None:
        if pieces:
            connection.send(Cancel(artifact_id, tuple(pieces)))


def _chunks(claims: Sequence[Claim], size: int) -> Iterator[Sequence[Claim]]:
    return (claims[at : at + size] for at in range(0, len(claims), size))


__all__ = ["ASKED_MAX", "Swarming"]
