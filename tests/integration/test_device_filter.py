"""The device filter of a live cgroup, on v1 and by BPF on v2, with a process inside that tries to open devices."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_contract.errors import Code, FalError
from fal_runtime.oci import cgroups, device_filter
from fal_runtime.oci.device_filter import DEFAULT_RULES, Rule, program
from fal_runtime.oci.spec import DeviceNode

TIMEOUT_S = 20.0
KMSG, FULL = DeviceNode("/dev/kmsg", "c", 1, 11), DeviceNode("/dev/full", "c", 1, 7)
# Opens what it is asked for, line by line, with the errno of each.
CHILD = """
import os, sys
print("in", flush=True)
for line in sys.stdin:
    try:
        os.close(os.open(line.strip(), os.O_RDWR | os.O_NONBLOCK))
        print(0, flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


class Inside:
    """A process in the cgroup."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say()
        (directory / "cgroup.procs").write_text(str(self.process.pid))

    def _say(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def open(self, path: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(path + "\n")
        self.process.stdin.flush()
        return int(self._say())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=TIMEOUT_S)


def _hierarchy(v2: bool) -> Path | None:
    name = "cgroup.controllers" if v2 else "devices.list"
    below = [path for path in cgroups.hierarchies() if (path / name).exists()]
    if not v2 and not below:
        below = [path for path in cgroups.hierarchies() if path.name == "devices"]
    return below[0] if below else None


@pytest.fixture(params=["v1", "v2"])
def cgroup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    hierarchy = _hierarchy(request.param == "v2")
    if hierarchy is None:
        pytest.skip(f"no cgroup {request.param} here")
    monkeypatch.setattr(cgroups, "hierarchies", lambda: [hierarchy])
    path = f"/falctl-filter-{os.urandom(4).hex()}"
    directory = hierarchy / path.lstrip("/")
    directory.mkdir()
    yield path, directory
    cgroups.remove(path)
    assert not directory.exists()


def test_a_live_cgroup_gets_and_loses_a_device(cgroup: tuple[str, Path]) -> None:
    path, directory = cgroup
    inside = Inside(directory)
    try:
        if (directory / "devices.deny").exists():
            (directory / "devices.deny").write_text("a")
            for rule in DEFAULT_RULES:
                (directory / "devices.allow").write_text(device_filter._line(rule))
        else:
            device_filter.replace_program(directory, DEFAULT_RULES)
        assert device_filter.works()
        assert inside.open("/dev/null") == 0
        assert inside.open("/dev/kmsg") == errno.EPERM
        device_filter.allow(path, [KMSG])
        assert inside.open("/dev/kmsg") == 0
        device_filter.allow(path, [KMSG])  # again changes nothing
        assert inside.open("/dev/kmsg") == 0
        assert inside.open("/dev/loop-control") == errno.EPERM, "nothing else came with it"
        device_filter.deny(path, [KMSG], held=[KMSG])
        assert inside.open("/dev/kmsg") == errno.EPERM
        assert inside.open("/dev/null") == 0
    finally:
        inside.end()


@pytest.mark.parametrize("flags", [0, 2], ids=["alone", "multi"])
def test_another_runtimes_program_is_replaced(cgroup: tuple[str, Path], flags: int) -> None:
    """As crun and systemd attach theirs; two programs at once as well."""
    path, directory = cgroup
    if not (directory / "cgroup.controllers").exists():
        pytest.skip("v1 has no programs")
    inside = Inside(directory)
    cgroup_fd = os.open(directory, os.O_RDONLY)
    try:
        for _ in range(2 if flags else 1):
            fd = device_filter._load(program([Rule("c", 1, 5)]))
            device_filter._bpf(8, device_filter.struct.pack("<IIIII", cgroup_fd, fd, 6, flags, 0))
            os.close(fd)
        assert inside.open("/dev/null") == errno.EPERM
        device_filter.allow(path, [KMSG])
        assert inside.open("/dev/null") == 0
        assert inside.open("/dev/kmsg") == 0
        assert len(device_filter._attached(cgroup_fd)[0]) == 1
    finally:
        os.close(cgroup_fd)
        inside.end()


def test_a_cgroup_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FalError) as caught:
        device_filter.allow("/falctl-filter-nobody", [KMSG])
    assert caught.value.code is Code.DRIVER_FAILED


@pytest.mark.root
def test_nodes_are_made_once_and_right(tmp_path: Path) -> None:
    device = DeviceNode("/dev/nvidia-caps/nvidia-cap1", "c", 1, 3)
    path = device_filter.make_node(tmp_path, device, owner_uid=0x7000_0000)
    assert path == tmp_path / "nvidia-caps" / "nvidia-cap1"
    again = device_filter.make_node(tmp_path, device, owner_uid=0x7001_0000)
    info = again.lstat()
    assert stat.S_ISCHR(info.st_mode)
    assert (info.st_rdev, info.st_uid, stat.S_IMODE(info.st_mode)) == (os.makedev(1, 3), 0x7001_0000, 0o600)
    other = device_filter.make_node(tmp_path, DeviceNode(device.path, "c", 1, 5), owner_uid=0)
    assert other.lstat().st_rdev == os.makedev(1, 5)


# ---- the program, by an interpreter of the few instructions that it uses


def run(code: bytes, kind: int, access: int, major: int, minor: int) -> int:
    memory = {0: access << 16 | kind, 4: major, 8: minor}
    registers = [0] * 11
    at = 0
    while True:
        opcode, both = code[at * 8], code[at * 8 + 1]
        offset = int.from_bytes(code[at * 8 + 2 : at * 8 + 4], "little", signed=True)
        value = int.from_bytes(code[at * 8 + 4 : at * 8 + 8], "little", signed=True)
        dst, src = both & 15, both >> 4
        at += 1
        match opcode:
            case 0x61:
                registers[dst] = memory[offset]
            case 0xBC:
                registers[dst] = registers[src] & 0xFFFFFFFF
            case 0x54:
                registers[dst] &= value & 0xFFFFFFFF
            case 0x74:
                registers[dst] >>= value
            case 0xB7:
                registers[dst] = value
            case 0x56:
                at += offset if registers[dst] != value else 0
            case 0x5E:
                at += offset if registers[dst] != registers[src] else 0
            case 0x95:
                return registers[0]
            case _:
                raise AssertionError(f"opcode {opcode:#x}")


NUMBERS = st.one_of(st.none(), st.integers(0, 4))
RULES = st.lists(
    st.builds(Rule, st.sampled_from(("c", "b")), NUMBERS, NUMBERS, st.sampled_from(("r", "w", "rw", "rwm", "m"))),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(RULES, st.sampled_from(("c", "b")), st.integers(1, 7), st.integers(0, 4), st.integers(0, 4))
def test_the_program_allows_what_one_rule_allows(
    rules: list[Rule], kind: str, access: int, major: int, minor: int
) -> None:
    asked = {letter for letter, bit in (("m", 1), ("r", 2), ("w", 4)) if access & bit}
    allowed = any(
        rule.kind == kind and asked <= set(rule.access)
        and rule.major in (None, major) and rule.minor in (None, minor)
        for rule in rules
    )  # fmt: skip
    assert run(program(rules), {"b": 1, "c": 2}[kind], access, major, minor) == allowed
