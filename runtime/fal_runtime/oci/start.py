"""The hot path: from a spec to a container that waits to be started, and its start.

Invariant: the record is written before anything that it names is made, `created.json` last; whoever is killed in
between leaves what `leftovers` can take away. Called by the oci driver.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fal_contract.errors import FalError
from fal_runtime.cdi.model import Edits
from fal_runtime.driver import ContainerSpec, check_spec, driver_failed
from fal_runtime.oci import cgroups, conmon, limits, processes, rootfs, roots, user_counts
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.place import Place
from fal_runtime.oci.record import ContainerFiles, Created, Record
from fal_runtime.oci.spec import Bind, HostLayout, build
from fal_runtime.uid_ranges import RANGE_IDS


def check(spec: ContainerSpec) -> None:
    """Raise INVALID, naming the field, for what this driver cannot do."""
    check_spec(spec)


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a container that is made ahead has of its own (see `prepared`)."""

    files: ContainerFiles
    bind: Bind
    fifo: str
    make_fifo: Callable[[int], None]  # given the host id of the container's root


async def create(place: Place, spec: ContainerSpec, mode: Mode, waiting: Waiting | None = None) -> None:
    """Make the container; its first process waits in the runtime."""
    warming = place.nursery.warm_up()  # the runtime moves processes about ten milliseconds from now
    try:
        await _create(place, spec, mode, waiting)
    finally:
        await asyncio.wait({warming})


async def _edits(place: Place, spec: ContainerSpec, mode: Mode) -> Edits:
    """What its CDI devices bring. In a thread: a specification in YAML that changed takes 0.1 s to read."""
    look = partial(place.edits, spec, user_namespace=mode.user_namespace)
    return await asyncio.to_thread(look) if spec.cdi else look()


async def _create(place: Place, spec: ContainerSpec, mode: Mode, waiting: Waiting | None) -> None:
    files = waiting.files if waiting is not None else place.files(spec.id)
    uid_start = spec.uid_range_start
    if uid_start is None:
        files.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        uid_start = place.ranges.allocate(files.directory)
    run_dir = place.run / spec.id
    place.run.mkdir(parents=True, exist_ok=True, mode=0o711)
    edits = await _edits(place, spec, mode)
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
        start_by_program=Path(mode.program).name != "runc" or any(hook.name == "poststart" for hook in edits.hooks),
        image=spec.image.id if spec.image is not None else "",
        fifo=waiting.fifo if waiting is not None else "",
    )
    files.make(record)
    userns_fd = await place.userns.get(uid_start) if mode.user_namespace else None
    root = await roots.make_root(place, run_dir, spec, skeleton, etc, uid_start=uid_start, userns_fd=userns_fd)
    binds = root.binds
    if waiting is not None:
        waiting.make_fifo(uid_start)
        binds = (*binds, waiting.bind)
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
        binds=binds if network is None else (*binds, *rootfs.network_binds(network)),
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
    pid = await conmon.create(spec.id, place.runtime(mode.program), paths, spec.log_bytes_max, place.nursery)
    if mode.user_namespace:
        await user_counts.bound(spec.id, pid, paths.bundle, place.nursery)
    files.mark_created(pid)


def _open_files_max() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard


async def start(place: Place, files: ContainerFiles, record: Record) -> None:
    """Let the first process go on to its command; DRIVER_FAILED when it cannot."""
    if record.start_by_program:
        command = place.runtime(record.runtime).command("start", record.id)
        await processes.run_command(command, f"start of container {record.id}")
        return
    await let_go(place, files, record)


async def let_go(place: Place, files: ContainerFiles, record: Record) -> None:
    """The first process leaves the runtime and executes its command."""
    await _release(record.id, place.runtime_root / record.id / "exec.fifo", files.created())


async def _release(id: str, fifo: Path, created: Created | None) -> None:
    """What `runc start` does, without executing it, which costs 14 ms.

    The first process waits until somebody opens the FIFO to read, writes one byte and executes its command; the FIFO
    is removed, as its presence means "created" (runc 1.0 to 1.2, libcontainer/container_linux.go: exec,
    readFromExecFifo; standard_init_linux.go).
    """
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    with ExitStack() as stack:
        try:
            # The process first: once the FIFO is open its command runs, and may have ended at once.
            pidfd = os.pidfd_open(created.pid if created is not None else 0)
            stack.callback(os.close, pidfd)
            fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, fd)
        except OSError as error:
            raise _not_started(id, error.strerror) from error
        for one in (fd, pidfd):
            loop.add_reader(one, readable.set)
            stack.callback(loop.remove_reader, one)
        try:
            async with asyncio.timeout(processes.COMMAND_TIMEOUT_S):
                await readable.wait()
        except TimeoutError:
            raise _not_started(id, f"nothing came in {processes.COMMAND_TIMEOUT_S:.0f} s") from None
        try:
            data = os.read(fd, 16)
        except BlockingIOError:
            data = b""
        if not data:
            raise _not_started(id, "its first process has ended")
        fifo.unlink(missing_ok=True)


def _not_started(id: str, why: str | None) -> FalError:
    return driver_failed(f"start of container {id} failed: {why}", remedy="Look at the container's log.")
