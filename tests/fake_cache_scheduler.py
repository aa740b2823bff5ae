"""A stand-in for the scheduler as caches see it: a real gRPC CacheService over mTLS, with a CA of its own.

It names everybody who told an artifact as a member of its swarm, makes tickets, attests what a node has hashed
(`attests`), and keeps what it was told. `stop` and `start` again on the same port play a scheduler that was away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fal_contract import rpc
from fal_contract.artifact import Artifact, ArtifactFile, attestation_text, to_manifest
from fal_contract.clock import SystemClock
from fal_contract.identity import Role
from fal_contract.ticket import TICKET_TTL_S, make_ticket, node_key
from fal_contract.v1 import fsd_pb2, state_pb2, weights_pb2, weights_pb2_grpc
from fal_scheduler.ca import CertificateAuthority

_SECRET = b"s" * 32
_CLUSTER = "c-000000000001"


@dataclass
class Node:
    """A cache that has a session. `seen`: artifact id → as told last."""

    hello: weights_pb2.CacheHello
    down: asyncio.Queue[weights_pb2.CacheDown]
    seen: dict[str, fsd_pb2.CachedArtifact] = field(default_factory=dict)

    def tell(self, **kind: Any) -> None:
        """Send one message down."""
        self.down.put_nowait(weights_pb2.CacheDown(**kind))


class FakeCacheScheduler(weights_pb2_grpc.CacheServiceServicer):
    """See the module's docstring. `regions`: node id → region (default: all in one); `tls`: of all links."""

    def __init__(self, folder: Path, *, tls: bool = False, regions: Mapping[str, str] | None = None) -> None:
        self.ca = CertificateAuthority.create(folder / "ca", cluster_id=_CLUSTER, now_s=SystemClock().wall_s())
        self.nodes: dict[str, Node] = {}
        self.manifests: dict[str, Artifact] = {}
        self.events: list[weights_pb2.CacheEvent] = []
        self.reports: list[weights_pb2.CacheReport] = []
        self.claims: dict[str, dict[int, weights_pb2.PieceClaim]] = {}
        self.attestations: list[weights_pb2.Attestation] = []
        self.manifests_told: list[state_pb2.ModelManifest] = []
        self.sessions = 0
        self.attests = True
        self.islands: Sequence[frozenset[str]] = ()
        self.welcomes = asyncio.Event()  # cleared: a Hello waits for its answer
        self.welcomes.set()
        self._folder = folder
        self._tls = tls
        self._regions = dict(regions or {})
        self._revision = 0
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    # ---- life

    async def start(self) -> str:
        """Listen (on the port of last time); its address."""
        identity = self.ca.new_identity(role=Role.SCHEDULER, name="s", now_s=SystemClock().wall_s())
        server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS))
        weights_pb2_grpc.add_CacheServiceServicer_to_server(self, server)
        self.port = rpc.bind(server, f"127.0.0.1:{self.port}", rpc.server_credentials(identity))
        await server.start()
        self._server = server
        return self.address

    async def stop(self) -> None:
        """Be away."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)
        self.nodes.clear()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def identity(self, node_id: str) -> Path:
        """The identity file of a node, as its agent would keep it."""
        file = self._folder / f"{node_id}.identity"
        self.ca.new_identity(role=Role.NODE, name=node_id, now_s=SystemClock().wall_s()).save(file)
        return file

    async def until(self, done: Callable[[], object], *, timeout_s: float = 45.0) -> None:
        """Wait until `done()` is true, looking after every message that came."""
        try:
            async with asyncio.timeout(timeout_s):
                while not done():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            told = {node_id: list(node.seen.values()) for node_id, node in self.nodes.items()}
            raise TimeoutError(f"{told} {self.events[-10:]}") from None

    # ---- artifacts

    def signed(self, artifact: Artifact) -> Artifact:
        """With the CA's signature; and known here."""
        made = replace(artifact, signature=self.ca.sign(attestation_text(artifact)))
        self.manifests[made.id] = self.manifests[made.manifest_digest] = made
        return made

    def attest(self, artifact: Artifact) -> None:
        """Sign it and tell every node that has it."""
        made = self.signed(artifact)
        for node in self.nodes.values():
            if made.id in node.seen:
                node.tell(attested=to_manifest(made))

    def registered(self, artifact: Artifact) -> Artifact:
        """Known here without content."""
        self.manifests[artifact.id] = artifact
        return artifact

    def wish(self, node_id: str, wished: Sequence[weights_pb2.Wished]) -> None:
        """All that this node should have."""
        self._revision += 1
        self.nodes[node_id].tell(wishes=weights_pb2.WishSet(revision=self._revision, wishes=wished))

    def kinds(self) -> list[str]:
        """Kinds of events that came."""
        return [event.kind for event in self.events]

    # ---- CacheService

    async def GetManifest(self, request: weights_pb2.GetManifestRequest, context: Any) -> state_pb2.ModelManifest:
        found = self.manifests.get(request.id)
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such manifest")
            raise AssertionError
        return to_manifest(found)

    async def Session(
        self, incoming: AsyncIterator[weights_pb2.CacheUp], context: Any
    ) -> AsyncIterator[weights_pb2.CacheDown]:
        hello = (await anext(incoming)).hello
        node = self.nodes[hello.node_id] = Node(hello, asyncio.Queue())
        reading = asyncio.create_task(self._read(hello.node_id, node, incoming))
        region = self._regions.get(hello.node_id, "r1")
        keys = [node_key(_SECRET, hello.node_id, 1)]
        self._changed.set()
        await self.welcomes.wait()
        yield weights_pb2.CacheDown(
            welcome=weights_pb2.CacheWelcome(
                version=1, cluster_id=_CLUSTER, term=1, ticket_keys=keys, pool=f"p-{region}", region=region,
                trusted_network=not self._tls,
            )
        )  # fmt: skip
        self.sessions += 1
        self._told(node, hello.artifacts, ())
        try:
            while True:
                yield await node.down.get()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if self.nodes.get(hello.node_id) is node:
                del self.nodes[hello.node_id]
                self._swarms()
            self._changed.set()

    async def _read(self, node_id: str, node: Node, incoming: AsyncIterator[weights_pb2.CacheUp]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for message in incoming:
                match message.WhichOneof("kind"):
                    case "report":
                        self.events += message.report.events
                        self.reports.append(message.report)
                        self._told(node, message.report.artifacts, message.report.gone)
                    case "claims":
                        told = self.claims.setdefault(message.claims.artifact_id, {})
                        told |= {claim.piece: claim for claim in message.claims.claims}
                    case "attestation":
                        self._attestation(message.attestation)
                    case "manifest":
                        self.manifests_told.append(message.manifest)
                    case _:
                        pass
                self._changed.set()

    def _attestation(self, told: weights_pb2.Attestation) -> None:
        self.attestations.append(told)
        known = self.manifests.get(told.artifact_id)
        if known is None:
            return  # a pack task's: nobody has registered it yet
        if self.attests and not told.failure and not known.attested:
            files = tuple(ArtifactFile(x.path, x.bytes, x.version, x.sha256) for x in told.files)
            raw = b"".join(x.blake3 for x in told.files)
            hashes = tuple(raw[at : at + 32] for at in range(0, len(raw), 32))
            self.attest(replace(known, files=files, hashes=hashes))

    def _told(self, node: Node, artifacts: Sequence[fsd_pb2.CachedArtifact], gone: Sequence[str]) -> None:
        before = {x: (a.ready, a.wanted) for x, a in node.seen.items()}
        node.seen |= {artifact.artifact_id: artifact for artifact in artifacts}
        for artifact_id in gone:
            node.seen.pop(artifact_id, None)
        if before != {x: (a.ready, a.wanted) for x, a in node.seen.items()}:
            self._swarms()
        self._changed.set()

    def _swarms(self) -> None:
        """Everybody is everybody's neighbour, within an island."""
        self._revision += 1
        for artifact_id in {x for node in self.nodes.values() for x in node.seen}:
            members = {n: node for n, node in self.nodes.items() if artifact_id in node.seen}
            for me, node in members.items():
                others = [self._member(artifact_id, me, other) for other in members if self._linked(me, other)]
                swarm = weights_pb2.Swarm(
                    artifact_id=artifact_id, revision=self._revision, members=others, seed=True,
                    region_members=len(members),
                )  # fmt: skip
                node.tell(swarm=swarm)

    def _linked(self, me: str, other: str) -> bool:
        return me != other and all((me in island) == (other in island) for island in self.islands)

    def _member(self, artifact_id: str, me: str, other: str) -> weights_pb2.SwarmMember:
        node, region = self.nodes[other], self._regions.get(other, "r1")
        expires_s = SystemClock().wall_s() + TICKET_TTL_S
        ticket = make_ticket(node_key(_SECRET, other, 1), caller=me, artifact_id=artifact_id, expires_s=expires_s)
        return weights_pb2.SwarmMember(
            node_id=other, endpoints=node.hello.endpoints, pool=f"p-{region}", region=region, seed=True, ticket=ticket,
            ticket_expires_s=expires_s, tls=self._tls, complete=node.seen[artifact_id].ready,
        )  # fmt: skip


__all__ = ["FakeCacheScheduler", "Node"]
