"""The hot path: from a spec to a container that waits to be started, and its start.

Invariant: the record is written before anything that it names is made, `created.json` last; whoever is killed in
between leaves what `leftovers` can take away. Called by the oci driver.
"""

from __future__ import annotations

import asyncio
import json
import resource
from dataclasses import replace

from fal_runtime.driver import ContainerSpec, check_spec
from fal_runtime.oci import cgroups, conmon, limits, rootfs, roots
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.place import Place
from fal_runtime.oci.record import Record
from fal_runtime.oci.spec import HostLayout, build
from fal_runtime.uid_ranges import RANGE_IDS


def check(spec: ContainerSpec) -> None:
    """Raise INVALID, naming the field, for what this driver cannot do."""
    check_spec(spec)


async def create(place: Place, spec: ContainerSpec, mode: Mode) -> None:
    """Make the container; its first process waits in the runtime."""
    files = place.files(spec.id)
    uid_start = spec.uid_range_start
    if uid_start is None:
        files.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        uid_start = place.ranges.allocate(files.directory)
    run_dir = place.run / spec.id
    place.run.mkdir(parents=True, exist_ok=True, mode=0o711)
    edits = place.edits(spec, user_namespace=mode.user_namespace)
    etc = place.etc() if spec.image is None else None
    skeleton = place.skeleton(spec, edits) if spec.image is None else None
    record = Record(
        id=spec.id,
        runtime=mode.program,
        run_dir=str(run_dir),
        cgroup_path=place.cgroup_path(spec.id),
        uid_start=uid_start,
        user_namespace=mode.user_namespace,
        etc=str(etc or ""),
        skeleton=str(skeleton or ""),
        socket_dir=str(spec.socket_dir or ""),
        models_dir=str(spec.models_dir or ""),
        image=spec.image.id if spec.image is not None else "",
    )
    files.make(record)
    userns_fd = await place.userns.get(uid_start) if mode.user_namespace else None
    root = await roots.make_root(place, run_dir, spec, skeleton, etc, uid_start=uid_start, userns_fd=userns_fd)
    network = await asyncio.to_thread(place.egress.open, spec.id, spec.egress) if spec.network == "egress" else None
    host = HostLayout(
        rootfs=root.path,
        cgroup_path=record.cgroup_path,
        uid_start=uid_start,
        uid_count=RANGE_IDS,
        user_namespace=mode.user_namespace,
        cgroup_v2=cgroups.mode() == "v2",
        open_files_max=_open_files_max(),
        env=root.env,
        binds=root.binds if network is None else (*root.binds, rootfs.bind_resolv_conf(network.resolv_conf)),
        netns=str(network.netns) if network is not None else "",
        devices=rootfs.devices(spec.gpu_devices),
        limits=limits.read(io=spec.resources.io_bytes_s > 0),
        edits=edits,
        cwd=root.cwd,
        uid=root.user.uid,
        gid=root.user.gid,
        gids=root.user.groups,
        root_read_only=root.read_only,
    )
    paths = files.paths()
    (paths.bundle / "config.json").write_text(json.dumps(build(replace(spec, command=root.command), host)))
    pid = await conmon.create(spec.id, place.runtime(mode.program), paths, spec.log_bytes_max)
    files.mark_created(pid)


def _open_files_max() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard
