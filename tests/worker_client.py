"""Run a worker in this process, or talk to one in another, over its unix socket."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from fal_runtime.worker.engine import Engine
from fal_runtime.worker.main import Options, serve
from fal_runtime.worker.request import InferRequest

DEADLINE_S = 20.0


@dataclass
class Gate:
    """Holds a FakeEngine before step `at` of requests with this prompt: `reached`, then wait for `open`."""

    prompt: str
    at: int = 1
    reached: threading.Event = field(default_factory=threading.Event)
    open: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: InferRequest, step: int) -> None:
        if request.prompt == self.prompt and step == self.at:
            self.reached.set()
            assert self.open.wait(DEADLINE_S), "the test never opened the gate"


class Client:
    """A worker's client. `post` and `get` answer with status, headers and the decoded body."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(f"http://worker{path}") as answer:
            body = await answer.read()
            return answer.status, json.loads(body) if answer.content_type == "application/json" else body

    async def post(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(f"http://worker{path}", data=data, headers=named) as answer:
            raw = await answer.read()
            decoded = json.loads(raw) if answer.content_type == "application/json" else raw
            return answer.status, decoded, {k.lower(): v for k, v in answer.headers.items()}

    async def events(self, body: Any, **headers: str) -> AsyncIterator[tuple[str, Any]]:
        """Server-sent events of one inference as (name, data)."""
        named = {"accept": "text/event-stream"} | {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post("http://worker/infer", json=body, headers=named) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "text/event-stream"
            name = ""
            async for line in answer.content:
                key, _, value = line.decode().rstrip("\n").partition(": ")
                if key == "event":
                    name = value
                elif key == "data":
                    yield name, json.loads(value)

    async def ended(self, outcome: str) -> int:
        """How many requests ended with `outcome`, by the metrics."""
        _, text = await self.get("/metrics")
        for line in text.decode().splitlines():
            if line.startswith(f'fal_worker_requests_total{{outcome="{outcome}"}}'):
                return int(float(line.split()[-1]))
        return 0


@asynccontextmanager
async def connected(socket: Path) -> AsyncIterator[Client]:
    connector = aiohttp.UnixConnector(path=str(socket), limit=0)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session)


async def until(condition: Callable[[], Awaitable[bool]], what: str, *, deadline_s: float = DEADLINE_S) -> None:
    """Poll until `condition` holds; fails with `what` after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < end_s, f"never: {what}"
        await asyncio.sleep(0.005)


async def is_ready(client: Client) -> bool:
    try:
        return (await client.get("/readyz"))[0] == 200
    except aiohttp.ClientConnectorError:
        return False


@dataclass
class Running:
    """A worker in this process: its client, the event that stops it, and the task that ends with its exit code."""

    client: Client
    stop: asyncio.Event
    task: asyncio.Task[int]


@asynccontextmanager
async def running(engine: Engine, folder: Path, *, wait_ready: bool = True, **options: Any) -> AsyncIterator[Running]:
    """Serve `engine` on a socket in `folder`; stopped at the end."""
    stop, socket = asyncio.Event(), folder / "s"
    task = asyncio.create_task(serve(engine, Options(socket=socket, **options), stop))
    try:
        async with connected(socket) as client:
            if wait_ready:
                await until(lambda: is_ready(client), "ready")
            yield Running(client, stop, task)
    finally:
        stop.set()
        await asyncio.wait([task], timeout=DEADLINE_S)
