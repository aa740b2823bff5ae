"""Runners' output on its way from a node's session to an operator.

Each request has a bounded queue: an operator who reads too slowly loses the stream with a clear end, never memory. A
request ends when the node says so, when the operator goes away (the node is told to stop) or when the node's
session ends. Nothing is kept. Uses the loop's time only.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2

FIRST_CHUNK_TIMEOUT_S: Final = 10.0
CHUNKS_WAITING_MAX: Final = 64
STREAMS_MAX: Final = 256
Push = Callable[[str, agent_pb2.SchedulerMessage], bool]


@dataclass(eq=False, slots=True)
class _Stream:
    node_id: str
    queue: asyncio.Queue[agent_pb2.LogChunk]


class LogStreams:
    """All log requests of one leader. `push` sends a message to a node, False where it has no session."""

    def __init__(self, push: Push) -> None:
        self._push = push
        self._streams: dict[int, _Stream] = {}
        self._ids = itertools.count(1)

    async def follow(
        self, node_id: str, runner_id: str, *, tail_lines: int, follow: bool, since_s: float = 0.0, request_id: str = ""
    ) -> AsyncIterator[agent_pb2.LogChunk]:
        """The chunks, until the end. Raises UNAVAILABLE when the node is silent, BUSY at the bound of streams."""
        if len(self._streams) >= STREAMS_MAX:
            raise FalError(Code.BUSY, f"{STREAMS_MAX} log streams are open", remedy="Close some, or try later.")
        id_ = next(self._ids)
        stream = _Stream(node_id, asyncio.Queue(CHUNKS_WAITING_MAX + 1))
        request = agent_pb2.LogRequest(
            id=id_, runner_id=runner_id, tail_lines=tail_lines, follow=follow, since_s=since_s, request_id=request_id
        )
        self._streams[id_] = stream
        finished = False
        try:
            if not self._push(node_id, agent_pb2.SchedulerMessage(log_request=request)):
                finished = True
                raise _silent(node_id)
            try:
                async with asyncio.timeout(FIRST_CHUNK_TIMEOUT_S):
                    chunk = await stream.queue.get()
            except TimeoutError:
                raise _silent(node_id) from None
            while True:
                finished = chunk.end
                yield chunk
                if finished:
                    return
                chunk = await stream.queue.get()
        finally:
            self._streams.pop(id_, None)
            if not finished:
                cancel = agent_pb2.LogRequest(id=id_, runner_id=runner_id, cancel=True)
                self._push(node_id, agent_pb2.SchedulerMessage(log_request=cancel))

    def take(self, node_id: str, chunk: agent_pb2.LogChunk) -> None:
        """A chunk came up. One of a request that ended is late news."""
        stream = self._streams.get(chunk.id)
        if stream is None or stream.node_id != node_id:
            return
        if stream.queue.qsize() >= CHUNKS_WAITING_MAX:
            self._end(chunk.id, stream, "the reader is too slow; ask again with fewer lines")
        else:
            stream.queue.put_nowait(chunk)

    def node_gone(self, node_id: str) -> None:
        """The node's session ended, and with it its requests."""
        for id_, stream in list(self._streams.items()):
            if stream.node_id == node_id:
                self._end(id_, stream, f"the connection to node {node_id} broke")

    def _end(self, id_: int, stream: _Stream, why: str) -> None:
        self._streams.pop(id_, None)  # nothing more is taken
        stream.queue.put_nowait(agent_pb2.LogChunk(id=id_, end=True, error=why))


def _silent(node_id: str) -> FalError:
    return FalError(
        Code.UNAVAILABLE,
        f"node {node_id} does not answer",
        remedy="Look at `falctl node list`; the output stays on the node and can be read once it is back.",
    )


__all__ = ["LogStreams"]
