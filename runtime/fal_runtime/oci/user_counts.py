"""Bounds on what the kernel counts for each user, within a container's own user namespace.

Watches of files (inotify) of a container are counted again for whoever made its user namespace: the node's root, whose
128 instances, as kernels come, one container could take, and with them those of the node's own services. A namespace
has bounds of its own (namespaces(7), /proc/sys/user), which only a process within it can set: `nsenter` (util-linux),
before the container's first process executes anything. Called by `start`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fal_runtime.driver import driver_failed
from fal_runtime.oci.nursery import SYNC_FD, Nursery

INOTIFY_INSTANCES_MAX: Final = 16
INOTIFY_WATCHES_MAX: Final = 8192
TIMEOUT_S: Final = 30.0
# A second wall behind the filter of system calls: no namespaces in it, whoever finds a way to ask for them.
_BOUNDS: Final = {
    "max_inotify_instances": INOTIFY_INSTANCES_MAX,
    "max_inotify_watches": INOTIFY_WATCHES_MAX,
    "max_user_namespaces": 0,
}
_WRITES: Final = "".join(f"echo {value} >/proc/sys/user/{name} || exit 9; " for name, value in _BOUNDS.items())
_DONE: Final = "bounded"
_SCRIPT: Final = f"exec 2>&{SYNC_FD}; {_WRITES}echo {_DONE} >&{SYNC_FD}"


async def bound(id: str, pid: int, bundle: Path, nursery: Nursery) -> bool:
    """Set the bounds for the container whose first process is `pid`; False where this node's /proc is read-only."""
    command = ("nsenter", f"--user=/proc/{pid}/ns/user", "--", "/bin/sh", "-c", _SCRIPT)
    try:
        said = (await nursery.ask(command, bundle, "bounds", TIMEOUT_S)).decode("utf-8", "replace").strip()
    except TimeoutError:
        said = f"nothing was heard in {TIMEOUT_S:.0f} s"
    if said == _DONE:
        return True
    if "Read-only file system" in said:
        return False
    what = f"bounding of container {id} failed: {said or 'nsenter ended without a word'}"
    raise driver_failed(what, remedy="See that util-linux is installed, then look at the container's log.")


__all__ = ["INOTIFY_INSTANCES_MAX", "INOTIFY_WATCHES_MAX", "bound"]
