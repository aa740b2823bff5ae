"""What an agent left on this machine once its state directory was purged: for the rigs that run real agents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fal_agent.layout import RUN_ROOT
from fal_runtime.oci.driver import RUN_DIR

_CGROUPS = Path("/sys/fs/cgroup")


def left_of(state_dir: Path) -> list[str]:
    """Processes, mounts, cgroups and run directories that belong to a node with this state directory, in words."""
    driver = _scope(state_dir / "c")
    places = (str(state_dir) + "/", f"{RUN_DIR / driver}/", f"{RUN_ROOT / f'agent-{_scope(state_dir)}'}/")
    words = [f"process {pid}: {line}" for pid, line in _command_lines() if any(place in line for place in places)]
    mounted = [line.split()[4] + "/" for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    words += [f"mount {path}" for path in mounted if path.startswith(places)]
    words += [f"directory {place}" for place in places[1:] if Path(place).exists()]
    return words + [f"cgroup {path}" for path in _containers() if path.name.startswith(f"{driver}.")]


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
