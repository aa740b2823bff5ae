"""Makes the root file system of a container and what is mounted into it; which kind of root is decided here.

Invariant: everything lies below the container's run directory, so that `rootfs.dismantle` needs only that, whoever was
killed in between. Called by `start`, and ahead of time by `prepared`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_runtime import models_dir, secrets_dir, socket_dir
from fal_runtime.driver import ContainerSpec
from fal_runtime.images.process import UserIds
from fal_runtime.oci import image_root, rootfs
from fal_runtime.oci.place import Place
from fal_runtime.oci.spec import HOSTNAME, Bind

_ROOT_USER: Final = UserIds(0, 0, ())


@dataclass(frozen=True, slots=True)
class Root:
    """A root that is ready: its host path, what the runtime binds into it, and the process that it means.

    `env` holds the spec's, too. Ids are the container's own.
    """

    path: Path
    binds: tuple[Bind, ...]
    command: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str = "/tmp"
    user: UserIds = _ROOT_USER
    read_only: bool = True


async def make_root(
    place: Place,
    run_dir: Path,
    spec: ContainerSpec,
    skeleton: Path | None,
    etc: Path | None,
    *,
    uid_start: int,
    userns_fd: int | None,
) -> Root:
    """Assemble the root and the directories that are shared with the container; DRIVER_FAILED with the reason.

    `skeleton` and `etc` belong to the node's own system, and are None for an image.
    """
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
    if spec.image is not None:
        root = await _of_image(place, run_dir, spec, uid_start=uid_start, userns_fd=userns_fd)
    else:
        assert skeleton is not None
        assert etc is not None
        rootfs.assemble(run_dir, spec, place.layout, skeleton, etc, userns_fd=userns_fd)
        env = {**place.layout.env, **spec.env}
        root = Root(run_dir / "rootfs", rootfs.binds(run_dir, spec), spec.command, env)
    if spec.socket_dir is not None:
        socket_dir.create(spec.socket_dir, owner_uid=uid_start)
    if spec.models_dir is not None:
        models_dir.create(spec.models_dir)
    if spec.secrets:
        secrets_dir.create(run_dir / secrets_dir.FOLDER, spec.secrets, owner_uid=uid_start + root.user.uid)
    return root


async def _of_image(place: Place, run_dir: Path, spec: ContainerSpec, *, uid_start: int, userns_fd: int | None) -> Root:
    assert spec.image is not None
    mounted, layout = await place.images.attach(spec.image)

    def assemble() -> Root:
        process = image_root.process(mounted, layout, spec)
        path = image_root.assemble(run_dir, spec, mounted, uid_start=uid_start, userns_fd=userns_fd, hostname=HOSTNAME)
        rootfs.place_mounts(run_dir, spec, userns_fd=userns_fd)
        return Root(
            *(path, rootfs.binds(run_dir, spec), process.argv, process.env, process.cwd, process.user),
            read_only=not spec.resources.scratch_bytes,
        )

    return await asyncio.to_thread(assemble)
