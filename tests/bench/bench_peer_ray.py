"""`peer-ray`: an echo of 1 kB in Python behind falctl ÷ the same handler behind Ray Serve, on this machine.

Ours: fal-scheduler, fal-agent, fal-proxy and fal-gateway as they are deployed (mutual TLS between them), containers
where this machine can run them, in each an aiohttp server with the handler. Theirs: Ray Serve of an environment of its
own (`.cache/ray`, made here at the first run), one HTTP proxy, no dashboard, access log off. Both have as many
replicas, each takes 16 requests at once; one HTTP client for both, with kept connections. They take turns; the other
side idles.

Cold start: from handing the deploy of a further app to the client library of each (gRPC, `serve.run`) until the first
200, asked every 10 ms. Latency: closed loops of 1 and of 16 requests at once, against 1 and 2 replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

import uvloop
from bench_start import why_not
from cluster_rig import agent, join_token, nodes_ready, running
from harness import Options, Paired, Result, interleave, percentile, print_table, significant

from fal_contract.clock import SystemClock
from fal_contract.errors import FalError
from fal_contract.http_client import READ_BYTES, HttpConnection
from fal_contract.manifest import AppManifest
from fal_contract.manifest_parts import ResourcesManifest
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc
from fal_runtime.host_image import worker_command
from fal_scheduler.init import issue
from scheduler_process import Process, environment

MUST_REACH = "cold start and p50 latency <= 1.0 x Ray Serve"
RATIO_MAX = 1.0
PACKAGE = "ray[serve]==2.60.0"
VENV = Path(__file__).resolve().parents[2] / ".cache" / "ray"
REPLICAS = (1, 2)
AT_ONCE = (1, 16)
COLD_EVERY_S = 0.01
LOOP = uvloop.new_event_loop  # as the gateway has
TIMEOUT_S = 120.0
INSTALL_TIMEOUT_S = 900.0
BODY = bytes(range(256)) * 4
HANDLER = """
import os
from aiohttp import web

async def echo(request):
    return web.Response(body=await request.read(), content_type="application/octet-stream")

async def ready(request):
    return web.Response()

app = web.Application()
app.router.add_post("/infer", echo)
app.router.add_get("/readyz", ready)
app.router.add_get("/livez", ready)
web.run_app(app, path=os.environ["FAL_SOCKET"], access_log=None, print=None)
"""


@dataclass
class Side:
    """One of the two: where apps are asked, how they are made and ended."""

    port: int
    path: str  # of an app by its name
    deploy: Callable[[str, int], Awaitable[object]]
    delete: Callable[[str], Awaitable[object]]
    ready: Callable[[str, int], Awaitable[object]]  # so many replicas are up
    names: itertools.count[int] = field(default_factory=itertools.count)
    took_s: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    async def cold(self) -> float:
        """Seconds from the deploy of one more app to its first answer; it is gone again when this returns."""
        name = f"cold{next(self.names)}"
        begun_s = time.perf_counter()
        deploying = asyncio.ensure_future(self.deploy(name, 1))
        await self.answered(name)
        took_s = time.perf_counter() - begun_s
        await deploying
        await self.delete(name)
        return took_s

    async def answered(self, name: str) -> None:
        """Ask until there is an answer."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with contextlib.suppress(OSError, FalError):
                    async with self.connection() as connection:
                        if await self.ask(connection, name):
                            return
                await asyncio.sleep(COLD_EVERY_S)

    async def latency(self, name: str, replicas: int, at_once: int, seconds_s: float) -> float:
        """Median seconds of a request, so many at once."""
        took: list[float] = []
        end_s = time.perf_counter() + seconds_s

        async def one() -> None:
            async with self.connection() as connection:
                while (begun_s := time.perf_counter()) < end_s:
                    assert await self.ask(connection, name)
                    took.append(time.perf_counter() - begun_s)

        await asyncio.gather(*(one() for _ in range(at_once)))
        self.took_s.setdefault((replicas, at_once), []).extend(took)
        return percentile(took, 0.5)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[HttpConnection]:
        """A kept one."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=READ_BYTES)
        connection = HttpConnection(reader, writer)
        try:
            yield connection
        finally:
            connection.abort()

    async def ask(self, connection: HttpConnection, name: str) -> bool:
        """One request; False where nobody is there yet."""
        headers = [("host", "127.0.0.1"), ("content-type", "application/octet-stream")]
        answer = await connection.request("POST", self.path.format(name), headers, BODY)
        body = await answer.read(1 << 20)
        assert answer.status != 200 or body == BODY, body
        return answer.status == 200


# --- ours -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def ours(folder: Path) -> AsyncIterator[Side]:
    """A cluster of one node, and a gateway."""
    driver = "process" if why_not() else "oci"
    async with running(folder) as (process, stub), AsyncExitStack() as stack:
        flags = ("--driver", driver, "--sim-gpus", "1xH100-80GB")
        stack.enter_context(agent(process, await join_token(stub), folder / "n", *flags))
        await nodes_ready(stub, 1)
        port = await gateway(stack, process, folder)
        command = [*worker_command(isolates=driver == "oci").argv, "-c", HANDLER]
        yield Side(
            port, "/v1/run/default/{}", partial(deploy, stub, command), partial(delete, stub), partial(ready, stub)
        )


async def deploy(stub: cluster_pb2_grpc.ClusterAsyncStub, command: list[str], name: str, replicas: int) -> None:
    """Apply an app; it may not be up yet."""
    manifest = AppManifest(
        name=name,
        command=command,
        num_gpus=0,
        resources=ResourcesManifest(cpu=0, memory_gib=0.25),  # no limit and no share of CPUs, as Ray has none
        min_concurrency=replicas,
        max_concurrency=replicas,
        max_multiplexing=max(AT_ONCE),
        termination_grace_period=0.1,
    )
    request = cluster_pb2.ApplyAppRequest(id=f"default/{name}", spec=manifest.to_proto(), expected_generation=0)
    await stub.ApplyApp(request, timeout=TIMEOUT_S)


async def delete(stub: cluster_pb2_grpc.ClusterAsyncStub, name: str) -> None:
    """Delete an app and wait until its runners are gone."""
    id_ = f"default/{name}"
    await stub.DeleteApp(cluster_pb2.DeleteAppRequest(id=id_), timeout=TIMEOUT_S)
    async with asyncio.timeout(TIMEOUT_S):
        while (await stub.ListRunners(cluster_pb2.ListRunnersRequest(app=id_))).runners:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def ready(stub: cluster_pb2_grpc.ClusterAsyncStub, name: str, replicas: int) -> None:
    """Wait until so many runners of an app serve."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            reply = await stub.ListRunners(cluster_pb2.ListRunnersRequest(app=f"default/{name}"))
            if sum(1 for view in reply.runners if view.status.ready_at_s) >= replicas:
                return
            await asyncio.sleep(0.05)


async def gateway(stack: AsyncExitStack, process: Process, folder: Path) -> int:
    """Start fal-gateway; its HTTP port."""
    identity, ports = folder / "gateway.pem", folder / "gateway.json"
    issue(process.data, role="serving", name="g-1", out=identity, ttl_s=3600.0, clock=SystemClock())
    argv = [sys.executable, "-m", "fal_gateway.main", "run", "--schedulers", process.address, "--port", "0"]
    argv += ["--identity", str(identity), "--ports-file", str(ports), "--log-level", "warning"]
    log = stack.enter_context((folder / "gateway.log").open("wb"))
    child = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
    )
    stack.push_async_callback(child.wait)
    stack.callback(child.kill)
    async with asyncio.timeout(TIMEOUT_S):
        while not ports.exists():
            assert child.returncode is None, (folder / "gateway.log").read_text()
            await asyncio.sleep(0.05)
    return int(json.loads(ports.read_text())["http"])


# --- theirs -----------------------------------------------------------------------------------------------------------


def ray_python() -> Path:
    """A Python with Ray Serve; made at the first call. Raises SystemExit where it cannot be installed."""
    python = VENV / "bin" / "python"
    if (VENV / "complete").exists():
        return python
    print(f"peer-ray: installing {PACKAGE} into {VENV}", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, timeout=INSTALL_TIMEOUT_S)
        install = [str(python), "-m", "pip", "install", "--quiet", PACKAGE]
        subprocess.run(install, check=True, timeout=INSTALL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"peer-ray: not measured, {PACKAGE} cannot be installed: {error}") from None
    (VENV / "complete").touch()
    return python


@asynccontextmanager
async def theirs(folder: Path, python: Path) -> AsyncIterator[Side]:
    """Ray Serve, and its HTTP proxy."""
    with socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
    with (folder / "ray.log").open("wb") as log:
        child = await asyncio.create_subprocess_exec(
            str(python), str(Path(__file__).with_name("ray_serve_child.py")), str(port), env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        try:
            await line_of(child, "ready", folder)
            yield Side(
                port,
                "/{}",
                lambda name, replicas: command_of(child, f"deploy {name} {replicas}", folder),
                lambda name: command_of(child, f"delete {name}", folder),
                lambda name, replicas: asyncio.sleep(0),  # `deploy` has waited for them
            )
        finally:
            with contextlib.suppress(TimeoutError, ProcessLookupError):
                await asyncio.wait_for(child.communicate(), TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError):
                child.kill()


async def command_of(child: asyncio.subprocess.Process, words: str, folder: Path) -> None:
    """Give a command and wait until it is done."""
    assert child.stdin is not None
    child.stdin.write(f"{words}\n".encode())
    await line_of(child, "done", folder)


async def line_of(child: asyncio.subprocess.Process, word: str, folder: Path) -> None:
    """Wait for a line that is `word`; Ray says other things, too."""
    assert child.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        while (line := (await child.stdout.readline()).decode().strip()) != word:
            assert line or not child.stdout.at_eof(), (folder / "ray.log").read_text()[-2000:]


# --- measuring --------------------------------------------------------------------------------------------------------


async def measure(options: Options) -> dict[str, Paired]:
    """Row → figures, seconds."""
    python = ray_python()
    rows: dict[str, Paired] = {}
    with tempfile.TemporaryDirectory(prefix="pr-") as name:
        folder = Path(name)
        (folder / "a").mkdir()
        (folder / "b").mkdir()
        async with ours(folder / "a") as mine, theirs(folder / "b", python) as other:
            for replicas in REPLICAS:
                await up(mine, other, f"warm{replicas}", replicas)
            rows["cold start"] = await interleave(mine.cold, other.cold, pairs=options.pairs)
            for replicas in REPLICAS:
                for at_once in AT_ONCE:
                    work = (f"warm{replicas}", replicas, at_once, options.seconds_s)
                    paired = await interleave(
                        partial(mine.latency, *work), partial(other.latency, *work), pairs=options.pairs
                    )
                    row = f"latency, {replicas} x {at_once} at once"
                    rows[f"{row}, p50"] = paired
                    key = (replicas, at_once)
                    p99 = [percentile(side.took_s[key], 0.99) for side in (mine, other)]
                    rows[f"{row}, p99"] = Paired([p99[0]], [p99[1]])
    return rows


async def up(mine: Side, other: Side, name: str, replicas: int) -> None:
    """The same app on both, all replicas of it."""
    for side in (mine, other):
        await side.deploy(name, replicas)
        await side.ready(name, replicas)
        await side.answered(name)


async def run(options: Options) -> Result:
    """All rows."""
    rows = await measure(options)
    figures: dict[str, dict[str, Any]] = {row: paired.as_json() for row, paired in rows.items()}
    print_table(
        ("peer-ray, ms", "falctl", "Ray Serve", "ratio"),
        [(row, 1e3 * one["ours"], 1e3 * one["baseline"], one["ratio"]) for row, one in figures.items()],
    )
    met = {row: rows[row].ratio <= RATIO_MAX for row in rows if not row.endswith("p99")}
    cold = figures["cold start"]
    return Result(
        bench="peer-ray",
        ours=1e3 * cold["ours"],
        baseline=1e3 * cold["baseline"],
        ratio=cold["ratio"],
        unit="ms from deploy to first answer",
        runs=len(rows["cold start"].ours),
        must_reach=MUST_REACH,
        reached=all(met.values()),
        extra={"rows": {row: significant(paired.ratio) for row, paired in rows.items()}, "each_reached": met},
    )
