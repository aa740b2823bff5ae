"""Connections to workers that are kept: when, for whom, how long, and what a worker that closes them costs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

import fal_agent.proxy.worker_pool as worker_pool
from dataplane import RUNNER, address_of, call, dial, read_request, serving, until
from fal_agent.proxy import pumping
from fal_agent.proxy.lazy_timer import LazyTimer
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.proxy.server import ProxyServer
from fal_agent.proxy.worker_pool import WorkerConnection
from fal_contract.http_client import HttpConnection
from virtual_time import run_virtually

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass
class KeepingWorker:
    """Keeps connections. `answers` has what each request of a connection is answered; None: close without a word."""

    path: Path
    answers: list[bytes | None] = field(default_factory=lambda: [ANSWER] * 1000)
    connections: int = 0
    requests: int = 0
    gone: int = 0
    bodies: list[bytes] = field(default_factory=list)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> KeepingWorker:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.closing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            for answer in self.answers:
                _, body = await read_request(reader)
                self.requests += 1
                self.bodies.append(body)
                if answer is None:
                    return
                writer.write(answer)
            await self.closing.wait()
        except (EOFError, OSError):
            self.gone += 1
        finally:
            writer.close()


def play(tmp_path: Path, scenario: Callable[[KeepingWorker, ProxyServer, HttpConnection], Awaitable[None]]) -> None:
    async def main() -> None:
        async with KeepingWorker(tmp_path / "w.sock") as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(RunnerEntry(RUNNER, str(worker.path), 4, 30.0))
            connection = await dial(address_of(proxy))
            try:
                await scenario(worker, proxy, connection)
            finally:
                connection.abort()

    asyncio.run(main())


async def ask(connection: HttpConnection, body: bytes = b"") -> int:
    answer = await call(connection, "/infer", body)
    await answer.read(1000)
    return answer.status


@pytest.fixture(autouse=True)
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request is enough to see that a worker keeps connections."""
    monkeypatch.setattr(worker_pool, "TRUSTED_AFTER_S", 0.0)
    monkeypatch.setattr(worker_pool, "KEPT_MAX_S", 60.0)


def test_one_connection_carries_many_requests(tmp_path: Path) -> None:
    async def scenario(worker: KeepingWorker, proxy: ProxyServer, connection: HttpConnection) -> None:
        for number in range(20):
            assert await ask(connection, b"%d" % number) == 200
        assert (worker.connections, worker.requests) == (1, 20)
        assert worker.bodies == [b"%d" % number for number in range(20)]
        proxy.remove_runner(RUNNER)
        await until(lambda: worker.gone == 1)

    play(tmp_path, scenario)


def test_a_worker_is_trusted_only_once_a_connection_has_rested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "TRUSTED_AFTER_S", 3600.0)

    async def scenario(worker: KeepingWorker, proxy: ProxyServer, connection: HttpConnection) -> None:
        for _ in range(5):
            assert await ask(connection) == 200
        assert worker.connections == 5

    play(tmp_path, scenario)


@dataclass
class Connection:
    """What the pool needs of one; times as the pool is told them."""

    entry: RunnerEntry
    born_s: float
    idle_since_s: float = 0.0
    reused: bool = False
    open: bool = True
    user: None = None

    def still_open(self) -> bool:
        return self.open

    def resume_reading(self) -> None:
        pass

    def abort(self) -> None:
        self.open = False


@pytest.mark.parametrize("closes", [False, True])
def test_the_connection_that_rested_longest_tells_whether_a_worker_keeps_them(
    closes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that closes without a word may stand still before it does; no request may meet that."""
    monkeypatch.setattr(worker_pool, "TRUSTED_AFTER_S", 0.5)

    async def main() -> None:
        pool = worker_pool.WorkerPool()
        entry = RunnerEntry(RUNNER, "/w", 4, 30.0)
        made = [Connection(entry, 10.0), Connection(entry, 10.2)]
        first, second = [cast(WorkerConnection, one) for one in made]
        pool.give(first, 10.1)
        assert pool.take(entry, 10.15) is None
        pool.give(second, 10.3)
        assert pool.take(entry, 10.59) is None, "no request, however many come, makes it rest"
        made[0].open = not closes
        taken = pool.take(entry, 10.6)
        assert taken is (None if closes else second)
        if taken is not None:
            assert pool.take(entry, 10.6) is first
        pool.close()

    asyncio.run(main())


def test_connections_are_let_go_after_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "KEPT_MAX_S", 0.1)

    async def scenario(worker: KeepingWorker, proxy: ProxyServer, connection: HttpConnection) -> None:
        assert await ask(connection) == 200
        await until(lambda: worker.gone == 1)
        assert await ask(connection) == 200

    play(tmp_path, scenario)


def test_another_worker_behind_the_same_name_gets_its_own_connection(tmp_path: Path) -> None:
    async def scenario(worker: KeepingWorker, proxy: ProxyServer, connection: HttpConnection) -> None:
        entry = RunnerEntry(RUNNER, str(worker.path), 4, 30.0)
        assert await ask(connection) == 200
        proxy.put_runner(replace(entry, max_multiplexing=9, draining=False))
        assert await ask(connection) == 200
        assert worker.connections == 1, "admission alone changed"
        proxy.put_runner(replace(entry, pid=os.getpid()))
        assert await ask(connection) == 200
        assert worker.connections == 2, "who may answer changed, so it is checked again"

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok and more than was said",
    ],
)
def test_what_did_not_end_cleanly_is_not_kept(tmp_path: Path, answer: bytes) -> None:
    async def scenario(worker: KeepingWorker, proxy: ProxyServer, connection: HttpConnection) -> None:
        worker.answers = [answer] * 10
        for _ in range(3):
            assert await ask(connection) == 200
        assert worker.connections == 3
        await until(lambda: worker.gone == 3)

    play(tmp_path, scenario)


def test_a_request_that_a_worker_has_read_is_not_sent_again(tmp_path: Path) -> None:
    async def scenario(worker: KeepingWorker, proxy: ProxyServer, connection: HttpConnection) -> None:
        worker.answers = [ANSWER, None]
        assert await ask(connection, b"first") == 200
        connection.on_idle = None
        answer = await call(connection, "/infer", b"second")
        assert (answer.status, answer.header(b"fal-code")) == (502, b"RUNNER_FAILED")
        answer.close()
        assert worker.bodies == [b"first", b"second"], "it may have run"
        worker.answers = [ANSWER] * 10
        again = await dial(address_of(proxy))
        for _ in range(3):
            assert await ask(again) == 200
        again.abort()
        assert worker.connections == 4, "its connections are kept no more"

    play(tmp_path, scenario)


def test_a_kept_connection_that_ended_is_not_used(tmp_path: Path) -> None:
    async def scenario(worker: KeepingWorker, proxy: ProxyServer, connection: HttpConnection) -> None:
        worker.answers = [ANSWER]  # then it waits, and closes when told
        for round_ in range(1, 4):
            assert await ask(connection, b"x") == 200
            worker.closing.set()
            await asyncio.sleep(0)
            worker.closing.clear()
            await until(lambda count=round_: worker.connections == count)  # type: ignore[misc]
        assert worker.requests == 3

    play(tmp_path, scenario)


def test_a_cancelled_request_takes_its_connection_along(tmp_path: Path) -> None:
    async def scenario(worker: KeepingWorker, proxy: ProxyServer, connection: HttpConnection) -> None:
        worker.answers = [ANSWER, b""]  # the second is never answered
        assert await ask(connection) == 200
        request = asyncio.create_task(call(connection, "/infer", b"x"))
        await until(lambda: worker.requests == 2)
        request.cancel()
        worker.closing.set()
        await until(lambda: proxy.stats().runners[0].cancelled == 1)
        again = await dial(address_of(proxy))
        worker.answers = [ANSWER]
        assert await ask(again) == 200
        again.abort()
        assert worker.connections == 2

    play(tmp_path, scenario)


def test_a_lazy_timer_calls_once_at_the_last_time_that_was_set() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        timer, called = LazyTimer(), []
        begun_s = loop.time()
        done = asyncio.Event()

        def call() -> None:
            called.append(loop.time() - begun_s)
            done.set()

        timer.set(begun_s + 30.0, call)
        timer.set(begun_s + 0.02, lambda: called.append(-1.0))
        timer.set(begun_s + 0.06, call)  # later than what is armed: fires, sees that, waits on
        await asyncio.wait_for(done.wait(), 10)
        assert len(called) == 1
        assert called[0] >= 0.06
        timer.set(loop.time() + 0.01, call)
        timer.clear()
        timer.stop()
        await asyncio.sleep(0.03)  # it must not call
        assert len(called) == 1

    run_virtually(main())


def test_what_a_socket_does_not_take_goes_to_the_transport() -> None:
    class Transport(asyncio.Transport):
        def __init__(self) -> None:
            super().__init__()
            self.written: list[bytes] = []
            self.waiting = 0
            self.closing = False

        def is_closing(self) -> bool:
            return self.closing

        def get_write_buffer_size(self) -> int:
            return self.waiting

        def write(self, data: bytes) -> None:  # type: ignore[override]
            self.written.append(data)

    def refusing(_: bytes | memoryview) -> int:
        raise BlockingIOError

    transport = Transport()
    pumping.write(transport, lambda data: len(data), b"all of it")
    assert transport.written == []
    pumping.write(transport, lambda data: 3, memoryview(b"abcdef"))
    pumping.write(transport, refusing, b"none")
    assert transport.written == [b"def", b"none"]
    transport.waiting = 1
    pumping.write(transport, lambda data: len(data), b"behind")
    assert transport.written[-1] == b"behind", "nothing overtakes what waits"
    transport.closing = True
    pumping.write(transport, lambda data: len(data), b"late")
    assert transport.written[-1] == b"behind"
