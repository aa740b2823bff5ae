"""What a Container Device Interface specification holds, as plain values. Pure.

After SPEC.md of cncf-tags/container-device-interface, versions 0.3.0 to 1.1.0. `Edits` is what a container gets: made
by `registry.resolve`, completed with facts of the machine by `reader.complete`, put into a config by `oci.edits.apply`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

HOOK_NAMES: Final = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@dataclass(frozen=True, slots=True)
class NodeEdit:
    """A device node: at `path` inside, `host_path` on the host (empty: the same). None: as the host's node has it.

    `permissions` of the device cgroup; empty is the standard's default, "rwm". `options` are the mount flags that a
    bind of the host's node has to repeat, which only the machine knows.
    """

    path: str
    host_path: str = ""
    kind: str = ""  # "c" or "b"; "p" has no numbers
    major: int | None = None
    minor: int | None = None
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None
    options: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where it lies on the host."""
        return self.host_path or self.path


@dataclass(frozen=True, slots=True)
class MountEdit:
    """A mount of `host_path` at `container_path`."""

    host_path: str
    container_path: str
    kind: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HookEdit:
    """A program that the runtime executes on the host at one of `HOOK_NAMES`. `timeout_s` None: no limit."""

    name: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout_s: int | None = None


@dataclass(frozen=True, slots=True)
class RdtEdit:
    """Cache and memory bandwidth classes (resctrl)."""

    clos_id: str = ""
    l3_cache_schema: str = ""
    mem_bw_schema: str = ""
    schemata: tuple[str, ...] = ()
    enable: tuple[str, ...] = ()  # of "enableMonitoring", "enableCMT", "enableMBM"


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes to a container's configuration. `env` entries are "NAME=value"."""

    env: tuple[str, ...] = ()
    nodes: tuple[NodeEdit, ...] = ()
    mounts: tuple[MountEdit, ...] = ()
    hooks: tuple[HookEdit, ...] = ()
    gids: tuple[int, ...] = ()
    rdt: RdtEdit | None = None

    def __bool__(self) -> bool:
        return self != NO_EDITS

    def __add__(self, more: Edits) -> Edits:
        """These, then `more`; what both have comes once."""
        return Edits(
            tuple(dict.fromkeys((*self.env, *more.env))),
            tuple(dict.fromkeys((*self.nodes, *more.nodes))),
            tuple(dict.fromkeys((*self.mounts, *more.mounts))),
            tuple(dict.fromkeys((*self.hooks, *more.hooks))),
            tuple(dict.fromkeys((*self.gids, *more.gids))),
            more.rdt or self.rdt,
        )


NO_EDITS: Final = Edits()


@dataclass(frozen=True, slots=True)
class Device:
    """A named device of a specification."""

    name: str
    edits: Edits


@dataclass(frozen=True, slots=True)
class Specification:
    """One file. `kind` is "vendor/class"; `edits` come with each of its devices."""

    version: str
    kind: str
    devices: tuple[Device, ...]
    edits: Edits = field(default_factory=Edits)

    def qualified(self, device: Device) -> str:
        """The device's name as containers ask for it."""
        return f"{self.kind}={device.name}"
