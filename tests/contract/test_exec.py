"""Commands beside a container's own, on all three drivers: input, output, terminals, their end; and `top`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import Bench, fake_bench, oci_bench, oci_missing, process_bench
from fal_contract.errors import Code, FalError
from fal_runtime.driver import Resources
from fal_runtime.exec_session import ExecSession, Terminal

TIMEOUT_S = 60.0
# The same words as in fal_runtime.fake_exec.
COMMAND = """
import os, signal, sys, time
for word in sys.argv[1:]:
    key, _, value = word.partition("=")
    if key == "say":
        print(value, flush=True)
    elif key == "err":
        print(value, file=sys.stderr, flush=True)
    elif key == "exit":
        sys.exit(int(value))
    elif key == "cat":
        while data := os.read(0, 65536):
            at = 0
            while at < len(data):
                at += os.write(1, data[at:])
    elif key == "size":
        signal.signal(signal.SIGWINCH, lambda *_: print(*reversed(os.get_terminal_size(0)), flush=True))
        print(*reversed(os.get_terminal_size(0)), flush=True)
        while True:
            time.sleep(60)
    elif key == "forever":
        time.sleep(3600)
"""


@pytest.fixture(params=["fake", "process", pytest.param("oci", marks=[pytest.mark.oci, pytest.mark.root])])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "fake":
        made = fake_bench(tmp_path)
    elif request.param == "process":
        made = process_bench(tmp_path)
    elif oci_missing():
        pytest.skip(f"no containers here: {oci_missing()}")
    else:
        made = oci_bench(tmp_path)
    yield made

    async def clean() -> None:
        await made.again().clean(frozenset())

    asyncio.run(clean())


@asynccontextmanager
async def running(bench: Bench, **more: object) -> AsyncIterator[str]:
    async with asyncio.timeout(TIMEOUT_S):
        spec = bench.spec("host", "forever", **more)
        await bench.driver.create(spec)
        await bench.driver.start(spec.id)
        yield spec.id


async def opened(bench: Bench, id: str, *words: str, terminal: Terminal | None = None) -> ExecSession:
    return await bench.driver.exec(id, (bench.python, "-c", COMMAND, *words), terminal=terminal)


async def output(session: ExecSession) -> dict[str, bytes]:
    """Everything until no more comes."""
    said = {"stdout": b"", "stderr": b""}
    while (got := await session.read()) is not None:
        said[got[0]] += got[1]
    return said


async def until(session: ExecSession, end: bytes) -> bytes:
    """Output up to `end`."""
    said = b""
    while end not in said:
        got = await session.read()
        assert got is not None, said
        said += got[1]
    return said


def test_output_and_exit_code_of_a_command(bench: Bench) -> None:
    async def main() -> None:
        async with running(bench) as id:
            session = await opened(bench, id, "say=out", "err=wrong", "exit=7")
            try:
                assert await output(session) == {"stdout": b"out\n", "stderr": b"wrong\n"}
                assert await session.wait() == 7
                assert await session.read() is None
            finally:
                await session.close()

    asyncio.run(main())


def test_a_megabyte_comes_back_as_it_was_given(bench: Bench) -> None:
    data = os.urandom(1 << 20)

    async def main() -> None:
        async with running(bench) as id:
            session = await opened(bench, id, "cat")

            async def feed() -> None:
                for at in range(0, len(data), 30_000):
                    await session.write(data[at : at + 30_000])
                session.close_input()

            try:
                feeding = asyncio.create_task(feed())
                assert (await output(session))["stdout"] == data
                await feeding
                assert await session.wait() == 0
                await session.write(b"nobody reads this")
            finally:
                await session.close()

    asyncio.run(main())


def test_a_terminal_has_the_size_it_was_given_and_changes_it(bench: Bench) -> None:
    async def main() -> None:
        async with running(bench) as id:
            session = await opened(bench, id, "err=at a terminal", "size", terminal=Terminal(31, 97))
            try:
                said = await until(session, b"31 97\r\n")
                assert b"at a terminal\r\n" in said
                session.resize(11, 222)
                assert b"11 222\r\n" in await until(session, b"11 222\r\n")
                session.kill()
                assert await session.wait() == 137
            finally:
                await session.close()

    asyncio.run(main())


def test_a_command_that_does_not_exist_says_so(bench: Bench) -> None:
    async def main() -> None:
        async with running(bench) as id:
            with pytest.raises(FalError) as caught:
                await bench.driver.exec(id, ("/no/such/program",))
            assert caught.value.code is Code.DRIVER_FAILED
            assert "/no/such/program" in caught.value.what
            assert "no such file" in caught.value.what
            assert caught.value.remedy
            with pytest.raises(FalError) as caught:
                await bench.driver.exec(id, ("sh", "a\0b"))
            assert (caught.value.code, caught.value.field) == (Code.INVALID, "command")
            # Nothing of it is left, and the next one works.
            session = await opened(bench, id, "exit=0")
            assert await session.wait() == 0
            await session.close()

    asyncio.run(main())


def test_no_command_means_a_shell(bench: Bench) -> None:
    async def main() -> None:
        async with running(bench) as id:
            session = await bench.driver.exec(id, ())
            try:
                await session.write(b"echo a shell\n")
                assert b"a shell" in await until(session, b"a shell")
                session.close_input()
                await output(session)
                assert await session.wait() == 0
            finally:
                await session.close()

    asyncio.run(main())


def test_a_command_ends_with_its_container_and_never_the_other_way_round(bench: Bench) -> None:
    async def main() -> None:
        async with running(bench) as id:
            first = await opened(bench, id, "say=up", "forever")
            assert await until(first, b"up\n")
            await first.close()
            status = await bench.driver.status(id)
            assert status is not None
            assert status.phase == "RUNNING", "closing a session leaves the container alone"
            second = await opened(bench, id, "say=up", "forever")
            assert await until(second, b"up\n")
            await bench.driver.kill(id)
            assert await second.wait() == 137
            await second.close()
            with pytest.raises(FalError) as caught:
                await opened(bench, id, "say=up")
            assert caught.value.code is Code.FAILED_PRECONDITION

    asyncio.run(main())


def test_of_an_unknown_container(bench: Bench) -> None:
    async def main() -> None:
        for call in (bench.driver.exec("nobody", ("true",)), bench.driver.top("nobody")):
            with pytest.raises(FalError) as caught:
                await call
            assert caught.value.code is Code.NOT_FOUND

    asyncio.run(main())


def test_top_shows_the_processes_and_what_they_use(bench: Bench) -> None:
    limits = Resources(memory_bytes=1 << 30, pids_max=100)

    async def main() -> None:
        async with running(bench, resources=limits) as id:
            before = await bench.driver.top(id)
            assert len(before.processes) == 1
            assert before.memory_bytes > 0
            if bench.name != "process":
                assert before.memory_bytes_max == limits.memory_bytes
            if bench.name == "fake":
                return
            session = await opened(bench, id, "say=up", "forever")
            assert await until(session, b"up\n")
            after = await bench.driver.top(id)
            commands = [row.command for row in after.processes]
            if bench.name == "oci":
                assert len(commands) == 2
                assert all(row.uid == 0 for row in after.processes)
                assert {row.pid_inside for row in after.processes} >= {1}
                assert after.pids == sum(row.threads for row in after.processes)
                assert (after.pids_max, after.oom_kills) == (100, 0)
            assert all(bench.python in command for command in commands)
            assert all(len(command.encode()) <= 256 and "\n" not in command for command in commands)
            assert all(row.threads == 1 and row.memory_bytes > 0 and row.state in "RSD" for row in after.processes)
            await session.close()
            await bench.driver.kill(id)
            ended = await bench.driver.top(id)
            assert ended.processes == ()

    asyncio.run(main())
