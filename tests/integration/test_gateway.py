"""The gateway end to end: HTTP in, a real gRPC Dispatch stream, real mutual TLS to a proxy, a scripted worker."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import grpc.aio
import pytest
from yarl import URL

from dataplane import NODE, RUNNER, FakeWorker, Identities, address_of, entry, identities, serving, until, working
from fal_agent.proxy.messages import GatewayEntry
from fal_agent.proxy.server import ProxyServer
from fal_contract.clock import SystemClock
from fal_contract.errors import FalError
from fal_contract.identity import Role
from fal_contract.rpc import bind, server_credentials
from fal_contract.v1 import agent_pb2, serving_pb2, serving_pb2_grpc, state_pb2
from fal_gateway.main import Ports, gateway
from fal_gateway.options import GatewayOptions, parse_address

APP = "default/digits"
IDLE = state_pb2.RUNNER_STATE_IDLE


@dataclass
class FakeServing(serving_pb2_grpc.ServingServicer):
    """One runner, one slot; grants what is wanted."""

    endpoints: list[agent_pb2.Endpoint]
    hellos: list[serving_pb2.GatewayHello] = field(default_factory=list)
    reached: list[serving_pb2.Reach] = field(default_factory=list)
    served: int = 0
    any_path: bool = False

    async def Dispatch(self, request_iterator: Any, context: Any) -> AsyncIterator[serving_pb2.DispatchMessage]:
        async for message in request_iterator:
            match message.WhichOneof("kind"):
                case "hello":
                    self.hellos.append(message.hello)
                    welcome = serving_pb2.DispatchWelcome(version=1, cluster_id="c-1", epoch=1, term=1)
                    yield serving_pb2.DispatchMessage(welcome=welcome)
                    route = serving_pb2.Route(
                        runner_id=RUNNER, app=APP, node_id=NODE, endpoints=self.endpoints, state=IDLE,
                        max_multiplexing=1, any_path=self.any_path,
                    )  # fmt: skip
                    yield serving_pb2.DispatchMessage(routes=serving_pb2.Routes(complete=True, routes=[route], term=1))
                case "wants":
                    for want in message.wants.wants:
                        yield self._answer(want)
                case "updates":
                    self.served += sum(update.served for update in message.updates.updates)
                case "reached":
                    self.reached += message.reached.nodes

    def _answer(self, want: serving_pb2.Want) -> serving_pb2.DispatchMessage:
        if want.app != APP:
            refusal = serving_pb2.Refusal(
                app=want.app, code="NOT_FOUND", what=f"app {want.app} does not exist", remedy="Apply it."
            )
            return serving_pb2.DispatchMessage(refusals=serving_pb2.Refusals(refusals=[refusal]))
        lease = serving_pb2.SlotLease(
            lease_id="l-1", runner_id=RUNNER, node_id=NODE, app=APP, slots=1, term=1, ttl_s=30
        )
        return serving_pb2.DispatchMessage(leases=serving_pb2.Leases(leases=[lease]))


@dataclass
class Whole:
    url: str
    http: aiohttp.ClientSession
    scheduler: FakeServing
    proxy: ProxyServer
    worker: FakeWorker
    ports: Ports

    def run(self, app: str = "digits", **headers: str) -> Any:
        return self.http.post(f"{self.url}/v1/run/default/{app}", json={"prompt": "seven"}, headers=headers)


@contextlib.asynccontextmanager
async def whole(
    folder: Path, cluster: Identities, *, tunnel: bool = False, any_path: bool = False
) -> AsyncIterator[Whole]:
    """Everything but the scheduler is real."""
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(working(folder))
        proxy = await stack.enter_async_context(serving(folder / "p", identity=cluster.node_file))
        proxy.put_runner(entry(worker))
        direct = address_of(proxy)
        endpoint = agent_pb2.Endpoint(host=direct.host, port=1 if tunnel else direct.port)
        scheduler = FakeServing([endpoint], any_path=any_path)
        server = grpc.aio.server()
        serving_pb2_grpc.add_ServingServicer_to_server(scheduler, server)  # type: ignore[no-untyped-call]
        issued = cluster.ca.new_identity(role=Role.SCHEDULER, name="s1", now_s=SystemClock().wall_s())
        port = bind(server, "127.0.0.1:0", server_credentials(issued))
        await server.start()
        stack.push_async_callback(server.stop, None)
        cluster.gateway.save(folder / "gateway.pem")
        options = GatewayOptions(
            schedulers=(f"127.0.0.1:{port}",), identity=folder / "gateway.pem", port=0, metrics_port=0,
            tunnel_host="127.0.0.1", tunnel_port=0, wait_s=10, body_bytes_max=1 << 20,
        )  # fmt: skip
        ports = await stack.enter_async_context(gateway(options, clock=SystemClock(), rng=Random(4)))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield Whole(f"http://127.0.0.1:{ports.http}", http, scheduler, proxy, worker, ports)


def test_a_request_goes_all_the_way_and_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with whole(tmp_path, identities(tmp_path)) as all_of_it:
            for _ in range(3):
                async with all_of_it.run() as answer:
                    assert answer.status == 200
                    assert await answer.json(content_type=None) == {"path": "/infer", "bytes": 19}
            assert all_of_it.worker.seen[0].body == b'{"prompt": "seven"}'
            assert all_of_it.scheduler.hellos[0].gateway_id == "gw-1"
            await until(lambda: [reach.path for reach in all_of_it.scheduler.reached] == ["direct"])
            await until(lambda: all_of_it.scheduler.served == 3)
            async with all_of_it.http.get(f"{all_of_it.url}/healthz") as health:
                assert (health.status, (await health.json())["connected"]) == (200, True)
            async with all_of_it.http.get(f"http://127.0.0.1:{all_of_it.ports.metrics}/metrics") as metrics:
                assert 'fal_gateway_requests_total{outcome="served"} 3.0' in await metrics.text()

    asyncio.run(scenario())


def test_a_server_of_any_kind_gets_its_own_method_path_and_query(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with whole(tmp_path, identities(tmp_path), any_path=True) as all_of_it:
            base = f"{all_of_it.url}/v1/run/default/digits"
            for method, path in (("GET", "/"), ("GET", "/a%20b/c?x=1&y=%2F"), ("DELETE", "/v1/models/7")):
                async with all_of_it.http.request(method, URL(base + path, encoded=True)) as answer:
                    assert answer.status == 200
                    assert (await answer.json(content_type=None))["path"] == path
            assert [seen.head.method for seen in all_of_it.worker.seen] == [b"GET", b"GET", b"DELETE"]

    asyncio.run(scenario())


def test_our_worker_is_asked_by_its_request_endpoint_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with whole(tmp_path, identities(tmp_path)) as all_of_it:
            base = f"{all_of_it.url}/v1/run/default/digits"
            for method, path in (
                ("POST", "/cancel/r-1"), ("GET", "/metrics"), ("GET", "/infer"), ("POST", "/infer/"),
                ("POST", "//infer"), ("POST", "/infer/../cancel/r-1"), ("POST", "/%69nfer"), ("GET", "/"),
            ):  # fmt: skip
                async with all_of_it.http.request(method, URL(base + path, encoded=True)) as answer:
                    assert (answer.status, (await answer.json())["error"]["code"]) == (404, "NOT_FOUND"), path
            assert not all_of_it.worker.seen
            for path in ("", "/infer"):
                async with all_of_it.http.post(base + path) as answer:
                    assert (answer.status, (await answer.json(content_type=None))["path"]) == (200, "/infer")

    asyncio.run(scenario())


@pytest.mark.parametrize("any_path", [False, True])
def test_a_request_line_that_names_the_host_is_no_other_path(tmp_path: Path, any_path: bool) -> None:
    async def scenario() -> None:
        async with whole(tmp_path, identities(tmp_path), any_path=any_path) as all_of_it:
            for path in ("/metrics?a=/infer", "/infer"):
                reader, writer = await asyncio.open_connection("127.0.0.1", all_of_it.ports.http)
                line = f"POST http://h/v1/run/default/digits{path} HTTP/1.1"
                writer.write(f"{line}\r\nhost: h\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
                head = await asyncio.wait_for(reader.readline(), 20)
                assert head.startswith(b"HTTP/1.1 200" if any_path or path == "/infer" else b"HTTP/1.1 404")
                writer.close()
                await writer.wait_closed()
            paths = [seen.head.target.decode() for seen in all_of_it.worker.seen]
            assert paths == (["/metrics?a=/infer", "/infer"] if any_path else ["/infer"])

    asyncio.run(scenario())


def test_errors_reach_the_client_as_json(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with whole(tmp_path, identities(tmp_path)) as all_of_it:
            async with all_of_it.run("unknown") as answer:
                assert answer.status == 404
                assert (await answer.json())["error"]["what"] == "app default/unknown does not exist"
            async with all_of_it.run("No_Name") as answer:
                assert (answer.status, (await answer.json())["error"]["field"]) == (400, "name")
            async with all_of_it.run(**{"x-fal-wait-s": "never"}) as answer:
                assert answer.status == 400
            async with all_of_it.http.post(
                f"{all_of_it.url}/v1/run/default/digits", data=io.BytesIO(bytes(2 << 20))
            ) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (400, "INVALID")
            all_of_it.proxy.drain_runner(RUNNER)
            async with all_of_it.run(**{"x-fal-wait-s": "0.2"}) as answer:
                assert answer.status in (503, 504)

    asyncio.run(scenario())


def test_a_client_that_leaves_cancels_at_the_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with whole(tmp_path, identities(tmp_path)) as all_of_it:
            all_of_it.worker.gate.clear()
            request = asyncio.create_task(all_of_it.run().__aenter__())
            await until(lambda: all_of_it.worker.running == 1)
            request.cancel()
            await until(lambda: all_of_it.worker.broken == 1)
            all_of_it.worker.gate.set()
            async with all_of_it.run() as answer:
                assert answer.status == 200

    asyncio.run(scenario())


def test_a_node_that_cannot_be_dialled_serves_over_tunnels(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with whole(tmp_path, identities(tmp_path), tunnel=True) as all_of_it:
            await until(lambda: any(reach.wants_tunnel for reach in all_of_it.scheduler.reached))
            told = all_of_it.scheduler.hellos[0].tunnel_endpoints
            all_of_it.proxy.set_gateways([GatewayEntry("gw-1", tuple((one.host, one.port) for one in told))])
            for _ in range(3):
                async with all_of_it.run() as answer:
                    assert answer.status == 200
            await until(lambda: all_of_it.scheduler.reached[-1].path == "tunnel")

    asyncio.run(scenario())


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:0", "host:70000", "host:x"])
def test_addresses_are_checked(text: str) -> None:
    with pytest.raises(FalError, match="is not host:port"):
        parse_address(text, field="tunnel_addresses")
    assert str(parse_address("[::1]:80", field="f")) == "[::1]:80"
