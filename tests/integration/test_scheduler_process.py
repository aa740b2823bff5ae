"""`fal-scheduler` as a process on SQLite, over real mutual TLS, with certificates of every role."""

from __future__ import annotations

import asyncio
import signal
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from random import Random

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, Role, new_cluster_id, new_csr, new_key
from fal_contract.rpc import channel, fal_errors
from fal_contract.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    serving_pb2,
    serving_pb2_grpc,
    state_pb2,
)
from fal_scheduler.ca import CertificateAuthority
from scheduler_process import (
    PORTS,
    Process,
    RemoteAgent,
    cluster,
    command,
    identity,
    init,
    joined,
    node_ready,
    ready,
    scheduler,
)
from scheduler_rig import app_request

SERVICES = ("fal.v1.Cluster", "fal.v1.AgentService", "fal.v1.Serving", "fal.v1.CacheService")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder after init, with an identity for each role beside it."""
    folder = tmp_path / "s"
    init(folder)
    ca = CertificateAuthority.open(folder / "identity")
    for role in (Role.VIEWER, Role.OPERATOR, Role.SERVING, Role.NODE):
        ca.new_identity(role=role, name=f"the-{role}", now_s=SystemClock().wall_s()).save(tmp_path / str(role))
    return folder


async def code_of(call: Callable[[], object]) -> Code | None:
    try:
        with fal_errors():
            await call()  # type: ignore[misc]
    except FalError as error:
        return error.code
    return None


def test_each_role_may_do_its_own_and_no_more(data: Path) -> None:
    async def codes(process: Process, role: str) -> list[Code | None]:
        async with channel(process.address, identity(data, role)) as opened:
            stub = cluster_pb2_grpc.ClusterStub(opened)
            pool = cluster_pb2.ApplyPoolRequest(pool=state_pb2.Pool(name="p", cloud="metal"))
            return [
                await code_of(lambda: stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10)),
                await code_of(lambda: stub.ApplyPool(pool, timeout=10)),
                await code_of(lambda: stub.ListTokens(cluster_pb2.ListTokensRequest(), timeout=10)),
                await code_of(
                    lambda: agent_pb2_grpc.AgentServiceStub(opened).RenewCertificate(
                        agent_pb2.RenewCertificateRequest(csr_pem=b"x"), timeout=10
                    )
                ),
            ]

    denied = Code.PERMISSION_DENIED
    with scheduler(data) as process:
        assert asyncio.run(codes(process, "viewer")) == [None, denied, denied, denied]
        assert asyncio.run(codes(process, "operator")) == [None, None, denied, denied]
        assert asyncio.run(codes(process, "admin")) == [None, None, None, denied]
        assert asyncio.run(codes(process, "serving")) == [denied, denied, denied, denied]
        assert asyncio.run(codes(process, "node")) == [denied, denied, denied, Code.INVALID]  # its CSR is none
        assert process.end() == 0


def test_a_foreign_certificate_is_refused(data: Path, tmp_path: Path) -> None:
    async def dial(process: Process, foreign: Identity) -> Code | None:
        trusting = Identity(cert_pem=foreign.cert_pem, key_pem=foreign.key_pem, ca_pem=foreign.ca_pem)
        async with channel(process.address, trusting) as opened:
            stub = cluster_pb2_grpc.ClusterStub(opened)
            return await code_of(lambda: stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10))

    now_s = SystemClock().wall_s()
    other = CertificateAuthority.create(tmp_path / "other", cluster_id=new_cluster_id(Random(1)), now_s=now_s)
    foreign = other.new_identity(role=Role.ADMIN, name="eve", now_s=now_s)
    ours = identity(data, "admin")
    half = Identity(cert_pem=foreign.cert_pem, key_pem=foreign.key_pem, ca_pem=ours.ca_pem)
    with scheduler(data) as process:
        assert asyncio.run(dial(process, foreign)) in (Code.UNAUTHENTICATED, Code.UNAVAILABLE)
        assert asyncio.run(dial(process, half)) in (Code.UNAUTHENTICATED, Code.UNAVAILABLE)


def test_health_reflection_metrics(data: Path) -> None:
    async def ask(process: Process) -> tuple[list[int], set[str]]:
        async with channel(process.address, identity(data, "viewer")) as opened:
            checks = health_pb2_grpc.HealthStub(opened)
            answers = [
                (await checks.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)).status
                for name in ("", *SERVICES)
            ]
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            stream = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(iter([request]), timeout=10)
            async for response in stream:
                return answers, {x.name for x in response.list_services_response.service}
        raise AssertionError("reflection did not answer")

    async def fetch(port: int, path: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        text = (await asyncio.wait_for(reader.read(), 10)).decode()
        writer.close()
        await writer.wait_closed()
        return text

    with scheduler(data) as process:
        statuses, listed = asyncio.run(ask(process))
        assert statuses == [health_pb2.HealthCheckResponse.SERVING] * (len(SERVICES) + 1)
        assert {*SERVICES, "grpc.health.v1.Health"} <= listed
        assert '"ok": true' in asyncio.run(fetch(process.ports["metrics"], "/healthz"))
        deadline = time.monotonic() + 20
        while "fal_scheduler_leads 1.0" not in asyncio.run(fetch(process.ports["metrics"], "/metrics")):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_join_deploy_dispatch_kill_and_return(data: Path) -> None:
    async def before(process: Process) -> tuple[Identity, dict[str, agent_pb2.RunnerStatus]]:
        own = await joined(process, "alpha")
        async with RemoteAgent(process, own) as agent, cluster(process, "operator") as stub:
            reply = await stub.ApplyApp(app_request(runners=2, max_concurrency=2), timeout=10)
            assert reply.outcome == "created"
            await ready(stub, "t/a", 2)
            async with channel(process.address, identity(data, "serving")) as opened:
                await use_slots(opened)
            return own, dict(agent.statuses)

    async def after(process: Process, own: Identity, statuses: dict[str, agent_pb2.RunnerStatus]) -> None:
        agent = RemoteAgent(process, own)
        agent.statuses = statuses
        async with agent, cluster(process, "viewer") as stub:
            await ready(stub, "t/a", 2)
            assert set(agent.held) == set(statuses)
            status = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10)
            assert status.term == 2
            assert dict(status.runners) == {"IDLE": 2}

    with scheduler(data) as process:
        own, statuses = asyncio.run(before(process))
        ports = process.ports
        process.end(signal.SIGKILL)
    with scheduler(data) as process:
        assert {k: process.ports[k] for k in ("rpc", "join")} == {k: ports[k] for k in ("rpc", "join")}
        asyncio.run(after(process, own, statuses))
        assert process.end() == 0


async def use_slots(opened: grpc.aio.Channel) -> None:
    """A gateway gets the routes, wants slots, gives them back."""
    up: asyncio.Queue[serving_pb2.GatewayMessage | None] = asyncio.Queue()

    async def outgoing() -> AsyncIterator[serving_pb2.GatewayMessage]:
        while (message := await up.get()) is not None:
            yield message

    hello = serving_pb2.GatewayHello(versions=agent_pb2.Versions(min=1, max=1), gateway_id="the-serving")
    up.put_nowait(serving_pb2.GatewayMessage(hello=hello))
    wants = serving_pb2.Wants(wants=[serving_pb2.Want(app="t/a", slots=5), serving_pb2.Want(app="t/none", slots=1)])
    up.put_nowait(serving_pb2.GatewayMessage(wants=wants))
    stream = serving_pb2_grpc.ServingStub(opened).Dispatch(outgoing(), timeout=20)
    seen: dict[str, serving_pb2.DispatchMessage] = {}
    async for message in stream:
        seen[str(message.WhichOneof("kind"))] = message
        if {"routes", "leases", "refusals"} <= seen.keys():
            break
    assert len(seen["routes"].routes.routes) == 2
    assert sum(lease.slots for lease in seen["leases"].leases.leases) == 2
    assert [x.code for x in seen["refusals"].refusals.refusals] == [Code.NOT_FOUND]
    up.put_nowait(None)


def test_revocation_cuts_an_open_stream_within_five_seconds(data: Path) -> None:
    async def test(process: Process) -> None:
        own = await joined(process, "alpha")
        async with RemoteAgent(process, own) as agent, cluster(process) as stub:
            await node_ready(stub)
            start_s = time.monotonic()
            await stub.RevokeNode(cluster_pb2.RevokeNodeRequest(node="alpha", reason="stolen"))
            assert agent.task is not None
            with pytest.raises(FalError) as caught:
                await asyncio.wait_for(agent.task, 10)
            assert caught.value.code is Code.UNAUTHENTICATED
            assert time.monotonic() - start_s < 5
            agent.dial()
            with pytest.raises(FalError) as caught:
                await asyncio.wait_for(agent.task, 10)
            assert caught.value.code is Code.UNAUTHENTICATED
            kinds = [event.kind async for event in stub.Events(cluster_pb2.EventsRequest())]
            assert "NODE_REVOKED" in kinds
            assert "CALL_REFUSED" in kinds

    with scheduler(data) as process:
        asyncio.run(test(process))


def test_a_node_renews_its_own_certificate(data: Path) -> None:
    async def test(process: Process) -> None:
        own = await joined(process, "alpha")
        key = new_key()
        async with channel(process.address, own) as opened:
            request = agent_pb2.RenewCertificateRequest(csr_pem=new_csr(key, "somebody else"))
            reply = await agent_pb2_grpc.AgentServiceStub(opened).RenewCertificate(request, timeout=10)
        renewed = Identity(cert_pem=reply.certificate_pem, key_pem=key, ca_pem=own.ca_pem)
        assert renewed.peer.subject == own.peer.subject
        assert renewed.peer.serial != own.peer.serial
        async with RemoteAgent(process, renewed), cluster(process) as stub:
            await node_ready(stub)

    with scheduler(data) as process:
        asyncio.run(test(process))


def test_a_port_in_use_is_a_clear_error(data: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("--rpc-port", "--join-port", "--metrics-port"):
            ran = command("run", "--data-dir", str(data), *PORTS, flag, str(port))
            assert ran.returncode == 1
            assert str(port) in ran.stderr.splitlines()[-1]
            assert ran.stderr.splitlines()[-1].startswith("error: ")


def test_a_second_scheduler_on_the_same_store_names_the_first(data: Path) -> None:
    with scheduler(data) as process:
        ran = command("run", "--data-dir", str(data), *PORTS)
        assert ran.returncode == 1
        assert str(process.popen.pid) in ran.stderr
        assert process.popen.poll() is None


@pytest.mark.parametrize("kind", ["garbage", "newer"])
def test_a_store_that_cannot_be_read_is_left_untouched(data: Path, kind: str) -> None:
    with scheduler(data) as process:
        process.end()
    store = data / "store.db"
    if kind == "garbage":
        store.write_bytes(b"not a database" * 1000)
    else:
        with sqlite3.connect(store) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    before = {path.name: sha256(path.read_bytes()).hexdigest() for path in data.glob("store.db*")}
    ran = command("run", "--data-dir", str(data), *PORTS)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("error: ")
    assert "store.db" in ran.stderr
    after = {path.name: sha256(path.read_bytes()).hexdigest() for path in data.glob("store.db*")}
    assert {k: v for k, v in after.items() if not k.endswith(".lock")} == {
        k: v for k, v in before.items() if not k.endswith(".lock")
    }


def test_start_without_init_and_strange_options(tmp_path: Path) -> None:
    ran = command("run", "--data-dir", str(tmp_path / "none"))
    assert ran.returncode == 1
    assert "fal-scheduler init" in ran.stderr
    ran = command("run", "--data-dir", str(tmp_path), "--store", "etcd")
    assert ran.returncode == 1
    assert "etcd.endpoints" in ran.stderr
    config = tmp_path / "c.toml"
    config.write_text('data_dir = "/x"\nstor = "sqlite"\n')
    ran = command("run", "--config", str(config))
    assert ran.returncode == 1
    assert "stor" in ran.stderr
    assert "store" in ran.stderr
    assert command("run", "--no-such-flag").returncode == 2


def test_init_never_touches_a_cluster_and_issue_makes_identities(data: Path, tmp_path: Path) -> None:
    before = sha256((data / "identity" / "ca.pem").read_bytes()).digest()
    again = command("init", "--data-dir", str(data))
    assert again.returncode == 1
    assert sha256((data / "identity" / "ca.pem").read_bytes()).digest() == before
    out = tmp_path / "gateway.pem"
    args = ("issue", "--data-dir", str(data), "--role", "serving", "--name", "gw-1", "--out", str(out))
    assert command(*args).returncode == 0
    assert Identity.load(out).peer.subject == "serving/gw-1"
    assert command(*args).returncode == 1  # it exists
    wrong = command("issue", "--data-dir", str(data), "--role", "node", "--name", "n", "--out", str(tmp_path / "n"))
    assert wrong.returncode == 1
    assert "token" in wrong.stderr
