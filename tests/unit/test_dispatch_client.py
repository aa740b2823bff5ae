"""DispatchClient against a scripted scheduler, real proxies and scripted workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from dataplane import NODE, RUNNER, WAIT_S, FakeWorker, address_of, entry, serving, until, working
from fal_agent.proxy.server import ProxyServer
from fal_contract.clock import SystemClock
from fal_contract.datapath import Address, DirectConnections, TlsIdentity
from fal_contract.dispatch import DispatchClient
from fal_contract.errors import Code, FalError
from fal_contract.node_paths import NodePaths
from fal_contract.v1 import agent_pb2, serving_pb2, state_pb2

APP = "default/digits"


class FakeScheduler:
    """The other end of Dispatch streams, in memory. `down` refuses streams and breaks those that stand."""

    def __init__(self) -> None:
        self.heard: list[serving_pb2.GatewayMessage] = []
        self.hellos: list[serving_pb2.GatewayHello] = []
        self.on_wants: Callable[[serving_pb2.Wants], None] = lambda wants: None
        self.down = False
        self._queues: list[asyncio.Queue[serving_pb2.DispatchMessage | None]] = []

    async def dial(self) -> FakeLink:
        if self.down:
            raise FalError(Code.UNAVAILABLE, "nobody listens", remedy="")
        queue: asyncio.Queue[serving_pb2.DispatchMessage | None] = asyncio.Queue()
        self._queues.append(queue)
        return FakeLink(self, queue)

    def tell(self, message: serving_pb2.DispatchMessage) -> None:
        for queue in self._queues:
            queue.put_nowait(message)

    def break_streams(self) -> None:
        for queue in self._queues:
            queue.put_nowait(None)
        self._queues.clear()

    def wants(self) -> list[serving_pb2.Wants]:
        return [message.wants for message in self.heard if message.WhichOneof("kind") == "wants"]

    def updates(self) -> list[serving_pb2.LeaseUpdate]:
        return [one for message in self.heard for one in message.updates.updates]

    def reached(self) -> list[serving_pb2.Reach]:
        return [one for message in self.heard for one in message.reached.nodes]


class FakeLink:
    def __init__(self, scheduler: FakeScheduler, queue: asyncio.Queue[serving_pb2.DispatchMessage | None]) -> None:
        self._scheduler = scheduler
        self._queue = queue

    async def send(self, message: serving_pb2.GatewayMessage) -> None:
        if message.WhichOneof("kind") == "hello":
            self._scheduler.hellos.append(message.hello)
            welcome = serving_pb2.DispatchWelcome(version=1, cluster_id="c-1", epoch=1, term=1)
            self._queue.put_nowait(serving_pb2.DispatchMessage(welcome=welcome))
            return
        self._scheduler.heard.append(message)
        if message.WhichOneof("kind") == "wants":
            self._scheduler.on_wants(message.wants)

    async def receive(self) -> serving_pb2.DispatchMessage:
        message = await self._queue.get()
        if message is None:
            raise FalError(Code.UNAVAILABLE, "the stream broke", remedy="")
        return message

    async def close(self) -> None:
        pass


def routes(
    *addresses: Address, complete: bool = True, runners: tuple[str, ...] = (RUNNER,)
) -> serving_pb2.DispatchMessage:
    return serving_pb2.DispatchMessage(
        routes=serving_pb2.Routes(
            complete=True,
            term=1,
            routes=[
                serving_pb2.Route(
                    runner_id=runner,
                    app=APP,
                    node_id=NODE,
                    endpoints=[agent_pb2.Endpoint(host=one.host, port=one.port) for one in addresses],
                    state=state_pb2.RUNNER_STATE_IDLE,
                    max_multiplexing=2,
                )
                for runner in runners
            ],
        )
    )


def lease(
    lease_id: str = "l-1", slots: int = 1, runner: str = RUNNER, ttl_s: float = 30.0
) -> serving_pb2.DispatchMessage:
    return serving_pb2.DispatchMessage(
        leases=serving_pb2.Leases(
            leases=[
                serving_pb2.SlotLease(
                    lease_id=lease_id, runner_id=runner, node_id=NODE, app=APP, slots=slots, term=1, ttl_s=ttl_s
                )
            ]
        )
    )


def refusal(code: str) -> serving_pb2.DispatchMessage:
    told = serving_pb2.Refusal(
        app=APP, code=code, what=f"{APP} has no runner: 3 nodes lack memory", remedy="Add nodes."
    )
    return serving_pb2.DispatchMessage(refusals=serving_pb2.Refusals(refusals=[told]))


@contextlib.asynccontextmanager
async def client_of(scheduler: FakeScheduler) -> AsyncIterator[DispatchClient]:
    direct = DirectConnections(TlsIdentity(None, SystemClock()))
    client = DispatchClient(
        dial=scheduler.dial,
        gateway_id="gw-1",
        paths=lambda changed: NodePaths(direct, None, rng=Random(2), on_change=changed),
        rng=Random(3),
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@dataclass(frozen=True)
class Cluster:
    scheduler: FakeScheduler
    client: DispatchClient
    proxy: ProxyServer
    worker: FakeWorker


@contextlib.asynccontextmanager
async def cluster(folder: Path, slots: int = 2) -> AsyncIterator[Cluster]:
    scheduler = FakeScheduler()
    async with working(folder) as worker, serving(folder / "p") as proxy, client_of(scheduler) as client:
        proxy.put_runner(entry(worker, slots=slots))
        await until(lambda: client.statistics().connected)
        yield Cluster(scheduler, client, proxy, worker)


async def ask(client: DispatchClient, path: str = "/infer", wait_s: float = WAIT_S) -> int:
    response = await client.request(APP, "POST", path, [("accept", "*/*")], b"{}", wait_s=wait_s)
    await response.read(1 << 20)
    return response.status


def test_a_want_becomes_a_lease_becomes_an_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as c:
            c.scheduler.tell(routes(address_of(c.proxy)))
            c.scheduler.on_wants = lambda wants: c.scheduler.tell(lease()) if wants.wants else None
            response = await c.client.request(APP, "POST", "/infer", [], b'{"prompt": "7"}', wait_s=WAIT_S)
            assert (response.status, response.runner_id) == (200, RUNNER)
            assert json.loads(await response.read(1000)) == {"path": "/infer", "bytes": 15}
            first = c.scheduler.wants()[0].wants[0]
            assert (first.app, first.slots, first.queued) == (APP, 1, 1)
            await until(lambda: c.scheduler.wants()[-1].wants == [])
            asked = len(c.scheduler.wants())
            for _ in range(20):
                assert await ask(c.client) == 200
            assert len(c.scheduler.wants()) == asked, "a slot in hand is used without asking"
            assert len(c.worker.seen) == 21
            await until(lambda: any(reach.path == "direct" for reach in c.scheduler.reached()))

    asyncio.run(scenario())


def test_an_idle_lease_goes_back_and_a_used_one_is_renewed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as c:
            c.scheduler.tell(routes(address_of(c.proxy)))
            c.scheduler.tell(lease(ttl_s=4.0))
            c.worker.gate.clear()
            request = asyncio.create_task(ask(c.client))
            await until(lambda: any(update.renew for update in c.scheduler.updates()))
            assert not any(update.returned for update in c.scheduler.updates())
            c.scheduler.tell(lease(ttl_s=4.0))
            c.worker.gate.set()
            assert await request == 200
            await until(lambda: any(update.returned == 1 for update in c.scheduler.updates()))
            assert sum(update.served for update in c.scheduler.updates()) == 1
            assert c.client.statistics().leases == 0

    asyncio.run(scenario())


def test_many_requests_share_slots_in_order_and_none_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as c:
            c.scheduler.tell(routes(address_of(c.proxy)))
            c.scheduler.tell(lease(slots=2))
            answers = await asyncio.gather(*(ask(c.client) for _ in range(60)))
            assert answers == [200] * 60
            assert c.worker.running_max <= 2
            assert c.proxy.stats().runners[0].served == 60
            assert c.client.statistics().retries == 0

    asyncio.run(scenario())


def test_without_a_leader_requests_go_on_and_the_node_keeps_the_bound(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, slots=1) as c:
            c.scheduler.tell(routes(address_of(c.proxy)))
            c.scheduler.tell(lease(ttl_s=0.5))
            assert await ask(c.client) == 200
            c.scheduler.down = True
            c.scheduler.break_streams()
            await until(lambda: not c.client.statistics().connected)
            # The table says two at once, the node admits one: the rest is tried again, not failed.
            answers = await asyncio.gather(*(ask(c.client) for _ in range(20)))
            assert answers == [200] * 20
            assert c.worker.running_max == 1
            c.scheduler.down = False
            await until(lambda: c.client.statistics().connected)
            assert len(c.scheduler.hellos) == 2

    asyncio.run(scenario())


def test_a_lease_survives_a_broken_stream_and_is_told_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as c:
            c.scheduler.tell(routes(address_of(c.proxy)))
            c.scheduler.tell(lease())
            c.worker.gate.clear()
            request = asyncio.create_task(ask(c.client))
            await until(lambda: c.worker.running == 1)
            c.scheduler.break_streams()
            await until(lambda: len(c.scheduler.hellos) == 2)
            assert [held.lease_id for held in c.scheduler.hellos[1].held] == ["l-1"]
            c.worker.gate.set()
            assert await request == 200

    asyncio.run(scenario())


def test_busy_is_tried_again_and_what_may_have_run_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path, slots=1) as c:
            c.scheduler.tell(routes(address_of(c.proxy)))
            c.scheduler.tell(lease(slots=2))  # a leader that granted too much
            assert await asyncio.gather(*(ask(c.client) for _ in range(10))) == [200] * 10
            assert c.worker.running_max == 1
            before = len(c.worker.seen)
            with pytest.raises(FalError) as caught:
                await ask(c.client, "/die")
            assert caught.value.code is Code.RUNNER_FAILED
            with pytest.raises(FalError, match="broke off"):
                await ask(c.client, "/half")
            assert len(c.worker.seen) == before + 2, "each ran once"

    asyncio.run(scenario())


def test_a_draining_runner_is_left_for_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        other = "default/digits-00000002"
        async with cluster(tmp_path) as c, working(tmp_path, "2.sock") as second:
            c.proxy.put_runner(entry(second, runner_id=other))
            c.scheduler.tell(routes(address_of(c.proxy), runners=(RUNNER, other)))
            c.scheduler.tell(lease("l-1"))
            c.scheduler.tell(lease("l-2", runner=other))
            c.proxy.drain_runner(RUNNER)
            for _ in range(5):
                assert await ask(c.client) == 200
            assert (len(c.worker.seen), len(second.seen)) == (0, 5)

    asyncio.run(scenario())


def test_refusals_reach_the_caller(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as c:
            c.scheduler.on_wants = lambda wants: c.scheduler.tell(refusal("NO_CAPACITY")) if wants.wants else None
            with pytest.raises(FalError, match="3 nodes lack memory") as caught:
                await ask(c.client, wait_s=0.2)
            assert caught.value.code is Code.NO_CAPACITY
            c.scheduler.on_wants = lambda wants: c.scheduler.tell(refusal("NOT_FOUND")) if wants.wants else None
            with pytest.raises(FalError) as caught:
                await ask(c.client)  # at once, not after the wait
            assert caught.value.code is Code.NOT_FOUND
            c.scheduler.on_wants = lambda wants: None
            with pytest.raises(FalError, match="no runner of default/digits became free") as caught:
                await ask(c.client, wait_s=0.05)
            assert c.client.statistics().waiting == 0

    asyncio.run(scenario())


def test_an_unreachable_node_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as c:
            c.scheduler.tell(routes(Address("127.0.0.1", 1)))
            c.scheduler.tell(lease())
            await until(lambda: any(reach.path == "none" for reach in c.scheduler.reached()))
            with pytest.raises(FalError, match=r"cannot be reached: .*127\.0\.0\.1:1"):
                await ask(c.client, wait_s=0.2)
            # The node's address is corrected; requests that wait go through.
            request = asyncio.create_task(ask(c.client))
            c.scheduler.tell(routes(address_of(c.proxy)))
            assert await request == 200

    asyncio.run(scenario())


def test_closing_the_response_early_cancels_the_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as c:
            c.scheduler.tell(routes(address_of(c.proxy)))
            c.scheduler.tell(lease())
            response = await c.client.request(APP, "POST", "/stream?n=1000", [], b"", wait_s=WAIT_S)
            assert await anext(response.chunks()) == b"data: 0\n\n"
            response.close()
            await until(lambda: c.worker.broken == 1)
            assert await ask(c.client) == 200

    asyncio.run(scenario())


def test_wants_are_coalesced(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(tmp_path) as c:
            requests = [asyncio.create_task(ask(c.client)) for _ in range(500)]
            await until(lambda: bool(c.scheduler.wants()) and c.scheduler.wants()[-1].wants[0].queued == 500)
            assert len(c.scheduler.wants()) <= 3
            c.scheduler.tell(routes(address_of(c.proxy)))
            c.scheduler.tell(lease(slots=2))
            assert await asyncio.gather(*requests) == [200] * 500

    asyncio.run(scenario())


def test_a_client_that_ends_gives_its_leases_back_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker, slots=2))
            async with client_of(scheduler) as client:
                await until(lambda: client.statistics().connected)
                scheduler.tell(routes(address_of(proxy)))
                scheduler.tell(lease())
                assert await ask(client) == 200
            assert sum(update.returned for update in scheduler.updates()) >= 1
            assert sum(update.served for update in scheduler.updates()) == 1

    asyncio.run(scenario())


def test_a_client_that_ends_wants_nothing_before_it_gives_back() -> None:
    """Else the scheduler, who knows of a want, would grant what comes back to the stream that ends."""

    async def scenario() -> None:
        scheduler = FakeScheduler()
        nobody = Address("127.0.0.1", 9)
        async with client_of(scheduler) as client:
            request = asyncio.create_task(ask(client))
            await until(lambda: bool(scheduler.wants()) and bool(scheduler.wants()[-1].wants))
            scheduler.tell(routes(nobody))
            scheduler.tell(lease())
            await until(lambda: client.statistics().leases == 1)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError, FalError):
            await request
        told = [message for message in scheduler.heard if message.WhichOneof("kind") in ("wants", "updates")]
        assert not told[-2].wants.wants
        assert [(update.lease_id, update.returned) for update in told[-1].updates.updates] == [("l-1", 1)]

    asyncio.run(scenario())
