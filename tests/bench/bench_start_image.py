"""`start-image`: first start of an image on a node that has nothing ÷ skopeo copy, umoci unpack, runc run of the same.

The image: a userland, Python and CPU torch, about 1 GB, in gzip layers in a real `docker-registry` on loopback. The
program: `import torch`, then a line. Ours is the whole chain: AddImage (one node packs), a start that is recorded on a
node that has the image, and then, measured, for each run a new node with an agent and a cache of its own that has
nothing: ApplyApp on an open mutual-TLS connection → scheduler → agent → cache, which asks the nodes that have the image
for the recorded pieces first → loop device on the unfinished file → overlay, conmon, runc → `import torch` reads as
pieces come. The clock starts as ApplyApp is handed to gRPC and stops at conmon's stamp of the line. Bare: from before
skopeo is started until the line is read.

The floor of ours: `import torch` from a warm page cache, and the bytes that it reads ÷ the rate of one stream through
two caches (BLAKE3 and one write on the way). `moved_share`: bytes that had come when the line was written ÷ the image.
`not_recorded`: one pair before any start was recorded, so that only what the program asks for says what comes next.
`loads`: the machine's load average at each of our starts. What adding an image costs next to pulling and unpacking it
is `image-add`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench_start import wall_s_of, why_not
from cluster_rig import agent, join_token, nodes_ready, running
from harness import Options, Paired, Result, print_table, significant

from fal_contract.clock import SystemClock
from fal_contract.manifest import AppManifest
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc, state_pb2
from fal_fsd.client import CacheClient
from image_rig import TAG, ImageRegistry, torch_layout, why_no_packing, why_no_registry
from scheduler_process import Process

MUST_REACH = "ratio <= 0.35"
RATIO_MAX = 0.35
PAIRS_MAX = 3  # a pair takes most of a minute
TIMEOUT_S = 900.0
START_TIMEOUT_S = 300.0
POLL_S = 0.01  # nothing is timed by polling
IMAGE = "default/torch"
REPOSITORY = "team/torch:1"
LINE = "imported"
IMPORT = f"import torch; print('{LINE}', flush=True)"
PYTHON = "/usr/local/bin/python3"
# The same program, that then answers readiness probes as any server does.
SERVE = f"""{IMPORT}
import http.server, os, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *words):
        pass
socketserver.UnixStreamServer(os.environ["FAL_SOCKET"], Handler).serve_forever()
"""


class Chain:
    """A cluster with two nodes that have the image; each `run` adds a node that has nothing."""

    def __init__(self, process: Process, stub: cluster_pb2_grpc.ClusterAsyncStub, folder: Path, program: str) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)
        self.moved: list[float] = []
        self.loads: list[float] = []
        self._process = process
        self._stub = stub
        self._folder = folder
        self._program = program
        self._count = itertools.count()
        self._clock = SystemClock()
        self._image_bytes = 1

    async def add(self, source: str) -> float:
        """Seconds until the image is registered and two nodes have it."""
        began_s = time.perf_counter()
        await self._stub.AddImage(cluster_pb2.AddImageRequest(id=IMAGE, source=source), timeout=START_TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                view = await self._stub.GetImage(cluster_pb2.GetImageRequest(id=IMAGE))
                if view.state == "failed":
                    raise RuntimeError(f"{view.reason}: {list(view.log_tail)}")
                if view.nodes_ready >= 2:
                    break
                await asyncio.sleep(POLL_S)
        self._image_bytes = view.model.bytes
        return time.perf_counter() - began_s

    async def record(self) -> int:
        """Start it once on a node of the first pool; how many pieces that start has read."""
        async with self._app("record", "bench", self._folder / "nodes"):
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    view = await self._stub.GetImage(cluster_pb2.GetImageRequest(id=IMAGE))
                    if view.model.image.first_pieces:
                        return len(view.model.image.first_pieces)
                    await asyncio.sleep(POLL_S)

    async def run(self) -> float:
        """Seconds of one start on a node that has nothing; node and container are gone when this returns."""
        number = next(self._count)
        self.loads.append(os.getloadavg()[0])
        pool = state_pb2.Pool(name=f"fresh{number}", cloud="metal")
        await self._stub.ApplyPool(cluster_pb2.ApplyPoolRequest(pool=pool), timeout=START_TIMEOUT_S)
        request = cluster_pb2.CreateTokenRequest(pool=pool.name, ttl_s=600, uses=1)
        token = (await self._stub.CreateToken(request, timeout=START_TIMEOUT_S)).token
        state = self._folder / pool.name
        with agent(self._process, token, state, "--driver", "oci", "--sim-gpus", "1xH100-80GB"):
            await self._joined(state.name)
            async with self._app(f"app{number}", pool.name, state) as took_s:
                self.moved.append(await self._moved(state))
                return took_s

    async def _joined(self, name: str) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                nodes = (await self._stub.ListNodes(cluster_pb2.ListNodesRequest())).nodes
                if any(view.node.name == name and view.health == "ready" for view in nodes):
                    return
                await asyncio.sleep(POLL_S)

    @asynccontextmanager
    async def _app(self, name: str, pool: str, state: Path) -> AsyncIterator[float]:
        """An app of one runner in this pool: seconds to its line."""
        manifest = AppManifest(
            name=name, image=IMAGE, command=[PYTHON, "-c", self._program], pools=[pool], num_gpus=1,
            min_concurrency=1, max_concurrency=1, termination_grace_period=0.01, startup_timeout=START_TIMEOUT_S,
        )  # fmt: skip
        request = cluster_pb2.ApplyAppRequest(id=f"default/{name}", spec=manifest.to_proto(), expected_generation=0)
        sent_s = self._clock.wall_s()
        await self._stub.ApplyApp(request, timeout=START_TIMEOUT_S)
        try:
            yield await self._line(name, state) - sent_s
        finally:
            await self._stub.DeleteApp(cluster_pb2.DeleteAppRequest(id=request.id), timeout=START_TIMEOUT_S)
            async with asyncio.timeout(START_TIMEOUT_S):
                while (await self._stub.ListRunners(cluster_pb2.ListRunnersRequest(app=request.id))).runners:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)

    async def _line(self, name: str, state: Path) -> float:
        """When conmon had it, wall clock. `state`: of the node, or a folder of nodes' folders."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                found = f"c/containers/default.{name}-*/log/log"
                for log in (*state.glob(found), *state.glob(f"[abn]/{found}")):
                    for text in log.read_text().splitlines():
                        stamp, _stream, _kind, line = text.split(" ", 3)
                        if line == LINE:
                            return wall_s_of(stamp)
                        raise RuntimeError(log.read_text())
                await asyncio.sleep(POLL_S)

    async def _moved(self, state: Path) -> float:
        """Share of the image that is on this node now."""
        client = CacheClient(state / "fsd" / "fsd.sock")
        try:
            return sum(one.bytes_disk for one in await client.artifacts()) / self._image_bytes
        finally:
            await client.close()


class Bare:
    """Pull, unpack, run; everything is removed between the runs, outside of the clock."""

    def __init__(self, source: str, folder: Path, command: tuple[str, ...]) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)
        self._source = source
        self._folder = folder
        self._command = command
        self._count = itertools.count()

    async def run(self) -> float:
        """Seconds from nothing to the line."""
        return await asyncio.to_thread(self._run)

    def _run(self) -> float:
        folder = self._folder / f"bare{next(self._count)}"
        folder.mkdir()
        began_s = time.perf_counter()
        self._step(
            "skopeo copy", "skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", self._source,
            f"oci:{folder}/oci:{TAG}",
        )  # fmt: skip
        self._step("umoci unpack", "umoci", "unpack", "--image", f"{folder}/oci:{TAG}", f"{folder}/bundle")
        config = folder / "bundle" / "config.json"
        table = json.loads(config.read_text())
        table["process"].update(args=list(self._command), terminal=False)
        table["linux"].pop("resources", None)
        config.write_text(json.dumps(table))
        said = self._step(
            "runc run", "runc", "--root", f"{folder}/runc", "run", "--bundle", f"{folder}/bundle", f"b{folder.name}"
        )
        took_s = time.perf_counter() - began_s
        assert said == f"{LINE}\n", said
        shutil.rmtree(folder)
        return took_s

    def _step(self, name: str, *argv: str) -> str:
        began_s = time.perf_counter()
        done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        self.steps[name].append(time.perf_counter() - began_s)
        return done.stdout


@asynccontextmanager
async def sides(folder: Path, layout: Path) -> AsyncIterator[tuple[Chain, Bare]]:
    """Both sides of an image in `layout`, ours packed and registered."""
    with ImageRegistry(folder / "registry") as registry:
        registry.push(layout, REPOSITORY)
        async with running(folder) as (process, stub):
            nodes = folder / "nodes"
            nodes.mkdir()
            token = await join_token(stub, uses=2)
            flags = ("--driver", "oci", "--sim-gpus", "1xH100-80GB")
            with agent(process, token, nodes / "a", *flags), agent(process, token, nodes / "b", *flags):
                await nodes_ready(stub, 2)
                chain = Chain(process, stub, folder, SERVE)
                chain.steps["add: packed, registered, on two nodes"].append(
                    await chain.add(registry.source(REPOSITORY))
                )
                yield chain, Bare(registry.source(REPOSITORY), folder, (PYTHON, "-c", IMPORT))


async def run(options: Options) -> Result:
    """In turns; each start from nothing."""
    if why := why_not() or why_no_packing() or why_no_registry():
        raise SystemExit(f"start-image: not measured, it {why}")
    ours: list[float] = []
    baseline: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bi-") as name:
        folder = Path(name)
        layout = await asyncio.to_thread(torch_layout, folder / "image")
        async with sides(folder, layout) as (chain, bare):
            before = {"seconds": await chain.run(), "bare": await bare.run(), "moved_share": chain.moved.pop()}
            before["ratio"] = before["seconds"] / before["bare"]
            print(f"start-image: a start reads {await chain.record()} pieces")
            for _ in range(min(options.pairs, PAIRS_MAX)):
                ours.append(await chain.run())
                baseline.append(await bare.run())
    paired = Paired(ours, baseline)
    figures = paired.as_json()
    steps = {step: sorted(took)[len(took) // 2] for step, took in (*chain.steps.items(), *bare.steps.items())}
    moved_share = sorted(chain.moved)[len(chain.moved) // 2]
    print_table(
        ("start-image, s", "ours", "bare", "ratio"),
        [
            ("median", figures["ours"], figures["baseline"], paired.ratio),
            *((f"  {step}", "", seconds, "") for step, seconds in steps.items()),
            ("  bytes moved ÷ image", moved_share, "", ""),
            ("not recorded", before["seconds"], before["bare"], before["ratio"]),
            ("  bytes moved ÷ image", before["moved_share"], "", ""),
        ],
    )
    return Result(
        bench="start-image",
        ours=figures["ours"],
        baseline=figures["baseline"],
        ratio=paired.ratio,
        unit="s from nothing to `import torch` done",
        runs=len(ours),
        must_reach=MUST_REACH,
        reached=paired.ratio <= RATIO_MAX,
        extra={
            "moved_share": significant(moved_share),
            "not_recorded": {name: significant(value) for name, value in before.items()},
            "loads": [significant(load, 3) for load in chain.loads],
            "steps_s": {step.partition(":")[0]: significant(seconds, 3) for step, seconds in steps.items()},
            "ratio_min": figures["ratio_min"],
            "ratio_max": figures["ratio_max"],
        },
    )
