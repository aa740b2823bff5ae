"""Several weight caches in this process, a scheduler stand-in, and what they stage: for tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fake_cache_scheduler import FakeCacheScheduler
from fal_contract.artifact import Artifact, listing_id
from fal_contract.v1 import agent_pb2
from fal_fsd.origin import Credentials, list_origin
from fsd_fakes import artifact_of
from fsd_rig import Rig, running
from origin_servers import HttpOrigin

PIECE = 64 << 10


def contents_of(*sizes: int, seed: int = 1) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {f"file-{n}.safetensors": rng.randbytes(size) for n, size in enumerate(sizes)}


async def listed(
    origin: HttpOrigin, *, sha256: bool = False, piece_bytes: int = PIECE, credentials: Credentials | None = None
) -> Artifact:
    """As the scheduler lists a folder of this server; no content is known."""
    origin.put_list(sha256=sha256)
    found = await list_origin(origin.url, credentials=credentials or Credentials.load(None, {}))
    return Artifact(listing_id(found.uri, found.files), "model", found.uri, piece_bytes, found.files)


def content_of(bare: Artifact, contents: Mapping[str, bytes]) -> Artifact:
    """The same with every digest, not signed."""
    whole = artifact_of(dict(contents), piece_bytes=bare.piece_bytes, uri=bare.uri)
    files = tuple(replace(f, version=b.version) for f, b in zip(whole.files, bare.files, strict=True))
    return replace(whole, id=bare.id, files=files)


async def attested(
    scheduler: FakeCacheScheduler, origin: HttpOrigin, contents: Mapping[str, bytes], **how: Any
) -> Artifact:
    """Listed and signed. `how`: see `listed`."""
    return scheduler.signed(content_of(await listed(origin, **how), contents))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class Cluster:
    """The stand-in and caches n1, n2 …"""

    def __init__(self, scheduler: FakeCacheScheduler, folder: Path, stack: AsyncExitStack) -> None:
        self.scheduler = scheduler
        self.folder = folder
        self.stack = stack
        self.rigs: dict[str, Rig] = {}

    async def add(self, name: str, **options: Any) -> Rig:
        """One more cache, connected."""
        context = self.node(name, **options)
        rig = self.rigs[name] = await self.stack.enter_async_context(context)
        await self.scheduler.until(lambda: name in self.scheduler.nodes)
        return rig

    def node(self, name: str, **options: Any) -> Any:
        """The context of a cache."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        given = {
            "schedulers": [self.scheduler.address], "identity": self.scheduler.identity(name),
            "addresses": ["lan=127.0.0.1"], **options,
        }  # fmt: skip
        return running(folder, **given)

    async def stage(self, name: str, message: agent_pb2.Artifact, owner: str = "r") -> Path:
        return await self.rigs[name].client.stage(message, owner)


@asynccontextmanager
async def cluster(folder: Path, names: str = "n1 n2 n3", **scheduler: Any) -> AsyncIterator[Cluster]:
    made = FakeCacheScheduler(folder, **scheduler)
    await made.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(made.stop)
        cluster = Cluster(made, folder, stack)
        for name in names.split():
            await cluster.add(name)
        yield cluster


def run(work: Any) -> None:
    """One loop, with a bound."""

    async def bounded() -> None:
        async with asyncio.timeout(100):
            await work

    asyncio.run(bounded())
