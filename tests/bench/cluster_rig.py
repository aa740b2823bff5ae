"""A cluster of real processes for benchmarks: fal-scheduler on SQLite and fal-agents that joined it over mutual TLS."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from fal_contract.http_client import READ_BYTES, HttpConnection
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc, state_pb2
from scheduler_process import Process, cluster, environment, init, scheduler

START_TIMEOUT_S = 60.0
POOL = "bench"
PICTURE_TIMEOUT_S = 180.0
ASK_EVERY_S = 0.01
PNG = b"\x89PNG"


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[Process, cluster_pb2_grpc.ClusterAsyncStub]]:
    """A scheduler with one pool, and an admin's open connection to it."""
    data = folder / "s"
    init(data)
    with scheduler(data, "--log-level", "warning") as process:
        async with cluster(process) as stub:
            pool = state_pb2.Pool(name=POOL, cloud="metal")
            await stub.ApplyPool(cluster_pb2.ApplyPoolRequest(pool=pool), timeout=START_TIMEOUT_S)
            yield process, stub


@contextmanager
def agent(process: Process, token: str, state: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A fal-agent that joins with `token`; at the end its containers, proxy and fsd are ended too."""
    state.mkdir()
    (state / "token").write_text(token)
    argv = [sys.executable, "-m", "fal_agent.main", "run", "--state-dir", str(state), "--node-name", state.name]
    argv += ["--schedulers", process.address, "--join-url", f"https://127.0.0.1:{process.ports['join']}"]
    argv += ["--join-token-file", str(state / "token"), "--proxy-host", "127.0.0.1", "--log-level", "warning", *flags]
    with state.with_suffix(".log").open("wb") as log:
        popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment())
    try:
        yield popen
    finally:
        popen.kill()
        popen.wait(START_TIMEOUT_S)
        purge = [sys.executable, "-m", "fal_agent.main", "purge", "--state-dir", str(state)]
        subprocess.run(purge, env=environment(), check=True, capture_output=True, timeout=START_TIMEOUT_S)


async def join_token(stub: cluster_pb2_grpc.ClusterAsyncStub, *, uses: int = 1) -> str:
    """A token for so many machines."""
    request = cluster_pb2.CreateTokenRequest(pool=POOL, ttl_s=600, uses=uses)
    return (await stub.CreateToken(request, timeout=START_TIMEOUT_S)).token


async def nodes_ready(stub: cluster_pb2_grpc.ClusterAsyncStub, count: int) -> None:
    """Wait until so many nodes are ready."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while (await stub.GetStatus(cluster_pb2.GetStatusRequest())).nodes["ready"] < count:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def picture(port: int, name: str) -> None:
    """Ask the gateway at `port` for a picture of app `name` until there is one; TimeoutError."""
    async with asyncio.timeout(PICTURE_TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=READ_BYTES)
        connection = HttpConnection(reader, writer)
        try:
            headers = [("host", "127.0.0.1"), ("content-type", "application/json"), ("accept", "image/png")]
            body = json.dumps({"prompt": "a handwritten seven", "seed": 1}).encode()
            while True:
                answer = await connection.request("POST", f"/v1/run/default/{name}", headers, body)
                content = await answer.read(1 << 22)
                if answer.status not in (404, 503):  # no such app yet, nobody ready yet
                    break
                await asyncio.sleep(ASK_EVERY_S)
        finally:
            connection.abort()
    assert answer.status == 200, content
    assert content.startswith(PNG)
