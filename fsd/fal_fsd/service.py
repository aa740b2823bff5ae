"""fal.v1.NodeCache: what the agent of this node asks of its weight cache.

Invariants: Stage answers ready only with a folder whose every byte was checked; pins are durable before their call
returns, and are dropped on the agent's word or their expiry alone. The socket is the owner's (0600), so callers are
not checked further.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc.aio

from fal_contract import rpc
from fal_contract.artifact import Artifact
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import IMAGE_FIRST_PIECES_MAX, IMAGE_START_S
from fal_contract.model_manifest import check_digest
from fal_contract.v1 import fsd_pb2, fsd_pb2_grpc
from fal_fsd import ingest
from fal_fsd.node import CacheNode
from fal_fsd.recording import Recordings
from fal_fsd.transfer import Phase, Transfer

_OWNER_CHARS_MAX: Final = 256
_PROGRESS_S: Final = 0.25
_TTL_MAX_S: Final = 30 * 86400.0
_TIERS: Final = ("", "disk", "memory")
_PIDS_MAX: Final = 4096
Context = grpc.aio.ServicerContext[Any, Any]


class NodeCache(fsd_pb2_grpc.NodeCacheServicer):
    """See the module's docstring."""

    def __init__(self, node: CacheNode) -> None:
        self._node = node
        self._recordings = Recordings()

    async def Stage(self, request: fsd_pb2.StageRequest, context: Context) -> AsyncIterator[fsd_pb2.StageProgress]:
        try:
            owner = _owner(request.owner, may_be_empty=True)
            if request.tier not in _TIERS:
                raise invalid("tier", request.tier, "is no tier", remedy="Use disk or memory.")
            artifact = await self._node.resolve(request.artifact)
            named, model = request.artifact.manifest_digest, request.artifact.model
            if request.tier:
                await self._node.want_tier(artifact.id, request.tier)
            async with self._node.staged(artifact, model, owner, digest_named=named) as found:
                if isinstance(found, Path):
                    if request.record and request.in_flight:
                        shown = await self._recordings.open(self._node.around.mount, artifact, found)
                        if shown is not None:
                            yield fsd_pb2.StageProgress(bytes_total=artifact.bytes_total, in_flight_path=str(shown))
                    yield _ready(artifact, found)
                    return
                order = found.fetching.order
                order.prefer(request.artifact.first_pieces[:IMAGE_FIRST_PIECES_MAX])
                if not request.in_flight:
                    order.start_ends()  # who asks for the whole has started it
                async for progress in self._follow(found, request):
                    yield progress
        except FalError as exc:
            await rpc.abort(context, exc)

    async def _follow(self, transfer: Transfer, request: fsd_pb2.StageRequest) -> AsyncIterator[fsd_pb2.StageProgress]:
        """Progress from time to time and whenever the state changes; ends ready or with the transfer's error."""
        allowed = request.artifact.allow_provisional
        while not transfer.task.done():
            readable = request.in_flight and (allowed or transfer.artifact.attested)
            if readable:
                transfer.open_mount()
            if readable and transfer.in_flight_path is not None and transfer.artifact.kind == "image":
                transfer.fetching.order.start_begins(IMAGE_START_S)  # who looks at an image starts a container of it
            yield _progress(transfer, in_flight=readable)  # another stager's app may read what this one's may not
            await transfer.changed(_PROGRESS_S)
        if transfer.task.cancelled():
            raise FalError(Code.UNAVAILABLE, "the staging was ended", remedy="It is asked again.")
        path = transfer.task.result()
        yield _ready(transfer.artifact, path, transfer)

    async def Pin(self, request: fsd_pb2.PinRequest, context: Context) -> fsd_pb2.PinReply:
        try:
            digest, owner = check_digest(request.manifest_digest), _owner(request.owner)
            if not 0 <= request.ttl_s <= _TTL_MAX_S:
                raise invalid("ttl_s", request.ttl_s, "is no lifetime", remedy=f"Give 0 to {_TTL_MAX_S:.0f} seconds.")
            await self._node.pin(digest, owner, ttl_s=request.ttl_s)
        except FalError as exc:
            await rpc.abort(context, exc)
        return fsd_pb2.PinReply()

    async def Unpin(self, request: fsd_pb2.UnpinRequest, context: Context) -> fsd_pb2.UnpinReply:
        released = 0
        try:
            if request.manifest_digest:
                check_digest(request.manifest_digest)
            released = await self._node.unpin(_owner(request.owner), request.manifest_digest)
        except FalError as exc:
            await rpc.abort(context, exc)
        return fsd_pb2.UnpinReply(released=released)

    async def ListArtifacts(
        self, request: fsd_pb2.ListArtifactsRequest, context: Context
    ) -> fsd_pb2.ListArtifactsReply:
        return fsd_pb2.ListArtifactsReply(artifacts=await self._node.view())

    async def CancelReads(self, request: fsd_pb2.CancelReadsRequest, context: Context) -> fsd_pb2.CancelReadsReply:
        try:
            if len(request.pids) > _PIDS_MAX:
                raise invalid("pids", len(request.pids), "are too many", remedy=f"Name at most {_PIDS_MAX} at once.")
        except FalError as exc:
            await rpc.abort(context, exc)
        return fsd_pb2.CancelReadsReply(cancelled=self._node.around.mount.cancel_reads(list(request.pids)))

    async def TakeAccess(self, request: fsd_pb2.TakeAccessRequest, context: Context) -> fsd_pb2.TakeAccessReply:
        pieces: list[int] = []
        try:
            artifact_id = check_digest(request.artifact_id)
            pieces = await self._recordings.take(self._node.around.mount, artifact_id)
        except FalError as exc:
            await rpc.abort(context, exc)
        return fsd_pb2.TakeAccessReply(pieces=pieces)

    async def Ingest(self, request: fsd_pb2.IngestRequest, context: Context) -> fsd_pb2.IngestReply:
        reply = fsd_pb2.IngestReply()
        try:
            owner = _owner(request.owner)
            reply = await ingest.ingest(self._node, request, owner)
        except FalError as exc:
            await rpc.abort(context, exc)
        return reply

    async def GetStatus(self, request: fsd_pb2.GetCacheStatusRequest, context: Context) -> fsd_pb2.CacheStatus:
        return await self._node.status()


def _progress(transfer: Transfer, *, in_flight: bool) -> fsd_pb2.StageProgress:
    mounted = transfer.in_flight_path if in_flight else None
    return fsd_pb2.StageProgress(
        bytes_done=transfer.tally.bytes_done,
        bytes_total=transfer.tally.bytes_total,
        in_flight_path=str(mounted or ""),
        bytes_from_origin=transfer.tally.bytes_from_origin,
        bytes_from_peers=transfer.tally.bytes_from_peers,
        rate_bytes_s=transfer.tally.rate_bytes_s,
        provisional=not transfer.artifact.attested,
        waits_for=transfer.waits_for if transfer.phase is not Phase.READY else "",
    )


def _ready(artifact: Artifact, path: Path, transfer: Transfer | None = None) -> fsd_pb2.StageProgress:
    told = fsd_pb2.StageProgress(
        bytes_done=artifact.bytes_total, bytes_total=artifact.bytes_total, ready=True, path=str(path)
    )
    if transfer is not None:
        told.bytes_from_origin = transfer.tally.bytes_from_origin
        told.bytes_from_peers = transfer.tally.bytes_from_peers
    return told


def _owner(owner: str, *, may_be_empty: bool = False) -> str:
    if (not owner and not may_be_empty) or len(owner) > _OWNER_CHARS_MAX:
        raise invalid("owner", owner[:80], "names nobody", remedy=f"Give 1 to {_OWNER_CHARS_MAX} characters.")
    return owner


__all__ = ["NodeCache"]
