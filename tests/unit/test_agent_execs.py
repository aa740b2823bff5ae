"""Commands over a node's session, with the scheduler's side in the test's hand: order, windows, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fal_agent.execs import Execs
from fal_contract.exec_window import SendWindow
from fal_contract.limits import EXEC_DATA_BYTES_MAX, EXEC_WINDOW_BYTES, EXECS_PER_NODE_MAX
from fal_contract.v1 import agent_pb2
from fal_runtime.container_use import ContainerUse
from fal_runtime.driver import ContainerSpec
from fal_runtime.exec_session import ExecSession, Terminal
from fal_runtime.fake import FakeDriver, Machine, Script
from virtual_time import LoopClock, run_virtually

RUNNER = "t/a-1"


class Side:
    """The node with one running container, and what it says."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.said: asyncio.Queue[agent_pb2.AgentMessage] = asyncio.Queue()
        self.opened: list[ExecSession] = []
        self.execs = Execs(self, self._send)

    async def _send(self, message: agent_pb2.AgentMessage) -> None:
        self.said.put_nowait(message)

    async def exec(self, runner_id: str, command: tuple[str, ...], terminal: Terminal | None) -> ExecSession:
        session = await self.driver.exec(runner_id.replace("/", "."), command, terminal=terminal)
        self.opened.append(session)
        return session

    async def top(self, runner_id: str) -> ContainerUse:
        return await self.driver.top(runner_id.replace("/", "."))

    async def why_ended(self, runner_id: str) -> str:
        status = await self.driver.status(runner_id.replace("/", "."))
        return "" if status is None or status.phase != "EXITED" else status.reason

    def open(self, *words: str, id: int = 1, **more: object) -> None:
        command = ("python", "-c", "", *words) if words else ()
        self.execs.open(agent_pb2.ExecOpen(id=id, runner_id=RUNNER, command=command, **more))  # type: ignore[arg-type]

    def input(self, id: int = 1, **more: object) -> None:
        self.execs.input(agent_pb2.ExecInput(id=id, **more))  # type: ignore[arg-type]

    async def output(self) -> agent_pb2.ExecOutput:
        async with asyncio.timeout(30):
            return (await self.said.get()).exec_output

    async def until_end(self) -> list[agent_pb2.ExecOutput]:
        got = [await self.output()]
        while not got[-1].end:
            got.append(await self.output())
        return got

    async def nothing_more(self) -> None:
        """Nothing is said while nothing is heard."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await self.said.get()


def play(scenario: Callable[[Side], Awaitable[None]]) -> None:
    async def main() -> None:
        driver = FakeDriver(Machine(clock=LoopClock(), script_of=lambda spec: Script()))
        await driver.create(ContainerSpec(id="t.a-1", command=("true",)))
        await driver.start("t.a-1")
        side = Side(driver)
        try:
            await scenario(side)
        finally:
            await side.execs.close()

    run_virtually(main())


def test_output_comes_in_order_with_the_exit_code_last() -> None:
    async def scenario(side: Side) -> None:
        side.open("say=one", "err=two", "exit=3")
        opened, *got = await side.until_end()
        assert (opened.data, opened.end) == (b"", False), "the first word says that it runs"
        assert [(x.stream, x.data) for x in got[:-1]] == [("stdout", b"one\n"), ("stderr", b"two\n")]
        assert (got[-1].exit_code, got[-1].error) == (3, "")

    play(scenario)


def test_a_slow_operator_holds_the_command_back() -> None:
    async def scenario(side: Side) -> None:
        side.open("cat")
        await side.output()
        given = SendWindow()
        came = sent = 0
        while given.room_bytes:  # until neither side takes any more
            side.input(data=b"x" * given.room_bytes)
            sent += given.room_bytes
            given.sent(given.room_bytes)
            await asyncio.sleep(1)
            while not side.said.empty():
                said = side.said.get_nowait().exec_output
                came += len(said.data)
                given.taken(said.taken_bytes)
        assert came == EXEC_WINDOW_BYTES, "exactly the window, and no more"
        assert EXEC_WINDOW_BYTES < sent <= 8 * EXEC_WINDOW_BYTES, "the fake keeps 32 messages itself"
        await side.nothing_more()
        side.input(taken_bytes=came // 2)
        assert (await side.output()).data, "room is used at once"
        side.input(cancel=True)

    play(scenario)


def test_who_ignores_the_window_loses_the_command() -> None:
    async def scenario(side: Side) -> None:
        side.open("forever")
        await side.output()
        for _ in range(20):
            side.input(data=b"x" * EXEC_DATA_BYTES_MAX)
        (*_, last) = await side.until_end()
        assert last.exit_code == 126
        assert "more than the window" in last.error

    play(scenario)


def test_the_operators_end_and_the_sessions_end_kill_the_command_and_not_the_container() -> None:
    async def scenario(side: Side) -> None:
        side.open("forever")
        side.open("forever", id=2)
        await side.output()
        await side.output()
        first, second = side.opened
        side.input(cancel=True)
        assert await first.wait() == 137
        await side.execs.close()
        assert await second.wait() == 137
        status = await side.driver.status("t.a-1")
        assert status is not None
        assert status.phase == "RUNNING"

    play(scenario)


def test_the_containers_end_is_told_with_its_reason() -> None:
    async def scenario(side: Side) -> None:
        side.open("forever")
        await side.output()
        side.driver.machine.exit("t.a-1", 9, "out of memory")
        (last,) = await side.until_end()
        assert (last.exit_code, last.error) == (137, "the container ended: out of memory")

    play(scenario)


def test_sizes_that_come_before_the_command_runs_are_not_lost() -> None:
    async def scenario(side: Side) -> None:
        side.open("size", terminal=True, rows=10, columns=20)
        side.input(rows=30, columns=40)
        await side.output()
        sizes = [(await side.output()).data]
        while sizes[-1] != b"30 40\r\n":
            sizes.append((await side.output()).data)
        assert len(sizes) <= 2
        side.input(rows=50, columns=60)
        assert (await side.output()).data == b"50 60\r\n"

    play(scenario)


def test_what_cannot_start_says_why_and_a_full_node_refuses() -> None:
    async def scenario(side: Side) -> None:
        side.execs.open(agent_pb2.ExecOpen(id=1, runner_id=RUNNER, command=["/no/such/program"]))
        (only,) = await side.until_end()
        assert only.exit_code == 126
        assert "no such file" in only.error
        for id in range(2, 2 + EXECS_PER_NODE_MAX):
            side.open("forever", id=id)
            assert not (await side.output()).end
        side.open("exit=0", id=1000)
        (refused,) = await side.until_end()
        assert f"{EXECS_PER_NODE_MAX} commands" in refused.error

    play(scenario)


def test_top_answers_or_says_why_not() -> None:
    async def scenario(side: Side) -> None:
        side.execs.top(agent_pb2.TopRequest(id=7, runner_id=RUNNER))
        top = (await side.said.get()).top
        assert (top.id, top.error, len(top.processes), top.processes[0].pid_inside) == (7, "", 1, 1)
        side.execs.top(agent_pb2.TopRequest(id=8, runner_id="t/none-1"))
        top = (await side.said.get()).top
        assert (top.id, "does not exist" in top.error) == (8, True)

    play(scenario)


def test_a_node_that_does_not_look_in_time_says_so() -> None:
    class Slow(Side):
        async def top(self, runner_id: str) -> ContainerUse:
            await asyncio.Event().wait()
            raise AssertionError

    async def scenario(side: Side) -> None:
        slow = Slow(side.driver)
        slow.execs.top(agent_pb2.TopRequest(id=1, runner_id=RUNNER))
        assert "did not look within 10 s" in (await slow.said.get()).top.error

    play(scenario)
