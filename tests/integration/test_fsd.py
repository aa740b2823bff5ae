"""fal-fsd: the store, staging through the service, and the process, on real files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fal_contract.errors import Code, FalError
from fal_contract.model_manifest import FileEntry, manifest_digest
from fal_contract.v1 import agent_pb2, fsd_pb2_grpc, state_pb2
from fal_fsd import copy as fsd_copy
from fal_fsd import store as fsd_store
from fal_fsd.client import CacheClient
from fal_fsd.copy import Cancelled
from fal_fsd.core.manifest import Manifest, checked, local_folder
from fal_fsd.service import NodeCache
from fal_fsd.store import Store

FILES = {"model_index.json": b"{}", "unet/weights.safetensors": b"w" * 300_000, "unet/a/b.txt": b"deep", "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A short path: unix sockets lie below it."""
    return tmp_path


def source(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    root = folder / "origin"
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def manifest(files: dict[str, bytes] = FILES) -> Manifest:
    entries = tuple(FileEntry(p, len(c), hashlib.sha256(c).digest()) for p, c in sorted(files.items()))
    return Manifest(manifest_digest(entries), entries)


def artifact(root: Path, wanted: Manifest | None = None) -> agent_pb2.Artifact:
    wanted = wanted or manifest()
    return agent_pb2.Artifact(
        model="default/m", kind="model", uri=root.as_uri(), manifest_digest=wanted.digest, bytes=wanted.bytes_total,
        manifest=state_pb2.ModelManifest(
            files=[state_pb2.ModelFile(path=e.path, bytes=e.size_bytes, sha256=e.sha256) for e in wanted.files]
        ),
    )  # fmt: skip


def stage(store: Store, wanted: Manifest, root: Path, owner: str = "r") -> Path:
    store.begin(wanted, "default/m", owner)
    return store.stage(wanted, root, on_bytes=lambda n: None, stop=threading.Event())


def exposed(store_dir: Path) -> list[str]:
    return sorted(p.name for p in (store_dir / "models").iterdir())


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    made = Store(folder / "state")
    yield made
    made.close()


# ---- the store


def test_a_staged_model_is_whole_read_only_and_stays(folder: Path, store: Store) -> None:
    path = stage(store, manifest(), source(folder))
    assert {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()} == FILES
    assert {p.stat().st_mode & 0o777 for p in path.rglob("*") if p.is_file()} == {0o444}
    assert {p.stat().st_mode & 0o777 for p in [path, *path.rglob("*")] if p.is_dir()} == {0o555}
    assert not list((folder / "state" / "parts").iterdir())
    (store_now,) = store.artifacts()
    assert (store_now.ready, store_now.pinned_by, store_now.bytes_total) == (True, ("r",), manifest().bytes_total)
    assert stage(store, manifest(), Path("/nowhere")) == path  # no origin is asked again


@pytest.mark.parametrize("kernel", ["clone", "range", "plain"])
def test_each_way_to_copy_gives_the_same_bytes(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    if kernel != "clone":
        monkeypatch.setattr(fsd_copy, "_clone", lambda *_: False)
    if kernel == "plain":
        monkeypatch.setattr(fsd_copy, "_copy_range", lambda *_: False)
    monkeypatch.setattr(fsd_copy, "_CHUNK_BYTES", 70_001)
    path = stage(store, manifest(), source(folder))
    assert (path / "unet/weights.safetensors").read_bytes() == FILES["unet/weights.safetensors"]


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda f: f.write_bytes(b"x" * 300_000), Code.CORRUPT, "SHA-256"),
        (lambda f: f.write_bytes(b"w" * 299_999), Code.CORRUPT, "299999 bytes"),
        (lambda f: f.unlink(), Code.NOT_FOUND, "No such file"),
        (lambda f: (f.unlink(), os.mkfifo(f)), Code.CORRUPT, "no regular file"),
        (lambda f: (f.unlink(), f.mkdir()), Code.CORRUPT, "no regular file"),
    ],
)
def test_a_spoilt_file_is_named_and_nothing_exposed(folder, store, spoil, code, words) -> None:  # type: ignore[no-untyped-def]
    root = source(folder)
    spoil(root / "unet/weights.safetensors")
    with pytest.raises(FalError) as caught:
        stage(store, manifest(), root)
    assert caught.value.code is code
    assert "unet/weights.safetensors" in caught.value.what
    assert words in caught.value.what
    assert exposed(folder / "state") == []


def test_what_a_kill_left_is_checked_and_taken_up(folder: Path, store: Store) -> None:
    root, wanted = source(folder), manifest()
    parts = folder / "state" / "parts" / wanted.digest
    (parts / "unet").mkdir(parents=True)
    whole, torn = parts / "model_index.json", parts / "unet/weights.safetensors"
    whole.write_bytes(FILES["model_index.json"])
    torn.write_bytes(b"x" * 300_000)  # the right size, not the right bytes
    torn.chmod(0o444)
    (parts / "stranger").write_bytes(b"not in the manifest")
    (root / "model_index.json").unlink()  # proof that the whole one is not fetched again
    path = stage(store, wanted, root)
    assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == set(FILES)
    assert (path / "unet/weights.safetensors").read_bytes() == FILES["unet/weights.safetensors"]


def test_pins_survive_and_parts_that_nobody_wants_do_not(folder: Path) -> None:
    root, wanted, other = source(folder), manifest(), manifest({"x": b"1"})
    store = Store(folder / "state")
    stop = threading.Event()
    stop.set()
    for each, owner in ((wanted, "r1"), (other, "")):
        store.begin(each, "default/m", owner)
        with pytest.raises(Cancelled):
            store.stage(each, root, on_bytes=lambda n: None, stop=stop)
    parts = folder / "state" / "parts"
    (parts / other.digest).mkdir(exist_ok=True)
    store.close()
    again = Store(folder / "state")
    assert [p.name for p in parts.iterdir()] == [wanted.digest]
    assert again.pinned(wanted.digest)
    assert again.unpin("r1") == [wanted.digest]
    assert again.unpin("r1") == []
    again.abandon(wanted.digest)
    assert list(parts.iterdir()) == []
    assert again.artifacts() == []
    again.close()


def test_a_full_disk_is_said_before_and_while_copying(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = source(folder)
    with monkeypatch.context() as patch:
        patch.setattr(fsd_copy, "_clone", lambda *_: False)

        def full(*_: object) -> bool:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(fsd_copy, "_copy_range", full)
        with pytest.raises(FalError, match="has no room") as caught:
            stage(store, manifest(), root)
        assert caught.value.code is Code.NO_CAPACITY
    monkeypatch.setattr(store, "_reserve_bytes", 1 << 60)
    with pytest.raises(FalError, match="bytes to stage"):
        stage(store, manifest(), root)
    assert exposed(folder / "state") == []


def test_a_second_fsd_a_newer_and_a_damaged_database_are_refused(folder: Path) -> None:
    store = Store(folder / "state")
    with pytest.raises(FalError, match="another fal-fsd"):
        Store(folder / "state")
    store.close()
    fsd_store._open(folder / "state" / "pins.db").execute("PRAGMA user_version = 9").connection.close()
    with pytest.raises(FalError, match="version 9") as caught:
        Store(folder / "state")
    assert caught.value.code is Code.VERSION_MISMATCH
    for name in ("pins.db", "pins.db-wal", "pins.db-shm"):
        (folder / "state" / name).unlink(missing_ok=True)
    (folder / "state" / "pins.db").write_bytes(b"not a database, certainly not" * 100)
    with pytest.raises(FalError, match="damaged"):
        Store(folder / "state")


def test_manifests_and_origins_are_checked() -> None:
    good = manifest()
    assert checked(good.digest, good.files) == good
    with pytest.raises(FalError) as caught:
        checked("0" * 64, good.files)
    assert caught.value.code is Code.CORRUPT
    bad = (FileEntry("../../etc/passwd", 1, bytes(32)),)
    with pytest.raises(FalError, match="has the part"):
        checked(manifest_digest(bad), bad)
    assert local_folder("file:///a%20b/c") == "/a b/c"
    for uri in ("s3://bucket/x", "file://host/x", "/x", "file:x", ""):
        with pytest.raises(FalError, match="no local folder"):
            local_folder(uri)
    assert good.folders == ["unet", "unet/a"]


# ---- the service


@asynccontextmanager
async def service(folder: Path) -> AsyncIterator[CacheClient]:
    store = Store(folder / "state")
    cache, server = NodeCache(store), grpc.aio.server()
    fsd_pb2_grpc.add_NodeCacheServicer_to_server(cache, server)
    server.add_insecure_port(f"unix:{folder}/s")
    await server.start()
    client = CacheClient(folder / "s")
    try:
        yield client
    finally:
        await client.close()
        await cache.close()
        await server.stop(0)
        store.close()


def test_many_askers_one_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, copies = source(folder), []
    real = fsd_store.copy_checked

    def counted(source_: Path, *rest: object, **named: object) -> None:
        copies.append(source_)
        real(source_, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(fsd_store, "copy_checked", counted)

    async def main() -> None:
        async with service(folder) as client:
            paths = await asyncio.gather(*(client.stage(artifact(root), f"r{n}") for n in range(20)))
            assert len(set(paths)) == 1
            assert len(copies) == len(FILES)
            (found,) = await client.artifacts()
            assert len(found.pinned_by) == 20
            await client.unpin("r0")
            await client.unpin("r0")
            await client.pin(found.manifest_digest, "again")
            with pytest.raises(FalError) as caught:
                await client.pin("0" * 64, "r")
            assert caught.value.code is Code.NOT_FOUND

    asyncio.run(main())


def test_an_unwanted_staging_ends_and_a_wanted_one_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, gate, running = source(folder), threading.Event(), threading.Event()
    real = fsd_store.copy_checked

    def slow(source_: Path, target: Path, entry: FileEntry, *, on_bytes: object, stop: threading.Event) -> None:
        running.set()
        while not gate.is_set():
            if stop.wait(0.005):
                raise Cancelled
        real(source_, target, entry, on_bytes=on_bytes, stop=stop)  # type: ignore[arg-type]

    monkeypatch.setattr(fsd_store, "copy_checked", slow)

    async def main() -> None:
        async with service(folder) as client:
            first = asyncio.create_task(client.stage(artifact(root), "r1"))
            second = asyncio.create_task(client.stage(artifact(root), "r2"))
            await asyncio.to_thread(running.wait, 10)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            await client.unpin("r1")
            assert len(await client.artifacts()) == 1  # r2's pin keeps it going without a waiter
            await client.unpin("r2")
            async with asyncio.timeout(10):
                while await client.artifacts():  # noqa: ASYNC110  (another process)
                    await asyncio.sleep(0.01)
            assert not list((folder / "state" / "parts").iterdir())
            gate.set()
            assert (await client.stage(artifact(root), "r3")).is_dir()

    asyncio.run(main())


def test_errors_reach_the_agent_whole(folder: Path) -> None:
    root = source(folder)
    (root / "unet/a/b.txt").write_bytes(b"peed")

    async def main() -> None:
        async with service(folder) as client:
            with pytest.raises(FalError) as caught:
                await client.stage(artifact(root), "r")
            assert caught.value.code is Code.CORRUPT
            assert "unet/a/b.txt" in caught.value.what
            for uri, digest, owner, field in (
                ("s3://x/y", manifest().digest, "r", "uri"),
                (root.as_uri(), "../" * 20, "r", "manifest_digest"),
                (root.as_uri(), manifest().digest, "r" * 500, "owner"),
            ):
                bad = artifact(root)
                bad.uri, bad.manifest_digest = uri, digest
                with pytest.raises(FalError) as caught:
                    await client.stage(bad, owner)
                assert (caught.value.code, caught.value.field) == (Code.INVALID, field)

    asyncio.run(main())


# ---- the process


def start(folder: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from fal_fsd.main import main; sys.exit(main())"
    arguments = ["run", "--state-dir", str(folder / "state"), "--socket", str(folder / "s")]
    paths = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE
    )


async def answered(client: CacheClient) -> None:
    """Until fsd listens and the client's channel, which waits between two attempts, has seen that."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(FalError):
                await client.artifacts()
                assert await client.answers()
                return
            await asyncio.sleep(0.05)


def test_the_process_serves_survives_kill_9_and_ends_in_order(folder: Path) -> None:
    root = source(folder)

    async def main() -> None:
        process = start(folder)
        client = CacheClient(folder / "s")
        try:
            await answered(client)
            assert (folder / "s").stat().st_mode & 0o777 == 0o600
            path = await client.stage(artifact(root), "r1")
            async with grpc.aio.insecure_channel(f"unix:{folder}/s") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                reply = await stub.Check(health_pb2.HealthCheckRequest(service="fal.v1.NodeCache"), timeout=5)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            second = start(folder)
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
            process = start(folder)
            await answered(client)
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

    asyncio.run(main())
