"""Reads CDI specifications from this node's directories, and completes edits with what only the machine knows.

Hooks and mounts of a specification act with the agent's rights, so a file counts only when it and its directory belong
to root (or to the agent's own user) and nobody else may write to them. Files are parsed again only when they change.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from fal_contract.errors import FalError, not_found
from fal_runtime.cdi.document import parse
from fal_runtime.cdi.model import Edits, MountEdit, NodeEdit, Specification
from fal_runtime.cdi.registry import File, Registry, make_registry
from fal_runtime.driver import driver_failed

DIRECTORIES: Final = (Path("/etc/cdi"), Path("/var/run/cdi"))  # the later has priority
FILE_BYTES_MAX: Final = 4 << 20
FILES_MAX: Final = 256
_SUFFIXES: Final = (".json", ".yaml", ".yml")
_Stamp = tuple[int, int, int, int]
# statvfs(3) flags and the mount options that repeat them: a user namespace may not drop them.
_LOCKED: Final = ((1, "ro"), (2, "nosuid"), (4, "nodev"), (8, "noexec"), (1024, "noatime"), (2048, "nodiratime"))


class Reader:
    """The specifications of some directories; those that come later have priority."""

    def __init__(self, directories: Sequence[Path] = DIRECTORIES) -> None:
        self._directories = tuple(directories)
        self._parsed: dict[Path, tuple[_Stamp, Specification | FalError]] = {}

    def registry(self) -> Registry:
        """What is there now; costs a look at each file, and the parsing of those that changed."""
        files: list[File] = []
        problems: list[tuple[str, str]] = []
        seen: dict[Path, tuple[_Stamp, Specification | FalError]] = {}
        for priority, directory in enumerate(self._directories):
            try:
                paths = self._files(directory)
            except FalError as error:
                problems.append((str(directory), str(error)))
                continue
            for path in paths[:FILES_MAX]:
                seen[path] = self._read(path)
                found = seen[path][1]
                if isinstance(found, FalError):
                    problems.append((str(path), str(found)))
                else:
                    files.append(File(str(path), priority, found))
        self._parsed = seen
        return make_registry(files, problems)

    def _files(self, directory: Path) -> list[Path]:
        try:
            info = directory.stat()
            names = sorted(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise driver_failed(f"{directory}: {error.strerror}", remedy="Run the agent as root.") from error
        _check_owner(str(directory), info)
        return [directory / name for name in names if name.endswith(_SUFFIXES)]

    def _read(self, path: Path) -> tuple[_Stamp, Specification | FalError]:
        nothing = (0, 0, 0, 0)
        try:
            with path.open("rb") as file:
                info = os.fstat(file.fileno())
                stamp = (info.st_dev, info.st_ino, info.st_mtime_ns, info.st_size)
                known = self._parsed.get(path)
                _check_owner(str(path), info)
                if known is not None and known[0] == stamp:
                    return known
                content = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            return nothing, driver_failed(f"{path}: {error.strerror}", remedy="Make it readable, or remove it.")
        except FalError as error:
            return nothing, error
        try:
            return stamp, _decode(content, path)
        except FalError as error:
            return stamp, error


def _check_owner(path: str, info: os.stat_result) -> None:
    if info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise driver_failed(
            f"{path} may be written by others than root, so its CDI specifications are not used",
            remedy=f"chown root {path}; chmod go-w {path}",
        )


def _decode(content: bytes, path: Path) -> Specification:
    if len(content) > FILE_BYTES_MAX:
        raise driver_failed(f"{path} has more than {FILE_BYTES_MAX} bytes", remedy="Is it a CDI specification?")
    try:
        document: Any = json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise driver_failed(f"{path} cannot be parsed: {' '.join(str(error).split())}", remedy="Correct it.") from None
    return parse(document, source=str(path))


def locked_flags(path: str) -> tuple[str, ...]:
    """Options that a bind of `path` has to repeat in a user namespace."""
    bits = os.statvfs(path).f_flag
    return tuple(name for bit, name in _LOCKED if bits & bit)


def complete(edits: Edits, *, user_namespace: bool) -> Edits:
    """Numbers of device nodes and flags of mounts filled in. NOT_FOUND for what this machine does not have."""
    return replace(
        edits,
        nodes=tuple(_node(node, user_namespace=user_namespace) for node in edits.nodes),
        mounts=tuple(_mount(mount) for mount in edits.mounts),
    )


def _node(node: NodeEdit, *, user_namespace: bool) -> NodeEdit:
    try:
        info = os.stat(node.source)
    except OSError:
        if node.kind and node.major is not None and node.minor is not None and not user_namespace:
            return node  # the runtime makes it from its numbers
        raise not_found("device node", node.source, remedy="Is the driver loaded? Write the CDI file anew.") from None
    kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
    kind = kind or ("p" if stat.S_ISFIFO(info.st_mode) else "")
    if not kind or node.kind not in ("", kind):
        raise driver_failed(f"{node.source} is no device node of type {node.kind or 'b or c'}", remedy="Write it anew.")
    major, minor = os.major(info.st_rdev), os.minor(info.st_rdev)
    if kind != "p" and (node.major, node.minor) not in ((None, None), (major, minor), (0, 0)):
        raise driver_failed(
            f"{node.source} has numbers {major}:{minor}, the CDI file says {node.major}:{node.minor}",
            remedy="Write the CDI file anew: the driver was loaded again.",
        )
    flags = tuple(flag for flag in locked_flags(node.source) if flag not in ("ro", "nosuid", "noexec"))
    if user_namespace and "nodev" in flags:
        raise driver_failed(f"{node.source} lies on a file system without devices", remedy="Mount it with dev.")
    mode = stat.S_IMODE(info.st_mode) if node.file_mode is None else node.file_mode
    return replace(node, kind=kind, major=major, minor=minor, file_mode=mode, options=flags)


def _mount(mount: MountEdit) -> MountEdit:
    options = list(mount.options)
    if not {"bind", "rbind"} & set(options):
        if mount.kind not in ("", "none", "bind"):
            return mount  # a file system of its own, such as tmpfs
        options.append("bind")
    if not os.path.lexists(mount.host_path):
        raise not_found("mount source", mount.host_path, remedy="Is the driver installed? Write the CDI file anew.")
    options += [flag for flag in locked_flags(mount.host_path) if flag not in options]
    if "ro" in options:
        options = [option for option in options if option != "rw"]
    return replace(mount, kind="bind", options=tuple(dict.fromkeys(options)))
