"""Uploads a folder from an operator's machine into the swarm, without any origin: what `falctl weights push` does.

The folder is hashed once. The scheduler names nodes that take it; to the best of them this process is a peer that has
everything: the node asks for the pieces that it lacks, checks each by the operator's digests, and trades them with the
other nodes. So a second push of the same folder goes on where the first one ended, whichever node is asked. When a node
holds all of it the scheduler attests it. A file that changes meanwhile ends it with CONFLICT, and nothing is attested.

Bounds: a node that is not connected for `lost_s`, or takes nothing for `stalled_s`, makes room for the next one;
_ROUNDS_MAX times the scheduler is asked for nodes before it is given up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Protocol

from fal_contract.artifact import Artifact, to_manifest
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.identity import Identity
from fal_contract.limits import MESSAGE_BYTES_MAX
from fal_contract.pieces import Bitmap
from fal_contract.ticket import TICKET_TTL_S
from fal_contract.v1 import cluster_pb2, state_pb2, weights_pb2
from fal_fsd.core.messages import Claim, Lease
from fal_fsd.core.rates import BandwidthLimits, RateMeter
from fal_fsd.local_folder import LocalFile, LocalPart, changed, hash_folder, list_folder
from fal_fsd.peers.address import PeerAddress
from fal_fsd.peers.connection import Connection
from fal_fsd.peers.net import PeerNet

_ROUNDS_MAX: Final = 3
_LOOK_S: Final = 0.25
_TOLD_S: Final = 0.5  # between two words about progress
_END_TIMEOUT_S: Final = 120.0  # a node hashes nothing again, but has to write it all down
_END_LOOK_S: Final = 0.3
_RENEW_AGAIN_S: Final = 30.0


class PushApi(Protocol):
    """The scheduler. Each call has a bound of its own and raises FalError."""

    async def begin(self, request: cluster_pb2.BeginPushRequest) -> cluster_pb2.BeginPushReply: ...

    async def end(self, request: cluster_pb2.EndPushRequest) -> cluster_pb2.ModelView: ...


@dataclass(frozen=True, slots=True)
class PushProgress:
    """How far it is. `phase`: "hash", "send", "finish". Bytes; `node_id`: who takes it; `rate_bytes_s`: measured."""

    phase: str
    bytes_done: int
    bytes_total: int
    rate_bytes_s: float = 0.0
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What is pushed as what. `bandwidth_bytes_s` 0: no limit; `pool`: only its nodes take it, empty: any."""

    model_id: str
    kind: str = "model"
    allow_pickle: bool = False
    pool: str = ""
    bandwidth_bytes_s: int = 0
    image: state_pb2.ImageFacts | None = None  # of kind "image"
    lost_s: float = 10.0
    stalled_s: float = 40.0


@dataclass(frozen=True, slots=True)
class Pushed:
    """`bytes_sent`: by this process; what nodes had before was not sent again."""

    view: cluster_pb2.ModelView
    bytes_sent: int


OnProgress = Callable[[PushProgress], None]


async def push(
    folder: Path,
    settings: PushSettings,
    api: PushApi,
    identity: Identity,
    *,
    clock: Clock,
    rng: Random,
    on_progress: OnProgress = lambda progress: None,
) -> Pushed:
    """Push a folder. `on_progress` is called on the event loop, about twice a second.

    Raises INVALID naming the file or field, CONFLICT (a file changed, or somebody else pushed the name), UNAVAILABLE
    (no node took it), and what the scheduler raises.
    """
    files = await asyncio.to_thread(list_folder, folder, allow_pickle=settings.allow_pickle)
    artifact = await _hashed(files, settings, on_progress)
    request = _request(artifact, settings)
    part = LocalPart(artifact, files)
    try:
        sent = await _Push(part, request, settings, api, identity, clock, rng, on_progress).run()
        if path := await asyncio.to_thread(part.look):
            raise changed(path)
    finally:
        part.close()
    on_progress(PushProgress("finish", artifact.bytes_total, artifact.bytes_total))
    end = cluster_pb2.EndPushRequest(id=settings.model_id, artifact_id=artifact.id)
    return Pushed(await _ended(api, end, clock), sent)


async def _hashed(files: tuple[LocalFile, ...], settings: PushSettings, on_progress: OnProgress) -> Artifact:
    total, done, lock, stop = sum(file.size_bytes for file in files), 0, threading.Lock(), threading.Event()

    def count(bytes_: int) -> None:
        nonlocal done
        with lock:
            done += bytes_

    uri = f"push://{settings.model_id}"
    work = asyncio.create_task(
        asyncio.to_thread(hash_folder, files, uri, settings.kind, stop=stop, on_bytes=count), name="hash"
    )
    try:
        while not (await asyncio.wait({work}, timeout=_TOLD_S))[0]:
            on_progress(PushProgress("hash", done, total))
    finally:
        stop.set()  # where we are cancelled
        await asyncio.gather(work, return_exceptions=True)
    return work.result()


def _request(artifact: Artifact, settings: PushSettings) -> cluster_pb2.BeginPushRequest:
    request = cluster_pb2.BeginPushRequest(
        id=settings.model_id,
        kind=settings.kind,
        manifest=to_manifest(artifact),
        allow_pickle=settings.allow_pickle,
        pool=settings.pool,
        image=settings.image,
    )
    if request.ByteSize() > MESSAGE_BYTES_MAX - 4096:
        raise invalid(
            "DIR", artifact.layout.count, "pieces are too many for one push", remedy="Put it in an object store."
        )
    return request


async def _ended(api: PushApi, request: cluster_pb2.EndPushRequest, clock: Clock) -> cluster_pb2.ModelView:
    """The node tells the scheduler a moment after us that it has everything."""
    until_s = clock.monotonic_s() + _END_TIMEOUT_S
    while True:
        try:
            return await api.end(request)
        except FalError as error:
            if error.code not in (Code.UNAVAILABLE, Code.NOT_LEADER, Code.TIMEOUT) or clock.monotonic_s() > until_s:
                raise
        await asyncio.sleep(_END_LOOK_S)


class _Push:
    """One upload: asks for nodes, sends to one after the other until one has all of it."""

    def __init__(
        self,
        part: LocalPart,
        request: cluster_pb2.BeginPushRequest,
        settings: PushSettings,
        api: PushApi,
        identity: Identity,
        clock: Clock,
        rng: Random,
        on_progress: OnProgress,
    ) -> None:
        self.part = part
        self.settings = settings
        self.identity = identity
        self.clock = clock
        self.rng = rng
        self.on_progress = on_progress
        self._request = request
        self._api = api
        self._avoid: dict[str, str] = {}  # node → why

    async def run(self) -> int:
        """Bytes that were sent, once a node has all of it."""
        sent = 0
        for _ in range(_ROUNDS_MAX):
            reply = await self.begin()
            if reply.present:
                return sent
            for target in reply.targets:
                attempt = _Attempt(self, target, reply.caller)
                try:
                    why = await attempt.run()
                finally:
                    sent += await attempt.close()
                if not why:
                    return sent
                self._avoid[target.node_id] = why
        reasons = "; ".join(f"{node_id}: {why}" for node_id, why in self._avoid.items())
        raise FalError(
            Code.UNAVAILABLE,
            f"no node took all of {self.settings.model_id}: {reasons}",
            remedy="Push again, what has arrived stays; bulk ports of nodes must be reachable from here.",
        )

    async def begin(self) -> cluster_pb2.BeginPushReply:
        """Ask the scheduler for nodes, others than those that failed if there are any."""
        request = cluster_pb2.BeginPushRequest()
        request.CopyFrom(self._request)
        request.avoid.extend(self._avoid)
        return await self._api.begin(request)


class _Net(PeerNet):
    """Keeps why connections ended, also those that were refused."""

    last_end = ""

    def closed(self, connection: Connection, reason: str) -> None:
        self.last_end = reason
        super().closed(connection, reason)


class _Attempt:
    """Sending to one node. Implements ports.PeerEvents."""

    def __init__(self, push: _Push, target: weights_pb2.SwarmMember, caller: str) -> None:
        self._push = push
        self._target = target
        self._clock = push.clock
        self._layout = push.part.artifact.layout
        self._have = Bitmap(self._layout.count)
        self._up = False
        self._kick = asyncio.Event()
        self._bytes_done = 0
        self._meter = RateMeter()
        self._metered_s = push.clock.monotonic_s()
        self._doubtful = False  # a connection ended: it may have refused what it got
        self._renew_at_s = target.ticket_expires_s - TICKET_TTL_S / 2
        self._net = _Net(
            node_id=caller,
            events=self,
            clock=push.clock,
            rng=push.rng,
            identity=lambda: push.identity,
            limits=BandwidthLimits(node=push.settings.bandwidth_bytes_s),
            listen=None,
            tls="always",
        )

    async def run(self) -> str:
        """Why this node did not take all of it; empty: it did. Raises CONFLICT when a file changed."""
        await self._net.start()
        self._net.set_members(self._push.part.artifact.id, [_address(self._target)])
        self._net.join(self._push.part)
        moved_s = up_s = told_s = self._clock.monotonic_s()
        moved: tuple[int, int] = (0, 0)
        while not self._have.complete:
            self._kick.clear()
            await self._pause()
            await self._check_folder()
            await self._renew()
            now_s, sent = self._clock.monotonic_s(), self._net.status().bytes_sent
            if self._up:
                up_s = now_s
            if (now := (self._bytes_done, sent)) != moved:
                moved_s, moved = now_s, now
            if now_s - told_s >= _TOLD_S:
                self._tell()
                told_s = now_s
            if now_s - up_s > self._push.settings.lost_s:
                connected = "it does not take it (see its events)" if self._net.status().peers else ""
                return connected or self._net.last_end or "it was not reached"
            if now_s - moved_s > self._push.settings.stalled_s:
                return "it takes nothing"
        self._tell()
        return ""

    async def close(self) -> int:
        """Say goodbye; the bytes that were sent."""
        await self._net.close()
        return self._net.status().bytes_sent

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_S):
                await self._kick.wait()
        except TimeoutError:
            pass

    async def _check_folder(self) -> None:
        part = self._push.part
        if self._doubtful:
            self._doubtful = False
            lacking = [piece for piece in sorted(part.located) if piece not in self._have]
            await asyncio.to_thread(part.look, lacking)
        if part.changed:
            raise changed(part.changed)

    async def _renew(self) -> None:
        """Tickets end after an hour, uploads may take longer."""
        now_s = self._clock.wall_s()
        if now_s < self._renew_at_s:
            return
        self._renew_at_s = now_s + _RENEW_AGAIN_S
        try:
            reply = await self._push.begin()
        except FalError as error:
            if not error.retryable or error.code is Code.CONFLICT:
                raise
            return
        for target in reply.targets:
            if target.node_id == self._target.node_id:
                self._renew_at_s = target.ticket_expires_s - TICKET_TTL_S / 2
                self._net.set_members(self._push.part.artifact.id, [_address(target)])

    def _tell(self) -> None:
        total = self._push.part.artifact.bytes_total
        rate = self._meter.rate_bytes_s
        self._push.on_progress(PushProgress("send", self._bytes_done, total, rate, self._target.node_id))

    # ---- ports.PeerEvents

    def peer_up(self, node_id: str, artifact_id: str, have: Bitmap) -> None:
        self._up = True
        self._metered_s = self._clock.monotonic_s()
        self._has(have)

    def peer_down(self, node_id: str, artifact_id: str, reason: str) -> None:
        self._up, self._doubtful = False, True
        self._kick.set()

    def peer_has(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None:
        now_s = self._clock.monotonic_s()
        self._meter.add(self._has(pieces), now_s - self._metered_s)
        self._metered_s = now_s

    def _has(self, pieces: Sequence[int] | Bitmap) -> int:
        fresh = sum(self._layout.length(piece) for piece in pieces if self._have.add(piece))
        self._bytes_done += fresh
        self._kick.set()
        return fresh

    def lease_told(self, node_id: str, artifact_id: str, lease: Lease, ended: bool) -> None:
        pass  # there is no origin

    def claims_told(self, node_id: str, artifact_id: str, claims: Sequence[Claim]) -> None:
        pass  # everything is known

    def piece_came(self, node_id: str, artifact_id: str, piece: int, seconds: float) -> None:
        pass  # nothing is asked for

    def piece_bad(self, node_id: str, artifact_id: str, piece: int) -> None:
        pass

    def piece_refused(self, node_id: str, artifact_id: str, pieces: Sequence[int], retry_s: float) -> None:
        pass

    def disk_failed(self, artifact_id: str, error: Exception) -> None:
        pass


def _address(target: weights_pb2.SwarmMember) -> PeerAddress:
    return PeerAddress(
        node_id=target.node_id,
        endpoints=tuple((endpoint.host, endpoint.port) for endpoint in target.endpoints),
        ticket=target.ticket,
        ticket_expires_s=target.ticket_expires_s,
        tls=True,
    )


__all__ = ["OnProgress", "PushApi", "PushProgress", "PushSettings", "Pushed", "push"]
