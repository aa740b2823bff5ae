"""Large bodies through the proxy byte for byte: both ways, to slow readers, plain and TLS, on either loop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from dataplane import RUNNER, TICKET, address_of, identities, read_request, serving, until
from fal_agent.proxy.messages import RunnerEntry
from fal_contract.http_client import HttpConnection
from fal_contract.tls import client_context

BLOB = os.urandom(1 << 20) * 12 + b"an odd end"
DIGEST = hashlib.sha256(BLOB).hexdigest()
ROUNDS = 3


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """GET: the blob; POST: the digest of what came. Keeps the connection; every other answer comes in chunks."""
    try:
        number = 0
        while True:
            head, body = await read_request(reader)
            number += 1
            out = BLOB if head.method == b"GET" else hashlib.sha256(body).hexdigest().encode()
            if number % 3:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(out))
                writer.write(out)
            else:
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                for at in range(0, len(out), 100_001):
                    piece = out[at : at + 100_001]
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                writer.write(b"0\r\n\r\n")
            await writer.drain()
    except (EOFError, OSError):
        pass
    finally:
        writer.close()


async def exchange(connection: HttpConnection, *, slow: bool) -> None:
    headers = [("host", "t"), TICKET]
    answer = await connection.request("GET", f"/v1/runners/{RUNNER}/x", headers)
    digest = hashlib.sha256()
    count = 0
    async for piece in answer.chunks():
        digest.update(piece)
        count += 1
        if slow and count % 8 == 0:
            await asyncio.sleep(0.005)  # a reader that is slower than the worker
    assert digest.hexdigest() == DIGEST
    answer = await connection.request("POST", f"/v1/runners/{RUNNER}/x", headers, BLOB)
    assert (await answer.read(1000)).decode() == DIGEST


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_every_byte_arrives_in_its_place(
    tmp_path: Path, tls: bool, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def main() -> None:
        known = identities(tmp_path) if tls else None
        serving_now: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            serving_now.add(task)
            try:
                await serve(reader, writer)
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            finally:
                serving_now.discard(task)

        server = await asyncio.start_unix_server(accept, str(tmp_path / "w"))
        async with serving(tmp_path / "p", identity=known.node_file if known else None) as proxy:
            proxy.put_runner(RunnerEntry(RUNNER, str(tmp_path / "w"), 1, 60.0))
            address = address_of(proxy)
            context = client_context(known.gateway) if known else None
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
            connection = HttpConnection(reader, writer)
            async with asyncio.timeout(120):
                for number in range(ROUNDS):
                    await exchange(connection, slow=bool(number % 2))
            connection.abort()
            (runner,) = proxy.stats().runners
            assert (runner.served, runner.failed, runner.in_flight) == (2 * ROUNDS, 0, 0)
        server.close()
        await until(lambda: not serving_now)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
