"""Which device nodes a live container may open, changed while it runs; and nodes made for it.

On v1 and hybrid trees the kernel keeps a list (`devices.allow`, `devices.deny`). On v2 there is none: the runtime has
attached a BPF program, whose list nobody can read back, so a program for the whole new list takes its place at once
(Documentation/admin-guide/cgroup-v2.rst, bpf(2), BPF_PROG_TYPE_CGROUP_DEVICE). `program` is pure and says what is
loaded. Called by the oci driver for workers that were warm before anybody knew their GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fal_runtime.driver import driver_failed
from fal_runtime.oci import cgroups
from fal_runtime.oci.spec import DeviceNode


@dataclass(frozen=True, slots=True)
class Rule:
    """Devices that may be opened. None: any number. `access`: letters of "rwm"."""

    kind: Literal["c", "b"]
    major: int | None
    minor: int | None
    access: str = "rw"


# What every container has, as runc gives it: null, random, full, tty, zero, urandom, ptmx, pts.
DEFAULT_RULES: Final = (
    *(Rule("c", 1, minor) for minor in (3, 8, 7, 5, 9)),
    Rule("c", 5, 0),
    Rule("c", 5, 2),
    Rule("c", 136, None),
)

_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16
_TYPE_CGROUP_DEVICE: Final = 15
_ATTACH_CGROUP_DEVICE: Final = 6
_ALLOW_MULTI: Final = 2
_REPLACE: Final = 4
_PROGRAMS_MAX: Final = 64
_ATTR_BYTES: Final = 128
_KINDS: Final = {"b": 1, "c": 2}
_ACCESS: Final = {"m": 1, "r": 2, "w": 4}
_libc: Final = ctypes.CDLL(None, use_errno=True)


def rule_of(device: DeviceNode) -> Rule:
    """To read and write it."""
    return Rule(device.kind, device.major, device.minor)


def allow(cgroup_path: str, devices: Sequence[DeviceNode], *, held: Sequence[DeviceNode] = ()) -> None:
    """Let processes of the cgroup (a path as in `cgroups`) open `devices` beside those that they `held` before.

    DRIVER_FAILED when the kernel refuses; then nothing has changed on v2, some may be allowed on v1.
    """
    list_file = _v1_directory(cgroup_path)
    if list_file is not None:
        for device in devices:
            _write(list_file / "devices.allow", _line(rule_of(device)))
        return
    replace_program(_v2_directory(cgroup_path), [*DEFAULT_RULES, *map(rule_of, held), *map(rule_of, devices)])


def deny(cgroup_path: str, devices: Sequence[DeviceNode], *, held: Sequence[DeviceNode] = ()) -> None:
    """Take `devices` away from what it `held`; what is open stays open."""
    list_file = _v1_directory(cgroup_path)
    if list_file is not None:
        for device in devices:
            _write(list_file / "devices.deny", _line(rule_of(device)))
        return
    gone = {rule_of(device) for device in devices}
    left = [rule for rule in map(rule_of, held) if rule not in gone]
    replace_program(_v2_directory(cgroup_path), [*DEFAULT_RULES, *left])


def works() -> bool:
    """Whether this machine can do it: the v1 files are there, or a program loads."""
    if any((hierarchy / "devices.allow").exists() for hierarchy in cgroups.hierarchies()):
        return True
    try:
        os.close(_load(program(DEFAULT_RULES)))
    except OSError:
        return False
    return True


def make_node(directory: Path, device: DeviceNode, *, owner_uid: int) -> Path:
    """A device node in `directory`, named as below /dev, open to `owner_uid` alone; one that is right is kept.

    The file system must not be mounted nodev. DRIVER_FAILED when it cannot be made.
    """
    path = directory / device.path.removeprefix("/dev/").lstrip("/")
    number = os.makedev(device.major, device.minor)
    kind = stat.S_IFCHR if device.kind == "c" else stat.S_IFBLK
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        with contextlib.suppress(FileNotFoundError):
            info = path.lstat()
            if stat.S_IFMT(info.st_mode) != kind or info.st_rdev != number:
                path.unlink()
        with contextlib.suppress(FileExistsError):
            os.mknod(path, kind | 0o600, number)
        os.chown(path, owner_uid, owner_uid, follow_symlinks=False)
    except OSError as error:
        raise driver_failed(f"device node {path}: {error.strerror}", remedy="Run the agent as root.") from error
    return path


# ---- v1


def _v1_directory(cgroup_path: str) -> Path | None:
    for hierarchy in cgroups.hierarchies():
        directory = hierarchy / cgroup_path.lstrip("/")
        if (directory / "devices.allow").exists():
            return directory
    return None


def _line(rule: Rule) -> str:
    major, minor = ("*" if number is None else str(number) for number in (rule.major, rule.minor))
    return f"{rule.kind} {major}:{minor} {rule.access}"


def _write(file: Path, line: str) -> None:
    try:
        file.write_text(line)
    except OSError as error:
        raise driver_failed(f"{line!r} to {file}: {error.strerror}", remedy="Run the agent as root.") from error


# ---- v2


def _v2_directory(cgroup_path: str) -> Path:
    for hierarchy in cgroups.hierarchies():
        directory = hierarchy / cgroup_path.lstrip("/")
        if (hierarchy / "cgroup.controllers").exists() and directory.is_dir():
            return directory
    raise driver_failed(f"no cgroup {cgroup_path}", remedy="Has its container ended?")


def _instruction(code: int, *, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBhi", code, src << 4 | dst, offset, value)


def program(rules: Iterable[Rule]) -> bytes:
    """BPF instructions: 1 (allowed) when one rule has the device and all of the access that is asked for, else 0."""
    code = [
        _instruction(0x61, dst=2, src=1, offset=0),  # r2 = access << 16 | type
        _instruction(0xBC, dst=3, src=2),  # w3 = w2
        _instruction(0x54, dst=3, value=0xFFFF),  # w3 &= 0xffff: type
        _instruction(0x74, dst=2, value=16),  # w2 >>= 16: access
        _instruction(0x61, dst=4, src=1, offset=4),  # r4 = major
        _instruction(0x61, dst=5, src=1, offset=8),  # r5 = minor
    ]
    for rule in rules:
        access = sum(_ACCESS[letter] for letter in set(rule.access))
        tests = [
            [_jump_unless_equal(3, _KINDS[rule.kind])],
            [
                _instruction(0xBC, dst=1, src=2),  # w1 = w2
                _instruction(0x54, dst=1, value=access),  # w1 &= access
                _instruction(0x5E, dst=1, src=2),  # if w1 != w2
            ],
        ]
        tests += [[_jump_unless_equal(at, n)] for at, n in ((4, rule.major), (5, rule.minor)) if n is not None]
        flat = [one for test in tests for one in test]
        # A jump goes past the rest of its rule and the two instructions that allow.
        for at, one in enumerate(flat):
            if one[0] in (0x56, 0x5E):
                flat[at] = one[:2] + struct.pack("<h", len(flat) - at - 1 + 2) + one[4:]
        code += [*flat, _instruction(0xB7, dst=0, value=1), _instruction(0x95)]
    return b"".join([*code, _instruction(0xB7, dst=0, value=0), _instruction(0x95)])


def _jump_unless_equal(register: int, value: int) -> bytes:
    return _instruction(0x56, dst=register, value=value)


def _bpf(command: int, attr: bytes) -> tuple[int, bytes]:
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise OSError(38, os.strerror(38))
    buffer = ctypes.create_string_buffer(attr.ljust(_ATTR_BYTES, b"\0"), _ATTR_BYTES)
    result = _libc.syscall(number, command, buffer, _ATTR_BYTES)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result, buffer.raw


def _load(code: bytes) -> int:
    """A descriptor of the loaded program."""
    insns, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"Apache-2.0")
    attr = struct.pack(
        "<IIQQIIQII16sII", _TYPE_CGROUP_DEVICE, len(code) // 8, ctypes.addressof(insns), ctypes.addressof(licence),
        0, 0, 0, 0, 0, b"falctl_devices", 0, _ATTACH_CGROUP_DEVICE,
    )  # fmt: skip
    return _bpf(_PROG_LOAD, attr)[0]


def _attached(cgroup_fd: int) -> tuple[list[int], int]:
    """Ids of the programs of this very cgroup, and how they were attached."""
    ids = (ctypes.c_uint32 * _PROGRAMS_MAX)()
    attr = struct.pack("<IIIIQI", cgroup_fd, _ATTACH_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), _PROGRAMS_MAX)
    _result, raw = _bpf(_PROG_QUERY, attr)
    flags, count = struct.unpack_from("<I", raw, 12)[0], struct.unpack_from("<I", raw, 24)[0]
    return list(ids[:count]), flags


@contextlib.contextmanager
def _opened(ids: Sequence[int]) -> Iterator[list[int]]:
    fds: list[int] = []
    try:
        fds += [_bpf(_PROG_GET_FD_BY_ID, struct.pack("<III", one, 0, 0))[0] for one in ids]
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def replace_program(directory: Path, rules: Sequence[Rule]) -> None:
    """Put a program for exactly `rules` in place of whatever filters devices of this v2 cgroup.

    Programs of one cgroup all have to agree, so that at no moment more is allowed than before or after.
    """
    try:
        cgroup_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            program_fd = _load(program(rules))
            try:
                _attach(cgroup_fd, program_fd)
            finally:
                os.close(program_fd)
        finally:
            os.close(cgroup_fd)
    except OSError as error:
        raise driver_failed(
            f"device filter of {directory}: {error.strerror}", remedy="Run as root on a kernel with CONFIG_CGROUP_BPF."
        ) from error


def _attach(cgroup_fd: int, program_fd: int) -> None:
    ids, flags = _attached(cgroup_fd)
    with _opened(ids) as old:
        if flags & _ALLOW_MULTI and len(old) == 1:
            attr = (cgroup_fd, program_fd, _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI | _REPLACE, old[0])
            _bpf(_PROG_ATTACH, struct.pack("<IIIII", *attr))
            return
        how = flags if old else _ALLOW_MULTI  # without MULTI an attach replaces
        _bpf(_PROG_ATTACH, struct.pack("<IIIII", cgroup_fd, program_fd, _ATTACH_CGROUP_DEVICE, how, 0))
        for fd in old if how & _ALLOW_MULTI else ():
            _bpf(_PROG_DETACH, struct.pack("<IIII", cgroup_fd, fd, _ATTACH_CGROUP_DEVICE, 0))
