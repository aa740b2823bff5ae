"""The directory through which a runner's unix socket is reached.

Invariant: the container owns what lies in it, so nothing in it is trusted. On an isolating driver it is a tmpfs of its
own, 64 KiB, mounted `nosymfollow`: a socket replaced by a symbolic link to a host's socket is refused by the kernel
(ELOOP), and whoever answers must be in the runner's cgroup (`peer_in_cgroup`). On the process driver it is a plain
directory. Made by the drivers; the check is for fal-proxy, after every connect.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
from pathlib import Path
from typing import Final

from fal_runtime.driver import driver_failed
from fal_runtime.oci import mounts

SIZE_BYTES: Final = 64 << 10
INODES_MAX: Final = 64
CGROUP_PARENT: Final = "falctl"
# sun_path of a unix socket holds 108 bytes with its NUL; leave room for a socket's own name.
PATH_BYTES_MAX: Final = 107 - len("/worker.sock")
_UCRED: Final = struct.Struct("3i")


def check_path(path: Path) -> None:
    """Raise DRIVER_FAILED when sockets in `path` could not be connected to."""
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise driver_failed(
            f"socket directory {path} has more than {PATH_BYTES_MAX} bytes in its name",
            remedy="Use a shorter state directory; a unix socket's path is bounded.",
        )


def create_plain(path: Path) -> None:
    """A directory for the process driver."""
    check_path(path)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


def create(path: Path, *, owner_uid: int) -> None:
    """A tmpfs owned by `owner_uid` (the host id of the container's root); nothing happens when it is mounted."""
    check_path(path)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if mounts.is_mount_point(path):
        return
    flags = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC | mounts.MS_NOSYMFOLLOW
    options = f"size={SIZE_BYTES},nr_inodes={INODES_MAX},mode=0700,uid={owner_uid},gid={owner_uid}"
    mounts.mount("falctl-socket", path, "tmpfs", flags, options)


def remove(path: Path) -> None:
    """Take it away, mounted or not; a path that does not exist is fine."""
    mounts.unmount_all(path)
    shutil.rmtree(path, ignore_errors=True)


def peer_pid(sock: socket.socket) -> int:
    """The process at the other end of a connected unix socket (SO_PEERCRED), as its own host pid; 0 when unknown."""
    pid, _uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(pid)


def cgroup_name(scope: str, container_id: str) -> str:
    """The last component of a container's cgroup, /falctl/SCOPE.ID; `scope` (no dot) tells agents of one node apart."""
    return f"{scope}.{container_id}"


def peer_in_cgroup(pid: int, name: str) -> bool:
    """Does process `pid` belong to the container whose cgroup's last component (`cgroup_name`) is `name`?

    All of it is compared: a container that was prepared before it had an id keeps the name of its pool. Containers
    cannot make or enter cgroups, so being in /falctl/NAME in one hierarchy is proof.
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        parent, _slash, rest = line.split(":", 2)[2].partition(f"/{CGROUP_PARENT}/")
        if parent == "" and rest.split("/")[0] == name:
            return True
    return False
