"""Swarms whose members lie, die, cannot be reached or are slow: the others have every byte, and the right ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import pytest

from fake_cache_scheduler import FakeCacheScheduler
from fal_contract.artifact import Artifact
from fal_fsd.client import CacheClient
from fsd_cluster import PIECE, Cluster, attested, cluster, contents_of, flipped, run
from fsd_rig import answered, message_of, start_process, tree
from origin_servers import Faults, HttpOrigin

PIN = "runner-1"


async def alone_with_it(c: Cluster, origin: HttpOrigin, artifact: Artifact, *names: str) -> None:
    """These nodes have it all, and then the origin is gone."""
    for name in names:
        await c.stage(name, message_of(artifact))
    origin.faults.answers += [(404, {}, "gone")] * 10_000


def spoil(path: Path, contents: bytes, places: Iterable[int]) -> None:
    """Flip bytes on disk of what was checked, as a node that lies would send them."""
    path.chmod(0o644)
    for at in places:
        contents = flipped(contents, at)
    path.write_bytes(contents)


def test_a_node_that_sends_wrong_bytes_is_dropped_and_named_and_the_others_complete(tmp_path: Path) -> None:
    contents = contents_of(30 * PIECE)
    ((name, data),) = contents.items()
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1 n2 n3 n4") as c:
                known = await attested(c.scheduler, origin, contents)
                await alone_with_it(c, origin, known, "n1", "n2")
                where = await c.stage("n1", message_of(known))
                spoil(where / name, data, range(11, len(data), PIECE))
                paths = await asyncio.gather(*(c.stage(node, message_of(known)) for node in ("n3", "n4")))
                assert all(tree(path) == contents for path in paths)
                await c.scheduler.until(lambda: "BAD_PEER" in c.scheduler.kinds())
                told = [event.subject for event in c.scheduler.events if event.kind == "BAD_PEER"]
                assert told == ["n1"] * len(told)
                assert len(told) <= 2  # one a node

        run(main())


def test_a_holder_that_nobody_can_dial_dials_itself(tmp_path: Path) -> None:
    """As behind NAT: what it tells as its address leads nowhere."""
    contents = contents_of(12 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n2") as c:
                await c.add("n1", addresses=["lan=127.0.0.1:1"])
                known = await attested(c.scheduler, origin, contents)
                await alone_with_it(c, origin, known, "n1")
                assert tree(await c.stage("n2", message_of(known))) == contents

        run(main())


def test_a_slow_holder_is_left_for_a_fast_one(tmp_path: Path) -> None:
    contents = contents_of(64 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n2 n3") as c:
                await c.add("n1", node_bytes_s=2 * PIECE)
                known = await attested(c.scheduler, origin, contents)
                await alone_with_it(c, origin, known, "n2", "n1")
                assert tree(await c.stage("n3", message_of(known))) == contents
                net = c.rigs["n3"].cache.net
                assert net is not None
                came = {peer.node_id: peer.bytes_received for peer in net.status().peers}
                assert came["n1"] < came["n2"] / 2

        run(main())


@pytest.mark.slow
def test_killed_at_random_moments_in_a_swarm(tmp_path: Path, scale: Callable[[int], int], base_seed: int) -> None:
    """kill -9 of a node that fetches from the origin and from peers: what is ready is right, its pin is never lost."""
    contents = contents_of(400 * PIECE)
    rng = Random(base_seed)
    with HttpOrigin(contents, Faults()) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n2 n3") as c:
                known = await attested(c.scheduler, origin, contents)
                others = [asyncio.create_task(c.stage(name, message_of(known))) for name in ("n2", "n3")]
                folder = tmp_path / "n1"
                folder.mkdir()
                for _ in range(scale(100)):
                    await one_life(c.scheduler, folder, known, rng.uniform(0.0, 0.4))
                    for ready in (folder / "state" / "models").glob("*"):
                        assert tree(ready) == contents
                await asyncio.gather(*others)
                assert tree(await last_life(c.scheduler, folder, known)) == contents

        run(main())


def arguments(scheduler: FakeCacheScheduler) -> list[str]:
    identity = str(scheduler.identity("n1"))
    given = ["--schedulers", scheduler.address, "--identity", identity, "--mount", "off", "--bulk-host", "127.0.0.1"]
    return [*given, "--addresses", "lan=127.0.0.1"]


async def one_life(scheduler: FakeCacheScheduler, folder: Path, known: Artifact, seconds: float) -> None:
    """A process that is asked for the artifact, once, and killed some time after that."""
    process = start_process(folder, *arguments(scheduler))
    client = CacheClient(folder / "s")
    try:
        await answered(client, process)
        told = await client.artifacts()
        assert all(PIN in x.pinned_by for x in told), told  # of earlier lives
        staging = asyncio.create_task(client.stage(message_of(known), PIN))
        await asyncio.wait([staging], timeout=seconds)
        process.kill()
        await asyncio.gather(staging, return_exceptions=True)
    finally:
        process.kill()
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()
        await client.close()


async def last_life(scheduler: FakeCacheScheduler, folder: Path, known: Artifact) -> Path:
    """The last process brings it to its end."""
    process = start_process(folder, *arguments(scheduler))
    client = CacheClient(folder / "s")
    try:
        await answered(client, process)
        path = await client.stage(message_of(known), PIN)
        (found,) = await client.artifacts()
        assert list(found.pinned_by) == [PIN]
        return path
    finally:
        process.kill()
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()
        await client.close()
