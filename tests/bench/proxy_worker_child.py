"""A worker of least cost: `python proxy_worker_child.py SOCKET`. Listens there and on a port of loopback; prints it.

GET /N answers N bytes from memory; POST takes a body of a given length and answers what it got. Connections are kept.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import uvloop

SIZES = (1 << 10, 10_000_000)
_ANSWERS = {b"/%d" % size: b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + bytes(size) for size in SIZES}
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")
_TAKEN = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Worker(asyncio.Protocol):
    """One connection; requests one after the other."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._left:
            self._taken(len(data))
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return
        head, rest = bytes(self._head[: end + 4]), len(self._head) - end - 4
        self._head.clear()
        if head.startswith(b"POST "):
            length = _LENGTH.search(head)
            assert length is not None, head
            self._left = int(length[1])
            self._taken(rest)
        else:
            self._transport.write(_ANSWERS[head.split(b" ", 2)[1]])

    def _taken(self, size: int) -> None:
        self._left -= size
        if self._left == 0:
            self._transport.write(_TAKEN)


async def main(path: str) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(Worker, path)
    tcp = await loop.create_server(Worker, "127.0.0.1", 0)
    print(tcp.sockets[0].getsockname()[1], flush=True)
    await asyncio.gather(server.serve_forever(), tcp.serve_forever())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1]))
