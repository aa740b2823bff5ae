"""A runner's view of its models: one host directory per runner, whose mounts reach a live container.

Invariant: the directory is a small tmpfs, mounted shared here and given to the container `rslave`; a model is attached
as a detached tree whose read-only, nosuid and nodev flags are in force *before* it becomes visible (a bind that is
remounted read-only afterwards stays writable in the container). A runner sees its own models only. Root only; called by
the oci driver. The process driver uses symbolic links.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

from fal_contract.errors import FalError
from fal_runtime.driver import check_model_name
from fal_runtime.oci import mounts

SIZE_BYTES: Final = 1 << 20
_FLAGS: Final = mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV


def create(path: Path) -> None:
    """An empty shared tmpfs at `path`; nothing happens when it is mounted."""
    path.mkdir(parents=True, exist_ok=True, mode=0o755)
    if mounts.is_mount_point(path):
        return
    mounts.mount(
        "falctl-models",
        path,
        "tmpfs",
        mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC,
        f"size={SIZE_BYTES},mode=0755",
    )
    # Private first: its own peer group, not the one of the mount it lies in.
    mounts.set_propagation(path, mounts.MS_PRIVATE)
    mounts.set_propagation(path, mounts.MS_SHARED)


def remove(path: Path) -> None:
    """Detach all models and the directory itself; a path that does not exist is fine."""
    mounts.unmount_below(path)
    if not mounts.is_mount_point(path):
        shutil.rmtree(path, ignore_errors=True)


def attach_model(runner_dir: Path, name: str, source: Path, *, userns_fd: int | None = None) -> None:
    """Show directory `source` read-only as `name`; what was there before stays open where it is open, and goes.

    With `userns_fd` (the container's ids) owners are mapped where the source's filesystem can (FUSE cannot).
    """
    target = runner_dir / check_model_name(name)
    target.mkdir(exist_ok=True, mode=0o755)
    tree_fd = mounts.open_tree(source)
    try:
        try:
            mounts.mount_setattr(tree_fd, _FLAGS, userns_fd=userns_fd)
        except FalError:
            if userns_fd is None:
                raise
            mounts.mount_setattr(tree_fd, _FLAGS)
        # On top first, then the old one below goes: at no moment is the name empty.
        replaced = mounts.is_mount_point(target)
        if not replaced:
            mounts.move_mount(tree_fd, target)
            return
        try:
            mounts.move_mount(tree_fd, target, beneath=True)
            mounts.umount(target)
        except FalError:  # Linux before 6.5: stacked, `detach_model` takes the whole stack away
            mounts.move_mount(tree_fd, target)
    finally:
        os.close(tree_fd)


def detach_model(runner_dir: Path, name: str) -> None:
    """Take the model away; open files read on. Unknown names are fine."""
    target = runner_dir / check_model_name(name)
    mounts.unmount_all(target)
    with contextlib.suppress(FileNotFoundError):
        target.rmdir()
