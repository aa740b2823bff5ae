"""`fsd-footprint`: resident memory and event loop of fal-fsd while a model arrives from an origin and from a peer.

Two real fal-fsd processes bring one 4 GiB file that nobody has seen before, at the same time: each reads its leases
from an https origin, takes the rest from the other, gives it what it has, checks, writes to the disk store and hashes
(SHA-256 and BLAKE3) for the attestation. `peak_mib` is VmHWM of a process from its start to its end.

While the file is brought, a timer is due every 5 ms in each loop, and in that of a process which does nothing else: its
`late_*` is what this machine does to anybody. In each: `own_*` is the lateness less the time for which the loop's
thread wanted a processor and got none (/proc/thread-self/schedstat): work, pages, waiting for the interpreter's lock,
whose holder may be without a processor itself; `ran_*` is what the loop itself did between two timers. All run before
what else this machine does (nice), where that is allowed. The bound on stalls counts `own_p999_ms` and `ran_max_ms`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from harness import Options, Result, print_table, significant

from fake_cache_scheduler import FakeCacheScheduler
from fal_contract.artifact import Artifact, listing_id, to_manifest
from fal_contract.pieces import piece_bytes_of
from fal_contract.v1 import agent_pb2
from fal_fsd.client import CacheClient
from fal_fsd.origin import Credentials, list_origin
from origin_servers import make_authority
from scheduler_process import environment

SIZE_BYTES = 4 << 30
BOUNDS = {"peak_mib": 150, "own_p999_ms": 50, "ran_max_ms": 50}
MUST_REACH = ", ".join(f"{name} <= {bound}" for name, bound in BOUNDS.items())
TIMEOUT_S = 600.0
NODES = ("n1", "n2")
CHILD = Path(__file__).with_name("fsd_footprint_child.py")


def start(*arguments: object, **pipes: Any) -> subprocess.Popen[bytes]:
    """A child."""
    return subprocess.Popen([sys.executable, str(CHILD), *map(str, arguments)], env=environment(), **pipes)


def ended(process: subprocess.Popen[bytes], file: Path) -> dict[str, Any]:
    """What a watched child wrote."""
    process.send_signal(signal.SIGTERM)
    process.wait(TIMEOUT_S)
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


@contextlib.contextmanager
def origin(folder: Path, size: int, sent: list[int]):  # type: ignore[no-untyped-def]
    """Yields (URL of the file, credentials file); what it gave goes to `sent`."""
    authority = make_authority(folder)
    credentials = folder / "credentials.toml"
    credentials.write_text(f'[tls]\nca_file = "{authority.ca_file}"\n')
    credentials.chmod(0o600)
    process = start("origin", size, *authority.tls, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process.stdout.readline().decode().strip() + "weights.safetensors", credentials
    finally:
        process.stdin.close()
        sent.append(int(process.stdout.readline()))
        process.stdout.close()
        process.wait(TIMEOUT_S)


@asynccontextmanager
async def caches(folder: Path, scheduler: FakeCacheScheduler, credentials: Path) -> AsyncIterator[Any]:
    """Yields the clients; then `figures` of each process and of the idle one."""
    processes: dict[str, subprocess.Popen[bytes]] = {"idle": start("control", folder / "idle.json")}
    clients: list[CacheClient] = []
    figures: dict[str, dict[str, Any]] = {}
    try:
        for name in NODES:
            socket = folder / f"{name}.sock"
            processes[name] = start(
                "fsd", folder / f"{name}.json", "run", "--state-dir", folder / name, "--socket", socket,
                "--bulk-host", "127.0.0.1", "--schedulers", scheduler.address, "--identity", scheduler.identity(name),
                "--credentials-file", credentials, "--mount", "off", "--log-level", "error",
            )  # fmt: skip
            clients.append(CacheClient(socket))
        await scheduler.until(lambda: set(NODES) <= set(scheduler.nodes))
        for client in clients:
            await client.status()
        for process in processes.values():
            process.send_signal(signal.SIGUSR1)
        yield clients, figures
        for name, process in processes.items():
            figures[name] = await asyncio.to_thread(ended, process, folder / f"{name}.json")
    finally:
        for client in clients:
            await client.close()
        for process in processes.values():
            process.kill()
            process.wait()


async def listed(url: str, credentials: Path) -> Artifact:
    """As `falctl weights add` registers it: nobody knows a digest."""
    found = await list_origin(url, credentials=Credentials.load(credentials, {}))
    total = sum(file.size_bytes for file in found.files)
    size = piece_bytes_of("model", total)
    return Artifact(listing_id(found.uri, found.files), "model", found.uri, size, tuple(found.files))


async def once(folder: Path, size: int) -> dict[str, dict[str, Any]]:
    """One run; figures by process, and of the transfer."""
    scheduler = FakeCacheScheduler(folder)
    await scheduler.start()
    sent: list[int] = []
    try:
        with origin(folder, size, sent) as (url, credentials):
            known = scheduler.registered(await listed(url, credentials))
            async with caches(folder, scheduler, credentials) as (clients, figures):
                message = agent_pb2.Artifact(
                    model="default/bench", kind="model", uri=known.uri, artifact_id=known.id, bytes=known.bytes_total,
                    manifest=to_manifest(known),
                )  # fmt: skip
                begun_s = time.perf_counter()
                async with asyncio.timeout(TIMEOUT_S):
                    await asyncio.gather(*(client.stage(message, "bench") for client in clients))
                wall_s = round(time.perf_counter() - begun_s, 2)
        figures["transfer"] = {"wall_s": wall_s, "origin_bytes_over_file": significant(sent[0] / size)}
    finally:
        await scheduler.stop()
    return figures


async def run(options: Options) -> Result:
    """One transfer; a shorter `--seconds` takes a smaller file."""
    size = SIZE_BYTES if options.seconds_s >= 1.0 else max(int(SIZE_BYTES * options.seconds_s), 64 << 20)
    folder = Path(tempfile.mkdtemp(prefix="bf-"))
    try:
        figures = await once(folder, size)
    finally:
        shutil.rmtree(folder)
    transfer = figures.pop("transfer")
    columns = [name for name in figures["idle"] if not name.startswith("worst")]
    print_table(
        (f"{size >> 20} MiB in {transfer['wall_s']} s", *figures),
        [(name, *(figures[process][name] for process in figures)) for name in columns],
    )
    worst = {name: max(figures[node][name] for node in NODES) for name in BOUNDS}
    return Result(
        bench="fsd-footprint", ours=worst["peak_mib"], baseline=BOUNDS["peak_mib"],
        ratio=max(worst[name] / bound for name, bound in BOUNDS.items()),
        unit="MiB resident at the peak, its bound; ratio: the worst of all figures / bounds", runs=1,
        must_reach=MUST_REACH, reached=all(worst[name] <= bound for name, bound in BOUNDS.items()),
        extra={"file_bytes": size, **transfer, **figures},
    )  # fmt: skip
