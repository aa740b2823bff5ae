"""Devices for a container that runs already: a worker that was warm before anybody knew its GPU.

In a user namespace nobody can make a device node, and nothing can be bound into a live container's /dev. So a container
that may get devices later has a small tmpfs of the host, where nodes count, at /dev/fal; a device is a node there, a
link in the container's /dev, and a rule in its device cgroup, in this order. Called by the oci driver.

    open_folder(folder, owner_uid)            before it is created; `bind(folder)` among its binds
    attach(folder, nodes, pid=, …)            while nothing but our own waiter runs in it: its /dev is walked
    close_folder(folder)                      when it is gone

What a device brings beside nodes (libraries, variables) comes with its specification as a whole, so that it can be
there from the start: `cdi.registry.split`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fal_runtime.cdi.model import NodeEdit
from fal_runtime.driver import driver_failed
from fal_runtime.oci import device_filter, mounts
from fal_runtime.oci.spec import Bind, DeviceNode

INSIDE: Final = "/dev/fal"
_SIZE_BYTES: Final = 64 << 10
_NODES_MAX: Final = 128
_libc: Final = ctypes.CDLL(None)


def open_folder(folder: Path, *, owner_uid: int) -> None:
    """An empty tmpfs at `folder`; one that is there stays. Only its owner, the container's root, opens its nodes."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o711)
    if mounts.is_mount_point(folder):
        return
    options = f"size={_SIZE_BYTES},nr_inodes={_NODES_MAX + 16},mode=0755,uid={owner_uid},gid={owner_uid}"
    mounts.mount("falctl-devices", folder, "tmpfs", mounts.MS_NOSUID | mounts.MS_NOEXEC, options)


def close_folder(folder: Path) -> None:
    """Take it away; nothing there is fine."""
    if folder.exists():
        mounts.unmount_all(folder)
        folder.rmdir()


def bind(folder: Path) -> Bind:
    """Shows it to the container, which cannot change it."""
    return Bind(folder, INSIDE, ("bind", "ro", "nosuid", "noexec"))


def attach(
    folder: Path,
    nodes: Sequence[NodeEdit],
    *,
    pid: int,
    cgroup_path: str,
    owner_uid: int,
    held: Sequence[DeviceNode] = (),
) -> tuple[DeviceNode, ...]:
    """Give these nodes (completed: with numbers) to the container whose process on the host is `pid`.

    `held`: nodes that it was created with. Returns what it got; calling again changes nothing. DRIVER_FAILED when one
    cannot be given; then remove the container, as it may have some of them.
    """
    given = []
    for node in nodes:
        if node.kind not in ("c", "b") or node.major is None or node.minor is None or not node.path.startswith("/dev/"):
            raise driver_failed(f"{node.path} cannot be given to a running container", remedy="Start a new one.")
        given.append(DeviceNode(node.path, "b" if node.kind == "b" else "c", node.major, node.minor))
    if len(given) > _NODES_MAX:
        raise driver_failed(f"more than {_NODES_MAX} device nodes at once", remedy="Start a new container.")
    for device in given:
        device_filter.make_node(folder, device, owner_uid=owner_uid)
        _link(pid, device.path)
    device_filter.allow(cgroup_path, given, held=held)
    return tuple(given)


def _link(pid: int, path: str) -> None:
    """A link in the container's own /dev, which the runtime has made and nobody else has written to yet."""
    below = path.removeprefix("/dev/")
    try:
        dev = os.open(f"/proc/{pid}/root/dev", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            info = os.fstat(dev)
            with _creating_as(info.st_uid, info.st_gid):
                _link_in(dev, below, f"{INSIDE}/{below}")
        finally:
            os.close(dev)
    except OSError as error:
        what = f"link {path} in the container of process {pid}: {error.strerror}"
        raise driver_failed(what, remedy="Start a new one.") from error


def _link_in(dev: int, below: str, target: str) -> None:
    for parent in reversed(Path(below).parents[:-1]):
        with contextlib.suppress(FileExistsError):
            os.mkdir(parent, 0o755, dir_fd=dev)
    try:
        os.symlink(target, below, dir_fd=dev)
    except FileExistsError:
        if os.readlink(below, dir_fd=dev) != target:
            raise


@contextlib.contextmanager
def _creating_as(uid: int, gid: int) -> Iterator[None]:
    """Files that this thread makes belong to these ids: a file system of another user namespace knows no other root."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)
