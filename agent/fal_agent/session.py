"""The node's one stream to the scheduler: dial, tell everything, then listen and report.

Invariants: a session begins with Hello and ends with the first error, gap or silence; the next one starts over, so
nothing said in an old one needs to be remembered; without a scheduler the node goes on as it is. Reports leave at
once, then at most every 100 ms; an empty one is the heartbeat. Time is the event loop's, so that the simulation
runs this code on a virtual loop; the transport is a `Link`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final, Protocol

from fal_agent.execs import Execs
from fal_agent.gpu_orders import GpuOrders
from fal_agent.node import Node
from fal_agent.reboot import Reboots
from fal_agent.wire import complete_of, cut, delta_of, leader_of
from fal_contract.errors import Code, FalError
from fal_contract.leader_search import pause_max_s, seeker_of
from fal_contract.limits import (
    HEARTBEAT_INTERVAL_S,
    RECONNECT_CAP_S,
    REPORT_WINDOW_S,
    RPC_TIMEOUT_S,
)
from fal_contract.v1 import agent_pb2
from fal_contract.versions import agree
from fal_runtime.driver import LogLine

_LOG_STREAMS_MAX: Final = 16
_LOG_CHUNK_LINES: Final = 200
_LOG_WINDOW_S: Final = 0.05
_LOG_TAIL_LINES_MAX: Final = 10_000
_SETTLED_AFTER_S: Final = 10.0  # a session that lasted so long begins the backoff anew
_REFUSED_CAP_S: Final = 60.0  # revoked or foreign: trying often helps nobody
_REFUSED: Final = frozenset({Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.VERSION_MISMATCH})


class Link(Protocol):
    """One open stream. `send` and `receive` raise FalError once it is broken."""

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        """Returns when there is room for another."""
        ...

    async def receive(self) -> agent_pb2.SchedulerMessage:
        """The next message."""
        ...

    async def close(self) -> None:
        """Let go; never raises."""
        ...


Dialer = Callable[[], Awaitable[Link]]
OnState = Callable[[str, FalError | None], None]  # "connected" or "disconnected", and why


class Session:
    """Keeps a stream to the scheduler for as long as `run` runs."""

    def __init__(self, node: Node, dial: Dialer, rng: Random, *, on_state: OnState = lambda state, why: None) -> None:
        self._node = node
        self._dial = dial
        self._seeker = seeker_of(dial)
        self._rng = rng
        self._on_state = on_state
        self.connected = False
        self._over = asyncio.Event()

    def start_over(self) -> None:
        """End the session that stands, if one does; the next Hello tells everything anew."""
        self._over.set()

    async def run(self) -> None:
        """Until cancelled: one session after the other, full-jitter backoff between them."""
        loop, attempt = asyncio.get_running_loop(), 0
        while True:
            began_s = loop.time()
            try:
                await self._once()
            except FalError as exc:
                self.connected = False
                self._on_state("disconnected", exc)
                attempt = 0 if loop.time() - began_s > _SETTLED_AFTER_S else attempt + 1
                cap_s = _REFUSED_CAP_S if exc.code in _REFUSED else RECONNECT_CAP_S
                await asyncio.sleep(self._rng.uniform(0, pause_max_s(self._seeker, exc, attempt, cap_s=cap_s)))

    async def _once(self) -> None:
        """One session; always ends with a FalError."""
        link: Link | None = None
        self._over.clear()
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                link = await self._dial()
                await link.send(agent_pb2.AgentMessage(seq=1, hello=self._node.hello()))
                first = await link.receive()
            if first.WhichOneof("kind") != "welcome":
                raise FalError(Code.INVALID, "the scheduler did not begin with a welcome", remedy="Upgrade it.")
            agree("the scheduler", first.welcome.version, first.welcome.version)
            await _Talk(self._node, link, first.welcome, self._established).run(self._over)
        except TimeoutError:
            raise FalError(
                Code.TIMEOUT, f"the scheduler did not answer in {RPC_TIMEOUT_S:g} s", remedy="It is tried again."
            ) from None
        finally:
            if link is not None:
                await link.close()

    def _established(self) -> None:
        self.connected = True
        self._seeker.connected()
        self._on_state("connected", None)


class _Talk:
    """A session after its welcome."""

    def __init__(self, node: Node, link: Link, welcome: agent_pb2.Welcome, established: Callable[[], None]) -> None:
        self._node = node
        self._link = link
        self._welcome = welcome
        self._established = established
        self._seq = 1
        self._sending = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self._logs: dict[int, asyncio.Task[None]] = {}
        self._execs = Execs(node, self._send)
        self._gpu_orders = GpuOrders(node.gpu_order, self._send)
        self._reboots = Reboots(node.reboot, self._send)

    async def run(self, over: asyncio.Event) -> None:
        """Ends with the first error of either direction, or when it is `over`."""
        self._node.welcome(leader_of(self._welcome))
        self._established()
        jobs = [
            asyncio.create_task(self._listen(), name="listen"),
            asyncio.create_task(self._report(), name="report"),
            asyncio.create_task(_ended(over), name="over"),
        ]
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                if job.cancelled():  # by nobody here: the agent would be without a session for good
                    raise FalError(Code.UNAVAILABLE, "the session was cut off", remedy="It is opened again by itself.")
                job.result()  # raises: neither returns
        finally:
            for task in (*jobs, *self._logs.values(), *self._writes):
                task.cancel()
            closing = (self._execs.close(), self._gpu_orders.close(), self._reboots.close())
            await asyncio.gather(*jobs, *self._logs.values(), *closing, return_exceptions=True)
            await asyncio.gather(*self._writes, return_exceptions=True)

    async def _report(self) -> None:
        interval_s = self._welcome.heartbeat_interval_s or HEARTBEAT_INTERVAL_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._node.changed.wait()
            await self._send(agent_pb2.AgentMessage(report=self._node.take_report()))
            await asyncio.sleep(REPORT_WINDOW_S)

    async def _listen(self) -> None:
        while True:
            message = await self._link.receive()
            match message.WhichOneof("kind"):
                case "complete":
                    await self._node.receive(complete_of(message.complete))
                    await self._node.tell_term()
                case "delta":
                    await self._node.receive(delta_of(message.delta))
                    await self._node.tell_term()
                case "gateways":
                    await self._node.gateways(message.gateways)
                case "revocations":
                    await self._node.revocations(message.revocations)
                case "log_request":
                    self._log_request(message.log_request)
                case "exec_open":
                    self._execs.open(message.exec_open)
                case "exec_input":
                    self._execs.input(message.exec_input)
                case "top":
                    self._execs.top(message.top)
                case "gpu_order":
                    self._gpu_orders.take(message.gpu_order)
                case "reboot":
                    self._reboots.take(message.reboot)
                case "welcome":
                    raise FalError(Code.INVALID, "a second welcome came", remedy="The session starts over by itself.")
                case _:
                    pass  # a kind of a newer scheduler; the versions agreed say that it may be ignored

    async def _send(self, message: agent_pb2.AgentMessage) -> None:
        """Cancelling it leaves the message on its way: gRPC ends the whole call with a write that is cancelled."""
        write = asyncio.create_task(self._write(message), name="write")
        self._writes.add(write)
        write.add_done_callback(self._written)
        await asyncio.shield(write)

    def _written(self, write: asyncio.Task[None]) -> None:
        self._writes.discard(write)
        if not write.cancelled():
            write.exception()  # of a sender that has gone; the stream's end is told by reading

    async def _write(self, message: agent_pb2.AgentMessage) -> None:
        async with self._sending:
            self._seq += 1
            message.seq = self._seq
            await self._link.send(message)

    # ---- logs

    def _log_request(self, request: agent_pb2.LogRequest) -> None:
        if request.cancel:
            if (task := self._logs.get(request.id)) is not None:
                task.cancel()
            return
        if request.id in self._logs:
            return
        busy = len(self._logs) >= _LOG_STREAMS_MAX
        task = asyncio.create_task(self._stream_log(request, busy), name=f"log {request.id}")
        self._logs[request.id] = task
        task.add_done_callback(lambda _: self._logs.pop(request.id, None))

    async def _stream_log(self, request: agent_pb2.LogRequest, busy: bool) -> None:
        error = ""
        try:
            if busy:
                raise FalError(Code.BUSY, f"the node streams {_LOG_STREAMS_MAX} logs already", remedy="End one.")
            await self._pump_log(request)
        except FalError as exc:
            error = str(exc)
        with contextlib.suppress(FalError):
            await self._send(agent_pb2.AgentMessage(log_chunk=agent_pb2.LogChunk(id=request.id, end=True, error=error)))

    async def _pump_log(self, request: agent_pb2.LogRequest) -> None:
        """Lines in chunks: the first at once, then what gathered in a short window."""
        tail = min(request.tail_lines, _LOG_TAIL_LINES_MAX)
        if request.request_id:  # its lines may be far between others
            tail = _LOG_TAIL_LINES_MAX
        wanted = self._node.logs(request.runner_id, tail_lines=tail, follow=request.follow, since_s=request.since_s)
        lines: asyncio.Queue[LogLine | FalError | None] = asyncio.Queue(_LOG_CHUNK_LINES)

        async def read() -> None:
            try:
                async for line in wanted:
                    if request.request_id in line.text:
                        await lines.put(line)
                await lines.put(None)
            except FalError as exc:
                await lines.put(exc)

        reader = asyncio.create_task(read())
        try:
            while True:
                got = [await lines.get()]
                while not lines.empty() and len(got) < _LOG_CHUNK_LINES:
                    got.append(lines.get_nowait())
                chunk = [_log_line(item) for item in got if isinstance(item, LogLine)]
                if chunk:
                    await self._send(agent_pb2.AgentMessage(log_chunk=agent_pb2.LogChunk(id=request.id, lines=chunk)))
                for item in got:
                    if isinstance(item, FalError):
                        raise item
                if got[-1] is None:
                    return
                await asyncio.sleep(_LOG_WINDOW_S)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


async def _ended(over: asyncio.Event) -> None:
    await over.wait()
    raise FalError(Code.CANCELLED, "the session starts over", remedy="Nothing: it has something new to say.")


def _log_line(line: LogLine) -> agent_pb2.LogLine:
    return agent_pb2.LogLine(time_s=line.time_s, stream=line.stream, text=cut(line.text))
