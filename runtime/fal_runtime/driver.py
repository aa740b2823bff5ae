"""What a container driver is: the protocol, and the plain values that cross it.

Invariant: nothing of a container's life depends on the process that calls a driver. A container, its log and its
exit code survive the caller's kill -9; a new driver object on the same state directory takes everything back.
Called by fal-agent. Implementations: `fal_runtime.oci.driver.OciDriver`, `fal_runtime.process.ProcessDriver`,
`fal_runtime.fake.FakeDriver`; tests/contract/test_driver.py holds all three to the words below.
This module starts nothing and touches no file.
"""

from __future__ import annotations

import builtins
import errno
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, Protocol

from fal_contract.errors import Code, FalError, invalid, not_found
from fal_runtime.container_use import ContainerUse
from fal_runtime.exec_session import ExecSession, Terminal

Network = Literal["none", "egress", "host"]
Stream = Literal["stdout", "stderr"]

# Where a container finds what its runner owns. The process driver cannot move paths, so every driver also sets these
# two environment variables; a worker reads the variable and never the constant.
SOCKET_DIR_INSIDE: Final = "/run/fal"
MODELS_DIR_INSIDE: Final = "/models"
SECRETS_DIR_INSIDE: Final = "/run/secrets"
SOCKET_DIR_ENV: Final = "FAL_SOCKET_DIR"
MODELS_DIR_ENV: Final = "FAL_MODELS_DIR"
# Where a container that was made ahead hears who it is to be (see `oci.prepared`).
MESSAGE_FIFO_INSIDE: Final = "/run/fal-bind/go"
SECRETS_DIR_ENV: Final = "FAL_SECRETS_DIR"

LOG_BYTES_MAX_DEFAULT: Final = 16 << 20
LOG_BYTES_MIN: Final = 64 << 10
COMMAND_BYTES_MAX: Final = 64 << 10
_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODEL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


class Phase(StrEnum):
    """Phases only increase."""

    CREATED = "CREATED"
    RUNNING = "RUNNING"
    EXITED = "EXITED"


@dataclass(frozen=True, slots=True)
class Mount:
    """A bind mount: host directory or file `source` at the absolute path `target`."""

    source: Path
    target: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class Resources:
    """Limits of one container. 0 means no limit, for CPU, memory, pids and io; no scratch: a read-only root."""

    cpu_milli: int = 0
    memory_bytes: int = 0
    pids_max: int = 0
    open_files_max: int = 65_536
    shm_bytes: int = 64 << 20
    locked_memory_bytes: int = 0  # 0: the kernel's default
    io_bytes_s: int = 0  # read from and written to the node's disks, each
    scratch_bytes: int = 0  # written over an image, in memory


@dataclass(frozen=True, slots=True)
class Image:
    """A real image on this node.

    `folder` holds the artifact's files (`fal_runtime.images.layout`): the finished ones, or those of a mount whose
    reads wait for what has not arrived. Containers of one `id` (the artifact's) share one mount.
    """

    id: str
    folder: Path
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Egress:
    """What a container with a network of its own may reach: networks as CIDR. `deny` wins; no `allow`: all public."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container as the agent wants it.

    `id` is a file name (`fal_contract.ids.path_of`). An empty `command` is the image's own. `socket_dir` and
    `models_dir` are host paths that the driver makes in `create` and takes away in `remove`; the container sees them at
    $FAL_SOCKET_DIR and $FAL_MODELS_DIR. `gpu_devices` are device node paths, `cdi` names of devices in this node's CDI
    specifications, such as "nvidia.com/gpu=GPU-1f…". `uid_range_start` overrides the driver's own allocation of a user
    id range. `secrets` are file names and contents, shown in $FAL_SECRETS_DIR and kept nowhere else. `warm_command`:
    what a container that was made before anybody wanted it may run in place of `command`, if it then behaves alike;
    empty: nothing of the kind.
    """

    id: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    mounts: tuple[Mount, ...] = ()
    resources: Resources = Resources()
    image: Image | None = None  # None: the node's own system
    network: Network = "none"
    socket_dir: Path | None = None
    models_dir: Path | None = None
    gpu_devices: tuple[str, ...] = ()
    log_bytes_max: int = LOG_BYTES_MAX_DEFAULT
    uid_range_start: int | None = None
    egress: Egress = Egress()
    cdi: tuple[str, ...] = ()
    secrets: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    warm_command: tuple[str, ...] = ()
    privileges: tuple[str, ...] = ()  # capabilities within its own user namespace; only the agent's own tasks have any


@dataclass(frozen=True, slots=True)
class Prepared:
    """So many containers to have ready for specs like this one, whatever their ids, commands and environments.

    `warm`: with `ContainerSpec.warm_command` running in them already.
    """

    spec: ContainerSpec
    count: int
    warm: bool = False


@dataclass(frozen=True, slots=True)
class ContainerStatus:
    """What is known of a container. Times are wall-clock seconds since 1970.

    `exit_code` is 128 + n after signal n, and None while it runs or when the code was lost; `reason` says why in
    words that an operator can read (empty when there is nothing to say). `pid` is on the host.
    """

    id: str
    phase: Phase
    pid: int | None = None
    started_at_s: float | None = None
    finished_at_s: float | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    reason: str = ""
    cgroup: str = ""  # last component of its cgroup's path; empty: it has none of its own


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that a container wrote, without its newline; bytes that are not UTF-8 are replaced."""

    time_s: float
    stream: Stream
    text: str


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a driver can do on this machine, found by doing it. `details` explains every `False` and the versions."""

    driver: str
    isolates: bool
    runtime: str
    user_namespaces: bool
    idmapped_mounts: bool
    cgroup: Literal["v1", "v2", "hybrid", "none"]
    seccomp: bool
    nosymfollow: bool
    details: Mapping[str, str]
    features: tuple[str, ...] = ()  # beyond running the node's own system: "egress" …


class Driver(Protocol):
    """Runs containers. Methods raise FalError; each may be cancelled and called again.

    A driver belongs to the event loop that uses it; calls for different ids may run at the same time, calls for one
    id may not (the agent has one task per runner).
    """

    @property
    def name(self) -> str:
        """oci, process or fake."""
        ...

    @property
    def isolates(self) -> bool:
        """True when a container cannot see or harm the node."""
        ...

    async def probe(self) -> Capabilities:
        """Find out by doing what works here. DRIVER_FAILED when nothing does."""
        ...

    async def prepare(self, wanted: Sequence[Prepared]) -> None:
        """Have these ready and no others; `create` uses one that fits. Some drivers have no use for it.

        DRIVER_FAILED when one cannot be made; what is ready stays.
        """
        ...

    async def create(self, spec: ContainerSpec) -> None:
        """Make everything but run nothing; a second call for an id that exists changes nothing."""
        ...

    async def start(self, id: str) -> None:
        """Run the command; a second call changes nothing. NOT_FOUND, DRIVER_FAILED."""
        ...

    async def status(self, id: str) -> ContainerStatus | None:
        """None when the driver knows no such container."""
        ...

    async def list(self) -> builtins.list[ContainerStatus]:
        """Every container on the state directory, also from before a restart, sorted by id."""
        ...

    async def wait(self, id: str) -> ContainerStatus:
        """Return once it has exited. NOT_FOUND."""
        ...

    async def stop(self, id: str, *, grace_s: float) -> ContainerStatus:
        """SIGTERM, then SIGKILL after `grace_s` seconds; returns once it has exited. A created one never runs."""
        ...

    async def kill(self, id: str) -> ContainerStatus:
        """SIGKILL to all its processes; returns once it has exited."""
        ...

    async def remove(self, id: str) -> None:
        """Kill it if it runs and leave nothing behind: no mount, cgroup, process, file. Unknown ids are fine."""
        ...

    def logs(self, id: str, *, tail_lines: int, follow: bool, since_s: float = 0.0) -> AsyncGenerator[LogLine, None]:
        """The last `tail_lines` lines, then with `follow` every further one until the container has exited.

        `since_s`: only those from then on (seconds since 1970). Of a removed container they are kept for a while;
        NOT_FOUND when they are no longer.
        """
        ...

    async def exec(self, id: str, command: tuple[str, ...], *, terminal: Terminal | None = None) -> ExecSession:
        """Run a command beside its own, under the same limits; empty: the first shell that exists inside.

        NOT_FOUND, FAILED_PRECONDITION (it does not run), INVALID (command), DRIVER_FAILED (with the runtime's words).
        """
        ...

    async def top(self, id: str) -> ContainerUse:
        """What it uses, and its processes. NOT_FOUND; zeros once it has ended."""
        ...

    async def attach_model(self, id: str, name: str, source: Path) -> str:
        """Show host directory `source` read-only as `name` in the models directory, also of a live container.

        Returns the path inside. A second call replaces: open files read on, new opens see the new tree.
        """
        ...

    async def detach_model(self, id: str, name: str) -> None:
        """Take the model away; unknown names are fine."""
        ...

    async def image_finished(self, image: Image) -> None:
        """An image that containers were made of while it arrived is whole, in `image.folder`: they read from there.

        Idempotent; fine for an image that nothing uses.
        """
        ...

    def inside(self, spec: ContainerSpec, target: str) -> str:
        """Where a process of this container finds the mount target (or socket or models directory) `target`."""
        ...

    async def clean(self, keep: frozenset[str]) -> builtins.list[str]:
        """At the agent's start: remove everything but the ids in `keep`; returns what was removed, in words."""
        ...


def message_beside(fifo: Path) -> Path:
    """The file with the message for a warm worker whose bell this FIFO is."""
    return fifo.with_name("message")


def check_spec(spec: ContainerSpec) -> None:
    """Raise INVALID, naming the field, unless every driver could take this spec."""
    if not _ID.fullmatch(spec.id) or ".." in spec.id:
        raise invalid("id", spec.id, "is not a container id", remedy="Use 1 to 128 of a-z, 0-9, '.', '_' and '-'.")
    if (not spec.command and spec.image is None) or spec.command[:1] == ("",):
        raise invalid("command", spec.command, "is empty", remedy="Give a program to run.")
    if any("\0" in text for text in (*spec.command, *spec.env.values())):
        raise invalid("command", spec.command, "or env holds a NUL character", remedy="Remove it.")
    if sum(map(len, spec.command)) > COMMAND_BYTES_MAX:
        raise invalid("command", spec.command[0], "is too long", remedy=f"At most {COMMAND_BYTES_MAX} bytes.")
    for name in spec.env:
        if not _ENV_NAME.fullmatch(name):
            raise invalid("env", name, "is not a variable name", remedy="Use letters, digits and '_'.")
    if spec.log_bytes_max < LOG_BYTES_MIN:
        raise invalid("log_bytes_max", spec.log_bytes_max, "is too small", remedy=f"At least {LOG_BYTES_MIN}.")
    limits = spec.resources
    for name in (one.name for one in fields(limits)):
        if getattr(limits, name) < 0:
            raise invalid(f"resources.{name}", getattr(limits, name), "is negative", remedy="Use 0 for no limit.")
    for mount in spec.mounts:
        if not mount.target.startswith("/") or ".." in mount.target.split("/"):
            raise invalid("mounts.target", mount.target, "is not an absolute path", remedy="Start it with '/'.")
        if not mount.source.exists():
            raise invalid("mounts.source", str(mount.source), "does not exist", remedy="Mount what is there.")


def check_model_name(name: str) -> str:
    """A model's name in the models directory is one safe path component."""
    if not _MODEL_NAME.fullmatch(name) or ".." in name:
        raise invalid("model", name, "is not a file name", remedy="Use a-z, 0-9, '.', '_' and '-'.")
    return name


def unknown_container(id: str) -> FalError:
    return not_found("container", id, remedy="List the containers; it may have been removed.")


def not_running(id: str, status: ContainerStatus) -> FalError:
    return FalError(
        Code.FAILED_PRECONDITION,
        f"container {id} is {status.phase}{': ' + status.reason if status.reason else ''}",
        remedy="Run commands in containers that run.",
    )


def not_made(id: str, error: OSError) -> FalError:
    """The system refused something on the way to a container."""
    place = f": {error.filename}" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "Free space on the node's disk; containers that run go on." if full else "Look at the node."
    return driver_failed(f"container {id} was not made: {(error.strerror or str(error)).lower()}{place}", remedy=remedy)


def driver_failed(what: str, *, remedy: str) -> FalError:
    return FalError(Code.DRIVER_FAILED, what, remedy=remedy)
