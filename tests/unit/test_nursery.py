"""The shell that starts conmons: replaced where it was killed or stopped, never waited for on the event loop."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_runtime.oci import cgroups, nursery, user_counts
from fal_runtime.oci.nursery import SYNC_FD, Nursery

TIMEOUT_S = 30.0
SAY = ("/bin/sh", "-c", f"echo here >&{SYNC_FD}")


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No cgroups here; the shells that would have been moved."""
    moved: list[int] = []
    monkeypatch.setattr(cgroups, "make_parent", lambda *_args, **_more: None)
    monkeypatch.setattr(cgroups, "enter", lambda pid, _cgroup: moved.append(pid))
    return moved


def play(scenario: Callable[[Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        shell = Nursery()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await scenario(shell)
        finally:
            shell.close()

    asyncio.run(main())


async def said(shell: Nursery, folder: Path) -> bytes:
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    arrived = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, arrived.set)
    try:
        await shell.spawn(SAY, folder, fifo)
        await arrived.wait()
        return os.read(fd, 100)
    finally:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        fifo.unlink()


async def reaped(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110  (the kernel has no event for it)
        await asyncio.sleep(0.01)


def test_a_killed_shell_is_replaced(tmp_path: Path, entered: list[int]) -> None:
    async def scenario(shell: Nursery) -> None:
        assert await said(shell, tmp_path) == b"here\n"
        os.kill(entered[0], signal.SIGKILL)
        await asyncio.to_thread(os.waitid, os.P_PID, entered[0], os.WEXITED | os.WNOWAIT)
        assert await said(shell, tmp_path) == b"here\n"
        assert len(entered) == 2

    play(scenario)


def test_a_stopped_shell_blocks_nothing_and_is_replaced(
    tmp_path: Path, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "_FULL_S", 0.1)

    async def scenario(shell: Nursery) -> None:
        assert await said(shell, tmp_path) == b"here\n"
        os.kill(entered[0], signal.SIGSTOP)

        async def fill() -> None:
            for _ in range(1000):  # the pipe takes some of them
                await shell.spawn(("true", "x" * 3000), tmp_path, tmp_path / "none")

        with pytest.raises(FalError) as refused:
            await fill()
        assert refused.value.code is Code.DRIVER_FAILED
        assert "Try again" in refused.value.remedy
        await reaped(entered[0])
        assert await said(shell, tmp_path) == b"here\n"

    play(scenario)


def test_the_end_of_a_stopped_shell_is_not_waited_for(tmp_path: Path, entered: list[int]) -> None:
    async def scenario(shell: Nursery) -> None:
        assert await said(shell, tmp_path) == b"here\n"
        os.kill(entered[0], signal.SIGSTOP)
        shell.close()
        await reaped(entered[0])

    play(scenario)


def test_a_line_that_a_pipe_would_tear_is_refused(tmp_path: Path, entered: list[int]) -> None:
    async def scenario(shell: Nursery) -> None:
        with pytest.raises(FalError, match="shorter path"):
            await shell.spawn(("true", "x" * select.PIPE_BUF), tmp_path, tmp_path / "none")
        assert entered == []

    play(scenario)


def test_nothing_is_started_before_the_shell_is_in_its_cgroup(
    tmp_path: Path, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(shell: Nursery) -> None:
        may_go, loop = asyncio.Event(), asyncio.get_running_loop()

        def enter(pid: int, _cgroup: str) -> None:
            asyncio.run_coroutine_threadsafe(may_go.wait(), loop).result(TIMEOUT_S)
            entered.append(pid)

        monkeypatch.setattr(cgroups, "enter", enter)
        first = asyncio.create_task(said(shell, tmp_path))
        (tmp_path / "other").mkdir()
        await asyncio.sleep(0)
        second = asyncio.create_task(said(shell, tmp_path / "other"))
        done, _ = await asyncio.wait({first, second}, timeout=0.2)
        assert not done
        may_go.set()
        assert [await first, await second] == [b"here\n", b"here\n"]
        assert len(entered) == 1

    play(scenario)


def test_an_answer_is_what_was_said_first_and_leaves_no_file(tmp_path: Path) -> None:
    async def scenario(shell: Nursery) -> None:
        says = ("/bin/sh", "-c", f"echo first >&{SYNC_FD}")
        assert await shell.ask(says, tmp_path, "answer", TIMEOUT_S) == b"first\n"
        assert not list(tmp_path.iterdir())

    play(scenario)


def test_a_command_that_ends_without_a_word_is_seen_at_once(tmp_path: Path) -> None:
    async def scenario(shell: Nursery) -> None:
        assert await shell.ask(("/no/such/program",), tmp_path, "answer", TIMEOUT_S) == b""
        assert await shell.ask(("/bin/sh", "-c", "exit 1"), tmp_path, "answer", TIMEOUT_S) == b""
        assert not list(tmp_path.iterdir())

    play(scenario)


def test_a_container_that_has_gone_cannot_be_bounded(tmp_path: Path) -> None:
    async def scenario(shell: Nursery) -> None:
        with pytest.raises(FalError, match="bounding of container gone failed") as caught:
            await user_counts.bound("gone", 1 << 30, tmp_path, shell)  # above the highest pid
        assert caught.value.code is Code.DRIVER_FAILED

    play(scenario)
