"""`fsd-inflight`: present pieces of an unfinished file through the mount ÷ the same bytes of the backing file.

`dd bs=1M` to /dev/null, warm page cache, server in a process of its own. Floor: the backing file costs one copy per
byte (page cache → reader); ours two (page cache → server, server → reader) and, for each MiB, two switches between
reader and server and about 30 µs of Python. Rows without a bound: 128 KiB reads (as cat does), four readers at once.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fsd_parts import artifact_of_folder
from harness import Options, Paired, Result, interleave, print_table

from fal_fsd.mount.probe import YES, probe

MUST_REACH = "ratio >= 0.15"
RATIO_MIN = 0.15
FILE_BYTES = 512 << 20
TIMEOUT_S = 120.0
NAME = "model.safetensors"


@contextmanager
def serving(folder: Path) -> Iterator[Path]:
    """The file through a mount."""
    child = Path(__file__).with_name("fsd_inflight_child.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(child), str(folder / "mounts"), str(folder / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield Path(process.stdout.readline().strip()) / NAME
        finally:
            process.communicate("\n", timeout=TIMEOUT_S)


def reader(path: Path, *, block: str, bytes_each: int, at_once: int) -> Callable[[], Awaitable[float]]:
    """Bytes per second of `at_once` dd together; only what is present is read."""
    argv = ["dd", f"if={path}", "of=/dev/null", f"bs={block}", f"count={bytes_each}", "iflag=count_bytes"]

    async def run() -> float:
        begun_s = time.perf_counter()
        made = [await asyncio.create_subprocess_exec(*argv, stderr=subprocess.DEVNULL) for _ in range(at_once)]
        async with asyncio.timeout(TIMEOUT_S):
            codes = [await process.wait() for process in made]
        assert not any(codes), codes
        return at_once * bytes_each / (time.perf_counter() - begun_s)

    return run


async def run(options: Options) -> Result:
    """All rows, interleaved."""
    with tempfile.TemporaryDirectory(prefix="fsd-inflight-") as name:
        folder = Path(name)
        if (why := probe(folder)["fuse"]) != YES:
            raise SystemExit(f"fsd-inflight: not measured: {why}")
        (folder / "data").mkdir()
        backing = folder / "data" / NAME
        block = random.Random(1).randbytes(1 << 20)
        with backing.open("wb") as file:
            for _ in range(FILE_BYTES >> 20):
                file.write(block)
        layout = artifact_of_folder(folder / "data").layout
        present = layout.span(layout.count - 1).offset
        rows: dict[str, Paired] = {}
        with serving(folder) as mounted:
            for label, size, at_once in (("dd bs=1M", "1M", 1), ("dd bs=128k", "128k", 1), ("4 x dd bs=1M", "1M", 4)):
                each = present if options.seconds_s >= 1 else present // 8
                sides = [reader(x, block=size, bytes_each=each, at_once=at_once) for x in (mounted, backing)]
                rows[label] = await interleave(*sides, pairs=options.pairs)
    figures = {label: paired.as_json() for label, paired in rows.items()}
    print_table(
        ("in flight, MiB/s", "mount", "backing file", "ratio"),
        [(label, x["ours"] / 2**20, x["baseline"] / 2**20, x["ratio"]) for label, x in figures.items()],
    )
    main, *others = figures.items()
    paired = rows[main[0]]
    return Result(
        bench="fsd-inflight",
        ours=main[1]["ours"],
        baseline=main[1]["baseline"],
        ratio=paired.ratio,
        unit="bytes/s",
        runs=len(paired.ours),
        must_reach=MUST_REACH,
        reached=paired.ratio >= RATIO_MIN,
        extra={"ratio_min": main[1]["ratio_min"], "rows": {label: x["ratio"] for label, x in others}},
    )
