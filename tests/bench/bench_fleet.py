"""`fleet`: one scheduler process and 1,000 simulated agents over real gRPC; what holding and placing them costs.

The scheduler runs on SQLite behind mutual TLS. Nodes join as machines do (certificate, HTTPS); two processes beside it
hold their streams, one event loop each, heartbeats of 5 s. In turn: memory and CPU of the idle fleet; 10 runners on
every node; CPU and store writes over a minute in which nothing happens; 1,000 apps of one runner, each counted from its
ApplyApp to the answer (durable) and to its assignment's arrival at the node; then, with nodes of their own processes,
SIGSTOP (silence: until NODE_UNKNOWN) and SIGKILL (a broken stream: until ListNodes says that it is not connected).

Figures: CPU is user and system time of the scheduler, in cores. Writes are operations that the store committed, for
each node and minute; the baseline is Kubernetes' lease and status writes (KEP-589: a lease every 10 s, a status every 5
minutes). Silence counts from SIGSTOP, so it holds up to 5 s less than what the scheduler waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from cluster_rig import join_token, nodes_ready, running
from harness import Options, Result, percentile, print_table, significant
from sim_nodes import Usage, joined

from fal_contract.identity import Identity
from fal_contract.manifest import AppManifest, ResourcesManifest
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc
from scheduler_process import Process, environment

NODES = 1000
LONE_NODES = 4  # in processes of their own, to be stopped and killed
PROCESSES = 2
GPUS_PER_NODE = 12
RUNNERS_PER_NODE = 10
PLACEMENTS = 1000
APPLIES_AT_ONCE = 32
JOINS_AT_ONCE = 8
WARM_NODES = 50  # connected before memory is counted
WINDOW_S = 60.0
SETTLE_S = 10.0
TIMEOUT_S = 300.0
KUBERNETES_WRITES = 6.2
WRITES_MAX, CORES_MAX, SILENT_MAX_S, BROKEN_MAX_S, NODE_KB_MAX = 0.02, 1.0, 15.0, 1.0, 50.0
MUST_REACH = (
    f"<= {WRITES_MAX} writes a node-minute, <= {CORES_MAX:g} core at {NODES} agents, "
    f"a silent node seen <= {SILENT_MAX_S:g} s, a broken stream <= {BROKEN_MAX_S:g} s"
)

Stub: TypeAlias = "cluster_pb2_grpc.ClusterAsyncStub"
Child: TypeAlias = asyncio.subprocess.Process


@dataclass
class Fleet:
    """The agents' processes and what they tell."""

    folder: Path
    process: Process
    children: list[Child] = field(default_factory=list)
    placed_at_s: dict[str, float] = field(default_factory=dict)
    _readers: list[asyncio.Task[None]] = field(default_factory=list)

    async def join(self, stub: Stub, count: int) -> None:
        """Make nodes and keep their identities."""
        token = await join_token(stub, uses=count)
        ca_pem = Identity.load(self.process.data / "operator").ca_pem
        numbers = iter(range(count))

        async def machine() -> None:
            for number in numbers:
                (await joined(self.process, token, ca_pem, number)).save(self.folder / str(number))

        async with asyncio.TaskGroup() as machines:
            for _ in range(JOINS_AT_ONCE):
                machines.create_task(machine())

    async def dial(self, first: int, count: int) -> Child:
        """A process that holds the streams of so many nodes; returns once all are welcome."""
        argv = [sys.executable, str(Path(__file__).with_name("fleet_agents_child.py")), str(self.folder)]
        argv += [self.process.address, str(first), str(count), str(GPUS_PER_NODE)]
        child = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, env=environment())
        self.children.append(child)
        dialled = asyncio.Event()
        self._readers.append(asyncio.create_task(self._read(child, dialled)))
        async with asyncio.timeout(TIMEOUT_S):
            await dialled.wait()
        if child.returncode is not None:
            raise AssertionError("the agents' process ended; see above")
        return child

    async def _read(self, child: Child, dialled: asyncio.Event) -> None:
        assert child.stdout is not None
        while line := await child.stdout.readline():
            told = json.loads(line)
            if "placed" in told:
                self.placed_at_s[told["placed"].rpartition("-")[0]] = told["at_s"]
            else:
                dialled.set()
        dialled.set()

    async def close(self) -> None:
        """End the processes."""
        for child in self.children:
            if child.returncode is None:
                child.kill()
            await child.wait()
        await asyncio.gather(*self._readers, return_exceptions=True)


def store_writes(process: Process) -> tuple[float, float]:
    """Commits and operations so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{process.ports['metrics']}/metrics", timeout=10) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if "_store_" in line and line[0] != "#"]
    values = {name.rpartition("_store_")[2]: float(value) for name, value in lines}
    return values["commits"], values["operations"]


async def deploy(stub: Stub, name: str, runners: int) -> None:
    """An app of so many runners of one GPU."""
    manifest = AppManifest(
        name=name, image="host", command=["serve"], num_gpus=1, min_concurrency=runners, max_concurrency=runners,
        resources=ResourcesManifest(cpu=0.1, memory_gib=0.1),
    )  # fmt: skip
    await stub.ApplyApp(cluster_pb2.ApplyAppRequest(id=f"default/{name}", spec=manifest.to_proto()), timeout=TIMEOUT_S)


async def fill(stub: Stub, usage: Usage) -> dict[str, float]:
    """Ten runners a node, in ten apps."""
    begun_s, cpu_s = time.perf_counter(), usage.cpu_s()
    for number in range(RUNNERS_PER_NODE):
        await deploy(stub, f"many{number}", NODES)
    await idle_runners(stub, NODES * RUNNERS_PER_NODE)
    return {"fill_s": time.perf_counter() - begun_s, "fill_cpu_s": usage.cpu_s() - cpu_s}


async def idle_runners(stub: Stub, count: int) -> None:
    """Wait until so many runners are ready."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            runners = (await stub.GetStatus(cluster_pb2.GetStatusRequest())).runners
            if runners["IDLE"] >= count:
                return
            await asyncio.sleep(1.0)  # the scheduler looks at every runner for it


async def place_one_by_one(stub: Stub, fleet: Fleet, usage: Usage) -> dict[str, float]:
    """So many apps of one runner, a few under way at a time."""
    numbers = iter(range(PLACEMENTS))
    began_at_s: dict[str, float] = {}
    answered: list[float] = []

    async def operator() -> None:
        for number in numbers:
            began_at_s[f"default/one{number}"] = begun_s = time.perf_counter()
            await deploy(stub, f"one{number}", 1)
            answered.append(time.perf_counter() - begun_s)

    cpu_s, begun_s = usage.cpu_s(), time.perf_counter()
    async with asyncio.TaskGroup() as operators:
        for _ in range(APPLIES_AT_ONCE):
            operators.create_task(operator())
    async with asyncio.timeout(TIMEOUT_S):
        while len(fleet.placed_at_s) < PLACEMENTS:  # noqa: ASYNC110  (of this process: nothing is asked)
            await asyncio.sleep(0.05)
    took_s, cpu_s = time.perf_counter() - begun_s, usage.cpu_s() - cpu_s
    await idle_runners(stub, NODES * RUNNERS_PER_NODE + PLACEMENTS)
    arrived = [fleet.placed_at_s[app] - at_s for app, at_s in began_at_s.items()]
    return {
        "placements_per_s": PLACEMENTS / took_s,
        "placements_cpu_ms_each": 1000 * cpu_s / PLACEMENTS,
        "apply_p50_ms": 1000 * percentile(answered, 0.5),
        "apply_p99_ms": 1000 * percentile(answered, 0.99),
        "assigned_p50_ms": 1000 * percentile(arrived, 0.5),
        "assigned_p99_ms": 1000 * percentile(arrived, 0.99),
    }


async def silence(stub: Stub, stopped: list[Child]) -> float:
    """Seconds from SIGSTOP of these until the last of them is said to be UNKNOWN."""
    after = 0
    async for event in stub.Events(cluster_pb2.EventsRequest()):
        after = event.number
    begun_s = time.perf_counter()
    for child in stopped:
        child.send_signal(signal.SIGSTOP)
    seen = 0
    async with asyncio.timeout(TIMEOUT_S):
        async for event in stub.Events(cluster_pb2.EventsRequest(follow=True, after=after)):
            seen += event.kind == "NODE_UNKNOWN"
            if seen == len(stopped):
                break
    return time.perf_counter() - begun_s


async def broken(stub: Stub, child: Child, name: str) -> float:
    """Seconds from SIGKILL until the node is shown as not connected."""
    begun_s = time.perf_counter()
    child.kill()
    async with asyncio.timeout(TIMEOUT_S):
        while (await stub.ListNodes(cluster_pb2.ListNodesRequest(node=name))).nodes[0].connected:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return time.perf_counter() - begun_s


@contextlib.asynccontextmanager
async def fleet_of(folder: Path, process: Process) -> AsyncIterator[Fleet]:
    """A fleet without nodes."""
    folder.mkdir()
    fleet = Fleet(folder, process)
    try:
        yield fleet
    finally:
        await fleet.close()


async def steady(process: Process, usage: Usage, window_s: float) -> dict[str, float]:
    """CPU and store writes while nothing happens."""
    commits, operations = store_writes(process)
    percent = await usage.idle_cpu(window_s)
    commits_after, operations_after = store_writes(process)
    minutes = window_s / 60.0
    return {
        "cores": percent / 100.0,
        "writes_per_node_minute": (operations_after - operations) / NODES / minutes,
        "commits": commits_after - commits,
    }


async def measure(folder: Path, options: Options) -> dict[str, float]:
    """All figures by name; each phase is told as it ends."""
    window_s = max(WINDOW_S * options.seconds_s, 5.0)
    async with running(folder) as (process, stub), fleet_of(folder / "nodes", process) as fleet:
        usage = Usage(process.popen.pid)
        await fleet.join(stub, NODES + LONE_NODES)
        await fleet.dial(0, WARM_NODES)
        await asyncio.sleep(SETTLE_S)
        before = usage.memory()["rss"]
        begun_s = time.perf_counter()
        rest = NODES - WARM_NODES
        shares = [rest * n // PROCESSES for n in range(PROCESSES + 1)]
        await asyncio.gather(*(fleet.dial(WARM_NODES + low, high - low) for low, high in itertools.pairwise(shares)))
        await nodes_ready(stub, NODES)
        figures = {"dial_s": time.perf_counter() - begun_s}
        await asyncio.sleep(SETTLE_S)
        figures["node_kb"] = (usage.memory()["rss"] - before) * 2**20 / 1000 / rest
        idle = await steady(process, usage, window_s)
        figures |= {f"idle_{name}": value for name, value in idle.items()}
        figures |= await fill(stub, usage)
        await asyncio.sleep(SETTLE_S)
        figures |= await steady(process, usage, window_s)
        figures |= await place_one_by_one(stub, fleet, usage)
        lone = [await fleet.dial(NODES + number, 1) for number in range(LONE_NODES)]
        await nodes_ready(stub, NODES + LONE_NODES)
        figures["broken_s"] = await broken(stub, lone.pop(0), f"sim{NODES:04d}")
        figures["silent_s"] = await silence(stub, lone)
        figures["rss_mib"] = usage.memory()["rss"]
    return figures


async def run(options: Options) -> Result:
    """Measure, once."""
    with tempfile.TemporaryDirectory(prefix="bf-") as name:
        figures = await measure(Path(name), options)
    bounds = {
        "writes_per_node_minute": WRITES_MAX,
        "cores": CORES_MAX,
        "idle_cores": CORES_MAX,
        "silent_s": SILENT_MAX_S,
        "broken_s": BROKEN_MAX_S,
    }
    aims = {**bounds, "node_kb": NODE_KB_MAX}
    rows = [(n, v, aims.get(n, ""), "missed" if v > aims.get(n, v) else "") for n, v in figures.items()]
    print_table((f"{NODES} nodes", "measured", "bound", ""), rows)
    writes = figures["writes_per_node_minute"]
    extra: dict[str, Any] = {name: significant(value) for name, value in figures.items()}
    return Result(
        bench="fleet",
        ours=writes,
        baseline=KUBERNETES_WRITES,
        ratio=writes / KUBERNETES_WRITES,
        unit="durable writes a node-minute",
        runs=1,
        must_reach=MUST_REACH,
        reached=all(figures[name] <= bound for name, bound in bounds.items()),
        extra={"nodes": NODES, "runners": NODES * RUNNERS_PER_NODE, **extra},
    )
