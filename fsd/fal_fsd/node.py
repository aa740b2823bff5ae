"""A node's weight cache: ties disk, peers, origins, mount and the scheduler's stream together on one event loop.

Invariants: what the agent asked for goes on with or without a scheduler; what a pin or a wish wants and is not here is
fetched again after every start; what was withdrawn is refused for good; nothing here blocks the loop: the disk is
called in threads. Made by fal_fsd.main (and tests) through fal_fsd.build.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from fal_contract.artifact import Artifact, to_manifest
from fal_contract.errors import Code, FalError
from fal_contract.limits import MESSAGE_BYTES_MAX
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2, fsd_pb2, state_pb2, weights_pb2
from fal_contract.versions import WIRE_MAX, WIRE_MIN, software
from fal_fsd import attest, ingest, views
from fal_fsd.disk.reading import Cancelled
from fal_fsd.disk.store import CachedRecord, DiskStore
from fal_fsd.news import News
from fal_fsd.origin import parse_uri
from fal_fsd.peers.address import members_of, peer_addresses
from fal_fsd.peers_told import PeersTold
from fal_fsd.surroundings import Surroundings
from fal_fsd.transfer import Phase, Transfer
from fal_fsd.transfers import Transfers
from fal_fsd.wishes import WISH_OWNER, Wishes

ATTEST_AGAIN_S: Final = 30.0
_HELLO_BYTES_MAX: Final = MESSAGE_BYTES_MAX - (256 << 10)  # for artifacts; what else it tells is small
_RETRY_S: Final = 5.0
_REPAIR_OWNER: Final = "repair"  # nobody else may want it, and it is worth bringing all the same
_REPAIR_MAX_S: Final = 3600.0
_log = get_logger("fsd.node")


class CacheNode:
    """See the module's docstring. Implements link.CacheSide."""

    def __init__(self, store: DiskStore, news: News, transfers: Transfers, around: Surroundings) -> None:
        self.store = store
        self.news = news
        self.transfers = transfers
        self.around = around
        self._jobs: set[asyncio.Task[None]] = set()
        self._tiers: dict[str, str] = {}  # artifact id → "memory", as agent and wishes ask
        self._repairing: set[str] = set()
        self.wishes = Wishes(self)
        self._swarm_revisions: dict[str, int] = {}
        self._peers_told = PeersTold(self.around)
        self._rates_told = False

    # ---- life

    async def start(self) -> None:
        """Serve what is here; go on with what pins and wishes want."""
        records = await asyncio.to_thread(self.store.artifacts)
        for record in records:
            artifact = await asyncio.to_thread(self.store.artifact, record.id)
            if artifact is None:
                continue
            if record.ready:
                await self._serve(artifact)
            elif record.pinned_by:
                self._job(self._go_on(artifact, _name(record)), f"go on with {_name(record)}")
        self._job(self.wishes.run(), "wishes")

    async def close(self) -> None:
        """End what is under way; it is taken up after the next start."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await self.transfers.close()
        self.news.close()

    async def tend(self, interval_s: float) -> None:
        """Until cancelled: pins that expired, room on the disk, what came from where, manifests that peers may have."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                for artifact_id in self.transfers.unwanted():
                    await self.transfers.let_go(artifact_id)
                await asyncio.to_thread(self.store.evict, 0)
                await self.transfers.keep_counts()
                await self._seek_attestations()
                if self._peers_told.due:
                    self.news.wake()
            except (FalError, OSError) as exc:
                _log.warning("tending_failed", error=str(exc))

    # ---- the agent's side (fal_fsd.service)

    async def resolve(self, message: agent_pb2.Artifact) -> Artifact:
        """The artifact that is asked for. INVALID, CORRUPT, FAILED_PRECONDITION (withdrawn), UNAVAILABLE, NOT_FOUND."""
        artifact = attest.asked(message, self.around.ca_key())
        names = [x for x in (message.artifact_id, message.manifest_digest, artifact.id if artifact else "") if x]
        await self._check_revoked(*names)
        if artifact is None:
            artifact = await self._known(names)
        elif not artifact.attested:
            known = await asyncio.to_thread(self.store.artifact, artifact.id)
            artifact = known if known is not None and known.attested else artifact
        if artifact is None:
            artifact = await self._fetch_manifest(names)
            await self._check_revoked(artifact.id, artifact.manifest_digest)
        parse_uri(artifact.uri)
        return artifact

    @asynccontextmanager
    async def staged(
        self, artifact: Artifact, model: str, owner: str, *, digest_named: str
    ) -> AsyncIterator[Transfer | Path]:
        """For as long as the agent listens; pinned for `owner` (unless empty) from the first moment."""
        async with self.transfers.staged(artifact, model, digest_named=digest_named, owner=owner) as found:
            await asyncio.to_thread(self.store.touch, artifact.id)
            yield found

    async def pin(self, id_: str, owner: str, *, ttl_s: float) -> None:
        """Durable on return. NOT_FOUND."""
        expires_at_s = self.store.clock.wall_s() + ttl_s if ttl_s else 0.0
        await asyncio.to_thread(self.store.pin, id_, owner, expires_at_s=expires_at_s)
        self.news.changed(await self.id_of(id_), at_once=True)

    async def unpin(self, owner: str, id_: str) -> int:
        """How many pins there were. What the owner asked to be staged before this is not pinned after it."""
        await self.transfers.begun(owner)
        ids = await asyncio.to_thread(self.store.unpin, owner, id_)
        for artifact_id in ids:
            await self.transfers.let_go(artifact_id)
            self.news.changed(artifact_id, at_once=True)
        return len(ids)

    async def view(self) -> list[fsd_pb2.CachedArtifact]:
        """Everything that is here or on its way."""
        records = await asyncio.to_thread(self.store.artifacts)
        return views.artifacts(records, self._active(), self.around.memory.bytes_of)

    async def status(self) -> fsd_pb2.CacheStatus:
        """What works here, room, peers."""
        room = await asyncio.to_thread(self.store.room)
        return self.around.status(
            disk_bytes_max=room.bytes_max, disk_bytes_used=room.bytes_used, scheduler=self.news.connected
        )

    async def want_tier(self, artifact_id: str, tier: str) -> None:
        """ "memory": locked once it is ready; else let go."""
        if tier == "memory":
            self._tiers[artifact_id] = tier
            await self._lock_in_memory(artifact_id)
        elif self._tiers.pop(artifact_id, ""):
            await asyncio.to_thread(self.around.memory.unlock, artifact_id)
            self.news.changed(artifact_id, at_once=True)

    def ready(self, transfer: Transfer) -> None:
        """A transfer ended well (Transfers' on_ready)."""
        self._job(self._lock_in_memory(transfer.id), "lock")

    def gone(self, ids: Sequence[str]) -> None:
        """The store evicted or withdrew them (its on_gone, on the loop)."""
        for artifact_id in ids:
            self.news.event("EVICTED", artifact_id, "its files were removed from this node's cache")
            self._job(self._gone(artifact_id), "gone")

    def lost(self, artifact_id: str, pieces: Sequence[int]) -> None:
        """Pieces are not what they were (the store's on_lost, on the loop): they are brought again."""
        if not self.transfers.lost(artifact_id, pieces):
            self._job(self._repair(artifact_id, len(pieces)), "repair")

    # ---- link.CacheSide

    @property
    def waiting(self) -> asyncio.Event:
        return self.news.waiting

    async def hello(self) -> weights_pb2.CacheHello:
        self.news.telling_all()
        told, later = views.that_fit(await self.view(), _HELLO_BYTES_MAX)
        for artifact_id in later:
            self.news.changed(artifact_id, at_once=True)
        return weights_pb2.CacheHello(
            versions=agent_pb2.Versions(min=WIRE_MIN, max=WIRE_MAX, software=software()),
            node_id=self.around.node_id,
            boot_id=self.around.boot_id,
            cache_id=self.around.cache_id,
            endpoints=self.around.endpoints(),
            status=await self.status(),
            artifacts=told,
        )

    def welcome(self, message: weights_pb2.CacheWelcome) -> None:
        self._placed(message)
        self.news.begun()
        self._rates_told = False  # Hello does not tell these
        self._peers_told.begun()
        self.wishes.new_session()
        self._swarm_revisions.clear()
        for transfer in self.transfers.active():
            if not transfer.artifact.attested:
                transfer.tell_again()

    def _placed(self, message: weights_pb2.CacheWelcome) -> None:
        self.around.welcome(message)
        if message.disk_bytes_max:
            self.store.set_bytes_max(message.disk_bytes_max)

    def disconnected(self) -> None:
        self.news.ended()
        self.around.peers.set_scheduled(False)

    async def take(self) -> Sequence[weights_pb2.CacheUp]:
        messages = self.news.take_messages()
        dirty, events = self.news.take_report()
        report = weights_pb2.CacheReport(events=events)
        if dirty:
            views_ = {view.artifact_id: view for view in await self.view()}
            report.artifacts.extend(views_[x] for x in sorted(dirty) if x in views_)
            report.gone.extend(sorted(dirty - views_.keys()))
            report.status.CopyFrom(await self.status())
        if dirty or not self._rates_told:
            self._rates_told = True
            report.links.extend(self.around.link_rates())
        self._peers_told.into(report)
        if report.ByteSize():
            messages.append(weights_pb2.CacheUp(report=report))
        return messages

    async def down(self, message: weights_pb2.CacheDown) -> None:
        try:
            match message.WhichOneof("kind"):
                case "swarm":
                    self._swarm(message.swarm)
                case "wishes":
                    self.wishes.told(message.wishes)
                case "attested":
                    await self._attested(message.attested)
                case "drop":
                    self._job(self._drop(message.drop), "drop")
                case "verify":
                    self._job(self.verify(message.verify.id), "verify")
                case "last_copies":
                    self.store.set_last_copies(message.last_copies.artifact_ids)
                case "values":
                    self.store.values_ms = dict(message.values.values)
                case "welcome":  # again: new keys, or the pool has changed
                    self._placed(message.welcome)
                case "want_manifest":
                    await self._tell_manifest(message.want_manifest.id)
                # A kind of a newer scheduler; the versions agreed say that it may be ignored.
        except (FalError, OSError) as exc:  # OSError: what it says cannot be written down
            _log.warning("scheduler_message_refused", kind=message.WhichOneof("kind"), error=str(exc))

    # ---- what the scheduler says

    def _swarm(self, message: weights_pb2.Swarm) -> None:
        if message.revision < self._swarm_revisions.get(message.artifact_id, 0):
            return
        self._swarm_revisions[message.artifact_id] = message.revision
        addresses = peer_addresses(message)
        self.around.peers.set_members(message.artifact_id, addresses)
        members = members_of(message, addresses)
        self.transfers.members_told(
            message.artifact_id, members, seed=message.seed, region_members=message.region_members
        )

    # ---- wishes.WishSide

    async def begin_wish(self, artifact: Artifact, wish: weights_pb2.Wished) -> Transfer | Path:
        named, asked, first = wish.artifact.manifest_digest, wish.artifact, wish.artifact.first_pieces
        found = await self.transfers.begin(artifact, asked.model, digest_named=named, owner=WISH_OWNER, first=first)
        if wish.expires_at_s:
            await asyncio.to_thread(self.store.pin, artifact.id, WISH_OWNER, expires_at_s=wish.expires_at_s)
        await self.want_tier(artifact.id, wish.tier)
        return found

    async def end_wishes(self, keep: set[str]) -> None:
        for record in await asyncio.to_thread(self.store.artifacts):
            if WISH_OWNER in record.pinned_by and record.id not in keep:
                await self.want_tier(record.id, "disk")
                await self.unpin(WISH_OWNER, record.id)

    def wish_failed(self, model: str, why: str) -> None:
        self.news.event("WISH_FAILED", model, why)

    async def _attested(self, message: state_pb2.ModelManifest) -> None:
        """CORRUPT when the CA did not sign it."""
        if not message.files:  # too large for the stream
            message = await self.around.manifest(message.artifact_id)
        artifact = attest.believed(message, self.around.ca_key())
        if not await self.transfers.attested(artifact):
            known = await asyncio.to_thread(self.store.artifact, artifact.id)
            if known is not None and not known.attested:  # taken in by `Ingest`, or a part that only a pin keeps
                self._job(self._go_on(artifact, ""), "go on")

    async def _drop(self, message: weights_pb2.DropArtifact) -> None:
        artifact_id = await self.id_of(message.id)
        if message.revoked and artifact_id != message.id:  # both names are refused from now on
            await asyncio.to_thread(self.store.catalog.revoke, message.id, message.reason or "no reason was given")
        await self.transfers.drop(artifact_id, reason=message.reason, revoked=message.revoked)

    async def verify(self, id_: str) -> None:
        """Read it again; what is wrong is taken out and fetched anew."""
        try:
            bad = await asyncio.to_thread(self.store.verify, id_, self.around.stop)
        except (FalError, Cancelled) as exc:
            self.news.event("VERIFY_FAILED", id_, str(exc) or "fal-fsd was stopped")
            return
        artifact_id = await self.id_of(id_)
        self.news.changed(artifact_id, at_once=True)
        if not bad:
            self.news.event("VERIFIED", artifact_id, "every piece is what was attested")
        else:
            self.lost(artifact_id, bad)

    async def _tell_manifest(self, id_: str) -> None:
        artifact = await asyncio.to_thread(self.store.artifact, id_)
        if artifact is not None and not artifact.attested:
            artifact = await asyncio.to_thread(ingest.taken_in, self.store, artifact)
        if artifact is not None and artifact.attested:
            self.news.manifest(to_manifest(artifact))

    async def _repair(self, artifact_id: str, pieces: int) -> None:
        artifact = await asyncio.to_thread(self.store.artifact, artifact_id)
        if artifact is None or artifact_id in self._repairing:
            return
        self._repairing.add(artifact_id)
        try:
            self.news.event("CORRUPT_FILE", artifact_id, f"{pieces} pieces on this disk are not what was attested")
            until_s = self.store.clock.wall_s() + _REPAIR_MAX_S
            await asyncio.to_thread(self.store.pin, artifact_id, _REPAIR_OWNER, expires_at_s=until_s)
            await self._go_on(artifact, "", repaired=True)
            await self.unpin(_REPAIR_OWNER, artifact_id)
        finally:
            self._repairing.discard(artifact_id)

    async def _gone(self, artifact_id: str) -> None:
        await asyncio.to_thread(self.around.memory.unlock, artifact_id)
        self._tiers.pop(artifact_id, None)
        await self.transfers.gone(artifact_id)

    # ---- inside

    def _active(self) -> dict[str, Transfer]:
        return {transfer.id: transfer for transfer in self.transfers.active()}

    async def _check_revoked(self, *names: str) -> None:
        for name in names:
            if (why := await asyncio.to_thread(self.store.revoked, name)) is not None:
                raise FalError(
                    Code.FAILED_PRECONDITION,
                    f"artifact {name[:12]} was withdrawn: {why}",
                    remedy="Use another model; this one is not staged again.",
                    field="artifact_id",
                )

    async def id_of(self, id_: str) -> str:
        """The artifact id of a manifest digest; `id_` itself when nothing of it is here."""
        artifact = await asyncio.to_thread(self.store.artifact, id_)
        return artifact.id if artifact is not None else id_

    async def _serve(self, artifact: Artifact) -> None:
        try:
            part = await asyncio.to_thread(self.store.open_part, artifact, model="")
        except (FalError, OSError) as exc:
            _log.warning("not_served", artifact=artifact.id, error=str(exc))
            return
        self.transfers.serve(part)

    async def _go_on(self, artifact: Artifact, model: str, *, repaired: bool = False) -> None:
        """Fetch what is missing, for as long as somebody wants it."""
        while True:
            try:
                found = await self.transfers.begin(artifact, model)
                if isinstance(found, Transfer):
                    await asyncio.shield(found.task)
                if repaired:
                    self.news.event("REPAIRED", artifact.id, "every piece is what was attested again")
                return
            except FalError as exc:
                _log.warning("not_brought", artifact=artifact.id, error=str(exc))
                if not exc.retryable:
                    return
            await asyncio.sleep(_RETRY_S)

    async def _known(self, names: Sequence[str]) -> Artifact | None:
        for name in names:
            if (artifact := await asyncio.to_thread(self.store.artifact, name)) is not None:
                return artifact
        return None

    async def _fetch_manifest(self, names: Sequence[str]) -> Artifact:
        """From the scheduler; the first error when no name helps."""
        error: FalError | None = None
        for name in names:
            try:
                return attest.believed(await self.around.manifest(name), self.around.ca_key(), attested=False)
            except FalError as exc:
                error = error or exc
        raise error or FalError(Code.NOT_FOUND, "the artifact has no name", remedy="Name the artifact.")

    async def _seek_attestations(self) -> None:
        """Somebody signed it meanwhile, perhaps: a word may be lost on the way up or down, or the scheduler be away."""
        for transfer in self.transfers.active():
            if transfer.phase is not Phase.UNATTESTED:
                continue
            if transfer.remind(ATTEST_AGAIN_S):
                with suppress(FalError):  # not signed yet, or nobody is there
                    await self._attested(await self.around.manifest(transfer.id))
                    continue
            for node_id in transfer.fetching.connected:
                with suppress(FalError):
                    raw = await self.around.peers.fetch_manifest(node_id, transfer.id)
                    await self._attested(attest.parsed(raw))
                    break

    async def _lock_in_memory(self, artifact_id: str) -> None:
        path = await asyncio.to_thread(self.store.path_of, artifact_id)
        if path is None or self._tiers.get(artifact_id) != "memory":
            return
        files = [file for file in path.rglob("*") if file.is_file()]
        try:
            await asyncio.to_thread(self.around.memory.lock, artifact_id, files)
        except FalError as exc:
            self.news.event("NOT_IN_MEMORY", artifact_id, str(exc))
        self.news.changed(artifact_id, at_once=True)

    def _job(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._jobs.add(task)
        task.add_done_callback(self._job_done)

    def _job_done(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("job_failed", job=task.get_name(), error=str(error))


def _name(record: CachedRecord) -> str:
    return record.models[0] if record.models else record.id[:12]


__all__ = ["WISH_OWNER", "CacheNode"]
