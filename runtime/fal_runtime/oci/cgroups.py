"""Control groups, as far as the runtime does not do them: finding them, where conmon lives, OOM counts, leftovers.

Works on v1, hybrid and v2 trees alike: a *hierarchy* is one mounted cgroup filesystem, a cgroup *path* such as
/falctl/3f2a9c1e.default.digits-7k2m9q4c is relative to each hierarchy's root. Limits are written by runc from the spec.
"""

from __future__ import annotations

import contextlib
import os
import signal
from functools import cache
from pathlib import Path
from typing import Final, Literal

from fal_runtime.driver import driver_failed

Mode = Literal["v1", "v2", "hybrid", "none"]
CONMON_CGROUP: Final = "/falctl-conmon"
_KILL_ROUNDS_MAX: Final = 100
_SHARES_MAX: Final = 262_144  # cpu.shares of v1
_WEIGHT_MAX: Final = 10_000  # cpu.weight of v2


@cache
def _mounted() -> list[tuple[str, Path]]:
    """(type, mount point) of every mounted cgroup filesystem; they stay for as long as the machine runs."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _source, target, fs_type, *_ = line.split(" ")
        if fs_type in ("cgroup", "cgroup2"):
            found.append((fs_type, Path(target)))
    return found


def mode() -> Mode:
    """Which kind of tree this machine has."""
    types = {fs_type for fs_type, _path in _mounted()}
    if types == {"cgroup", "cgroup2"}:
        return "hybrid"
    if types == {"cgroup2"}:
        return "v2"
    return "v1" if types else "none"


def hierarchies() -> list[Path]:
    """The root directory of every hierarchy; the first mount of each."""
    return list(dict.fromkeys(path for _type, path in _mounted()))


def _make(hierarchy: Path, path: str) -> Path:
    """The directory of `path`, made if missing. A v1 cpuset admits nobody until it has CPUs and memory nodes."""
    directory = hierarchy / path.lstrip("/")
    if not directory.exists():
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            own, parent = directory / name, directory.parent / name
            # v2 has the files too, but empty means "as above" there and parent at the root is missing.
            if own.exists() and parent.exists() and not own.read_text().strip():
                own.write_text(parent.read_text())
    return directory


def make_parent(path: str, *, weight: int = 1) -> None:
    """The cgroup above all containers, with the CPU weight of so many ordinary processes per CPU.

    By default all containers together would weigh as much as a single process of the host.
    """
    cpus = weight * (os.cpu_count() or 1)
    for hierarchy in hierarchies():
        try:
            directory = _make(hierarchy, path)
            if (directory / "cpu.shares").exists():
                (directory / "cpu.shares").write_text(str(min(1024 * cpus, _SHARES_MAX)))
            if (directory / "cpu.weight").exists():
                (directory / "cpu.weight").write_text(str(min(100 * cpus, _WEIGHT_MAX)))
        except OSError as error:
            raise driver_failed(
                f"cgroup {path} cannot be made in {hierarchy}: {error.strerror}",
                remedy="Run as root with writable cgroups; with systemd, set Delegate=yes in the unit.",
            ) from error


def enter(pid: int, path: str) -> None:
    """Move process `pid` to `path` in every hierarchy, so that killing all of our own cgroup misses it."""
    enter_some(pid, path, hierarchies())


def enter_some(pid: int, path: str, those: list[Path]) -> None:
    """Like `enter`, in `those` hierarchies only."""
    for hierarchy in those:
        try:
            (_make(hierarchy, path) / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise driver_failed(
                f"process {pid} cannot move to cgroup {path} of {hierarchy}: {error.strerror}",
                remedy="Run as root with writable cgroups; with systemd, set Delegate=yes in the unit.",
            ) from error


def of_process(pid: int) -> set[str]:
    """The lines of /proc/PID/cgroup; empty when there is no such process."""
    try:
        return set(Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    except OSError:
        return set()


def oom_kills(path: str) -> int:
    """How many processes the kernel killed for the memory limit of `path`; 0 when the cgroup is gone."""
    for hierarchy, name in _oom_files():
        try:
            text = (hierarchy / path.lstrip("/") / name).read_text()
        except OSError:
            continue
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0


@cache
def _oom_files() -> list[tuple[Path, str]]:
    """(hierarchy, file of a cgroup) where deaths may be counted: v1 shows its file at the root, too, v2 only below."""
    v1, v2 = "memory.oom_control", "memory.events"
    found = [(path, v1 if (path / v1).exists() else v2) for path in hierarchies()]
    return [(path, name) for path, name in found if name == v1 or (path / "cgroup.controllers").exists()]


def below(path: str) -> list[str]:
    """The names of all cgroups directly below `path` in any hierarchy, sorted."""
    names: set[str] = set()
    for hierarchy in hierarchies():
        directory = hierarchy / path.lstrip("/")
        if directory.is_dir():
            names.update(child.name for child in directory.iterdir() if child.is_dir())
    return sorted(names)


def remove(path: str) -> None:
    """Kill what is left in `path` and remove it from every hierarchy; nothing there is fine."""
    for hierarchy in hierarchies():
        directory = hierarchy / path.lstrip("/")
        for _ in range(_KILL_ROUNDS_MAX):
            if not directory.exists() or _remove_tree(directory):
                break


def _remove_tree(directory: Path) -> bool:
    for parent, _names, _files in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):
            for pid in (Path(parent) / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.rmdir(parent)
    return not directory.exists()
