"""`fsd-bittorrent`: one model to 8 nodes on shaped links; ours ÷ libtorrent 2 on the same links.

Both sides: the same namespaces, rates and bytes, one process a node, pieces of 4 MiB, everything in memory, processes
up before the clock starts. The rival's seed is where our origin is, with the same rate; it has no limits, as many
upload slots as peers, TCP alone, and its peers are connected with each other before; "go" connects them with the seed.
Ours forms its swarm and attests the content within the measured time.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from bench_fsd_fanout import FULL_BYTES, NODES, QUICK_BYTES, RATE_BYTES_S
from harness import Options, Paired, Result, print_table, significant
from shaped_cluster import (
    HERE,
    JOB_S,
    ORIGIN,
    START_S,
    Child,
    Links,
    child,
    make_files,
    shaped_cluster,
    shaped_links,
    why_not,
)

MUST_REACH = "ratio <= 1.0"
PIECE_BYTES = 4 << 20
PORT = 6881
PAIRS_MAX = 5


def make_torrent(files: Path, torrent: Path) -> Path:
    """Of the one file in `files`."""
    import libtorrent

    storage = libtorrent.file_storage()
    libtorrent.add_files(storage, str(next(iter(files.iterdir()))))
    made = libtorrent.create_torrent(storage, PIECE_BYTES, libtorrent.create_torrent.v1_only)
    libtorrent.set_piece_hashes(made, str(files))
    torrent.write_bytes(libtorrent.bencode(made.generate()))
    return torrent


async def _meet(peers: dict[str, Child], links: Links) -> None:
    """All peers are connected with each other."""
    async with asyncio.timeout(START_S):
        while True:
            counts = []
            for name, peer in peers.items():
                others = [f"{address}:{PORT}" for other, address in links.nodes.items() if other > name]
                counts.append((await peer.ask(f"peers {' '.join(others)}"))["peers"])
            if min(counts) >= len(peers) - 1:
                return
            await asyncio.sleep(0.2)


async def theirs(links: Links, files: Path, torrent: Path, folder: Path) -> tuple[float, int]:
    """Seconds until the last peer is complete; payload bytes that the seed sent."""
    folder.mkdir()
    started: list[Child] = []

    async def start(namespace: str, host: str, place: Path) -> Child:
        place.mkdir(exist_ok=True)
        command = [sys.executable, str(HERE / "bittorrent_child.py"), str(place), str(torrent), host, str(PORT)]
        made = await child(links.net, namespace, *command)
        started.append(made)
        told = await made.line()
        assert (told["port"], told["complete"]) == (PORT, namespace == ORIGIN), told
        return made

    try:
        seed = await start(ORIGIN, links.origin, files)
        peers = {name: await start(name, address, folder / name) for name, address in links.nodes.items()}
        await _meet(peers, links)
        told = await asyncio.gather(*(peer.ask(f"go {links.origin}:{PORT}", JOB_S) for peer in peers.values()))
        return max(x["seconds"] for x in told), (await seed.ask("sent"))["bytes"]
    finally:
        for one in started:
            await one.end()
        shutil.rmtree(folder)


async def ours(links: Links, files: Path, folder: Path) -> tuple[float, int]:
    """Seconds until the last node is READY; payload bytes that the origin sent."""
    try:
        async with shaped_cluster(links, folder, files) as cluster:
            job = await cluster.job()
            print(
                f"  ours {job.seconds:.1f} s, CPU idle {job.idle:.2f}, waited for a CPU {job.waited_s:.0f} s",
                flush=True,
            )
            return job.seconds, job.origin_bytes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def run(options: Options) -> Result:
    """See the module's docstring."""
    if why := why_not():
        sys.exit(f"fsd-bittorrent: {why}")
    size = FULL_BYTES if options.seconds_s > 1.0 else QUICK_BYTES
    folder = Path(tempfile.mkdtemp(prefix="fsd-bittorrent-", dir="/dev/shm"))
    mine: list[tuple[float, int]] = []
    rival: list[tuple[float, int]] = []
    try:
        files = make_files(folder / "files", size)
        torrent = make_torrent(files, folder / "torrent")
        with shaped_links(NODES, rate_bytes_s=RATE_BYTES_S, origin_bytes_s=2 * RATE_BYTES_S) as links:
            for _ in range(min(max(options.pairs, 3), PAIRS_MAX)):
                mine.append(await ours(links, files, folder / "ours"))
                rival.append(await theirs(links, files, torrent, folder / "theirs"))
                print(f"  libtorrent {rival[-1][0]:.1f} s", flush=True)
    finally:
        shutil.rmtree(folder)
    paired = Paired([x[0] for x in mine], [x[0] for x in rival])
    origin = max(x[1] for x in mine) / size, max(x[1] for x in rival) / size
    figures = paired.as_json()
    bound_s = size / RATE_BYTES_S
    rows = [
        (name, figures[key], figures[key] / bound_s, share)
        for name, key, share in (("ours", "ours", origin[0]), ("libtorrent", "baseline", origin[1]))
    ]
    print_table(("8 nodes, 8 MB/s", "s", "÷ bound", "origin ÷ F"), rows)
    return Result(
        bench="fsd-bittorrent", ours=figures["ours"], baseline=figures["baseline"], ratio=paired.ratio, unit="s",
        runs=len(mine), must_reach=MUST_REACH, reached=paired.ratio <= 1.0,
        extra={"bytes": size, "ratio_min": figures["ratio_min"], "ratio_max": figures["ratio_max"],
               "origin_ours": significant(origin[0]), "origin_libtorrent": significant(origin[1])},
    )  # fmt: skip
