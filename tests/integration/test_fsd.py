"""fal-fsd alone: staging from a folder of this machine through the service, and the process, on real files."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fal_contract import rpc
from fal_contract.errors import Code, FalError
from fal_contract.v1 import fsd_pb2
from fal_fsd.client import CacheClient
from fal_fsd.disk.reading import Cancelled
from fal_fsd.disk.store import DiskStore
from fsd_rig import answered, plain_message, running, start_process, tree, write

FILES = {"model_index.json": b"{}", "unet/weights.safetensors": b"w" * 300_000, "unet/a/b.txt": b"deep", "empty": b""}


def run(work: Any) -> None:
    """One loop, with a bound."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


def test_a_staged_model_is_whole_read_only_and_stays(tmp_path: Path) -> None:
    root = write(tmp_path / "origin", FILES)

    async def main() -> None:
        async with running(tmp_path) as rig:
            path = await rig.client.stage(plain_message(root, FILES), "r")
            assert tree(path) == FILES
            assert {p.stat().st_mode & 0o777 for p in path.rglob("*") if p.is_file()} == {0o444}
            assert {p.stat().st_mode & 0o777 for p in [path, *path.rglob("*")] if p.is_dir()} == {0o555}
            (found,) = await rig.client.artifacts()
            assert (found.ready, list(found.pinned_by), found.bytes) == (True, ["r"], sum(map(len, FILES.values())))
            assert found.bytes_disk == found.bytes
            (root / "unet/weights.safetensors").unlink()
            assert await rig.client.stage(plain_message(root, FILES), "r") == path  # no origin is asked again

    run(main())


def test_many_askers_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, copies = write(tmp_path / "origin", FILES), []
    real = DiskStore.copy_in

    def counted(self: DiskStore, part: Any, *rest: Any) -> None:
        copies.append(part)
        real(self, part, *rest)

    monkeypatch.setattr(DiskStore, "copy_in", counted)

    async def main() -> None:
        async with running(tmp_path) as rig:
            client = rig.client
            paths = await asyncio.gather(*(client.stage(plain_message(root, FILES), f"r{n}") for n in range(20)))
            assert len(set(paths)) == 1
            assert len(copies) == 1
            (found,) = await client.artifacts()
            assert len(found.pinned_by) == 20
            await client.unpin("r0")
            await client.unpin("r0")
            await client.pin(found.manifest_digest, "again")
            with pytest.raises(FalError) as caught:
                await client.pin("0" * 64, "r")
            assert caught.value.code is Code.NOT_FOUND

    run(main())


def test_an_unwanted_staging_ends_and_a_wanted_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, gate, begun = write(tmp_path / "origin", FILES), threading.Event(), threading.Event()
    real = DiskStore.copy_in

    def slow(self: DiskStore, part: Any, folder: Path, stop: threading.Event, on_bytes: Any) -> None:
        begun.set()
        while not gate.is_set():
            if stop.wait(0.005):
                raise Cancelled
        real(self, part, folder, stop, on_bytes)

    monkeypatch.setattr(DiskStore, "copy_in", slow)

    async def main() -> None:
        async with running(tmp_path) as rig:
            client, message = rig.client, plain_message(root, FILES)
            first = asyncio.create_task(client.stage(message, "r1"))
            second = asyncio.create_task(client.stage(message, "r2"))
            assert await asyncio.to_thread(begun.wait, 30)
            # Asked and let go at once, a staging may come to the cache after its unpin: that is not what this is about.
            while [set(a.pinned_by) for a in await client.artifacts()] != [{"r1", "r2"}]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            await client.unpin("r1")
            assert len(await client.artifacts()) == 1  # r2's pin keeps it going without a waiter
            await client.unpin("r2")
            while await client.artifacts():  # noqa: ASYNC110  (another process)
                await asyncio.sleep(0.01)
            assert not list((tmp_path / "state" / "parts").iterdir())
            gate.set()
            assert (await client.stage(message, "r3")).is_dir()

    run(main())


def test_what_was_let_go_is_not_pinned_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The asker goes and unpins while its staging is still being opened in a thread."""
    root, gate, begun = write(tmp_path / "origin", FILES), threading.Event(), threading.Event()
    real = DiskStore.open_part

    def slow(self: DiskStore, *given: Any, **named: Any) -> Any:
        begun.set()
        gate.wait(30)
        return real(self, *given, **named)

    monkeypatch.setattr(DiskStore, "open_part", slow)

    async def main() -> None:
        async with running(tmp_path) as rig:
            staging = asyncio.create_task(rig.client.stage(plain_message(root, FILES), "r1"))
            assert await asyncio.to_thread(begun.wait, 30)
            staging.cancel()
            await asyncio.gather(staging, return_exceptions=True)
            unpinning = asyncio.create_task(rig.client.unpin("r1"))
            await rig.client.status()  # the cache has taken in what was sent before
            assert not unpinning.done()  # it waits for the staging that was asked for before it
            gate.set()
            await unpinning
            while await rig.client.artifacts():  # noqa: ASYNC110  (another process)
                await asyncio.sleep(0.01)

    run(main())


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda f: f.write_bytes(b"x" * 300_000), Code.CORRUPT, "SHA-256"),
        (lambda f: f.write_bytes(b"w" * 299_999), Code.CORRUPT, "299999 bytes"),
        (lambda f: f.unlink(), Code.NOT_FOUND, "No such file"),
    ],
)
def test_a_spoilt_file_is_named_nothing_exposed_and_it_can_be_put_right(
    tmp_path: Path, spoil: Any, code: Code, words: str
) -> None:
    root = write(tmp_path / "origin", FILES)
    spoil(root / "unet/weights.safetensors")

    async def main() -> None:
        async with running(tmp_path) as rig:
            with pytest.raises(FalError) as caught:
                await rig.client.stage(plain_message(root, FILES), "r")
            assert caught.value.code is code
            assert "unet/weights.safetensors" in caught.value.what
            assert words in caught.value.what
            assert rig.exposed() == []
            write(root, FILES)
            assert tree(await rig.client.stage(plain_message(root, FILES), "r")) == FILES

    run(main())


def test_bad_requests_name_their_field(tmp_path: Path) -> None:
    root = write(tmp_path / "origin", FILES)

    async def main() -> None:
        async with running(tmp_path) as rig:
            for uri, digest, owner, field, code in (
                ("x3://x/y", "", "r", "uri", Code.INVALID),
                ("", "../" * 20, "r", "manifest_digest", Code.INVALID),
                ("", "0" * 64, "r", "manifest_digest", Code.CORRUPT),
                ("", "", "r" * 500, "owner", Code.INVALID),
            ):
                bad = plain_message(root, FILES)
                bad.uri, bad.manifest_digest = uri or bad.uri, digest or bad.manifest_digest
                with pytest.raises(FalError) as caught:
                    await rig.client.stage(bad, owner)
                assert (caught.value.code, caught.value.field) == (code, field)
            assert await rig.client.artifacts() == []

    run(main())


def test_status_ingest_and_pins_with_an_end(tmp_path: Path) -> None:
    built = write(tmp_path / "built", FILES)

    async def main() -> None:
        async with running(tmp_path, disk_bytes_max=1 << 30) as rig:
            status = await rig.stub.GetStatus(fsd_pb2.GetCacheStatusRequest())
            assert (status.disk_bytes_max, status.scheduler, status.node_id) == (1 << 30, False, "")
            request = fsd_pb2.IngestRequest(folder=str(built), model="cluster/cache", kind="cache", owner="build-1")
            reply = await rig.stub.Ingest(request)
            assert [file.path for file in reply.manifest.files] == sorted(FILES)
            (found,) = await rig.client.artifacts()
            assert (found.ready, found.kind, list(found.pinned_by)) == (False, "cache", ["build-1"])
            assert found.bytes_disk == found.bytes
            assert rig.exposed() == []  # nothing is ready before it is signed
            for wrong, field in (
                (fsd_pb2.IngestRequest(folder="x", owner="o"), "folder"),
                (fsd_pb2.IngestRequest(folder=str(built), owner="o", bytes_max=10), "folder"),
                (fsd_pb2.IngestRequest(folder=str(built)), "owner"),
                (fsd_pb2.IngestRequest(folder=str(built), owner="o", kind="pickle"), "kind"),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await rig.stub.Ingest(wrong)
                assert field in (caught.value.details() or "")
            (built / "link").symlink_to("/etc/passwd")
            with pytest.raises(grpc.aio.AioRpcError, match="neither file nor folder"):
                await rig.stub.Ingest(request)
            with pytest.raises(grpc.aio.AioRpcError, match="lifetime"):
                await rig.stub.Pin(fsd_pb2.PinRequest(manifest_digest=found.artifact_id, owner="o", ttl_s=-1))
            await rig.stub.Pin(fsd_pb2.PinRequest(manifest_digest=found.artifact_id, owner="o", ttl_s=60))
            (found,) = await rig.client.artifacts()
            assert list(found.pinned_by) == ["build-1", "o"]

    run(main())


def test_the_process_serves_survives_kill_9_and_ends_in_order(tmp_path: Path) -> None:
    root = write(tmp_path / "origin", FILES)

    async def main() -> None:
        process = start_process(tmp_path, "--mount", "off")
        client = CacheClient(tmp_path / "s")
        try:
            await answered(client, process)
            assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
            path = await client.stage(plain_message(root, FILES), "r1")
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                reply = await stub.Check(health_pb2.HealthCheckRequest(service="fal.v1.NodeCache"), timeout=5)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            second = start_process(tmp_path)
            assert second.wait(30) == 1
            assert second.stderr is not None
            assert b"error: another fal-fsd works in" in second.stderr.read()
            second.stderr.close()
            process.kill()
            process.wait(10)
            with pytest.raises(FalError) as caught:
                await client.artifacts()
            assert caught.value.code is Code.UNAVAILABLE
            process.stderr.close()  # type: ignore[union-attr]
            process = start_process(tmp_path, "--mount", "off")
            await answered(client, process)
            (found,) = await client.artifacts()
            assert (found.ready, list(found.pinned_by)) == (True, ["r1"])
            assert path.is_dir()
            process.send_signal(signal.SIGTERM)
            began_s = time.monotonic()
            assert process.wait(10) == 0
            assert time.monotonic() - began_s < 5
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
            process.stderr.close()  # type: ignore[union-attr]
            await client.close()

    run(main())


def test_an_ingest_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise FalError(Code.NO_CAPACITY, "the disk is full", remedy="Free space.")

    async def main() -> None:
        async with running(tmp_path) as rig:
            monkeypatch.setattr(DiskStore, "copy_in", full)
            folder = write(tmp_path / "made", {"a": b"x" * 1000})
            with pytest.raises(FalError, match="disk is full"), rpc.fal_errors():
                await rig.stub.Ingest(fsd_pb2.IngestRequest(folder=str(folder), model="default/c", owner="build"))
            assert rig.cache.store.artifacts() == []
            assert rig.cache.store.room().bytes_used == 0

    run(main())
