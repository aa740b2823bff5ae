"""A container's root made of an image: the shared read-only mount below, a bounded writable layer in memory above.

    RUN/lower    the image's mount, its owners mapped into the container's user namespace
    RUN/scratch  tmpfs of `resources.scratch_bytes`: upper/ and work/
    RUN/rootfs   the overlay of both

Invariants: nothing that one container writes is seen by another, or is ever on a disk; what is written counts against
its memory limit and ends with ENOSPC; no file of the image is opened through a link that the image made. With
`scratch_bytes` = 0 there is the same overlay, with room for mount points alone, and the root is read-only.

The folders that the runtime mounts over are made here, in the writable layer: where a hostile image has a link in such
a place (/proc, /tmp, /run, /dev …), that is hidden. Other mount points are the runtime's to make; it resolves them
within the root (securejoin) and mounts through a descriptor. Called by `roots`; all calls block.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError
from fal_runtime.driver import MODELS_DIR_INSIDE, SECRETS_DIR_INSIDE, SOCKET_DIR_INSIDE, ContainerSpec, driver_failed
from fal_runtime.images.layout import ImageLayout
from fal_runtime.images.process import USER_FILE_BYTES_MAX, UserIds, home_of, process_of, user_of
from fal_runtime.oci import mounts
from fal_runtime.oci.inside import open_inside

ROOTFS: Final = "rootfs"
LOWER: Final = "lower"
SCRATCH: Final = "scratch"
SCRATCH_BYTES_MIN: Final = 1 << 20  # mount points need a page each
_INODE_BYTES: Final = 4096  # of scratch for each inode, which takes about 1 KiB of the kernel's memory
_INODES_MIN: Final = 4096
_INODES_MAX: Final = 1 << 20
_IMAGE_FLAGS: Final = mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV
_SCRATCH_FLAGS: Final = mounts.MS_NOSUID | mounts.MS_NODEV
# What an image's own attributes (trusted.overlay.*) could say is not followed.
_OVERLAY_OPTIONS: Final = "redirect_dir=nofollow,metacopy=off,index=off,nfs_export=off,xino=off"
_MOUNT_POINTS: Final = (
    *(("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("run", 0o755), ("sys", 0o755), ("tmp", 0o1777)),
    *((SOCKET_DIR_INSIDE.lstrip("/"), 0o755), (SECRETS_DIR_INSIDE.lstrip("/"), 0o755)),
    (MODELS_DIR_INSIDE.lstrip("/"), 0o755),
)
_HOSTS: Final = "127.0.0.1\tlocalhost {name}\n::1\tlocalhost ip6-localhost ip6-loopback\n"


@dataclass(frozen=True, slots=True)
class Process:
    """What runs in the container. Ids are the container's own."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    user: UserIds


def assemble(
    run_dir: Path, spec: ContainerSpec, image: Path, *, uid_start: int, userns_fd: int | None, hostname: str
) -> Path:
    """The root, from the image that is mounted at `image`; `uid_start`: host id of the container's root."""
    lower, scratch, rootfs = run_dir / LOWER, run_dir / SCRATCH, run_dir / ROOTFS
    if any(sign in str(run_dir) for sign in ":,\\"):
        raise driver_failed(f"{run_dir} cannot be named in an overlay's options", remedy="Use another run directory.")
    for folder in (lower, scratch, rootfs):
        folder.mkdir(exist_ok=True, mode=0o755)
    mounts.bind_tree(image, lower, _IMAGE_FLAGS, userns_fd=userns_fd)
    size = max(spec.resources.scratch_bytes, SCRATCH_BYTES_MIN)
    inodes = min(max(size // _INODE_BYTES, _INODES_MIN), _INODES_MAX)
    mounts.mount("falctl-scratch", scratch, "tmpfs", _SCRATCH_FLAGS, f"size={size},nr_inodes={inodes},mode=0711")
    upper, work = scratch / "upper", scratch / "work"
    for folder in (upper, work):
        folder.mkdir(mode=0o755)
        os.chown(folder, uid_start, uid_start)
    _fill(upper, uid_start, hostname)
    options = f"lowerdir={lower},upperdir={upper},workdir={work},{_OVERLAY_OPTIONS}"
    mounts.mount("falctl-root", rootfs, "overlay", _SCRATCH_FLAGS, options)
    return rootfs


def _fill(upper: Path, uid_start: int, hostname: str) -> None:
    for name, mode in _MOUNT_POINTS:
        folder = upper / name
        folder.mkdir()
        folder.chmod(mode)
        os.chown(folder, uid_start, uid_start)
    for name, text in (("hosts", _HOSTS.format(name=hostname)), ("hostname", f"{hostname}\n")):
        file = upper / "etc" / name
        file.write_text(text)
        file.chmod(0o644)
        os.chown(file, uid_start, uid_start)


def process(image: Path, layout: ImageLayout, spec: ContainerSpec) -> Process:
    """What the image's configuration and the spec come to; the spec's command and environment win. INVALID."""
    meant = process_of(layout.config, spec.command, spec.env)
    passwd, group = _text(image, "etc/passwd"), _text(image, "etc/group")
    user = user_of(meant.user, passwd, group)
    env = {"HOME": home_of(user.uid, passwd), **meant.env}
    return Process(meant.argv, env, meant.working_dir, user)


def _text(image: Path, name: str) -> str:
    """A file of the image, never one of the host; empty where there is none. CORRUPT: it is not plain.

    The runtime reads it, too, inside the container, and would wait for ever at a fifo.
    """
    try:
        with open(open_inside(image, name), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FalError(
                    Code.CORRUPT,
                    f"the image's /{name} is no plain file",
                    remedy="Correct the image and add it again.",
                    field=name,
                )
            return file.read(USER_FILE_BYTES_MAX).decode("utf-8", "replace")
    except OSError as exc:
        if exc.errno not in (errno.EIO, errno.EINTR, errno.ENOTCONN):
            return ""
        what = f"/{name} of the image cannot be read yet: {exc.strerror}"
        raise FalError(Code.UNAVAILABLE, what, remedy="It is tried again as it arrives.") from exc


__all__ = ["Process", "assemble", "process"]
