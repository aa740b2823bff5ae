"""How containers end, and what is told of it: memory, signals, missing programs, a full disk, rotated logs."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_contract.errors import Code, FalError
from fal_contract.limits import LOG_LINE_BYTES_MAX
from fal_runtime.driver import ContainerSpec, ContainerStatus, Phase, Resources
from fal_runtime.host_image import this_layout
from fal_runtime.oci.driver import OciDriver

pytestmark = [pytest.mark.oci, pytest.mark.root]
TIMEOUT_S = 60.0
PYTHON = this_layout().python
EAT = "x = bytearray(400 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\n"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    if why := oci_missing():
        pytest.skip(f"no containers here: {why}")
    return tmp_path / "state"


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main

    asyncio.run(bounded())


@asynccontextmanager
async def driver_at(state: Path) -> AsyncIterator[OciDriver]:
    driver = OciDriver(state)
    try:
        yield driver
    finally:
        await driver.clean(frozenset())
        driver.close()


def python(name: str, code: str, **more: object) -> ContainerSpec:
    return ContainerSpec(id=f"{name}-{os.urandom(3).hex()}", command=(PYTHON, "-c", code), **more)  # type: ignore[arg-type]


async def started(driver: OciDriver, spec: ContainerSpec) -> str:
    await driver.create(spec)
    await driver.start(spec.id)
    return spec.id


async def ended(driver: OciDriver, spec: ContainerSpec) -> ContainerStatus:
    return await driver.wait(await started(driver, spec))


async def first_line(driver: OciDriver, id: str) -> str:
    async with aclosing(driver.logs(id, tail_lines=1, follow=True)) as lines:
        async for line in lines:
            return line.text
    raise AssertionError("it ended without a word")


def test_memory_names_the_victim_and_the_limit_also_when_the_main_process_lives_on(state: Path) -> None:
    small = Resources(memory_bytes=100 << 20)
    child = f"import subprocess, sys\ncode = subprocess.call([sys.executable, '-c', {EAT!r}])\nprint(code)\nsys.exit(4)"

    async def main() -> None:
        async with driver_at(state) as driver:
            alone = await ended(driver, python("alone", EAT, resources=small))
            assert (alone.exit_code, alone.oom_killed) == (137, True)
            assert "out of memory at its limit of 100.0 MiB: the kernel killed " in alone.reason
            other = await ended(driver, python("other", child, resources=small))
            assert other.oom_killed
            if other.exit_code != 137:  # v2 kills the whole container
                assert other.reason.endswith("; it exited with code 4")

    run(main())


def test_signals_by_us_and_not_by_us(state: Path) -> None:
    deaf = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\nwhile True: time.sleep(60)"
    polite = "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(3))\nprint('up', flush=True)\nsignal.pause()"

    async def main() -> None:
        async with driver_at(state) as driver:
            id = await started(driver, python("deaf", deaf))
            assert await first_line(driver, id) == "up"
            stopped = await driver.stop(id, grace_s=0.2)
            assert stopped.reason == "stopped: SIGTERM was ignored for 0.2 s, then SIGKILL"
            id = await started(driver, python("polite", polite))
            assert await first_line(driver, id) == "up"
            assert (await driver.stop(id, grace_s=30)).reason == "stopped by us (SIGTERM): exited with code 3"
            id = await started(driver, python("killed", deaf))
            assert (await driver.kill(id)).reason == "killed by us (SIGKILL)"
            id = await started(driver, python("foreign", deaf))
            assert await first_line(driver, id) == "up"
            status = await driver.status(id)
            assert status is not None
            assert status.pid is not None
            os.kill(status.pid, 9)
            assert (await driver.wait(id)).reason == "killed by SIGKILL (signal 9), not by us"
            assert (await ended(driver, python("code", "import sys; sys.exit(3)"))).reason == "exited with code 3"

    run(main())


def test_programs_that_cannot_run_are_named_with_a_remedy(state: Path) -> None:
    async def main() -> None:
        async with driver_at(state) as driver:
            for command, said in (("/no/such/program", "no such file"), ("/etc/hostname", "permission denied")):
                spec = ContainerSpec(id=f"cannot-{os.urandom(3).hex()}", command=(command,))
                with pytest.raises(FalError) as caught:
                    await started(driver, spec)
                assert caught.value.code is Code.DRIVER_FAILED
                assert command in caught.value.what
                assert said in caught.value.what
                assert "image" in caught.value.remedy
            missing = ContainerSpec(id=f"sh-{os.urandom(3).hex()}", command=("/bin/sh", "-c", "no-such-command"))
            assert "no-such-command was not found in the image" in (await ended(driver, missing)).reason

    run(main())


def test_the_newest_lines_survive_every_rotation(state: Path) -> None:
    code = "import time\nfor n in range(20_000):\n    print(f'{n:06d}', 'x' * 60)\nprint('end', flush=True)\n"
    code += "time.sleep(600)"
    bound = 256 << 10

    async def main() -> None:
        async with driver_at(state) as driver:
            id = await started(driver, python("chatty", code, log_bytes_max=bound))
            async with aclosing(driver.logs(id, tail_lines=1, follow=True)) as lines:
                async for line in lines:
                    if line.text == "end":
                        break
            texts = [line.text async for line in driver.logs(id, tail_lines=100_000, follow=False)]
            assert texts[-1] == "end"
            newest = [int(text[:6]) for text in texts[-200:-1]]
            assert newest == list(range(20_000 - 199, 20_000)), "without a gap"
            folder = state / "containers" / id / "log"
            files = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir()}
            assert sum(files.values()) <= bound
            await driver.remove(id)
            kept = [line.text async for line in driver.logs(id, tail_lines=2, follow=False)]
            assert kept == texts[-2:]

    run(main())


def test_a_line_without_an_end_and_bytes_of_any_kind_are_harmless(state: Path) -> None:
    code = "import os, sys\nfor _ in range(64):\n    os.write(1, b'A' * (1 << 20))\n"
    code += "os.write(1, b'\\n' + bytes(range(256)) * 4 + b'\\n' + b'\\x1b]0;owned\\x07last\\n')"

    async def main() -> None:
        async with driver_at(state) as driver:
            spec = python("hostile", code, log_bytes_max=1 << 20)
            assert (await ended(driver, spec)).exit_code == 0
            lines = [line.text async for line in driver.logs(spec.id, tail_lines=10_000, follow=False)]
            assert lines[-1] == "\x1b]0;owned\x07last", "shown as it is; falctl makes it harmless on a terminal"
            assert max(len(line) for line in lines) <= LOG_LINE_BYTES_MAX + 1
            assert any("\ufffd" in line for line in lines)
            folder = state / "containers" / spec.id / "log"
            assert sum({path.stat().st_ino: path.stat().st_size for path in folder.iterdir()}.values()) <= 1 << 20

    run(main())


def fill(path: Path) -> None:
    """Until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017


def test_a_full_disk_is_one_clear_reason_and_what_runs_goes_on(state: Path) -> None:
    """The state directory on a file system of its own, which somebody fills."""
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(state)], check=True)
    beat = "import time\nn = 0\nwhile True:\n    print(n, flush=True)\n    n += 1\n    time.sleep(0.02)"

    async def main() -> None:
        async with driver_at(state) as driver:
            id = await started(driver, python("going", beat))
            assert await first_line(driver, id) == "0"
            fill(state / "filler")
            with pytest.raises(FalError) as caught:
                await driver.create(python("late", "pass"))
            assert caught.value.code is Code.DRIVER_FAILED
            assert "no space left on device" in caught.value.what
            assert "Free space" in caught.value.remedy
            status = await driver.status(id)
            assert status is not None
            assert status.phase is Phase.RUNNING
            assert [one.id for one in await driver.list()] == [id], "nothing of the other is left"
            assert (await driver.stop(id, grace_s=0)).reason == "stopped: SIGTERM was ignored for 0 s, then SIGKILL"
            (state / "filler").unlink()
            assert (await ended(driver, python("later", "print(1)"))).exit_code == 0

    try:
        run(main())
    finally:
        subprocess.run(["umount", str(state)], check=True)


def test_an_end_while_the_disk_is_full_keeps_its_exit_code(state: Path) -> None:
    """Also for the next driver: conmon's word is not on that disk."""
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(state)], check=True)
    code = "import signal, sys\nsignal.signal(10, lambda *_: sys.exit(3))\nprint('up', flush=True)\nsignal.pause()"

    async def main() -> None:
        async with driver_at(state) as driver:
            id = await started(driver, python("ends", code))
            assert await first_line(driver, id) == "up"
            fill(state / "filler")
            status = await driver.status(id)
            assert status is not None
            assert status.pid is not None
            os.kill(status.pid, 10)
            ends = await driver.wait(id)
            assert (ends.exit_code, ends.reason) == (3, "exited with code 3")
            assert not (state / "containers" / id / "ended.json").exists(), "the disk is full"
            heir = OciDriver(state)
            again = await heir.status(id)
            assert again == ends
            await heir.remove(id)
            heir.close()

    try:
        run(main())
    finally:
        subprocess.run(["umount", str(state)], check=True)


async def output(driver: OciDriver, id: str, *command: str) -> tuple[str, int]:
    """Standard output of a command in a container, and its exit code."""
    session = await driver.exec(id, command)
    said = b""
    try:
        while (got := await session.read()) is not None:
            said += got[1]
        return said.decode(), await session.wait()
    finally:
        await session.close()


def test_a_command_in_a_container_may_do_no_more_than_the_container(state: Path) -> None:
    waits = "print('up', flush=True)\nimport time\ntime.sleep(600)"
    show = "print(open('/proc/self/status').read(), open('/proc/self/cgroup').read(), open('/proc/self/limits').read())"
    limits = Resources(memory_bytes=128 << 20, pids_max=32)

    async def main() -> None:
        async with driver_at(state) as driver:
            id = await started(driver, python("bound", waits, resources=limits))
            assert await first_line(driver, id) == "up"
            said, code = await output(driver, id, PYTHON, "-c", show)
            assert code == 0
            facts = dict(line.split(":", 1) for line in said.splitlines() if ":\t" in line)
            assert [int(facts[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")] == [0] * 5
            assert (facts["NoNewPrivs"].strip(), facts["Seccomp"].strip()) == ("1", "2")
            status = await driver.status(id)
            assert status is not None
            ours, _ = await output(driver, id, "/bin/cat", "/proc/1/cgroup")
            assert all(line in said for line in ours.splitlines())
            for link in ("pid", "mnt", "net", "ipc", "uts", "user"):
                there, _ = await output(driver, id, "/usr/bin/readlink", f"/proc/self/ns/{link}")
                assert there.strip() == os.readlink(f"/proc/{status.pid}/ns/{link}")
            again, code = await output(driver, id, "/bin/sh", "-c", "echo reopened > /dev/stdout")
            assert (again, code) == ("reopened\n", 0)
            _, code = await output(driver, id, PYTHON, "-c", EAT)
            assert code != 0, "what it eats counts to the container"
            status = await driver.status(id)
            assert status is not None
            assert status.oom_killed

    run(main())
