"""What only the etcd store has: a network, a lease, several endpoints, TLS, a quota. A real etcd each time."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from etcd_server import EtcdServer, free_ports, why_no_etcd
from fal_contract.errors import Code, FalError
from fal_scheduler.store import etcd_upkeep
from fal_scheduler.store.etcd import EtcdStore
from fal_scheduler.store.etcd_client import EtcdClient, EtcdTls
from fal_scheduler.store.etcd_upkeep import EtcdUpkeep
from fal_scheduler.store.interface import Write

pytestmark = [pytest.mark.etcd, pytest.mark.skipif(bool(why_no_etcd()), reason=why_no_etcd() or "etcd is here")]
WAIT_S = 30.0
T = TypeVar("T")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A place of its own for each test, as several clusters on one etcd have."""
    return f"/test{tmp_path}"


class Line:
    """A TCP line to etcd that can lose the answers, or everything."""

    def __init__(self, endpoint: str) -> None:
        self._host, port = endpoint.split(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.answers = True
        self.endpoint = ""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Line]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, there_writer]
        there, back = self._pump(reader, there_writer, True), self._pump(there_reader, writer, False)
        for pump in (there, back):
            task = asyncio.create_task(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bool) -> None:
        try:
            while data := await reader.read(65536):
                if request or self.answers:
                    writer.write(data)
                    await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def fails(work: Awaitable[object]) -> FalError:
    with pytest.raises(FalError) as caught:
        await work
    return caught.value


async def eventually(work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work`, tried again while etcd cannot be reached."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await work()
            except FalError as error:
                if error.code is not Code.UNAVAILABLE:
                    raise


def test_an_answer_lost_after_the_commit_is_unknown_and_found_by_a_load(server: EtcdServer, prefix: str) -> None:
    async def main() -> None:
        async with Line(server.endpoint).open() as line:
            store = EtcdStore([line.endpoint], prefix=prefix, timeout_s=2.0, lease_ttl_s=20.0)
            await store.open()
            guard = await store.campaign("one")
            await store.commit(guard, [Write("a", b"1")])
            line.answers = False
            assert (await fails(store.commit(guard, [Write("a", b"2")]))).code is Code.STORE_UNKNOWN
            assert (await fails(store.commit(guard, [Write("a", b"3")]))).code is Code.STORE_FAILED
            line.cut()
            line.answers = True
            loaded = await eventually(store.load)
            assert (loaded.revision, loaded.records) == (2, {"a": b"2"})
            assert await store.commit(guard, [Write("a", b"4")]) == 3
            assert store.statistics()["unknown"] == 1.0
            await store.close()

    asyncio.run(main())


def test_a_commit_waits_out_a_stalled_etcd(server: EtcdServer, prefix: str) -> None:
    async def main() -> None:
        store = EtcdStore([server.endpoint], prefix=prefix, timeout_s=20.0, lease_ttl_s=20.0)
        await store.open()
        guard = await store.campaign("one")
        server.pause()
        commit = asyncio.create_task(store.commit(guard, [Write("a", b"1")]))
        done, _ = await asyncio.wait({commit}, timeout=1.0)
        server.resume()
        assert not done
        assert await asyncio.wait_for(commit, WAIT_S) == 1
        assert store.statistics()["commit_s_max"] >= 1.0
        await store.close()

    asyncio.run(main())


def test_a_leader_that_cannot_renew_knows_it_before_the_next_one_leads(server: EtcdServer, prefix: str) -> None:
    async def main() -> None:
        async with Line(server.endpoint).open() as line:
            old, new = (
                EtcdStore([line.endpoint], prefix=prefix, lease_ttl_s=3.0),
                EtcdStore([server.endpoint], prefix=prefix, lease_ttl_s=3.0),
            )
            await old.open()
            await new.open()
            guard = await old.campaign("old")
            await old.commit(guard, [Write("a", b"1")])
            async with asyncio.timeout(WAIT_S):
                while old.statistics()["renewals"] < 2.0:  # noqa: ASYNC110  (counters have no event)
                    await asyncio.sleep(0.05)
            order: list[str] = []

            async def told() -> None:
                await old.lost(guard)
                order.append("old lost")

            async def elected() -> None:
                taken = await new.campaign("new")
                order.append("new leads")
                assert taken.term == guard.term + 1
                assert await new.commit(taken, [Write("b", b"2")]) == 2

            line.answers = False
            line.cut()
            async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(told())
                tasks.create_task(elected())
            assert order == ["old lost", "new leads"]
            line.answers = True
            assert (await fails(old.commit(guard, [Write("a", b"late")]))).code is Code.NOT_LEADER
            assert (await new.load()).records == {"a": b"1", "b": b"2"}
            await old.close()
            await new.close()

    asyncio.run(main())


def test_a_deposed_leader_that_does_not_know_it_is_refused_by_etcd_itself(server: EtcdServer, prefix: str) -> None:
    async def main() -> None:
        old, new = (
            EtcdStore([server.endpoint], prefix=prefix, lease_ttl_s=60.0),
            EtcdStore([server.endpoint], prefix=prefix, lease_ttl_s=60.0),
        )
        await old.open()
        await new.open()
        guard = await old.campaign("old")
        await asyncio.to_thread(by_hand, server, "deleterange", f"{prefix}/v1/leader")
        taken = await asyncio.wait_for(new.campaign("new"), WAIT_S)
        error = await fails(old.commit(guard, [Write("a", b"late")]))
        assert error.code is Code.NOT_LEADER
        assert "new" in error.what
        await asyncio.wait_for(old.lost(guard), WAIT_S)
        assert await new.commit(taken, [Write("b", b"1")]) == 1
        await old.close()
        await new.close()

    asyncio.run(main())


def test_everything_acknowledged_survives_etcd_killed_and_the_store_reconnects(server: EtcdServer, prefix: str) -> None:
    async def main() -> None:
        store = EtcdStore([server.endpoint], prefix=prefix, lease_ttl_s=20.0, timeout_s=5.0)
        await store.open()
        guard = await store.campaign("one")
        for n in range(50):
            await store.commit(guard, [Write(f"k{n}", b"1")])
        await asyncio.to_thread(server.restart)
        assert (await eventually(store.load)).revision == 50
        assert await store.commit(guard, [Write("after", b"1")]) == 51
        assert set((await store.load()).records) == {*(f"k{n}" for n in range(50)), "after"}
        await store.close()

    asyncio.run(main())


def test_a_dead_endpoint_is_passed_over(server: EtcdServer, prefix: str) -> None:
    async def main() -> None:
        (dead,) = free_ports(1)
        store = EtcdStore([f"127.0.0.1:{dead}", server.endpoint], prefix=prefix, timeout_s=5.0)
        await store.open()
        guard = await store.campaign("one")
        assert await store.commit(guard, [Write("a", b"1")]) == 1
        assert store.statistics()["reconnects"] >= 1.0
        await store.close()

    asyncio.run(main())


def test_an_etcd_that_is_not_there_is_a_clear_error() -> None:
    async def main() -> None:
        (dead,) = free_ports(1)
        error = await fails(EtcdStore([f"127.0.0.1:{dead}"], timeout_s=1.0).open())
        assert error.code is Code.UNAVAILABLE
        assert f"127.0.0.1:{dead}" in error.what
        assert "etcdctl" in error.remedy

    asyncio.run(main())


@pytest.mark.parametrize("endpoint", ["", "host", "http://host:2379", "host:", ":2379", "host:99999"])
def test_a_bad_endpoint_is_named(endpoint: str) -> None:
    with pytest.raises(FalError) as caught:
        EtcdStore([endpoint])
    assert caught.value.code is Code.INVALID
    assert caught.value.field == "endpoints"


@pytest.mark.parametrize(("stored", "code"), [("2", Code.VERSION_MISMATCH), ("x", Code.CORRUPT)])
def test_a_newer_or_damaged_format_is_refused_and_nothing_is_changed(
    server: EtcdServer, prefix: str, stored: str, code: Code
) -> None:
    def everything() -> object:
        return by_hand(server, "range", prefix, range_end=f"{prefix}~")["kvs"]  # with their revisions

    by_hand(server, "put", f"{prefix}/format", value=stored)
    before = everything()
    assert asyncio.run(fails(EtcdStore([server.endpoint], prefix=prefix).open())).code is code
    assert everything() == before


def test_many_commits_do_not_fill_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes three times the quota through a small etcd; without compaction it refuses on the way."""
    monkeypatch.setattr(etcd_upkeep, "_BYTES_MAX", 1 << 20)
    monkeypatch.setattr(etcd_upkeep, "_REVISIONS_KEPT", 4)
    quota_bytes = 16 << 20

    async def main(endpoint: str) -> None:
        store = EtcdStore([endpoint], quota_bytes=quota_bytes)
        await store.open()
        guard = await store.campaign("one")
        written = n = 0
        while written < 3 * quota_bytes:
            n += 1
            writes = [Write(f"k{i}", bytes([n % 256]) * 10_000) for i in range(20)]
            await store.commit(guard, writes)
            written += 200_000
            await asyncio.sleep(0.005)  # the rate of a busy cluster, not of a loop
        assert (await store.load()).revision == n
        assert store.statistics()["compactions"] >= 5.0
        await store.close()

    with EtcdServer(tmp_path / "etcd", options=(f"--quota-backend-bytes={quota_bytes}",)) as server:
        asyncio.run(main(server.endpoint))


def test_a_full_etcd_says_so_and_raises_the_alarm_before(tmp_path: Path) -> None:
    quota_bytes = 4 << 20

    async def main(endpoint: str) -> None:
        store = EtcdStore([endpoint])
        client = EtcdClient([endpoint], tls=None, timeout_s=10.0)
        upkeep = EtcdUpkeep(client, quota_bytes=quota_bytes)
        await store.open()
        guard = await store.campaign("one")
        await upkeep.look()
        assert upkeep.statistics()["quota_alarm"] == 0.0

        async def fill() -> None:
            for n in range(100):
                await store.commit(guard, [Write(f"k{n}", bytes(200_000))])
                await upkeep.look()

        error = await fails(fill())
        assert error.code is Code.STORE_FAILED
        assert "defrag" in error.remedy
        assert upkeep.statistics()["quota_alarm"] == 1.0  # of the last look, before it was full
        assert store.statistics()["commits"] >= 5.0
        await client.close()
        await store.close()

    with EtcdServer(tmp_path / "etcd", options=(f"--quota-backend-bytes={quota_bytes}",)) as server:
        asyncio.run(main(server.endpoint))


def test_mutual_tls(tmp_path: Path) -> None:
    ca, cert, key = certificates(tmp_path)

    async def main(endpoint: str) -> None:
        store = EtcdStore([endpoint], tls=EtcdTls(ca, cert, key), timeout_s=5.0)
        await store.open()
        guard = await store.campaign("one")
        assert await store.commit(guard, [Write("a", b"1")]) == 1
        await store.close()
        stranger = EtcdStore([endpoint], tls=EtcdTls(ca), timeout_s=1.0)
        assert (await fails(stranger.open())).code is Code.UNAVAILABLE
        missing = EtcdStore([endpoint], tls=EtcdTls(tmp_path / "no.pem"))
        assert (await fails(missing.open())).code is Code.INVALID
        await missing.close()

    options = ("--client-cert-auth", f"--trusted-ca-file={ca}", f"--cert-file={cert}", f"--key-file={key}")
    with EtcdServer(tmp_path / "etcd", options=options, scheme="https") as server:
        asyncio.run(main(server.endpoint))


def by_hand(server: EtcdServer, call: str, key: str, **more: str) -> Any:
    """One call of etcd's own JSON gateway, as an operator's tool would make it. Keys and values go as base64."""
    body = {"key": key, **more}
    coded = {name: base64.b64encode(text.encode()).decode() for name, text in body.items()}
    request = urllib.request.Request(f"http://{server.endpoint}/v3/kv/{call}", json.dumps(coded).encode())
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        return json.load(answer)


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A self-signed certificate for 127.0.0.1 that is its own CA, server and client."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=etcd", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "extendedKeyUsage=serverAuth,clientAuth"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, cert, key
