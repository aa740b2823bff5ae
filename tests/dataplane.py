"""Parts for tests of the data path: a scripted worker on a unix socket, a proxy in this process, identities."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fal_agent.proxy.datapath import Bounds
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.proxy.options import ProxyOptions
from fal_agent.proxy.server import ProxyServer
from fal_contract.clock import SystemClock
from fal_contract.datapath import Address
from fal_contract.http1 import BodyScanner, RequestHead, head_end, parse_request_head
from fal_contract.http_client import HttpConnection, HttpResponse
from fal_contract.identity import Identity, Role
from fal_scheduler.ca import CertificateAuthority

NODE = "n-proxytest0001"
RUNNER = "default/digits-00000001"
TICKET = ("fal-ticket", "term=1;lease=l-1")
WAIT_S = 60.0


async def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Poll, with a deadline, for what another task or process brings about."""
    async with asyncio.timeout(timeout_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


@dataclass
class Seen:
    """A request as the worker saw it."""

    head: RequestHead
    body: bytes


@dataclass
class FakeWorker:
    """Speaks HTTP on a unix socket. The path chooses what it does; `gate` holds answers back while it is clear."""

    path: Path
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    running_max: int = 0
    broken: int = 0  # requests whose client went away
    sent_bytes: int = 0  # of /big
    last_step: asyncio.Event = field(default_factory=asyncio.Event)  # streams end once it is set
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        self.gate.set()
        self.last_step.set()
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self.path), limit=1 << 20)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head, body = await read_request(reader)
            self.seen.append(Seen(head, body))
            self.running += 1
            self.running_max = max(self.running_max, self.running)
            try:
                await self._answer(head, body, reader, writer)
            finally:
                self.running -= 1
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, head: RequestHead, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        action = head.target.split(b"?")[0].decode()
        gone = asyncio.ensure_future(reader.read(1))
        opened = asyncio.ensure_future(self.gate.wait())
        try:
            await asyncio.wait({gone, opened}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.broken += 1
                return
            match action:
                case "/stream":
                    await self._stream(int(head.target.split(b"=")[1]), gone, writer)
                case "/big":
                    size = int(head.target.split(b"=")[1])
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
                    for _ in range(size // 65536):
                        writer.write(b"x" * 65536)
                        await writer.drain()
                        self.sent_bytes += 65536
                case "/until-close":
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\nto the end")
                case "/half":
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
                case "/die":
                    pass
                case "/nonsense":
                    writer.write(b"this is no HTTP\r\n\r\n")
                case "/no-room":
                    writer.write(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\nx-fal-not-run: BUSY\r\n\r\n")
                case "/fail":
                    writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\nfal-code: BUSY\r\n\r\n")
                case _:
                    out = json.dumps({"path": head.target.decode(), "bytes": len(body)}).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(out), out))
            await writer.drain()
        finally:
            gone.cancel()
            opened.cancel()

    async def _stream(self, steps: int, gone: asyncio.Future[bytes], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for step in range(steps):
            if step == steps - 1:
                await self.last_step.wait()
            if gone.done():
                self.broken += 1
                return
            event = b"data: %d\n\n" % step
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            try:
                await writer.drain()
            except ConnectionError:  # the write saw it before the read did
                self.broken += 1
                return
            await asyncio.sleep(0.02)  # the pace of denoising steps
        writer.write(b"0\r\n\r\n")


async def read_request(reader: asyncio.StreamReader) -> tuple[RequestHead, bytes]:
    """A whole request from a stream."""
    buffer = bytearray()
    while (end := head_end(buffer)) < 0:
        data = await reader.read(65536)
        if not data:
            raise EOFError
        buffer += data
    head = parse_request_head(bytes(buffer[:end]))
    scanner = BodyScanner(head.framing)
    payload: list[bytes] = []
    data = bytes(buffer[end:])
    while True:
        scanner.feed(data, payload)
        if scanner.done:
            return head, b"".join(payload)
        data = await reader.read(65536)
        if not data:
            raise EOFError


def entry(worker: FakeWorker, *, slots: int = 1, timeout_s: float = 30.0, runner_id: str = RUNNER) -> RunnerEntry:
    return RunnerEntry(runner_id, str(worker.path), slots, timeout_s)


@contextlib.asynccontextmanager
async def serving(
    folder: Path, *, identity: Path | None = None, bounds: Bounds | None = None, takeover: bool = False
) -> AsyncIterator[ProxyServer]:
    """A proxy in this process, plain unless it gets an identity."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ProxyOptions(
        state_dir=folder, host="127.0.0.1", identity=identity, insecure=identity is None, node_id=NODE
    )
    server = ProxyServer(options, clock=SystemClock(), rng=Random(1), bounds=bounds)
    await server.start(takeover=takeover)
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def working(folder: Path, name: str = "w.sock") -> AsyncIterator[FakeWorker]:
    """A worker in this process."""
    worker = FakeWorker(folder / name)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


def address_of(server: ProxyServer) -> Address:
    ((host, port),) = server.info().listen
    return Address(host, port)


async def dial(address: Address) -> HttpConnection:
    """A plain connection to a proxy."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    return HttpConnection(reader, writer)


async def call(
    connection: HttpConnection, action: str, body: bytes = b"", *, runner: str = RUNNER, ticket: str | None = None
) -> HttpResponse:
    """One request to a runner."""
    headers = [("host", "test"), ("fal-ticket", ticket or TICKET[1])]
    return await connection.request("POST", f"/v1/runners/{runner}{action}", headers, body)


async def once(address: Address, action: str, body: bytes = b"") -> HttpResponse:
    """One request on a connection of its own, which ends with the answer."""
    connection = await dial(address)
    connection.on_idle = HttpConnection.close
    return await call(connection, action, body)


@dataclass(frozen=True)
class Identities:
    """Of one cluster: a node's file, and identities to call with."""

    ca: CertificateAuthority
    node_file: Path
    node: Identity
    gateway: Identity
    admin: Identity
    viewer: Identity


def identities(folder: Path) -> Identities:
    """A fresh cluster's."""
    now_s = SystemClock().wall_s()
    ca = CertificateAuthority.create(folder / "ca", cluster_id="c-4f7a20c1d9e8", now_s=now_s)
    node = ca.new_identity(role=Role.NODE, name=NODE, now_s=now_s)
    node.save(folder / "node.pem")
    return Identities(
        ca,
        folder / "node.pem",
        node,
        ca.new_identity(role=Role.SERVING, name="gw-1", now_s=now_s),
        ca.new_identity(role=Role.ADMIN, name="admin", now_s=now_s),
        ca.new_identity(role=Role.VIEWER, name="eve", now_s=now_s),
    )
