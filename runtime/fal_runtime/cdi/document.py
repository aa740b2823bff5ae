"""From a CDI file's content to a `Specification`, refusing what the standard refuses. Pure.

After SPEC.md of cncf-tags/container-device-interface: a field is known from the version that brought it in, an unknown
one makes the whole file invalid, and so does a file without devices. Every refusal names the field by its path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from fal_contract.errors import FalError, invalid
from fal_runtime.cdi.model import HOOK_NAMES, Device, Edits, HookEdit, MountEdit, NodeEdit, RdtEdit, Specification

T = TypeVar("T")

VERSIONS: Final = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
ENTRIES_MAX: Final = 4096  # of any list
TEXT_CHARS_MAX: Final = 8192
_UINT32_MAX: Final = (1 << 32) - 1
_INT64_MAX: Final = (1 << 63) - 1
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_VENDOR: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_VENDOR_CHARS_MAX: Final = 253
_CLASS: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
# A colon is in no text of the standard, but its own library takes it, and MIG devices are named "0:1".
_DEVICE: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]{0,253}[A-Za-z0-9])?")
_NODE_KINDS: Final = {"": "", "c": "c", "u": "c", "b": "b", "p": "p"}

# Which version brought a field in, where it was not the first.
_SINCE: Final = {
    "annotations": "0.6.0",
    "mounts.type": "0.4.0",
    "deviceNodes.hostPath": "0.5.0",
    "intelRdt": "0.7.0",
    "additionalGids": "0.7.0",
    "netDevices": "1.1.0",
    "intelRdt.schemata": "1.1.0",
    "intelRdt.enableMonitoring": "1.1.0",
}
_UNTIL: Final = {"intelRdt.enableCMT": "1.0.0", "intelRdt.enableMBM": "1.0.0"}


def parse_name(name: str) -> tuple[str, str]:
    """A device's qualified name, "vendor/class=device", as kind and device. Raises INVALID."""
    kind, equals, device = name.partition("=")
    if not equals or not _kind_ok(kind) or not _DEVICE.fullmatch(device):
        raise invalid("cdi", name, "is not a CDI device name", remedy='Write it as "vendor.com/class=device".')
    return kind, device


def parse(document: object, *, source: str) -> Specification:
    """A decoded JSON or YAML file. Raises FalError(INVALID) naming `source` and the field."""
    if not isinstance(document, Mapping) or not isinstance(document.get("cdiVersion"), str):
        raise invalid(
            "cdiVersion", source, "is no CDI specification", remedy="Start it with cdiVersion, kind and devices."
        )
    version = document["cdiVersion"].removeprefix("v")
    if version not in VERSIONS:
        raise invalid(
            f"{source}: cdiVersion", version, "is not supported", remedy=f"Known are {VERSIONS[0]} to {VERSIONS[-1]}."
        )
    return _Reader(source, VERSIONS.index(version)).specification(document)


class _Reader:
    """One file; `version` is the place of its version among `VERSIONS`."""

    def __init__(self, source: str, version: int) -> None:
        self._source = source
        self._version = version

    def specification(self, document: Mapping[str, Any]) -> Specification:
        table = self._table(document, "", ("cdiVersion", "kind", "annotations", "devices", "containerEdits"))
        kind = self._text(table, "", "kind", required=True)
        if not _kind_ok(kind):
            raise self._bad("kind", kind, "is not vendor/class")
        if "." in kind.partition("/")[2]:
            self._since("kind with a dot in its class", "0.6.0")
        self._annotations(table, "annotations")
        devices = self._list(table, "", "devices", self._device)
        if not devices:
            raise self._bad("devices", "[]", "is empty")
        names = [device.name for device in devices]
        if len(set(names)) != len(names):
            raise self._bad("devices", next(name for name in names if names.count(name) > 1), "is there twice")
        edits = self._edits(table.get("containerEdits"), "containerEdits")
        return Specification(VERSIONS[self._version], kind, tuple(devices), edits)

    def _device(self, value: object, where: str) -> Device:
        table = self._table(value, where, ("name", "annotations", "containerEdits"))
        name = self._text(table, where, "name", required=True)
        if not _DEVICE.fullmatch(name):
            raise self._bad(f"{where}.name", name, "is not a device name")
        if not name[0].isalpha():
            self._since(f"{where}.name that starts with a digit", "0.5.0")
        self._annotations(table, f"{where}.annotations")
        edits = self._edits(table.get("containerEdits"), f"{where}.containerEdits")
        if not edits:
            raise self._bad(f"{where}.containerEdits", name, "changes nothing")
        return Device(name, edits)

    def _edits(self, value: object, where: str) -> Edits:
        if value is None:
            return Edits()
        known = ("env", "deviceNodes", "netDevices", "mounts", "hooks", "intelRdt", "additionalGids")
        table = self._table(value, where, known)
        if table.get("netDevices"):
            # They need a runtime of specification 1.3, and a network namespace that is not the driver's own.
            raise self._bad(f"{where}.netDevices", "", "is not supported here")
        return Edits(
            env=tuple(self._list(table, where, "env", self._env)),
            nodes=tuple(self._list(table, where, "deviceNodes", self._node)),
            mounts=tuple(self._list(table, where, "mounts", self._mount)),
            hooks=tuple(self._list(table, where, "hooks", self._hook)),
            gids=tuple(self._list(table, where, "additionalGids", self._uint32)),
            rdt=self._rdt(table["intelRdt"], f"{where}.intelRdt") if table.get("intelRdt") is not None else None,
        )

    def _env(self, value: object, where: str) -> str:
        text = self._string(value, where)
        if text.partition("=")[0] == "" or "=" not in text:
            raise self._bad(where, text, "is not NAME=value")
        return text

    def _node(self, value: object, where: str) -> NodeEdit:
        known = ("path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid")
        table = self._table(value, where, known, "deviceNodes")
        kind = self._text(table, where, "type")
        if kind not in _NODE_KINDS:
            raise self._bad(f"{where}.type", kind, "is not one of b, c, u, p")
        permissions = self._text(table, where, "permissions")
        if permissions != "none" and set(permissions) - set("rwm"):
            raise self._bad(f"{where}.permissions", permissions, "has letters besides r, w, m")
        host_path = self._text(table, where, "hostPath")
        if host_path:
            self._absolute(host_path, f"{where}.hostPath")
        return NodeEdit(
            path=self._absolute(self._text(table, where, "path", required=True), f"{where}.path"),
            host_path=host_path,
            kind=_NODE_KINDS[kind],
            major=self._number(table, where, "major", _INT64_MAX),
            minor=self._number(table, where, "minor", _INT64_MAX),
            file_mode=self._number(table, where, "fileMode", _UINT32_MAX),
            permissions=permissions,
            uid=self._number(table, where, "uid", _UINT32_MAX),
            gid=self._number(table, where, "gid", _UINT32_MAX),
        )

    def _mount(self, value: object, where: str) -> MountEdit:
        table = self._table(value, where, ("hostPath", "containerPath", "type", "options"), "mounts")
        return MountEdit(
            self._text(table, where, "hostPath", required=True),
            self._absolute(self._text(table, where, "containerPath", required=True), f"{where}.containerPath"),
            self._text(table, where, "type"),
            tuple(self._list(table, where, "options", self._string)),
        )

    def _hook(self, value: object, where: str) -> HookEdit:
        table = self._table(value, where, ("hookName", "path", "args", "env", "timeout"))
        name = self._text(table, where, "hookName", required=True)
        if name not in HOOK_NAMES:
            raise self._bad(f"{where}.hookName", name, f"is not one of {', '.join(HOOK_NAMES)}")
        timeout_s = self._number(table, where, "timeout", _UINT32_MAX)
        if timeout_s == 0:
            raise self._bad(f"{where}.timeout", "0", "is not above zero")
        return HookEdit(
            name,
            self._absolute(self._text(table, where, "path", required=True), f"{where}.path"),
            tuple(self._list(table, where, "args", self._string)),
            tuple(self._list(table, where, "env", self._env)),
            timeout_s,
        )

    def _rdt(self, value: object, where: str) -> RdtEdit:
        booleans = ("enableMonitoring", "enableCMT", "enableMBM")
        table = self._table(value, where, ("closID", "l3CacheSchema", "memBwSchema", "schemata", *booleans), "intelRdt")
        clos_id = self._text(table, where, "closID")
        if clos_id in (".", "..") or "/" in clos_id or len(clos_id) > 255:
            raise self._bad(f"{where}.closID", clos_id, "is not a directory's name")
        for name in booleans:
            if not isinstance(table.get(name, False), bool):
                raise self._bad(f"{where}.{name}", str(table[name]), "is not true or false")
        return RdtEdit(
            clos_id,
            self._text(table, where, "l3CacheSchema"),
            self._text(table, where, "memBwSchema"),
            tuple(self._list(table, where, "schemata", self._string)),
            tuple(name for name in booleans if table.get(name)),
        )

    # ---- values

    def _table(self, value: object, where: str, known: Iterable[str], group: str = "") -> Mapping[str, Any]:
        """A table with no key but the known ones, each of this version."""
        if not isinstance(value, Mapping):
            raise self._bad(where, type(value).__name__, "is not a table")
        known = tuple(known)
        for key in value:
            if key not in known:
                raise self._bad(f"{where}.{key}".lstrip("."), "", "is not a field of the standard")
            field = f"{group}.{key}" if group else str(key)
            if value[key] is not None:
                self._since(f"{where}.{key}".lstrip("."), _SINCE.get(field, VERSIONS[0]))
            if VERSIONS.index(_UNTIL.get(field, VERSIONS[-1])) < self._version:
                raise self._bad(f"{where}.{key}", "", f"is no field of version {VERSIONS[self._version]}")
        return value

    def _since(self, what: str, version: str) -> None:
        if VERSIONS.index(version) > self._version:
            raise self._bad(what, "", f"needs cdiVersion {version}, the file says {VERSIONS[self._version]}")

    def _list(self, table: Mapping[str, Any], where: str, key: str, one: Callable[[object, str], T]) -> list[T]:
        value, path = table.get(key), f"{where}.{key}".lstrip(".")
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > ENTRIES_MAX:
            raise self._bad(path, type(value).__name__, f"is not a list of at most {ENTRIES_MAX}")
        return [one(entry, f"{path}[{number}]") for number, entry in enumerate(value)]

    def _annotations(self, table: Mapping[str, Any], where: str) -> None:
        value = table.get("annotations")
        if value is None:
            return
        if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
            raise self._bad(where, type(value).__name__, "is not a table of texts")

    def _string(self, value: object, where: str) -> str:
        if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX or "\0" in value:
            raise self._bad(where, type(value).__name__, f"is not a text of at most {TEXT_CHARS_MAX} characters")
        return value

    def _text(self, table: Mapping[str, Any], where: str, key: str, *, required: bool = False) -> str:
        value, path = table.get(key), f"{where}.{key}".lstrip(".")
        text = "" if value is None else self._string(value, path)
        if required and not text:
            raise self._bad(path, text, "is missing")
        return text

    def _number(self, table: Mapping[str, Any], where: str, key: str, most: int) -> int | None:
        value = table.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most):
            raise self._bad(f"{where}.{key}", str(value), f"is not a number from 0 to {most}")
        return value

    def _uint32(self, value: object, where: str) -> int:
        number = self._number({"": value}, where, "", _UINT32_MAX)
        if number is None:
            raise self._bad(where, "null", "is not a number")
        return number

    def _absolute(self, path: str, where: str) -> str:
        if not path.startswith("/") or ".." in path.split("/"):
            raise self._bad(where, path, "is not an absolute path")
        return path

    def _bad(self, field: str, value: str, why: str) -> FalError:
        return invalid(f"{self._source}: {field}", value, why, remedy="Correct the CDI specification, or remove it.")


def _kind_ok(kind: str) -> bool:
    vendor, slash, name = kind.partition("/")
    return bool(slash and len(vendor) <= _VENDOR_CHARS_MAX and _VENDOR.fullmatch(vendor) and _CLASS.fullmatch(name))
