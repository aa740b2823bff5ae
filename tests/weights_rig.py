"""The chain of weights of real processes: a scheduler that lists and signs, a fal-fsd per node, origins on loopback.

    async with chain(tmp_path, "n1 n2") as c:
        model = await c.add("m", origin.url)
        assert tree(await c.stage("n1", model)) == contents

There is no agent: tests stage over the node's socket as an agent would. All of it ends with the block, by pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from fal_contract.clock import SystemClock
from fal_contract.rpc import fal_errors
from fal_contract.v1 import agent_pb2, cluster_pb2, cluster_pb2_grpc, fsd_pb2, fsd_pb2_grpc, state_pb2
from fal_fsd.client import CacheClient
from fal_fsd.mount import keeper, kernel
from fsd_rig import answered, start_process
from scheduler_process import Process, cluster, init, joined, scheduler

PIECE = 4 << 20
WAIT_S = 60.0


_seeds = itertools.count()


def contents_of(*sizes: int) -> dict[str, bytes]:
    """Files of these sizes, by path, with random bytes that no other call gives: caches share files by content."""
    rng = random.Random(next(_seeds))
    return {f"file-{n}.safetensors": rng.randbytes(size) for n, size in enumerate(sizes)}


def flipped(data: bytes, at: int) -> bytes:
    """One bit is another."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def flip_on_disk(file: Path, at: int) -> None:
    """As above, of a finished file, whose date changes as with every write."""
    file.chmod(0o644)
    with file.open("r+b") as out:
        out.seek(at)
        byte = out.read(1)
        out.seek(at)
        out.write(bytes([byte[0] ^ 1]))
    file.chmod(0o444)


class Node:
    """One fal-fsd, which can be killed and started again."""

    def __init__(self, folder: Path, node_id: str, arguments: Iterable[str]) -> None:
        self.folder = folder
        self.node_id = node_id
        self.arguments = list(arguments)
        self.process: subprocess.Popen[bytes] | None = None
        self.client = CacheClient(folder / "s")
        self._channel = grpc.aio.insecure_channel(f"unix:{folder}/s")
        self.stub: fsd_pb2_grpc.NodeCacheAsyncStub = fsd_pb2_grpc.NodeCacheStub(self._channel)
        self.log = b""

    async def start(self) -> None:
        """Until it answers."""
        self.process = start_process(self.folder, *self.arguments)
        assert self.process.stderr is not None
        self._reading = asyncio.create_task(asyncio.to_thread(self._keep_log, self.process.stderr))
        async with asyncio.timeout(WAIT_S):
            while not await self.client.answers():
                assert self.process.poll() is None, f"fsd ended: {self.log.decode()}"
                await asyncio.sleep(0.02)
            await answered(self.client)

    def _keep_log(self, stream: Any) -> None:
        for line in stream:
            self.log = (self.log + line)[-20_000:]

    async def kill(self) -> None:
        """SIGKILL; idempotent."""
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait, 10)
            await self._reading
            assert self.process.stderr is not None
            self.process.stderr.close()
            self.process = None

    async def close(self) -> None:
        await self.kill()
        await self.client.close()
        await self._channel.close(None)
        await asyncio.to_thread(self._end_mounts)

    def _end_mounts(self) -> None:
        """The process that keeps mounts outlives fsd by design; not the test."""
        mounts = (self.folder / "state" / "mounts").absolute()
        if mounts.exists():
            keeper.Keeper(mounts, SystemClock()).end()
            for found in kernel.mounted_below(mounts):
                kernel.remove_mount_point(found.path)

    def exposed(self) -> list[str]:
        """Names below models/: what is READY."""
        return sorted(p.name for p in (self.folder / "state" / "models").iterdir())

    async def cached(self, model: state_pb2.Model) -> fsd_pb2.CachedArtifact:
        """What it says of a model; empty when it has nothing of it."""
        found = [x for x in await self.client.artifacts() if x.artifact_id == model.artifact_id]
        return found[0] if found else fsd_pb2.CachedArtifact()


class Chain:
    """See the module. `stub`: the operators' API."""

    def __init__(self, root: Path, process: Process, stub: cluster_pb2_grpc.ClusterAsyncStub) -> None:
        self.root = root
        self.scheduler = process
        self.stub = stub
        self.nodes: dict[str, Node] = {}
        self.secrets = root / "credentials.toml"
        self.given = ["--credentials-file", str(self.secrets)]

    async def node(self, name: str, *arguments: str, address: str = "lan=127.0.0.1") -> Node:
        """A node that joined, its cache running; without mounts unless `arguments` say so."""
        identity = await joined(self.scheduler, name)
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        identity.save(folder / "identity.pem")
        given = ["--schedulers", self.scheduler.address, "--identity", str(folder / "identity.pem")]
        given += ["--bulk-host", "127.0.0.1", "--addresses", address]
        if "--mount" not in arguments:
            given += ["--mount", "off"]
        node = self.nodes[name] = Node(folder, identity.peer.name, [*given, *arguments])
        await node.start()
        await self.until(lambda: self.linked(name))
        return node

    async def linked(self, name: str) -> bool:
        """Its cache is connected to the scheduler."""
        return (await self.nodes[name].client.status()).scheduler

    async def add(self, name: str, uri: str, *, team: str = "t", **more: Any) -> state_pb2.Model:
        """`weights add`."""
        with fal_errors():
            request = cluster_pb2.AddModelRequest(id=f"{team}/{name}", uri=uri, **more)
            return (await self.stub.AddModel(request, timeout=WAIT_S)).model

    async def model(self, name: str) -> state_pb2.Model:
        with fal_errors():
            return (await self.stub.GetModel(cluster_pb2.GetModelRequest(id=f"t/{name}"), timeout=20)).model

    async def stage(self, node: str, model: state_pb2.Model, owner: str = "runner") -> Path:
        """Until it is READY there."""
        return await self.nodes[node].client.stage(asked(model), owner)

    async def restart_scheduler(self) -> None:
        """After `scheduler.end`; its ports stay the same."""
        self.scheduler = await asyncio.to_thread(Process, self.scheduler.data, *self.given)

    async def where(self, name: str) -> dict[str, cluster_pb2.ModelOnNode]:
        """`weights where`, by node name."""
        with fal_errors():
            reply = await self.stub.WhereModel(cluster_pb2.WhereModelRequest(id=f"t/{name}"), timeout=20)
        return {told.node: told for told in reply.nodes}

    async def events(self, kind: str = "") -> list[cluster_pb2.Event]:
        """All so far."""
        with fal_errors():
            found = [event async for event in self.stub.Events(cluster_pb2.EventsRequest(), timeout=20)]
        return [event for event in found if kind in ("", event.kind)]

    async def until(self, done: Callable[[], Awaitable[Any]], *, within_s: float = WAIT_S) -> Any:
        """Poll until it gives something; that."""
        async with asyncio.timeout(within_s):
            while not (found := await done()):  # noqa: ASYNC110 - asked of other processes
                await asyncio.sleep(0.05)
        return found


def asked(model: state_pb2.Model, **more: Any) -> agent_pb2.Artifact:
    """As an assignment names it; its manifest is fetched from the scheduler."""
    return agent_pb2.Artifact(
        model=model.id, kind=model.kind, uri=model.resolved_uri or model.uri, manifest_digest=model.manifest_digest,
        bytes=model.bytes, artifact_id=model.artifact_id, **more,
    )  # fmt: skip


@asynccontextmanager
async def chain(folder: Path, names: str = "", *, credentials: str | None = None) -> AsyncIterator[Chain]:
    """A scheduler and nodes. `credentials`: TOML in FOLDER/credentials.toml, for the scheduler and these nodes."""
    data = folder / "s"
    given: list[str] = []
    if credentials is not None:
        write_secret(folder / "credentials.toml", credentials)
        given = ["--credentials-file", str(folder / "credentials.toml")]
    await asyncio.to_thread(init, data)
    with scheduler(data, *given) as process:
        async with cluster(process) as stub:
            made = Chain(folder, process, stub)
            try:
                for name in names.split():
                    await made.node(name, *given)
                yield made
            except BaseException:
                for name, node in made.nodes.items():
                    print(f"--- fsd {name}\n{node.log.decode(errors='replace')[-3000:]}")
                print(f"--- scheduler\n{process.log.read_text()[-3000:]}")
                raise
            finally:
                for node in made.nodes.values():
                    await node.close()
                if made.scheduler is not process and made.scheduler.popen.poll() is None:
                    made.scheduler.end(signal.SIGKILL)


class Shared:
    """A chain that a file's tests share, on a loop of its own: starting one takes seconds."""

    def __init__(self, folder: Path, names: str) -> None:
        self._runner = asyncio.Runner()
        self._context = chain(folder, names, credentials="")
        self.chain = self._runner.run(self._context.__aenter__())

    def run(self, test: Callable[[Chain], Awaitable[None]], *, within_s: float = 90.0) -> None:
        """One test, with a bound; the credentials file is empty before it."""

        async def bounded() -> None:
            write_secret(self.chain.secrets, "")
            async with asyncio.timeout(within_s):
                await test(self.chain)

        self._runner.run(bounded())

    def close(self) -> None:
        self._runner.run(self._context.__aexit__(None, None, None))
        self._runner.close()


def write_secret(file: Path, text: str) -> None:
    """Whole, by one rename, readable by its owner alone."""
    new = file.with_suffix(f".{os.urandom(4).hex()}")
    new.touch(mode=0o600)
    new.write_text(text)
    new.rename(file)


@asynccontextmanager
async def doing(work: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that ends with the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def run(work: Coroutine[Any, Any, None], *, within_s: float = 120.0) -> None:
    """One loop, with a bound."""

    async def bounded() -> None:
        async with asyncio.timeout(within_s):
            await work

    asyncio.run(bounded())
