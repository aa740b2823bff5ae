"""The client's side of HTTP/1.1 over a connection that somebody else made: a dialled one, or a tunnel.

One request at a time; the answer's body is read as it comes. A connection whose answer was not read to its end is cut,
which cancels the request at the other side. The rule that retries are built on: `NotSent` is raised only when no byte
of the request can have been acted upon; every other error means that the request may have run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.http1 import (
    BodyScanner,
    Headers,
    HttpError,
    ResponseHead,
    encode_head,
    head_end,
    header,
    is_header_name,
    is_header_value,
    is_target,
    parse_response_head,
)
from fal_contract.tunnel_wire import TUNNEL_BYE

Body = bytes | AsyncIterator[bytes]

READ_BYTES: Final = 256 << 10
_INLINE_BODY_BYTES_MAX: Final = 64 << 10


class NotSent(FalError):
    """The request surely did not run."""


class HttpResponse:
    """A status, headers, and a body that is still arriving. Close it, or read it to its end."""

    def __init__(self, head: ResponseHead, connection: HttpConnection, first: bytes) -> None:
        self.status = head.status
        self.headers: Headers = head.headers
        self.runner_id = ""  # who answered, where the caller knows it
        self._head = head
        self._connection = connection
        self._scanner = BodyScanner(head.framing)
        self._first = first
        self._ended = False
        self._on_end: list[Callable[[bool], None]] = []
        if self._scanner.done:
            self._end(whole=True, clean=not first)

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""
        return header(self.headers, name)

    def on_end(self, call: Callable[[bool], None]) -> None:
        """`call(whole)` once: True when the body was read to its end, False when it broke or was closed early."""
        if self._ended:
            call(self._scanner.done)
        else:
            self._on_end.append(call)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body's pieces as they arrive. FalError(RUNNER_FAILED) when it breaks off."""
        data, self._first = self._first, b""
        try:
            while not self._ended:
                if not data:
                    data = await self._connection.read()
                payload: list[bytes] = []
                if data:
                    used = self._scanner.feed(data, payload)
                elif not self._scanner.closed():
                    raise _broken("the connection closed in the middle of the answer")
                else:
                    used = 0
                if self._scanner.done:
                    self._end(whole=True, clean=used == len(data))
                data = b""
                for piece in payload:
                    yield piece
        except (OSError, HttpError) as exc:
            raise _broken(str(exc) or type(exc).__name__) from None
        finally:
            self.close()

    async def read(self, bytes_max: int) -> bytes:
        """The whole body. FalError(INVALID) when it is longer than `bytes_max`."""
        parts: list[bytes] = []
        size = 0
        async with contextlib.aclosing(self.chunks()) as pieces:
            async for piece in pieces:
                size += len(piece)
                if size > bytes_max:
                    raise FalError(
                        Code.INVALID, f"the answer is longer than {bytes_max} bytes", remedy="Read it as a stream."
                    )
                parts.append(piece)
        return b"".join(parts)

    def close(self) -> None:
        """Cut the connection unless the body was read to its end: the other side stops working on the request."""
        if not self._ended:
            self._end(whole=False, clean=False)

    def _end(self, *, whole: bool, clean: bool) -> None:
        self._ended = True
        self._connection.response_ended(reusable=whole and clean and self._head.keep_alive)
        for call in self._on_end:
            call(whole)
        self._on_end.clear()


class HttpConnection:
    """One connection, client side. `on_idle(connection)` is called when it can carry another request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.on_idle: Callable[[HttpConnection], None] | None = None
        self.leave = False  # the peer asked us to send nothing more on it
        self.used = False  # it has carried a request
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()
        self._sending: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """It can carry nothing more."""
        return self._writer.is_closing() or self._reader.at_eof()

    async def request(
        self, method: str, target: str, headers: Iterable[tuple[str, str]], body: Body = b""
    ) -> HttpResponse:
        """Send a request and wait for its answer's head.

        Raises NotSent when the connection was closed before; FalError(RUNNER_FAILED) when it breaks later.
        """
        head = _request_head(method, target, headers, body)
        if self.closed:
            raise NotSent(Code.UNAVAILABLE, "the connection is closed", remedy="Connect again.")
        self.used = True
        try:
            if isinstance(body, bytes) and len(body) <= _INLINE_BODY_BYTES_MAX:
                self._writer.write(head + body)
            else:
                self._writer.write(head)
                self._sending = asyncio.create_task(self._send(body), name="request-body")
            answer = await self._read_head(method.encode())
            rest = bytes(self._buffer)
            self._buffer.clear()
            return HttpResponse(answer, self, rest)
        except (OSError, HttpError) as exc:
            self.abort()
            raise _broken(str(exc) or type(exc).__name__) from None
        except BaseException:
            self.abort()
            raise

    async def read(self) -> bytes:
        """The next bytes; empty at the end."""
        return await self._reader.read(READ_BYTES)

    def response_ended(self, *, reusable: bool) -> None:
        """Told by the response."""
        sent = self._sending is None or (self._sending.done() and self._sending.exception() is None)
        self._sending = self._sending if not sent else None
        if reusable and sent and not self.leave and not self.closed:
            if self.on_idle is not None:
                self.on_idle(self)
        else:
            self.abort()

    def write_ping(self) -> None:
        """An empty line, which HTTP ignores between messages."""
        self._writer.write(b"\r\n")

    async def read_idle(self) -> None:
        """Wait for bytes while no request is under way: pings, or the wish that we leave.

        Raises ConnectionError at the end of the stream, and for anything else.
        """
        data = await self._reader.read(READ_BYTES)
        if not data:
            raise ConnectionResetError("the peer closed the connection")
        self._buffer += data
        self._strip()
        if self._buffer and not TUNNEL_BYE.startswith(self._buffer) and self._buffer != b"\r":
            raise ConnectionAbortedError("the peer sent something unasked")

    def abort(self) -> None:
        """Cut it now."""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        self._writer.transport.abort()

    def close(self) -> None:
        """End it in order."""
        self._writer.close()

    async def _read_head(self, method: bytes) -> ResponseHead:
        while True:
            self._strip()
            end = head_end(self._buffer)
            if end >= 0:
                head = parse_response_head(bytes(self._buffer[:end]), method=method)
                del self._buffer[:end]
                if head.status >= 200:
                    return head
                continue
            data = await self._reader.read(READ_BYTES)
            if not data:
                raise ConnectionResetError("the connection closed before the answer")
            self._buffer += data

    def _strip(self) -> None:
        """Drop pings and goodbyes that come before an answer."""
        while True:
            if self._buffer.startswith(b"\r\n"):
                del self._buffer[:2]
            elif self._buffer.startswith(TUNNEL_BYE):
                del self._buffer[: len(TUNNEL_BYE)]
                self.leave = True
            else:
                return

    async def _send(self, body: Body) -> None:
        """The body of a request. When the answer comes first, the rest may be unwanted: errors show in the answer."""
        with contextlib.suppress(OSError):
            if isinstance(body, bytes):
                for at in range(0, len(body), READ_BYTES):
                    self._writer.write(body[at : at + READ_BYTES])
                    await self._writer.drain()
                return
            async for piece in body:
                if piece:
                    self._writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    await self._writer.drain()
            self._writer.write(b"0\r\n\r\n")


def _request_head(method: str, target: str, headers: Iterable[tuple[str, str]], body: Body) -> bytes:
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]
    for name, value in raw:
        if not is_header_name(name) or not is_header_value(value):
            raise invalid("header", name.decode("latin-1"), "is not a header", remedy="Remove control characters.")
    if not is_target(target.encode("ascii", "replace")) or not is_header_name(method.encode("ascii", "replace")):
        raise invalid("path", target[:80], "is not a path", remedy="Start it with '/', and quote what is not ASCII.")
    if isinstance(body, bytes):
        raw.append((b"content-length", b"%d" % len(body)))
    else:
        raw.append((b"transfer-encoding", b"chunked"))
    return encode_head(f"{method} {target} HTTP/1.1".encode("ascii"), raw)


def _broken(why: str) -> FalError:
    return FalError(
        Code.RUNNER_FAILED,
        f"the request broke off: {why}",
        remedy="It may have run; send it again if that does no harm.",
    )
