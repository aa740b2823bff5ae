"""All CDI devices of a node, and from names to what a container gets. Pure.

After SPEC.md and the rules of its library: a directory that comes later has priority; two files of one directory that
name the same device make it unusable, and only it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from fal_contract.errors import Code, FalError, not_found
from fal_runtime.cdi.document import parse_name
from fal_runtime.cdi.model import Device, Edits, Specification

_NAMED_MAX: Final = 8  # devices in an error


@dataclass(frozen=True, slots=True)
class File:
    """A file that was read: where it is, its directory's rank (higher wins), what it says."""

    path: str
    priority: int
    specification: Specification


@dataclass(frozen=True, slots=True)
class Registry:
    """Devices by qualified name; names that files disagree about; files that say nothing usable, with the reason."""

    devices: Mapping[str, tuple[File, Device]] = field(default_factory=lambda: MappingProxyType({}))
    conflicts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    problems: tuple[tuple[str, str], ...] = ()

    def has(self, name: str) -> bool:
        """Whether a container may ask for it."""
        return name in self.devices


def make_registry(files: Iterable[File], problems: Sequence[tuple[str, str]] = ()) -> Registry:
    """The registry of these files."""
    best: dict[str, list[tuple[File, Device]]] = {}
    for file in files:
        for device in file.specification.devices:
            name = file.specification.qualified(device)
            rivals = best.setdefault(name, [])
            if rivals and file.priority < rivals[0][0].priority:
                continue
            if rivals and file.priority > rivals[0][0].priority:
                rivals.clear()
            rivals.append((file, device))
    return Registry(
        MappingProxyType({name: found[0] for name, found in best.items() if len(found) == 1}),
        MappingProxyType(
            {name: tuple(sorted(file.path for file, _ in found)) for name, found in best.items() if len(found) > 1}
        ),
        tuple(problems),
    )


def resolve(names: Sequence[str], registry: Registry) -> Edits:
    """What a container with these devices gets: of each file once what all its devices need, then each device's own.

    INVALID for what is no name, NOT_FOUND for what no file has, FAILED_PRECONDITION for what files disagree about.
    """
    edits, seen = Edits(), set[str]()
    for file, device in _found(names, registry):
        if file.path not in seen:
            seen.add(file.path)
            edits += file.specification.edits
        edits += device.edits
    return edits


def split(names: Sequence[str], registry: Registry) -> tuple[Edits, Edits]:
    """`resolve` in two parts: what all devices of the same files need, and what is these devices' own.

    A container that was made ahead has the first, and can get the second while it runs if that is nodes alone.
    """
    shared, own, seen = Edits(), Edits(), set[str]()
    for file, device in _found(names, registry):
        if file.path not in seen:
            seen.add(file.path)
            shared += file.specification.edits
        own += device.edits
    return shared, own


def _found(names: Sequence[str], registry: Registry) -> list[tuple[File, Device]]:
    """The devices with these names, each once; raises as `resolve` says."""
    devices = []
    for name in dict.fromkeys(names):
        parse_name(name)
        if paths := registry.conflicts.get(name):
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"CDI device {name} is in several files: {', '.join(paths)}",
                remedy="Remove all but one.",
            )
        found = registry.devices.get(name)
        if found is None:
            known = sorted(registry.devices)[:_NAMED_MAX]
            raise not_found("CDI device", name, remedy=f"Known here: {', '.join(known) or 'none'}.")
        devices.append(found)
    return devices
