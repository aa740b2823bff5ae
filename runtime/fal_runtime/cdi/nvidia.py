"""The CDI specification of this node's NVIDIA GPUs, for nodes where nobody else wrote one. Pure: `driver_tree` looks.

How a container finds the driver's libraries: each is mounted at its names in one folder of ours, and LD_LIBRARY_PATH is
extended by it. No hook: `ldconfig -r` in a hook would be the host's root working inside a tree that a stranger's
container may have written, needs a writable root, and costs a process at every start. A program that clears its
environment does not find them; those of the node's own image it finds where the host has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fal_contract import limits

KIND: Final = "nvidia.com/gpu"
VERSION: Final = "0.5.0"  # the least that has hostPath and names that start with a digit
INSIDE: Final = "/opt/falctl/driver"
ALL: Final = "all"
_MOUNT_OPTIONS: Final = ("ro", "nosuid", "nodev", "rbind", "rprivate")

# What compute, media and management need of a driver; nothing for screens.
LIBRARIES: Final = (
    *("libcuda", "libcudadebugger", "libnvidia-allocator", "libnvidia-cfg", "libnvidia-compiler", "libnvidia-encode"),
    *("libnvidia-fatbinaryloader", "libnvidia-gpucomp", "libnvidia-ml", "libnvidia-nvvm", "libnvidia-nvvm70"),
    *("libnvidia-opencl", "libnvidia-opticalflow", "libnvidia-pkcs11", "libnvidia-pkcs11-openssl3"),
    *("libnvidia-ptxjitcompiler", "libnvidia-sandboxutils", "libnvcuvid"),
)
PROGRAMS: Final = ("nvidia-smi", "nvidia-debugdump")
CONTROL_NODES: Final = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU or MIG instance: the names containers ask by (its UUID first), its own device nodes (absolute paths)."""

    names: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Library:
    """A file of the driver on the host and every name that programs open it by, all in one folder."""

    path: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Driver:
    """What all GPUs of a node share. `dev` is the host's folder of device nodes, "/dev" but in tests."""

    control_nodes: tuple[str, ...]
    libraries: tuple[Library, ...] = ()
    programs: tuple[str, ...] = ()
    dev: str = "/dev"


def qualified(gpu_id: str) -> str:
    """The CDI name of a GPU by its UUID."""
    return f"{KIND}={gpu_id}"


def specification(gpus: Sequence[Gpu], driver: Driver) -> dict[str, Any]:
    """The document: a device for each name of each GPU, "all" for those together. `gpus` must not be empty."""
    edits: dict[str, Any] = {"deviceNodes": [_node(path, driver.dev) for path in driver.control_nodes]}
    mounts = [_mount(library.path, f"{INSIDE}/lib/{name}") for library in driver.libraries for name in library.names][
        : limits.LIBRARY_PATHS_MAX
    ]
    env = []
    if mounts:
        env.append(f"LD_LIBRARY_PATH={INSIDE}/lib")
    if driver.programs:
        mounts += [_mount(path, f"{INSIDE}/bin/{path.rpartition('/')[2]}") for path in driver.programs]
        env.append(f"PATH={INSIDE}/bin")
    if mounts:
        edits |= {"env": env, "mounts": mounts}
    devices = [
        {"name": name, "containerEdits": {"deviceNodes": [_node(path, driver.dev) for path in gpu.nodes]}}
        for gpu in gpus
        for name in gpu.names
    ]
    every = dict.fromkeys(path for gpu in gpus for path in gpu.nodes)
    devices.append({"name": ALL, "containerEdits": {"deviceNodes": [_node(path, driver.dev) for path in every]}})
    return {"cdiVersion": VERSION, "kind": KIND, "devices": devices, "containerEdits": edits}


def own_nodes(nodes: Iterable[str]) -> tuple[str, ...]:
    """Of a GPU's device nodes, those that are its own."""
    shared = {f"/dev/{name}" for name in CONTROL_NODES}
    return tuple(path for path in nodes if path not in shared)


def _node(path: str, dev: str) -> dict[str, str]:
    """`path` as containers know it; another folder of device nodes on the host is a hostPath."""
    node = {"path": path, "permissions": "rw"}
    if dev != "/dev":
        node["hostPath"] = dev + path.removeprefix("/dev")
    return node


def _mount(source: str, target: str) -> dict[str, Any]:
    return {"hostPath": source, "containerPath": target, "options": list(_MOUNT_OPTIONS)}
