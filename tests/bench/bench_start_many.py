"""`start-many`: 50 containers asked for at once, until the last one's first line ÷ 50 bare `runc run`.

Ours: 50 ApplyApp at once, each of one runner (a second runner of one app waits for the first), through scheduler and
agent as in `bench_start`; the clock stops at the latest of conmon's stamps of the first lines. Bare: the same bundle
(its rootfs, mounts, user namespace and limits; a cgroup of its own each), as many at a time as our driver makes at a
time, until the last line. Nothing is prepared.

The floor is the CPU. One bare start costs 32 to 40 ms of it, half in the runtime and half in what becomes the
container; `runc create` costs the same, conmon 4 to 7 ms more, as measured one at a time by the accounts of cgroups.
Each container has nine mounts on the host, which every later runtime copies, reads and drops: with 50 of them a start
costs 6 to 8 ms more. For 50 that is 1.6 to 2.0 s for the bare side and 2.4 s for ours before scheduler (0.2 s), client
(0.1 s) and agent (0.9 to 1.1 s, half of it the kernel's work on files and mounts) have done anything. GOMAXPROCS
and GOGC for the runtime, or a sealed copy of it in memory, change nothing of this.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from bench_start import CGROUP, COMMAND, LINE, bundle_of, wall_s_of, why_not
from cluster_rig import agent, join_token, nodes_ready, running
from harness import Options, Result, interleave, print_table, significant

from fal_contract.clock import SystemClock
from fal_contract.manifest import AppManifest
from fal_contract.manifest_parts import ResourcesManifest
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc
from fal_runtime.oci import cgroups
from fal_runtime.oci.driver import MAKING_PER_CPU

MUST_REACH = "wall ratio <= 1.3"
RATIO_MAX = 1.3
COUNT = 50
MEMORY_GIB = 0.03125
TIMEOUT_S = 120.0


class Ours:
    """Asks for `COUNT` apps of one runner each; they are gone when `run` returns."""

    def __init__(self, stub: cluster_pb2_grpc.ClusterAsyncStub, containers: Path) -> None:
        self._stub, self._containers = stub, containers
        self._clock = SystemClock()
        self._number = 0

    async def run(self) -> float:
        self._number += 1
        seconds = await self.start(f"many{self._number}", COUNT)
        await self.end(f"many{self._number}")
        return seconds

    async def start(self, name: str, count: int) -> float:
        sent_s = self._clock.wall_s()
        await asyncio.gather(*(self._apply(f"{name}-{number}") for number in range(count)))
        stamps: dict[Path, float] = {}
        async with asyncio.timeout(TIMEOUT_S):
            while len(stamps) < count:
                await asyncio.sleep(0.05)
                self._read_stamps(f"default.{name}-*", stamps)
        return max(stamps.values()) - sent_s

    async def _apply(self, name: str) -> None:
        manifest = AppManifest(
            name=name,
            command=COMMAND,
            num_gpus=1,
            min_concurrency=1,
            max_concurrency=1,
            termination_grace_period=0.01,
            resources=ResourcesManifest(cpu=0, memory_gib=MEMORY_GIB),
        )
        request = cluster_pb2.ApplyAppRequest(id=f"default/{name}", spec=manifest.to_proto(), expected_generation=0)
        await self._stub.ApplyApp(request, timeout=TIMEOUT_S)

    def _read_stamps(self, containers: str, stamps: dict[Path, float]) -> None:
        """Those of logs that are new: looking takes the CPU from what is measured."""
        for container in self._containers.glob(containers):
            if container not in stamps and (log := container / "log" / "log").exists() and (text := log.read_text()):
                words = text.splitlines()[0].split(" ", 3)
                assert words[3] == LINE, words
                stamps[container] = wall_s_of(words[0])

    async def end(self, name: str) -> None:
        apps = [f"default/{name}-{number}" for number in range(COUNT)]
        requests = [cluster_pb2.DeleteAppRequest(id=app) for app in apps]
        await asyncio.gather(*(self._stub.DeleteApp(request, timeout=TIMEOUT_S) for request in requests))
        async with asyncio.timeout(TIMEOUT_S):
            while list(self._containers.glob(f"default.{name}-*")):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


class Bare:
    """`runc run`, so many at a time."""

    def __init__(self, bundles: list[Path], root: Path) -> None:
        self._bundles = bundles
        self._runc = ["runc", "--root", str(root)]

    async def run(self) -> float:
        limit = asyncio.Semaphore(MAKING_PER_CPU * (os.cpu_count() or 1))
        processes: list[subprocess.Popen[bytes]] = []

        def first_line(number: int) -> None:
            process = subprocess.Popen(
                [*self._runc, "run", "--bundle", str(self._bundles[number]), f"many{number}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            processes.append(process)
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == f"{LINE}\n".encode(), line

        async def one(number: int) -> None:
            async with limit:
                await asyncio.to_thread(first_line, number)

        begun_s = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(COUNT)))
        took_s = time.perf_counter() - begun_s
        await asyncio.to_thread(self._end, processes)
        return took_s

    def _end(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for number in range(COUNT):
            subprocess.run([*self._runc, "delete", "--force", f"many{number}"], check=True, timeout=TIMEOUT_S)
        for process in processes:
            process.wait(TIMEOUT_S)
            assert process.stdout is not None
            process.stdout.close()


def bundles(like: Path, folder: Path) -> list[Path]:
    """`COUNT` bundles like a running container of ours, each with a cgroup of its own."""
    folder.mkdir()
    made = []
    for number in range(COUNT):
        bundle = bundle_of(like, folder / str(number))
        config = json.loads((bundle / "config.json").read_text())
        config["linux"]["cgroupsPath"] = f"{CGROUP}/many{number}"
        (bundle / "config.json").write_text(json.dumps(config))
        made.append(bundle)
    return made


async def run(options: Options) -> Result:
    """All starts, in turns."""
    if why := why_not():
        raise SystemExit(f"start-many: not measured, it {why}")
    with tempfile.TemporaryDirectory(prefix="bm-") as name:
        folder = Path(name)
        async with running(folder) as (process, stub):
            state = folder / "n"
            flags = ("--driver", "oci", "--sim-gpus", f"{COUNT + 1}xH100-80GB", "--prepared-containers", "0")
            with agent(process, await join_token(stub), state, *flags):
                await nodes_ready(stub, 1)
                ours = Ours(stub, state / "c" / "containers")
                await ours.start("like", 1)
                like = next((state / "c" / "containers").glob("default.like-*"))
                bare = Bare(bundles(like, folder / "b"), folder / "runc")
                try:
                    paired = await interleave(ours.run, bare.run, pairs=options.pairs)
                finally:
                    cgroups.remove(CGROUP)
    figures = paired.as_json()
    row = (f"wall for {COUNT}", figures["ours"], figures["baseline"], paired.ratio)
    print_table(("start-many, s", "ours", "bare runc run", "ratio"), [row])
    return Result(
        bench="start-many",
        ours=figures["ours"],
        baseline=figures["baseline"],
        ratio=paired.ratio,
        unit=f"s from asking for {COUNT} to the last one's first line",
        runs=len(paired.ours),
        must_reach=MUST_REACH,
        reached=paired.ratio <= RATIO_MAX,
        extra={"ratio_max": significant(figures["ratio_max"])},
    )
