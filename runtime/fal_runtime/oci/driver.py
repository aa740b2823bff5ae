"""The oci driver: containers by runc or crun under conmon, isolated.

Invariant: a container, its log and its exit code depend on conmon and files only, never on the process that holds this
object; a new object on the same state directory takes everything back. What the object keeps in memory (the probe's
result, user namespaces, the copy of /etc) can be found again. Called by fal-agent through `driver.Driver`.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

from fal_contract.clock import Clock, SystemClock
from fal_contract.errors import FalError, invalid
from fal_runtime import host_image, models_dir, socket_dir
from fal_runtime.driver import (
    MODELS_DIR_INSIDE,
    Capabilities,
    ContainerSpec,
    ContainerStatus,
    LogLine,
    Phase,
    check_spec,
    driver_failed,
    unknown_container,
)
from fal_runtime.log_file import read_log
from fal_runtime.oci import cgroups, conmon, probe, rootfs
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.record import ContainerFiles, Record, alive, boot_id
from fal_runtime.oci.spec import HostLayout, build
from fal_runtime.oci.userns import UsernsCache
from fal_runtime.uid_ranges import RANGE_IDS, UidRanges
from fal_runtime.watch import Watcher

RUN_DIR: Final = Path("/run/falctl")
COMMAND_TIMEOUT_S: Final = 30.0
EXIT_TIMEOUT_S: Final = 30.0  # from SIGKILL to conmon's word
CONMON_END_TIMEOUT_S: Final = 5.0


class OciDriver:
    """See the module's docstring.

    `state_dir` keeps records, logs and exit codes; `run_dir` (on a path that everybody may search: the mapped root of a
    user namespace walks it) keeps mounts and the runtime's state until the next boot. `mode` forces what the probe
    would choose. The command is process 1 of its container: the kernel gives it only signals that it handles, so `stop`
    takes the whole grace when it does not handle SIGTERM.
    """

    name: Final = "oci"
    isolates: Final = True

    def __init__(
        self, state_dir: Path, *, run_dir: Path = RUN_DIR, clock: Clock | None = None, mode: Mode | None = None
    ) -> None:
        self._containers = state_dir / "containers"
        self._containers.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Agents of one machine share run_dir and the cgroup tree; their state directory tells them apart.
        self._scope = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:8]
        self._run = run_dir / self._scope
        self._ranges = UidRanges(run_dir / "uid_ranges.json")
        self._runtime_root = self._run / "runtime"
        self._clock: Clock = clock or SystemClock()
        self._watcher = Watcher()
        self._userns = UsernsCache(RANGE_IDS)
        self._layout = host_image.this_layout()
        self._forced = mode
        self._mode: Mode | None = mode
        self._probing = asyncio.Lock()
        self._etc: Path | None = None

    async def probe(self) -> Capabilities:
        async with self._probing:
            return await self._probe()

    async def _probe(self) -> Capabilities:
        mode, capabilities = await probe.find(self._run_once, self._userns, self._run)
        self._mode = self._forced or mode
        return capabilities

    async def _mode_here(self) -> Mode:
        """The forced or probed mode; probes once, however many ask."""
        async with self._probing:
            if self._mode is None:
                await self._probe()
            assert self._mode is not None
            return self._mode

    async def _run_once(self, mode: Mode, spec: ContainerSpec) -> int | None:
        """The exit code of a container made in `mode`; leaves nothing."""
        files = ContainerFiles(self._containers / spec.id)
        try:
            await self._create(spec, files, mode)
            await self.start(spec.id)
            return (await self.wait(spec.id)).exit_code
        finally:
            await self.remove(spec.id)

    async def create(self, spec: ContainerSpec) -> None:
        check_spec(spec)
        _check_supported(spec)
        files = ContainerFiles(self._containers / spec.id)
        if files.created() is not None:
            return
        if files.directory.exists():  # a creation that was interrupted
            await self.remove(spec.id)
        mode = await self._mode_here()
        making = asyncio.create_task(self._create(spec, files, mode))
        try:
            await asyncio.shield(making)
        except BaseException:
            # A creation is never cut in two: conmon and the runtime finish (in bounded time), then all is taken away.
            await asyncio.wait({making})
            with contextlib.suppress(FalError):
                await asyncio.shield(self.remove(spec.id))
            raise

    async def _create(self, spec: ContainerSpec, files: ContainerFiles, mode: Mode) -> None:
        uid_start = spec.uid_range_start
        if uid_start is None:
            files.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            uid_start = self._ranges.allocate(files.directory)
        run_dir = self._run / spec.id
        self._run.mkdir(parents=True, exist_ok=True, mode=0o711)
        etc = self._etc = self._etc or host_image.make_etc(self._run)
        skeleton = host_image.make_skeleton(self._run, self._layout, rootfs.extra_mount_points(spec, self._layout))
        cgroup_path = f"/{socket_dir.CGROUP_PARENT}/{socket_dir.cgroup_name(self._scope, spec.id)}"
        record = Record(
            id=spec.id,
            runtime=mode.program,
            run_dir=str(run_dir),
            cgroup_path=cgroup_path,
            uid_start=uid_start,
            user_namespace=mode.user_namespace,
            etc=str(etc),
            skeleton=str(skeleton),
            socket_dir=str(spec.socket_dir or ""),
            models_dir=str(spec.models_dir or ""),
        )
        files.make(record)
        userns_fd = await self._userns.get(uid_start) if mode.user_namespace else None
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        rootfs.assemble(run_dir, spec, self._layout, skeleton, etc, userns_fd=userns_fd)
        if spec.socket_dir is not None:
            socket_dir.create(spec.socket_dir, owner_uid=uid_start)
        if spec.models_dir is not None:
            models_dir.create(spec.models_dir)
        host = HostLayout(
            rootfs=run_dir / "rootfs",
            cgroup_path=cgroup_path,
            uid_start=uid_start,
            uid_count=RANGE_IDS,
            user_namespace=mode.user_namespace,
            cgroup_v2=cgroups.mode() == "v2",
            open_files_max=_open_files_max(),
            env=self._layout.env,
            binds=rootfs.binds(run_dir, spec),
            devices=rootfs.devices(spec.gpu_devices),
        )
        paths = files.paths()
        (paths.bundle / "config.json").write_text(json.dumps(build(spec, host)))
        pid = await conmon.create(spec.id, self._runtime(mode.program), paths, spec.log_bytes_max)
        files.mark_created(pid)

    async def start(self, id: str) -> None:
        files = self._files(id)
        record = files.record()
        if record is None or self._status(id).phase is not Phase.CREATED:
            return
        files.mark_started(self._clock.wall_s())
        try:
            await self._run_command(self._runtime(record.runtime).command("start", id), f"start of container {id}")
        except FalError:
            await self.kill(id)
            raise

    async def status(self, id: str) -> ContainerStatus | None:
        return ContainerFiles(self._containers / id).status(self._runtime_root)

    async def list(self) -> builtins.list[ContainerStatus]:
        paths = [path for path in sorted(self._containers.iterdir()) if not path.name.startswith(probe.ID_PREFIX)]
        found = [ContainerFiles(path).status(self._runtime_root) for path in paths]
        return [status for status in found if status is not None]

    async def wait(self, id: str) -> ContainerStatus:
        files = self._files(id)
        created = files.created()
        watched = (created.conmon, created.pid) if created is not None else ()
        with self._watcher.subscribe(files.paths().exits, watched) as subscription:
            while (status := self._status(id)).phase is not Phase.EXITED:
                await subscription.changed()
            return status

    async def stop(self, id: str, *, grace_s: float) -> ContainerStatus:
        if self._status(id).phase is Phase.RUNNING:
            self._signal(id, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    return await self.wait(id)
        return await self.kill(id)

    async def kill(self, id: str) -> ContainerStatus:
        status = self._status(id)
        if status.phase is Phase.EXITED:
            return status
        self._signal(id, signal.SIGKILL)
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                return await self.wait(id)
        except TimeoutError:
            raise driver_failed(
                f"container {id} (pid {status.pid}) did not end within {EXIT_TIMEOUT_S:.0f} s of SIGKILL",
                remedy="It waits in the kernel; look at /proc/PID/stack.",
            ) from None

    async def remove(self, id: str) -> None:
        files = ContainerFiles(self._containers / id)
        if not files.directory.exists():
            return
        created, record = files.created(), files.record()
        if created is not None and created.boot == boot_id():
            await self.kill(id)
        if record is not None:
            with contextlib.suppress(FalError):  # what the runtime leaves, or never made, goes below
                runtime = self._runtime(record.runtime)
                await self._run_command(runtime.command("delete", "--force", id), f"removal of container {id}")
            if created is not None and created.boot == boot_id():
                await _end_of(created.conmon, created.conmon_ticks)
        await asyncio.to_thread(self._take_away, files, record)

    def _take_away(self, files: ContainerFiles, record: Record | None) -> None:
        """Everything of a dead container; takes tens of milliseconds of system calls, so not on the loop."""
        if record is not None:
            cgroups.remove(record.cgroup_path)
            shutil.rmtree(self._runtime_root / record.id, ignore_errors=True)
            rootfs.dismantle(Path(record.run_dir))
            if record.socket_dir:
                socket_dir.remove(Path(record.socket_dir))
            if record.models_dir:
                models_dir.remove(Path(record.models_dir))
        self._ranges.release(files.directory)
        shutil.rmtree(files.directory)

    async def logs(self, id: str, *, tail_lines: int, follow: bool) -> AsyncGenerator[LogLine, None]:
        log = self._files(id).paths().log

        async def ended() -> bool:
            status = await self.status(id)
            return status is None or status.phase is Phase.EXITED

        async for line in read_log(log, self._watcher, ended, tail_lines=tail_lines, follow=follow):
            yield line

    async def attach_model(self, id: str, name: str, source: Path) -> str:
        record = self._record_with_models(id)
        userns_fd = await self._userns.get(record.uid_start) if record.user_namespace else None
        models_dir.attach_model(Path(record.models_dir), name, source, userns_fd=userns_fd)
        return f"{MODELS_DIR_INSIDE}/{name}"

    async def detach_model(self, id: str, name: str) -> None:
        models_dir.detach_model(Path(self._record_with_models(id).models_dir), name)

    def inside(self, spec: ContainerSpec, target: str) -> str:
        return target

    async def clean(self, keep: frozenset[str]) -> builtins.list[str]:
        words = []
        for directory in sorted(self._containers.iterdir()):
            if directory.name not in keep or ContainerFiles(directory).created() is None:
                await self.remove(directory.name)
                words.append(f"container {directory.name}")
        known = {path.name for path in self._containers.iterdir()}
        records = [ContainerFiles(self._containers / id).record() for id in known]
        used = {path for record in records if record is not None for path in (record.etc, record.skeleton)}
        for path in sorted(self._run.iterdir()) if self._run.exists() else ():
            if path.name in known or path == self._runtime_root or path == self._etc or str(path) in used:
                continue
            rootfs.dismantle(path)
            if not path.name.startswith(("etc-", "skeleton-")):  # copies that nobody uses any more are no leftovers
                words.append(f"run directory {path.name}")
        for name in cgroups.below(f"/{socket_dir.CGROUP_PARENT}"):
            scope, _dot, id = name.partition(".")
            if scope == self._scope and id not in known:
                cgroups.remove(f"/{socket_dir.CGROUP_PARENT}/{name}")
                words.append(f"cgroup {name}")
        if not known:
            shutil.rmtree(self._run, ignore_errors=True)
            self._etc = None
        return words

    def close(self) -> None:
        """Close descriptors; containers run on."""
        self._userns.close()

    def _runtime(self, program: str) -> conmon.Runtime:
        return conmon.Runtime(program, self._runtime_root)

    def _files(self, id: str) -> ContainerFiles:
        files = ContainerFiles(self._containers / id)
        if files.created() is None:
            raise unknown_container(id)
        return files

    def _status(self, id: str) -> ContainerStatus:
        status = ContainerFiles(self._containers / id).status(self._runtime_root)
        if status is None:
            raise unknown_container(id)
        return status

    def _record_with_models(self, id: str) -> Record:
        record = self._files(id).record()
        if record is None or not record.models_dir:
            raise driver_failed(f"container {id} has no models directory", remedy="Create it with `models_dir`.")
        return record

    def _signal(self, id: str, signum: signal.Signals) -> None:
        created = self._files(id).created()
        assert created is not None
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(created.pid)
            try:
                # Checked with the descriptor in hand: the pid cannot change its owner in between.
                if alive(created.pid, created.pid_ticks):
                    signal.pidfd_send_signal(pidfd, signum)
            finally:
                os.close(pidfd)

    @staticmethod
    async def _run_command(command: tuple[str, ...], what: str) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise driver_failed(f"{what} failed: {command[0]}: {error.strerror}", remedy="Install it.") from error
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                _out, said = await process.communicate()
        except TimeoutError:
            raise driver_failed(f"{what} took more than {COMMAND_TIMEOUT_S:.0f} s", remedy="Try again.") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            message = said.decode("utf-8", "replace").strip() or f"exit code {process.returncode}"
            raise driver_failed(f"{what} failed: {message}", remedy="Look at the container's log.")


def _check_supported(spec: ContainerSpec) -> None:
    if spec.image is not None:
        raise invalid("image", spec.image.id, "is not supported by this driver yet", remedy='Use "host".')
    if spec.network == "egress":
        raise invalid("network", spec.network, "is not supported by this driver yet", remedy='Use "none" or "host".')


def _open_files_max() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard


async def _end_of(pid: int, ticks: int) -> None:
    """Wait until conmon has gone, so that it cannot write into what is removed; kill it if it lingers."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(pidfd, gone.set)
        try:
            if alive(pid, ticks):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CONMON_END_TIMEOUT_S):
                        await gone.wait()
                        return
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
