"""The agent's side of fal-fsd: a typed client over the node's unix socket.

Every call is idempotent and raises FalError; UNAVAILABLE while fsd is away. One channel, which reconnects by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import grpc.aio

from fal_contract import rpc
from fal_contract.errors import Code, FalError
from fal_contract.limits import IMAGE_PACK_TIMEOUT_S, INGEST_TIMEOUT_S, RPC_TIMEOUT_S, STAGE_TIMEOUT_S
from fal_contract.v1 import agent_pb2, fsd_pb2, fsd_pb2_grpc, state_pb2

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all
_ANSWER_TIMEOUT_S: Final = 2.0
# A unix socket answers or does not; there is no network to spare.
_QUICK: Final = {"grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 500}


class CacheClient:
    """A client of the fsd at `socket`. Close it."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        options = {**dict(rpc.CHANNEL_OPTIONS), **_QUICK}
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=list(options.items()))
        self._stub = fsd_pb2_grpc.NodeCacheStub(self._channel)

    async def stage(
        self, artifact: agent_pb2.Artifact, owner: str, *, on_progress: OnProgress = lambda done, total: None
    ) -> Path:
        """The folder with the artifact's files, every digest checked, pinned for `owner`."""
        with rpc.fal_errors():
            request = fsd_pb2.StageRequest(artifact=artifact, owner=owner)
            async for progress in self._stub.Stage(request, timeout=STAGE_TIMEOUT_S):
                on_progress(progress.bytes_done, progress.bytes_total)
                if progress.ready:
                    return Path(progress.path)
        raise FalError(Code.UNAVAILABLE, "fal-fsd ended a staging without a word", remedy="It is asked again.")

    async def view(self, artifact: agent_pb2.Artifact, owner: str, *, record: bool = False) -> tuple[Path, bool]:
        """The folder where it can be read soonest, and whether that is the finished one. Pinned for `owner`.

        `record`: through the mount even if it is finished, where that works here; `take_access` ends it.
        """
        with rpc.fal_errors():
            request = fsd_pb2.StageRequest(artifact=artifact, owner=owner, in_flight=True, record=record)
            call = self._stub.Stage(request, timeout=STAGE_TIMEOUT_S)
            try:
                async for progress in call:
                    if progress.ready:
                        return Path(progress.path), True
                    if progress.in_flight_path:
                        return Path(progress.in_flight_path), False
            finally:
                call.cancel()
        raise FalError(Code.UNAVAILABLE, "fal-fsd ended a staging without a word", remedy="It is asked again.")

    async def cancel_reads(self, pids: Sequence[int]) -> None:
        """End what these processes wait for in unfinished files."""
        with rpc.fal_errors():
            await self._stub.CancelReads(fsd_pb2.CancelReadsRequest(pids=pids), timeout=RPC_TIMEOUT_S)

    async def take_access(self, artifact_id: str) -> list[int]:
        """The pieces that were read through the mount, in order of first use; ends their recording."""
        with rpc.fal_errors():
            request = fsd_pb2.TakeAccessRequest(artifact_id=artifact_id)
            reply = await self._stub.TakeAccess(request, timeout=RPC_TIMEOUT_S)
        return list(reply.pieces)

    async def ingest(
        self, folder: Path, *, model: str, bytes_max: int, owner: str, keep_s: float, kind: str = "cache"
    ) -> state_pb2.ModelManifest:
        """Take a folder's files in as an artifact, kept for `owner` so long. INVALID, NO_CAPACITY …"""
        with rpc.fal_errors():
            request = fsd_pb2.IngestRequest(
                folder=str(folder), model=model, kind=kind, bytes_max=bytes_max, owner=owner
            )
            timeout_s = IMAGE_PACK_TIMEOUT_S if kind == "image" else INGEST_TIMEOUT_S
            reply = await self._stub.Ingest(request, timeout=timeout_s)
            pin = fsd_pb2.PinRequest(manifest_digest=reply.manifest.artifact_id, owner=owner, ttl_s=keep_s)
            await self._stub.Pin(pin, timeout=RPC_TIMEOUT_S)
        return reply.manifest

    async def pin(self, manifest_digest: str, owner: str) -> None:
        """Keep an artifact that is here. NOT_FOUND."""
        with rpc.fal_errors():
            await self._stub.Pin(
                fsd_pb2.PinRequest(manifest_digest=manifest_digest, owner=owner), timeout=RPC_TIMEOUT_S
            )

    async def unpin(self, owner: str, artifact: str = "") -> None:
        """Let go of all pins of `owner`, or of that on one artifact (its id or manifest digest)."""
        with rpc.fal_errors():
            await self._stub.Unpin(fsd_pb2.UnpinRequest(owner=owner, manifest_digest=artifact), timeout=RPC_TIMEOUT_S)

    async def artifacts(self) -> list[fsd_pb2.CachedArtifact]:
        """What is here or on its way, by digest."""
        with rpc.fal_errors():
            reply = await self._stub.ListArtifacts(fsd_pb2.ListArtifactsRequest(), timeout=RPC_TIMEOUT_S)
        return list(reply.artifacts)

    async def status(self) -> fsd_pb2.CacheStatus:
        """What works here, room, peers."""
        with rpc.fal_errors():
            return await self._stub.GetStatus(fsd_pb2.GetCacheStatusRequest(), timeout=RPC_TIMEOUT_S)

    async def answers(self) -> bool:
        """True when an fsd listens. Asks the kernel, not gRPC, whose channel would first have to try again."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                _, writer = await asyncio.open_unix_connection(str(self._socket))
        except OSError:  # TimeoutError too
            return False
        writer.close()
        return True

    async def close(self) -> None:
        await self._channel.close(None)
