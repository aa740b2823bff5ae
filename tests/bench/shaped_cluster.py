"""Nodes on shaped links, one origin, for benches: namespaces around one router, real processes in them.

    with shaped_links(8, rate_bytes_s=8e6) as links:             namespaces n0 … n7, origin, core; tbf both ways
        async with shaped_cluster(links, folder, files) as c:    scheduler in the core, origin, one fal-fsd a node
            job = await c.job()                                  all are asked to stage; what that took

The payload's bound counts packets' heads as lost: the rate of a link is that of tbf. Processes without a CPU measure
nothing, so a job tells for how long they had to wait for one, from the kernel's run queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from e2e_network import CORE, CORE_ADDRESS, Network, network
from fal_agent.join import join
from fal_contract.clock import SystemClock
from fal_contract.errors import FalError
from fal_contract.identity import Identity
from fal_contract.rpc import CHANNEL_OPTIONS, channel, fal_errors
from fal_contract.v1 import agent_pb2, cluster_pb2, cluster_pb2_grpc, fsd_pb2, fsd_pb2_grpc, state_pb2
from fal_fsd.client import CacheClient

HERE = Path(__file__).parent
ORIGIN = "origin"
SCHEDULER = (sys.executable, "-m", "fal_scheduler.main")
FSD = (sys.executable, "-m", "fal_fsd.main")
POOL = "shaped"
START_S = 60.0
JOB_S = 600.0
NICE = -10  # above what else runs on the machine


@dataclass(frozen=True)
class Links:
    """Nodes with their addresses, in order, and the origin's. Rates in bytes per second."""

    net: Network
    nodes: Mapping[str, str]
    origin: str
    rate_bytes_s: float
    origin_bytes_s: float

    def reshape(self, slow_uplink: str = "") -> None:
        """All links as they were made, but one node's uplink at a quarter."""
        for name in self.nodes:
            up = self.rate_bytes_s / 4 if name == slow_uplink else self.rate_bytes_s
            self.net.shape(name, up_bytes_s=up, down_bytes_s=self.rate_bytes_s)
        self.net.shape(ORIGIN, up_bytes_s=self.origin_bytes_s, down_bytes_s=self.origin_bytes_s)


@contextmanager
def shaped_links(
    count: int, *, rate_bytes_s: float, origin_bytes_s: float = 0.0, masqueraded: Sequence[int] = ()
) -> Iterator[Links]:
    """Namespaces; `masqueraded`: numbers of nodes that nobody can dial. Deleted at the end."""
    with network() as net:
        origin = net.attach(ORIGIN, "10.79.0")
        attach: dict[bool, Callable[[str, str], str]] = {False: net.attach, True: net.behind_masquerade}
        nodes = {f"n{n}": attach[n in masqueraded](f"n{n}", f"10.78.{n}") for n in range(count)}
        links = Links(net, nodes, origin, rate_bytes_s, origin_bytes_s or rate_bytes_s)
        links.reshape()
        yield links


@dataclass
class Child:
    """A process in a namespace. It answers a line of its input with one line of its output."""

    process: asyncio.subprocess.Process
    pid: int = 0

    async def line(self, timeout_s: float = START_S) -> dict[str, Any]:
        """The next thing that it says."""
        assert self.process.stdout is not None
        text = await asyncio.wait_for(self.process.stdout.readline(), timeout_s)
        assert text, f"a process ended: {self.process.returncode}"
        told: dict[str, Any] = json.loads(text)
        return told

    async def ask(self, text: str = "", timeout_s: float = START_S) -> dict[str, Any]:
        """Say a line and hear the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n".encode())
        return await self.line(timeout_s)

    async def end(self) -> None:
        """Killed."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.communicate()


async def child(net: Network, namespace: str, *command: str, log: Path | None = None) -> Child:
    """Start a command inside, before everything else that runs here."""
    words = [*net.enter(namespace), *command]
    paths = os.pathsep.join(path for path in sys.path if path)
    with contextlib.ExitStack() as files:
        out = files.enter_context(log.open("ab")) if log is not None else None
        process = await asyncio.create_subprocess_exec(
            *words, stdin=subprocess.PIPE, stdout=out or subprocess.PIPE, stderr=out, limit=1 << 20,
            start_new_session=True, env={"PATH": os.environ["PATH"], "PYTHONPATH": paths},
        )  # fmt: skip
    with contextlib.suppress(OSError):  # kernels group processes by session, then it is the group's that counts
        Path(f"/proc/{process.pid}/autogroup").write_text(str(NICE))
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
    return Child(process, process.pid)


def cpu_seconds(pids: Sequence[int]) -> tuple[float, float]:
    """Seconds that threads of these processes ran, and that they were ready and had no CPU, since their start."""
    ran = waited = 0
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                numbers = file.read_text().split()
                ran, waited = ran + int(numbers[0]), waited + int(numbers[1])
    return ran / 1e9, waited / 1e9


def cpu_idle() -> tuple[float, float]:
    """Jiffies of all CPUs: idle, and in all, since the start of the machine."""
    numbers = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return float(numbers[3] + numbers[4]), float(sum(numbers))


@dataclass
class Job:
    """What one distribution took. `origin_bytes`: payload that the origin wrote; `nodes`: from origin, from peers."""

    seconds: float
    origin_bytes: int
    nodes: dict[str, tuple[int, int]]
    ready_s: dict[str, float]
    idle: float = 0.0  # share of CPU time that nobody used
    ran_s: float = 0.0  # all processes together
    waited_s: float = 0.0  # for a CPU


class Cluster:
    """Made by `shaped_cluster`."""

    def __init__(self, links: Links, folder: Path) -> None:
        self.links = links
        self.folder = folder
        self.origin: Child
        self.fsds: dict[str, Child] = {}
        self.clients: dict[str, CacheClient] = {}
        self.model = state_pb2.Model()
        self._children: list[Child] = []
        self._clock = SystemClock()
        self._told: dict[str, tuple[int, int]] = {}

    async def up(self, files: Path) -> None:
        """Everything runs, every node has its session."""
        net, data, credentials = self.links.net, self.folder / "s", self.folder / "credentials.toml"
        self.origin = await self._child(ORIGIN, sys.executable, str(HERE / "shaped_origin_child.py"), str(files),
                                        self.links.origin)  # fmt: skip
        told = await self.origin.line()
        credentials.touch(mode=0o600)
        credentials.write_text(told["credentials"])
        init = [*SCHEDULER, "init", "--data-dir", str(data), "--host", "localhost", "--ip", CORE_ADDRESS]
        await self._end(await child(net, CORE, *init))
        hosts = [x for kind in ("rpc", "join", "metrics") for x in (f"--{kind}-host", "0.0.0.0", f"--{kind}-port", "0")]
        run = [*SCHEDULER, "run", "--data-dir", str(data), "--credentials-file", str(credentials), *hosts]
        await self._child(CORE, *run, log=self.folder / "scheduler.log")
        ports = json.loads(await _text(data / "ports.json"))
        address = f"127.0.0.1:{net.door(CORE, ports['rpc'])}"
        door = f"127.0.0.1:{net.door(CORE, ports['join'])}"
        async with channel(address, Identity.load(data / "operator")) as opened:
            stub = cluster_pb2_grpc.ClusterStub(opened)
            with fal_errors():
                await self._join(stub, door)
                added = await stub.AddModel(cluster_pb2.AddModelRequest(id="default/m", uri=told["url"]), timeout=60)
        self.model = added.model
        arguments = ["--schedulers", f"{CORE_ADDRESS}:{ports['rpc']}", "--credentials-file", str(credentials)]
        for name in self.links.nodes:
            await self.start(name, arguments)
        await asyncio.gather(*(self._session(name) for name in self.links.nodes))

    async def start(self, name: str, arguments: Sequence[str]) -> None:
        """The cache of a node."""
        folder = self.folder / name
        own = ["--state-dir", str(folder), "--identity", str(self.folder / f"{name}.pem"), "--mount", "off"]
        self.fsds[name] = await self._child(name, *FSD, "run", *own, *arguments, log=self.folder / f"{name}.log")
        self.clients[name] = CacheClient(folder / "fsd.sock")

    async def job(self, *, count_bytes: int = 0, half_way: Callable[[str], None] | None = None) -> Job:
        """Ask all nodes to stage; until all are READY.

        `half_way` is called once half of `count_bytes` left the origin, with a node that reads there: it may kill it.
        """
        sent = (await self.origin.ask())["bytes_sent"]
        idle, used = cpu_idle(), cpu_seconds(self._pids)
        begun_s = self._clock.monotonic_s()
        ready_s: dict[str, float] = {}
        killed: list[str] = []

        async def one(name: str) -> None:
            try:
                async for told in self._stage(name):
                    self._told[name] = told.bytes_from_origin, told.bytes_from_peers
                    if told.ready:
                        ready_s[name] = self._clock.monotonic_s() - begun_s
            except FalError:
                if name not in killed:
                    raise

        async with asyncio.timeout(JOB_S), asyncio.TaskGroup() as tasks:
            for name in self.links.nodes:
                tasks.create_task(one(name))
            if half_way is not None:
                name = await self._half_way(count_bytes)
                killed.append(name)
                half_way(name)
        after = cpu_idle()
        made = Job(max(ready_s.values()), (await self.origin.ask())["bytes_sent"] - sent, dict(self._told), ready_s)
        made.idle = (after[0] - idle[0]) / max(after[1] - idle[1], 1.0)
        made.ran_s, made.waited_s = (x - y for x, y in zip(cpu_seconds(self._pids), used, strict=True))
        return made

    async def _half_way(self, count_bytes: int) -> str:
        """Once half of the model has left the origin: a node that read from it since a moment ago."""
        before: dict[str, int] = {}
        while True:
            told = {name: self._told.get(name, (0, 0))[0] for name in self.links.nodes}
            busy = [name for name, count in told.items() if count > before.get(name, 0)]
            if 2 * sum(told.values()) >= count_bytes and busy:
                return busy[0]
            before = told
            await asyncio.sleep(0.25)

    async def _stage(self, name: str) -> AsyncIterator[fsd_pb2.StageProgress]:
        model = self.model
        asked = agent_pb2.Artifact(model="default/m", kind=model.kind, uri=model.uri, artifact_id=model.artifact_id)
        request = fsd_pb2.StageRequest(artifact=asked, owner="job")
        socket = self.folder / name / "fsd.sock"
        async with grpc.aio.insecure_channel(f"unix:{socket}", options=list(CHANNEL_OPTIONS)) as opened:
            with fal_errors():
                async for told in fsd_pb2_grpc.NodeCacheStub(opened).Stage(request, timeout=JOB_S):
                    yield told

    async def _join(self, stub: cluster_pb2_grpc.ClusterAsyncStub, door: str) -> None:
        pool = state_pb2.Pool(name=POOL, cloud="metal", region="here", trusted_network=True)
        await stub.ApplyPool(cluster_pb2.ApplyPoolRequest(pool=pool))
        made = await stub.CreateToken(cluster_pb2.CreateTokenRequest(pool=POOL, ttl_s=600, uses=len(self.links.nodes)))
        for name in self.links.nodes:
            joined = await join(door, made.token, node_name=name, boot_id=f"boot-{name}", clock=self._clock)
            joined.identity.save(self.folder / f"{name}.pem")

    async def _session(self, name: str) -> None:
        async with asyncio.timeout(START_S):
            while True:
                with contextlib.suppress(FalError):
                    if (await self.clients[name].status()).scheduler:
                        return
                await asyncio.sleep(0.1)

    async def _child(self, namespace: str, *command: str, log: Path | None = None) -> Child:
        made = await child(self.links.net, namespace, *command, log=log)
        self._children.append(made)
        return made

    @property
    def _pids(self) -> list[int]:
        return [one.pid for one in self._children]

    async def _end(self, process: Child) -> None:
        out, _ = await asyncio.wait_for(process.process.communicate(), START_S)
        assert process.process.returncode == 0, out

    async def down(self) -> None:
        """All processes are gone."""
        for client in self.clients.values():
            await client.close()
        for one in reversed(self._children):
            await one.end()


async def _text(file: Path) -> str:
    for _ in range(int(START_S / 0.05)):
        if file.exists():
            break
        await asyncio.sleep(0.05)
    return file.read_text()


@asynccontextmanager
async def shaped_cluster(links: Links, folder: Path, files: Path) -> AsyncIterator[Cluster]:
    """`folder`: for state and logs, best in memory; `files`: what the origin has."""
    folder.mkdir()
    made = Cluster(links, folder)
    try:
        await made.up(files)
        yield made
    finally:
        await made.down()


def make_files(folder: Path, size: int) -> Path:
    """A model of one file, of bytes that nothing compresses."""
    folder.mkdir()
    rng = random.Random(size)
    with (folder / "model.safetensors").open("wb") as file:
        for at in range(0, size, 1 << 20):
            file.write(rng.randbytes(min(1 << 20, size - at)))
    return folder


def why_not() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    return "" if os.geteuid() == 0 else "it makes network namespaces: run it as root"


__all__ = ["Child", "Cluster", "Job", "Links", "child", "make_files", "shaped_cluster", "shaped_links", "why_not"]
