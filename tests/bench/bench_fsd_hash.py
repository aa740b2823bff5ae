"""`fsd-hash`: bytes a second through a PieceWriter to tmpfs ÷ blake3 alone on the same bytes, one thread each.

Ours: 1 MiB blocks from a buffer → `writer.write` (pwrite and BLAKE3) → `finish` (compared, counted, synced in batches).
Baseline: one hasher for each piece over the same blocks. The floor of ours is 1 / (1/hash + 1/pwrite): a copy into
fresh pages besides the hash; the last column shows it. As root the tmpfs is one of our own with huge pages: with 4 KiB
pages the kernel's page allocation (1.2 GB/s of CPU here, against 6.4 with huge ones) would be what is measured. The row
with two threads shows how it scales.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from blake3 import blake3
from harness import Options, Paired, Result, print_table, significant

from fal_contract.artifact import Artifact, ArtifactFile, listing_id
from fal_contract.clock import SystemClock
from fal_fsd.disk.store import DiskStore

MUST_REACH = "ratio >= 0.5"
RATIO_MIN = 0.5
BLOCK_BYTES = 1 << 20
PIECE_BYTES = 16 << 20
PIECES = 16
THREADS = 2
TMPFS = Path("/dev/shm")


def artifact_of(piece: bytes) -> Artifact:
    """All pieces have the same bytes."""
    size = PIECES * PIECE_BYTES
    hasher = sha256()
    for _ in range(PIECES):
        hasher.update(piece)
    files = (ArtifactFile("weights", size, "1", hasher.digest()),)
    return Artifact(
        listing_id("s3://b/m", files), "model", "s3://b/m", PIECE_BYTES, files, (blake3(piece).digest(),) * PIECES
    )


def timed(work: Callable[[int], None], threads: int) -> float:
    """Bytes a second of all pieces, spread over so many threads."""

    def some(first: int) -> None:
        for number in range(first, PIECES, threads):
            work(number)

    workers = [threading.Thread(target=some, args=(n,)) for n in range(threads)]
    begun_s = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return PIECES * PIECE_BYTES / (time.perf_counter() - begun_s)


class Sides:
    """Both, on the same bytes."""

    def __init__(self, folder: Path) -> None:
        self._piece = random.Random(1).randbytes(PIECE_BYTES)
        self._blocks = [memoryview(self._piece)[at : at + BLOCK_BYTES] for at in range(0, PIECE_BYTES, BLOCK_BYTES)]
        self._artifact = artifact_of(self._piece)
        self._folder = folder

    def ours(self, threads: int) -> float:
        """Into a new store; what it holds is removed."""
        root = self._folder / "store"
        store = DiskStore(root, bytes_max=None, reserve_bytes=0, clock=SystemClock())
        try:
            part = store.open_part(self._artifact, model="bench/m")

            def work(piece: int) -> None:
                writer = part.writer(piece, source="bench")
                assert writer is not None
                for block in self._blocks:
                    writer.write(block)
                writer.finish()

            rate = timed(work, threads)
            assert part.complete
            return rate
        finally:
            store.close()
            shutil.rmtree(root)

    def blake3(self, threads: int) -> float:
        """The hash alone."""

        def work(_: int) -> None:
            hasher = blake3()
            for block in self._blocks:
                hasher.update(block)
            hasher.digest()

        return timed(work, threads)

    def pwrite(self, threads: int) -> float:
        """The copy alone."""
        path = self._folder / "plain"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

        def work(piece: int) -> None:
            for number, block in enumerate(self._blocks):
                os.pwrite(fd, block, piece * PIECE_BYTES + number * BLOCK_BYTES)

        try:
            return timed(work, threads)
        finally:
            os.close(fd)
            path.unlink()


@contextmanager
def memory_folder() -> Iterator[tuple[Path, str]]:
    """A folder on tmpfs, and which pages it has."""
    with tempfile.TemporaryDirectory(prefix="bh-", dir=TMPFS) as name:
        options = f"huge=always,size={2 * PIECES * PIECE_BYTES}"
        command = ["mount", "-t", "tmpfs", "-o", options, "falctl-bench", name]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=30).returncode != 0:
            yield Path(name), "4 KiB"
            return
        try:
            yield Path(name), "huge"
        finally:
            subprocess.run(["umount", "-l", name], check=True, timeout=30)


def measure(sides: Sides, pairs: int) -> dict[str, list[float]]:
    """Rates of everything, in turns; one unmeasured round goes first."""
    rates: dict[str, list[float]] = {}
    for round_ in range(pairs + 1):
        for name, side in (("ours", sides.ours), ("blake3", sides.blake3), ("pwrite", sides.pwrite)):
            for threads in (THREADS, 1):
                rate = side(threads)
                if round_:
                    rates.setdefault(f"{name}{threads}", []).append(rate)
    return rates


def _run(options: Options) -> Result:
    with memory_folder() as (folder, pages):
        rates = measure(Sides(folder), options.pairs)
    rows, ratios = [], {}
    for ours, baseline in ((1, 1), (THREADS, THREADS)):
        paired = Paired(rates[f"ours{ours}"], rates[f"blake3{baseline}"])
        hash_s, copy_s = statistics.median(rates[f"blake3{ours}"]), statistics.median(rates[f"pwrite{ours}"])
        floor = 1 / (1 / hash_s + 1 / copy_s)
        figures = paired.as_json()
        ratios[ours, baseline] = paired
        rows.append(
            (f"{ours} writers, {baseline} hashers", figures["ours"] / 1e9, figures["baseline"] / 1e9, copy_s / 1e9,
             paired.ratio, floor / figures["baseline"])
        )  # fmt: skip
    print_table(("GB/s", "ours", "blake3", "pwrite", "ratio", "floor's ratio"), rows)
    paired = ratios[1, 1]
    figures = paired.as_json()
    return Result(
        bench="fsd-hash",
        ours=figures["ours"],
        baseline=figures["baseline"],
        ratio=paired.ratio,
        unit="bytes/s",
        runs=len(paired.ours),
        must_reach=MUST_REACH,
        reached=paired.ratio >= RATIO_MIN,
        extra={
            "pages": pages,
            f"ratio_{THREADS}_threads_each": significant(ratios[THREADS, THREADS].ratio),
        },
    )


async def run(options: Options) -> Result:
    """Nothing here is asynchronous."""
    return await asyncio.to_thread(_run, options)
