"""`fal-scheduler` as a process for tests, and agents that dial it over real mutual TLS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from fal_agent.join import join
from fal_contract.clock import SystemClock
from fal_contract.identity import Identity
from fal_contract.rpc import channel, fal_errors
from fal_contract.v1 import agent_pb2_grpc, cluster_pb2, cluster_pb2_grpc, state_pb2
from scheduler_rig import Agent

SCHEDULER = (sys.executable, "-m", "fal_scheduler.main")
PORTS = ("--rpc-port", "0", "--join-port", "0", "--metrics-port", "0")


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SCHEDULER, *args], capture_output=True, text=True, timeout=60, check=False, env=environment()
    )


def environment() -> dict[str, str]:
    """Ours is found the way this test found it; nothing of the caller's configuration."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return {"PATH": os.environ["PATH"], "PYTHONPATH": paths}


class Process:
    """A running scheduler."""

    def __init__(self, data: Path, *args: str) -> None:
        self.data = data
        self.log = data.parent / f"log-{time.monotonic_ns()}"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [*SCHEDULER, "run", "--data-dir", str(data), *PORTS, *args],
                stdout=log,
                stderr=log,
                env=environment(),
            )
        deadline = time.monotonic() + 60
        while not (data / "ports.json").exists() or self.ports["pid"] != self.popen.pid:
            if self.popen.poll() is not None or time.monotonic() > deadline:
                self.popen.kill()
                self.popen.wait()
                raise AssertionError(self.log.read_text())
            time.sleep(0.02)

    @property
    def ports(self) -> dict[str, int]:
        ports: dict[str, int] = json.loads((self.data / "ports.json").read_text())
        return ports

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['rpc']}"

    def end(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(20)


@contextmanager
def scheduler(data: Path, *args: str) -> Iterator[Process]:
    process = Process(data, *args)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.end(signal.SIGKILL)


def init(data: Path) -> None:
    """Make a cluster in `data`."""
    made = command("init", "--data-dir", str(data), "--host", "localhost", "--ip", "127.0.0.1")
    assert made.returncode == 0, made.stderr


def identity(data: Path, role: str) -> Identity:
    return Identity.load(data / "operator" if role == "admin" else data.parent / role)


@asynccontextmanager
async def cluster(process: Process, role: str = "admin") -> AsyncIterator[cluster_pb2_grpc.ClusterAsyncStub]:
    async with channel(process.address, identity(process.data, role)) as opened:
        with fal_errors():
            yield cluster_pb2_grpc.ClusterStub(opened)


class RemoteAgent(Agent):
    """An obedient agent over real gRPC."""

    def __init__(self, process: Process, own: Identity, *, gpus: int = 8) -> None:
        super().__init__(None, own.peer.name, gpus=gpus)  # type: ignore[arg-type]
        self.cluster_id = own.peer.cluster_id
        self._process = process
        self.own = own

    async def __aenter__(self) -> RemoteAgent:
        self.dial()
        return self

    async def _connect(self) -> None:
        async with channel(self._process.address, self.own) as opened:
            with fal_errors():
                async for message in agent_pb2_grpc.AgentServiceStub(opened).Session(self._incoming()):
                    await self._receive(message)


async def joined(process: Process, name: str) -> Identity:
    """A node that joined with a token."""
    async with cluster(process) as stub:
        await stub.ApplyPool(cluster_pb2.ApplyPoolRequest(pool=state_pb2.Pool(name="p", cloud="metal")))
        made = await stub.CreateToken(cluster_pb2.CreateTokenRequest(pool="p", ttl_s=60, uses=1))
    address = f"127.0.0.1:{process.ports['join']}"
    return (await join(address, made.token, node_name=name, boot_id="b1", clock=SystemClock())).identity


async def node_ready(stub: cluster_pb2_grpc.ClusterAsyncStub) -> None:
    async with asyncio.timeout(20):
        while True:
            if (await stub.ListNodes(cluster_pb2.ListNodesRequest())).nodes[0].health == "ready":
                return
            await asyncio.sleep(0.05)


async def ready(stub: cluster_pb2_grpc.ClusterAsyncStub, app: str, count: int) -> None:
    async with asyncio.timeout(30):
        while True:
            view = await stub.GetApp(cluster_pb2.GetAppRequest(id=app), timeout=10)
            if sum(1 for x in view.runners if x.state == state_pb2.RUNNER_STATE_IDLE) == count:
                return
            await asyncio.sleep(0.05)
