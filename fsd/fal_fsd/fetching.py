"""Bringing the pieces of one artifact: applies what core.swarm decides, tells it what happened.

Invariants: `decide` runs after every event and when the swarm asks for it, never twice for one; nothing is asked for
outside of `run`; when `run` ends, no read of the origin goes on. A full disk ends it with `Full`, what nobody can
bring with its FalError. Used by fal_fsd.transfer.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote

from fal_contract.errors import Code, FalError
from fal_contract.pieces import Bitmap
from fal_contract.telemetry import get_logger
from fal_fsd.claims import ClaimBook
from fal_fsd.core.messages import (
    ORIGIN,
    Ask,
    Claim,
    DropPeer,
    Lease,
    Member,
    ReadOrigin,
    StopOrigin,
    Tell,
    Withdraw,
)
from fal_fsd.core.swarm import Swarm
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.reading import Cancelled
from fal_fsd.lease_reads import LeaseReads, OriginReader
from fal_fsd.order import Order
from fal_fsd.origin import parse_uri
from fal_fsd.ports import Part
from fal_fsd.tally import Tally
from fal_fsd.tools import Tools

_ORIGIN_BAD_MAX: Final = 2  # so often may the same piece come wrong from the origin
_HOPELESS_AFTER_S: Final = 30.0  # members are known, but none of them brings anything
_ALONE_AFTER_S: Final = 5.0  # the scheduler may still name some
_MEET_MAX_S: Final = 1.0  # for the first neighbour …
_MEET_OTHERS_S: Final = 0.3  # … and then for the others
_TICK_S: Final = 1.0
# What the origin will say again, however often it is asked.
_FINAL: Final = frozenset(
    {
        Code.CONFLICT, Code.NOT_FOUND, Code.INVALID, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.CORRUPT,
        Code.FAILED_PRECONDITION,
    }
)  # fmt: skip
_log = get_logger("fsd.fetching")


class Full(FalError):
    """The disk is full; nothing is lost, and it goes on once there is room."""


class FetchingEvents(Protocol):
    """What it tells its transfer."""

    model: str
    tally: Tally
    claims: ClaimBook

    def arrived(self, piece: int, source: str, claims: Sequence[Claim] = ()) -> None: ...

    def vouch(self, piece: int, digest: bytes) -> list[Claim]: ...

    def tell(self) -> None: ...


class Fetching:
    """See the module's docstring. The methods named as in ports.PeerEvents are called with what peers tell."""

    def __init__(self, part: Part, raw: DiskPart, events: FetchingEvents, tools: Tools) -> None:
        """`raw`: the part as the store knows it, for copies on this machine."""
        self._part = part
        self._raw = raw
        self._events = events
        self._tools = tools
        self._now_s = tools.clock.monotonic_s
        self._members: tuple[list[Member], bool, int] | None = None
        self._readers: set[int] = set()
        self._kick = asyncio.Event()
        self.order = Order(self._now_s, self._kick.set)  # in which pieces come
        self._swarm = self._new_swarm()
        self._joined = False
        self._up: dict[str, int] = {}  # connected peers and how much they have
        self._error: Exception | None = None
        self._origin: OriginReader | None = None
        self._reads: LeaseReads | None = None
        self._copy: asyncio.Task[None] | None = None
        self._bad: dict[int, int] = {}
        self.origin_error: FalError | None = None
        self._moved_s = self._now_s()
        self._join()

    # ---- what it is

    @property
    def read(self) -> bool:
        """A reader waits for a piece."""
        return bool(self._readers)

    @property
    def connected(self) -> list[str]:
        """Peers of this swarm."""
        return sorted(self._up)

    @property
    def waits_for(self) -> str:
        """What holds it up; empty while bytes come."""
        if self._events.tally.rate_bytes_s:
            return ""
        if self.origin_error is not None:
            return f"a peer that has it; the origin: {self.origin_error}"
        return self._swarm.waits_for

    @property
    def bytes_read(self) -> int:
        """What left the origin for this node, aborted ranges included."""
        return self._origin.bytes_read if self._origin is not None else 0

    # ---- running

    async def run(self) -> None:
        """Until all pieces are here. Raises Full, or what ends the transfer."""
        self._error = None
        self._join()
        self._begin_origin()
        self._moved_s = self._now_s()
        try:
            await self._meet()
            while not self._events.tally.complete:
                self._kick.clear()
                self._go_alone()
                self._apply()
                if self._error is not None:
                    raise self._error
                self._check_hope()
                await self._wait()
        finally:
            await self._halt()

    async def close(self) -> None:
        """Let go of the origin. The part stays joined: its pieces are served."""
        await self._halt()
        if self._origin is not None:
            origin, self._origin, self._reads = self._origin, None, None
            await origin.close()

    async def _meet(self) -> None:
        """Shake hands first: what peers have, and which leases they hold, is known before the origin is read."""
        began_s, first_s = self._now_s(), float("inf")
        while self._tools.news.scheduled and not self._readers:
            told = None if self._members is None else [member.node_id for member in self._members[0]]
            if told is not None and all(node_id in self._up for node_id in told):
                return
            now_s = self._now_s()
            first_s = min(first_s, now_s) if self._up else first_s
            until_s = min(began_s + _MEET_MAX_S, first_s + _MEET_OTHERS_S)
            if now_s >= until_s:
                return
            self._kick.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until_s - now_s):
                    await self._kick.wait()

    async def _wait(self) -> None:
        next_s = self._swarm.next_at_s
        wait_s = _TICK_S if next_s is None else min(_TICK_S, max(next_s - self._now_s(), 0.0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._kick.wait()

    async def _halt(self) -> None:
        """End everything that is asked for. A later run begins with a swarm of its own, from what is on disk."""
        if self._copy is not None:
            self._copy.cancel()
            await asyncio.gather(self._copy, return_exceptions=True)
            self._copy = None
        if self._reads is not None:
            await self._reads.close()
        if not self._events.tally.complete and self._joined:
            self._tools.peers.leave(self._part.artifact.id)
            self._joined = False
            self._up.clear()
            self._swarm = self._new_swarm()

    def _join(self) -> None:
        if not self._joined:
            self._joined = True
            self._tools.peers.join(self._part)

    def _new_swarm(self) -> Swarm:
        lengths = [span.length for span in self._part.artifact.layout.spans()]
        swarm = Swarm(self._tools.place(), lengths, self._part.have)
        self.order.tell(swarm)
        self._tell_members(swarm)
        if self._readers:
            swarm.wanted(sorted(self._readers), True)
        return swarm

    def _apply(self) -> None:
        artifact_id, peers = self._part.artifact.id, self._tools.peers
        for action in self._swarm.decide(self._now_s()):
            match action:
                case Ask(node_id, pieces, urgent):
                    peers.ask(node_id, artifact_id, pieces, urgent=urgent)
                case Withdraw(node_id, pieces):
                    peers.withdraw(node_id, artifact_id, pieces)
                case ReadOrigin(lease, pieces):
                    self._read_origin(lease, pieces)
                case StopOrigin(lease):
                    if self._reads is not None:
                        self._reads.stop(lease)
                case Tell(lease, ended):
                    peers.tell_lease(artifact_id, lease, ended=ended)
                case DropPeer(node_id, reason):
                    self._tools.news.event("BAD_PEER", node_id, f"{self._events.model}: {reason}")
                    peers.drop(node_id, reason)

    def _check_hope(self) -> None:
        """Raise the origin's error when nobody else can bring what is missing."""
        if self.origin_error is None or self._copy is not None:
            return
        others = bool(self._up) or (self._members is not None and bool(self._members[0]))
        patience_s = _HOPELESS_AFTER_S if others else _ALONE_AFTER_S if self._tools.news.scheduled else 0.0
        if self._now_s() - self._moved_s >= patience_s:
            raise self.origin_error

    # ---- the origin

    def _begin_origin(self) -> None:
        uri = self._part.artifact.uri
        if uri.startswith("file:"):
            self._swarm.origin_available(False)
            if self._copy is None and self.origin_error is None:
                self._copy = asyncio.create_task(self._copy_in(uri), name=f"copy {uri}")
        elif uri.startswith("push:") or self.origin_error is not None:
            self._swarm.origin_available(False)
        elif self._origin is None:
            try:
                self._origin = self._tools.open_origin(uri)
            except FalError as exc:
                self._origin_lost(exc)
            else:
                self._reads = LeaseReads(self._part, self._origin, self, now_s=self._now_s)

    def _read_origin(self, lease: Lease, pieces: Sequence[int]) -> None:
        if self._reads is not None and self.origin_error is None:
            self._reads.start(lease, pieces)
            return
        error = self.origin_error or FalError(Code.UNAVAILABLE, "there is no origin here", remedy="A peer brings it.")
        self.origin_failed(lease, error, _TICK_S)

    async def _copy_in(self, uri: str) -> None:
        """The folder is on this machine: copy it, checked like everything."""
        stop, loop = threading.Event(), asyncio.get_running_loop()
        looking = False

        def look() -> None:
            nonlocal looking
            looking = False
            self._found_local()

        def on_bytes(_: int) -> None:
            nonlocal looking
            if not looking:
                looking = True
                loop.call_soon_threadsafe(look)

        try:
            folder = Path(unquote(parse_uri(uri).path))
            copying = asyncio.create_task(
                asyncio.to_thread(self._tools.store.copy_in, self._raw, folder, stop, on_bytes)
            )
            try:
                await asyncio.shield(copying)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.gather(copying, return_exceptions=True)
                raise
        except FalError as exc:
            if exc.code is Code.NO_CAPACITY:
                self._fail(exc)
            else:
                self._origin_lost(exc)
        except OSError as exc:
            self._fail(FalError(Code.STORE_FAILED, f"staging failed: {exc}", remedy="Look at the cache disk."))
        except Cancelled:
            pass  # the part was dropped under us; whoever did that ends this transfer
        finally:
            self._copy = None
            self._found_local()
            self._kick.set()

    def _found_local(self) -> None:
        """Pieces that the copying thread has written since the last look."""
        for piece in self._events.tally.uncounted(self._part.have):
            self.origin_piece(piece, self._part.digest_of(piece) or b"", 0.0)

    def _origin_lost(self, error: FalError) -> None:
        """It will not give this; peers may."""
        self._events.tally.origin_failed()
        if self.origin_error is None:
            self.origin_error = error
            kind = "ORIGIN_CHANGED" if error.code is Code.CONFLICT else "BAD_ORIGIN"
            self._tools.news.event(kind, self._events.model, str(error))
            self._events.tell()
        self._swarm.origin_available(False)
        self._kick.set()

    def origin_piece(self, piece: int, digest: bytes, seconds: float) -> None:
        self._swarm.arrived(piece, ORIGIN, seconds, self._now_s())
        try:
            claims = self._events.vouch(piece, digest) if digest else []
        except OSError as exc:
            _log.warning("claims_not_kept", error=str(exc))
            claims = []
        self._arrived(piece, ORIGIN, claims)

    def origin_bad(self, piece: int) -> None:
        self._events.tally.bad()
        self._bad[piece] = self._bad.get(piece, 0) + 1
        self._swarm.bad(piece, ORIGIN, self._now_s())
        if self._bad[piece] >= _ORIGIN_BAD_MAX:
            span = self._part.artifact.layout.span(piece)
            path = self._part.artifact.files[span.file].path
            self._origin_lost(
                FalError(
                    Code.CORRUPT,
                    f"file {path!r} at {self._part.artifact.uri} is not what was attested (piece {piece})",
                    remedy="Nothing of that piece was kept. Correct the origin, or register the model again.",
                    field=path,
                )
            )
        self._kick.set()

    def origin_done(self, lease: Lease) -> None:
        self._swarm.origin_done(lease, self._now_s())
        self._kick.set()

    def origin_failed(self, lease: Lease, error: FalError, retry_s: float) -> None:
        self._swarm.origin_failed(lease, retry_s, self._now_s())
        if error.code is Code.NO_CAPACITY:
            self._fail(error)
        elif error.code in _FINAL:
            self._origin_lost(error)
        else:
            _log.warning("origin_failed", artifact=self._part.artifact.id, error=str(error), retry_s=retry_s)
        self._kick.set()

    # ---- what peers tell

    def members_told(self, members: Sequence[Member], *, seed: bool, region_members: int) -> None:
        """The scheduler's word about this swarm."""
        self._members = (list(members), seed, region_members)
        self._tell_members(self._swarm)
        self._kick.set()

    def _tell_members(self, swarm: Swarm) -> None:
        if self._members is not None:
            members, seed, region_members = self._members
            swarm.set_members(members, seed=seed, region_members=region_members)

    def _go_alone(self) -> None:
        """No scheduler names members: this node reads the origin itself, and trades with whom it is connected."""
        if self._members is None and not self._tools.news.scheduled:
            self.members_told([], seed=True, region_members=1)

    def peer_up(self, node_id: str, have: Bitmap) -> None:
        self._up[node_id] = len(have)
        self._swarm.peer_up(node_id, have, self._now_s())
        self._kick.set()

    def peer_down(self, node_id: str) -> None:
        if self._up.pop(node_id, None) is not None:
            self._swarm.peer_down(node_id, self._now_s())
            self._kick.set()

    def peer_has(self, node_id: str, pieces: Sequence[int]) -> None:
        self._swarm.peer_has(node_id, pieces)
        self._kick.set()

    def lease_told(self, node_id: str, lease: Lease, ended: bool) -> None:
        self._swarm.lease_told(node_id, lease, ended, self._now_s())
        self._kick.set()

    def piece_came(self, node_id: str, piece: int, seconds: float) -> None:
        self._swarm.arrived(piece, node_id, seconds, self._now_s())
        self._arrived(piece, node_id, [])

    def piece_bad(self, node_id: str, piece: int) -> None:
        self._events.tally.bad()
        self._swarm.bad(piece, node_id, self._now_s())
        self._kick.set()

    def piece_refused(self, node_id: str, pieces: Sequence[int], retry_s: float) -> None:
        self._swarm.refused(node_id, pieces, retry_s, self._now_s())
        self._kick.set()

    def disk_failed(self, error: Exception) -> None:
        failed = FalError(Code.STORE_FAILED, f"staging failed: {error}", remedy="Look at the cache disk.")
        self._fail(error if isinstance(error, FalError) else failed)

    # ---- what readers and the disk tell

    def wanted(self, pieces: Sequence[int], waiting: bool) -> None:
        """A reader's window, first of all; or not any more."""
        if waiting:
            self._readers.update(piece for piece in pieces if not self._part.has(piece))
        else:
            self._readers.difference_update(pieces)
        self._swarm.wanted(pieces, waiting)
        self._kick.set()

    def lost(self, piece: int) -> None:
        """It is missing again."""
        self._swarm.lost(piece)
        self._kick.set()

    # ---- inside

    def _arrived(self, piece: int, source: str, claims: Sequence[Claim]) -> None:
        self._readers.discard(piece)
        self._moved_s = self._now_s()
        self._events.arrived(piece, source, claims)
        self._kick.set()

    def _fail(self, error: FalError) -> None:
        if self._error is None:
            full = error.code is Code.NO_CAPACITY
            self._error = Full(error.code, error.what, remedy=error.remedy) if full else error
        self._kick.set()


__all__ = ["Fetching", "FetchingEvents", "Full"]
