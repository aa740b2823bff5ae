"""What only the process driver has: descendants, reused pids, a dead supervisor, paths that cannot move."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from fal_contract.errors import FalError
from fal_runtime.driver import ContainerSpec, Mount, Phase
from fal_runtime.process import ProcessDriver
from fal_runtime.process_supervisor import start_ticks


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[ProcessDriver]:
    made = ProcessDriver(tmp_path / "state")
    yield made
    run(made.clean(frozenset()))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await main

    return asyncio.run(bounded())


def shell(id: str, script: str, **more: Any) -> ContainerSpec:
    return ContainerSpec(id=id, command=("/bin/sh", "-c", script), **more)


async def first_line(driver: ProcessDriver, spec: ContainerSpec) -> str:
    await driver.create(spec)
    await driver.start(spec.id)
    async with aclosing(driver.logs(spec.id, tail_lines=1, follow=True)) as lines:
        async for line in lines:
            return line.text
    raise AssertionError("it ended without a word")


def test_descendants_end_with_the_container(driver: ProcessDriver, tmp_path: Path) -> None:
    """One in the process group, one that left it for a session of its own."""

    async def main() -> None:
        script = """
sleep 600 & echo $!
setsid sh -c 'echo $$; touch "$FAL_SOCKET_DIR/up"; exec sleep 600' &
while [ ! -e "$FAL_SOCKET_DIR/up" ]; do sleep 0.01; done
"""
        spec = shell("family", script, socket_dir=tmp_path / "s")
        await driver.create(spec)
        await driver.start(spec.id)
        assert (await driver.wait(spec.id)).exit_code == 0
        pids = [int(line.text) async for line in driver.logs(spec.id, tail_lines=9, follow=False)]
        assert len(pids) == 2
        assert [start_ticks(pid) for pid in pids] == [0, 0]

    run(main())


def test_a_reused_pid_is_not_taken_for_the_container(driver: ProcessDriver, tmp_path: Path) -> None:
    async def main() -> None:
        spec = shell("reused", "exit 0")
        await driver.create(spec)
        me = [os.getpid(), start_ticks(os.getpid()) - 1]  # our pid, but a process that began earlier
        pids = {"supervisor": me, "child": me, "started_at_s": 1.0}
        (tmp_path / "state/containers/reused/pids.json").write_text(json.dumps(pids))
        status = await driver.status(spec.id)
        assert status is not None
        assert (status.phase, status.exit_code) == (Phase.EXITED, None)
        assert "lost" in status.reason
        assert (await driver.kill(spec.id)).phase is Phase.EXITED  # and we live

    run(main())


def test_a_dead_supervisor_is_told(driver: ProcessDriver, tmp_path: Path) -> None:
    async def main() -> None:
        spec = shell("orphan", "echo up; exec sleep 600")
        assert await first_line(driver, spec) == "up"
        pids = json.loads((tmp_path / "state/containers/orphan/pids.json").read_text())
        os.kill(pids["supervisor"][0], signal.SIGKILL)
        while start_ticks(pids["supervisor"][0]) == pids["supervisor"][1]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        status = await driver.status(spec.id)
        assert status is not None
        assert status.phase is Phase.RUNNING
        assert "lost" in status.reason
        ended = await driver.kill(spec.id)
        assert (ended.phase, ended.exit_code) == (Phase.EXITED, None)
        assert "lost" in ended.reason

    run(main())


AGENT = """
import asyncio, sys
from pathlib import Path
from fal_runtime.driver import ContainerSpec
from fal_runtime.process import ProcessDriver
async def main():
    driver = ProcessDriver(Path(sys.argv[1]))
    script = 'echo before; while [ ! -e "$FAL_SOCKET_DIR/go" ]; do sleep 0.02; done; echo after; exit 9'
    spec = ContainerSpec(id="survivor", command=("/bin/sh", "-c", script), socket_dir=Path(sys.argv[2]))
    await driver.create(spec)
    await driver.start(spec.id)
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_the_agents_process_group_is_killed_and_nothing_is_lost(driver: ProcessDriver, tmp_path: Path) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(tmp_path / "state"), str(tmp_path / "s")],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert agent.stdout is not None
    try:
        assert agent.stdout.readline() == "up\n"
        os.killpg(agent.pid, signal.SIGKILL)
        assert agent.wait(10) == -signal.SIGKILL
    finally:
        agent.kill()
        agent.wait()
        agent.stdout.close()

    async def main() -> None:
        running = await driver.status("survivor")
        assert running is not None
        assert (running.phase, running.reason) == (Phase.RUNNING, "")
        (tmp_path / "s" / "go").touch()
        assert (await driver.wait("survivor")).exit_code == 9
        assert [line.text async for line in driver.logs("survivor", tail_lines=9, follow=False)] == ["before", "after"]

    run(main())


def test_paths_inside_are_paths_outside(driver: ProcessDriver, tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text("w")
        spec = shell(
            "paths",
            'cat "$FAL_MODELS_DIR/m/weights"; echo; echo $FAL_SOCKET_DIR',
            mounts=(Mount(tmp_path / "data", "/data"),),
            socket_dir=tmp_path / "s",
            models_dir=tmp_path / "models",
        )
        assert driver.inside(spec, "/data/x") == str(tmp_path / "data/x")
        assert driver.inside(spec, "/run/fal/worker.sock") == str(tmp_path / "s/worker.sock")
        assert driver.inside(spec, "/database") == "/database"
        await driver.create(spec)
        assert await driver.attach_model(spec.id, "m", tmp_path / "model") == str(tmp_path / "models/m")
        await driver.start(spec.id)
        await driver.wait(spec.id)
        said = [line.text async for line in driver.logs(spec.id, tail_lines=5, follow=False)]
        assert said == ["w", str(tmp_path / "s")]

    run(main())


def test_a_signal_is_told_as_128_and_its_number(driver: ProcessDriver) -> None:
    async def main() -> None:
        spec = shell("signal", "kill -SEGV $$")
        await driver.create(spec)
        await driver.start(spec.id)
        assert (await driver.wait(spec.id)).exit_code == 128 + signal.SIGSEGV

    run(main())


def test_a_socket_path_that_cannot_be_bound_is_refused(driver: ProcessDriver) -> None:
    with pytest.raises(FalError) as caught:
        run(driver.create(shell("long", "true", socket_dir=Path("/tmp") / ("x" * 120))))
    assert "socket" in caught.value.what
