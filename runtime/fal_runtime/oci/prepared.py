"""Containers that were made before anybody wanted them, and how one becomes the container that somebody wants.

A prepared container is created and started like any other, by the same code, but for its first process: a shell that
waits to read one message from a FIFO that only the host can write, or a worker without a model
(`ContainerSpec.warm_command`), to which the message is a file and the FIFO a bell. Binding it shows its socket
directory where the spec wants it and names it in STATE/containers by a link; starting it writes the message. It is used
once.

    STATE/prepared/POOL_ID   like STATE/containers/ID, and `go`, the message of a bound one
    RUN/SCOPE/POOL_ID        mounts, with the tmpfs of its socket and models directories, and bind/go, the FIFO, with
                             bind/message, what a warm worker was told

Invariant: the link is made last, so one that was claimed when the agent was killed is either a whole container or is
found unlinked and taken away. Which containers can be prepared is `fits`: nothing of their isolation may depend on who
they become. Called by the oci driver.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shlex
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fal_contract.errors import FalError
from fal_runtime import secrets_dir, socket_dir
from fal_runtime.driver import MESSAGE_FIFO_INSIDE, ContainerSpec, Prepared, driver_failed, message_beside
from fal_runtime.oci import leftovers, mounts, processes, start
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.inside import has_program
from fal_runtime.oci.place import Place
from fal_runtime.oci.record import ContainerFiles, Created, Record, alive
from fal_runtime.oci.spec import OOM_SCORE_ADJ, Bind, environment
from fal_runtime.process_supervisor import write_whole

ID_PREFIX: Final = "pool-"
BIND_DIR_INSIDE: Final = os.path.dirname(MESSAGE_FIFO_INSIDE)
GO_INSIDE: Final = MESSAGE_FIFO_INSIDE
WAITER: Final = ("/bin/sh", "-c", f". {GO_INSIDE}")
MESSAGE_BYTES_MAX: Final = 512 << 10  # fits into a pipe at once
READER_TIMEOUT_S: Final = 10.0  # until a waiter that was just made reads
DEATHS_MAX: Final = 3  # of warm workers of a shape while they wait: then it gets no more
SPARE_OOM_SCORE_ADJ: Final = 1000  # when memory is short, what nobody uses goes first
_READER_POLL_S: Final = 0.002
# Variables that a shell reads in a way of its own, or lets nobody set: another process is to find them as they are.
_SHELLS_OWN: Final = frozenset(
    (
        *("BASHOPTS", "BASHPID", "BASH_VERSINFO", "DIRSTACK", "EPOCHREALTIME", "EPOCHSECONDS", "EUID", "FUNCNAME"),
        *("GROUPS", "HISTCMD", "IFS", "LINENO", "OPTARG", "OPTIND", "PPID", "RANDOM", "SECONDS", "SHELLOPTS", "SHLVL"),
        *("SRANDOM", "UID", "_"),
    )
)
_SHAPE_PATH: Final = Path("/")
_SHAPE_SECRETS: Final = MappingProxyType({"none-yet": b""})


@dataclass(frozen=True, slots=True)
class _Ready:
    """One that waits. `shape` is `shape_of` the specs that it can become."""

    files: ContainerFiles
    shape: ContainerSpec
    created: Created


def fits(spec: ContainerSpec) -> bool:
    """Can containers of this shape be prepared?"""
    plain = spec.image is None and spec.network == "none" and spec.uid_range_start is None
    theirs = spec.mounts or spec.gpu_devices or spec.cdi or spec.privileges
    return plain and spec.socket_dir is not None and not theirs


def shape_of(spec: ContainerSpec, *, warm: bool) -> ContainerSpec:
    """The spec without what binding decides: specs of equal shapes can use the same prepared container."""
    return replace(
        spec,
        id="shape",
        command=("shape",),
        env=MappingProxyType({}),
        socket_dir=_SHAPE_PATH,
        models_dir=_SHAPE_PATH if spec.models_dir is not None else None,
        secrets=_SHAPE_SECRETS if spec.secrets else MappingProxyType({}),
        warm_command=spec.warm_command if warm else (),
    )


def listens(ready: _Ready) -> bool:
    """Has this warm worker loaded its libraries? Ringing without a message changes nothing (`worker.warm`)."""
    record = ready.files.record()
    with suppress(FalError):
        if record is not None and (fd := _opened(Path(record.fifo))) is not None:
            os.close(fd)
            return True
    return False


def message(spec: ContainerSpec, env: dict[str, str], *, warm: bool) -> bytes:
    """What the waiting process reads: a script for the shell, {"env", "argv"} for a warm worker."""
    if warm:
        return json.dumps({"env": env, "argv": list(spec.command)}).encode() + b"\n"
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(env.items()))
    return f"unset PWD OLDPWD\n{exports}exec {shlex.join(spec.command)}\n".encode()


class Pool:
    """What is ready, and what is wanted; see the module's docstring. Belongs to one event loop."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._folder = place.prepared
        self._ready: list[_Ready] = []
        self._died: list[ContainerSpec] = []  # shapes of those that ended while they waited, while they are wanted
        self._changing = asyncio.Lock()

    async def prepare(self, wanted: Sequence[Prepared], mode: Mode) -> None:
        """Have so many ready of each, and no others. DRIVER_FAILED when one cannot be made."""
        if mode.program and Path(mode.program).name != "runc":
            return
        try:
            async with self._changing:
                await self._prepare(wanted, mode)
        except OSError as error:  # a full disk
            what = f"a container was not made ahead: {error.filename or ''}: {error.strerror}"
            raise driver_failed(what, remedy="Look at the node's disk.") from error

    async def _prepare(self, wanted: Sequence[Prepared], mode: Mode) -> None:
        shapes = [(shape_of(one.spec, warm=one.warm), one.count) for one in wanted if fits(one.spec)]
        ended = [one for one in self._ready if not alive(one.created.pid, one.created.pid_ticks)]
        wished = [shape for shape, _ in shapes if shape.warm_command]
        self._died = [shape for shape in (*self._died, *(one.shape for one in ended)) if shape in wished]
        left = [self._possible(shape) for shape, count in shapes for _ in range(count)]
        surplus = []
        for ready in self._ready:
            if ready.shape in left and ready not in ended:
                left.remove(ready.shape)
            else:
                surplus.append(ready)
        for ready in surplus:
            if ready in self._ready:  # else it became somebody while another was taken away
                self._ready.remove(ready)
                await self._discard(ready.files)
        for shape in left:
            await self._add(shape, mode)

    def _possible(self, shape: ContainerSpec) -> ContainerSpec:
        """Without a worker where those end by themselves, such as where its libraries do not fit into the memory."""
        return replace(shape, warm_command=()) if self._died.count(shape) >= DEATHS_MAX else shape

    async def claim(self, spec: ContainerSpec) -> bool:
        """Make a prepared container become `spec`, not yet started; False when none fits, and nothing has changed."""
        if not fits(spec):
            return False
        for warm in (True, False):
            shape = shape_of(spec, warm=warm)
            if warm and not shape.warm_command:
                continue
            if not warm and not _SHELLS_OWN.isdisjoint(self._env(spec)):
                return False
            # One that still loads is no slower than a container that would have to load, too.
            for ready in sorted((r for r in self._ready if r.shape == shape), key=lambda r: warm and not listens(r)):
                if ready not in self._ready:  # it became somebody else while one before it was taken away
                    continue
                if not warm and not has_program(ready.created.pid, spec.command[0], self._env(spec).get("PATH", "")):
                    return False  # the cold way says what is missing
                self._ready.remove(ready)
                if await self._bound(ready, spec, warm=warm):
                    return True
        return False

    async def clean(self) -> list[str]:
        """Take away all that nobody's link names and we do not hold; returns what, in words."""
        async with self._changing:  # what is being made is not held yet
            return await self._clean()

    async def _clean(self) -> list[str]:
        held = {ready.files.id for ready in self._ready}
        bound = {Path(os.readlink(path)).name for path in self._place.containers.iterdir() if path.is_symlink()}
        words = []
        for directory in sorted(self._folder.iterdir()) if self._folder.exists() else ():
            if directory.name not in bound | held:
                await self._discard(ContainerFiles(directory))
                words.append(f"prepared container {directory.name}")
        return words

    def _env(self, spec: ContainerSpec) -> dict[str, str]:
        return environment(spec, self._place.layout.env)

    async def _add(self, shape: ContainerSpec, mode: Mode) -> None:
        id = f"{ID_PREFIX}{os.urandom(6).hex()}"
        files, run_dir = ContainerFiles(self._folder / id), self._place.run / id
        bind = run_dir / "bind"
        spec = replace(
            shape,
            id=id,
            command=shape.warm_command or WAITER,
            socket_dir=run_dir / "socket",
            models_dir=run_dir / "models" if shape.models_dir is not None else None,
        )
        more = Bind(bind, BIND_DIR_INSIDE, ("bind", "ro", "nosuid", "nodev", "noexec"))

        def make_fifo(uid_start: int) -> None:
            bind.mkdir(parents=True, exist_ok=True, mode=0o755)
            os.mkfifo(bind / "go", 0o400)
            os.chown(bind / "go", uid_start, uid_start)

        try:
            fifo = str(bind / "go")
            await start.create(self._place, spec, mode, start.Waiting(files, more, fifo, make_fifo))
            record, created = files.record(), files.created()
            assert record is not None
            assert created is not None
            await start.let_go(self._place, files, record)
        except BaseException:
            await asyncio.shield(self._discard(files))
            raise
        _oom_score_adj(created, SPARE_OOM_SCORE_ADJ)
        (files.directory / "ready").touch()  # for people and benchmarks; nothing here reads it
        self._ready.append(_Ready(files, shape, created))

    async def _bound(self, ready: _Ready, spec: ContainerSpec, *, warm: bool) -> bool:
        try:
            if alive(ready.created.pid, ready.created.pid_ticks):
                await asyncio.to_thread(self._bind, ready.files, spec, message(spec, self._env(spec), warm=warm))
                return True
        except (FalError, OSError):
            pass  # it is made the cold way, which says what is wrong if that fails, too
        await self._discard(ready.files)
        return False

    def _bind(self, files: ContainerFiles, spec: ContainerSpec, text: bytes) -> None:
        """A few dozen system calls, of which the last makes it the container."""
        record = files.record()
        assert record is not None
        assert spec.socket_dir is not None
        if len(text) > MESSAGE_BYTES_MAX:
            raise driver_failed(f"command and environment of {spec.id} are too long", remedy="Shorten them.")
        socket_dir.check_path(spec.socket_dir)
        write_whole(files.directory / "record.json", {**record.as_json(), "socket_dir": str(spec.socket_dir)})
        created = files.created()
        assert created is not None
        _oom_score_adj(created, OOM_SCORE_ADJ)
        config_file = files.paths().bundle / "config.json"
        config = json.loads(config_file.read_text())
        config["process"]["args"] = list(spec.command)  # `exec` reads it
        config["process"]["env"] = [f"{name}={value}" for name, value in sorted(self._env(spec).items())]
        write_whole(config_file, config)
        (files.directory / "go").write_bytes(text)
        if spec.secrets:
            secrets_dir.replace_all(Path(record.run_dir) / secrets_dir.FOLDER, spec.secrets, owner_uid=record.uid_start)
        spec.socket_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        tree_fd = mounts.open_tree(Path(record.run_dir) / "socket")  # with the mount's flags: nosymfollow and the rest
        try:
            mounts.move_mount(tree_fd, spec.socket_dir)
        finally:
            os.close(tree_fd)
        (self._place.containers / spec.id).symlink_to(Path("..") / self._folder.name / files.id)

    async def _discard(self, files: ContainerFiles) -> None:
        record, created = files.record(), files.created()
        if created is not None:
            processes.send_signal(created.pid, created.pid_ticks, signal.SIGKILL)
        if record is not None:
            with suppress(FalError):  # what the runtime leaves, or never made, goes below
                command = self._place.runtime(record.runtime).command("delete", "--force", record.id)
                await processes.run_command(command, f"removal of prepared container {record.id}")
        if created is not None:
            await processes.end_of(created.conmon, created.conmon_ticks)
        if files.directory.exists():
            await asyncio.to_thread(leftovers.take_away, self._place, files, record)


async def tell(id: str, files: ContainerFiles, record: Record) -> None:
    """Send a bound container its message. DRIVER_FAILED when it does not wait.

    The FIFO goes before the message does: while it has its name nothing was told, whoever is killed when. A process
    that finds the end in place of its message ends.
    """
    created, fifo = files.created(), Path(record.fifo)
    assert created is not None
    text = (files.directory / "go").read_bytes()
    if text.startswith(b"{"):
        await asyncio.to_thread(_tell_worker, fifo, text, record.uid_start)
        return
    try:
        async with asyncio.timeout(READER_TIMEOUT_S):
            while (fd := _opened(fifo)) is None:
                if not alive(created.pid, created.pid_ticks):
                    raise _not_told(id, "its first process has ended")
                await asyncio.sleep(_READER_POLL_S)
    except TimeoutError:
        raise driver_failed(
            f"start of container {id} failed: it did not wait for its command", remedy="Look at the machine's load."
        ) from None
    try:
        if len(text) > 4096:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 2 * MESSAGE_BYTES_MAX)
        fifo.unlink()
        if os.write(fd, text) != len(text):
            raise _not_told(id, "its command was cut")
    except OSError as error:
        raise _not_told(id, str(error.strerror)) from error
    finally:
        os.close(fd)


def _not_told(id: str, why: str) -> FalError:
    return driver_failed(f"start of container {id} failed: {why}", remedy="Look at its log.")


def _oom_score_adj(created: Created, value: int) -> None:
    """Of its only process. One that has ended is found out later."""
    with suppress(OSError):
        Path(f"/proc/{created.pid}/oom_score_adj").write_text(str(value))


def _tell_worker(fifo: Path, text: bytes, owner_uid: int) -> None:
    """The message first, then the bell: see `fal_runtime.worker.warm`. May be done again, up to the last step."""
    message = message_beside(fifo)
    beside = message.with_suffix(".new")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o400), "wb") as file:
        os.fchown(file.fileno(), owner_uid, owner_uid)
        file.write(text)
    beside.rename(message)
    fd = _opened(fifo)
    if fd is not None:  # else it still loads, and looks for the message before it listens
        os.close(fd)
    fifo.unlink()


def _opened(fifo: Path) -> int | None:
    """A descriptor to write to; None while nobody reads."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise driver_failed(f"{fifo}: {error.strerror}", remedy="Look at the container's log.") from error
