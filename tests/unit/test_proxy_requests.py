"""fal-proxy: admission, pumping, cancellation, time-outs, refusals; a real proxy and a scripted worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from dataplane import NODE, RUNNER, address_of, call, dial, entry, once, serving, until, working
from fal_agent.proxy.datapath import Bounds
from fal_agent.proxy.messages import ProxyStats, RunnerStats
from fal_agent.proxy.server import ProxyServer
from fal_contract.datapath import Address
from fal_contract.errors import FalError
from fal_contract.http_client import HttpConnection


def stats(server: ProxyServer) -> RunnerStats:
    ((only),) = server.stats().runners
    return only


async def raw(address: Address, request: bytes) -> bytes:
    """Send bytes, return everything until the proxy closes."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(request)
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    return answer


def test_a_request_reaches_the_worker_rewritten_and_the_connection_serves_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            connection = await dial(address_of(proxy))
            for _ in range(2):
                answer = await call(connection, "/infer?x=1", b'{"prompt": 7}')
                assert answer.status == 200
                assert json.loads(await answer.read(1000)) == {"path": "/infer?x=1", "bytes": 13}
            connection.close()
            head = worker.seen[0].head
            sent = dict(head.headers)
            assert head.target == b"/infer?x=1"
            assert sent[b"x-fal-runner"] == RUNNER.encode()
            assert b"connection" not in sent
            assert len(sent[b"x-fal-request-id"]) == 16
            assert b"fal-ticket" not in sent
            assert (stats(proxy).served, stats(proxy).in_flight, stats(proxy).failed) == (2, 0, 0)

    asyncio.run(scenario())


def test_never_more_than_max_multiplexing_under_200_requests_at_once(tmp_path: Path) -> None:
    async def one(address: Address) -> int:
        connection = await dial(address)
        try:
            answer = await call(connection, "/infer", b"{}")
            if answer.status == 503:
                assert answer.header(b"fal-code") == b"BUSY"
                assert answer.header(b"fal-free") == b"0"
            await answer.read(1000)
            return answer.status
        finally:
            connection.abort()

    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker, slots=7))
            worker.gate.clear()
            address = address_of(proxy)
            requests = [asyncio.create_task(one(address)) for _ in range(200)]
            await until(lambda: sum(task.done() for task in requests) == 193)
            assert stats(proxy).in_flight == 7
            worker.gate.set()
            answers = await asyncio.gather(*requests)
            assert sorted(set(answers)) == [200, 503]
            assert answers.count(200) == 7
            assert worker.running_max == 7
            assert (stats(proxy).served, stats(proxy).in_flight) == (7, 0)

    asyncio.run(scenario())


def test_a_slot_is_free_once_the_client_has_the_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            connections = [await dial(address_of(proxy)) for _ in range(2)]
            for number in range(100):  # other connection, same single slot, at once
                answer = await call(connections[number % 2], "/infer", b"{}")
                assert answer.status == 200
                await answer.read(1000)
            for connection in connections:
                connection.close()

    asyncio.run(scenario())


def test_events_stream_as_they_come(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            answer = await once(address_of(proxy), "/stream?n=5")
            first = await anext(answer.chunks())
            assert first == b"data: 0\n\n"
            assert worker.running == 1, "the first event came while the worker was still at it"
            answer.close()
            await until(lambda: worker.running == 0)
            answer = await once(address_of(proxy), "/stream?n=5")
            assert await answer.read(1000) == b"".join(b"data: %d\n\n" % n for n in range(5))
            answer.close()

    asyncio.run(scenario())


def test_big_bodies_pass_both_ways_with_backpressure(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            connection = await dial(address_of(proxy))
            body = os.urandom(1 << 20) * 8
            answer = await call(connection, "/infer", body)
            assert json.loads(await answer.read(1000))["bytes"] == len(body)
            assert worker.seen[0].body == body

            async def pieces() -> object:
                for at in range(0, len(body), 100_000):
                    yield body[at : at + 100_000]

            headers = [("host", "t"), ("fal-ticket", "term=1;lease=")]
            answer = await connection.request("POST", f"/v1/runners/{RUNNER}/infer", headers, pieces())  # type: ignore[arg-type]
            await answer.read(1000)
            assert worker.seen[1].body == body
            # The reader is slow: the worker must be held back rather than everything kept in the proxy.
            answer = await call(connection, "/big?n=67108864")
            size = 0
            async for piece in answer.chunks():
                size += len(piece)
                assert worker.sent_bytes - size <= 8 << 20
            assert size == 64 << 20
            connection.close()

    asyncio.run(scenario())


def test_a_client_that_goes_away_cancels_and_frees_the_slot(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            worker.gate.clear()
            connection = await dial(address_of(proxy))
            request = asyncio.create_task(call(connection, "/infer", b"{}"))
            await until(lambda: worker.running == 1)
            request.cancel()
            await until(lambda: worker.broken == 1)
            await until(lambda: stats(proxy).in_flight == 0)
            assert (stats(proxy).cancelled, stats(proxy).failed, stats(proxy).served) == (1, 0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("action", ["/die", "/nonsense"])
def test_a_worker_that_gives_no_answer_is_a_502(tmp_path: Path, action: str) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            answer = await once(address_of(proxy), action)
            assert (answer.status, answer.header(b"fal-code")) == (502, b"RUNNER_FAILED")
            answer.close()
            assert (stats(proxy).failed, stats(proxy).in_flight) == (1, 0)

    asyncio.run(scenario())


def test_half_an_answer_never_looks_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            answer = await once(address_of(proxy), "/half")
            with pytest.raises(FalError, match="broke off"):
                await answer.read(1000)
            assert stats(proxy).failed == 1
            answer = await once(address_of(proxy), "/until-close")
            assert await answer.read(1000) == b"to the end"
            assert stats(proxy).served == 1

    asyncio.run(scenario())


def test_a_worker_cannot_speak_for_the_proxy(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            connection = await dial(address_of(proxy))
            answer = await call(connection, "/fail")
            assert (answer.status, answer.header(b"fal-code")) == (500, None)
            assert stats(proxy).failed == 1
            connection.close()

    asyncio.run(scenario())


def test_a_worker_that_had_no_room_is_busy_not_failed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            answer = await once(address_of(proxy), "/no-room")
            assert (answer.status, answer.header(b"fal-code")) == (503, b"BUSY")
            answer.close()
            counted = stats(proxy)
            assert (counted.served, counted.failed, counted.cancelled, counted.in_flight) == (0, 0, 0, 0)

    asyncio.run(scenario())


def test_request_timeout_is_a_504_before_the_head_and_a_cut_after_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker, timeout_s=0.15))
            worker.gate.clear()
            answer = await once(address_of(proxy), "/infer")
            assert (answer.status, answer.header(b"fal-code")) == (504, b"TIMEOUT")
            answer.close()
            await until(lambda: worker.broken == 1)
            worker.gate.set()
            answer = await once(address_of(proxy), "/stream?n=1000")
            with pytest.raises(FalError, match="broke off"):
                await answer.read(1 << 20)
            assert (stats(proxy).failed, stats(proxy).in_flight) == (2, 0)

    asyncio.run(scenario())


def test_what_is_refused_and_how(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            connection = await dial(address_of(proxy))

            async def refused(runner: str = RUNNER, ticket: str | None = None) -> tuple[int, bytes | None]:
                answer = await call(connection, "/infer", b"some body", runner=runner, ticket=ticket)
                await answer.read(1000)
                return answer.status, answer.header(b"fal-code")

            assert await refused(runner="default/other-1") == (404, b"NOT_FOUND")
            proxy.set_term(5)
            proxy.set_term(9)
            assert await refused(ticket="term=4;lease=x") == (412, b"STALE_TERM")
            assert await refused(ticket="term=5;lease=x") == (200, None)
            assert await refused(ticket="term=99;lease=") == (200, None), "a newer leader than we know"
            assert await refused(ticket="term=5;lease=x") == (200, None), "tickets teach no terms"
            assert proxy.drain_runner(RUNNER)
            assert await refused(ticket="term=9;lease=x") == (503, b"DRAINING")
            assert proxy.remove_runner(RUNNER)
            assert await refused(ticket="term=9;lease=x") == (404, b"NOT_FOUND")
            connection.close()
            assert len(worker.seen) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /v1/runners/default/a-1/x HTTP/1.1\r\n\r\n", 401),  # no ticket
        (b"GET /v1/runners/default/a-1/x HTTP/1.1\r\nfal-ticket: nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/runners/../etc/x HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/probe HTTP/1.0\r\n\r\n", 505),
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\na: b\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\na: " + b"x" * 40_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_bad_heads_are_answered_and_the_connection_ends(tmp_path: Path, request_bytes: bytes, status: int) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "p", bounds=Bounds(discard_timeout_s=0.05)) as proxy:
            answer = await raw(address_of(proxy), request_bytes)
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert b"connection: close" in answer

    asyncio.run(scenario())


def test_probe_tells_the_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "p") as proxy:
            connection = await dial(address_of(proxy))
            answer = await connection.request("GET", "/v1/probe", [])
            assert json.loads(await answer.read(1000)) == {"node": NODE}
            connection.close()

    asyncio.run(scenario())


def test_slow_heads_idle_connections_and_too_many_of_them_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        bounds = Bounds(head_timeout_s=0.1, idle_timeout_s=0.1, connections_max=3, discard_timeout_s=0.05)
        async with serving(tmp_path / "p", bounds=bounds) as proxy:
            address = address_of(proxy)
            assert (await raw(address, b"GET /v1/probe HT")).startswith(b"HTTP/1.1 408 ")
            assert await raw(address, b"") == b""
            assert await raw(address, b"\r\n\r\n") == b""
            held = [await asyncio.open_connection(address.host, address.port) for _ in range(3)]
            await until(lambda: proxy.stats().connections == 3)
            assert (await raw(address, b"")).startswith(b"HTTP/1.1 503 ")
            for _, writer in held:
                writer.close()

    asyncio.run(scenario())


def test_a_body_that_stalls_frees_the_slot(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p", bounds=Bounds(stall_timeout_s=0.2)) as proxy:
            proxy.put_runner(entry(worker))
            head = (
                f"POST /v1/runners/{RUNNER}/infer HTTP/1.1\r\nfal-ticket: term=1;lease=\r\ncontent-length: 5\r\n\r\nab"
            )
            assert (await raw(address_of(proxy), head.encode())).startswith(b"HTTP/1.1 504 ")
            assert (stats(proxy).in_flight, stats(proxy).failed) == (0, 1)

    asyncio.run(scenario())


def test_pipelined_requests_are_cut_not_buffered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            worker.gate.clear()
            head = f"GET /v1/runners/{RUNNER}/infer HTTP/1.1\r\nfal-ticket: term=1;lease=\r\n\r\n".encode()
            with contextlib.suppress(ConnectionResetError):
                assert await raw(address_of(proxy), head * 2) == b""
            await until(lambda: stats(proxy).in_flight == 0)

    asyncio.run(scenario())


def test_a_symlink_in_place_of_the_socket_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path, "victim.sock") as victim, serving(tmp_path / "p") as proxy:
            hostile = tmp_path / "worker.sock"
            hostile.symlink_to(victim.path)
            proxy.put_runner(replace(entry(victim), socket_path=str(hostile)))
            answer = await once(address_of(proxy), "/infer")
            assert (answer.status, answer.header(b"fal-code")) == (503, b"UNAVAILABLE")
            answer.close()
            hostile.unlink()
            hostile.write_bytes(b"a plain file")
            answer = await once(address_of(proxy), "/infer")
            assert answer.status == 503
            answer.close()
            assert victim.seen == []

    asyncio.run(scenario())


def test_a_socket_of_another_process_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            address = address_of(proxy)

            async def status(**changes: object) -> int:
                proxy.put_runner(replace(entry(worker), **changes))  # type: ignore[arg-type]
                answer = await once(address, "/infer")
                answer.close()
                return answer.status

            assert await status(cgroup="no-such-container") == 503
            assert await status(pid=os.getpid()) == 200
            assert await status(pid=os.getppid()) == 200, "a descendant is one of its own"
            assert await status(pid=2**22 - 1) == 503
            assert len(worker.seen) == 2

    asyncio.run(scenario())


def test_a_worker_whose_backlog_is_full_is_waited_for_within_bounds(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf, contextlib.ExitStack() as stack:
            path = tmp_path / "deaf.sock"
            deaf.bind(str(path))
            deaf.listen(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                    filler.setblocking(False)
                    filler.connect(str(path))
            async with (
                working(tmp_path) as worker,
                serving(tmp_path / "p", bounds=Bounds(connect_timeout_s=0.1)) as proxy,
            ):
                proxy.put_runner(replace(entry(worker), socket_path=str(path)))
                answer = await once(address_of(proxy), "/infer")
                assert (answer.status, answer.header(b"fal-code")) == (503, b"UNAVAILABLE")
                answer.close()

    asyncio.run(scenario())


def test_a_removed_runner_finishes_what_it_has(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            worker.gate.clear()
            connection: HttpConnection = await dial(address_of(proxy))
            request = asyncio.create_task(call(connection, "/infer"))
            await until(lambda: worker.running == 1)
            proxy.remove_runner(RUNNER)
            assert proxy.stats().runners == ()
            proxy.put_runner(entry(worker))
            assert stats(proxy).in_flight == 1, "put back: what still runs counts"
            worker.gate.set()
            answer = await request
            assert answer.status == 200
            await answer.read(1000)
            connection.close()
            assert isinstance(proxy.stats(), ProxyStats)
            assert stats(proxy).in_flight == 0

    asyncio.run(scenario())
