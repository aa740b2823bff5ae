"""Makes the root file system of a container and what is mounted into it; which kind of root is decided here.

Invariant: everything lies below the container's run directory, so that `rootfs.dismantle` needs only that, whoever was
killed in between. Called by `start`, and ahead of time by `prepared`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fal_contract.errors import invalid
from fal_runtime import models_dir, socket_dir
from fal_runtime.driver import ContainerSpec
from fal_runtime.oci import rootfs
from fal_runtime.oci.place import Place
from fal_runtime.oci.spec import Bind


@dataclass(frozen=True, slots=True)
class Root:
    """A root that is ready: its host path, and what the runtime binds into it."""

    path: Path
    binds: tuple[Bind, ...]


def check(spec: ContainerSpec) -> None:
    """Raise INVALID for a root that cannot be made here, before anything is."""
    if spec.image is not None:
        raise invalid("image", spec.image.id, "is not supported by this driver yet", remedy='Use "host".')


async def make_root(
    place: Place,
    run_dir: Path,
    spec: ContainerSpec,
    skeleton: Path,
    etc: Path,
    *,
    uid_start: int,
    userns_fd: int | None,
) -> Root:
    """Assemble the root and the directories that are shared with the container; DRIVER_FAILED with the reason."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
    rootfs.assemble(run_dir, spec, place.layout, skeleton, etc, userns_fd=userns_fd)
    if spec.socket_dir is not None:
        socket_dir.create(spec.socket_dir, owner_uid=uid_start)
    if spec.models_dir is not None:
        models_dir.create(spec.models_dir)
    return Root(run_dir / "rootfs", rootfs.binds(run_dir, spec))
