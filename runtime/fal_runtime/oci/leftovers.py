"""Taking containers away: one that is dead, and at the agent's start everything that nobody knows any more.

Invariant: removal needs nothing but the record, and works from every state that a kill -9 can leave. Called by the oci
driver.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fal_runtime import models_dir, socket_dir
from fal_runtime.oci import cgroups, rootfs
from fal_runtime.oci.place import Place
from fal_runtime.oci.record import ContainerFiles, Record


def take_away(place: Place, files: ContainerFiles, record: Record | None) -> None:
    """Everything of a dead container; takes tens of milliseconds of system calls, so not on the loop."""
    if record is not None:
        cgroups.remove(record.cgroup_path)
        place.egress.close(record.id)
        shutil.rmtree(place.runtime_root / record.id, ignore_errors=True)
        rootfs.dismantle(Path(record.run_dir))
        if record.socket_dir:
            socket_dir.remove(Path(record.socket_dir))
        if record.models_dir:
            models_dir.remove(Path(record.models_dir))
    directory = files.directory.resolve()  # the name of one that was made ahead is a link, and goes last
    place.ranges.release(directory)
    shutil.rmtree(directory, onerror=_unless_gone)
    if files.directory.is_symlink():
        files.directory.unlink(missing_ok=True)


def _unless_gone(_call: Callable[..., Any], _path: str, error: tuple[type[BaseException], BaseException, Any]) -> None:
    """A removal whose caller was cancelled goes on in its thread, while the next one does the same."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def sweep(place: Place) -> list[str]:
    """Take away run directories and cgroups without a container; returns what was found, in words."""
    words = []
    all_files = [ContainerFiles(path) for path in place.containers.iterdir()]
    if place.prepared.exists():
        all_files += [ContainerFiles(path) for path in place.prepared.iterdir()]
    known = {files.id for files in all_files}
    records = [files.record() for files in all_files]
    used = {path for record in records if record is not None for path in (record.etc, record.skeleton)}
    for path in sorted(place.run.iterdir()) if place.run.exists() else ():
        ours = (place.runtime_root, place.copied_etc, place.images.folder)
        if path.name in known or path in ours or str(path) in used:
            continue
        rootfs.dismantle(path)
        if not path.name.startswith(("etc-", "skeleton-")):  # copies that nobody uses any more are no leftovers
            words.append(f"run directory {path.name}")
    for name in cgroups.below(f"/{socket_dir.CGROUP_PARENT}"):
        scope, _dot, id = name.partition(".")
        if scope == place.scope and id not in known:
            cgroups.remove(f"/{socket_dir.CGROUP_PARENT}/{name}")
            words.append(f"cgroup {name}")
    words += place.egress.clean(frozenset(known))
    if not known:
        shutil.rmtree(place.run, ignore_errors=True)
        place.copied_etc = None
    return words
