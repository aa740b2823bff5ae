"""Looks for an NVIDIA driver's files below a root, and writes the node's own CDI file.

Libraries are found in the folders of the dynamic linker and where drivers are known to be put; only files of the kernel
driver's own version count, so that a compatibility package or what an upgrade left behind is not taken for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from fal_runtime.cdi.nvidia import CONTROL_NODES, LIBRARIES, PROGRAMS, Driver, Gpu, Library, specification

FILE_NAME: Final = "falctl-nvidia.json"
_FOLDERS: Final = (
    *("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64"),
    *("usr/local/nvidia/lib64", "usr/local/nvidia/lib", "opt/nvidia/lib64", "run/opengl-driver/lib"),
    *("usr/lib/x86_64-linux-gnu/nvidia/current", "home/kubernetes/bin/nvidia/lib64"),
)
_PROGRAM_FOLDERS: Final = (
    *("usr/bin", "usr/local/bin", "usr/local/nvidia/bin", "opt/nvidia/bin", "home/kubernetes/bin/nvidia/bin"),
)
_NAME: Final = re.compile(r"(?P<stem>lib[A-Za-z0-9-]+)\.so(?:\.[0-9.]+)?")
_CONF_FILES_MAX: Final = 64
_FOLDERS_MAX: Final = 128


def find_driver(version: str, *, root: Path = Path("/"), dev: Path = Path("/dev")) -> Driver:
    """The driver of `version` (such as "550.54.15"; empty: whatever libcuda there is) below `root`."""
    return Driver(
        control_nodes=control_nodes(dev),
        libraries=_libraries(version, root),
        programs=tuple(str(path) for name in PROGRAMS if (path := _program(root, name)) is not None),
        dev=str(dev),
    )


def control_nodes(dev: Path = Path("/dev")) -> tuple[str, ...]:
    """Device nodes that every GPU needs, as far as they are there: nvidia-uvm comes with its module, maybe later."""
    return tuple(f"/dev/{name}" for name in CONTROL_NODES if (dev / name).exists())


def _libraries(version: str, root: Path) -> tuple[Library, ...]:
    found: dict[str, tuple[Path, set[str]]] = {}  # file name → where, names
    for folder in _folders(root):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        here: dict[str, tuple[Path, set[str]]] = {}
        for name in names:
            match = _NAME.fullmatch(name)
            if match is None or match["stem"] not in LIBRARIES:
                continue
            real = (folder / name).resolve()
            if not real.is_file() or (version and not real.name.endswith(f".so.{version}")):
                continue
            here.setdefault(real.name, (real, {real.name}))[1].add(name)
        for file_name, one in here.items():
            found.setdefault(file_name, one)  # the first folder has it
    return tuple(Library(str(path), tuple(sorted(names))) for _, (path, names) in sorted(found.items()))


def _program(root: Path, name: str) -> Path | None:
    for folder in _PROGRAM_FOLDERS:
        path = root / folder / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    return None


def _folders(root: Path) -> list[Path]:
    listed = [root / path.lstrip("/") for path in _configured(root / "etc/ld.so.conf", root)]
    known = [root / path for path in _FOLDERS]
    return list(dict.fromkeys(path.resolve() for path in (*listed, *known) if path.is_dir()))[:_FOLDERS_MAX]


def _configured(conf: Path, root: Path, depth: int = 0) -> Iterator[str]:
    """Folders of a file as ld.so.conf(5), with what it includes."""
    try:
        lines = conf.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.partition("#")[0].split()
        if len(words) == 2 and words[0] == "include" and depth < 4:
            pattern = words[1].lstrip("/") if words[1].startswith("/") else f"etc/{words[1]}"
            for path in sorted(root.glob(pattern))[:_CONF_FILES_MAX]:
                yield from _configured(path, root, depth + 1)
        elif len(words) == 1 and words[0].startswith("/"):
            yield words[0]


def write_specification(directory: Path, gpus: Sequence[Gpu], driver: Driver) -> Path | None:
    """Write the node's own file, whole or not at all, if it changed. No GPU with nodes: take it away; None."""
    path = directory / FILE_NAME
    usable = [gpu for gpu in gpus if gpu.nodes]
    if not usable:
        path.unlink(missing_ok=True)
        return None
    document: dict[str, Any] = specification(usable, driver)
    text = json.dumps(document, indent=1) + "\n"
    directory.mkdir(parents=True, exist_ok=True, mode=0o755)
    if path.exists() and path.read_text() == text:
        return path
    beside = directory / f".{FILE_NAME}.new"
    beside.write_text(text)
    beside.chmod(0o644)
    beside.rename(path)
    return path
