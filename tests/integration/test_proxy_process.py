"""fal-proxy as a process of its own: control socket, hand-over under load, kill -9, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import fal_contract.datapath as datapath
from dataplane import NODE, RUNNER, entry, identities, until, working
from fal_agent.proxy.control import ProxyControl
from fal_agent.proxy.messages import ProxyStats, RunnerStats
from fal_contract.clock import SystemClock
from fal_contract.datapath import NOT_RUN, Address, DirectConnections, TlsIdentity
from fal_contract.errors import Code, FalError
from fal_contract.http_client import HttpResponse, NotSent
from fal_contract.identity import Identity

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short_idle_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in production, callers let go of idle connections before the proxy does; only sooner."""
    monkeypatch.setattr(datapath, "DATA_CLIENT_IDLE_S", 0.5)


@dataclass
class Process:
    """A running fal-proxy and a control connection to it."""

    process: asyncio.subprocess.Process
    control: ProxyControl
    pushed: list[ProxyStats] = field(default_factory=list)

    @property
    def address(self) -> Address:
        ((host, port),) = self.control.info.listen
        return Address(host, port)

    async def only_runner(self) -> RunnerStats:
        (runner,) = (await self.control.stats()).runners
        return runner

    async def exited(self) -> int:
        async with asyncio.timeout(40):
            return await self.process.wait()


def environment() -> dict[str, str]:
    roots = ("proto", "scheduler", "agent", "runtime", "fsd")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(REPOSITORY / root) for root in roots)}


@contextlib.asynccontextmanager
async def running(folder: Path, *flags: str, identity: Path | None = None) -> AsyncIterator[Process]:
    """Started, answering on its control socket; killed at the end if it still runs."""
    security = ("--identity", str(identity)) if identity else ("--insecure", "--node-id", NODE)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fal_agent.proxy.main", "run", "--state-dir", str(folder), "--host", "127.0.0.1",
        "--idle-timeout-s", "2", *security, *flags, env=environment(),
    )  # fmt: skip
    started: Process | None = None
    try:
        pushed: list[ProxyStats] = []
        async with asyncio.timeout(20):
            while started is None:
                assert process.returncode is None, f"it exited with {process.returncode}"
                with contextlib.suppress(FalError):
                    control = await ProxyControl.connect(folder / "proxy.sock", on_stats=pushed.append)
                    if control.info.pid == process.pid:
                        started = Process(process, control, pushed)
                    else:
                        await control.close()
                await asyncio.sleep(0.02)
        yield started
    finally:
        if started is not None:
            await started.control.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


class Caller:
    """Requests over kept connections, as a gateway makes them: again only when it surely did not run."""

    def __init__(self, address: Address, identity: Identity | None = None) -> None:
        self.direct = DirectConnections(TlsIdentity(identity, SystemClock()))
        self.address = address
        self.retries = 0

    async def ask(self, action: str, runner: str = RUNNER) -> HttpResponse:
        fresh = False
        while True:
            try:
                connection = await self.direct.acquire(NODE, [self.address], fresh=fresh)
                headers = [("host", "t"), ("fal-ticket", "term=1;lease=l")]
                answer = await connection.request("POST", f"/v1/runners/{runner}{action}", headers, b"{}")
            except NotSent:
                answer = None
            if answer is not None:
                code = answer.header(b"fal-code")
                if code is None or Code(code.decode()) not in NOT_RUN:
                    return answer
                fresh = answer.header(b"fal-retry") == b"reconnect"
                await answer.read(1 << 16)
            self.retries += 1
            await asyncio.sleep(0.002)

    async def bytes_of(self, action: str) -> bytes:
        answer = await self.ask(action)
        body = await answer.read(1 << 20)
        assert answer.status == 200, body
        return body


def test_control_steers_and_stats_are_pushed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, running(tmp_path / "p") as proxy:
            assert proxy.control.info.node_id == NODE
            assert (tmp_path / "p" / "proxy.sock").stat().st_mode & 0o777 == 0o600
            await proxy.control.put_runner(entry(worker, slots=3))
            assert await proxy.control.runners() == (entry(worker, slots=3),)
            began_s = time.monotonic()
            caller = Caller(proxy.address)
            for _ in range(5):
                assert json.loads(await caller.bytes_of("/infer"))["path"] == "/infer"
            await until(lambda: bool(proxy.pushed) and [one.served for one in proxy.pushed[-1].runners] == [5])
            assert len(proxy.pushed) <= 8, "coalesced"
            runner = await proxy.only_runner()
            assert 0 <= runner.last_used_age_s <= time.monotonic() - began_s
            with pytest.raises(FalError, match="does not exist"):
                await proxy.control.drain_runner("default/none-1")
            await proxy.control.drain_runner(RUNNER)
            assert (await proxy.only_runner()).draining
            await proxy.control.remove_runner(RUNNER)
            assert (await proxy.control.stats()).runners == ()
            caller.direct.close()

    asyncio.run(scenario())


def test_killed_and_started_again_it_serves_without_an_agent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker:
            async with running(tmp_path / "p") as proxy:
                address = proxy.address
                await proxy.control.put_runner(entry(worker))
                await proxy.control.set_term(7)
                await proxy.control.set_term(8)
                proxy.process.send_signal(signal.SIGKILL)
                await proxy.exited()
                assert proxy.control.closed or await asyncio.wait_for(proxy.control.wait_closed(), 5) is None
            async with running(tmp_path / "p") as proxy:
                assert proxy.address == address, "gateways know this port"
                caller = Caller(address)
                connection = await caller.direct.acquire(NODE, [address])
                stale = await connection.request(
                    "POST", f"/v1/runners/{RUNNER}/infer", [("host", "t"), ("fal-ticket", "term=6;lease=")]
                )
                assert stale.status == 412, "it still knows the terms"
                await stale.read(1000)
                ticket = [("host", "t"), ("fal-ticket", "term=8;lease=")]
                answer = await connection.request("POST", f"/v1/runners/{RUNNER}/infer", ticket)
                assert answer.status == 200
                await answer.read(1000)
                caller.direct.close()
                connection.close()
            (tmp_path / "p" / "proxy.state").write_bytes(b"damaged")
            async with running(tmp_path / "p") as proxy:
                assert await proxy.control.runners() == (), "a damaged file is ignored, the agent tells again"

    asyncio.run(scenario())


async def load(caller: Caller, stop: asyncio.Event, done: list[bytes]) -> None:
    while not stop.is_set():
        done.append(await caller.bytes_of("/infer"))


def test_a_hand_over_under_load_fails_no_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, working(tmp_path, "s.sock") as slow, running(tmp_path / "p") as old:
            await old.control.put_runner(entry(worker, slots=4))
            await old.control.put_runner(entry(slow, slots=1, runner_id="default/slow-1"))
            caller = Caller(old.address)
            # A stream that is under way all through the change, alone on its runner's only slot.
            slow.last_step.clear()
            stream = await caller.ask("/stream?n=40", "default/slow-1")
            stop, done = asyncio.Event(), list[bytes]()
            tasks = [asyncio.create_task(load(caller, stop, done)) for _ in range(8)]
            await until(lambda: len(done) > 50)
            async with running(tmp_path / "p", "--takeover") as new:
                assert new.address == old.address
                assert new.control.info.instance == old.control.info.instance
                await until(lambda: old.control.closed)
                before = len(done)
                await until(lambda: len(done) > before + 200)
                counts = {one.runner_id: one for one in (await new.control.stats()).runners}
                assert counts["default/slow-1"].in_flight == 1, "the old one's stream holds its slot here"
                slow.last_step.set()
                body = await stream.read(1 << 20)
                assert body == b"".join(b"data: %d\n\n" % n for n in range(40))
                assert await old.exited() == 0
                stop.set()
                await asyncio.gather(*tasks)
                counts = {one.runner_id: one for one in (await new.control.stats()).runners}
                assert (counts["default/slow-1"].in_flight, counts["default/slow-1"].served) == (0, 1)
                assert counts[RUNNER].served == len(done), "every completion was counted once"
                assert (counts[RUNNER].failed, counts[RUNNER].cancelled, counts[RUNNER].in_flight) == (0, 0, 0)
                assert worker.running_max <= 4, "admission stayed exact across both processes"
                caller.direct.close()

    asyncio.run(scenario())


def test_a_successor_that_dies_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        from fal_agent.proxy.handover import take_over

        async with working(tmp_path) as worker, running(tmp_path / "p") as old:
            await old.control.put_runner(entry(worker))
            predecessor = await take_over(tmp_path / "p" / "proxy.sock", tmp_path)
            assert predecessor.handed.runners[0].entry == entry(worker)
            caller = Caller(old.address)
            waiting = asyncio.create_task(caller.bytes_of("/infer"))
            predecessor.close()  # as a crash would
            assert json.loads(await waiting)["path"] == "/infer"
            assert (await old.only_runner()).served == 1
            caller.direct.close()
            again = await ProxyControl.connect(tmp_path / "p" / "proxy.sock", on_stats=lambda stats: None)
            assert again.info.pid == old.process.pid
            await again.close()

    asyncio.run(scenario())


def test_takeover_without_a_proxy_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fal_agent.proxy.main", "run", "--state-dir", str(tmp_path), "--insecure",
            "--node-id", NODE, "--takeover", env=environment(), stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 1
        assert b"error: the proxy at" in said
        assert b"Start without --takeover" in said

    asyncio.run(scenario())


def test_sigterm_finishes_what_is_under_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, running(tmp_path / "p") as proxy:
            await proxy.control.put_runner(entry(worker))
            caller = Caller(proxy.address)
            stream = await caller.ask("/stream?n=20")
            proxy.process.terminate()
            assert (await stream.read(1 << 20)).endswith(b"data: 19\n\n")
            caller.direct.close()
            assert await proxy.exited() == 0

    asyncio.run(scenario())


def test_only_serving_identities_of_the_cluster_are_admitted(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = identities(tmp_path)
        foreign = identities(tmp_path / "foreign")
        async with working(tmp_path) as worker, running(tmp_path / "p", identity=cluster.node_file) as proxy:
            await proxy.control.put_runner(entry(worker))
            for identity in (cluster.gateway, cluster.admin):
                caller = Caller(proxy.address, identity)
                assert json.loads(await caller.bytes_of("/infer"))["path"] == "/infer"
                caller.direct.close()
            caller = Caller(proxy.address, cluster.viewer)
            answer = await caller.ask("/infer")
            assert (answer.status, answer.header(b"fal-code")) == (403, b"PERMISSION_DENIED")
            answer.close()
            direct = DirectConnections(TlsIdentity(foreign.gateway, SystemClock()))
            with pytest.raises(NotSent):
                await direct.probe(NODE, [proxy.address])
            # The certificate must be that of the node that is meant.
            direct = DirectConnections(TlsIdentity(cluster.gateway, SystemClock()))
            with pytest.raises(NotSent, match="expected n-another"):
                await direct.probe("n-another", [proxy.address])
            await direct.probe(NODE, [proxy.address])
            direct.close()
            assert len(worker.seen) == 2

    asyncio.run(scenario())


def test_a_renewed_certificate_is_shown_without_losing_a_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = identities(tmp_path)
        async with working(tmp_path) as worker, running(tmp_path / "p", identity=cluster.node_file) as proxy:
            await proxy.control.put_runner(entry(worker))
            caller = Caller(proxy.address, cluster.gateway)
            stream = await caller.ask("/stream?n=10")
            renewed = cluster.ca.new_identity(role=cluster.node.peer.role, name=NODE, now_s=SystemClock().wall_s())
            renewed.save(cluster.node_file)
            await proxy.control.reload_identity()
            tls = TlsIdentity(cluster.gateway, SystemClock())
            _, writer = await asyncio.open_connection(proxy.address.host, proxy.address.port, ssl=tls.client)
            shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            from fal_contract.identity import peer_of_der

            assert peer_of_der(shown).serial == renewed.peer.serial
            writer.close()
            assert (await stream.read(1 << 20)).endswith(b"data: 9\n\n")
            caller.direct.close()

    asyncio.run(scenario())
