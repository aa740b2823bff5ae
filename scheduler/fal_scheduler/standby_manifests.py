"""Copies of the leader's manifests on a standby's own disk: a takeover on another machine finds what to tell nodes.

The store holds digests only; manifests lie beside it, on the disk of whoever led when they were made. Each standby asks
the leader every second what is new, over mutual TLS as a scheduler, and keeps what proves itself (a listing by its
hash, the rest by the CA's signature). What is newer than the last copy when a leader dies, nodes that have it bring
back (`manifest_desk`).

Runs in every scheduler; idle while it leads. Blocks on small files in threads only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from fal_contract.artifact import from_manifest
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_contract.limits import RPC_TIMEOUT_S
from fal_contract.rpc import channel, fal_errors
from fal_contract.telemetry import get_logger
from fal_contract.v1 import schedulers_pb2 as pb
from fal_contract.v1.schedulers_pb2_grpc import SchedulersStub
from fal_scheduler.blobs import ManifestBlobs, check_manifest
from fal_scheduler.leadership import CurrentLeadership

LOOK_S: Final = 1.0
FETCHED_AT_ONCE_MAX: Final = 8
_SKIPPED: Final = frozenset({Code.NOT_FOUND, Code.CORRUPT, Code.FAILED_PRECONDITION})
if TYPE_CHECKING:
    from fal_contract.v1.schedulers_pb2_grpc import SchedulersAsyncStub

_log = get_logger("scheduler.standby")


class ManifestMirror:
    """`leader`: where the leader listens; nothing where nobody is known to lead, or it is this process."""

    def __init__(
        self,
        blobs: ManifestBlobs,
        current: CurrentLeadership,
        *,
        leader: Callable[[], tuple[str, ...]],
        identity: Callable[[], Identity],
    ) -> None:
        self._blobs = blobs
        self._current = current
        self._leader = leader
        self._identity = identity
        self._version = ""
        self._from = ""
        self._trouble = ""
        self.kept = 0
        self.complete = False

    def state(self) -> tuple[int, bool]:
        """Manifests here, and whether they were all that the leader had at the last look."""
        return self.kept, self.complete

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            addresses = () if self._current.leads else self._leader()
            if not addresses:
                self._version, self.complete = "", False
                await asyncio.sleep(LOOK_S)
                continue
            try:
                await self._follow(addresses[0])
            except FalError as error:
                self._say(str(error))
            except OSError as error:
                self._say(f"a manifest cannot be kept: {error.strerror}")
            except Exception:  # a mistake here must not keep anybody from leading
                _log.exception("mirror_failed")
                self.complete = False
            await asyncio.sleep(LOOK_S)

    async def _follow(self, address: str) -> None:
        """Keep up with one leader until it is another; ends with what went wrong."""
        if address != self._from:
            self._version, self._from = "", address
        async with channel(address, self._identity()) as opened:
            stub: SchedulersAsyncStub = SchedulersStub(opened)
            while not self._current.leads and address in self._leader():
                await self._look(stub)
                self._trouble = ""
                await asyncio.sleep(LOOK_S)

    async def _look(self, stub: SchedulersAsyncStub) -> None:
        reply = await self._list(stub, self._version, "")
        version, whole = reply.version, reply.complete
        while True:
            ids = await asyncio.to_thread(self._lacking, reply.ids) if whole else list(reply.ids)
            for at in range(0, len(ids), FETCHED_AT_ONCE_MAX):
                await asyncio.gather(*(self._fetch(stub, one) for one in ids[at : at + FETCHED_AT_ONCE_MAX]))
            if not reply.more:
                break
            reply = await self._list(stub, "", reply.ids[-1])
        if whole or version != self._version:
            self.kept = len(await asyncio.to_thread(self._blobs.names))
        self._version, self.complete = version, True

    async def _list(self, stub: SchedulersAsyncStub, version: str, after: str) -> pb.ListManifestsReply:
        with fal_errors():
            return await stub.ListManifests(
                pb.ListManifestsRequest(version=version, after=after), timeout=RPC_TIMEOUT_S
            )

    async def _fetch(self, stub: SchedulersAsyncStub, id_: str) -> None:
        try:
            with fal_errors():
                message = await stub.FetchManifest(pb.FetchManifestRequest(id=id_), timeout=RPC_TIMEOUT_S)
            artifact = check_manifest(message, id_, self._blobs.ca_key)
        except FalError as error:
            if error.code not in _SKIPPED:
                raise
            _log.info("manifest_not_copied", artifact=id_[:12], message=str(error))
            return
        await asyncio.to_thread(self._blobs.put, artifact)

    def _lacking(self, ids: Sequence[str]) -> list[str]:
        """Which of these are not here, or as a listing only. On a thread."""
        lacking = []
        for id_ in ids:
            try:
                whole = self._blobs.has(id_) and from_manifest(self._blobs.read(id_)).attested
            except FalError:
                whole = False
            if not whole:
                lacking.append(id_)
        return lacking

    def _say(self, message: str) -> None:
        self.complete = False
        if message != self._trouble:
            self._trouble = message
            _log.warning("manifests_not_copied", leader=self._from, message=message)


__all__ = ["ManifestMirror"]
