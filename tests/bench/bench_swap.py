"""`swap`: from apply to the first picture in a live runner of the same share group ÷ in a container of its own.

Both: ApplyApp on an open mutual-TLS connection, then a request to fal-gateway, every 10 ms until it is answered, of an
app with a model of its own (the digits model, a real diffusers pipeline of 3 MB on the CPU, whose files are on the
node). Ours names the share group of an app whose runner idles on that node: the scheduler binds it there, the agent
shows the files to the live container, our worker loads and warms the model beside its first. The baseline names none,
so that a container is started. The app is deleted after each run: the model is let go again, the container ends.

The floor of ours is what the worker does with the model: read it, warm up with two steps, draw.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from bench_peer_ray import delete, gateway
from bench_start import why_not
from cluster_rig import POOL, agent, join_token, nodes_ready, picture, running
from harness import Options, Paired, Result, interleave, print_table

from fal_contract.manifest import AppManifest
from fal_contract.manifest_parts import ResourcesManifest
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc

MUST_REACH = "ratio <= 0.25"
RATIO_MAX = 0.25
GROUP = "atelier"
DIGITS = Path(__file__).resolve().parents[2] / "ops" / "models" / "digits"
TIMEOUT_S = 180.0


class Cluster:
    """A scheduler, a gateway, a node with two GPUs, and an app whose runner idles there."""

    def __init__(self, stub: cluster_pb2_grpc.ClusterAsyncStub, port: int) -> None:
        self._stub = stub
        self._port = port
        self._count = itertools.count()
        self.host = ""

    async def begin(self) -> None:
        """The runner that others come into."""
        await self._apply("host", "default/digits", GROUP)
        await picture(self._port, "host")
        self.host = await self._runner("host")

    async def swap(self) -> float:
        """Seconds to the first picture of an app that comes into the live runner."""
        return await self._one(GROUP, live=True)

    async def start(self) -> float:
        """The same in a container of its own."""
        return await self._one("", live=False)

    async def _one(self, group: str, *, live: bool) -> float:
        name = f"app{next(self._count)}"
        began_s = time.perf_counter()
        await self._apply(name, "default/other", group)
        await picture(self._port, name)
        took_s = time.perf_counter() - began_s
        assert (await self._runner(name) == self.host) is live, "served by the wrong kind of runner"
        await delete(self._stub, name)
        return took_s

    async def _apply(self, name: str, model: str, group: str) -> None:
        manifest = AppManifest(
            name=name, model=model, share_group=group, num_gpus=1, min_concurrency=0, max_concurrency=1,
            keep_alive=600, resources=ResourcesManifest(cpu=1.0, memory_gib=2.0), termination_grace_period=0.1,
        )  # fmt: skip
        request = cluster_pb2.ApplyAppRequest(id=f"default/{name}", spec=manifest.to_proto(), expected_generation=0)
        await self._stub.ApplyApp(request, timeout=TIMEOUT_S)

    async def _runner(self, name: str) -> str:
        request = cluster_pb2.ListRunnersRequest(app=f"default/{name}")
        [view] = (await self._stub.ListRunners(request, timeout=TIMEOUT_S)).runners
        return str(view.runner.id)


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    """Both models are on the node, and every part was used once."""
    folder.mkdir()
    other = folder / "other"
    shutil.copytree(DIGITS, other)
    (other / "note.txt").write_text("the same weights under another name are another model")
    async with running(folder) as (process, stub), AsyncExitStack() as stack:
        for name, source in (("digits", DIGITS), ("other", other)):
            request = cluster_pb2.AddModelRequest(id=f"default/{name}", uri=source.as_uri())
            await stub.AddModel(request, timeout=TIMEOUT_S)
        flags = ("--driver", "oci", "--sim-gpus", "2xH100-80GB", "--prepared-containers", "0", "--warm-workers", "0")
        stack.enter_context(agent(process, await join_token(stub), folder / POOL, *flags))
        await nodes_ready(stub, 1)
        made = Cluster(stub, await gateway(stack, process, folder))
        await made.begin()
        yield made


async def run(options: Options) -> Result:
    """All starts, in turns."""
    if why := why_not():
        raise SystemExit(f"swap: not measured, it {why}")
    with tempfile.TemporaryDirectory(prefix="bs-") as name:
        async with cluster(Path(name) / "a") as made:
            paired: Paired = await interleave(made.swap, made.start, pairs=options.pairs)
    figures = paired.as_json()
    row = ("apply to first picture", figures["ours"], figures["baseline"], paired.ratio)
    print_table(("swap, s", "live runner", "new container", "ratio"), [row])
    return Result(
        bench="swap",
        ours=figures["ours"],
        baseline=figures["baseline"],
        ratio=paired.ratio,
        unit="s from apply to the first picture",
        runs=len(paired.ours),
        must_reach=MUST_REACH,
        reached=paired.ratio <= RATIO_MAX,
        extra={"ratio_min": figures["ratio_min"], "ratio_max": figures["ratio_max"]},
    )
