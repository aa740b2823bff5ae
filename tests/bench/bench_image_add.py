"""`image-add`: a registry's image becomes one file system image ÷ `skopeo copy` and `umoci unpack` of the same image.

The image: a userland, Python and CPU torch, about 1 GB, in gzip layers, in a real `docker-registry` on loopback. Ours:
all that a node's pack task does, `python -m fal_runtime.images pack` as a process: resolve, fetch by digest, unpack,
look at every file, make EROFS, write the facts, remove what was made on the way. The baseline keeps its layers and
files: they are removed between the runs, outside of the clock.

The floor of ours is the baseline's work (layers written once and read once, inflated, files written once) plus the
packed file: read the files from the page cache, write them once more. `umoci unpack` also hashes every file again for a
list that nobody here reads; we do without.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from harness import Options, Paired, Result, print_table, significant

from image_rig import TAG, ImageRegistry, torch_layout, why_no_packing, why_no_registry

MUST_REACH = "ratio <= 1.5"
RATIO_MAX = 1.5
PAIRS_MAX = 3  # a pair takes most of a minute
TIMEOUT_S = 900.0
NAME = "team/torch:1"


async def run(options: Options) -> Result:
    """Interleaved; each side starts from nothing."""
    if why := why_no_packing() or why_no_registry():
        raise RuntimeError(why)
    return await asyncio.to_thread(_measured, options)


def _measured(options: Options) -> Result:
    steps: dict[str, list[float]] = defaultdict(list)
    ours: list[float] = []
    baseline: list[float] = []
    facts: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="falctl-bench-") as name:
        folder = Path(name)
        layout = torch_layout(folder / "image")
        with ImageRegistry(folder / "registry") as registry:
            registry.push(layout, NAME)
            source = registry.source(NAME)
            for _ in range(min(options.pairs, PAIRS_MAX)):
                seconds, facts = _ours(source, folder / "ours", steps)
                ours.append(seconds)
                baseline.append(_bare(source, folder / "bare", steps))
    paired = Paired(ours, baseline)
    print_table(["step", "median s"], [[step, f"{sorted(took)[len(took) // 2]:.2f}"] for step, took in steps.items()])
    return Result(
        bench="image-add",
        **{key: paired.as_json()[key] for key in ("ours", "baseline", "ratio")},
        unit="s",
        runs=len(ours),
        must_reach=MUST_REACH,
        reached=paired.ratio <= RATIO_MAX,
        extra={
            "steps_s": {step: significant(sorted(took)[len(took) // 2], 3) for step, took in steps.items()},
            "layer_bytes": facts["layer_bytes"],
            "image_bytes": facts["bytes"],
        },
    )


def _ours(source: str, folder: Path, steps: dict[str, list[float]]) -> tuple[float, dict[str, object]]:
    began_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fal_runtime.images", "pack", source, "--output", str(folder)],
        check=True, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    took_s = time.perf_counter() - began_s
    facts = json.loads(done.stdout.splitlines()[-1])
    for step, seconds in facts["seconds"].items():
        steps[f"ours: {step}"].append(seconds)
    steps["ours: all"].append(took_s)
    shutil.rmtree(folder)
    return took_s, facts


def _bare(source: str, folder: Path, steps: dict[str, list[float]]) -> float:
    folder.mkdir()
    pulled = folder / "oci"
    commands = {
        "baseline: skopeo copy": [
            "skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", source, f"oci:{pulled}:{TAG}",
        ],
        "baseline: umoci unpack": ["umoci", "unpack", "--image", f"{pulled}:{TAG}", str(folder / "bundle")],
    }  # fmt: skip
    took_s = 0.0
    for step, argv in commands.items():
        began_s = time.perf_counter()
        subprocess.run(argv, check=True, capture_output=True, timeout=TIMEOUT_S)
        steps[step].append(time.perf_counter() - began_s)
        took_s += steps[step][-1]
    shutil.rmtree(folder)
    return took_s
