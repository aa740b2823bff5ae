"""fal.v1.NodeCache: what the agent of this node asks of its weight cache.

Invariants: Stage answers ready only with a folder whose every byte was checked; pins are durable before their call
returns, and are dropped on the agent's word alone. The socket is the owner's (0600), so callers are not checked
further.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc.aio

from fal_contract import rpc
from fal_contract.errors import FalError, invalid
from fal_contract.model_manifest import FileEntry, check_digest
from fal_contract.v1 import fsd_pb2, fsd_pb2_grpc
from fal_fsd.core.manifest import Manifest, checked, local_folder
from fal_fsd.flights import Flights
from fal_fsd.store import Store

_OWNER_CHARS_MAX = 256
Context = grpc.aio.ServicerContext[Any, Any]


class NodeCache(fsd_pb2_grpc.NodeCacheServicer):
    """See the module's docstring."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._flights = Flights(store)

    async def close(self) -> None:
        """End what is being staged; it is taken up after the next start."""
        await self._flights.close()

    async def Stage(self, request: fsd_pb2.StageRequest, context: Context) -> AsyncIterator[fsd_pb2.StageProgress]:
        try:
            manifest, source = _wanted(request)
            owner = _owner(request.owner, may_be_empty=True)
            await asyncio.to_thread(self._store.begin, manifest, request.artifact.model, owner)
            total = manifest.bytes_total
            async with aclosing(self._flights.stage(manifest, source)) as news:
                async for said in news:
                    if isinstance(said, Path):
                        yield fsd_pb2.StageProgress(bytes_done=total, bytes_total=total, ready=True, path=str(said))
                    else:
                        yield fsd_pb2.StageProgress(bytes_done=min(said, total), bytes_total=total)
        except FalError as exc:
            await rpc.abort(context, exc)

    async def Pin(self, request: fsd_pb2.PinRequest, context: Context) -> fsd_pb2.PinReply:
        try:
            digest, owner = check_digest(request.manifest_digest), _owner(request.owner)
            await asyncio.to_thread(self._store.pin, digest, owner)
        except FalError as exc:
            await rpc.abort(context, exc)
        return fsd_pb2.PinReply()

    async def Unpin(self, request: fsd_pb2.UnpinRequest, context: Context) -> fsd_pb2.UnpinReply:
        try:
            digests = await asyncio.to_thread(self._store.unpin, _owner(request.owner))
        except FalError as exc:
            await rpc.abort(context, exc)
        for digest in digests:
            await self._flights.let_go(digest)
        return fsd_pb2.UnpinReply(released=len(digests))

    async def ListArtifacts(
        self, request: fsd_pb2.ListArtifactsRequest, context: Context
    ) -> fsd_pb2.ListArtifactsReply:
        found = await asyncio.to_thread(self._store.artifacts)
        return fsd_pb2.ListArtifactsReply(
            artifacts=[
                fsd_pb2.CachedArtifact(
                    manifest_digest=a.digest, model=a.model, bytes=a.bytes_total, ready=a.ready, pinned_by=a.pinned_by
                )
                for a in found
            ]
        )


def _wanted(request: fsd_pb2.StageRequest) -> tuple[Manifest, Path]:
    artifact = request.artifact
    files = [FileEntry(file.path, file.bytes, file.sha256) for file in artifact.manifest.files]
    return checked(artifact.manifest_digest, files), Path(local_folder(artifact.uri))


def _owner(owner: str, *, may_be_empty: bool = False) -> str:
    if (not owner and not may_be_empty) or len(owner) > _OWNER_CHARS_MAX:
        raise invalid("owner", owner[:80], "names nobody", remedy=f"Give 1 to {_OWNER_CHARS_MAX} characters.")
    return owner
