"""`fsd-read`: a finished file as a container in a user namespace sees it ÷ the backing file directly.

Ours: a model that was staged through the store, attached to a live container by the oci driver (a detached read-only
tree in its models directory), read by a program in it. Baseline: the same program on the host, on the blob. Both read
in turns, who is first changes with every pair. Rows: read(2) in 1 MiB blocks, as dd does, and a private mapping that is
copied out; warm (in the page cache) and cold (dropped from it before each reading). The figure is the least of
the four medians. The floor is 1: nothing of ours is on the path, which is what this shows.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from blake3 import blake3
from harness import Options, Paired, Result, print_table, significant

from contract.driver_cases import oci_missing
from fal_contract.artifact import Artifact, ArtifactFile, listing_id
from fal_contract.clock import SystemClock
from fal_fsd.disk.store import DiskStore
from fal_runtime import host_image
from fal_runtime.driver import ContainerSpec
from fal_runtime.oci.driver import OciDriver

MUST_REACH = "ratio >= 0.95"
RATIO_MIN = 0.95
SIZE_BYTES = 256 << 20
PIECE_BYTES = 16 << 20
WARM_PASSES = 2
READS_PER_PAIR = 3  # a reading takes a tenth of a second: take more of them than other benchmarks take runs
TIMEOUT_S = 60.0
PYTHON = host_image.this_layout().python
PROGRAM = """
import json, mmap, os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(1)
print("up", flush=True)
lines, out = (lambda s: (s.makefile("r"), s))(listener.accept()[0])
block = bytearray(1 << 20)

def read(path):
    fd = os.open(path, os.O_RDONLY)
    while os.readv(fd, [block]):
        pass
    os.close(fd)

def copy(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as view:
        with memoryview(view) as whole:
            for at in range(0, len(whole), len(block)):
                block[:] = whole[at : at + len(block)]

for line in lines:
    mode, passes, path = json.loads(line)
    work = {"dd": read, "mmap": copy}[mode]
    begun = time.perf_counter()
    for _ in range(passes):
        work(path)
    out.sendall(f"{time.perf_counter() - begun}\\n".encode())
"""


@dataclass(frozen=True, slots=True)
class Reader:
    """The program, wherever it runs, and the file as it sees it."""

    lines: asyncio.StreamReader
    out: asyncio.StreamWriter
    path: str

    async def read(self, mode: str, passes: int) -> float:
        """Bytes a second."""
        self.out.write(json.dumps([mode, passes, self.path]).encode() + b"\n")
        async with asyncio.timeout(TIMEOUT_S):
            return passes * SIZE_BYTES / float(await self.lines.readline())


async def connect(socket: Path, path: str) -> Reader:
    """Once the program is up."""
    lines, out = await asyncio.open_unix_connection(str(socket))
    return Reader(lines, out, path)


def staged(store: DiskStore) -> Artifact:
    """A finished model of one file."""
    piece, hasher = random.Random(1).randbytes(PIECE_BYTES), sha256()
    for _ in range(0, SIZE_BYTES, PIECE_BYTES):
        hasher.update(piece)
    files = (ArtifactFile("weights", SIZE_BYTES, "1", hasher.digest()),)
    digests = (blake3(piece).digest(),) * (SIZE_BYTES // PIECE_BYTES)
    artifact = Artifact(listing_id("s3://b/m", files), "model", "s3://b/m", PIECE_BYTES, files, digests)
    part = store.open_part(artifact, model="bench/m", owner="bench")
    for number in range(artifact.layout.count):
        writer = part.writer(number, source="bench")
        assert writer is not None
        writer.write(memoryview(piece))
        writer.finish()
    store.finish(artifact.id)
    part.close()
    return artifact


def share_cpu(pid: int, other: int) -> None:
    """Process `pid` gets its share of a busy machine from the cgroup of `other`: only one of them works at a time."""
    for line in Path(f"/proc/{other}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder = Path("/sys/fs/cgroup") / (controllers and "cpu") / path.lstrip("/")
        if "cpu" in controllers.split(",") or (not controllers and (folder / "cpu.weight").exists()):
            (folder / "cgroup.procs").write_text(str(pid))


@asynccontextmanager
async def on_host(folder: Path, path: Path, container_pid: int) -> AsyncIterator[Reader]:
    """The program as a plain process."""
    socket = folder / "host.sock"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(socket), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        share_cpu(process.pid, container_pid)
        reader = await connect(socket, str(path))
        yield reader
        reader.out.close()
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def in_container(folder: Path, tree: Path) -> AsyncIterator[tuple[Reader, bool, int]]:
    """The program in a container, the model attached to it while it runs; whether it has a user namespace; its pid."""
    driver = OciDriver(folder / "state")
    sockets = folder / "sockets"
    command = (PYTHON, "-c", f"import os, sys; sys.argv[1:] = [os.environ['FAL_SOCKET_DIR'] + '/s']\n{PROGRAM}")
    spec = ContainerSpec(
        id=f"read-{os.urandom(4).hex()}", command=command, socket_dir=sockets, models_dir=folder / "models"
    )
    try:
        capabilities = await driver.probe()
        await driver.create(spec)
        await driver.start(spec.id)
        async with asyncio.timeout(TIMEOUT_S):
            async for line in driver.logs(spec.id, tail_lines=1, follow=True):
                if line.text != "up":
                    raise SystemExit(f"fsd-read: the container says {line.text}")
                break
        inside = await driver.attach_model(spec.id, "m", tree)
        reader = await connect(sockets / "s", f"{inside}/weights")
        status = await driver.status(spec.id)
        assert status is not None
        assert status.pid is not None
        yield reader, capabilities.user_namespaces, status.pid
        reader.out.close()
    finally:
        await driver.clean(frozenset())
        driver.close()


def drop(path: Path) -> None:
    """Out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


async def measure(ours: Reader, baseline: Reader, mode: str, cold: bool, pairs: int, blob: Path) -> Paired:
    """In turns; the first pair is not counted."""
    figures: dict[Reader, list[float]] = {ours: [], baseline: []}
    for number in range(READS_PER_PAIR * pairs + 1):
        for reader in (ours, baseline) if number % 2 else (baseline, ours):
            if cold:
                await asyncio.to_thread(drop, blob)
            rate = await reader.read(mode, 1 if cold else WARM_PASSES)
            if number:
                figures[reader].append(rate)
    return Paired(figures[ours], figures[baseline])


async def run(options: Options) -> Result:
    """All four rows."""
    if why := oci_missing():
        raise SystemExit(f"fsd-read: not measured, it {why}")
    with tempfile.TemporaryDirectory(prefix="bf-") as name:
        folder = Path(name)
        store = DiskStore(folder / "s", bytes_max=None, clock=SystemClock())
        try:
            artifact = await asyncio.to_thread(staged, store)
            blob, tree = store.layout.blob(artifact.files[0].sha256.hex()), store.path_of(artifact.id)
            assert tree is not None
            async with (
                in_container(folder, tree) as (ours, user_namespace, pid),
                on_host(folder, blob, pid) as baseline,
            ):
                found = {
                    (mode, cold): await measure(ours, baseline, mode, cold, options.pairs, blob)
                    for cold in (False, True)
                    for mode in ("dd", "mmap")
                }
        finally:
            store.close()
    names = {key: f"{key[0]} {'cold' if key[1] else 'warm'}" for key in found}
    print_table(
        ("GB/s", "in a container", "backing file", "ratio"),
        [(names[key], x.as_json()["ours"] / 1e9, x.as_json()["baseline"] / 1e9, x.ratio) for key, x in found.items()],
    )
    worst = min(found.values(), key=lambda x: x.ratio)
    figures = worst.as_json()
    return Result(
        bench="fsd-read",
        ours=figures["ours"],
        baseline=figures["baseline"],
        ratio=worst.ratio,
        unit="bytes/s",
        runs=len(worst.ours),
        must_reach=MUST_REACH,
        reached=worst.ratio >= RATIO_MIN,
        extra={
            "user_namespace": user_namespace,
            **{names[key].replace(" ", "_"): significant(x.ratio) for key, x in found.items()},
        },
    )
