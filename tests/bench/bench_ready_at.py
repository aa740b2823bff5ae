"""`ready-at`: when a runner is ready, predicted at placement, against what happened; and against size ÷ bandwidth.

A real cluster: scheduler, two nodes (agent, proxy, fsd each; process driver) and an HTTP origin, each node and the
origin in a network namespace with a shaped link (tbf, burst 64 kB). A runner's program reads its whole model and is
ready then. A *placement* is one cell of: 5 model sizes × where the weights are (origin: nobody has them; peer: the
other node does; disk: this node, page cache dropped; memory: locked by its cache) × 1 to 3 fetches on the node's line
at once (the others, of models of the same size, begin just before and are not waited for). Cells come in random order;
the first TAUGHT_MAX placements teach and are not counted, each later one is predicted before it teaches.

Last, one size alone is placed FLOOR_RUNS times more from each tier: how far the same placement is from its own median
(`floor`) is what nobody could have predicted here, as other work on the machine swings.

Predicted and actual are those of the event RUNNER_READY: from the placement's decision to the report that it serves.
Anchor, same placements: size ÷ nominal bandwidth, that is the link's rate for origin and peer, for disk and memory the
rate at which this machine read a file of the cache just before. Regret: of every two tiers of one size and count, as if
they were two nodes, what the one that was predicted sooner took more than the other; in seconds.

Takes some 11 minutes; --seconds 0.5 leaves the largest size out (48 placements, 6 minutes). Below that one size and two
counts are measured, which proves no more than that the bench works. `terms`: medians of each part by tier, in ms;
`placements`: tier, MiB, fetches at once, predicted and actual ms, and of each part [predicted, actual].
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Final

from harness import Options, Result, percentile, print_table, significant
from shaped_cluster import Child, child, why_not

from e2e_cluster import Cluster, cluster, until
from e2e_network import network
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import fsd_pb2, state_pb2

MUST_REACH: Final = "median |error| ÷ actual <= 0.15 after 10 placements, p90 <= 0.4, at most half the anchor's"
MIB: Final = 1 << 20
RATE_BYTES_S: Final = 25e6
SIZES: Final = tuple(size * MIB for size in (16, 32, 64, 128, 256))
TIERS: Final = ("origin", "peer", "disk", "memory")
COUNTS: Final = (1, 2, 3)
TAUGHT_MAX: Final = 10
FLOOR_RUNS: Final = 5
FLOOR_SIZE: Final = 64 * MIB
POOL, SUBJECT, HOLDER = "shaped", "n0", "n1"
ORIGIN: Final = "origin"
WAIT_S: Final = 90.0
HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Placement:
    """One cell as it went. Seconds; `parts`: predicted and actual of each part, in ms."""

    size: int
    tier: str
    count: int
    predicted_s: float
    actual_s: float
    anchor_s: float
    predicted_tier: str
    parts: dict[str, tuple[int, int]]

    @property
    def error(self) -> float:
        """Of ours, over what it took."""
        return abs(self.predicted_s - self.actual_s) / self.actual_s

    @property
    def anchor_error(self) -> float:
        """Of size ÷ bandwidth."""
        return abs(self.anchor_s - self.actual_s) / self.actual_s


class Bench:
    """The cluster and what is done with it. Everything waits by polling the scheduler's answers."""

    def __init__(self, made: Cluster, url: str, disk_bytes_s: float) -> None:
        self._cluster = made
        self._url = url
        self._disk_bytes_s = disk_bytes_s
        self._events = 0

    def register(self, name: str) -> None:
        """A model of the origin."""
        self._cluster.call("AddModel", pb.AddModelRequest(id=f"default/{name}", uri=f"{self._url}{name}/"))

    def cell(self, size: int, tier: str, count: int) -> Placement:
        """One placement, with `count` - 1 other fetches on the line."""
        name = f"{'o' if tier == 'origin' else 'p'}{size // MIB}"
        others = [f"b{size // MIB}-{at}" for at in range(1, count)]
        if tier == "disk":
            self._drop_pages()
        if tier == "memory":
            self._stage(name, SUBJECT, tier="memory")
            self._until(lambda: self._on(name, SUBJECT).bytes_memory >= size, f"{name} is in memory")
        for other in others:
            self._stage(other, SUBJECT)
        for other in others:
            self._until(lambda other=other: self._on(other, SUBJECT).artifact_id, f"{other} is on its way")
        facts = self._place(f"serve-{name}", name)
        for other in others:
            self._until(lambda other=other: self._on(other, SUBJECT).ready, f"{other} has come")
            self._unstage(other, SUBJECT)
            self._evict(other, SUBJECT)
        if tier == "memory":
            self._unstage(name, SUBJECT)
        if tier in ("origin", "memory"):
            self._evict(name, SUBJECT)
        nominal = RATE_BYTES_S if tier in ("origin", "peer") else self._disk_bytes_s
        told = {key[:-3]: value.split("/") for key, value in sorted(facts.items()) if "/" in value}
        parts = {part: (int(predicted), int(actual)) for part, (predicted, actual) in told.items()}
        return Placement(
            size, tier, count, int(facts["predicted_ms"]) / 1e3, int(facts["actual_ms"]) / 1e3, size / nominal,
            facts["tier"], parts,
        )  # fmt: skip

    def _place(self, app: str, model: str) -> dict[str, str]:
        """Deploy, wait until it is ready, delete; what the scheduler said of it."""
        command = [sys.executable, str(HERE / "ready_worker_child.py")]
        file = self._cluster.manifest(app, driver="process", command=command, model=f"default/{model}", pools=[POOL])
        done = self._cluster.falctl("app", "apply", "-f", str(file), "--detach")
        assert done.returncode == 0, done.stderr
        runner = self._cluster.wait_ready(app, 1, within_s=WAIT_S)[0]
        facts = self._ready_facts(runner)
        self._cluster.delete(app)
        return facts

    def _ready_facts(self, runner: str) -> dict[str, str]:
        events = self._cluster.ask("events", "events", "--subject", runner)
        return next(dict(event["facts"]) for event in events if event["kind"] == "RUNNER_READY")

    def hold(self, name: str) -> None:
        """The other node has it from now on."""
        self._stage(name, HOLDER)
        self._until(lambda: self._on(name, HOLDER).ready, f"{name} is on {HOLDER}")

    def _stage(self, name: str, node: str, *, tier: str = "disk") -> None:
        self._cluster.call("StageModel", pb.StageModelRequest(id=f"default/{name}", target=f"node/{node}", tier=tier))

    def _unstage(self, name: str, node: str) -> None:
        self._cluster.call("UnstageModel", pb.UnstageModelRequest(id=f"default/{name}", target=f"node/{node}"))

    def _evict(self, name: str, node: str) -> None:
        def gone() -> bool:
            if not self._on(name, node).artifact_id:
                return True
            self._cluster.call("EvictModel", pb.EvictModelRequest(id=f"default/{name}", nodes=[node]))
            return False

        self._until(gone, f"{name} is gone from {node}")

    def _on(self, name: str, node: str) -> Any:
        reply = self._cluster.call("WhereModel", pb.WhereModelRequest(id=f"default/{name}"))
        return next((one.cached for one in reply.nodes if one.node == node), fsd_pb2.CachedArtifact())

    def _drop_pages(self) -> None:
        """The cache's files leave the page cache; what is locked or dirty stays."""
        os.sync()
        for file in (self._cluster.root / SUBJECT).rglob("*"):
            if file.is_file() and file.stat().st_size >= MIB:
                drop(file)

    @staticmethod
    def _until(done: Any, what: str) -> None:
        until(done, what, within_s=WAIT_S)


def drop(file: Path) -> None:
    """A file's pages leave memory."""
    number = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)


def disk_rate(folder: Path) -> float:
    """Bytes per second at which a file that is not in memory is read here: nominal for disk and memory."""
    file = folder / "rate"
    data = os.urandom(64 * MIB)
    rates = []
    for _ in range(3):
        file.write_bytes(data)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        drop(file)
        began_s = time.perf_counter()
        with file.open("rb", buffering=0) as stream:
            while stream.read(4 * MIB):
                pass
        rates.append(len(data) / (time.perf_counter() - began_s))
    file.unlink()
    return statistics.median(rates)


@contextmanager
def running(folder: Path, sizes: tuple[int, ...], loop: asyncio.Runner) -> Iterator[Bench]:
    """Everything up: links, origin, scheduler, nodes; models registered, the holder has its own."""
    names = {f"{kind}{size // MIB}": size for size in sizes for kind in "op"}
    names |= {f"b{size // MIB}-{at}": size for size in sizes for at in (1, 2)}
    with network() as net:
        address = net.attach(ORIGIN, "10.79.0")
        for at, name in enumerate((SUBJECT, HOLDER)):
            net.attach(name, f"10.78.{at}")
        for name in (ORIGIN, SUBJECT, HOLDER):
            net.shape(name, up_bytes_s=RATE_BYTES_S, down_bytes_s=RATE_BYTES_S)
        words = [f"{name}={size}" for name, size in names.items()]
        script = [sys.executable, str(HERE / "ready_origin_child.py"), address, *words]
        origin: Child = loop.run(child(net, ORIGIN, *script))
        try:
            told = loop.run(origin.line())
            credentials = folder / "credentials.toml"
            credentials.touch(mode=0o600)
            credentials.write_text(told["credentials"])
            with cluster(folder, net) as made:
                yield up(made, folder, credentials, told["url"], tuple(names), sizes)
        finally:
            loop.run(origin.end())


def up(
    made: Cluster, folder: Path, credentials: Path, url: str, names: tuple[str, ...], sizes: tuple[int, ...]
) -> Bench:
    """Nodes and models."""
    with (folder / "scheduler.toml").open("r+") as config:
        rest = config.read()
        config.seek(0)
        config.write(f'credentials_file = "{credentials}"\n{rest}')
    made.scheduler.end()
    made.start_scheduler()
    pool = state_pb2.Pool(name=POOL, cloud="metal", region="here", trusted_network=True)
    made.call("ApplyPool", pb.ApplyPoolRequest(pool=pool))
    config_file = folder / "fsd-settings.toml"
    config_file.write_text(f'credentials_file = "{credentials}"\nmemory_bytes_max = {1 << 30}\n')
    for name in (SUBJECT, HOLDER):
        node = made.make_node(name, made.token(pool=POOL), driver="process", namespace=name)
        node.process.argv = [*node.process.argv, "--fsd-config", str(config_file)]
        node.process.start()
        made.wait_node(name, "ready")
    made.call("CordonNode", pb.CordonNodeRequest(node=HOLDER, cordon=True, reason="it only holds"))
    bench = Bench(made, url, disk_rate(folder))
    for name in names:
        bench.register(name)
    for size in sizes:
        bench.hold(f"p{size // MIB}")
    return bench


@dataclass
class Measured:
    """Placements of the cells, then those of the floor."""

    cells: list[Placement]
    again: list[Placement]


def measure(
    folder: Path, sizes: tuple[int, ...], counts: tuple[int, ...], repeats: int, stop: threading.Event
) -> Measured:
    """All cells, in random order but for a peer's, disk's and memory's of one model, which follow each other."""
    cells = [(size, count) for size in sizes for count in counts]
    Random(1).shuffle(cells)
    done = Measured([], [])
    with asyncio.Runner() as loop, running(folder, sizes, loop) as bench:
        for at, (size, count) in enumerate([*cells, *[(FLOOR_SIZE, 1)] * repeats]):
            for tier in TIERS:
                if stop.is_set():
                    return done
                one = bench.cell(size, tier, count)
                (done.cells if at < len(cells) else done.again).append(one)
                what = f"{len(done.cells) + len(done.again):3}. {tier:6} {size // MIB:4} MiB, {count} at once"
                said = f"predicted {one.predicted_s:6.2f} s ({one.predicted_tier}), took {one.actual_s:6.2f} s"
                parts = ", ".join(f"{part} {ours}/{real}" for part, (ours, real) in one.parts.items())
                print(f"  {what}: {said}; {parts}", flush=True)
    return done


async def in_thread(folder: Path, sizes: tuple[int, ...], counts: tuple[int, ...], repeats: int) -> Measured:
    """`measure`; interrupted, it takes everything down before this returns."""
    stop = threading.Event()
    work = asyncio.ensure_future(asyncio.to_thread(measure, folder, sizes, counts, repeats, stop))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        await work
        raise


def regret_s(counted: list[Placement]) -> list[float]:
    """See the module."""
    cells: dict[tuple[int, int], list[Placement]] = {}
    for one in counted:
        cells.setdefault((one.size, one.count), []).append(one)
    return [
        min(pair, key=lambda one: one.predicted_s).actual_s - min(one.actual_s for one in pair)
        for found in cells.values()
        for pair in combinations(found, 2)
    ]


def summary(counted: list[Placement]) -> dict[str, Any]:
    """Median and p90 of both errors, per tier."""
    found: dict[str, Any] = {}
    for tier in TIERS:
        some = [one for one in counted if one.tier == tier]
        ours, anchor = [one.error for one in some], [one.anchor_error for one in some]
        if some:
            found[tier] = {
                "placements": len(some), "median": significant(statistics.median(ours)),
                "p90": significant(percentile(ours, 0.9)), "anchor_median": significant(statistics.median(anchor)),
            }  # fmt: skip
    return found


def floor(again: list[Placement]) -> dict[str, Any]:
    """How far the same placements are from their tier's median, as a share of what each took."""
    off: list[float] = []
    found: dict[str, Any] = {}
    for tier in TIERS:
        took = [one.actual_s for one in again if one.tier == tier]
        if took:
            middle = statistics.median(took)
            shares = [abs(middle - one) / one for one in took]
            off += shares
            found[tier] = {
                "median": significant(statistics.median(shares)), "max": significant(max(shares)),
                "took_s": [significant(one) for one in took],
            }  # fmt: skip
    if off:
        found |= {"median": significant(statistics.median(off)), "p90": significant(percentile(off, 0.9))}
    return found


def terms(counted: list[Placement]) -> dict[str, Any]:
    """Of each part by tier: medians of what was predicted, of what it took, and of the difference, in ms."""
    found: dict[str, Any] = {}
    for tier in TIERS:
        some = [one.parts for one in counted if one.tier == tier]
        for part in sorted({part: None for parts in some for part in parts}):
            pairs = [parts[part] for parts in some if part in parts]
            found.setdefault(tier, {})[part] = {
                "predicted_ms": statistics.median(ours for ours, _ in pairs),
                "actual_ms": statistics.median(real for _, real in pairs),
                "error_ms": statistics.median(abs(ours - real) for ours, real in pairs),
            }
    return found


def listed(some: list[Placement]) -> list[list[Any]]:
    """As they stand in the last line."""
    return [
        [one.tier, one.size // MIB, one.count, round(one.predicted_s * 1e3), round(one.actual_s * 1e3), one.parts]
        for one in some
    ]


async def run(options: Options) -> Result:
    """See the module's docstring."""
    if why := why_not():
        sys.exit(f"ready-at: {why}")
    full = options.seconds_s >= 0.5
    sizes = (SIZES if options.seconds_s >= 1.0 else SIZES[:-1]) if full else SIZES[1:2]
    folder = Path(tempfile.mkdtemp(prefix="ready-at-"))
    try:
        done = await in_thread(folder, sizes, COUNTS if full else COUNTS[:2], FLOOR_RUNS if full else 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counted = done.cells[TAUGHT_MAX:] if full else done.cells[len(done.cells) // 2 :]
    ours, anchor = [one.error for one in counted], [one.anchor_error for one in counted]
    regret, tiers = regret_s(counted), summary(counted)
    rows = [(name, x["placements"], x["median"], x["p90"], x["anchor_median"]) for name, x in tiers.items()]
    print_table(("tier", "placements", "median error", "p90", "anchor's median"), rows)
    median, p90, theirs = statistics.median(ours), percentile(ours, 0.9), statistics.median(anchor)
    return Result(
        bench="ready-at", ours=median, baseline=theirs, ratio=median, unit="|error| ÷ actual", runs=len(counted),
        must_reach=MUST_REACH, reached=median <= 0.15 and p90 <= 0.4 and median <= theirs / 2,
        extra={
            "p90": significant(p90), "anchor_p90": significant(percentile(anchor, 0.9)), "tiers": tiers,
            "floor": floor(done.again), "terms": terms(counted), "placements": listed(done.cells),
            "regret_s": {"mean": significant(statistics.mean(regret)), "max": significant(max(regret))},
        },
    )  # fmt: skip
