"""Roles, errors, revocation and certificates over real mutual TLS on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fal_contract.clock import ManualClock, SystemClock
from fal_contract.errors import GRPC_STATUS, Code, FalError
from fal_contract.identity import Identity, Role, new_cluster_id
from fal_contract.rpc import (
    CHANNEL_OPTIONS,
    SERVER_OPTIONS,
    add_standard_services,
    bind,
    channel,
    fal_errors,
    renewing_server_credentials,
    server_credentials,
    status_of,
)
from fal_contract.rpc_guard import STANDARD_METHODS, Guard, Refusal, current_peer, unguarded
from fal_contract.v1 import cluster_pb2
from fal_scheduler.ca import CertificateAuthority

NOW_S = SystemClock().wall_s()  # TLS itself reads the machine's clock, so certificates must be valid by it
SERVICE = "fal.test.Sample"
ROLES = {
    f"/{SERVICE}/Who": {Role.NODE, Role.OPERATOR},
    f"/{SERVICE}/Raise": {Role.NODE},
    f"/{SERVICE}/Boom": {Role.NODE},
    f"/{SERVICE}/Count": {Role.NODE},
    f"/{SERVICE}/Talk": {Role.NODE},
}


class Sample:
    """The methods under test; messages are bytes."""

    def __init__(self) -> None:
        self.error = FalError(Code.INTERNAL, "unset", remedy="")
        self.ended: list[str] = []

    async def who(self, request: bytes, context: Any) -> bytes:
        return str(current_peer()).encode()

    async def refuse(self, request: bytes, context: Any) -> bytes:
        raise self.error

    async def boom(self, request: bytes, context: Any) -> bytes:
        raise RuntimeError("hunter2 in a traceback")

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Answers once, then stays open."""
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            self.ended.append("count")

    async def talk(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Echoes, writing through the context."""
        try:
            async for request in requests:
                if request == b"raise":
                    raise self.error
                await context.write(request)
        finally:
            self.ended.append("talk")

    def handlers(self) -> Any:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Who": grpc.unary_unary_rpc_method_handler(self.who),
                "Raise": grpc.unary_unary_rpc_method_handler(self.refuse),
                "Boom": grpc.unary_unary_rpc_method_handler(self.boom),
                "Forgotten": grpc.unary_unary_rpc_method_handler(self.who),
                "Count": grpc.unary_stream_rpc_method_handler(self.count),
                "Talk": grpc.stream_stream_rpc_method_handler(self.talk),
            },
        )


@dataclass
class World:
    ca: CertificateAuthority
    address: str
    guard: Guard
    clock: ManualClock
    sample: Sample
    revoked: set[str] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)

    def identity(self, role: Role = Role.NODE, name: str = "n-1") -> Identity:
        return self.ca.new_identity(role=role, name=name, now_s=NOW_S)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return _ca(tmp_path_factory.mktemp("identity") / "ca", 1)


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return _ca(tmp_path_factory.mktemp("identity") / "ca", 2)


def _ca(folder: Path, seed: int) -> CertificateAuthority:
    return CertificateAuthority.create(folder, cluster_id=new_cluster_id(Random(seed)), now_s=NOW_S)


@asynccontextmanager
async def serving(ca: CertificateAuthority) -> AsyncIterator[World]:
    clock, sample, revoked, refusals = ManualClock(wall_s=NOW_S), Sample(), set[str](), list[Refusal]()
    guard = Guard(
        cluster_id=ca.cluster_id,
        roles=ROLES,
        clock=clock,
        is_revoked=lambda peer: peer.serial in revoked,
        on_refused=refusals.append,
    )
    server = grpc.aio.server(interceptors=[guard], options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers([sample.handlers()])
    await add_standard_services(server, [SERVICE])
    own = ca.new_identity(role=Role.SCHEDULER, name="s-1", now_s=NOW_S)
    port = bind(server, "127.0.0.1:0", server_credentials(own))
    await server.start()
    try:
        yield World(ca, f"127.0.0.1:{port}", guard, clock, sample, revoked, refusals)
    finally:
        await server.stop(0)


def run(ca: CertificateAuthority, scenario: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(ca) as world:
            await scenario(world)

    asyncio.run(main())


async def call(world: World, identity: Identity, method: str) -> bytes:
    async with channel(world.address, identity) as opened:
        with fal_errors():
            answer: bytes = await opened.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=10)
        return answer


async def refused(world: World, identity: Identity, method: str) -> FalError:
    with pytest.raises(FalError) as caught:
        await call(world, identity, method)
    return caught.value


def test_a_handler_knows_its_caller(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        assert await call(world, world.identity(), "Who") == f"fal://{ca.cluster_id}/node/n-1".encode()
        operator = world.identity(Role.OPERATOR, "ada@example.com")
        assert await call(world, operator, "Who") == f"fal://{ca.cluster_id}/operator/ada@example.com".encode()
        assert world.refusals == []

    run(ca, scenario)


@pytest.mark.parametrize("role", [role for role in Role if role not in ROLES[f"/{SERVICE}/Who"]])
def test_other_roles_are_refused_with_an_event(ca: CertificateAuthority, role: Role) -> None:
    async def scenario(world: World) -> None:
        error = await refused(world, world.identity(role, "x"), "Who")
        assert error.code is Code.PERMISSION_DENIED
        assert "allowed: node, operator" in error.what
        assert [(r.method, r.code, r.peer) for r in world.refusals] == [
            (f"/{SERVICE}/Who", Code.PERMISSION_DENIED, f"{role}/x")
        ]

    run(ca, scenario)


def test_a_method_without_a_row_is_refused_to_all(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        for role in Role:
            assert (await refused(world, world.identity(role, "x"), "Forgotten")).code is Code.PERMISSION_DENIED

    run(ca, scenario)


def test_unknown_methods_are_a_version_mismatch(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        assert (await refused(world, world.identity(), "Nowhere")).code is Code.VERSION_MISMATCH

    run(ca, scenario)


@pytest.mark.parametrize("code", list(Code))
def test_every_error_arrives_as_it_was_raised(ca: CertificateAuthority, code: Code) -> None:
    async def scenario(world: World) -> None:
        world.sample.error = FalError(code, "größe = 3 is wrong", remedy="Use 4.", field="größe")
        error = await refused(world, world.identity(), "Raise")
        assert (error.code, error.what, error.remedy, error.field) == (code, "größe = 3 is wrong", "Use 4.", "größe")
        assert isinstance(error.__cause__, grpc.aio.AioRpcError)
        assert error.__cause__.code() is status_of(error)
        assert error.__cause__.code().name == GRPC_STATUS[code]

    run(ca, scenario)


def test_huge_errors_still_arrive(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        world.sample.error = FalError(Code.CONFLICT, "w" * 100_000, remedy="r" * 100_000, field="f" * 100_000)
        error = await refused(world, world.identity(), "Raise")
        assert error.code is Code.CONFLICT
        assert error.what.startswith("www")
        assert error.remedy.startswith("rrr")

    run(ca, scenario)


def test_surprises_tell_an_incident_and_nothing_else(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        error = await refused(world, world.identity(), "Boom")
        assert error.code is Code.INTERNAL
        assert "incident" in error.what
        assert "hunter2" not in str(error)
        assert await call(world, world.identity(), "Who")  # the server lives

    run(ca, scenario)


def test_errors_in_the_middle_of_a_stream_arrive(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        world.sample.error = FalError(Code.STALE_TERM, "old", remedy="Stop.")
        async with channel(world.address, world.identity()) as opened:
            stream = opened.stream_stream(f"/{SERVICE}/Talk")()
            await stream.write(b"a")
            assert await stream.read() == b"a"
            await stream.write(b"raise")
            with pytest.raises(FalError) as caught, fal_errors():
                await stream.read()
            assert caught.value.code is Code.STALE_TERM

    run(ca, scenario)


@pytest.mark.parametrize("method", ["Count", "Talk"])
def test_revocation_cuts_open_streams_within_five_seconds(ca: CertificateAuthority, method: str) -> None:
    async def scenario(world: World) -> None:
        identity, bystander = world.identity(), world.identity(name="n-2")
        sweeper = asyncio.create_task(world.guard.run()) if method == "Count" else None
        async with channel(world.address, identity) as opened, channel(world.address, bystander) as other:
            streams = []
            for each in (opened, other):
                if method == "Count":
                    stream: Any = each.unary_stream(f"/{SERVICE}/Count")(b"")
                else:
                    stream = each.stream_stream(f"/{SERVICE}/Talk")()
                    await stream.write(b"first")
                assert await stream.read() == b"first"
                streams.append(stream)
            assert world.guard.statistics() == {"calls": 2, "calls_node": 2}
            world.revoked.add(identity.peer.serial)
            if sweeper is None:
                assert world.guard.cut_revoked() == 1
                assert world.guard.cut_revoked() == 0
            async with asyncio.timeout(5):
                with pytest.raises(FalError) as caught, fal_errors():
                    await streams[0].read()
            assert caught.value.code is Code.UNAUTHENTICATED
            assert "revoked" in caught.value.what
            assert world.sample.ended == [method.lower()]
            assert world.guard.statistics() == {"calls": 1, "calls_node": 1}
            if method == "Talk":
                await streams[1].write(b"alive")
                assert await streams[1].read() == b"alive"
            assert (await refused(world, identity, "Who")).code is Code.UNAUTHENTICATED
            assert [(r.peer, r.code) for r in world.refusals] == [("node/n-1", Code.UNAUTHENTICATED)] * 2
            streams[1].cancel()
        if sweeper is not None:
            sweeper.cancel()

    run(ca, scenario)


def test_a_caller_that_leaves_is_forgotten(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        async with channel(world.address, world.identity()) as opened:
            stream = opened.unary_stream(f"/{SERVICE}/Count")(b"")
            assert await stream.read() == b"first"
            stream.cancel()
            while world.guard.statistics()["calls"]:  # noqa: ASYNC110  (bounded by run)
                await asyncio.sleep(0.01)
            assert world.sample.ended == ["count"]

    run(ca, scenario)


def test_certificates_of_another_cluster_do_not_get_in(
    ca: CertificateAuthority, other_ca: CertificateAuthority
) -> None:
    async def scenario(world: World) -> None:
        foreign = other_ca.new_identity(role=Role.NODE, name="n-1", now_s=NOW_S)
        error = await refused(world, foreign, "Who")
        assert (error.code, error.what) == (Code.UNAUTHENTICATED, "the server's certificate is not of our cluster")
        # Made to trust this server and to look for its name, it is still not trusted itself.
        naive = grpc.ssl_channel_credentials(ca.ca_pem, foreign.key_pem, foreign.cert_pem)
        override = ("grpc.ssl_target_name_override", f"scheduler.{ca.cluster_id}.fal.internal")
        async with grpc.aio.secure_channel(world.address, naive, options=[override]) as opened:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await opened.unary_unary(f"/{SERVICE}/Who")(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert world.guard.statistics()["calls"] == 0

    run(ca, scenario)


def test_no_certificate_does_not_get_in(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        naked = grpc.ssl_channel_credentials(root_certificates=ca.ca_pem)
        override = ("grpc.ssl_target_name_override", f"scheduler.{ca.cluster_id}.fal.internal")
        async with grpc.aio.secure_channel(world.address, naked, options=[override]) as opened:
            with pytest.raises(grpc.aio.AioRpcError):
                await opened.unary_unary(f"/{SERVICE}/Who")(b"", timeout=10)

    run(ca, scenario)


def test_a_node_cannot_pose_as_the_scheduler(ca: CertificateAuthority) -> None:
    async def scenario() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([Sample().handlers()])
        rogue = ca.new_identity(role=Role.NODE, name="n-evil", now_s=NOW_S)
        port = bind(server, "127.0.0.1:0", server_credentials(rogue))
        await server.start()
        try:
            honest = ca.new_identity(role=Role.NODE, name="n-1", now_s=NOW_S)
            async with channel(f"127.0.0.1:{port}", honest) as opened:
                with pytest.raises(FalError) as caught, fal_errors():
                    await opened.unary_unary(f"/{SERVICE}/Who")(b"", timeout=10)
            assert caught.value.code is Code.UNAUTHENTICATED
            assert "not that of our cluster's control plane" in caught.value.what
        finally:
            await server.stop(0)

    asyncio.run(scenario())


@pytest.mark.parametrize(("skew_s", "admitted"), [(-1e6, True), (24 * 3600 + 299, True), (24 * 3600 + 301, False)])
def test_a_certificate_that_expires_on_an_open_connection(
    ca: CertificateAuthority, skew_s: float, admitted: bool
) -> None:
    async def scenario(world: World) -> None:
        async with channel(world.address, world.identity()) as opened:
            ask = opened.unary_unary(f"/{SERVICE}/Who")
            await ask(b"", timeout=10)
            world.clock.skew(skew_s)
            if admitted:
                await ask(b"", timeout=10)
                return
            with pytest.raises(FalError, match="expired") as caught, fal_errors():
                await ask(b"", timeout=10)
            assert caught.value.code is Code.UNAUTHENTICATED
            assert [r.code for r in world.refusals] == [Code.UNAUTHENTICATED]

    run(ca, scenario)


def test_expired_certificates_do_not_get_in(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        expired = ca.new_identity(role=Role.NODE, name="n-1", now_s=NOW_S - 7200, ttl_s=3600)
        assert (await refused(world, expired, "Who")).code in (Code.UNAUTHENTICATED, Code.UNAVAILABLE)
        with pytest.raises(FalError, match="our certificate"):
            expired.check(now_s=NOW_S)

    run(ca, scenario)


def test_health_and_reflection_are_offered(ca: CertificateAuthority) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def scenario(world: World) -> None:
        async with channel(world.address, world.identity(Role.VIEWER, "v")) as opened:
            health = health_pb2_grpc.HealthStub(opened)
            for service in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            info = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo()
            await info.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = await info.read()
            names = {service.name for service in listed.list_services_response.service}
            assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
            info.cancel()

    run(ca, scenario)


def test_a_renewed_server_certificate_is_used_without_restart(ca: CertificateAuthority) -> None:
    async def scenario() -> None:
        current = ca.new_identity(role=Role.SCHEDULER, name="s-1", now_s=NOW_S - 7200, ttl_s=3600)  # expired

        server = grpc.aio.server()
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {})])
        port = bind(server, "127.0.0.1:0", renewing_server_credentials(lambda: current))
        await server.start()

        async def status() -> grpc.StatusCode:
            client = ca.new_identity(role=Role.NODE, name="n-1", now_s=NOW_S)
            async with channel(f"127.0.0.1:{port}", client) as opened:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await opened.unary_unary(f"/{SERVICE}/Who")(b"", timeout=10)
                return caught.value.code()

        try:
            assert await status() is grpc.StatusCode.UNAVAILABLE
            current = ca.new_identity(role=Role.SCHEDULER, name="s-1", now_s=NOW_S)
            assert await status() is grpc.StatusCode.UNIMPLEMENTED  # the handshake succeeded
        finally:
            await server.stop(0)

    asyncio.run(scenario())


def test_a_port_in_use_is_an_error(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        second = grpc.aio.server(options=SERVER_OPTIONS)
        own = world.identity(Role.SCHEDULER, "s-2")
        with pytest.raises(FalError, match=f"cannot listen on {world.address}") as caught:
            bind(second, world.address, server_credentials(own))
        assert caught.value.code is Code.UNAVAILABLE

    run(ca, scenario)


def test_nobody_there_is_unavailable_with_a_remedy(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        world.address = "127.0.0.1:1"
        error = await refused(world, world.identity(), "Who")
        assert error.code is Code.UNAVAILABLE
        assert error.retryable
        assert "address" in error.remedy

    run(ca, scenario)


def test_unguarded_methods_are_named() -> None:
    service = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"]
    assert "/fal.v1.Cluster/GetStatus" in unguarded([service], {})
    rows = {f"/fal.v1.Cluster/{method.name}": {Role.ADMIN} for method in service.methods}
    assert unguarded([service], rows) == frozenset()
    assert all(method.startswith("/grpc.") for method in STANDARD_METHODS)


def test_idle_sessions_are_pinged_below_any_nat_limit_and_never_told_too_many_pings() -> None:
    client, server = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    assert client["grpc.keepalive_time_ms"] == 30_000
    assert client["grpc.keepalive_timeout_ms"] == 10_000
    assert client["grpc.keepalive_permit_without_calls"] == 1
    assert client["grpc.http2.max_pings_without_data"] == 0
    assert server["grpc.http2.max_ping_strikes"] == 0
    assert server["grpc.so_reuseport"] == 0
