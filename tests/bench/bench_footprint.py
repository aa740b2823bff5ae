"""`footprint`: what scheduler, agent and falctl need while nothing happens, each against its bound.

Scheduler: a process on SQLite behind mutual TLS. 13 simulated nodes of 8 GPUs hold one stream each (real gRPC from this
process, heartbeats of 5 s) and say that their 100 runners are ready; then 200 idle nodes join as machines do and stay
connected; then 2,000 LoRAs are registered through AddModel. Growth is resident memory afterwards less before, divided
by the number; 13 nodes and 500 LoRAs went before, so that caches and buffers of a fixed size are full. Store writes are
counted by the scheduler over a minute with 213 idle nodes.

The floor of a node: the growth of a bare grpc.aio server process with our TLS and options, per client that holds one
stream and says nothing. gRPC's own connection, handshake state and buffers are more than the bound by themselves.

Agent: a process with the process driver and 8 simulated GPUs; its 100 runners are `sleep`s, one process and one
supervisor each (100 containers would measure the machine). This process answers their health probes on the runners'
sockets, so that the agent has the probes of 100 ready runners to make. fal-proxy and fal-fsd are reported beside it.

MiB are VmRSS unless named pss or uss. Idle CPU is user and system time of the process, in percent of one core.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
from cluster_rig import agent, join_token, nodes_ready, running
from harness import Options, Result, print_table, significant
from sim_nodes import SimNode, Usage, joined

from fal_agent.launch import socket_path
from fal_agent.layout import Layout
from fal_agent.ports import Places
from fal_contract.clock import SystemClock
from fal_contract.identity import Identity, Role
from fal_contract.limits import HEARTBEAT_INTERVAL_S
from fal_contract.manifest import AppManifest
from fal_contract.rpc import channel
from fal_contract.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, cluster_pb2_grpc, state_pb2
from fal_scheduler.ca import CertificateAuthority
from scheduler_process import Process, environment

RUNNERS = 100
NODES, GPUS_PER_NODE = 13, 8
IDLE_NODES = 200
LORAS_BEFORE, LORAS = 5_000, 2_000
LORAS_AT_ONCE = 8
HELP_RUNS = 10
CPU_WINDOW_S = 20.0
WRITES_WINDOW_S = 60.0
SETTLE_S = 3.0  # after a change, until it counts as idle
TIMEOUT_S = 120.0
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

BOUNDS = {
    "scheduler_mib": 120.0,
    "agent_mib": 90.0,
    "node_kb": 50.0,
    "lora_kb": 2.0,
    "scheduler_cpu_percent": 1.0,
    "agent_cpu_percent": 1.0,
    "help_s": 0.3,
    "writes_per_node_minute": 0.0,
}
MUST_REACH = ", ".join(f"{name} <= {bound:g}" for name, bound in BOUNDS.items())


class SimNodes:
    """Nodes of this process; `close` ends their streams."""

    def __init__(self, process: Process, stub: cluster_pb2_grpc.ClusterAsyncStub) -> None:
        self._process = process
        self._stub = stub
        self._ca_pem = Identity.load(process.data / "operator").ca_pem
        self._nodes: list[SimNode] = []
        self._beats: list[asyncio.Task[None]] = []

    async def add(self, count: int) -> None:
        """So many more, joined, connected and ready."""
        token = await join_token(self._stub, uses=count)
        first = len(self._nodes)
        for number in range(first, first + count):
            node = SimNode(self._process, await joined(self._process, token, self._ca_pem, number), gpus=GPUS_PER_NODE)
            node.dial()
            self._nodes.append(node)
            self._beats.append(asyncio.create_task(node.beat(HEARTBEAT_INTERVAL_S * (number % 50) / 50)))
        try:
            await nodes_ready(self._stub, len(self._nodes))
        except TimeoutError:
            for task in (node.task for node in self._nodes if node.task is not None and node.task.done()):
                task.result()  # why that node's stream ended
            raise

    async def close(self) -> None:
        for node in self._nodes:
            node.hang_up()
        for beat in self._beats:
            beat.cancel()
        tasks = [node.task for node in self._nodes if node.task is not None]
        await asyncio.gather(*tasks, *self._beats, return_exceptions=True)


async def deploy(stub: cluster_pb2_grpc.ClusterAsyncStub, **fields: Any) -> list[str]:
    """An app of 100 runners; their ids once all have a node."""
    manifest = AppManifest(name="app", min_concurrency=RUNNERS, max_concurrency=RUNNERS, **fields)
    await stub.ApplyApp(cluster_pb2.ApplyAppRequest(id="default/app", spec=manifest.to_proto()), timeout=TIMEOUT_S)
    return await in_state(stub, None)


async def in_state(stub: cluster_pb2_grpc.ClusterAsyncStub, state: int | None) -> list[str]:
    """The ids of all runners, once all are in `state`; None: once all have a node."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            views = (await stub.ListRunners(cluster_pb2.ListRunnersRequest())).runners
            there = [v.runner.id for v in views if (v.runner.node if state is None else v.state == state)]
            if len(there) == RUNNERS:
                return there
            await asyncio.sleep(0.1)


async def add_loras(stub: cluster_pb2_grpc.ClusterAsyncStub, folder: Path, first: int, count: int) -> None:
    """Register so many more LoRAs, each a folder with one small file, after `first` others."""
    numbers = iter(range(first, first + count))

    async def client() -> None:
        for number in numbers:
            place = folder / f"lora{number:04d}"
            place.mkdir(parents=True)
            (place / "pytorch_lora_weights.safetensors").write_bytes(number.to_bytes(512, "big"))
            request = cluster_pb2.AddModelRequest(id=f"default/{place.name}", uri=place.as_uri(), kind="lora")
            await stub.AddModel(request, timeout=TIMEOUT_S)

    async with asyncio.TaskGroup() as clients:
        for _ in range(LORAS_AT_ONCE):
            clients.create_task(client())
    # Not ListModels: its big answer would count as the scheduler's growth.
    assert (await stub.GetStatus(cluster_pb2.GetStatusRequest())).models == first + count


async def commits(stub: cluster_pb2_grpc.ClusterAsyncStub) -> int:
    """Store commits so far."""
    return (await stub.GetStatus(cluster_pb2.GetStatusRequest())).commits


async def measure_scheduler(folder: Path, options: Options) -> dict[str, Any]:
    """The scheduler's figures."""
    async with running(folder) as (process, stub):
        usage, nodes = Usage(process.popen.pid), SimNodes(process, stub)
        bare = usage.memory()
        try:
            await nodes.add(NODES)
            await deploy(stub, command=["serve"], num_gpus=1)
            await in_state(stub, state_pb2.RUNNER_STATE_IDLE)
            await asyncio.sleep(SETTLE_S)
            with_runners = usage.memory()
            cpu = await usage.idle_cpu(CPU_WINDOW_S * options.seconds_s)
            await add_loras(stub, folder / "loras", 0, LORAS_BEFORE)
            await asyncio.sleep(SETTLE_S)
            before_loras = usage.memory()
            await add_loras(stub, folder / "loras", LORAS_BEFORE, LORAS)
            await asyncio.sleep(SETTLE_S)
            with_loras = usage.memory()
            await nodes.add(IDLE_NODES)
            await asyncio.sleep(SETTLE_S)
            with_nodes = usage.memory()
            window_s = WRITES_WINDOW_S * options.seconds_s
            committed = await commits(stub)
            cpu_all = await usage.idle_cpu(window_s)
            written = await commits(stub) - committed
        finally:
            await nodes.close()
    return {
        "scheduler_mib": with_runners["rss"],
        "node_kb": kb_each(with_loras, with_nodes, IDLE_NODES),
        "lora_kb": kb_each(before_loras, with_loras, LORAS),
        "scheduler_cpu_percent": cpu,
        "writes_per_node_minute": written / (NODES + IDLE_NODES) / (window_s / 60.0),
        "also": {
            "scheduler_pss_mib": with_runners["pss"],
            "scheduler_uss_mib": with_runners["uss"],
            "scheduler_empty_mib": bare["rss"],
            "lora_first_kb": kb_each(with_runners, before_loras, LORAS_BEFORE),
            "scheduler_213_nodes_7000_loras_mib": with_nodes["rss"],
            "scheduler_213_nodes_cpu_percent": cpu_all,
            "node_floor_kb": await node_floor_kb(folder / "floor"),
        },
    }


def kb_each(before: dict[str, float], after: dict[str, float], count: int) -> float:
    """Growth of resident memory in kB (1,000 bytes) for each of `count`."""
    return (after["rss"] - before["rss"]) * 2**20 / 1000 / count


async def node_floor_kb(folder: Path) -> float:
    """What one more idle stream costs a bare gRPC server."""
    ca = CertificateAuthority.create(folder, cluster_id="c-floor0000000", now_s=SystemClock().wall_s())
    for role in (Role.SCHEDULER, Role.NODE):
        ca.new_identity(role=role, name="n-floor", now_s=SystemClock().wall_s()).save(folder / str(role))
    own = Identity.load(folder / str(Role.NODE))
    argv = [sys.executable, str(Path(__file__).with_name("bare_session_server.py")), str(folder / str(Role.SCHEDULER))]
    server = await asyncio.to_thread(subprocess.Popen, argv, stdout=subprocess.PIPE, env=environment())
    try:
        assert server.stdout is not None
        address = f"127.0.0.1:{int(await asyncio.to_thread(server.stdout.readline))}"
        usage = Usage(server.pid)
        async with AsyncExitStack() as stack:
            for number in range(NODES + IDLE_NODES):
                if number == NODES:
                    before = usage.memory()
                opened = await stack.enter_async_context(channel(address, own))
                call: Any = agent_pb2_grpc.AgentServiceStub(opened).Session()  # type: ignore[call-arg]  # written below
                await call.write(agent_pb2.AgentMessage(seq=1))
                await call.read()
                stack.callback(call.cancel)
            return kb_each(before, usage.memory(), IDLE_NODES)
    finally:
        server.kill()
        await asyncio.to_thread(server.wait)
        if server.stdout is not None:
            server.stdout.close()


@asynccontextmanager
async def workers(places: Places, runner_ids: list[str]) -> AsyncIterator[None]:
    """Something that answers each runner's health probes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await writer.drain()
        writer.close()

    async with AsyncExitStack() as stack:
        for runner_id in runner_ids:
            path = socket_path(places, runner_id)
            async with asyncio.timeout(TIMEOUT_S):
                while not path.parent.exists():  # noqa: ASYNC110  (the agent's to make)
                    await asyncio.sleep(0.05)
            await stack.enter_async_context(await asyncio.start_unix_server(answer, path))
        yield


async def measure_agent(folder: Path, options: Options) -> dict[str, Any]:
    """The agent's figures."""
    async with running(folder) as (process, stub):
        state = folder / "n"
        flags = ("--driver", "process", "--sim-gpus", f"{GPUS_PER_NODE}xH100-80GB")
        with agent(process, await join_token(stub), state, *flags) as popen:
            await nodes_ready(stub, 1)
            usage = Usage(popen.pid)
            empty = usage.memory()
            ids = await deploy(
                stub, command=["/bin/sleep", "3600"], num_gpus=0, resources={"cpu": 0, "memory_gib": 0, "pids": 8}
            )
            async with workers(Layout(state).places(isolates=False), ids):
                await in_state(stub, state_pb2.RUNNER_STATE_IDLE)
                await asyncio.sleep(SETTLE_S)
                with_runners = usage.memory()
                cpu = await usage.idle_cpu(CPU_WINDOW_S * options.seconds_s)
                beside = daemons(popen.pid)
    return {
        "agent_mib": with_runners["rss"],
        "agent_cpu_percent": cpu,
        "also": {
            "agent_pss_mib": with_runners["pss"],
            "agent_uss_mib": with_runners["uss"],
            "agent_empty_mib": empty["rss"],
            **beside,
        },
    }


def daemons(agent_pid: int) -> dict[str, float]:
    """Resident MiB of what the agent started beside itself."""
    found: dict[str, float] = {}
    for child in psutil.Process(agent_pid).children():
        for module, name in (("fal_agent.proxy.main", "proxy_mib"), ("fal_fsd.main", "fsd_mib")):
            if module in child.cmdline():
                found[name] = child.memory_info().rss / 2**20
    return found


def help_seconds() -> list[tuple[float, float]]:
    """Elapsed and CPU seconds of `falctl --help` from the start of the process; the first, which fills the page cache,
    is left out."""
    took = []
    for _ in range(HELP_RUNS + 1):
        begun_s, cpu_s = time.perf_counter(), _children_cpu_s()
        argv = [sys.executable, "-m", "falctl.main", "--help"]
        done = subprocess.run(argv, env=environment(), capture_output=True, check=True, timeout=TIMEOUT_S)
        took.append((time.perf_counter() - begun_s, _children_cpu_s() - cpu_s))
        assert b"Usage" in done.stdout
    return took[1:]


def _children_cpu_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


async def run(options: Options) -> Result:
    """All figures, one after the other."""
    helps = await asyncio.to_thread(help_seconds)
    figures: dict[str, Any] = {"help_s": statistics.median(elapsed_s for elapsed_s, _ in helps)}
    also: dict[str, float] = {"help_cpu_s": statistics.median(cpu_s for _, cpu_s in helps)}
    for measure in (measure_scheduler, measure_agent):
        with tempfile.TemporaryDirectory(prefix="bf-") as name:
            found = await measure(Path(name), options)
        also |= found.pop("also")
        figures |= found
    reached = {name: figures[name] <= bound for name, bound in BOUNDS.items()}
    rows = [(name, float(figures[name]), bound, "" if reached[name] else "missed") for name, bound in BOUNDS.items()]
    print_table(
        ("footprint", "measured", "bound", ""), [*rows, *((name, value, "", "") for name, value in also.items())]
    )
    return Result(
        bench="footprint",
        ours=figures["scheduler_mib"],
        baseline=BOUNDS["scheduler_mib"],
        ratio=max(figures[name] / bound for name, bound in BOUNDS.items() if bound),
        unit="MiB of the scheduler, its bound; ratio: the worst of all figures / bounds",
        runs=1,
        must_reach=MUST_REACH,
        reached=all(reached.values()),
        extra={
            "figures": {
                name: {"measured": significant(figures[name]), "bound": bound, "reached": reached[name]}
                for name, bound in BOUNDS.items()
            },
            "also": {name: significant(value) for name, value in also.items()},
        },
    )
