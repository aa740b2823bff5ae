"""Assembles a container's root on the host: a skeleton, and detached read-only trees attached to it.

Invariant: every tree has its flags (and, with a user namespace, its id map) before it is attached; nothing writable of
the host is ever below a rootfs. Everything lies in the container's run directory, so `dismantle` needs only that.
Called by the oci driver.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import Final

from fal_contract.errors import FalError
from fal_runtime import host_image, secrets_dir
from fal_runtime.cdi.model import NO_EDITS, Edits
from fal_runtime.driver import (
    MODELS_DIR_INSIDE,
    SECRETS_DIR_INSIDE,
    SOCKET_DIR_INSIDE,
    ContainerSpec,
    Mount,
    driver_failed,
)
from fal_runtime.network.egress import NetworkSetup
from fal_runtime.oci import mounts
from fal_runtime.oci.spec import Bind, DeviceNode

_IMAGE_FLAGS: Final = mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV
# statvfs(3) flags and the mount options that repeat them.
_LOCKED: Final = ((1, "ro"), (2, "nosuid"), (4, "nodev"), (8, "noexec"), (1024, "noatime"), (2048, "nodiratime"))


def attach(source: Path, target: Path, attr_set: int, userns_fd: int | None) -> None:
    """Like `mounts.bind_tree`, but without the id map where the source's filesystem cannot have one (FUSE)."""
    try:
        mounts.bind_tree(source, target, attr_set, userns_fd=userns_fd)
    except FalError:
        if userns_fd is None:
            raise
        mounts.bind_tree(source, target, attr_set)


def assemble(
    run_dir: Path, spec: ContainerSpec, layout: host_image.Layout, skeleton: Path, etc: Path, *, userns_fd: int | None
) -> None:
    """RUN/rootfs with the host image on the skeleton, and the spec's mounts."""
    rootfs = run_dir / "rootfs"
    rootfs.mkdir(exist_ok=True, mode=0o755)
    for source, inside in ((skeleton, "/"), *layout.binds, (etc, "/etc")):
        attach(source, rootfs / inside.lstrip("/"), _IMAGE_FLAGS, userns_fd)
    place_mounts(run_dir, spec, userns_fd=userns_fd)


def place_mounts(run_dir: Path, spec: ContainerSpec, *, userns_fd: int | None) -> None:
    """RUN/mounts/N with the N-th mount of the spec."""
    for number, mount in enumerate(spec.mounts):
        place = run_dir / "mounts" / str(number)
        place.parent.mkdir(exist_ok=True, mode=0o700)
        if mount.source.is_dir():
            place.mkdir(exist_ok=True)
        else:
            place.touch()
        flags = mounts.ATTR_NOSUID | mounts.ATTR_NODEV | (mounts.ATTR_RDONLY if mount.read_only else 0)
        attach(mount.source, place, flags, userns_fd)


def extra_mount_points(
    spec: ContainerSpec, layout: host_image.Layout, edits: Edits = NO_EDITS
) -> tuple[tuple[str, bool], ...]:
    """The mount points that this spec and its CDI edits need in its skeleton, as (path inside, is a directory)."""
    wanted = sorted(
        {(mount.target, mount.source.is_dir()) for mount in spec.mounts}
        | {(mount.container_path, os.path.isdir(mount.host_path)) for mount in edits.mounts}
    )
    return tuple((target, is_directory) for target, is_directory in wanted if not _below_a_bind(target, layout))


def _below_a_bind(target: str, layout: host_image.Layout) -> bool:
    """A mount point below a read-only bind cannot be made; it must exist there."""
    return any(target.startswith(inside.rstrip("/") + "/") for _source, inside in (*layout.binds, (Path(), "/etc")))


def binds(run_dir: Path, spec: ContainerSpec) -> tuple[Bind, ...]:
    """What the runtime binds into the container, with the sources' locked flags."""
    found = [_bind(run_dir / "mounts" / str(number), mount) for number, mount in enumerate(spec.mounts)]
    if spec.socket_dir is not None:
        found.append(Bind(spec.socket_dir, SOCKET_DIR_INSIDE, ("bind", "rw", "nosuid", "nodev", "noexec")))
    if spec.models_dir is not None:
        found.append(Bind(spec.models_dir, MODELS_DIR_INSIDE, ("rbind", "rslave", "ro", "nosuid", "nodev", "noexec")))
    if spec.secrets:
        place = run_dir / secrets_dir.FOLDER
        found.append(Bind(place, SECRETS_DIR_INSIDE, ("bind", "ro", "nosuid", "nodev", "noexec")))
    if spec.network == "host":
        found.append(bind_resolv_conf(Path("/etc/resolv.conf")))
    return tuple(found)


def network_binds(network: NetworkSetup) -> tuple[Bind, ...]:
    """What a container sees of a network that was made for it: its name servers, and sysfs."""
    sysfs = Bind(network.sysfs, "/sys", ("bind", "ro", "nosuid", "nodev", "noexec"))
    return bind_resolv_conf(network.resolv_conf), sysfs


def bind_resolv_conf(source: Path) -> Bind:
    """Shows `source` as the container's list of name servers."""
    return Bind(source.resolve(), "/etc/resolv.conf", ("bind", "ro", *locked_flags(source)))


def _bind(place: Path, mount: Mount) -> Bind:
    flags = [flag for flag in locked_flags(place) if flag != "ro"]
    return Bind(place, mount.target, ("bind", "ro" if mount.read_only else "rw", *flags))


def locked_flags(path: Path) -> tuple[str, ...]:
    """The flags of the mount that `path` lies in, which a user namespace has to repeat."""
    bits = os.statvfs(path).f_flag
    return tuple(name for bit, name in _LOCKED if bits & bit)


def devices(paths: tuple[str, ...]) -> tuple[DeviceNode, ...]:
    """The device nodes at `paths`. DRIVER_FAILED when one is not there."""
    found = []
    for path in paths:
        try:
            info = os.stat(path)
        except OSError as error:
            raise driver_failed(f"device {path}: {error.strerror}", remedy="Is the driver loaded?") from error
        if not (stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode)):
            raise driver_failed(f"{path} is not a device node", remedy="Check the GPU inventory of this node.")
        kind = "c" if stat.S_ISCHR(info.st_mode) else "b"
        found.append(DeviceNode(path, "c" if kind == "c" else "b", os.major(info.st_rdev), os.minor(info.st_rdev)))
    return tuple(found)


def dismantle(run_dir: Path) -> None:
    """Detach everything below `run_dir`, then delete it; refuses to delete while anything is mounted there."""
    if not run_dir.exists():
        return
    mounts.unmount_below(run_dir)
    root = run_dir.resolve()
    left = [point for point in mounts.mount_points() if root == point or root in point.parents]
    if left:
        raise driver_failed(f"{left[0]} cannot be unmounted", remedy="See what uses it, then try again.")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(run_dir)
