"""`fsd-resume`: bytes to be fetched again after kill -9 half way ÷ one sync batch.

A real process brings a 768 MiB artifact in, four pieces at a time, and is killed when about half has arrived. What it
had been given by then, half pieces too, minus what the next process has of it, is fetched again. The last column is
what a power failure at that moment would have cost besides: what had not been synced.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fsd_resume_child import COUNTER, PIECE_BYTES, PIECES, THREADS, artifact
from harness import Options, Paired, Result, print_table

from fal_contract.clock import SystemClock
from fal_fsd.disk.part import SYNC_BATCH_BYTES
from fal_fsd.disk.progress import read_bits
from fal_fsd.disk.store import DiskStore

MUST_REACH = "ratio <= 1"
RATIO_MAX = 1.0
TIMEOUT_S = 300.0
POLL_S = 0.002
ROOT = Path(__file__).resolve().parents[2]


def given(counters: Path) -> int:
    """Bytes that the child has been given."""
    raw = counters.read_bytes()
    return sum(COUNTER.unpack_from(raw, at)[0] for at in range(0, len(raw), COUNTER.size))


def one(folder: Path) -> tuple[int, int]:
    """Bytes to be fetched again, and bytes that were not synced."""
    counters = folder / "counters"
    counters.write_bytes(bytes(THREADS * COUNTER.size))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/proto:{ROOT}/fsd"}
    command = [sys.executable, str(Path(__file__).with_name("fsd_resume_child.py")), str(folder / "s"), str(counters)]
    with subprocess.Popen(command, env=env) as child:
        until_s = time.monotonic() + TIMEOUT_S
        while given(counters) < PIECES * PIECE_BYTES // 2:
            if child.poll() is not None or time.monotonic() > until_s:
                child.kill()
                raise SystemExit("fsd-resume: the child did not get half way")
            time.sleep(POLL_S)
        child.kill()
        child.wait()
    had, made = given(counters), artifact()
    synced = read_bits(folder / "s" / "parts" / made.id, made.id, PIECES)
    unsynced = had - len(synced or ()) * PIECE_BYTES
    store = DiskStore(folder / "s", bytes_max=None, clock=SystemClock())
    part = store.open_part(made, model="bench/m")
    kept = part.bytes_done
    assert made.hashes is not None
    assert all(part.read_digest(piece) == made.hashes[piece] for piece in part.have)
    store.close()
    return had - kept, unsynced


def _run(options: Options) -> Result:
    again, unsynced = [], []
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory(prefix="br-") as name:
            lost, at_risk = one(Path(name))
        again.append(float(lost))
        unsynced.append(at_risk)
    paired = Paired(again, [float(SYNC_BATCH_BYTES)] * len(again))
    worst = max(again) / SYNC_BATCH_BYTES
    print_table(
        ("MiB", "fetched again", "batch", "ratio", "not synced"),
        [
            (f"run {n}", lost / 2**20, SYNC_BATCH_BYTES / 2**20, lost / SYNC_BATCH_BYTES, risk / 2**20)
            for n, (lost, risk) in enumerate(zip(again, unsynced, strict=True))
        ],
    )
    figures = paired.as_json()
    return Result(
        bench="fsd-resume",
        ours=figures["ours"],
        baseline=figures["baseline"],
        ratio=paired.ratio,
        unit="bytes",
        runs=len(again),
        must_reach=MUST_REACH,
        reached=worst <= RATIO_MAX,
        extra={"worst": round(worst, 3), "not_synced_worst": round(max(unsynced) / SYNC_BATCH_BYTES, 3)},
    )


async def run(options: Options) -> Result:
    """Nothing here is asynchronous."""
    return await asyncio.to_thread(_run, options)
