"""A driver that is not there: a folder with libraries that are texts, programs that are scripts, and device nodes of
harmless numbers, laid out as an NVIDIA driver is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

VERSION = "550.54.15"
CONTROL = {"nvidiactl": (1, 3), "nvidia-uvm": (1, 3)}  # /dev/null
GPUS = {"nvidia0": (1, 5), "nvidia1": (10, 237)}  # /dev/zero, and one that no container has by default
UUIDS = ("GPU-0a1b2c3d-0000-4000-8000-000000000000", "GPU-0a1b2c3d-0000-4000-8000-000000000001")
LIBRARIES = {
    "libcuda": ("libcuda.so.1", "libcuda.so"),
    "libnvidia-ml": ("libnvidia-ml.so.1",),
    "libnvidia-ptxjitcompiler": ("libnvidia-ptxjitcompiler.so.1",),
    "libnvidia-gpucomp": (),
}


def make_tree(root: Path, *, nodes: bool = True) -> tuple[Path, Path]:
    """The driver below `root`; its folder of libraries and its folder of device nodes."""
    folder = root / "usr/lib/x86_64-linux-gnu"
    folder.mkdir(parents=True)
    for stem, links in LIBRARIES.items():
        (folder / f"{stem}.so.{VERSION}").write_text(f"{stem} {VERSION}\n")
        for link in links:
            (folder / link).symlink_to(f"{stem}.so.{VERSION}")
    (folder / "libnvidia-ml.so.470.1").write_text("of an older driver")
    (folder / "libGLX_nvidia.so.0").write_text("for screens")
    program = root / "usr/bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor node in /dev/nvidia[0-9]*; do echo "GPU: $node"; done\n')
    program.chmod(0o755)
    dev = root / "dev"
    dev.mkdir()
    if nodes:
        for name, (major, minor) in {**CONTROL, **GPUS}.items():
            os.mknod(dev / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
            (dev / name).chmod(0o666)
    for path in (root, *root.rglob("*")):  # the mapped root of a container is somebody else
        if path.is_dir():
            path.chmod(0o755)
    return folder, dev
