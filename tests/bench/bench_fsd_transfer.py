"""`fsd-transfer`: one node's cache to another's, verified, to tmpfs ÷ bare sendfile → recv_into + pwrite.

Two processes each, one TCP connection over loopback, the same file, fresh files in tmpfs. Ours: pieces are asked for
(a window of WINDOW), sent by sendfile, received ahead by one thread, hashed by BLAKE3 and written to the real disk
store by another, counted, told to the event loop. Floor: per byte the bare side copies file → socket, socket → buffer,
buffer → file; ours hashes besides (blake3 alone: 3 to 7 GB/s a core), on a core that the bare side leaves idle in part.
The row with TLS has no bound: it is what encryption costs here.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fsd_parts import artifact_of_folder
from fsd_transfer_child import REQUEST
from harness import Options, Paired, Result, interleave, print_table

from fal_contract.artifact import Artifact
from fal_contract.clock import SystemClock
from fal_contract.identity import Identity, Role
from fal_contract.ticket import make_ticket
from fal_fsd.disk.store import DiskStore
from fal_fsd.peers.address import PeerAddress
from fal_fsd.peers.net import PeerNet
from fal_scheduler.ca import CertificateAuthority

MUST_REACH = "ratio >= 0.8"
RATIO_MIN = 0.8
FILE_BYTES = 512 << 20
WINDOW = 8  # pieces outstanding
BARE_BUFFER_BYTES = 1 << 20
KEY = bytes(range(32))
TIMEOUT_S = 120.0


class Receiver:
    """The receiving node. One connection stands; each `run` fetches the whole artifact into a fresh part."""

    def __init__(self, artifact: Artifact, folder: Path, identity: Identity | None) -> None:
        self.net = PeerNet(
            node_id="receiver",
            events=self,  # type: ignore[arg-type]
            clock=SystemClock(),
            rng=random.Random(1),
            identity=(lambda: identity) if identity is not None else None,
            listen=None,
        )
        self._artifact = artifact
        self._folder = folder
        self._up = asyncio.Event()
        self._done = asyncio.Event()
        self._left: list[int] = []
        self._came = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in ("peer_has", "lease_told", "claims_told"):
            return lambda *_: None
        raise AttributeError(name)

    async def connect(self, port: int, *, tls: bool) -> None:
        await self.net.start()
        until_s = SystemClock().wall_s() + 900
        ticket = make_ticket(KEY, caller="receiver", artifact_id=self._artifact.id, expires_s=until_s)
        member = PeerAddress("holder", (("127.0.0.1", port),), ticket, until_s, tls=tls)
        self.net.set_members(self._artifact.id, [member])

    async def run(self) -> float:
        """Bytes per second of one transfer."""
        place = Path(tempfile.mkdtemp(dir=self._folder))
        store = DiskStore(place, bytes_max=None, clock=SystemClock())
        part = store.open_part(self._artifact, model="default/bench")
        self._up.clear()
        self._done.clear()
        self.net.join(part)
        async with asyncio.timeout(TIMEOUT_S):
            await self._up.wait()
            self._left = list(range(self._artifact.layout.count))[::-1]
            self._came = 0
            begun_s = time.perf_counter()
            self._ask(WINDOW)
            await self._done.wait()
            took_s = time.perf_counter() - begun_s
        self.net.leave(self._artifact.id)
        await self.net.quiet(self._artifact.id)
        store.close()
        shutil.rmtree(place)
        return self._artifact.bytes_total / took_s

    def _ask(self, count: int) -> None:
        pieces = [self._left.pop() for _ in range(min(count, len(self._left)))]
        if pieces:
            self.net.ask("holder", self._artifact.id, pieces, urgent=False)

    def peer_up(self, *_: Any) -> None:
        self._up.set()

    def piece_came(self, *_: Any) -> None:
        self._came += 1
        self._ask(1)
        if self._came == self._artifact.layout.count:
            self._done.set()

    def peer_down(self, *told: Any) -> None:
        if told[2] != "the node stops":
            raise AssertionError(told)

    def piece_bad(self, *told: Any) -> None:
        raise AssertionError(told)

    piece_refused = disk_failed = piece_bad


async def bare(port: int, folder: Path, length: int) -> float:
    """Bytes per second of one bare transfer."""
    return await asyncio.to_thread(_bare, port, folder / "bare", length)


def _bare(port: int, path: Path, length: int) -> float:
    buffer = memoryview(bytearray(BARE_BUFFER_BYTES))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(fd, length)
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            begun_s = time.perf_counter()
            connection.sendall(REQUEST.pack(0, length))
            at = 0
            while count := connection.recv_into(buffer):
                os.pwrite(fd, buffer[:count], at)
                at += count
            took_s = time.perf_counter() - begun_s
        assert at == length
        return length / took_s
    finally:
        os.close(fd)
        path.unlink()


@asynccontextmanager
async def holder(folder: Path, identity: Path | None) -> AsyncIterator[dict[str, int]]:
    """The sending process and its ports."""
    child = Path(__file__).with_name("fsd_transfer_child.py")
    path = os.pathsep.join(sys.path)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(child), str(folder), KEY.hex(), str(identity or "-"), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield json.loads(await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S))
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), TIMEOUT_S)


async def measure(folder: Path, artifact: Artifact, identities: Path | None, *, pairs: int) -> Paired:
    """Ours against bare, interleaved."""
    mine = Identity.load(identities / "receiver.pem") if identities is not None else None
    async with holder(folder / "data", identities / "holder.pem" if identities is not None else None) as ports:
        receiver = Receiver(artifact, folder, mine)
        await receiver.connect(ports["peer"], tls=mine is not None)
        try:
            length = artifact.bytes_total
            return await interleave(receiver.run, lambda: bare(ports["bare"], folder, length), pairs=pairs)
        finally:
            await receiver.net.close()


def make_identities(folder: Path) -> Path:
    """A throw-away CA with two nodes."""
    clock = SystemClock()
    ca = CertificateAuthority.create(folder / "ca", cluster_id="c-000000000000", now_s=clock.wall_s())
    for name in ("holder", "receiver"):
        ca.new_identity(role=Role.NODE, name=name, now_s=clock.wall_s()).save(folder / f"{name}.pem")
    return folder


async def run(options: Options) -> Result:
    """See the module's docstring."""
    folder = Path(tempfile.mkdtemp(prefix="fsd-transfer-", dir="/dev/shm"))
    try:
        data = folder / "data"
        data.mkdir()
        size = FILE_BYTES if options.seconds_s >= 1.0 else FILE_BYTES // 8
        rng = random.Random(0)
        with (data / "file-0").open("wb") as file:
            for _ in range(0, size, 1 << 20):
                file.write(rng.randbytes(1 << 20))
        artifact = artifact_of_folder(data)
        paired = await measure(folder, artifact, None, pairs=max(options.pairs, 5))
        secure = await measure(folder, artifact, make_identities(folder), pairs=3)
    finally:
        shutil.rmtree(folder)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = [
        (name, x.as_json()["ours"] / 1e9, x.as_json()["baseline"] / 1e9, x.ratio)
        for name, x in (("plain", paired), ("TLS", secure))
    ]
    print_table(("one node to one node, verified", "ours GB/s", "bare GB/s", "ratio"), rows)
    figures = paired.as_json()
    return Result(
        bench="fsd-transfer", ours=figures["ours"], baseline=figures["baseline"], ratio=paired.ratio, unit="bytes/s",
        runs=len(paired.ours), must_reach=MUST_REACH, reached=paired.ratio >= RATIO_MIN,
        extra={"tls": secure.as_json(), "file_bytes": size, "ratio_min": figures["ratio_min"],
               "ratio_max": figures["ratio_max"], "rss_max_mib": round(rss)},
    )  # fmt: skip
