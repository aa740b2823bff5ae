"""Commands that operators run in containers of this node, over the node's session.

Invariants: an exec lives no longer than the session it was opened in, nor than its operator; nothing waits unbounded,
in either direction (fal_contract.exec_window); containers are never touched. One object per session.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from fal_contract.errors import Code, FalError
from fal_contract.exec_window import ReceiveWindow, SendWindow
from fal_contract.limits import EXEC_TIMEOUT_MAX_S, EXECS_PER_NODE_MAX, TOP_TIMEOUT_S
from fal_contract.v1 import agent_pb2
from fal_runtime.container_use import ContainerUse
from fal_runtime.exec_session import ExecSession, Terminal

Send = Callable[[agent_pb2.AgentMessage], Awaitable[None]]
_TOPS_MAX: Final = 16


class Containers(Protocol):
    """What is asked of the node."""

    async def exec(self, runner_id: str, command: tuple[str, ...], terminal: Terminal | None) -> ExecSession:
        """Run a command in a runner's container. NOT_FOUND, FAILED_PRECONDITION, INVALID, DRIVER_FAILED."""
        ...

    async def top(self, runner_id: str) -> ContainerUse:
        """What it uses. NOT_FOUND."""
        ...

    async def why_ended(self, runner_id: str) -> str:
        """Why its container does not run; empty while it does."""
        ...


class Execs:
    """All commands and looks of one session."""

    def __init__(self, node: Containers, send: Send) -> None:
        self._node = node
        self._send = send
        self._execs: dict[int, _Exec] = {}
        self._tops: set[asyncio.Task[None]] = set()

    def open(self, message: agent_pb2.ExecOpen) -> None:
        """Begin one; it answers by itself."""
        if message.id in self._execs:
            return
        busy = len(self._execs) >= EXECS_PER_NODE_MAX
        one = self._execs[message.id] = _Exec(message, self._node, self._send)
        one.task = asyncio.create_task(one.run(busy=busy), name=f"exec {message.id}")
        one.task.add_done_callback(lambda _: self._execs.pop(message.id, None))

    def input(self, message: agent_pb2.ExecInput) -> None:
        """For one that is open; of one that has ended it is late news."""
        if (one := self._execs.get(message.id)) is not None:
            one.take(message)

    def top(self, message: agent_pb2.TopRequest) -> None:
        """Look once."""
        busy = len(self._tops) >= _TOPS_MAX
        task = asyncio.create_task(self._look(message, busy), name=f"top {message.id}")
        self._tops.add(task)
        task.add_done_callback(self._tops.discard)

    async def _look(self, message: agent_pb2.TopRequest, busy: bool) -> None:
        try:
            if busy:
                raise FalError(Code.BUSY, f"{_TOPS_MAX} such questions are under way", remedy="Ask again.")
            async with asyncio.timeout(TOP_TIMEOUT_S):
                reply = top_reply(message.id, await self._node.top(message.runner_id))
        except TimeoutError:
            reply = agent_pb2.TopReply(id=message.id, error=f"the node did not look within {TOP_TIMEOUT_S:g} s")
        except FalError as exc:
            reply = agent_pb2.TopReply(id=message.id, error=str(exc))
        with contextlib.suppress(FalError):
            await self._send(agent_pb2.AgentMessage(top=reply))

    async def close(self) -> None:
        """The session is over: every command is killed."""
        tasks = [*self._tops, *(one.task for one in self._execs.values() if one.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Exec:
    def __init__(self, message: agent_pb2.ExecOpen, node: Containers, send: Send) -> None:
        self.task: asyncio.Task[None] | None = None
        self._message = message
        self._node = node
        self._send_message = send
        self._sending = SendWindow()
        self._receiving = ReceiveWindow()
        self._waiting: deque[bytes | None] = deque()  # input; None: its end
        self._size = (0, 0)  # told before the session was there
        self._ended = False
        self._session: ExecSession | None = None
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._refused: FalError | None = None

    async def run(self, *, busy: bool) -> None:
        """From start to the last message."""
        code, error = 0, ""
        try:
            if busy:
                what = f"{EXECS_PER_NODE_MAX} commands run in containers of the node"
                raise FalError(Code.BUSY, what, remedy="End one of them.")
            async with asyncio.timeout(EXEC_TIMEOUT_MAX_S):
                code, error = await self._run()
        except TimeoutError:
            code, error = 137, f"killed: its time of {EXEC_TIMEOUT_MAX_S / 3600:g} h is over"
        except FalError as exc:
            code, error = 126, str(exc)
        with contextlib.suppress(FalError):
            await self._send(end=True, exit_code=code, error=error)

    async def _run(self) -> tuple[int, str]:
        message = self._message
        terminal = Terminal(message.rows, message.columns, message.term) if message.terminal else None
        session = await self._node.exec(message.runner_id, tuple(message.command), terminal)
        self._session = session
        session.resize(*self._size)
        if self._refused is not None:
            session.kill()
        feeder = asyncio.create_task(self._feed(session))
        try:
            await self._send(taken_bytes=0)  # it runs
            await self._drain(session)
            code = await session.wait()
            if self._refused is not None:
                return 126, str(self._refused)
            ended = await self._node.why_ended(message.runner_id) if code == 137 else ""
            return code, f"the container ended: {ended}" if ended else ""
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            await asyncio.shield(session.close())

    async def _drain(self, session: ExecSession) -> None:
        """Output, no faster than the operator takes it."""
        while (got := await session.read()) is not None:
            stream, data = got
            while data:
                if self._refused is not None:
                    return
                self._room.clear()
                room = self._sending.room_bytes
                if not room:
                    await self._room.wait()
                    continue
                self._sending.sent(len(data[:room]))
                await self._send(stream=stream, data=data[:room])
                data = data[room:]

    async def _feed(self, session: ExecSession) -> None:
        """Input, no faster than the command takes it."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                data = self._waiting.popleft()
                if data is None:
                    session.close_input()
                    continue
                await session.write(data)
                if self._receiving.took(len(data)):
                    await self._send(taken_bytes=self._receiving.taken_bytes)

    def take(self, message: agent_pb2.ExecInput) -> None:
        """A message for it."""
        if message.cancel:
            if self.task is not None:
                self.task.cancel()
            return
        try:
            if message.data:
                self._receiving.arrived(len(message.data))
                self._waiting.append(message.data)
            self._sending.taken(message.taken_bytes)
        except FalError as exc:
            self._refused = exc
            if self._session is not None:
                self._session.kill()
        if message.end and not self._ended:
            self._ended = True
            self._waiting.append(None)
        if message.rows and message.columns:
            self._size = (message.rows, message.columns)
            if self._session is not None:
                self._session.resize(*self._size)
        self._room.set()
        self._news.set()

    async def _send(self, **fields: object) -> None:
        output = agent_pb2.ExecOutput(id=self._message.id, **fields)  # type: ignore[arg-type]
        await self._send_message(agent_pb2.AgentMessage(exec_output=output))


def top_reply(id: int, use: ContainerUse) -> agent_pb2.TopReply:
    """As it is told."""
    return agent_pb2.TopReply(
        id=id,
        time_s=use.time_s,
        cpu_s=use.cpu_s,
        memory_bytes=use.memory_bytes,
        memory_bytes_max=use.memory_bytes_max,
        pids=use.pids,
        pids_max=use.pids_max,
        read_bytes=use.read_bytes,
        written_bytes=use.written_bytes,
        oom_kills=use.oom_kills,
        processes=[
            agent_pb2.ProcessView(
                pid=row.pid, pid_inside=row.pid_inside, uid=row.uid, state=row.state, cpu_s=row.cpu_s,
                memory_bytes=row.memory_bytes, threads=row.threads, command=row.command,
            )
            for row in use.processes
        ],
    )  # fmt: skip
