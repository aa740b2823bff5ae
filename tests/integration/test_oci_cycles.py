"""A thousand containers one after the other, made cold and made ahead in turns, leave nothing of any kind."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from container_traces import traces
from contract.driver_cases import oci_missing
from fal_runtime.driver import ContainerSpec, Phase, Prepared, Resources
from fal_runtime.oci import cgroups, loop, mounts, userns
from fal_runtime.oci.driver import OciDriver

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
AT_ONCE = 5
TIMEOUT_S = 1800.0
LIMITS = Resources(memory_bytes=64 << 20, pids_max=20)


class Cycles:
    """Starts and ends containers, `AT_ONCE` at a time."""

    def __init__(self, driver: OciDriver, folder: Path) -> None:
        self.driver = driver
        self._folder = folder
        self._count = 0
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(b"w")

    async def turn(self, *, ahead: bool) -> None:
        specs = [self._spec() for _ in range(AT_ONCE)]
        await self.driver.prepare([Prepared(specs[0], AT_ONCE)] if ahead else [])
        await asyncio.gather(*(self._cycle(spec, ahead=ahead) for spec in specs))

    def _spec(self) -> ContainerSpec:
        """The third in five is killed, others end by themselves; every fourth says something."""
        self._count += 1
        id, say = f"cycle-{self._count}", "echo up; " if self._count % 4 == 0 else ""
        command = ("/bin/sh", "-c", f"{say}exec sleep {600 if self._count % 5 == 3 else 0}")
        sockets, models = self._folder / f"s-{id}", self._folder / f"m-{id}"
        return ContainerSpec(id, command, resources=LIMITS, socket_dir=sockets, models_dir=models)

    async def _cycle(self, spec: ContainerSpec, *, ahead: bool) -> None:
        driver, lasts = self.driver, spec.command[-1].endswith("600")
        await driver.create(spec)
        assert (driver._containers / spec.id).is_symlink() == ahead
        await driver.attach_model(spec.id, "m", self._folder / "model")
        await driver.start(spec.id)
        ended = await (driver.kill(spec.id) if lasts else driver.wait(spec.id))
        assert (ended.phase, ended.exit_code) == (Phase.EXITED, 137 if lasts else 0), ended
        await driver.remove(spec.id)


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_a_thousand_cycles_leave_nothing(tmp_path: Path, scale: Callable[[int], int]) -> None:
    async def main() -> None:
        driver = OciDriver(tmp_path / "state")
        cycles = Cycles(driver, tmp_path)
        try:
            for ahead in (False, True, False):  # what is made once and shared is there then
                await cycles.turn(ahead=ahead)
            await driver.prepare([])
            before = traces(driver._place, tmp_path)
            turns = scale(1000) // AT_ONCE
            for turn in range(turns):
                await cycles.turn(ahead=turn % 2 == 1)
            await driver.prepare([])
            assert traces(driver._place, tmp_path) - before == set()  # sockets of earlier tests may go meanwhile
            kept = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
            assert sum(target.startswith("user:") for target in kept) <= userns.KEPT_MAX
        finally:
            await driver.prepare([])
            await driver.clean(frozenset())
            driver.close()

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main()

    asyncio.run(bounded())


def _is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


@contextmanager
def _descriptor(driver: OciDriver, folder: Path) -> Iterator[None]:
    read, write = os.pipe()
    try:
        yield
    finally:
        os.close(read)
        os.close(write)


@contextmanager
def _process(driver: OciDriver, folder: Path) -> Iterator[None]:
    with subprocess.Popen(["sh", "-c", "read line", str(folder)], stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def _zombie(driver: OciDriver, folder: Path) -> Iterator[None]:
    process = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield
    finally:
        process.wait()


@contextmanager
def _mount(driver: OciDriver, folder: Path) -> Iterator[None]:
    point = driver._place.run  # a second one over what is there
    mounts.mount("falctl-test", point, "tmpfs", mounts.MS_NOSUID, "size=4k")
    try:
        yield
    finally:
        mounts.umount(point)


@contextmanager
def _cgroup(driver: OciDriver, folder: Path) -> Iterator[None]:
    path = driver._place.cgroup_path("left")
    cgroups.make_parent(path)
    try:
        yield
    finally:
        cgroups.remove(path)


@contextmanager
def _loop(driver: OciDriver, folder: Path) -> Iterator[None]:
    image = folder / "image"
    image.write_bytes(bytes(1 << 20))
    fd = os.open(image, os.O_RDONLY)
    try:
        with loop.attached(fd, "falctl-test", folder):
            image.unlink()
            yield
    finally:
        os.close(fd)


@contextmanager
def _ids(driver: OciDriver, folder: Path) -> Iterator[None]:
    owner = driver._containers / "left"
    driver._place.ranges.allocate(owner)
    try:
        yield
    finally:
        driver._place.ranges.release(owner)


@contextmanager
def _byte_of_state(driver: OciDriver, folder: Path) -> Iterator[None]:
    file = folder / "state" / "kept"
    file.write_bytes(b"2")
    try:
        yield
    finally:
        file.write_bytes(b"")


@contextmanager
def _byte_of_run(driver: OciDriver, folder: Path) -> Iterator[None]:
    file = driver._place.run / "left"
    file.write_bytes(b"1")
    try:
        yield
    finally:
        file.unlink()


PLANTS = {
    "descriptor": _descriptor,
    "process": _process,
    "process ": _zombie,
    "mount": _mount,
    "cgroup": _cgroup,
    "loop device": _loop,
    "ids of": _ids,
    "file": _byte_of_state,
    "file ": _byte_of_run,
}


@pytest.mark.parametrize("kind", PLANTS)
def test_a_leak_of_each_kind_is_seen(kind: str, tmp_path: Path) -> None:
    driver = OciDriver(tmp_path / "state")
    (tmp_path / "state" / "kept").touch()
    driver._place.run.mkdir(parents=True, exist_ok=True)
    try:
        before = traces(driver._place, tmp_path)
        with PLANTS[kind](driver, tmp_path):
            found = traces(driver._place, tmp_path) - before
            assert any(word.startswith(kind.strip()) for word in found), found
        assert traces(driver._place, tmp_path) == before
    finally:
        asyncio.run(driver.clean(frozenset()))
        driver.close()
