"""Weight caches in this process and as processes, for tests: made from options, asked over their unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import grpc.aio

from fal_contract import rpc
from fal_contract.artifact import Artifact, to_manifest
from fal_contract.clock import SystemClock
from fal_contract.errors import FalError
from fal_contract.model_manifest import FileEntry, manifest_digest
from fal_contract.v1 import agent_pb2, fsd_pb2_grpc, state_pb2
from fal_fsd.assembly import Cache
from fal_fsd.client import CacheClient
from fal_fsd.options import FsdOptions, check
from fal_fsd.service import NodeCache

Contents = dict[str, bytes]


@dataclass
class Rig:
    """One cache in this process. `stub`: all of NodeCache."""

    cache: Cache
    client: CacheClient
    stub: fsd_pb2_grpc.NodeCacheStub
    folder: Path

    def exposed(self) -> list[str]:
        """Names below models/."""
        return sorted(p.name for p in (self.folder / "state" / "models").iterdir())


@asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[Rig]:
    """A cache with its state in FOLDER/state; by default alone and without mounts."""
    given = {"state_dir": folder / "state", "mount": "off", "bulk_host": "127.0.0.1", **options}
    cache = Cache(check(FsdOptions(**given)), clock=SystemClock(), rng=Random(7))
    await cache.start()
    server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS))
    fsd_pb2_grpc.add_NodeCacheServicer_to_server(NodeCache(cache.node), server)
    server.add_insecure_port(f"unix:{folder}/s")
    await server.start()
    client = CacheClient(folder / "s")
    channel = grpc.aio.insecure_channel(f"unix:{folder}/s")
    try:
        yield Rig(cache, client, fsd_pb2_grpc.NodeCacheStub(channel), folder)
    finally:
        await channel.close()
        await client.close()
        await server.stop(0)
        await cache.close()


def write(root: Path, contents: Contents) -> Path:
    """The files below `root`."""
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def tree(root: Path) -> Contents:
    """What is below `root`."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def plain_message(root: Path, contents: Contents) -> agent_pb2.Artifact:
    """As the release before pieces sent it: SHA-256 of every file, no artifact id, a file:// origin."""
    entries = [FileEntry(p, len(c), hashlib.sha256(c).digest()) for p, c in sorted(contents.items())]
    return agent_pb2.Artifact(
        model="default/m", kind="model", uri=root.as_uri(), manifest_digest=manifest_digest(entries),
        bytes=sum(e.size_bytes for e in entries),
        manifest=state_pb2.ModelManifest(
            files=[state_pb2.ModelFile(path=e.path, bytes=e.size_bytes, sha256=e.sha256) for e in entries]
        ),
    )  # fmt: skip


def message_of(artifact: Artifact, *, model: str = "default/m", **more: Any) -> agent_pb2.Artifact:
    """As the agent names it."""
    return agent_pb2.Artifact(
        model=model, kind=artifact.kind, uri=artifact.uri, artifact_id=artifact.id, bytes=artifact.bytes_total,
        manifest_digest=artifact.manifest_digest, manifest=to_manifest(artifact), **more,
    )  # fmt: skip


def start_process(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`fal-fsd run`, its socket at FOLDER/s."""
    code = "import sys; from fal_fsd.main import main; sys.exit(main())"
    given = ["run", "--state-dir", str(folder / "state"), "--socket", str(folder / "s"), *arguments]
    paths = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", code, *given], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE
    )


async def answered(client: CacheClient, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until fsd listens and the client's channel, which waits between two attempts, has seen that."""
    async with asyncio.timeout(30):
        while process is None or process.poll() is None:
            with contextlib.suppress(FalError):
                await client.artifacts()
                assert await client.answers()
                return
            await asyncio.sleep(0.05)
    assert process is not None
    assert process.stderr is not None
    raise AssertionError(f"fsd ended: {process.stderr.read().decode()}")
