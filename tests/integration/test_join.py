"""Joining over real HTTPS, renewing, and every way in which both are refused."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import aiohttp
import pytest
from aiohttp import web

from fal_agent.join import Joined, Renewer, join, renewal_due_s
from fal_contract.clock import Clock, ManualClock, SystemClock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, Role, new_cluster_id, new_csr, new_key, peer_of_pem
from fal_contract.join_token import TokenText, new_token
from fal_contract.join_wire import BODY_BYTES_MAX, JOIN_PATH
from fal_contract.tls import anonymous_server_context, client_context, server_context, verify_peer
from fal_scheduler.ca import CertificateAuthority, OwnIdentity
from fal_scheduler.core import tokens
from fal_scheduler.join import AttemptLimit, JoinRefusal, JoinServer, NodeGrant

NOW_S = float(int(SystemClock().wall_s()))  # TLS itself reads the machine's clock, so certificates must be valid by it


class Engine:
    """A Joiner that keeps records as the engine does: the new record is stored before the grant is given."""

    def __init__(self) -> None:
        self.stored: dict[str, tokens.JoinToken] = {}
        self.nodes: list[str] = []
        self.hang: asyncio.Event | None = None

    async def redeem(self, token_id: str, secret: str, node_name: str, now_s: float) -> NodeGrant:
        if self.hang is not None:
            await self.hang.wait()
        spent = tokens.redeem(self.stored.get(token_id), secret, now_s=now_s)
        self.stored[token_id] = spent
        self.nodes.append(node_name)
        return NodeGrant(node_id=f"n-{len(self.nodes)}", pool=spent.pool)


@dataclass
class World:
    ca: CertificateAuthority
    clock: ManualClock
    engine: Engine
    address: str
    server: JoinServer
    refusals: list[JoinRefusal]

    def token(self, *, uses: int = 1, ttl_s: float = 3600.0) -> TokenText:
        made = new_token(Random(len(self.engine.stored)), self.ca.fingerprint)
        self.engine.stored[made.id] = tokens.create(
            made.id, made.secret, pool="a", ttl_s=ttl_s, uses=uses, created_by="ada", now_s=self.clock.wall_s()
        )
        return made

    async def join(self, token: TokenText | str, *, clock: Clock | None = None, timeout_s: float = 10.0) -> Joined:
        return await join(
            self.address, str(token), node_name="box", boot_id="b", clock=clock or self.clock, timeout_s=timeout_s
        )

    async def refused(self, token: TokenText | str) -> FalError:
        with pytest.raises(FalError) as caught:
            await self.join(token)
        return caught.value


def _ca(folder: Path, seed: int) -> CertificateAuthority:
    return CertificateAuthority.create(folder, cluster_id=new_cluster_id(Random(seed)), now_s=NOW_S)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return _ca(tmp_path_factory.mktemp("join") / "ca", 1)


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return _ca(tmp_path_factory.mktemp("join") / "ca", 2)


@asynccontextmanager
async def listening(
    ca: CertificateAuthority,
    *,
    identity: Callable[[], Identity] | None = None,
    connections_max: int = 256,
    connection_life_s: float = 30.0,
) -> AsyncIterator[World]:
    clock, engine, refusals = ManualClock(wall_s=NOW_S), Engine(), list[JoinRefusal]()
    own = identity or OwnIdentity(ca, name="s-1", hosts=["127.0.0.1"], clock=clock).current
    server = JoinServer(
        ca=ca,
        identity=own,
        joiner=engine,
        clock=clock,
        on_refused=refusals.append,
        connections_max=connections_max,
        connection_life_s=connection_life_s,
    )
    port = await server.start("127.0.0.1", 0)
    try:
        yield World(ca, clock, engine, f"127.0.0.1:{port}", server, refusals)
    finally:
        await server.close()
        await server.close()


def run(ca: CertificateAuthority, scenario: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), listening(ca) as world:
            await scenario(world)

    asyncio.run(main())


def test_a_token_makes_a_node(ca: CertificateAuthority, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        joined = await world.join(world.token())
        assert (joined.node_id, joined.pool, joined.cluster_id) == ("n-1", "a", ca.cluster_id)
        assert joined.identity.peer.subject == "node/n-1"
        assert joined.identity.ca_pem == ca.ca_pem
        assert world.engine.nodes == ["box"]
        joined.identity.save(tmp_path / "identity.pem")
        assert Identity.load(tmp_path / "identity.pem").peer == joined.identity.peer
        assert world.refusals == []

    run(ca, scenario)


def test_a_token_for_two_machines_serves_two(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        token = world.token(uses=2)
        ids = {(await world.join(token)).node_id for _ in range(2)}
        assert ids == {"n-1", "n-2"}
        error = await world.refused(token)
        assert error.code is Code.UNAUTHENTICATED
        assert "used up" in error.what
        assert world.engine.nodes == ["box", "box"]

    run(ca, scenario)


def test_expired_revoked_unknown_and_wrong_tokens_are_refused_with_an_event(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        expired = world.token(ttl_s=60)
        world.clock.advance(61)
        assert "expired" in (await world.refused(expired)).what
        revoked = world.token()
        world.engine.stored[revoked.id] = tokens.revoke(world.engine.stored[revoked.id])
        assert "revoked" in (await world.refused(revoked)).what
        unknown = TokenText("0" * 10, "0" * 26, ca.fingerprint)
        assert "not known" in (await world.refused(unknown)).what
        valid = world.token()
        guessed = TokenText(valid.id, "0" * 26, ca.fingerprint)
        assert "not known" in (await world.refused(guessed)).what
        assert [(r.token_id, r.node_name, r.code) for r in world.refusals] == [
            (token.id, "box", Code.UNAUTHENTICATED) for token in (expired, revoked, unknown, guessed)
        ]
        assert all(refusal.address == "127.0.0.1" for refusal in world.refusals)
        assert world.engine.stored[valid.id].uses_left == 1
        assert world.engine.nodes == []
        assert not any(token.secret in repr(world.refusals) for token in (expired, revoked, unknown, guessed))

    run(ca, scenario)


def test_a_token_of_another_cluster_is_noticed_before_the_secret_is_sent(
    ca: CertificateAuthority, other_ca: CertificateAuthority
) -> None:
    async def scenario(world: World) -> None:
        token = world.token()
        error = await world.refused(TokenText(token.id, token.secret, other_ca.fingerprint))
        assert error.code is Code.UNAUTHENTICATED
        assert "another CA" in error.what
        assert world.engine.stored[token.id].uses_left == 1
        assert world.refusals == []

    run(ca, scenario)


@asynccontextmanager
async def impostor(shown_ca: bytes, identity: Identity) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Hands out `shown_ca`, shows `identity`, and keeps every body that it is sent."""
    bodies: list[bytes] = []

    async def give_ca(request: web.Request) -> web.Response:
        return web.Response(body=shown_ca)

    async def take(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.Response(status=500)

    app = web.Application()
    app.router.add_get("/v1/ca", give_ca)
    app.router.add_post("/v1/join", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=anonymous_server_context(identity)).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}", bodies
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("role", [Role.SCHEDULER, Role.NODE])
def test_somebody_between_gets_no_secret(ca: CertificateAuthority, other_ca: CertificateAuthority, role: Role) -> None:
    """With the right CA copied, neither another cluster's scheduler nor a node of this cluster is believed."""
    issuer = other_ca if role is Role.SCHEDULER else ca
    held = issuer.new_identity(role=role, name="evil", now_s=NOW_S, hosts=["127.0.0.1"])

    async def main() -> None:
        async with impostor(ca.ca_pem, held) as (address, bodies):
            token = new_token(Random(1), ca.fingerprint)
            with pytest.raises(FalError) as caught:
                await join(address, str(token), node_name="box", boot_id="", clock=SystemClock())
            assert caught.value.code is Code.UNAUTHENTICATED
            assert "not the scheduler" in caught.value.what
            assert bodies == []

    asyncio.run(main())


def test_a_proxy_that_ends_tls_is_noticed_by_its_ca(ca: CertificateAuthority, other_ca: CertificateAuthority) -> None:
    held = other_ca.new_identity(role=Role.SCHEDULER, name="evil", now_s=NOW_S)

    async def main() -> None:
        async with impostor(other_ca.ca_pem, held) as (address, bodies):
            token = new_token(Random(1), ca.fingerprint)
            with pytest.raises(FalError, match="another CA"):
                await join(address, str(token), node_name="box", boot_id="", clock=SystemClock())
            assert bodies == []

    asyncio.run(main())


@pytest.mark.parametrize(("skew_s", "says"), [(-3600.0, "3600 s behind"), (2 * 86400.0, "172800 s ahead of")])
def test_a_skewed_node_is_told_by_how_much(ca: CertificateAuthority, skew_s: float, says: str) -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(FalError, match=says) as caught:
            await world.join(world.token(), clock=ManualClock(wall_s=NOW_S + skew_s))
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert "NTP" in caught.value.remedy

    run(ca, scenario)


def test_a_node_up_to_five_minutes_slow_joins(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        joined = await world.join(world.token(), clock=ManualClock(wall_s=NOW_S - 299))
        joined.identity.check(now_s=NOW_S - 299)  # its certificate is valid by its own clock, too
        assert joined.identity.peer.name == joined.node_id

    run(ca, scenario)


def test_an_expired_listener_certificate_blames_the_clocks(ca: CertificateAuthority) -> None:
    expired = ca.new_identity(role=Role.SCHEDULER, name="s-1", now_s=NOW_S - 7200, ttl_s=3600)

    async def main() -> None:
        async with listening(ca, identity=lambda: expired) as world:
            error = await world.refused(world.token())
            assert "clock" in error.what
            assert error.code is Code.UNAUTHENTICATED

    asyncio.run(main())


def test_a_renewed_listener_certificate_is_shown_without_restart(ca: CertificateAuthority) -> None:
    current = ca.new_identity(role=Role.SCHEDULER, name="s-1", now_s=NOW_S - 7200, ttl_s=3600)

    async def main() -> None:
        nonlocal current
        async with listening(ca, identity=lambda: current) as world:
            token = world.token()
            await world.refused(token)
            current = ca.new_identity(role=Role.SCHEDULER, name="s-1", now_s=NOW_S)
            await world.join(token)

    asyncio.run(main())


async def _post(world: World, body: bytes) -> tuple[int, dict[str, dict[str, str]]]:
    context = ssl.create_default_context(cadata=world.ca.ca_pem.decode())  # as curl would, by address
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"https://{world.address}{JOIN_PATH}", data=body, ssl=context) as answer,
    ):
        return answer.status, await answer.json()


def test_bad_requests_name_the_field_and_spend_no_use(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        token = world.token()
        good = {"token_id": token.id, "secret": token.secret, "csr": new_csr(new_key(), "x").decode(), "node_name": "x"}
        for changes, field in (
            ({"csr": "garbage"}, "csr"),
            ({"csr": 5}, "csr"),
            ({"node_name": "x" * 300}, "node_name"),
            ({"secret": ["s"]}, "secret"),
        ):
            status, answer = await _post(world, json.dumps(good | changes).encode())
            assert (status, answer["error"]["code"], answer["error"]["field"]) == (400, "INVALID", field)
            assert token.secret not in json.dumps(answer)
        assert (await _post(world, b"{not json"))[0] == 400
        assert (await _post(world, b"x" * (BODY_BYTES_MAX + 1)))[0] == 400
        assert len(world.refusals) == 6
        assert world.engine.stored[token.id].uses_left == 1
        assert (await _post(world, json.dumps(good | {"later": 1}).encode()))[0] == 200

    run(ca, scenario)


def test_attempts_are_bounded_per_address(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        statuses = [(await _post(world, b"{}"))[0] for _ in range(61)]
        assert statuses == [400] * 60 + [429]
        world.clock.advance(60)
        assert (await _post(world, b"{}"))[0] == 400

    run(ca, scenario)


def test_the_attempt_table_is_bounded() -> None:
    limit = AttemptLimit(attempts_max=1, addresses_max=2)
    for address in ("a", "b", "c"):
        limit.admit(address, now_s=0.0)
    limit.admit("a", now_s=0.0)  # forgotten, not refused
    with pytest.raises(FalError, match="attempts to join from c"):
        limit.admit("c", now_s=59.0)


def test_nobody_and_a_silent_server_are_told_apart(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        token = world.token()
        world.engine.hang = asyncio.Event()
        with pytest.raises(FalError) as caught:
            await world.join(token, timeout_s=0.5)
        assert caught.value.code is Code.TIMEOUT
        world.engine.hang.set()
        await world.server.close()
        error = await world.refused(token)
        assert error.code is Code.UNAVAILABLE

    run(ca, scenario)


@pytest.mark.parametrize("address", ["", "host", "host:0", "host:99999", "host:x", "http://host:1/x", "a/b:1"])
def test_bad_addresses_are_refused(address: str) -> None:
    token = new_token(Random(1), "a" * 64)
    with pytest.raises(FalError) as caught:
        asyncio.run(join(address, str(token), node_name="b", boot_id="", clock=SystemClock()))
    assert caught.value.field == "address"


def test_a_port_in_use_is_an_error(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        second = JoinServer(
            ca=ca,
            identity=lambda: ca.new_identity(role=Role.SCHEDULER, name="s-2", now_s=NOW_S),
            joiner=world.engine,
            clock=world.clock,
        )
        with pytest.raises(FalError, match="cannot listen"):
            await second.start("127.0.0.1", int(world.address.rpartition(":")[2]))

    run(ca, scenario)


async def _connect(world: World) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = world.address.partition(":")
    context = ssl.create_default_context(cadata=world.ca.ca_pem.decode())
    return await asyncio.open_connection(host, int(port), ssl=context)


async def _ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) == b""
    except ConnectionError:
        return True


def test_silent_strangers_use_up_neither_connections_nor_time(ca: CertificateAuthority) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), listening(ca, connections_max=2, connection_life_s=0.5) as world:
            silent = [await _connect(world) for _ in range(2)]
            third, writer = await _connect(world)
            assert await _ended(third)  # at once: the others are still there
            assert not silent[0][0].at_eof()
            assert [await _ended(reader) for reader, _ in silent] == [True, True]
            await world.join(world.token())
            for each in (writer, *(writer for _, writer in silent)):
                each.close()

    asyncio.run(main())


# --- renewal


class Harness:
    """A Renewer whose sleeps move a manual clock; the run ends after `renewals` of them."""

    def __init__(self, ca: CertificateAuthority, file: Path) -> None:
        self.clock = ManualClock(wall_s=NOW_S)
        self.ca = ca
        self.file = file
        self.failing = 0
        self.renewed_at: list[float] = []
        self.slept: list[float] = []
        self.first = ca.new_identity(role=Role.NODE, name="n-1", now_s=NOW_S)
        self.done = asyncio.Event()
        self.renewals = 1

    async def renew(self, csr_pem: bytes) -> bytes:
        if self.failing:
            self.failing -= 1
            raise FalError(Code.UNAVAILABLE, "no scheduler", remedy="Wait.")
        return self.ca.renew(csr_pem, self.first.peer, revoked=False, now_s=self.clock.wall_s())

    def on_renewed(self, identity: Identity) -> None:
        self.renewed_at.append(self.clock.wall_s() - NOW_S)
        if len(self.renewed_at) == self.renewals:
            self.done.set()

    async def sleep(self, seconds_s: float) -> None:
        if self.done.is_set():
            await asyncio.Event().wait()  # the test is over; it cancels us
        self.slept.append(seconds_s)
        self.clock.advance(seconds_s)
        await asyncio.sleep(0)

    def run(self, seed: int = 1) -> None:
        async def main() -> None:
            renewer = Renewer(
                file=self.file,
                identity=self.first,
                renew=self.renew,
                on_renewed=self.on_renewed,
                clock=self.clock,
                rng=Random(seed),
                sleep=self.sleep,
            )
            task = asyncio.create_task(renewer.run())
            async with asyncio.timeout(20):
                await self.done.wait()
            task.cancel()

        asyncio.run(main())


HALF_LIFE_S = 12 * 3600.0


def test_certificates_are_renewed_at_half_life_and_saved(ca: CertificateAuthority, tmp_path: Path) -> None:
    harness = Harness(ca, tmp_path / "identity.pem")
    harness.renewals = 3
    harness.run()
    gaps = [b - a for a, b in zip([0.0, *harness.renewed_at], harness.renewed_at, strict=False)]
    assert len(gaps) == 3
    assert all(0.8 * HALF_LIFE_S <= gap <= 1.2 * HALF_LIFE_S + 60 for gap in gaps)
    saved = Identity.load(harness.file)
    assert saved.peer.subject == "node/n-1"
    assert saved.key_pem != harness.first.key_pem
    assert saved.peer.issued_at_s == pytest.approx(harness.clock.wall_s(), abs=1)


def test_a_fleet_does_not_renew_at_once(ca: CertificateAuthority) -> None:
    peer = ca.new_identity(role=Role.NODE, name="n-1", now_s=NOW_S).peer
    due = [renewal_due_s(peer, Random(seed)) for seed in range(100)]
    assert max(due) - min(due) > 0.15 * 2 * HALF_LIFE_S


def test_failed_renewals_are_tried_again_with_growing_waits_beyond_expiry(
    ca: CertificateAuthority, tmp_path: Path
) -> None:
    harness = Harness(ca, tmp_path / "identity.pem")
    harness.failing = 100
    harness.run()
    retries = harness.slept[-100:]
    assert max(retries) <= 900
    assert retries[0] <= 5
    assert min(retries[-50:]) >= 450
    assert harness.renewed_at[0] > 24 * 3600  # it had expired, and came back


def test_a_clock_set_back_renews_at_once(ca: CertificateAuthority, tmp_path: Path) -> None:
    harness = Harness(ca, tmp_path / "identity.pem")
    harness.clock.skew(-3600)
    harness.run()
    assert harness.slept == []


@pytest.mark.parametrize("wrong", ["name", "role", "cluster", "key"])
def test_a_wrong_certificate_is_not_taken(
    ca: CertificateAuthority, other_ca: CertificateAuthority, tmp_path: Path, wrong: str
) -> None:
    harness = Harness(ca, tmp_path / "identity.pem")
    harness.first.save(harness.file)

    async def renew(csr_pem: bytes) -> bytes:
        issuer = other_ca if wrong == "cluster" else ca
        csr = new_csr(new_key(), "n-1") if wrong == "key" else csr_pem
        role = Role.ADMIN if wrong == "role" else Role.NODE
        return issuer.issue(csr, role=role, name="n-2" if wrong == "name" else "n-1", now_s=NOW_S)

    async def main() -> None:
        renewer = Renewer(
            file=harness.file,
            identity=harness.first,
            renew=renew,
            on_renewed=harness.on_renewed,
            clock=harness.clock,
            rng=Random(1),
        )
        with pytest.raises(FalError):
            await renewer.renew_now()

    asyncio.run(main())
    assert Identity.load(harness.file) == harness.first
    assert harness.renewed_at == []


def test_the_schedulers_own_certificate_renews_itself(ca: CertificateAuthority) -> None:
    clock = ManualClock(wall_s=NOW_S)
    own = OwnIdentity(ca, name="s-1", hosts=["10.0.0.1"], clock=clock)
    first = own.current()
    assert own.current() is first
    clock.advance(13 * 3600)
    second = own.current()
    assert second is not first
    assert second.peer.issued_at_s == clock.wall_s()
    clock.skew(-20 * 3600)  # set back to before its issue
    assert own.current().peer.issued_at_s == clock.wall_s()


# --- mutual TLS on the data path


async def _talk(server_identity: Identity, client_identity: Identity, *, expect: str) -> tuple[str, str]:
    """What each side's verify_peer says: the peer's subject, or an error's code."""
    cluster_id = client_identity.peer.cluster_id
    seen: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def judge(writer: asyncio.StreamWriter, cluster: str, role: Role, name: str | None) -> str:
        try:
            return verify_peer(writer.transport, cluster_id=cluster, roles={role}, name=name, now_s=NOW_S).subject
        except FalError as error:
            return str(error.code)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.set_result(judge(writer, server_identity.peer.cluster_id, Role.SERVING, None))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context(server_identity))
    port = server.sockets[0].getsockname()[1]
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context(client_identity))
        told = judge(writer, cluster_id, Role.NODE, expect)
        await reader.read()
        writer.close()
        return told, await asyncio.wait_for(seen, 60)
    finally:
        server.close()
        await server.wait_closed()


def test_data_path_peers_are_known_by_role_and_name(ca: CertificateAuthority) -> None:
    node = ca.new_identity(role=Role.NODE, name="n-1", now_s=NOW_S)
    gateway = ca.new_identity(role=Role.SERVING, name="g-1", now_s=NOW_S)
    assert asyncio.run(_talk(node, gateway, expect="n-1")) == ("node/n-1", "serving/g-1")
    assert asyncio.run(_talk(node, gateway, expect="n-2")) == ("PERMISSION_DENIED", "serving/g-1")
    other = ca.new_identity(role=Role.NODE, name="n-2", now_s=NOW_S)
    assert asyncio.run(_talk(node, other, expect="n-1")) == ("node/n-1", "PERMISSION_DENIED")


def test_foreign_peers_fail_the_handshake(ca: CertificateAuthority, other_ca: CertificateAuthority) -> None:
    node = ca.new_identity(role=Role.NODE, name="n-1", now_s=NOW_S)
    foreign = other_ca.new_identity(role=Role.SERVING, name="g-1", now_s=NOW_S)
    with pytest.raises(ssl.SSLCertVerificationError):
        asyncio.run(_talk(node, foreign, expect="n-1"))


def test_the_issued_certificate_says_nothing_of_the_request(ca: CertificateAuthority) -> None:
    async def scenario(world: World) -> None:
        token = world.token()
        asked = {
            "token_id": token.id,
            "secret": token.secret,
            "csr": new_csr(new_key(), "admin").decode(),
            "node_name": "n-admin",
        }
        status, answer = await _post(world, json.dumps(asked).encode())
        assert status == 200
        assert peer_of_pem(str(answer["certificate"]).encode()).subject == "node/n-1"

    run(ca, scenario)
