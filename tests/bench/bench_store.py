"""`store`: durable placements through our Store ÷ the bare client with the same batches and bytes; and the tail.

A placement is one runner record of 700 bytes under its key. Both sides write the same keys in the same order, closed
loop, one commit at a time. Bare SQLite: the sqlite3 module with our pragmas, table and upsert; BEGIN, executemany,
COMMIT on the caller's thread. Bare etcd: aetcd's own client, `transaction` for batches and `put` for single writes. The
tail: commits of one operation at 100 per second, open loop, ours and bare in turns; both count from when it was due.
"""

from __future__ import annotations

import itertools
import random
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aetcd
from harness import Options, Paired, Result, interleave, open_loop, percentile, print_table, rate, significant

from etcd_server import EtcdServer, why_no_etcd
from fal_contract.limits import COMMIT_OPERATIONS_MAX
from fal_scheduler.store.etcd import EtcdStore
from fal_scheduler.store.interface import Store, Write
from fal_scheduler.store.sqlite import SqliteStore

MUST_REACH = "throughput ratio >= 0.5 (batches of 50 and 1), p99 at 100/s <= 3 x the bare single write's p99"
THROUGHPUT_RATIO_MIN = 0.5
TAIL_RATIO_MAX = 3.0
RECORD_BYTES = 700
RUNNERS = 5_000  # keys are written anew and again, as runners come and go
BATCHES = (50, 1)
OFFERED_PER_S = 100.0
TAIL_RUN_FACTOR = 3.0  # a tail needs more samples: 300 a run

Commit = Callable[[list[Write]], Awaitable[object]]


def batches(size: int, *, phase: str) -> Callable[[], list[Write]]:
    """An endless supply of placements, the same for everyone who asks in one phase of the benchmark.

    No value comes twice, within a phase or between phases: SQLite neither writes nor syncs where a record is set to
    what it was.
    """
    rng = random.Random(1)
    keys = itertools.cycle(f"team/default/runner/default/digits-{rng.getrandbits(40):010x}" for _ in range(RUNNERS))
    body = random.Random(phase).randbytes(RECORD_BYTES - 8)
    count = itertools.count()
    assert size <= COMMIT_OPERATIONS_MAX
    return lambda: [Write(next(keys), next(count).to_bytes(8, "big") + body) for _ in range(size)]


@asynccontextmanager
async def ours(store: Store) -> AsyncIterator[Commit]:
    """Commit through `store`, leading."""
    await store.open()
    try:
        guard = await store.campaign("bench")
        yield lambda writes: store.commit(guard, writes)
    finally:
        await store.close()


@asynccontextmanager
async def bare_sqlite(path: Path) -> AsyncIterator[Commit]:
    """Commit through the sqlite3 module."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE record (key TEXT PRIMARY KEY, value BLOB NOT NULL)")

    async def commit(writes: list[Write]) -> None:
        db.execute("BEGIN IMMEDIATE")
        db.executemany(
            "INSERT INTO record VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            [(write.key, write.value) for write in writes],
        )
        db.execute("COMMIT")

    try:
        yield commit
    finally:
        db.close()


@asynccontextmanager
async def bare_etcd(endpoint: str) -> AsyncIterator[Commit]:
    """Commit through aetcd's client."""
    host, port = endpoint.split(":")
    async with aetcd.Client(host=host, port=int(port)) as client:

        async def commit(writes: list[Write]) -> None:
            if len(writes) == 1:
                await client.put(b"/bare/" + writes[0].key.encode(), writes[0].value)
                return
            puts = [client.transactions.put(b"/bare/" + write.key.encode(), write.value) for write in writes]
            await client.transaction(compare=[], success=puts, failure=[])

        yield commit


async def throughput(commit: Commit, bare: Commit, *, batch: int, options: Options) -> Paired:
    """Placements per second of both, one commit after the other."""

    def one_run(write: Commit) -> Callable[[], Awaitable[float]]:
        supply = batches(batch, phase=f"batch {batch}")

        async def work() -> int:
            await write(supply())
            return batch

        return lambda: rate(work, seconds_s=options.seconds_s)

    return await interleave(one_run(commit), one_run(bare), pairs=options.pairs)


async def tail(commit: Commit, bare: Commit, *, options: Options) -> dict[str, Any]:
    """p50 and p99 in ms of single writes at the offered rate, and the ratios of ours' p99 to both of bare."""
    figures: dict[str, list[list[float]]] = {"ours": [], "bare": []}

    def one_run(name: str, write: Commit) -> Callable[[], Awaitable[float]]:
        supply = batches(1, phase="tail")

        async def run() -> float:
            took = await open_loop(
                lambda: write(supply()), per_s=OFFERED_PER_S, seconds_s=options.seconds_s * TAIL_RUN_FACTOR
            )
            figures[name].append(took)
            return percentile(took, 0.99)

        return run

    p99s = await interleave(one_run("ours", commit), one_run("bare", bare), pairs=options.pairs)
    p50s = Paired(p99s.ours, [percentile(took, 0.5) for took in figures["bare"][1:]])
    pooled = {name: [value for took in runs[1:] for value in took] for name, runs in figures.items()}
    return {
        "p50_ms": significant(percentile(pooled["ours"], 0.5) * 1e3),
        "p99_ms": significant(percentile(pooled["ours"], 0.99) * 1e3),
        "bare_p50_ms": significant(percentile(pooled["bare"], 0.5) * 1e3),
        "bare_p99_ms": significant(percentile(pooled["bare"], 0.99) * 1e3),
        "p99_to_bare_p99": significant(p99s.ratio),
        "p99_to_bare_p50": significant(p50s.ratio),
        "samples": len(pooled["ours"]),
    }


async def measure(commit: Commit, bare: Commit, options: Options) -> dict[str, Any]:
    """All figures of one kind of store."""
    figures: dict[str, Any] = {}
    for batch in BATCHES:
        figures[f"batch_{batch}"] = (await throughput(commit, bare, batch=batch, options=options)).as_json()
    figures["at_100_per_s"] = await tail(commit, bare, options=options)
    return figures


async def run(options: Options) -> Result:
    """Both stores; the top-level figures are those of the worse throughput ratio."""
    stores: dict[str, dict[str, Any]] = {}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-store-")))
        commit = await stack.enter_async_context(ours(SqliteStore(folder / "ours.db")))
        bare = await stack.enter_async_context(bare_sqlite(folder / "bare.db"))
        stores["sqlite"] = await measure(commit, bare, options)
        if why := why_no_etcd():
            print(f"etcd: not measured, {why}")
        else:
            server = stack.enter_context(EtcdServer(folder / "etcd"))
            commit = await stack.enter_async_context(ours(EtcdStore([server.endpoint])))
            bare = await stack.enter_async_context(bare_etcd(server.endpoint))
            stores["etcd"] = await measure(commit, bare, options)
    show(stores)
    return judge(stores, options)


def judge(stores: dict[str, dict[str, Any]], options: Options) -> Result:
    """The worse ratio on top, everything else below; an unmeasured etcd is not reached."""
    rows = [figures[f"batch_{batch}"] for figures in stores.values() for batch in BATCHES]
    worst = min(rows, key=lambda row: row["ratio"])
    tail_worst = max(figures["at_100_per_s"]["p99_to_bare_p99"] for figures in stores.values())
    reached = "etcd" in stores and worst["ratio"] >= THROUGHPUT_RATIO_MIN and tail_worst <= TAIL_RATIO_MAX
    return Result(
        bench="store",
        ours=worst["ours"],
        baseline=worst["baseline"],
        ratio=worst["ratio"],
        unit="placements/s",
        runs=options.pairs,
        must_reach=MUST_REACH,
        reached=reached,
        extra={"p99_ratio": tail_worst, "stores": stores},
    )


def show(stores: dict[str, dict[str, Any]]) -> None:
    """The table for people."""
    rows: list[list[object]] = []
    for name, figures in stores.items():
        for batch in BATCHES:
            row = figures[f"batch_{batch}"]
            spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
            rows.append([f"{name}, {batch} per commit, 1/s", row["ours"], row["baseline"], row["ratio"], spread])
        at = figures["at_100_per_s"]
        rows.append([f"{name}, p99 at 100/s, ms", at["p99_ms"], at["bare_p99_ms"], at["p99_to_bare_p99"], ""])
        rows.append(
            [f"{name}, p50 at 100/s, ms", at["p50_ms"], at["bare_p50_ms"], at["p50_ms"] / at["bare_p50_ms"], ""]
        )
        rows.append([f"{name}, our p99 to bare p50, ms", at["p99_ms"], at["bare_p50_ms"], at["p99_to_bare_p50"], ""])
    print_table(["", "ours", "bare", "ratio", "spread"], rows)
