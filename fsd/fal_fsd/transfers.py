"""All artifacts that are on their way to this node or served from it. Takes what peers tell and passes it on.

Invariants: at most one transfer an artifact; one that nobody waits for, pins or wishes is ended and its parts go; a
finished one goes on being served to peers. Called by fal_fsd.service (stagers), fal_fsd.node (wishes, drops) and peers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from fal_contract.artifact import Artifact
from fal_contract.errors import FalError
from fal_contract.limits import IMAGE_FIRST_PIECES_MAX
from fal_contract.pieces import Bitmap
from fal_contract.telemetry import get_logger
from fal_fsd.core.messages import Claim, Lease, Member
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.store import DiskStore
from fal_fsd.tally import Totals
from fal_fsd.tools import Tools
from fal_fsd.transfer import Phase, Transfer

_LOCKS_MAX: Final = 1024
_log = get_logger("fsd.transfers")


class Transfers:
    """See the module's docstring. Implements ports.PeerEvents."""

    def __init__(self, store: DiskStore, *, on_ready: Callable[[Transfer], None] = lambda transfer: None) -> None:
        self._store = store
        self._on_ready = on_ready
        self._tools: Tools | None = None
        self._active: dict[str, Transfer] = {}
        self._waiters: dict[str, int] = {}
        self._beginnings: dict[str, set[asyncio.Task[Transfer | Path]]] = {}  # by owner
        self._members: dict[str, tuple[list[Member], bool, int]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._readers: dict[str, set[int]] = {}  # pieces that readers of a mount wait for
        self.taken_over: set[str] = set()  # unfinished mounts of the process before, whose readers wait
        self._served: dict[str, DiskPart] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._counts: dict[str, tuple[int, int]] = {}  # as they were made durable last

    def bind(self, tools: Tools) -> None:
        """Before anything else, on the loop: the tools need this as the receiver of events."""
        self._loop = asyncio.get_running_loop()
        self._tools = tools

    @property
    def tools(self) -> Tools:
        assert self._tools is not None
        return self._tools

    def get(self, artifact_id: str) -> Transfer | None:
        """The transfer under way."""
        return self._active.get(artifact_id)

    def active(self) -> list[Transfer]:
        """All under way."""
        return list(self._active.values())

    @property
    def totals(self) -> Totals:
        """Since the start of the process."""
        return self.tools.totals

    @property
    def count(self) -> int:
        """Of those under way."""
        return len(self._active)

    @property
    def rate_bytes_s(self) -> int:
        """At which bytes arrive, over all of them; read by any thread."""
        return sum(transfer.tally.rate_bytes_s for transfer in list(self._active.values()))

    # ---- stagers

    @asynccontextmanager
    async def staged(
        self, artifact: Artifact, model: str, *, digest_named: str = "", owner: str = ""
    ) -> AsyncIterator[Transfer | Path]:
        """For as long as somebody waits: the transfer, or the folder when it is here. Raises NO_CAPACITY …"""
        self._waiters[artifact.id] = self._waiters.get(artifact.id, 0) + 1
        # Not ended half way when who waits goes: its thread would pin after all was let go.
        begun = asyncio.create_task(self.begin(artifact, model, digest_named=digest_named, owner=owner, asked_for=True))
        self._beginnings.setdefault(owner, set()).add(begun)
        try:
            yield await asyncio.shield(begun)
        finally:
            await asyncio.shield(self._keep_task(self._left(artifact.id, owner, begun)))

    async def _left(self, artifact_id: str, owner: str, begun: asyncio.Task[Transfer | Path]) -> None:
        """Somebody waits no longer."""
        await asyncio.wait({begun})
        if not begun.cancelled():
            begun.exception()  # who waited may be gone
        beginnings = self._beginnings[owner]
        beginnings.discard(begun)
        if not beginnings:
            del self._beginnings[owner]
        self._waiters[artifact_id] -= 1
        if not self._waiters[artifact_id]:
            del self._waiters[artifact_id]
        await self.let_go(artifact_id)

    async def begun(self, owner: str) -> None:
        """Return once every staging that `owner` has asked for until now has pinned, or failed to."""
        if beginnings := self._beginnings.get(owner):
            await asyncio.wait(set(beginnings))

    async def begin(
        self,
        artifact: Artifact,
        model: str,
        *,
        digest_named: str = "",
        owner: str = "",
        asked_for: bool = False,
        first: Sequence[int] = (),
    ) -> Transfer | Path:
        """Start it, or join the one under way, or give the folder; pinned for `owner` (unless empty) before it returns.

        Without an owner the caller waits, or has pinned it. `first`: pieces that come before all others.
        """
        async with self._lock(artifact.id):
            transfer = self._active.get(artifact.id)
            if transfer is None:
                path = await asyncio.to_thread(self._here, artifact, model, owner)
                if path is not None:
                    return path
                part = await asyncio.to_thread(self._store.open_part, artifact, model=model, owner=owner)
                came = await asyncio.to_thread(self._store.catalog.came_of, artifact.id)
                transfer = self._start(part, model, digest_named, came)
            else:
                if owner:
                    await asyncio.to_thread(self._store.pin, artifact.id, owner)
                if artifact.attested and not transfer.artifact.attested:
                    await self._attest(transfer, artifact)
            transfer.asked_for = transfer.asked_for or asked_for
            transfer.fetching.order.prefer(first[:IMAGE_FIRST_PIECES_MAX])
            return transfer

    def _here(self, artifact: Artifact, model: str, owner: str) -> Path | None:
        """The folder, when everything is here and still what it was; in a thread."""
        path = self._store.path_of(artifact.id)
        if path is None:
            return self._adopt(artifact, model, owner)
        if owner:
            self._store.pin(artifact.id, owner)
        bad = self._store.first_use_check(artifact.id)
        if not bad:
            return path
        message = f"{len(bad)} pieces of {model or artifact.id[:12]} on this disk are not what was attested"
        self._tell_later(lambda: self.tools.news.event("CORRUPT_FILE", model or artifact.id, message))
        return None

    def _adopt(self, artifact: Artifact, model: str, owner: str) -> Path | None:
        """The same content is here under another name: READY, told and served at once; in a thread."""
        path = self._store.adopt(artifact, model=model, owner=owner)
        if path is not None:
            part = self._store.open_part(artifact, model=model)
            self._tell_later(lambda: self.serve(part))
            self._tell_later(lambda: self.tools.news.changed(artifact.id, at_once=True))
        return path

    def _start(self, part: DiskPart, model: str, digest_named: str, came: tuple[int, int]) -> Transfer:
        artifact_id = part.artifact.id
        self._served.pop(artifact_id, None)
        transfer = self._active[artifact_id] = Transfer(part, model, self.tools, digest_named=digest_named, came=came)
        if artifact_id in self.taken_over:
            self.taken_over.discard(artifact_id)
            transfer.open_mount()
            if part.discarded:
                self._loop.call_soon(transfer.spoilt, len(part.discarded))  # once its task has begun
        if (readers := self._readers.get(artifact_id)) is not None:
            transfer.wanted(sorted(readers), True)
        if (members := self._members.get(artifact_id)) is not None:
            transfer.fetching.members_told(members[0], seed=members[1], region_members=members[2])
        transfer.task.add_done_callback(lambda _: self._over(transfer))
        self.tools.news.changed(artifact_id, at_once=True)
        return transfer

    async def let_go(self, artifact_id: str) -> None:
        """A waiter or a pin went: end the transfer, or clear what one left, when it was the last."""
        async with self._lock(artifact_id):
            if self._waiters.get(artifact_id) or artifact_id in self._served:
                return
            if await asyncio.to_thread(self._store.pinned, artifact_id):
                return
            await self._end(artifact_id)
            await asyncio.to_thread(self._store.abandon, artifact_id)
            self.tools.news.changed(artifact_id, at_once=True)

    async def _end(self, artifact_id: str) -> None:
        """End a transfer and close its part."""
        transfer = self._active.pop(artifact_id, None)
        self._members.pop(artifact_id, None)
        if transfer is not None:
            await transfer.stop()
        self._served.pop(artifact_id, None)
        await self._close_part(self._store.part(artifact_id) or (transfer.raw if transfer is not None else None))
        if transfer is not None and not self._store.path_of(artifact_id):
            await asyncio.to_thread(transfer.claims.clear)

    async def _close_part(self, part: DiskPart | None) -> None:
        """Once no thread of peers touches its files."""
        if part is not None:
            self.tools.peers.leave(part.artifact.id)
            await self.tools.peers.quiet(part.artifact.id)
            await asyncio.to_thread(part.close)

    def unwanted(self) -> list[str]:
        """Transfers that nobody waits for; whether a pin wants them is the store's to say."""
        return [artifact_id for artifact_id in self._active if not self._waiters.get(artifact_id)]

    async def attested(self, artifact: Artifact) -> bool:
        """The scheduler signed this content; False when it is not on its way here."""
        if (transfer := self._active.get(artifact.id)) is None:
            return False
        if not transfer.artifact.attested:
            await self._attest(transfer, artifact)
        return True

    async def drop(self, artifact_id: str, *, reason: str, revoked: bool) -> bool:
        """It must go: unless pinned or waited for, or (withdrawn) whoever uses it. True when nothing of it is left."""
        async with self._lock(artifact_id):
            if not revoked and (self._waiters.get(artifact_id) or artifact_id in self._active):
                return False
            if (transfer := self._active.get(artifact_id)) is not None:
                self.tools.mount.fail(artifact_id, reason)
                transfer.refuse(reason)
            gone = await asyncio.to_thread(self._store.drop, artifact_id, force=revoked, reason=reason)
            if gone or revoked:
                await self._end(artifact_id)
            self.tools.news.changed(artifact_id, at_once=True)
            return gone

    def serve(self, part: DiskPart) -> None:
        """Give its pieces to peers."""
        if part.artifact.id not in self._served and part.artifact.id not in self._active:
            self._served[part.artifact.id] = part
            self.tools.peers.join(part)

    async def gone(self, artifact_id: str) -> None:
        """The store removed it: nobody is served any more."""
        await self._close_part(self._served.pop(artifact_id, None))
        self.tools.news.changed(artifact_id, at_once=True)

    def lost(self, artifact_id: str, pieces: Sequence[int]) -> bool:
        """Pieces that counted are not here any more; True when a transfer brings them again."""
        if (transfer := self._active.get(artifact_id)) is not None:
            transfer.told_lost(pieces)
            return True
        if self._served.pop(artifact_id, None) is not None:
            self.tools.peers.leave(artifact_id)  # its bitmap is another now; whoever wants it joins again
        return False

    def members_told(self, artifact_id: str, members: list[Member], *, seed: bool, region_members: int) -> None:
        """The scheduler's word about a swarm. Kept only for what is on its way here."""
        self._members[artifact_id] = (members, seed, region_members)
        if (transfer := self._active.get(artifact_id)) is not None:
            transfer.fetching.members_told(members, seed=seed, region_members=region_members)

    def wanted(self, artifact_id: str, pieces: Sequence[int], waiting: bool) -> None:
        """A reader of the mount (ports.OnWanted). Remembered for a transfer that has yet to begin."""
        readers = self._readers.setdefault(artifact_id, set())
        readers.update(pieces) if waiting else readers.difference_update(pieces)
        if not readers:
            del self._readers[artifact_id]
        if (transfer := self._active.get(artifact_id)) is not None:
            transfer.wanted(pieces, waiting)

    async def keep_counts(self) -> None:
        """Make durable how much came from where."""
        counts = {transfer.id: transfer.tally.came for transfer in self._active.values()}
        if counts != self._counts:
            await asyncio.to_thread(self._store.catalog.set_came, counts)
            self._counts = counts

    async def close(self) -> None:
        """End all; what is durable is taken up after the next start."""
        transfers = list(self._active.values())
        with contextlib.suppress(FalError):
            await self.keep_counts()
        await asyncio.gather(*(transfer.stop(keep_mount=True) for transfer in transfers), return_exceptions=True)
        while self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)

    # ---- ports.PeerEvents

    def peer_up(self, node_id: str, artifact_id: str, have: Bitmap) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.fetching.peer_up(node_id, have)

    def peer_down(self, node_id: str, artifact_id: str, reason: str) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.fetching.peer_down(node_id)

    def peer_has(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.fetching.peer_has(node_id, pieces)

    def lease_told(self, node_id: str, artifact_id: str, lease: Lease, ended: bool) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.fetching.lease_told(node_id, lease, ended)

    def claims_told(self, node_id: str, artifact_id: str, claims: Sequence[Claim]) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.claims_told(claims)

    def piece_came(self, node_id: str, artifact_id: str, piece: int, seconds: float) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.fetching.piece_came(node_id, piece, seconds)

    def piece_bad(self, node_id: str, artifact_id: str, piece: int) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.fetching.piece_bad(node_id, piece)

    def piece_refused(self, node_id: str, artifact_id: str, pieces: Sequence[int], retry_s: float) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.fetching.piece_refused(node_id, pieces, retry_s)

    def disk_failed(self, artifact_id: str, error: Exception) -> None:
        if transfer := self._active.get(artifact_id):
            transfer.fetching.disk_failed(error)

    # ---- inside

    async def _attest(self, transfer: Transfer, artifact: Artifact) -> None:
        lost = await asyncio.to_thread(self._store.attest, artifact)
        transfer.told_attested(artifact, lost)

    def _over(self, transfer: Transfer) -> None:
        """Its task ended: finished ones are served from now on, others go once nobody waits for them."""
        if self._active.get(transfer.id) is not transfer:
            return
        if transfer.phase is Phase.READY:
            del self._active[transfer.id]
            self._members.pop(transfer.id, None)
            self._readers.pop(transfer.id, None)
            self._served[transfer.id] = transfer.raw
            transfer.claims.clear()
            self._on_ready(transfer)
            self._keep_task(self._close_mount(transfer))
        elif not transfer.task.cancelled():
            del self._active[transfer.id]
            self.tools.peers.leave(transfer.id)
            self._keep_task(self._failed(transfer))
        self.tools.news.changed(transfer.id, at_once=True)

    async def _failed(self, transfer: Transfer) -> None:
        await self._close_mount(transfer)
        await self.let_go(transfer.id)

    async def _close_mount(self, transfer: Transfer) -> None:
        if transfer.in_flight_path is not None:
            with contextlib.suppress(FalError, OSError):
                await self.tools.mount.close(transfer.id)

    def _lock(self, artifact_id: str) -> asyncio.Lock:
        """Beginning and ending of one artifact exclude each other. Kept while there is anything of it."""
        if len(self._locks) > _LOCKS_MAX:
            self._locks = {id_: lock for id_, lock in self._locks.items() if lock.locked() or id_ in self._active}
        return self._locks.setdefault(artifact_id, asyncio.Lock())

    def _tell_later(self, call: Callable[[], None]) -> None:
        """From a thread."""
        self._loop.call_soon_threadsafe(call)

    def _keep_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("ending_failed", error=str(error))


__all__ = ["Transfers"]
