"""fal-fsd as a process with a scheduler: killed with -9 on its way, its mounts, its memory, a private CA."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fake_cache_scheduler import FakeCacheScheduler
from fal_contract.clock import SystemClock
from fal_fsd.client import CacheClient
from fal_fsd.mount import keeper, kernel
from fal_fsd.origin import Credentials
from fsd_cluster import attested, contents_of
from fsd_rig import answered, message_of, running, start_process, tree
from origin_servers import Faults, HttpOrigin, make_authority

PIECE = 256 << 10


class Process:
    """One fsd that can be killed and started again."""

    def __init__(self, folder: Path, scheduler: FakeCacheScheduler, *arguments: str) -> None:
        self._folder = folder
        identity = str(scheduler.identity("n1"))
        self._arguments = ["--schedulers", scheduler.address, "--identity", identity, *arguments]
        self.process: subprocess.Popen[bytes] | None = None
        self.client = CacheClient(folder / "s")

    async def start(self) -> None:
        self.process = start_process(self._folder, "--bulk-host", "127.0.0.1", *self._arguments)
        await answered(self.client, self.process)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            assert self.process.stderr is not None
            self.process.stderr.close()
            self.process = None

    def rss_bytes(self) -> int:
        """Resident memory."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [x for x in status.splitlines() if x.startswith("VmRSS")]
        return int(line.split()[1]) << 10


@asynccontextmanager
async def scheduler_and_process(folder: Path, *arguments: str) -> AsyncIterator[tuple[FakeCacheScheduler, Process]]:
    scheduler = FakeCacheScheduler(folder)
    await scheduler.start()
    process = Process(folder, scheduler, *arguments)
    try:
        await process.start()
        await scheduler.until(lambda: "n1" in scheduler.nodes)
        yield scheduler, process
    finally:
        process.kill()
        await process.client.close()
        await scheduler.stop()


def run(work: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(150):
            await work

    asyncio.run(bounded())


def test_killed_on_its_way_it_goes_on_by_itself_with_what_it_had(tmp_path: Path) -> None:
    contents = contents_of(120 * PIECE)
    with HttpOrigin(contents, Faults(stall_after=8 * PIECE)) as origin:

        async def main() -> None:
            async with scheduler_and_process(tmp_path, "--mount", "off") as (scheduler, fsd):
                known = await attested(scheduler, origin, contents, piece_bytes=PIECE)
                staging = asyncio.create_task(fsd.client.stage(message_of(known), "runner-1"))
                await scheduler.until(
                    lambda: known.id in (seen := scheduler.nodes["n1"].seen) and seen[known.id].bytes_disk >= 4 * PIECE
                )
                had = scheduler.nodes["n1"].seen[known.id].bytes_disk
                fsd.kill()
                await asyncio.gather(staging, return_exceptions=True)
                origin.faults.stall_after = -1
                origin.faults.go.set()
                await scheduler.until(lambda: "n1" not in scheduler.nodes)
                sent = origin.bytes_sent
                await fsd.start()  # nobody asks again: the runner's pin wants it
                await scheduler.until(
                    lambda: (
                        "n1" in scheduler.nodes
                        and known.id in (seen := scheduler.nodes["n1"].seen)
                        and seen[known.id].ready
                    )
                )
                assert origin.bytes_sent - sent <= known.bytes_total - had
                (found,) = await fsd.client.artifacts()
                assert list(found.pinned_by) == ["runner-1"]
                assert tree(await fsd.client.stage(message_of(known), "runner-1")) == contents

        run(main())


@pytest.mark.slow
def test_its_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    contents = {"weights.safetensors": os.urandom(300 << 20)}
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with scheduler_and_process(tmp_path, "--mount", "off") as (scheduler, fsd):
                known = await attested(scheduler, origin, contents, piece_bytes=PIECE)
                await fsd.client.stage(message_of(known), "r")
                assert fsd.rss_bytes() <= 150 << 20

        run(main())


def test_metrics_tell_what_came_from_where(tmp_path: Path) -> None:
    contents = contents_of(4 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            arguments = ("--mount", "off", "--metrics-port", str(port))
            async with scheduler_and_process(tmp_path, *arguments) as (scheduler, fsd):
                known = await attested(scheduler, origin, contents, piece_bytes=PIECE)
                await fsd.client.stage(message_of(known), "r")
                url = f"http://127.0.0.1:{port}"
                text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{url}/metrics", timeout=10).read())
                lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#")
                assert float(lines['fal_fsd_bytes_total{source="origin"}']) == known.bytes_total
                assert float(lines["fal_fsd_origin_read_bytes_total"]) >= known.bytes_total
                assert "fal_event_loop_lag_seconds" in lines
                health = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{url}/healthz", timeout=10).read())
                assert b'"scheduler": "ok"' in health

        run(main())


def test_an_origin_behind_a_private_ca(tmp_path: Path) -> None:
    contents = contents_of(5 * PIECE)
    authority = make_authority(tmp_path)
    file = tmp_path / "credentials.toml"
    file.write_text(f'[tls]\nca_file = "{authority.ca_file}"\n')
    file.chmod(0o600)
    with HttpOrigin(contents, tls=authority.tls) as origin:

        async def main() -> None:
            scheduler = FakeCacheScheduler(tmp_path)
            await scheduler.start()
            given = {"schedulers": [scheduler.address], "identity": scheduler.identity("n1"), "credentials_file": file}
            try:
                async with running(tmp_path, **given) as rig:
                    known = await attested(
                        scheduler, origin, contents, piece_bytes=PIECE, credentials=Credentials.load(file, {})
                    )
                    assert tree(await rig.client.stage(message_of(known), "r")) == contents
            finally:
                await scheduler.stop()

        run(main())


READER = """
import sys
sys.stdout.buffer.write(open(sys.argv[1], "rb").read())
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="mounts need root and /dev/fuse")
def test_a_reader_of_an_unfinished_file_survives_kill_9(tmp_path: Path) -> None:
    contents = contents_of(40 * PIECE)
    with HttpOrigin(contents, Faults(stall_after=3 * PIECE)) as origin:

        async def main() -> None:
            async with scheduler_and_process(tmp_path) as (scheduler, fsd):
                known = await attested(scheduler, origin, contents, piece_bytes=PIECE)
                path, ready = await fsd.client.view(message_of(known), "r")
                assert not ready
                reader = await asyncio.create_subprocess_exec(
                    "python3", "-c", READER, str(path / "file-0.safetensors"), stdout=subprocess.PIPE
                )
                reading = asyncio.create_task(reader.communicate())
                try:
                    await scheduler.until(lambda: scheduler.nodes["n1"].seen[known.id].bytes_disk >= 2 * PIECE)
                    fsd.kill()
                    await fsd.start()
                    origin.faults.stall_after = -1
                    origin.faults.go.set()
                    out, _ = await reading
                    assert out == contents["file-0.safetensors"]
                    whole = await fsd.client.stage(message_of(known), "r")
                    assert tree(whole) == contents
                    assert (await fsd.client.status()).capabilities["fuse"] == "yes"
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        reader.kill()
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
                    fsd.kill()
                    await asyncio.to_thread(end_mounts, tmp_path)

        run(main())


def end_mounts(folder: Path) -> None:
    """The process that keeps mounts outlives fsd by design; not the test."""
    mounts = (folder / "state" / "mounts").absolute()
    keeper.Keeper(mounts, SystemClock()).end()
    for found in kernel.mounted_below(mounts):
        kernel.remove_mount_point(found.path)
