"""`weights-list`: what 100,000 LoRAs cost the scheduler, and how long an operator waits for their list.

A store with 100,000 attested LoRAs is written directly, as registrations would have left it, and a scheduler process is
started on it; the same without LoRAs goes before. Memory is the growth of resident memory between the two, each after
one list, with what loading left behind. The list is asked over mutual TLS in brief pages of 2,000, as `falctl weights
list --limit 0` does; `falctl_s` is that command, with its start and its printing. `page_ms` is the longest page: while
it is made, the scheduler's loop does nothing else.

The floor of the memory: 560 bytes of text in a record (id, two digests, URI); of the list: 7 MB that cross a socket.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from harness import Options, Result, print_table, significant

from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc
from fal_scheduler.codec import encode
from fal_scheduler.core.records import Model, ModelState, key_of
from fal_scheduler.store.interface import Write
from fal_scheduler.store.sqlite import SqliteStore
from falctl.profile import Profile, write_profile
from scheduler_process import Process, cluster, environment, init, scheduler

LORAS = 100_000
PAGE = 2000
WRITES = 100
TIMEOUT_S = 120.0
BOUNDS = {"list_s": 1.0, "memory_mib": 200.0, "each_kb": 2.0}
MUST_REACH = ", ".join(f"{name} <= {bound:g}" for name, bound in BOUNDS.items())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lora(number: int) -> Model:
    """One of them."""
    uri = f"s3://loras/style/lora-{number:06d}/"
    return Model(
        id=f"default/lora-{number:06d}",
        kind="lora",
        uri=uri,
        state=ModelState.ATTESTED,
        manifest_digest=_digest(f"manifest {number}"),
        bytes=18_000_000 + number,
        files=2,
        created_at_s=1_700_000_000.0 + number,
        artifact_id=_digest(f"artifact {number}"),
        resolved_uri=uri,
        attestation="version",
        attested_by="n-4f7a20c1d9e8",
    )


async def fill(data: Path) -> None:
    """Write the LoRAs into a scheduler's store, and a file for each manifest (its content is not read here)."""
    store = SqliteStore(data / "store.db")
    await store.open()
    guard = await store.campaign("bench")
    blobs = data / "blobs"
    blobs.mkdir(exist_ok=True)
    for first in range(0, LORAS, WRITES):
        models = [lora(number) for number in range(first, min(first + WRITES, LORAS))]
        await store.commit(guard, [Write(key_of(model), encode(model)) for model in models])
        for model in models:
            (blobs / model.artifact_id).touch()
    await store.resign(guard)
    await store.close()


async def list_all(stub: cluster_pb2_grpc.ClusterAsyncStub) -> tuple[float, float, int]:
    """Seconds for all pages, seconds of the longest, and how many models came."""
    begun_s, worst_s, after, count = time.perf_counter(), 0.0, "", 0
    while True:
        page_s = time.perf_counter()
        request = cluster_pb2.ListModelsRequest(team="default", kind="lora", limit=PAGE, after=after, brief=True)
        reply = await stub.ListModels(request, timeout=TIMEOUT_S)
        worst_s = max(worst_s, time.perf_counter() - page_s)
        count += len(reply.models)
        after = reply.next
        if not after:
            return time.perf_counter() - begun_s, worst_s, count


@dataclass(frozen=True)
class Measured:
    """Seconds of each list, of the longest page, CPU seconds of the scheduler for a list, resident MiB afterwards."""

    lists: list[float]
    page_s: float
    cpu_s: float
    rss_mib: float


async def measured(process: Process, runs: int, expected: int) -> Measured:
    """Ask so many times."""
    usage = psutil.Process(process.popen.pid)
    async with cluster(process) as stub:
        lists, worst_s = [], 0.0
        await list_all(stub)  # the first one fills caches and buffers
        before = usage.cpu_times()
        for _ in range(runs):
            took_s, page_s, count = await list_all(stub)
            assert count == expected, count
            lists.append(took_s)
            worst_s = max(worst_s, page_s)
        after = usage.cpu_times()
    cpu_s = (after.user + after.system - before.user - before.system) / runs
    return Measured(lists, worst_s, cpu_s, usage.memory_info().rss / 2**20)


def falctl_seconds(process: Process, folder: Path) -> float:
    """`falctl weights list --limit 0`, from its start to its end."""
    env = {**environment(), "XDG_CONFIG_HOME": str(folder)}
    write_profile("bench", Profile("bench", (process.address,), process.data / "operator", "default"), env)
    begun_s = time.perf_counter()
    argv = [sys.executable, "-m", "falctl.main", "--profile", "bench", "weights", "list", "--limit", "0"]
    done = subprocess.run(argv, env=env, capture_output=True, check=True, timeout=TIMEOUT_S)
    assert done.stdout.count(b"\n") == LORAS + 1
    return time.perf_counter() - begun_s


async def run(options: Options) -> Result:
    """An empty scheduler, then one with all LoRAs."""
    with tempfile.TemporaryDirectory(prefix="bw-") as name:
        folder = Path(name)
        data = folder / "s"
        init(data)
        with scheduler(data, "--log-level", "error") as process:
            empty = await measured(process, 1, 0)
            process.end()
        await fill(data)
        begun_s = time.perf_counter()
        with scheduler(data, "--log-level", "error") as process:
            load_s = time.perf_counter() - begun_s
            full = await measured(process, options.pairs, LORAS)
            falctl_s = await asyncio.to_thread(falctl_seconds, process, folder)
    grown_mib = full.rss_mib - empty.rss_mib
    figures = {
        "list_s": statistics.median(full.lists),
        "memory_mib": grown_mib,
        "each_kb": grown_mib * 2**20 / 1000 / LORAS,
    }
    also = {
        "list_cpu_s": full.cpu_s,
        "page_ms": 1000 * full.page_s,
        "falctl_s": falctl_s,
        "start_s": load_s,
        "empty_mib": empty.rss_mib,
    }
    reached = {name: figures[name] <= bound for name, bound in BOUNDS.items()}
    rows = [(name, figures[name], bound, "" if reached[name] else "missed") for name, bound in BOUNDS.items()]
    print_table(("weights-list", "measured", "bound", ""), [*rows, *((x, y, "", "") for x, y in also.items())])
    return Result(
        bench="weights-list",
        ours=figures["list_s"],
        baseline=BOUNDS["list_s"],
        ratio=max(figures[name] / bound for name, bound in BOUNDS.items()),
        unit="seconds for 100,000 LoRAs, its bound; ratio: the worst of all figures / bounds",
        runs=len(full.lists),
        must_reach=MUST_REACH,
        reached=all(reached.values()),
        extra={"figures": {name: significant(value) for name, value in (figures | also).items()}},
    )
