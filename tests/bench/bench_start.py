"""`start`: from submit to the first line of the container's output ÷ bare `runc run` of the same bundle.

Ours: an ApplyApp on an open mutual-TLS connection → fal-scheduler (a process; validates, places, commits to SQLite with
synchronous FULL) → fal-agent (a process; admits, journals with fdatasync, assembles the root from idmapped binds) →
conmon → runc create, runc start → the line is in conmon's log. The clock starts as the request is handed to gRPC and
stops at conmon's own nanosecond stamp of the line. Bare: `runc run` with its output in a pipe, on a copy of the
config.json that our driver wrote for a container that still runs (its rootfs, binds, user namespace, seccomp profile
and limits; a cgroup of its own), from before the fork until the line is read.

The floor of a cold start, whatever our code does: the bare side's own work (create and start in one execution of runc,
as we start without it), conmon's start (2 ms), two durable writes (store, journal) and three hops (client → scheduler →
agent). Of the bare side's work a grace period of the kernel (7 to 15 ms) is paid ahead by us (`oci.nursery`).
Prepared: the container waits, made and started, for a message with its command (`oci.prepared`); the floor is the two
durable writes, the hops, a dozen system calls and the shell. What makes the next one ready is not in the figure.
"""

from __future__ import annotations

import asyncio
import datetime
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

from cluster_rig import agent, join_token, nodes_ready, running
from harness import Options, Result, interleave, percentile, print_table, significant

from fal_contract.clock import SystemClock
from fal_contract.ids import path_of
from fal_contract.manifest import AppManifest
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc
from fal_runtime.oci import cgroups

MUST_REACH = "p50 ratio <= 1.5 cold and <= 0.5 prepared, p95 ratio <= 2.5 cold"
RATIO_MAX, P95_RATIO_MAX, PREPARED_RATIO_MAX = 1.5, 2.5, 0.5
STARTS_PER_PAIR = 3  # a start takes tens of milliseconds: take more of them than other benchmarks take runs
LINE = "up"
COMMAND = ["/bin/sh", "-c", f"echo {LINE}; exec sleep 3600"]
CGROUP = "/falctl-bench"
TIMEOUT_S = 30.0
POLL_S = 0.005  # nothing is timed by polling


class Ours:
    """Starts one app after the other through scheduler and agent."""

    def __init__(self, stub: cluster_pb2_grpc.ClusterAsyncStub, state_dir: Path, prepared: int) -> None:
        self._prepared = prepared
        self._pool = state_dir / "c" / "prepared"
        self.phases: dict[str, list[float]] = defaultdict(list)
        self._stub = stub
        self._containers = state_dir / "c" / "containers"
        self._clock = SystemClock()
        self._count = itertools.count()

    async def run(self) -> float:
        """Seconds of one start; the container is gone again when this returns."""
        if self._prepared:
            await self._one_waits()
        app, seconds = await self.start()
        if self._prepared:
            links = [path for path in self._containers.glob(f"{path_of(app)}-*") if path.is_symlink()]
            assert links, "this start did not come from the prepared pool"
        await self._stub.DeleteApp(cluster_pb2.DeleteAppRequest(id=app), timeout=TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S):
            while (await self._stub.ListRunners(cluster_pb2.ListRunnersRequest(app=app))).runners:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        return seconds

    async def start(self) -> tuple[str, float]:
        """The app's id, and seconds to its first line."""
        name = f"start{next(self._count):04d}"
        manifest = AppManifest(
            name=name, command=COMMAND, num_gpus=1, min_concurrency=1, max_concurrency=1, termination_grace_period=0.01
        )
        request = cluster_pb2.ApplyAppRequest(id=f"default/{name}", spec=manifest.to_proto(), expected_generation=0)
        sent_s = self._clock.wall_s()
        await self._stub.ApplyApp(request, timeout=TIMEOUT_S)
        replied_s = self._clock.wall_s()
        line_s = await self._first_line(f"default.{name}-*")
        await self._note(request.id, sent_s, replied_s, line_s)
        return request.id, line_s - sent_s

    async def _one_waits(self) -> None:
        """A prepared container that nobody has."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                used = {path.resolve().name for path in self._containers.iterdir() if path.is_symlink()}
                if any(path.parent.name not in used for path in self._pool.glob("*/ready")):
                    return
                await asyncio.sleep(POLL_S)

    async def _first_line(self, container: str) -> float:
        """When conmon had it, wall clock."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for log in self._containers.glob(f"{container}/log/log"):
                    if text := log.read_text():
                        stamp, _stream, _kind, line = text.splitlines()[0].split(" ", 3)
                        assert line == LINE, text
                        return wall_s_of(stamp)
                await asyncio.sleep(POLL_S)

    async def _note(self, app: str, sent_s: float, replied_s: float, line_s: float) -> None:
        """Where the time went, in order; the phases of a start follow each other."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                view = (await self._stub.ListRunners(cluster_pb2.ListRunnersRequest(app=app))).runners[0]
                if view.status.started_at_s:
                    break
                await asyncio.sleep(POLL_S)
        spent = {phase.name: phase.seconds for phase in view.status.phases}
        started_s = view.status.started_at_s
        self.phases["apply: validate, place, commit, reply"].append(replied_s - sent_s)
        self.phases["hops: reply -> agent journals and drives (in part before the reply)"].append(
            started_s - spent["create"] - spent["stage"] - replied_s
        )
        self.phases["stage: root, conmon, runc create"].append(spent["stage"])
        self.phases["create: models attached"].append(spent["create"])
        self.phases["line: runc start, shell, conmon"].append(line_s - started_s)


class Bare:
    """`runc run` of a bundle, one after the other."""

    def __init__(self, bundle: Path, root: Path) -> None:
        self._bundle = bundle
        self._runc = ["runc", "--root", str(root)]
        self._count = itertools.count()

    async def run(self) -> float:
        """Seconds of one start; the container is gone again when this returns."""
        return await asyncio.to_thread(self._run)

    def _run(self) -> float:
        id = f"bare{next(self._count)}"
        begun_s = time.perf_counter()
        process = subprocess.Popen(
            [*self._runc, "run", "--bundle", str(self._bundle), id],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            took_s = time.perf_counter() - begun_s
            assert line == f"{LINE}\n".encode(), line
            return took_s
        finally:
            subprocess.run([*self._runc, "delete", "--force", id], check=True, timeout=TIMEOUT_S)
            process.wait(TIMEOUT_S)
            process.stdout.close()


def wall_s_of(stamp: str) -> float:
    """conmon's stamp, `2026-01-02T03:04:05.123456789+00:00`; the fraction may have any number of digits."""
    whole, _, rest = stamp.partition(".")
    digits = len(rest) - len(rest.lstrip("0123456789"))
    at = datetime.datetime.fromisoformat(whole + rest[digits:].replace("Z", "+00:00"))
    return at.timestamp() + float(f"0.{rest[:digits]}")


def bundle_of(container: Path, place: Path) -> Path:
    """A bundle in `place` like the one of our running container, with a cgroup of its own."""
    config = json.loads((container / "bundle" / "config.json").read_text())
    config["linux"]["cgroupsPath"] = f"{CGROUP}/bare"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return place


def why_not() -> str:
    """Why this machine cannot do it; empty: it can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [program for program in ("runc", "conmon") if shutil.which(program) is None]
    return f"needs {' and '.join(missing)}" if missing else ""


@asynccontextmanager
async def sides(folder: Path, prepared: int) -> AsyncIterator[tuple[Ours, Bare]]:
    """Both sides, ready to start containers."""
    folder.mkdir()
    async with running(folder) as (process, stub):
        state = folder / "n"
        flags = ("--driver", "oci", "--sim-gpus", "2xH100-80GB", "--prepared-containers", str(prepared))
        with agent(process, await join_token(stub), state, *flags):
            await nodes_ready(stub, 1)
            ours = Ours(stub, state, prepared)
            app, _ = await ours.start()  # its rootfs and mounts serve the bare side while it runs
            container = next((state / "c" / "containers").glob(f"{path_of(app)}-*"))
            try:
                yield ours, Bare(bundle_of(container.resolve(), folder / "bundle"), folder / "runc")
            finally:
                cgroups.remove(CGROUP)


async def run(options: Options) -> Result:
    """All starts, in turns."""
    if why := why_not():
        raise SystemExit(f"start: not measured, it {why}")
    with tempfile.TemporaryDirectory(prefix="bs-") as name:
        async with sides(Path(name) / "a", 0) as (ours, bare):
            paired = await interleave(ours.run, bare.run, pairs=STARTS_PER_PAIR * options.pairs)
        async with sides(Path(name) / "b", 1) as (pooled, bare):
            ready = await interleave(pooled.run, bare.run, pairs=STARTS_PER_PAIR * options.pairs)
    phases = {name: percentile(values[2:], 0.5) for name, values in ours.phases.items()}
    p95_s, bare_p95_s = percentile(paired.ours, 0.95), percentile(paired.baseline, 0.95)
    figures, ready_figures = paired.as_json(), ready.as_json()
    ready_p95_s, ready_bare_p95_s = percentile(ready.ours, 0.95), percentile(ready.baseline, 0.95)
    print_table(
        ("start, ms", "ours", "bare runc run", "ratio"),
        [
            ("cold p50", 1e3 * figures["ours"], 1e3 * figures["baseline"], paired.ratio),
            ("cold p95", 1e3 * p95_s, 1e3 * bare_p95_s, p95_s / bare_p95_s),
            *((f"  {name}", 1e3 * seconds, "", "") for name, seconds in phases.items()),
            ("prepared p50", 1e3 * ready_figures["ours"], 1e3 * ready_figures["baseline"], ready.ratio),
            ("prepared p95", 1e3 * ready_p95_s, 1e3 * ready_bare_p95_s, ready_p95_s / ready_bare_p95_s),
            *((f"  {name}", 1e3 * percentile(values[2:], 0.5), "", "") for name, values in pooled.phases.items()),
        ],
    )
    p95_ratio = p95_s / bare_p95_s
    return Result(
        bench="start",
        ours=1e3 * figures["ours"],
        baseline=1e3 * figures["baseline"],
        ratio=paired.ratio,
        unit="ms from submit to first line",
        runs=len(paired.ours),
        must_reach=MUST_REACH,
        reached=paired.ratio <= RATIO_MAX and p95_ratio <= P95_RATIO_MAX and ready.ratio <= PREPARED_RATIO_MAX,
        extra={
            "p95": significant(1e3 * p95_s),
            "baseline_p95": significant(1e3 * bare_p95_s),
            "p95_ratio": significant(p95_ratio),
            "phases_ms": {name.partition(":")[0]: significant(1e3 * s, 3) for name, s in phases.items()},
            "prepared": significant(1e3 * ready_figures["ours"]),
            "prepared_baseline": significant(1e3 * ready_figures["baseline"]),
            "prepared_ratio": significant(ready.ratio),
            "prepared_p95_ratio": significant(ready_p95_s / ready_bare_p95_s),
        },
    )
