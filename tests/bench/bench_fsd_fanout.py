"""`fsd-fanout`: one new model to 8 nodes on shaped links; wall time ÷ the bound max(F / B_origin, F / B_node).

Real processes: the scheduler, an HTTP origin, a fal-fsd for each node in a network namespace of its own, every link
shaped by tbf both ways (burst 64 kB). From "all are asked to stage a model that nobody has attested" to "all are
READY": joining the swarm, hashing and attestation are in it. F is 50 s of a link's rate in full runs (95 pieces of
4 MiB) and never less than 20 s; below --seconds 1 it only proves that the bench works.

Floor of this form of job, beside the bound: the last piece leaves the origin at F / B_origin and then doubles its
holders once in c / B_node, ceil(log2 8) · 4 MiB / 8 MB/s = 1.6 s. The origin has twice a node's rate; the row `narrow
origin` gives it one node's rate: then 7/8 of all uplinks must be busy all the time, and there is no bound to reach.

Origin bytes are payload as written by the origin's process, what lay in its socket when a read ended included.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import Options, Result, print_table, significant
from shaped_cluster import Cluster, Job, make_files, shaped_cluster, shaped_links, why_not

MUST_REACH = "equal <= 1.15, slow uplink and masquerade <= 1.3, origin bytes <= 1.02, <= 1.05 with a reader killed"
NODES = 8
RATE_BYTES_S = 8e6
FULL_BYTES = 400_000_000
QUICK_BYTES = 160_000_000


@dataclass(frozen=True)
class Row:
    """A case and what it must reach: time and origin bytes, each as a multiple of its bound."""

    name: str
    time_max: float
    origin_max: float
    origin_rate: float = 2 * RATE_BYTES_S
    slow: str = ""
    masqueraded: tuple[int, ...] = ()
    kill: bool = False


ROWS = (
    Row("equal links", 1.15, 1.02),
    Row("one uplink at a quarter", 1.3, 1.02, slow="n2"),
    Row("one node behind masquerade", 1.3, 1.02, masqueraded=(3,)),
    Row("a reader killed half way", float("inf"), 1.05, kill=True),
    Row("narrow origin", float("inf"), 1.02, origin_rate=RATE_BYTES_S),
)


@dataclass(frozen=True)
class Outcome:
    """Of one row."""

    row: Row
    time: float
    origin: float
    job: Job

    @property
    def reached(self) -> bool:
        return self.time <= self.row.time_max and self.origin <= self.row.origin_max


def killer(cluster: Cluster) -> Callable[[str], None]:
    """Ends a node with -9."""
    return lambda name: os.kill(cluster.fsds[name].pid, signal.SIGKILL)


async def measure(row: Row, folder: Path, files: Path, size: int) -> Outcome:
    """One row, from nothing."""
    with shaped_links(
        NODES, rate_bytes_s=RATE_BYTES_S, origin_bytes_s=row.origin_rate, masqueraded=row.masqueraded
    ) as links:
        links.reshape(row.slow)
        place = folder / "run"
        try:
            async with shaped_cluster(links, place, files) as cluster:
                job = await cluster.job(count_bytes=size, half_way=killer(cluster) if row.kill else None)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    bound_s = size / min(RATE_BYTES_S, row.origin_rate)
    return Outcome(row, job.seconds / bound_s, job.origin_bytes / size, job)


def show(outcomes: list[Outcome]) -> None:
    """For people: the rows, and where every node's bytes came from."""
    rows = [(x.row.name, x.job.seconds, x.time, x.origin, x.job.idle, x.job.ran_s, x.job.waited_s) for x in outcomes]
    head = ("8 nodes, 8 MB/s", "s", "÷ bound", "origin ÷ F", "CPU idle", "ran, s", "waited for a CPU, s")
    print_table(head, rows)
    for one in outcomes:
        told = (f"{name} {a / 1e6:.0f}+{b / 1e6:.0f}" for name, (a, b) in sorted(one.job.nodes.items()))
        print(f"{one.row.name}, MB from origin + peers: {', '.join(told)}")


async def run(options: Options) -> Result:
    """See the module's docstring."""
    if why := why_not():
        sys.exit(f"fsd-fanout: {why}")
    size = FULL_BYTES if options.seconds_s >= 1.0 else QUICK_BYTES
    folder = Path(tempfile.mkdtemp(prefix="fsd-fanout-", dir="/dev/shm"))
    try:
        files = make_files(folder / "files", size)
        outcomes = [await measure(row, folder, files, size) for row in ROWS]
    finally:
        shutil.rmtree(folder)
    show(outcomes)
    equal = outcomes[0]
    rows = {
        x.row.name.replace(" ", "_"): {"time": significant(x.time), "origin": significant(x.origin)} for x in outcomes
    }
    return Result(
        bench="fsd-fanout", ours=equal.job.seconds, baseline=equal.job.seconds / equal.time, ratio=equal.time,
        unit="s", runs=1, must_reach=MUST_REACH, reached=all(x.reached for x in outcomes),
        extra={"rows": rows, "bytes": size, "cpu_idle": significant(min(x.job.idle for x in outcomes))},
    )  # fmt: skip
