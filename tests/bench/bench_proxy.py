"""`proxy`: a request through fal-proxy and the worker's unix socket ÷ the same request straight to that socket.

Processes: a worker of least cost (`proxy_worker_child`), two proxies as they are deployed (one with mutual TLS, one
plain), and this one with the gateway's HTTP client on the gateway's event loop. Connections are kept on both sides;
each request carries its own slot and ticket. Rows: an answer of 1 kB (seconds at p50 and p99), an answer and a body of
10 MB (bytes per second). Straight and through the proxy take turns.

The floor: a proxied answer crosses two sockets instead of one and wakes three processes instead of two, so the 1 kB
ratio is 2 when the proxy costs as much as worker and client, which do the same reading and writing. 10 MB: each byte is
copied by the kernel four times instead of twice, and one of the sockets is TCP; TLS adds one pass to seal and one to
open. Two ways show it on the machine at hand: `TCP`, the same worker and client with nothing but loopback between
them, and `relay`, two blocking threads that know no HTTP (`proxy_relay_child`). Where there are fewer CPUs than
processes, what the third costs is missing to the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from harness import Options, Paired, Result, interleave, percentile, print_table, significant
from proxy_worker_child import SIZES

from dataplane import NODE, RUNNER, TICKET, Identities, identities
from fal_agent.proxy.control import ProxyControl
from fal_agent.proxy.messages import RunnerEntry
from fal_contract.clock import SystemClock
from fal_contract.errors import FalError
from fal_contract.http_client import READ_BYTES, HttpConnection
from fal_contract.identity import Role
from fal_contract.tls import client_context, verify_peer
from scheduler_process import environment

MUST_REACH = "1 kB p50 <= 2 plain; 10 MB throughput >= 0.8 plain, >= 0.45 with mutual TLS"
SMALL_RATIO_MAX = 2.0
LARGE_RATIO_MIN = {"plain": 0.8, "mTLS": 0.45}
SMALL, LARGE = SIZES
LOOP = uvloop.new_event_loop  # as the gateway has
TIMEOUT_S = 30.0
BODY = bytes(LARGE)
ANSWER_BYTES_MAX = 2 * LARGE
LARGE_MIN = 3  # requests of 10 MB a run


@dataclass
class Caller:
    """One kept connection, and how long its requests took."""

    connection: HttpConnection
    prefix: str  # of targets
    small_s: list[float] = field(default_factory=list)

    async def once(self, method: str, size: int, body: bytes = b"") -> None:
        """One request; the answer is read to its end."""
        target = f"{self.prefix}/{size}"
        answer = await self.connection.request(method, target, [("host", "bench"), TICKET], body)
        assert answer.status == 200, answer.status
        got = 0
        async for piece in answer.chunks():
            got += len(piece)
        assert got == (0 if body else size), got

    async def small(self, seconds_s: float) -> float:
        """Seconds of the median request of 1 kB."""
        took: list[float] = []
        end_s = time.perf_counter() + seconds_s
        while (begun_s := time.perf_counter()) < end_s:
            await self.once("GET", SMALL)
            took.append(time.perf_counter() - begun_s)
        self.small_s += took
        return percentile(took, 0.5)

    async def large(self, seconds_s: float, body: bytes = b"") -> float:
        """Bytes per second of answers (or, with `body`, of bodies) of 10 MB, one after the other."""
        begun_s, count = time.perf_counter(), 0
        while count < LARGE_MIN or time.perf_counter() - begun_s < seconds_s:
            await self.once("POST" if body else "GET", LARGE, body)
            count += 1
        return count * LARGE / (time.perf_counter() - begun_s)


@asynccontextmanager
async def process(*argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process that is killed at the end."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, *argv, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.communicate()


@asynccontextmanager
async def over_tcp(port: int) -> AsyncIterator[Caller]:
    """What listens on a port of loopback and wants no HTTP of its own: the worker, or the relay."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=READ_BYTES)
    try:
        yield Caller(HttpConnection(reader, writer), "")
    finally:
        writer.close()


async def started(stack: AsyncExitStack, script: str, socket: Path) -> int:
    """Begin a child of this folder; the port that it prints."""
    child = await stack.enter_async_context(process(str(Path(__file__).with_name(script)), str(socket)))
    assert child.stdout is not None
    return int(await asyncio.wait_for(child.stdout.readline(), TIMEOUT_S))


@asynccontextmanager
async def proxied(folder: Path, socket: Path, secure: Identities | None) -> AsyncIterator[Caller]:
    """A proxy in front of the worker, and a connection to it as a gateway makes it."""
    folder.mkdir()
    flags = ["--identity", str(secure.node_file)] if secure else ["--insecure", "--node-id", NODE]
    run = ["-m", "fal_agent.proxy.main", "run", "--state-dir", str(folder), "--host", "127.0.0.1", *flags]
    async with process(*run, "--idle-timeout-s", "3600", "--log-level", "warning") as child:
        control = await connect(folder / "proxy.sock")
        try:
            assert child.pid == control.info.pid
            await control.put_runner(RunnerEntry(RUNNER, str(socket), 1, TIMEOUT_S))
            ((host, port),) = control.info.listen
            reader, writer = await asyncio.open_connection(
                host, port, ssl=client_context(secure.gateway) if secure else None, limit=READ_BYTES
            )
            if secure:
                now_s = SystemClock().wall_s()
                cluster_id = secure.gateway.peer.cluster_id
                verify_peer(writer.transport, cluster_id=cluster_id, roles={Role.NODE}, now_s=now_s)
            yield Caller(HttpConnection(reader, writer), f"/v1/runners/{RUNNER}")
            writer.close()
        finally:
            await control.close()


async def connect(path: Path) -> ProxyControl:
    """The control connection of a proxy that is starting."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            with contextlib.suppress(FalError):
                return await ProxyControl.connect(path, on_stats=lambda _: None)
            await asyncio.sleep(0.05)


@asynccontextmanager
async def callers(folder: Path) -> AsyncIterator[tuple[Caller, dict[str, Caller]]]:
    """Straight to the worker's socket, and the other ways to it."""
    path = folder / "w.sock"
    async with AsyncExitStack() as stack:
        port = await started(stack, "proxy_worker_child.py", path)
        reader, writer = await asyncio.open_unix_connection(str(path), limit=READ_BYTES)
        stack.callback(writer.close)
        through = {
            "plain": await stack.enter_async_context(proxied(folder / "p", path, None)),
            "mTLS": await stack.enter_async_context(proxied(folder / "s", path, identities(folder))),
            "TCP": await stack.enter_async_context(over_tcp(port)),
            "relay": await stack.enter_async_context(over_tcp(await started(stack, "proxy_relay_child.py", path))),
        }
        yield Caller(HttpConnection(reader, writer), ""), through


async def measure(options: Options) -> dict[tuple[str, str], Paired]:
    """(way, row) → figures."""
    figures: dict[tuple[str, str], Paired] = {}
    with tempfile.TemporaryDirectory(prefix="bp-") as name:
        async with callers(Path(name)) as (direct, through):
            for kind, caller in through.items():
                direct.small_s.clear()
                rows: dict[str, Callable[[Caller], Awaitable[float]]] = {
                    "1 kB": lambda who: who.small(options.seconds_s),
                    "10 MB": lambda who: who.large(options.seconds_s),
                    "10 MB up": lambda who: who.large(options.seconds_s, BODY),
                }
                for row, work in rows.items():
                    figures[kind, row] = await interleave(
                        partial(work, caller), partial(work, direct), pairs=options.pairs
                    )
                figures[kind, "1 kB p99"] = Paired(
                    [percentile(caller.small_s, 0.99)], [percentile(direct.small_s, 0.99)]
                )
    return figures


def table_row(kind: str, row: str, paired: Paired) -> tuple[str, float, float, float]:
    """Microseconds for latencies, MB/s for rates."""
    scale = 1e6 if row.startswith("1 kB") else 1e-6
    unit = "us" if row.startswith("1 kB") else "MB/s"
    data: dict[str, Any] = paired.as_json()
    return f"{row}, {kind}, {unit}", scale * data["ours"], scale * data["baseline"], data["ratio"]


def reached(figures: dict[tuple[str, str], Paired]) -> dict[str, bool]:
    """Per promise."""
    return {
        "1 kB p50, plain": figures["plain", "1 kB"].ratio <= SMALL_RATIO_MAX,
        **{f"10 MB, {kind}": figures[kind, "10 MB"].ratio >= least for kind, least in LARGE_RATIO_MIN.items()},
    }


async def run(options: Options) -> Result:
    """All rows."""
    figures = await measure(options)
    print_table(
        ("proxy", "through", "straight", "ratio"),
        [table_row(kind, row, paired) for (kind, row), paired in figures.items()],
    )
    met = reached(figures)
    main = figures["plain", "1 kB"]
    return Result(
        bench="proxy",
        ours=1e6 * main.as_json()["ours"],
        baseline=1e6 * main.as_json()["baseline"],
        ratio=main.ratio,
        unit="us of a request of 1 kB, p50",
        runs=len(main.ours),
        must_reach=MUST_REACH,
        reached=all(met.values()),
        extra={
            "rows": {f"{row}, {kind}": significant(paired.ratio) for (kind, row), paired in figures.items()},
            "each_reached": met,
        },
    )
