"""`fal.v1.Schedulers`: who leads, and what standbys and operators take from the leader to keep."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

from fal_contract.errors import FalError
from fal_contract.limits import STANDBY_HOLD_S
from fal_contract.snapshot_file import MANIFEST, RECORD, chunks, entry
from fal_contract.v1 import schedulers_pb2 as pb
from fal_contract.v1 import state_pb2
from fal_contract.v1.schedulers_pb2_grpc import SchedulersServicer
from fal_contract.versions import software
from fal_scheduler.directory import Directory
from fal_scheduler.leadership import CurrentLeadership, Leadership
from fal_scheduler.store.interface import Loaded

IDS_LISTED_MAX: Final = 20_000
WAIT_MAX_S: Final = 2 * STANDBY_HOLD_S
Context = Any  # grpc.aio.ServicerContext; generic in the stubs only


class SchedulersService(SchedulersServicer):
    """Served by standbys too, as far as that makes sense."""

    def __init__(self, current: CurrentLeadership, directory: Directory, cluster_id: str) -> None:
        self._current = current
        self._directory = directory
        self._cluster_id = cluster_id

    async def GetLeader(self, request: pb.GetLeaderRequest, context: Context) -> pb.LeaderView:
        if request.wait_s > 0.0 and not self._directory.knows_leader:
            with contextlib.suppress(FalError):  # what is known then is the answer
                await self._current.soon(min(request.wait_s, WAIT_MAX_S))
        return self._directory.view(self._cluster_id)

    async def ListManifests(self, request: pb.ListManifestsRequest, context: Context) -> pb.ListManifestsReply:
        return await list_manifests(self._current.get(), request)

    async def FetchManifest(self, request: pb.FetchManifestRequest, context: Context) -> state_pb2.ModelManifest:
        return await asyncio.to_thread(self._current.get().manifests.read, request.id)

    async def SaveSnapshot(self, request: pb.SaveSnapshotRequest, context: Context) -> AsyncIterator[pb.SnapshotChunk]:
        async for chunk in save_snapshot(self._current.get(), request):
            yield chunk


async def list_manifests(leader: Leadership, request: pb.ListManifestsRequest) -> pb.ListManifestsReply:
    """What was written since the caller's version, where that is known; else all names, in pages."""
    blobs = leader.manifests
    version = f"{leader.view.term}-{blobs.writes()}"  # before the look: what comes meanwhile is told again
    term, _, number = request.version.partition("-")
    if not request.after and term == str(leader.view.term) and number.isdigit():
        since = blobs.written_since(int(number))
        if since is not None and len(since) <= IDS_LISTED_MAX:
            return pb.ListManifestsReply(version=version, ids=since)
    names = await asyncio.to_thread(lambda: sorted(blobs.names()))
    at = bisect_right(names, request.after) if request.after else 0
    page = names[at : at + IDS_LISTED_MAX]
    return pb.ListManifestsReply(version=version, complete=True, ids=page, more=at + len(page) < len(names))


async def save_snapshot(leader: Leadership, request: pb.SaveSnapshotRequest) -> AsyncIterator[pb.SnapshotChunk]:
    """The store as of one revision, then the manifests that lie beside it."""
    loaded = await leader.load()
    meta = leader.view.meta
    assert meta is not None, "a leader has loaded its store"
    names = [] if request.without_manifests else await asyncio.to_thread(lambda: sorted(leader.manifests.names()))
    head = {
        "cluster_id": meta.cluster_id,
        "epoch": meta.epoch,
        "incarnation": meta.incarnation,
        "term": leader.view.term,
        "revision": loaded.revision,
        "records": len(loaded.records),
        "manifests": len(names),
        "store": leader.store,
        "software": software(),
        "taken_at_s": leader.clock.wall_s(),
    }
    yield pb.SnapshotChunk(head=json.dumps(head))
    digest = hashlib.sha256()
    parts = _body(leader, loaded, names)
    while (body := await asyncio.to_thread(next, parts, None)) is not None:
        digest.update(body)
        yield pb.SnapshotChunk(body=body)
    yield pb.SnapshotChunk(sha256=digest.hexdigest())


def _body(leader: Leadership, loaded: Loaded, names: list[str]) -> Iterator[bytes]:
    """Blocks on the disk."""

    def entries() -> Iterator[bytes]:
        for key in sorted(loaded.records):
            yield entry(RECORD, key, loaded.records[key])
        for id_ in names:
            try:
                manifest = leader.manifests.read(id_)
            except FalError:
                continue  # damaged, or gone meanwhile
            yield entry(MANIFEST, id_, manifest.SerializeToString(deterministic=True))

    return chunks(entries())
