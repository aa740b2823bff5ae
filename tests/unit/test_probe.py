"""Health probes against workers that answer in pieces, for ever, wrongly, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fal_agent.probe import UnixProber

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


def ask(folder: Path, handler: Handler, *, timeout_s: float = 30.0) -> str:
    """What a probe says of a worker that answers like this."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await handler(reader, writer)
        writer.close()

    async def main() -> str:
        path = folder / "s"
        server = await asyncio.start_unix_server(serve, str(path))
        try:
            return await UnixProber().ask(path, "/readyz", timeout_s)
        finally:
            server.close()
            path.unlink()

    return asyncio.run(main())


def says(*pieces: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return handler


def test_the_body_of_a_good_answer_is_taken_too(tmp_path: Path) -> None:
    """Else a worker that writes head and body apart logs a broken pipe for each probe."""
    hung_up: list[bool] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await writer.drain()
        try:
            hung_up.append(await asyncio.wait_for(reader.read(), 0.2) == b"")
        except TimeoutError:
            writer.write(b"ok")

    assert ask(tmp_path, handler) == ""
    assert not hung_up


def test_a_worker_that_keeps_the_connection_is_healthy_all_the_same(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"ok")
        await reader.read()  # until the probe hangs up

    assert ask(tmp_path, handler) == ""


def test_a_refusal_is_shown_with_its_whole_reason(tmp_path: Path) -> None:
    pieces = (b"HTTP/1.1 503 Busy\r\n", b"Content-Length: 7\r\n\r\n", b"loading")
    assert ask(tmp_path, says(*pieces)) == "/readyz: HTTP 503 loading"


@pytest.mark.parametrize(("status", "why"), [(b"200", ""), (b"500", f"/readyz: HTTP 500 {'x' * 200}"[:200])])
def test_an_endless_answer_is_cut_short(tmp_path: Path, status: bytes, why: str) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + status + b" Fine\r\n\r\n")
        while True:
            writer.write(b"x" * 1000)
            await writer.drain()

    assert ask(tmp_path, handler) == why


def test_what_is_not_http_is_said(tmp_path: Path) -> None:
    assert ask(tmp_path, says(b"SSH-2.0-x\r\n")) == "/readyz: the answer is not HTTP"


def test_silence_is_said(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    assert ask(tmp_path, handler, timeout_s=0.1) == "/readyz did not answer in 0.1 s"


def test_what_is_no_socket_is_not_followed(tmp_path: Path) -> None:
    async def why(path: Path) -> str:
        return await UnixProber().ask(path, "/readyz", 1.0)

    assert asyncio.run(why(tmp_path / "none")) == "the worker's socket is not there yet"
    (tmp_path / "link").symlink_to("/run/other.sock")
    assert asyncio.run(why(tmp_path / "link")) == "link is not a socket"
