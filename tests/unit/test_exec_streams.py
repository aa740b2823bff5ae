"""Commands through the scheduler: what reaches the node, what ends them, and that no side can fill memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.limits import EXEC_DATA_BYTES_MAX, EXEC_WINDOW_BYTES
from fal_contract.v1 import agent_pb2
from fal_scheduler.exec_streams import BACKLOG_MAX, HALF_CLOSE_S, QUEUE_MAX, ExecStreams
from virtual_time import run_virtually

NODE = "n1"


class Rig:
    """The streams between a node that is a list and an operator that is a queue."""

    def __init__(self, *, connected: bool = True) -> None:
        self.told: list[agent_pb2.SchedulerMessage] = []
        self.connected = connected
        self.backlog = 0
        self.streams = ExecStreams(self._push, lambda node_id: self.backlog)
        self.typed: asyncio.Queue[agent_pb2.ExecInput | None] = asyncio.Queue()

    def _push(self, node_id: str, message: agent_pb2.SchedulerMessage) -> bool:
        if self.connected:
            self.told.append(agent_pb2.SchedulerMessage.FromString(message.SerializeToString()))
        return self.connected

    async def _inputs(self) -> AsyncIterator[agent_pb2.ExecInput]:
        while (message := await self.typed.get()) is not None:
            yield message

    def run(self) -> Any:
        return aclosing(self.streams.run(NODE, agent_pb2.ExecOpen(runner_id="t/a-1"), self._inputs()))  # type: ignore[type-var]

    def say(self, **fields: object) -> None:
        self.streams.take(NODE, agent_pb2.ExecOutput(id=1, **fields))  # type: ignore[arg-type]

    def inputs(self) -> list[agent_pb2.ExecInput]:
        return [x.exec_input for x in self.told if x.WhichOneof("kind") == "exec_input"]


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    run_virtually(scenario())  # type: ignore[arg-type]


async def settled() -> None:
    await asyncio.sleep(1)  # of virtual time


def test_a_command_from_its_first_word_to_its_last() -> None:
    async def scenario() -> None:
        rig = Rig()
        async with rig.run() as outputs:
            first = asyncio.ensure_future(anext(outputs))
            await settled()
            assert rig.told[0].exec_open == agent_pb2.ExecOpen(id=1, runner_id="t/a-1")
            rig.say()
            await first
            rig.typed.put_nowait(agent_pb2.ExecInput(data=b"hello"))
            rig.typed.put_nowait(agent_pb2.ExecInput(rows=3, columns=4))
            rig.typed.put_nowait(None)
            await settled()
            assert [(x.id, x.data, x.rows, x.end) for x in rig.inputs()] == [
                (1, b"hello", 0, False), (1, b"", 3, False), (1, b"", 0, True),
            ]  # fmt: skip
            for n in range(5):
                rig.say(data=b"%d" % n)
            rig.say(end=True, exit_code=3)
            got = [output async for output in outputs]
        assert b"".join(x.data for x in got) == b"01234"
        assert got[-1].exit_code == 3
        assert not any(x.cancel for x in rig.inputs()), "what has ended is not cancelled"

    play(scenario)


@pytest.mark.parametrize("closes", [True, False], ids=["closes", "stays"])
def test_the_call_is_open_until_the_operators_half_is_closed(closes: bool) -> None:
    async def scenario() -> None:
        rig = Rig()
        async with rig.run() as outputs:
            last = asyncio.ensure_future(anext(outputs))
            await settled()
            rig.say(end=True, exit_code=3)
            assert (await last).exit_code == 3
            over = asyncio.ensure_future(anext(outputs, None))
            await settled()
            assert not over.done(), "a write of the operator's may be on its way"
            rig.typed.put_nowait(agent_pb2.ExecInput(data=b"late") if not closes else None)
            await settled()
            assert over.done() == closes
            await asyncio.sleep(HALF_CLOSE_S)
            assert over.done(), "nobody holds a call that is over"
            assert rig.inputs() == [], "nothing of it reaches the node"

    play(scenario)


def test_the_operators_going_kills_the_command() -> None:
    async def scenario() -> None:
        rig = Rig()
        async with rig.run() as outputs:
            rig.say()  # before it was opened: of nobody
            first = asyncio.ensure_future(anext(outputs))
            await settled()
            rig.say()
            await first
        assert [x.cancel for x in rig.inputs()] == [True]
        rig.say(data=b"late")  # changes nothing

    play(scenario)


def test_the_sessions_end_is_the_commands() -> None:
    async def scenario() -> None:
        rig = Rig()
        async with rig.run() as outputs:
            first = asyncio.ensure_future(anext(outputs))
            await settled()
            rig.say()
            await first
            rig.streams.node_gone("another")
            rig.streams.node_gone(NODE)
            (last,) = [output async for output in outputs]
        assert (last.end, last.exit_code) == (True, 255)
        assert "broke" in last.error

    play(scenario)


def test_a_silent_node_is_unavailable() -> None:
    async def scenario() -> None:
        for rig in (Rig(connected=False), Rig()):
            with pytest.raises(FalError) as caught:
                async with rig.run() as outputs:
                    await anext(outputs)
            assert caught.value.code is Code.UNAVAILABLE
            with pytest.raises(FalError) as caught:
                await rig.streams.top(NODE, "t/a-1")
            assert caught.value.code is Code.UNAVAILABLE

    play(scenario)


@pytest.mark.parametrize(("size", "count"), [(EXEC_DATA_BYTES_MAX, 20), (1, QUEUE_MAX + 1)])
def test_a_node_that_sends_more_than_was_taken_loses_the_command(size: int, count: int) -> None:
    async def scenario() -> None:
        rig = Rig()
        async with rig.run() as outputs:
            first = asyncio.ensure_future(anext(outputs))
            await settled()
            rig.say()
            await first
            for _ in range(count):
                rig.say(data=b"x" * size)
            got = [output async for output in outputs]
        assert sum(len(x.data) for x in got) <= EXEC_WINDOW_BYTES
        assert "more than was taken" in got[-1].error
        assert rig.inputs()[-1].cancel

    play(scenario)


def test_an_operator_that_sends_more_than_was_taken_is_refused() -> None:
    async def scenario() -> None:
        rig = Rig()
        async with rig.run() as outputs:
            first = asyncio.ensure_future(anext(outputs))
            await settled()
            rig.say()
            await first
            for _ in range(20):
                rig.typed.put_nowait(agent_pb2.ExecInput(data=b"x" * EXEC_DATA_BYTES_MAX))
            with pytest.raises(FalError) as caught:
                await anext(outputs)
        assert caught.value.code is Code.INVALID
        assert sum(len(x.data) for x in rig.inputs()) <= EXEC_WINDOW_BYTES
        assert rig.inputs()[-1].cancel

    play(scenario)


def test_input_waits_while_the_nodes_session_has_much_to_send() -> None:
    async def scenario() -> None:
        rig = Rig()
        async with rig.run() as outputs:
            first = asyncio.ensure_future(anext(outputs))
            await settled()
            rig.say()
            await first
            rig.backlog = BACKLOG_MAX + 1
            rig.typed.put_nowait(agent_pb2.ExecInput(data=b"x"))
            await settled()
            assert rig.inputs() == []
            rig.backlog = 0
            await settled()
            assert [x.data for x in rig.inputs()] == [b"x"]

    play(scenario)


def test_top_is_answered_by_the_node_that_was_asked() -> None:
    async def scenario() -> None:
        rig = Rig()
        asking = asyncio.ensure_future(rig.streams.top(NODE, "t/a-1"))
        await settled()
        request = rig.told[0].top
        assert request.runner_id == "t/a-1"
        rig.streams.take_top("n2", agent_pb2.TopReply(id=request.id, pids=9))
        rig.streams.take_top(NODE, agent_pb2.TopReply(id=request.id, pids=1))
        rig.streams.take_top(NODE, agent_pb2.TopReply(id=request.id, pids=2))
        assert (await asking).pids == 1
        asking = asyncio.ensure_future(rig.streams.top(NODE, "t/a-1"))
        await settled()
        rig.streams.node_gone(NODE)
        with pytest.raises(FalError, match="does not answer"):
            await asking

    play(scenario)
