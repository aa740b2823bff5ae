"""An agent killed with SIGKILL at any step of a container's end and removal: the next one finishes it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contract.driver_cases import oci_missing
from fal_runtime.driver import ContainerSpec, Mount, Phase, Resources
from fal_runtime.oci import cgroups, mounts
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.driver import OciDriver

pytestmark = [pytest.mark.oci, pytest.mark.root, pytest.mark.slow]
TESTS = Path(__file__).resolve().parents[1]
TIMEOUT_S = 60.0


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """See oci_cut_child.py."""
    if why := oci_missing():
        pytest.skip(f"no containers here: {why}")
    command = [sys.executable, str(TESTS / "oci_cut_child.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            yield process
        finally:
            process.kill()


def cut(child: subprocess.Popen[str], state: Path, id: str, at: int) -> str:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{state} {id} {at}\n")
    return child.stdout.readline().strip()


async def made(driver: OciDriver, folder: Path, id: str) -> tuple[int, int]:
    """A running container with all that a removal takes away; its pids."""
    (folder / "data").mkdir(exist_ok=True)
    spec = ContainerSpec(
        id=id,
        command=("/bin/sh", "-c", "echo up; exec sleep 600"),
        socket_dir=folder / f"s-{id}",
        models_dir=folder / f"m-{id}",
        mounts=(Mount(folder / "data", "/data"),),
        resources=Resources(1000, 64 << 20, 32),
    )
    await driver.create(spec)
    await driver.start(id)
    await driver.attach_model(id, "m", folder / "data")
    created = json.loads((driver._containers / id / "created.json").read_text())
    return created["pid"], created["conmon"]


async def taken_over(state: Path, id: str) -> int | None:
    """What the next agent does: a container that is there has an end with a code, and goes. None: it was going."""
    heir = OciDriver(state)
    try:
        status = await heir.status(id)
        code = None
        if status is not None:
            ended = await heir.kill(id)
            assert ended.phase is Phase.EXITED
            assert await heir.kill(id) == ended, "told the same each time"
            code = ended.exit_code
            assert code is not None, ended
            await heir.remove(id)
        await heir.clean(frozenset())
        assert await heir.list() == []
    finally:
        heir.close()
    return code


def left(driver: OciDriver, folder: Path, id: str, pids: tuple[int, ...]) -> list[str]:
    found = [f"mount {point}" for point in mounts.mount_points() if folder in point.parents or id in str(point)]
    found += [f"cgroup {name}" for name in cgroups.below("/falctl") if id in name]
    found += [f"process {pid}" for pid in pids if id in command_line(pid)]
    found += [f"file {path}" for path in (folder / f"s-{id}", folder / f"m-{id}") if path.exists()]
    found += [f"file {path}" for path in driver._containers.iterdir()]
    return found + [f"file {path}" for path in driver._run.rglob("*") if id in str(path)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


@pytest.mark.timeout(600)
def test_killed_at_every_step_of_an_end(
    child: subprocess.Popen[str], tmp_path: Path, scale: Callable[[int], int]
) -> None:
    state = tmp_path / "state"
    mode: Mode | None = None

    async def once(at: int) -> tuple[str, int | None]:
        async with asyncio.timeout(TIMEOUT_S):
            id = f"cut{at}-{os.urandom(3).hex()}"
            nonlocal mode
            maker = OciDriver(state, mode=mode)
            pids = await made(maker, tmp_path, id)
            mode = maker._mode  # the probe is the slow part
            maker.close()
            said = await asyncio.to_thread(cut, child, state, id, at)
            code = await taken_over(state, id)
            assert left(maker, tmp_path, id, pids) == []
            return said, code

    async def main() -> None:
        said, code = await once(-1)
        steps = int(said)
        assert steps > 20
        assert code is None
        count = min(steps, scale(40))
        codes = {}
        for at in sorted({round(n * (steps - 1) / max(1, count - 1)) for n in range(count)}):
            said, codes[at] = await once(at)
            assert said == "killed" or int(said) <= at, said  # one run may need a step fewer than another
        assert codes[0] == 137, "killed before anything was done"
        seen = list(codes.values())
        assert seen == sorted(seen, key=lambda code: code is None), "once it is gone it stays gone"
        assert set(seen) <= {137, None}

    try:
        asyncio.run(main())
    finally:
        last = OciDriver(state)
        asyncio.run(last.clean(frozenset()))
        last.close()
