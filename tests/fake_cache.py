"""A node's weight cache as the scheduler sees it: speaks CacheUp and CacheDown over a link in memory.

    cache = FakeCache(caches.run, "n1")
    cache.dial(wanting("a" * 64, 1000))
    await cache.until(lambda: cache.swarm("a" * 64) is not None)

It keeps what it was told (`swarms`, `wishes`, `drops` …) and all messages in order. `hold` stops it from reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fal_contract.errors import not_found
from fal_contract.v1 import agent_pb2, fsd_pb2, state_pb2, weights_pb2

Run = Callable[[str, AsyncIterator[weights_pb2.CacheUp], Callable[[weights_pb2.CacheDown], Awaitable[None]]], Any]


def holding(artifact_id: str, size: int, done: int | None = None, **more: Any) -> fsd_pb2.CachedArtifact:
    """`done` bytes of `size` on disk; all of them and READY by default."""
    ready = done is None
    fields: dict[str, Any] = {"ready": ready, "kind": "model", **more}
    return fsd_pb2.CachedArtifact(
        artifact_id=artifact_id, bytes=size, bytes_disk=size if done is None else done, **fields
    )


def wanting(artifact_id: str, size: int, done: int = 0, **more: Any) -> fsd_pb2.CachedArtifact:
    """On its way."""
    return holding(artifact_id, size, done, wanted=True, **more)


class FakeCache:
    """One cache. `endpoints` False: it cannot be dialled."""

    def __init__(self, run: Run, node_id: str, *, endpoints: bool = True, disk: int = 1 << 40) -> None:
        self.node_id = node_id
        self._run = run
        self._endpoints = endpoints
        self._disk = disk
        self._up: asyncio.Queue[weights_pb2.CacheUp | None] = asyncio.Queue()
        self._gate = asyncio.Event()
        self._gate.set()
        self._came = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.messages: list[weights_pb2.CacheDown] = []
        self.welcome: weights_pb2.CacheWelcome | None = None
        self.swarms: dict[str, weights_pb2.Swarm] = {}
        self.wishes: weights_pb2.WishSet | None = None
        self.drops: dict[str, weights_pb2.DropArtifact] = {}
        self.attested: dict[str, state_pb2.ModelManifest] = {}
        self.verified: list[str] = []
        self.manifests_wanted: list[str] = []
        self.last_copies: list[str] = []

    # --- up

    def dial(self, *artifacts: fsd_pb2.CachedArtifact, **more: Any) -> FakeCache:
        """Open a session that begins with these artifacts."""
        self._up = asyncio.Queue()
        endpoint = agent_pb2.Endpoint(network="lan", host=f"{self.node_id}.test", port=7448)
        fields: dict[str, Any] = {
            "versions": agent_pb2.Versions(min=1, max=1, software="test"),
            "node_id": self.node_id,
            "boot_id": "b1",
            "cache_id": "c1",
            "endpoints": [endpoint] if self._endpoints else [],
            "status": fsd_pb2.CacheStatus(disk_bytes_max=self._disk),
            "artifacts": artifacts,
            **more,
        }
        self.say(weights_pb2.CacheUp(hello=weights_pb2.CacheHello(**fields)))
        self.task = asyncio.create_task(self._run(self.node_id, self._incoming(self._up), self._receive))
        return self

    def say(self, message: weights_pb2.CacheUp) -> None:
        """Send anything."""
        self._up.put_nowait(message)

    def report(self, *artifacts: fsd_pb2.CachedArtifact, **more: Any) -> None:
        """Tell what changed."""
        self.say(weights_pb2.CacheUp(report=weights_pb2.CacheReport(artifacts=artifacts, **more)))

    def rates(self, **rates: int) -> None:
        """Tell measured rates; `peer__n2=…` means "peer:n2"."""
        links = [weights_pb2.LinkRate(source=k.replace("__", ":"), rate_bytes_s=v) for k, v in rates.items()]
        self.report(links=links)

    def unreachable(self, *nodes: str) -> None:
        """Tell which peers cannot be reached."""
        self.report(unreachable=nodes, unreachable_told=True)

    async def hang_up(self) -> None:
        """Close the stream and wait for its end."""
        self._up.put_nowait(None)
        assert self.task is not None
        await asyncio.gather(self.task, return_exceptions=True)

    def hold(self) -> None:
        """Take no more messages."""
        self._gate.clear()

    @staticmethod
    async def _incoming(queue: asyncio.Queue[weights_pb2.CacheUp | None]) -> AsyncIterator[weights_pb2.CacheUp]:
        while (message := await queue.get()) is not None:
            yield message

    # --- down

    async def _receive(self, message: weights_pb2.CacheDown) -> None:
        await self._gate.wait()
        self.messages.append(message)
        match message.WhichOneof("kind"):
            case "welcome":
                self.welcome = message.welcome
            case "swarm":
                known = self.swarms.get(message.swarm.artifact_id)
                assert known is None or known.revision < message.swarm.revision
                self.swarms[message.swarm.artifact_id] = message.swarm
            case "wishes":
                self.wishes = message.wishes
            case "drop":
                self.drops[message.drop.id] = message.drop
            case "attested":
                self.attested[message.attested.artifact_id] = message.attested
            case "verify":
                self.verified.append(message.verify.id)
            case "want_manifest":
                self.manifests_wanted.append(message.want_manifest.id)
            case "last_copies":
                self.last_copies = list(message.last_copies.artifact_ids)
        self._came.set()

    def neighbours(self, artifact_id: str) -> dict[str, weights_pb2.SwarmMember]:
        """As told last; none told: none."""
        swarm = self.swarms.get(artifact_id)
        return {one.node_id: one for one in swarm.members} if swarm is not None else {}

    def wished(self) -> dict[str, str]:
        """Artifact id to tier."""
        return {one.artifact.artifact_id: one.tier for one in self.wishes.wishes} if self.wishes is not None else {}

    async def until(self, check: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
        """Wait until `check` holds; looked at after every message."""
        async with asyncio.timeout(timeout_s):
            while not check():
                self._came.clear()
                await self._came.wait()


class NoManifests:
    """A registrar (`cache_sessions.Registrar`) that has no manifest and wants none."""

    wanted: tuple[str, ...] = ()

    def manifest_of(self, id_: str) -> state_pb2.ModelManifest:
        raise not_found("manifest", id_, remedy="Wait.")

    def on_claims(self, node_id: str, claims: weights_pb2.PieceClaims) -> None: ...

    def on_attestation(self, node_id: str, attestation: weights_pb2.Attestation) -> None: ...

    def offer_manifest(self, message: state_pb2.ModelManifest) -> bool:
        return False
