"""One artifact on its way to this node: from the origin, from peers, to a folder of plain files.

Invariants: one transfer an artifact, however many ask for it; every decision about pieces is core.swarm's, this applies
them and tells it what happened; an artifact is READY only when all its pieces are here and its content is known: signed
by the CA, or named by a manifest digest that the files' SHA-256 give. What can pass (a full disk, an origin that is
busy) is waited out and said in `waits_for`; what cannot ends the transfer with its error. Runs on the event loop; bytes
move in threads. Made by fal_fsd.transfers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from fal_contract.artifact import Artifact
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger
from fal_contract.v1 import weights_pb2
from fal_fsd.attest import attestation_of, not_as_published, not_the_content, told_digest, wrong_file
from fal_fsd.claims import ClaimBook
from fal_fsd.core.messages import ORIGIN, Claim
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.progress import Discarded
from fal_fsd.fetching import Fetching, Full
from fal_fsd.frontier import Frontier
from fal_fsd.tally import Tally
from fal_fsd.tools import Tools
from fal_fsd.vouched import VouchedPart

_FULL_RETRY_S: Final = 2.0
_HASH_LOOK_S: Final = 5.0
_log = get_logger("fsd.transfer")


class Phase(StrEnum):
    """How far it is."""

    QUEUED = "queued"
    FETCHING = "fetching"
    CHECKING = "checking"  # all is here; SHA-256 is taken
    UNATTESTED = "unattested"  # all is here and told; the scheduler has to sign
    READY = "ready"
    FAILED = "failed"


class Transfer:
    """See the module's docstring. `part` is open and stays so; `digest_named`: manifest digest that was asked for."""

    def __init__(
        self, part: DiskPart, model: str, tools: Tools, *, digest_named: str = "", came: tuple[int, int] = (0, 0)
    ) -> None:
        """`came`: bytes that origin and peers have sent of it before."""
        self.model = model
        self.phase = Phase.QUEUED
        self.path: Path | None = None
        self.in_flight_path: Path | None = None
        self.asked_for = False
        self.claims = ClaimBook(tools.claims_folder / part.artifact.id, part.artifact.layout.count)
        self.raw = part
        self.part = VouchedPart(part, self.claims)
        self.tally = Tally(part.artifact, part.have, tools.clock.monotonic_s, tools.totals, came)
        self._tools = tools
        # The scheduler names the whole content by it, through the agent: as good as a signature.
        self._known_by_digest = bool(digest_named) and digest_named == told_digest(part.artifact)
        self._fetching = Fetching(self.part, part, self, tools)
        self._frontier = Frontier(self.part)
        self._stop = threading.Event()  # of hashing
        self._attested = asyncio.Event()
        self._changed = asyncio.Event()
        self._full = ""
        self._refused: FalError | None = None
        self._attestation: weights_pb2.Attestation | None = None
        self._attested_told_s = 0.0
        self._mounting: asyncio.Task[None] | None = None
        self._hashing: asyncio.Task[None] | None = None
        if part.artifact.attested:
            self._attested.set()
            self._blame(part.discarded)  # it was attested while nobody brought it
        self.task: asyncio.Task[Path] = asyncio.create_task(self._run(), name=f"transfer {self.id[:12]}")
        self.task.add_done_callback(self._ended)

    # ---- what it is

    @property
    def id(self) -> str:
        return self.part.artifact.id

    @property
    def artifact(self) -> Artifact:
        return self.part.artifact

    @property
    def bytes_total(self) -> int:
        return self.tally.bytes_total

    @property
    def read(self) -> bool:
        """A reader waits for a piece."""
        return self._fetching.read

    @property
    def fetching(self) -> Fetching:
        """Takes what peers and origin tell."""
        return self._fetching

    @property
    def waits_for(self) -> str:
        """What holds it up, for people; empty when nothing does."""
        match self.phase:
            case Phase.QUEUED:
                return self._full or self._tools.lanes.why(self)
            case Phase.FETCHING:
                return self._fetching.waits_for
            case Phase.CHECKING:
                return "the files' SHA-256"
            case Phase.UNATTESTED:
                return "the scheduler has to attest the content"
            case _:
                return ""

    async def changed(self, timeout_s: float) -> None:
        """Return when something is to be told, at the latest after `timeout_s`."""
        event = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()

    # ---- what it is told

    def told_attested(self, artifact: Artifact, lost: Sequence[Discarded]) -> None:
        """The scheduler signed its content and the store knows; `lost`: pieces that had other bytes."""
        self._blame(lost)
        self.told_lost([each.piece for each in lost])
        self.claims.clear()
        self._attested.set()
        self.tell()
        if lost and self._mounting is not None:
            self.spoilt(len(lost))

    def spoilt(self, pieces: int) -> None:
        """Containers could read pieces that are not what was attested: whoever waits hears of it, and stops them."""
        self._end_with(
            FalError(
                Code.CORRUPT,
                f"{pieces} pieces of {self.model} could be read before anybody had attested them, and were wrong",
                remedy="Containers that read them are not to be trusted; the next staging brings the right ones.",
            )
        )

    def _blame(self, lost: Sequence[Discarded]) -> None:
        """Tell operators who vouched for what is wrong."""
        blamed: dict[str, int] = {}
        for each in lost:
            claim = self.claims.get(each.piece, each.digest or None)
            signer = claim.signer if claim is not None else each.source or self._tools.place().node_id
            blamed[signer] = blamed.get(signer, 0) + 1
        for signer, count in blamed.items():
            message = f"{count} pieces of {self.model} are not what was attested; {signer} vouched for them"
            self._tools.news.event("BAD_PEER", signer, message)

    def tell_again(self) -> None:
        """A new leader heard nothing of what nobody has attested."""
        mine = [claim for claim in self.claims.all() if claim.signer == self._tools.place().node_id]
        self._tools.news.claims(self.id, mine)
        if self._attestation is not None:
            self._attested_told_s = self._tools.clock.monotonic_s()
            self._tools.news.attestation(self._attestation)

    def remind(self, after_s: float) -> bool:
        """Tell the attestation again when nothing came of it for so long: it, or the answer, may have been lost."""
        now_s = self._tools.clock.monotonic_s()
        if self._attestation is None or now_s - self._attested_told_s < after_s:
            return False
        self._attested_told_s = now_s
        self._tools.news.attestation(self._attestation)
        return True

    def told_lost(self, pieces: Sequence[int]) -> None:
        """They are missing again: the disk has other bytes."""
        for piece in pieces:
            self.tally.lost(piece)
            self._fetching.lost(piece)
            self._frontier.lost(piece)

    def claims_told(self, claims: Sequence[Claim]) -> None:
        """Peers told who vouches for pieces."""
        if not self.artifact.attested:
            for claim in self.claims.take(claims):
                self._check_claim(claim)

    def wanted(self, pieces: Sequence[int], waiting: bool) -> None:
        """A reader's window."""
        self._fetching.wanted(pieces, waiting)
        self._tools.lanes.look()

    def open_mount(self) -> None:
        """Make it readable while it arrives, where this works here; `in_flight_path` says where."""
        if self.in_flight_path is not None and not self._tools.mount.shows(self.id):  # it was aborted
            self._mounting = self.in_flight_path = None
        if self._mounting is None and not self._tools.mount.available and self.phase is not Phase.READY:
            self._mounting = asyncio.create_task(self._mount(), name=f"mount {self.id[:12]}")

    def refuse(self, reason: str) -> None:
        """It was withdrawn: whoever waits for it is told so."""
        self._end_with(
            FalError(Code.FAILED_PRECONDITION, f"{self.model} was withdrawn: {reason}", remedy="Use another model.")
        )

    def _end_with(self, error: FalError) -> None:
        self._refused = error
        self.task.cancel()

    async def stop(self, *, keep_mount: bool = False) -> None:
        """End it; what is durable stays and is taken up by the next one. `keep_mount`: by the next process."""
        self._stop.set()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        if self._mounting is not None:
            await asyncio.gather(self._mounting, return_exceptions=True)
            if not keep_mount:
                await self._tools.mount.close(self.id)

    # ---- events of Fetching

    def arrived(self, piece: int, source: str, claims: Sequence[Claim] = ()) -> None:
        """A piece is here: count it, tell readers and peers."""
        self.tally.arrived(piece, from_origin=source == ORIGIN)
        self._tools.mount.arrived(self.id, piece)
        self._tools.peers.tell_have(self.id, [piece], claims or self._vouched([piece]))
        if claims:
            self._tools.news.claims(self.id, claims)
        self._tools.news.changed(self.id, at_once=False)

    def vouch(self, piece: int, digest: bytes) -> list[Claim]:
        """Sign for a piece from the origin that nobody has attested; nothing where that is not needed."""
        signer = self._tools.signer()
        if self.artifact.attested or signer is None:
            return []
        first = self.claims.get(piece)
        if first is not None and first.digest != digest:
            message = f"piece {piece} of {self.model}: {first.signer} vouches for other bytes than this node read"
            self._tools.news.event("CLAIMS_DIFFER", first.signer, message)
        return self.claims.take([signer.claim(self.id, piece, digest)], own=True)

    def _vouched(self, pieces: Iterable[int]) -> list[Claim]:
        """Claims for what is here, not for what else was said of these pieces."""
        if self.artifact.attested:
            return []
        found = (self.claims.get(piece, self.part.digest_of(piece)) for piece in pieces)
        return [claim for claim in found if claim is not None]

    def tell(self) -> None:
        """Its state is another."""
        event, self._changed = self._changed, asyncio.Event()
        event.set()
        self._tools.news.changed(self.id, at_once=True)

    # ---- inside

    async def _run(self) -> Path:
        self._hashing = asyncio.create_task(self._hash_behind(), name=f"hash {self.id[:12]}")
        try:
            await asyncio.to_thread(self._vouch_for_old)
            while True:
                await self._fetch()
                if await self._known():
                    break
            self.path = await self._finish()
            self._set(Phase.READY)
        except asyncio.CancelledError:
            self._set(Phase.FAILED)
            if self._refused is not None:
                self._tools.mount.fail(self.id, str(self._refused))
                raise self._refused from None
            raise
        except FalError as exc:
            self._set(Phase.FAILED)
            self._tools.mount.fail(self.id, str(exc))
            raise
        finally:
            self._stop.set()
            self._hashing.cancel()
            await asyncio.gather(self._hashing, return_exceptions=True)
            await self._fetching.close()
        return self.path

    async def _fetch(self) -> None:
        """Until all pieces are here. Waits for its turn, and for room on the disk."""
        while not self.tally.complete:
            try:
                async with self._tools.lanes.turn(self):
                    self._full = ""
                    self._set(Phase.FETCHING)
                    await self._fetching.run()
            except Full as exc:
                self._set(Phase.QUEUED)
                await self._wait_for_room(exc)

    async def _wait_for_room(self, full: Full) -> None:
        if not self._full:
            self._tools.news.event("DISK_FULL", self.model, str(full))
        self._full = f"room on the disk: {full}"
        self.tell()
        missing = self.tally.bytes_total - self.tally.bytes_done
        try:
            await asyncio.to_thread(self._tools.store.evict, missing)
        except (FalError, OSError) as exc:
            _log.warning("eviction_failed", error=str(exc))
        await asyncio.sleep(_FULL_RETRY_S)

    async def _known(self) -> bool:
        """True once the content of what is here is known to be right; False when pieces have to be fetched again."""
        if not self._attested.is_set():
            self._set(Phase.CHECKING)
            digests = await self._hashed()
            if digests is None:
                return self.tally.complete
            if self._known_by_digest:
                return True  # finish compares
            await self._tell_attestation(digests)
        return self.tally.complete and await self._proved()

    async def _proved(self) -> bool:
        """Whether the bytes have the SHA-256 that the origin published, where it did; CORRUPT when they have another.

        The signed piece digests came from one node, which read all of it; this node takes its word for nothing that it
        can check itself. False: pieces have to be fetched again.
        """
        if not self.artifact.published:
            return True
        self._set(Phase.CHECKING)
        digests = await self._hashed(attested_too=True)
        if digests is not None and (found := wrong_file(self.artifact, digests)) is not None:
            await self._discard_file(found[0])
            self._tools.news.event("BAD_ATTESTATION", self.model, found[1])
            raise not_the_content(self.model, self.artifact.files[found[0]].path, found[1])
        return digests is not None

    async def _hashed(self, *, attested_too: bool = False) -> list[bytes] | None:
        """SHA-256 of all files; None when pieces were lost, or it was attested meanwhile unless that matters not."""
        while (digests := self._frontier.digests) is None:
            if (self._attested.is_set() and not attested_too) or not self.tally.complete:
                return None
            await self.changed(_HASH_LOOK_S)
            if self._hashing is not None and self._hashing.done() and (attested_too or not self._attested.is_set()):
                raise FalError(
                    Code.STORE_FAILED,
                    f"the files of {self.model} cannot be read: {self._hashing.exception()}",
                    remedy="Look at the cache disk and fal-fsd's log.",
                )
        return digests

    async def _tell_attestation(self, sha256: list[bytes]) -> None:
        """Tell the scheduler what is here, wait until it has attested it. CORRUPT: it is not what was published."""
        digests = [self.part.digest_of(piece) or b"" for piece in range(self.artifact.layout.count)]
        claims = {piece: c for piece, digest in enumerate(digests) if (c := self.claims.get(piece, digest)) is not None}
        message = attestation_of(self.artifact, sha256, digests, claims, self._tools.place().node_id)
        self._set(Phase.UNATTESTED)
        self._attestation, self._attested_told_s = message, self._tools.clock.monotonic_s()
        self._tools.news.attestation(message)
        if message.failure:
            paths = [file.path for file in self.artifact.files]
            await self._discard_file(paths.index(message.files[0].path))
            self._tools.news.event("BAD_ORIGIN", self.model, message.failure)
            raise not_as_published(message)
        await self._attested.wait()

    async def _finish(self) -> Path:
        known = None if self.artifact.attested else await self._attest_by_digest()
        await asyncio.to_thread(self._tools.store.catalog.set_came, {self.id: self.tally.came})
        return await asyncio.to_thread(self._tools.store.finish, self.id, sha256=known)

    async def _attest_by_digest(self) -> list[bytes]:
        """SHA-256 of the files, which the manifest digest names: they are the attestation. CORRUPT naming the file."""
        known = self._frontier.digests
        assert known is not None
        for index, (file, found) in enumerate(zip(self.artifact.files, known, strict=True)):
            if file.sha256 != found:
                await self._discard_file(index)
                raise FalError(
                    Code.CORRUPT,
                    f"file {file.path!r} at {self.artifact.uri} is not what was registered: SHA-256 is {found.hex()},"
                    f" not {file.sha256.hex()}",
                    remedy="Nothing of the model was exposed. Restore the file, or register the model again.",
                    field=file.path,
                )
        hashes = tuple(self.part.digest_of(piece) or b"" for piece in range(self.artifact.layout.count))
        attested = replace(self.artifact, hashes=hashes)
        self._attested.set()
        await asyncio.to_thread(self._tools.store.attest, attested)
        return known

    async def _discard_file(self, file: int) -> None:
        """Its content is wrong, whatever the pieces' digests: who stages it again reads it anew."""
        pieces = [piece for piece in self.artifact.layout.of_file(file) if self.part.has(piece)]
        await asyncio.to_thread(self.raw.discard, pieces)
        await asyncio.to_thread(self.claims.drop, pieces)
        self.told_lost(pieces)

    async def _hash_behind(self) -> None:
        """SHA-256 behind the pieces' frontier, in a thread, for as long as somebody has to know it."""
        while self.artifact.published or not self._attested.is_set():
            before = self.tally.bytes_done
            done = await asyncio.to_thread(self._frontier.advance, self._stop)
            if done:
                self.tell()
            if done or self.tally.bytes_done == before:
                await self.tally.moved()

    async def _mount(self) -> None:
        try:
            self.in_flight_path = await self._tools.mount.open(self.part)
        except (FalError, OSError) as exc:
            _log.warning("mount_failed", artifact=self.id, error=str(exc))
            return
        self.tell()

    def _vouch_for_old(self) -> None:
        """Pieces of an earlier process whose claims were lost: this node says what it has. Blocks."""
        signer = self._tools.signer()
        if self.artifact.attested or signer is None:
            return
        for piece in self.part.have:
            if (digest := self.part.digest_of(piece)) is not None and self.claims.get(piece, digest) is None:
                with contextlib.suppress(OSError):  # a full disk: it stays unclaimed until it is attested
                    self.claims.take([signer.claim(self.id, piece, digest)], own=True)

    def _check_claim(self, claim: Claim) -> None:
        if self.part.digest_of(claim.piece) not in (None, claim.digest):
            message = f"piece {claim.piece} of {self.model}: {claim.signer} vouches for other bytes than are here"
            self._tools.news.event("CLAIMS_DIFFER", claim.signer, message)

    def _set(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            self.tell()

    def _ended(self, task: asyncio.Task[Path]) -> None:
        if not task.cancelled():
            task.exception()  # its waiters may all have gone
        self.tell()


__all__ = ["Phase", "Transfer"]
