"""The oci driver: containers by runc or crun under conmon, isolated.

Invariant: a container, its log and its exit code depend on conmon and files only, never on the process that holds this
object; a new object on the same state directory takes everything back. What the object keeps in memory (the probe's
result, user namespaces, the copy of /etc) can be found again. Called by fal-agent through `driver.Driver`.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Final

from fal_contract.clock import Clock, SystemClock
from fal_contract.errors import FalError
from fal_runtime import models_dir
from fal_runtime.cdi.reader import DIRECTORIES
from fal_runtime.container_use import ContainerUse
from fal_runtime.driver import (
    MODELS_DIR_INSIDE,
    Capabilities,
    ContainerSpec,
    ContainerStatus,
    Image,
    LogLine,
    Phase,
    Prepared,
    driver_failed,
    not_made,
    not_running,
    unknown_container,
)
from fal_runtime.ended_logs import EndedLogs
from fal_runtime.exec_session import ExecSession, Terminal
from fal_runtime.log_file import read_log
from fal_runtime.network.egress import Settings as EgressSettings
from fal_runtime.oci import leftovers, prepared, probe, processes, start, top
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.exec import open_exec
from fal_runtime.oci.place import Place
from fal_runtime.oci.record import ContainerFiles, EndUnread, Record, boot_id
from fal_runtime.oci.rotation import Rotations
from fal_runtime.watch import Watcher

RUN_DIR: Final = Path("/run/falctl")
MAKING_PER_CPU: Final = 2
EXIT_TIMEOUT_S: Final = 30.0  # from SIGKILL to conmon's word


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
        self,
        state_dir: Path,
        *,
        run_dir: Path = RUN_DIR,
        clock: Clock | None = None,
        mode: Mode | None = None,
        egress: EgressSettings = EgressSettings(),
        cdi: Sequence[Path] = DIRECTORIES,
    ) -> None:
        self._place = Place(state_dir, run_dir, egress, cdi)
        self._pool = prepared.Pool(self._place)
        self._containers, self._run = self._place.containers, self._place.run
        self._clock: Clock = clock or SystemClock()
        self._watcher = Watcher()
        self._ended = EndedLogs(state_dir)
        self._rotations = Rotations()
        self._forced = mode
        self._mode: Mode | None = mode
        self._probing = asyncio.Lock()
        # More at once make each slower, and none sooner: what they wait for is the CPU and the kernel's cgroup lock.
        self._making = asyncio.Semaphore(MAKING_PER_CPU * (os.cpu_count() or 1))

    async def probe(self) -> Capabilities:
        async with self._probing:
            return await probe.with_features(await self._probe(), self._place)

    async def _probe(self) -> Capabilities:
        mode, capabilities = await probe.find(self._run_once, self._place.userns, self._run)
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
        try:
            await start.create(self._place, spec, mode)
            await self.start(spec.id)
            return (await self.wait(spec.id)).exit_code
        finally:
            await self.remove(spec.id)

    async def prepare(self, wanted: Sequence[Prepared]) -> None:
        await self._pool.prepare(wanted, await self._mode_here())

    async def _make(self, spec: ContainerSpec, mode: Mode) -> None:
        if not await self._pool.claim(spec):
            async with self._making:
                await start.create(self._place, spec, mode)

    async def create(self, spec: ContainerSpec) -> None:
        start.check(spec)
        files = ContainerFiles(self._containers / spec.id)
        if files.created() is not None:
            return
        if files.directory.exists():  # a creation that was interrupted
            await self.remove(spec.id)
        mode = await self._mode_here()
        making = asyncio.create_task(self._make(spec, mode))
        try:
            await asyncio.shield(making)
            self._rotations.watch(files.paths().log)
        except BaseException as error:
            # A creation is never cut in two: conmon and the runtime finish (in bounded time), then all is taken away.
            await asyncio.wait({making})
            with contextlib.suppress(FalError, OSError):
                await asyncio.shield(self.remove(spec.id))
            if isinstance(error, OSError):
                raise not_made(spec.id, error) from error
            raise

    async def start(self, id: str) -> None:
        files = self._files(id)
        record = files.record()
        if record is None or (await self._status(id)).phase is not Phase.CREATED:
            return
        try:
            files.mark_started(self._clock.wall_s())
            if record.fifo:
                await prepared.tell(id, files, record)
            else:
                await start.start(self._place, files, record)
        except FalError:
            await self.kill(id)
            raise

    async def status(self, id: str) -> ContainerStatus | None:
        files = ContainerFiles(self._containers / id)
        try:
            return files.status(self._place.runtime_root, may_end=False)
        except EndUnread:  # the kernel's whole message buffer may be read for it
            pass
        try:
            return await asyncio.to_thread(files.status, self._place.runtime_root)
        except FileNotFoundError:  # removed meanwhile
            return None

    async def list(self) -> builtins.list[ContainerStatus]:
        paths = [path for path in sorted(self._containers.iterdir()) if not path.name.startswith(probe.ID_PREFIX)]
        found = [await self.status(path.name) for path in paths]
        for status in found:
            if status is not None and status.phase is not Phase.EXITED:
                self._rotations.watch(self._files(status.id).paths().log)
        return [status for status in found if status is not None]

    async def wait(self, id: str) -> ContainerStatus:
        files = self._files(id)
        created = files.created()
        watched = (created.conmon, created.pid) if created is not None else ()
        with self._watcher.subscribe(files.paths().exits, watched) as subscription:
            while (status := await self._status(id)).phase is not Phase.EXITED:
                await subscription.changed()
            return status

    async def stop(self, id: str, *, grace_s: float) -> ContainerStatus:
        if (await self._status(id)).phase is Phase.RUNNING:
            self._files(id).mark_told("SIGTERM", grace_s)
            self._signal(id, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    return await self.wait(id)
        return await self.kill(id)

    async def kill(self, id: str) -> ContainerStatus:
        status = await self._status(id)
        if status.phase is Phase.EXITED:
            return status
        self._files(id).mark_told("SIGKILL")
        self._signal(id, signal.SIGKILL)
        try:
            record = self._files(id).record()
            image = record.image if record is not None else ""
            async with asyncio.timeout(EXIT_TIMEOUT_S), self._place.images.unstuck(image, id):
                return await self.wait(id)
        except TimeoutError:
            raise driver_failed(
                f"container {id} (pid {status.pid}) did not end within {EXIT_TIMEOUT_S:.0f} s of SIGKILL",
                remedy="It waits in the kernel; look at /proc/PID/stack.",
            ) from None

    async def remove(self, id: str) -> None:
        files = ContainerFiles(self._containers / id)
        if not files.directory.exists():
            files.directory.unlink(missing_ok=True)  # the link of one that was made ahead goes last
            return
        created, record = files.created(), files.record()
        if created is not None and created.boot == boot_id():
            await self.kill(id)
        if record is not None:
            with contextlib.suppress(FalError):  # what the runtime leaves, or never made, goes below
                runtime = self._place.runtime(record.runtime)
                await processes.run_command(
                    runtime.command("delete", "--force", record.id), f"removal of container {id}"
                )
            if created is not None and created.boot == boot_id():
                await processes.end_of(created.conmon, created.conmon_ticks)
        self._rotations.drop(files.paths().log)
        if not id.startswith(probe.ID_PREFIX):
            await asyncio.to_thread(self._ended.keep, id, files.paths().log, self._clock.wall_s())
        await asyncio.to_thread(leftovers.take_away, self._place, files, record)
        if record is not None and record.image:
            self._place.images.let_go(record.image)

    async def logs(
        self, id: str, *, tail_lines: int, follow: bool, since_s: float = 0.0
    ) -> AsyncGenerator[LogLine, None]:
        files = ContainerFiles(self._containers / id)
        log = files.paths().log if files.created() is not None else self._ended.find(id)
        if log is None:
            raise unknown_container(id)

        async def ended() -> bool:
            status = await self.status(id)
            return status is None or status.phase is Phase.EXITED

        lines = read_log(log, self._watcher, ended, tail_lines=tail_lines, follow=follow, since_s=since_s)
        async for line in lines:
            yield line

    async def exec(self, id: str, command: tuple[str, ...], *, terminal: Terminal | None = None) -> ExecSession:
        status, record = await self._status(id), self._files(id).record()
        if status.phase is not Phase.RUNNING or record is None:
            raise not_running(id, status)
        return await open_exec(self._files(id), self._place.runtime(record.runtime), command, terminal)

    async def top(self, id: str) -> ContainerUse:
        record = self._files(id).record()
        if record is None:
            raise unknown_container(id)
        return await asyncio.to_thread(top.use, record, self._clock.wall_s())

    async def attach_model(self, id: str, name: str, source: Path) -> str:
        record = self._record_with_models(id)
        userns_fd = await self._place.userns.get(record.uid_start) if record.user_namespace else None
        models_dir.attach_model(Path(record.models_dir), name, source, userns_fd=userns_fd)
        return f"{MODELS_DIR_INSIDE}/{name}"

    async def detach_model(self, id: str, name: str) -> None:
        models_dir.detach_model(Path(self._record_with_models(id).models_dir), name)

    async def image_finished(self, image: Image) -> None:
        await self._place.images.finished(image)

    def inside(self, spec: ContainerSpec, target: str) -> str:
        return target

    async def clean(self, keep: frozenset[str]) -> builtins.list[str]:
        words = []
        for directory in sorted(self._containers.iterdir()):
            if directory.name not in keep or ContainerFiles(directory).created() is None:
                await self.remove(directory.name)
                words.append(f"container {directory.name}")
        words += await self._pool.clean()
        words += await self._place.images.clean()
        words += await asyncio.to_thread(leftovers.sweep, self._place)
        await asyncio.to_thread(self._ended.trim, self._clock.wall_s())
        return words

    def close(self) -> None:
        """Close descriptors; containers run on."""
        self._rotations.close()
        self._place.images.close()
        self._place.userns.close()
        self._place.nursery.close()

    def _files(self, id: str) -> ContainerFiles:
        files = ContainerFiles(self._containers / id)
        if files.created() is None:
            raise unknown_container(id)
        return files

    async def _status(self, id: str) -> ContainerStatus:
        status = await self.status(id)
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
        processes.send_signal(created.pid, created.pid_ticks, signum)
