"""`warm-bind`: from apply to the first picture with a warm worker ÷ the same in a cold container.

Both: ApplyApp on an open mutual-TLS connection, then a request to fal-gateway, every 10 ms until it is answered →
fal-scheduler → fal-agent → a container of the oci driver with our worker and the digits model (a real diffusers
pipeline, 3 MB, on the CPU), which is on the node → probes, fal-proxy, the picture. The two nodes are alike but for
`--warm-workers`. The clock starts as ApplyApp is handed to gRPC and stops when the picture is whole. Before each start,
on either side, the warm worker waits and has loaded its libraries: nothing is made ahead while the clock runs.

The floor of ours is what the worker does with any model: read it, warm up with two steps, draw. The table tells what
was spent where, by the worker's own log.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from bench_peer_ray import delete, gateway
from bench_start import wall_s_of, why_not
from cluster_rig import agent, nodes_ready, picture, running
from harness import Options, Paired, Result, interleave, print_table, significant

from fal_contract.clock import SystemClock
from fal_contract.manifest import AppManifest
from fal_contract.manifest_parts import ResourcesManifest
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc, state_pb2

MUST_REACH = "ratio <= 0.25"
RATIO_MAX = 0.25
MODEL = "default/digits"
DIGITS = Path(__file__).resolve().parents[2] / "ops" / "models" / "digits"
TIMEOUT_S = 180.0
POLL_S = 0.02  # nothing is timed by it
# The worker's event at the end of each step.
STEPS = {
    "listening": "bind: apply, container, worker listens",
    "import": "import: libraries",
    "load": "load: read the model",
    "warm": "warm: two steps",
}


class Side:
    """Starts on one of the two nodes. `phases`: seconds of the worker's life, and where they were spent."""

    def __init__(self, cluster: Cluster, pool: str, *, warm: bool) -> None:
        self.phases: dict[str, list[float]] = defaultdict(list)
        self._cluster = cluster
        self._pool = pool
        self._warm = warm

    async def run(self) -> float:
        """Seconds to a picture; the container is gone again when this returns."""
        await self._cluster.one_waits()
        name = f"{self._pool}{next(self._cluster.count)}"
        manifest = AppManifest(
            name=name, model=MODEL, pools=[self._pool], num_gpus=1, min_concurrency=1, max_concurrency=1,
            resources=ResourcesManifest(cpu=1.0, memory_gib=2.0), termination_grace_period=0.1,
        )  # fmt: skip
        request = cluster_pb2.ApplyAppRequest(id=f"default/{name}", spec=manifest.to_proto(), expected_generation=0)
        clock = SystemClock()
        sent_s, began_s = clock.wall_s(), time.perf_counter()
        await self._cluster.stub.ApplyApp(request, timeout=TIMEOUT_S)
        await picture(self._cluster.port, name)
        took_s = time.perf_counter() - began_s
        self._note(name, sent_s, took_s)
        await delete(self._cluster.stub, name)
        return took_s

    def _note(self, name: str, sent_s: float, took_s: float) -> None:
        """What the worker said when, from its log."""
        container = next(self._cluster.folder.glob(f"{self._pool}/c/containers/default.{name}-*"))
        assert container.is_symlink() == self._warm, "the wrong kind of container"
        at_s = {}
        for text in (container / "log" / "log").read_text().splitlines():
            stamp, _stream, _kind, line = text.split(" ", 3)
            if line.startswith("{"):
                said = json.loads(line)
                at_s[str(said.get("phase", said["event"]))] = wall_s_of(stamp)
        began_s = sent_s
        for event, step in STEPS.items():
            self.phases[step].append(at_s[event] - began_s)
            began_s = at_s[event]
        self.phases["ready: probe, route, request, picture"].append(sent_s + took_s - began_s)


class Cluster:
    """A scheduler, a gateway, and a node of each kind."""

    def __init__(self, stub: cluster_pb2_grpc.ClusterAsyncStub, port: int, folder: Path, warm: str) -> None:
        self.stub = stub
        self.port = port
        self.folder = folder
        self.count = itertools.count()
        self._warm = warm
        self._asked = False

    async def first(self, pools: tuple[str, ...]) -> None:
        """Bring the model to both nodes, and tell them what is started here."""
        for pool in pools:
            await Side(self, pool, warm=False).run()
        self._asked = True

    async def one_waits(self) -> None:
        """A warm worker that nobody has, with its libraries loaded."""
        prepared = self.folder / self._warm / "c" / "prepared"
        async with asyncio.timeout(TIMEOUT_S):
            while self._asked:
                for record in prepared.glob("*/record.json"):
                    with contextlib.suppress(OSError, ValueError):
                        # Ringing without a message changes nothing; it needs somebody who listens.
                        os.close(os.open(json.loads(record.read_text())["fifo"], os.O_WRONLY | os.O_NONBLOCK))
                        return
                await asyncio.sleep(POLL_S)


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[tuple[Side, Side]]:
    """Both sides, each used once."""
    folder.mkdir()
    async with running(folder) as (process, stub), AsyncExitStack() as stack:
        await stub.AddModel(cluster_pb2.AddModelRequest(id=MODEL, uri=DIGITS.as_uri()), timeout=TIMEOUT_S)
        for pool, count in (("warm", 1), ("cold", 0)):
            await stub.ApplyPool(
                cluster_pb2.ApplyPoolRequest(pool=state_pb2.Pool(name=pool, cloud="metal")), timeout=TIMEOUT_S
            )
            token = await stub.CreateToken(cluster_pb2.CreateTokenRequest(pool=pool, ttl_s=600, uses=1))
            flags = ("--driver", "oci", "--sim-gpus", "1xH100-80GB", "--prepared-containers", "0")
            stack.enter_context(agent(process, token.token, folder / pool, *flags, "--warm-workers", str(count)))
        await nodes_ready(stub, 2)
        made = Cluster(stub, await gateway(stack, process, folder), folder, "warm")
        await made.first(("warm", "cold"))
        yield Side(made, "warm", warm=True), Side(made, "cold", warm=False)


async def run(options: Options) -> Result:
    """All starts, in turns."""
    if why := why_not():
        raise SystemExit(f"warm-bind: not measured, it {why}")
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        async with cluster(Path(name) / "a") as (warm, cold):
            paired: Paired = await interleave(warm.run, cold.run, pairs=options.pairs)
    figures = paired.as_json()
    steps = [step for step in cold.phases if step in warm.phases]
    medians = {step: (statistics.median(warm.phases[step]), statistics.median(cold.phases[step])) for step in steps}
    print_table(
        ("warm-bind, s", "warm worker", "cold container", "ratio"),
        [
            ("apply to first picture", figures["ours"], figures["baseline"], paired.ratio),
            *((f"  {step}", ours_s, cold_s, "") for step, (ours_s, cold_s) in medians.items()),
        ],
    )
    return Result(
        bench="warm-bind",
        ours=figures["ours"],
        baseline=figures["baseline"],
        ratio=paired.ratio,
        unit="s from apply to the first picture",
        runs=len(paired.ours),
        must_reach=MUST_REACH,
        reached=paired.ratio <= RATIO_MAX,
        extra={
            "ratio_min": figures["ratio_min"],
            "ratio_max": figures["ratio_max"],
            "steps_s": {
                step.partition(":")[0]: [significant(ours_s, 3), significant(cold_s, 3)]
                for step, (ours_s, cold_s) in medians.items()
            },
        },
    )
