"""What tests left on this machine: of an agent whose state directory was purged, and of anything below a folder.

A process belongs to a folder when its command line, its working directory or a file that it holds open lies there:
fsd's locker of memory and the interpreters of rigs have no path on their command line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from fal_agent.layout import RUN_ROOT
from fal_runtime.oci.driver import RUN_DIR

_CGROUPS = Path("/sys/fs/cgroup")


def left_of(state_dir: Path) -> list[str]:
    """Processes, mounts, cgroups and run directories that belong to a node with this state directory, in words."""
    driver = _scope(state_dir / "c")
    run = (f"{RUN_DIR / driver}/", f"{RUN_DIR}/net-{driver}/", f"{RUN_ROOT / f'agent-{_scope(state_dir)}'}/")
    places = (f"{state_dir}/", *run)
    words = [f"process {pid}: {line}" for pid, line in _command_lines() if any(place in line for place in places)]
    mounted = [line.split()[4] + "/" for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    words += [f"mount {path}" for path in mounted if path.startswith(places)]
    words += [f"directory {place}" for place in run if Path(place).exists()]
    return words + [f"cgroup {path}" for path in _containers() if path.name.startswith(f"{driver}.")]


def left_below(folder: Path, *, but: Collection[Path] = ()) -> list[str]:
    """Processes, mounts and loop devices of this folder, in words; not what belongs to the folders in `but`."""
    place, kept = f"{folder}/", tuple(f"{path}/" for path in but)

    def ours(text: str) -> bool:
        return place in text and not any(path in text for path in kept)

    words = [f"process {pid}: {line}" for pid, line in _command_lines() if pid != os.getpid() and ours(line)]
    told = {word.split()[1] for word in words}
    words += [f"process {pid} has {path} open" for pid, path in _open_files(ours) if f"{pid}:" not in told]
    mounted = [line.split()[4] + "/" for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    words += [f"mount {path}" for path in mounted if ours(path)]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # it goes away with the device
            if ours(path := backing.read_text()):
                words.append(f"loop device of {path.strip()}")
    return words + [word for state_dir in _state_dirs(folder) if ours(f"{state_dir}/") for word in left_of(state_dir)]


def _state_dirs(folder: Path) -> set[Path]:
    """Of the agents that ran below a folder: rigs do not nest them deeper than three. pytest makes links too."""
    found = (path.parent for pattern in ("*/c", "*/*/c", "*/*/*/c") for path in folder.glob(pattern))
    return {path.resolve() for path in found if (path / "lock").exists()}


def own_namespaces() -> list[str]:
    """Named network namespaces that this test process made (`e2e_network`)."""
    return [f"network namespace {path.name}" for path in Path("/run/netns").glob(f"fe2e-{os.getpid()}-*")]


def _open_files(ours: Callable[[str], bool]) -> Iterator[tuple[int, str]]:
    """One file or working directory each of the processes that have one there."""
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            for link in (folder / "cwd", *(folder / "fd").iterdir()):
                with suppress(OSError):
                    if ours(path := f"{os.readlink(link)}/"):
                        yield int(folder.name), path
                        break


def _containers() -> Iterator[Path]:
    """Cgroups of containers. Others come and go while this looks, which os.walk bears and Path.glob does not."""
    for parent, names, _ in os.walk(_CGROUPS):
        if os.path.basename(parent) == "falctl":
            yield from (Path(parent, name) for name in names)


def _scope(path: Path) -> str:
    """How agents and drivers of one machine tell their things apart."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]


def _command_lines() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                yield int(folder.name), (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
