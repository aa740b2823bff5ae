"""The process driver: runs containers' commands as plain processes, for laptops and machines without root.

It does NOT isolate, and says so: a process sees the node's files, network and other processes, and CPU, memory and pids
are not limited. Invariant: everything about a container lies in files of its directory (see process_supervisor), so a
new driver object on the same state directory knows as much as the old one. Called by fal-agent through `driver.Driver`.

    STATE/containers/ID/   spec.json, pids.json, exit.json, log, log.1
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fal_contract.clock import Clock, SystemClock
from fal_contract.errors import invalid
from fal_runtime import endings, process_exec, secrets_dir, socket_dir
from fal_runtime.container_use import ContainerUse
from fal_runtime.driver import (
    MODELS_DIR_ENV,
    MODELS_DIR_INSIDE,
    SECRETS_DIR_ENV,
    SECRETS_DIR_INSIDE,
    SOCKET_DIR_ENV,
    SOCKET_DIR_INSIDE,
    Capabilities,
    ContainerSpec,
    ContainerStatus,
    Image,
    LogLine,
    Phase,
    Prepared,
    check_model_name,
    check_spec,
    driver_failed,
    not_running,
    unknown_container,
)
from fal_runtime.ended_logs import EndedLogs
from fal_runtime.exec_session import ExecSession, Terminal
from fal_runtime.log_file import read_log
from fal_runtime.process_supervisor import start_ticks, write_whole
from fal_runtime.watch import Watcher

_SUPERVISOR: Final = Path(__file__).with_name("process_supervisor.py")
START_TIMEOUT_S: Final = 30.0
EXIT_TIMEOUT_S: Final = 30.0  # from SIGKILL to the exit file
_LOG_LOST: Final = "log and exit code lost: its supervisor died"
_PASSED_ENV: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")


@dataclass(frozen=True, slots=True)
class _Process:
    """A process as its files name it; `alive` is false when the pid is gone or belongs to another process."""

    pid: int
    ticks: int

    def alive(self) -> bool:
        if self.pid <= 0 or start_ticks(self.pid) != self.ticks:
            return False
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False


class ProcessDriver:
    """See the module's docstring."""

    name: Final = "process"
    isolates: Final = False

    def __init__(self, state_dir: Path, *, clock: Clock | None = None) -> None:
        self._root = state_dir / "containers"
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._clock: Clock = clock or SystemClock()
        self._watcher = Watcher()
        self._ended = EndedLogs(state_dir)

    async def probe(self) -> Capabilities:
        return Capabilities(
            driver=self.name,
            isolates=False,
            runtime=f"processes of Python {sys.version.split()[0]}",
            user_namespaces=False,
            idmapped_mounts=False,
            cgroup="none",
            seccomp=False,
            nosymfollow=False,
            details=MappingProxyType(
                {
                    "isolation": "none: a container sees the files, network and processes of this machine",
                    "limits": "open files only; CPU, memory and pids are not limited",
                    "secrets": "in memory, yet every process of this user can read them",
                    "image": "none: every container runs this machine's programs",
                }
            ),
        )

    async def prepare(self, wanted: Sequence[Prepared]) -> None:
        pass  # a process starts in milliseconds

    async def create(self, spec: ContainerSpec) -> None:
        check_spec(spec)
        if spec.image is not None:
            raise invalid(
                "image",
                spec.image.id,
                "needs a driver that isolates; this node's runs this machine's own programs",
                remedy='Use image = "host", or nodes with the oci driver.',
            )
        directory = self._root / spec.id
        if (directory / "spec.json").exists():
            return
        directory.mkdir(exist_ok=True, mode=0o700)
        env = {name: os.environ[name] for name in _PASSED_ENV if name in os.environ} | dict(spec.env)
        if spec.socket_dir is not None:
            socket_dir.create_plain(spec.socket_dir)
            env[SOCKET_DIR_ENV] = str(spec.socket_dir)
        if spec.models_dir is not None:
            spec.models_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            env[MODELS_DIR_ENV] = str(spec.models_dir)
        if spec.secrets:
            place = secrets_dir.plain_path(directory)
            secrets_dir.create_plain(place, spec.secrets)
            env[SECRETS_DIR_ENV] = str(place)
        write_whole(
            directory / "spec.json",
            {
                "argv": list(spec.command),
                "env": env,
                "cwd": "/",
                "log_bytes_max": spec.log_bytes_max,
                "open_files_max": spec.resources.open_files_max,
                "socket_dir": str(spec.socket_dir or ""),
                "models_dir": str(spec.models_dir or ""),
            },
        )

    async def start(self, id: str) -> None:
        status = self._status(self._directory(id))
        if status.phase is not Phase.CREATED:
            return
        command = (sys.executable, "-I", "-S", str(_SUPERVISOR), str(self._root / id))
        starter = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                _out, error = await starter.communicate()
        except TimeoutError:
            starter.kill()
            await starter.wait()
            raise driver_failed(
                f"container {id} did not start within {START_TIMEOUT_S:.0f} s", remedy="Look at the machine's load."
            ) from None
        if starter.returncode:
            raise driver_failed(
                f"container {id} did not start: {error.decode('utf-8', 'replace').strip()}",
                remedy="Check that the command exists and can be executed.",
            )

    async def status(self, id: str) -> ContainerStatus | None:
        directory = self._root / id
        return self._status(directory) if (directory / "spec.json").exists() else None

    async def list(self) -> builtins.list[ContainerStatus]:
        return [self._status(path.parent) for path in sorted(self._root.glob("*/spec.json"))]

    async def wait(self, id: str) -> ContainerStatus:
        directory = self._directory(id)
        pids = _read(directory / "pids.json")
        watched = (pids["supervisor"][0], pids["child"][0]) if pids else ()
        with self._watcher.subscribe(directory, watched) as subscription:
            while True:
                status = self._status(self._directory(id))
                if status.phase is Phase.EXITED:
                    return status
                await subscription.changed()

    async def stop(self, id: str, *, grace_s: float) -> ContainerStatus:
        directory = self._directory(id)
        if self._status(directory).phase is Phase.RUNNING:
            _tell(directory, "SIGTERM", grace_s)
            self._signal(directory, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    return await self.wait(id)
        return await self.kill(id)

    async def kill(self, id: str) -> ContainerStatus:
        directory = self._directory(id)
        status = self._status(directory)
        if status.phase is Phase.CREATED:
            exit = {"exit_code": 137, "finished_at_s": self._clock.wall_s(), "reason": "killed before it started"}
            write_whole(directory / "exit.json", exit)
        elif status.phase is Phase.RUNNING:
            _tell(directory, "SIGKILL")
            self._signal(directory, signal.SIGKILL)
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                return await self.wait(id)
        except TimeoutError:
            raise driver_failed(
                f"container {id} (pid {status.pid}) did not end within {EXIT_TIMEOUT_S:.0f} s of SIGKILL",
                remedy="It waits in the kernel; look at /proc/PID/stack.",
            ) from None

    async def remove(self, id: str) -> None:
        directory = self._root / id
        if not directory.exists():
            return
        if (directory / "spec.json").exists():
            await self.kill(id)
            spec = _read(directory / "spec.json")
            if spec.get("socket_dir"):
                socket_dir.remove(Path(spec["socket_dir"]))
            if spec.get("models_dir"):
                shutil.rmtree(spec["models_dir"], ignore_errors=True)
            self._ended.keep(id, directory / "log", self._clock.wall_s())
        secrets_dir.remove_plain(directory)
        shutil.rmtree(directory)

    async def logs(
        self, id: str, *, tail_lines: int, follow: bool, since_s: float = 0.0
    ) -> AsyncGenerator[LogLine, None]:
        log = self._root / id / "log" if (self._root / id / "spec.json").exists() else self._ended.find(id)
        if log is None:
            raise unknown_container(id)

        async def ended() -> bool:
            status = await self.status(id)
            return status is None or status.phase is Phase.EXITED

        lines = read_log(log, self._watcher, ended, tail_lines=tail_lines, follow=follow, since_s=since_s)
        async for line in lines:
            yield line

    async def exec(self, id: str, command: tuple[str, ...], *, terminal: Terminal | None = None) -> ExecSession:
        directory = self._directory(id)
        status = self._status(directory)
        if status.phase is not Phase.RUNNING:
            raise not_running(id, status)
        spec = _read(directory / "spec.json")
        return await process_exec.open_exec(id, directory, status.pid or 0, spec["env"], command, terminal)

    async def top(self, id: str) -> ContainerUse:
        pids = _read(self._directory(id) / "pids.json")
        child = _Process(*pids["child"]) if pids else _Process(0, 0)
        roots = (child.pid,) if child.alive() else ()
        return await asyncio.to_thread(process_exec.use, roots, self._clock.wall_s())

    async def attach_model(self, id: str, name: str, source: Path) -> str:
        models = self._models_dir(id)
        link = models / check_model_name(name)
        fresh = models / f".{name}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(source.resolve(), target_is_directory=True)
        fresh.rename(link)
        return str(link)

    async def detach_model(self, id: str, name: str) -> None:
        (self._models_dir(id) / check_model_name(name)).unlink(missing_ok=True)

    async def image_finished(self, image: Image) -> None:
        """Nothing: there are no images here."""

    def inside(self, spec: ContainerSpec, target: str) -> str:
        places = [(mount.target, str(mount.source)) for mount in spec.mounts]
        if spec.socket_dir is not None:
            places.append((SOCKET_DIR_INSIDE, str(spec.socket_dir)))
        if spec.models_dir is not None:
            places.append((MODELS_DIR_INSIDE, str(spec.models_dir)))
        if spec.secrets:
            places.append((SECRETS_DIR_INSIDE, str(secrets_dir.plain_path(self._root / spec.id))))
        for place, source in sorted(places, reverse=True):  # the longest prefix first
            if target == place or target.startswith(place.rstrip("/") + "/"):
                return source + target[len(place.rstrip("/")) :]
        return target

    async def clean(self, keep: frozenset[str]) -> builtins.list[str]:
        removed = []
        for directory in sorted(self._root.iterdir()):
            if directory.name not in keep:
                await self.remove(directory.name)
                removed.append(f"container {directory.name}")
        self._ended.trim(self._clock.wall_s())
        return removed

    def _directory(self, id: str) -> Path:
        directory = self._root / id
        if not (directory / "spec.json").exists():
            raise unknown_container(id)
        return directory

    def _models_dir(self, id: str) -> Path:
        models = _read(self._directory(id) / "spec.json").get("models_dir")
        if not models:
            raise driver_failed(f"container {id} has no models directory", remedy="Create it with `models_dir`.")
        return Path(models)

    def _status(self, directory: Path) -> ContainerStatus:
        id = directory.name
        # exit.json last written, so first read: a container seen without it may have ended since, never the reverse.
        ended, pids = _read(directory / "exit.json"), _read(directory / "pids.json")
        started_at_s = pids.get("started_at_s")
        if ended:
            code = ended["exit_code"]
            asked = _read(directory / "told.json")
            told = endings.Told(tuple(asked.get("signals", ())), asked.get("grace_s", 0.0))
            reason = ended["reason"] or endings.reason(code, told=told)
            return ContainerStatus(
                id, Phase.EXITED, None, started_at_s, ended["finished_at_s"], code, oom_killed=False, reason=reason
            )
        if not pids:
            return ContainerStatus(id, Phase.CREATED)
        child, supervisor = _Process(*pids["child"]), _Process(*pids["supervisor"])
        if supervisor.alive():
            return ContainerStatus(id, Phase.RUNNING, child.pid, started_at_s)
        if child.alive():
            return ContainerStatus(id, Phase.RUNNING, child.pid, started_at_s, reason=_LOG_LOST)
        if (directory / "exit.json").exists():  # written between the two looks
            return self._status(directory)
        return ContainerStatus(id, Phase.EXITED, None, started_at_s, reason=_LOG_LOST)

    def _signal(self, directory: Path, signum: signal.Signals) -> None:
        child = _Process(*_read(directory / "pids.json")["child"])
        if child.alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signum)


def _tell(directory: Path, signal_name: str, grace_s: float = 0.0) -> None:
    """Remember that we are about to send this signal. Best effort: a full disk must not keep it alive."""
    with contextlib.suppress(OSError):
        told = _read(directory / "told.json")
        signals = [*told.get("signals", ()), signal_name]
        write_whole(directory / "told.json", {"signals": signals, "grace_s": told.get("grace_s", grace_s)})


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no file."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return value
