"""Commands in runners' containers, and looks at them, between an operator and a node's session.

Flow control is the two ends' (fal_contract.exec_window); here each direction is held to the window, so that neither a
mad agent nor a mad client fills memory or the node's session. A command ends when its node says so, when the operator
goes away (the node is told to kill it) or when the node's session ends (the node kills it itself). Nothing is kept.

The operator's side ends the call: a write that meets a call which the server has ended makes gRPC's client forget what
it has received, the exit code too. So after the last output the stream stays open until the client has closed its half.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.exec_window import SendWindow
from fal_contract.limits import EXEC_START_TIMEOUT_S, EXEC_WINDOW_BYTES, EXEC_WINDOW_MESSAGES, TOP_TIMEOUT_S
from fal_contract.v1 import agent_pb2

EXECS_MAX: Final = 512
TOPS_MAX: Final = 256
QUEUE_MAX: Final = 2 * EXEC_WINDOW_MESSAGES  # output, and words about input
BACKLOG_MAX: Final = 128  # of a node's session; it ends at 1024
BACKLOG_RECHECK_S: Final = 0.02
HALF_CLOSE_S: Final = 5.0  # for the operator's side to end what it sends
EXIT_LOST: Final = 255
Push = Callable[[str, agent_pb2.SchedulerMessage], bool]


@dataclass(eq=False, slots=True)
class _Exec:
    node_id: str
    queue: asyncio.Queue[agent_pb2.ExecOutput]
    waiting_bytes: int = 0
    down: SendWindow = field(default_factory=SendWindow)


class ExecStreams:
    """All commands and looks of one leader.

    `push` sends a message to a node, False where it has no session; `backlog` says how many wait to be sent to it.
    """

    def __init__(self, push: Push, backlog: Callable[[str], int]) -> None:
        self._push = push
        self._backlog = backlog
        self._execs: dict[int, _Exec] = {}
        self._tops: dict[int, tuple[str, asyncio.Future[agent_pb2.TopReply]]] = {}
        self._ids = itertools.count(1)

    async def run(
        self, node_id: str, opening: agent_pb2.ExecOpen, inputs: AsyncIterator[agent_pb2.ExecInput]
    ) -> AsyncIterator[agent_pb2.ExecOutput]:
        """Output until the last message, which has `end`. UNAVAILABLE (the node is silent), BUSY, INVALID (input)."""
        if len(self._execs) >= EXECS_MAX:
            raise FalError(Code.BUSY, f"{EXECS_MAX} commands are open", remedy="Close some, or try later.")
        id_ = next(self._ids)
        one = self._execs[id_] = _Exec(node_id, asyncio.Queue(QUEUE_MAX + 1))
        opening.id = id_
        over = not self._push(node_id, agent_pb2.SchedulerMessage(exec_open=opening))
        feeding: asyncio.Task[None] | None = None
        try:
            if over:
                raise _silent(node_id)
            feeding = asyncio.create_task(self._feed(id_, one, inputs))
            output = await self._first(one)
            while True:
                over = output.end
                one.waiting_bytes -= len(output.data)
                yield output
                if over:
                    self._execs.pop(id_, None)
                    await asyncio.wait({feeding}, timeout=HALF_CLOSE_S)
                    return
                output = await self._next(one, feeding)
        finally:
            self._execs.pop(id_, None)
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            if not over:
                cancel = agent_pb2.ExecInput(id=id_, cancel=True)
                self._push(node_id, agent_pb2.SchedulerMessage(exec_input=cancel))

    async def _first(self, one: _Exec) -> agent_pb2.ExecOutput:
        try:
            async with asyncio.timeout(EXEC_START_TIMEOUT_S):
                return await one.queue.get()
        except TimeoutError:
            raise _silent(one.node_id) from None

    async def _next(self, one: _Exec, feeding: asyncio.Task[None]) -> agent_pb2.ExecOutput:
        """The next output; raises what is wrong with the input."""
        getting = asyncio.ensure_future(one.queue.get())
        try:
            if not feeding.done():
                either: set[asyncio.Future[object]] = {getting, feeding}  # type: ignore[arg-type]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
            return await getting
        finally:
            getting.cancel()

    async def _feed(self, id_: int, one: _Exec, inputs: AsyncIterator[agent_pb2.ExecInput]) -> None:
        """What the operator sends; the end of its stream is the end of the input."""
        async for message in inputs:
            message.id = id_
            if message.data:
                _check_window(one.down, len(message.data))
            await self._tell(one, message)
        await self._tell(one, agent_pb2.ExecInput(id=id_, end=True))

    async def _tell(self, one: _Exec, message: agent_pb2.ExecInput) -> None:
        """Hold the operator back while the node's session has much to send already: a full one would end."""
        while self._backlog(one.node_id) > BACKLOG_MAX:  # noqa: ASYNC110  (rare, and no event of the session's)
            await asyncio.sleep(BACKLOG_RECHECK_S)
        if self._execs.get(message.id) is one:  # for one that has ended it is late news
            self._push(one.node_id, agent_pb2.SchedulerMessage(exec_input=message))

    def take(self, node_id: str, output: agent_pb2.ExecOutput) -> None:
        """Something came up. Of a command that ended it is late news."""
        one = self._execs.get(output.id)
        if one is None or one.node_id != node_id:
            return
        one.waiting_bytes += len(output.data)
        if one.waiting_bytes > EXEC_WINDOW_BYTES or one.queue.qsize() >= QUEUE_MAX:
            self._end(output.id, one, f"node {node_id} sends more than was taken; upgrade it")
            return
        with contextlib.suppress(FalError):  # it is the operator's window; a wrong word of the node opens it no further
            one.down.taken(output.taken_bytes)
        one.queue.put_nowait(output)

    async def top(self, node_id: str, runner_id: str) -> agent_pb2.TopReply:
        """What a runner's container uses. UNAVAILABLE (the node is silent), BUSY."""
        if len(self._tops) >= TOPS_MAX:
            raise FalError(Code.BUSY, f"{TOPS_MAX} such questions are open", remedy="Try later.")
        id_ = next(self._ids)
        answer: asyncio.Future[agent_pb2.TopReply] = asyncio.get_running_loop().create_future()
        self._tops[id_] = (node_id, answer)
        try:
            request = agent_pb2.TopRequest(id=id_, runner_id=runner_id)
            if not self._push(node_id, agent_pb2.SchedulerMessage(top=request)):
                raise _silent(node_id)
            async with asyncio.timeout(TOP_TIMEOUT_S + 2.0):
                return await answer
        except TimeoutError:
            raise _silent(node_id) from None
        finally:
            del self._tops[id_]

    def take_top(self, node_id: str, reply: agent_pb2.TopReply) -> None:
        """An answer; a late one changes nothing."""
        asked, answer = self._tops.get(reply.id, ("", None))
        if answer is not None and asked == node_id and not answer.done():
            answer.set_result(reply)

    def node_gone(self, node_id: str) -> None:
        """The node's session ended, and with it its commands."""
        for id_, one in list(self._execs.items()):
            if one.node_id == node_id:
                self._end(id_, one, f"the connection to node {node_id} broke; the command was killed")
        for asked, answer in self._tops.values():
            if asked == node_id and not answer.done():
                answer.set_exception(_silent(node_id))

    def _end(self, id_: int, one: _Exec, why: str) -> None:
        self._execs.pop(id_, None)  # nothing more is taken
        one.queue.put_nowait(agent_pb2.ExecOutput(id=id_, end=True, exit_code=EXIT_LOST, error=why))
        cancel = agent_pb2.ExecInput(id=id_, cancel=True)
        self._push(one.node_id, agent_pb2.SchedulerMessage(exec_input=cancel))


def _check_window(window: SendWindow, count: int) -> None:
    if count > window.room_bytes:
        raise invalid("data", f"{count} bytes", "are more than the window", remedy="Wait for taken_bytes.")
    window.sent(count)


def _silent(node_id: str) -> FalError:
    return FalError(
        Code.UNAVAILABLE, f"node {node_id} does not answer", remedy="Look at `falctl node list`, and try again."
    )


__all__ = ["ExecStreams"]
