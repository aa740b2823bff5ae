"""Manifests over the bulk port: they travel like weights, so that the scheduler need not send them to every node.

They are no secret: any node that was let in may read one. Whoever gets one checks its signature.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from fal_contract.errors import Code, FalError
from fal_fsd.peers.connection import Connection
from fal_fsd.peers.frames import Meta
from fal_fsd.peers.wire import META_BYTES_MAX

FETCH_TIMEOUT_S: Final = 30.0
SERVED_AT_ONCE_MAX: Final = 4
Source = Callable[[str], bytes | None]


class Manifests:
    """`source(id)`: a manifest that is here, or None; called in a thread."""

    def __init__(self, source: Source | None) -> None:
        self._source = source
        self._number = 0
        self._asked: dict[int, tuple[Connection, str, asyncio.Future[bytes]]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def fetch(self, connection: Connection, id: str) -> bytes:
        """Ask the peer. NOT_FOUND, UNAVAILABLE or TIMEOUT."""
        self._number = number = self._number % 0xFFFFFFFF + 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = connection, id, future
        connection.decoder.meta_allowed = True
        connection.send(Meta(id, number))
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                return await future
        except TimeoutError:
            raise FalError(
                Code.TIMEOUT, f"{connection.node_id} did not send the manifest {id[:12]}", remedy="Ask another node."
            ) from None
        finally:
            del self._asked[number]
            # An answer that is under way then has no right to come: let it, the bound holds.
            if not any(asked[0] is connection for asked in self._asked.values()) and future.done():
                connection.decoder.meta_allowed = False

    def framed(self, connection: Connection, frame: Meta) -> None:
        """A question or an answer."""
        if frame.body is None and frame.found:
            self._serve(connection, frame)
            return
        asked = self._asked.get(frame.number)
        if asked is None or asked[0] is not connection or asked[1] != frame.id or asked[2].done():
            return
        if frame.body is None or not frame.found:
            asked[2].set_exception(
                FalError(
                    Code.NOT_FOUND, f"{connection.node_id} has no manifest {frame.id[:12]}", remedy="Ask another node."
                )
            )
        else:
            asked[2].set_result(frame.body)

    def closed(self, connection: Connection, reason: str) -> None:
        """No answers from there any more."""
        for other, id, future in self._asked.values():
            if other is connection and not future.done():
                future.set_exception(
                    FalError(
                        Code.UNAVAILABLE,
                        f"the manifest {id[:12]} did not come from {connection.node_id}: {reason}",
                        remedy="Ask another node.",
                    )
                )

    def _serve(self, connection: Connection, frame: Meta) -> None:
        if self._source is None or len(self._serving) >= SERVED_AT_ONCE_MAX:
            connection.send(Meta(frame.id, frame.number, b"", found=False))
            return
        task = asyncio.create_task(self._answer(self._source, connection, frame))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _answer(self, source: Source, connection: Connection, frame: Meta) -> None:
        try:
            body = await asyncio.to_thread(source, frame.id)
        except (OSError, FalError):
            body = None
        if body is None or len(body) > META_BYTES_MAX:
            connection.send(Meta(frame.id, frame.number, b"", found=False))
        else:
            connection.send(Meta(frame.id, frame.number, body))

    async def close(self) -> None:
        """Wait for what is being read."""
        await asyncio.gather(*self._serving, return_exceptions=True)


__all__ = ["Manifests", "Source"]
