"""Everything on this machine that belongs to one oci driver, in words: what its containers may not leave behind.

Compared before and after: what is there after and was not before is a leak. Two things grow within bounds and are not
told: user namespaces that the driver keeps open (`userns.KEPT_MAX`) and output of removed containers (`ended_logs`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fal_runtime.oci import cgroups
from fal_runtime.oci.driver import RUN_DIR
from fal_runtime.oci.place import Place
from fal_runtime.uid_ranges import UidRanges


def traces(place: Place, folder: Path) -> set[str]:
    """Of the driver at `place`, whose state and whose containers' directories lie in `folder`; and our descriptors."""
    places = (str(folder), str(place.run))
    found = {f"descriptor {word}" for word in _descriptors()}
    found |= {f"process {word}" for word in _processes(places)}
    found |= {f"mount {point}" for point in _mounts(places)}
    found |= {f"cgroup {path}" for path in _cgroups(place.scope)}
    found |= {f"loop device {word}" for word in _loops(places)}
    found |= {f"ids of {owner}" for owner in _owners() if owner.startswith(places)}
    return found | {
        f"file {path}" for top in (folder, place.run) for path in _files(top, but=folder / "state" / "ended")
    }


def _descriptors() -> Iterator[str]:
    """One word each: equal ones are numbered."""
    seen: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            kind = target if target.startswith("/") else target.partition("[")[0]  # numbers of pipes are not told
            if kind != "user:":
                seen[kind] = seen.get(kind, 0) + 1
    return (f"{kind} no. {number + 1}" for kind, count in seen.items() for number in range(count))


def _processes(places: tuple[str, ...]) -> Iterator[str]:
    """Of containers by their cgroup, conmon and the runtime by their command lines, zombies by their parent."""
    for directory in Path("/proc").glob("[0-9]*"):
        if directory.name == str(os.getpid()):
            continue
        with suppress(OSError):
            state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
            line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if (state == "Z" and parent == str(os.getpid())) or any(place in line for place in places):
                yield f"{directory.name} {state} {line}"


def _mounts(places: tuple[str, ...]) -> list[str]:
    """One word each: equal ones are numbered."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [point for point in (line.split()[4] for line in lines) if point.startswith(places)]
    return [f"{point} no. {points[:at].count(point)}" for at, point in enumerate(points)]


def _cgroups(scope: str) -> Iterator[str]:
    for name in cgroups.below("/falctl"):
        if name.startswith(f"{scope}."):
            yield name


def _loops(places: tuple[str, ...]) -> Iterator[str]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # it goes away with the device
            if (file := backing.read_text().strip()).startswith(places):
                yield f"{backing.parts[3]} of {file}"


def _owners() -> list[str]:
    return list(UidRanges(RUN_DIR / "uid_ranges.json").owners().values())


def _files(top: Path, *, but: Path) -> Iterator[str]:
    """With their sizes; not what lies on other file systems mounted there."""
    device = top.stat().st_dev if top.exists() else 0
    for parent, names, files in os.walk(top):
        names[:] = [name for name in names if _device(Path(parent, name)) == device and Path(parent, name) != but]
        yield from (f"{Path(parent, name)}/" for name in names)
        for name in files:
            with suppress(OSError):
                path = Path(parent, name)
                yield f"{path} {path.lstat().st_size}"


def _device(path: Path) -> int:
    try:
        return path.lstat().st_dev
    except OSError:
        return 0
