"""Several weight caches, a scheduler stand-in, a real web server as the origin: what must hold whatever breaks."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2, fsd_pb2, weights_pb2
from fal_fsd import assembly, fetching
from fsd_cluster import PIECE, attested, cluster, content_of, contents_of, flipped, listed, run
from fsd_rig import message_of, tree
from origin_servers import Faults, HttpOrigin


@pytest.mark.parametrize("tls", [False, True])
def test_three_nodes_read_a_new_model_once_and_attest_it(tmp_path: Path, tls: bool) -> None:
    contents = contents_of(40 * PIECE + 5, 0, 3 * PIECE)

    async def main(origin: HttpOrigin) -> None:
        async with cluster(tmp_path, tls=tls) as c:
            bare = c.scheduler.registered(await listed(origin))
            before = origin.bytes_sent
            paths = await asyncio.gather(*(c.stage(name, message_of(bare)) for name in c.rigs))
            assert all(tree(path) == contents for path in paths)
            # All is over while leases still cross, so some pieces are read twice; that it is 1.00 for models of a size
            # that matters is measured by the bench fsd-fanout.
            assert origin.bytes_sent - before <= 1.5 * bare.bytes_total
            for told in c.scheduler.attestations:
                assert set(told.signers) <= set(c.rigs)
            await c.scheduler.until(lambda: len(c.scheduler.claims[bare.id]) == bare.layout.count)
            await c.scheduler.until(lambda: all(n.seen[bare.id].ready for n in c.scheduler.nodes.values()))

    with HttpOrigin(contents) as origin:
        run(main(origin))


def test_the_origin_may_go_once_one_node_has_it(tmp_path: Path) -> None:
    contents = contents_of(20 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path) as c:
                known = await attested(c.scheduler, origin, contents)
                await c.stage("n1", message_of(known))
                origin.faults.answers += [(404, {}, "gone")] * 1000
                sent = origin.bytes_sent
                for name in ("n2", "n3"):
                    assert tree(await c.stage(name, message_of(known))) == contents
                assert origin.bytes_sent == sent

        run(main())


def test_nobody_has_it_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_ALONE_AFTER_S", 0.2)
    contents = contents_of(4 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1") as c:
                known = await attested(c.scheduler, origin, contents)
                origin.faults.answers += [(404, {}, "gone")] * 1000
                with pytest.raises(FalError) as caught:
                    await c.stage("n1", message_of(known))
                assert caught.value.code is Code.NOT_FOUND
                origin.faults.answers.clear()
                changed = contents_of(4 * PIECE, seed=2)
                origin.put("file-0.safetensors", changed["file-0.safetensors"])
                with pytest.raises(FalError) as caught:
                    await c.stage("n1", message_of(known))
                assert caught.value.code is Code.CONFLICT
                assert "ORIGIN_CHANGED" in c.scheduler.kinds()

        run(main())


def test_a_byte_flipped_at_the_origin_is_refused(tmp_path: Path) -> None:
    """It published SHA-256; what it sends is something else, under the date that it was listed with."""
    contents = contents_of(6 * PIECE)
    with HttpOrigin(contents, Faults(etag="none")) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1 n2") as c:
                bare = c.scheduler.registered(await listed(origin, sha256=True))
                origin.files["file-0.safetensors"] = flipped(contents["file-0.safetensors"], 3 * PIECE + 7)
                with pytest.raises(FalError, match="the origin says") as caught:
                    await c.stage("n1", message_of(bare))
                assert (caught.value.code, caught.value.field) == (Code.CORRUPT, "file-0.safetensors")
                await c.scheduler.until(lambda: c.scheduler.attestations)
                assert "SHA-256" in c.scheduler.attestations[0].failure
                assert c.rigs["n1"].exposed() == []
                origin.files["file-0.safetensors"] = contents["file-0.safetensors"]
                assert tree(await c.stage("n2", message_of(bare))) == contents

        run(main())


def test_an_attestation_of_other_bytes_than_the_origin_published_is_found_by_every_node(tmp_path: Path) -> None:
    """A liar about the digests of pieces copies the published SHA-256 and gets a signature; nobody exposes a byte."""
    contents = contents_of(6 * PIECE)
    with HttpOrigin(contents, Faults(etag="none")) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1") as c:
                bare = await listed(origin, sha256=True)
                wrong = {**contents, "file-0.safetensors": flipped(contents["file-0.safetensors"], 3 * PIECE + 7)}
                lie = c.scheduler.signed(replace(content_of(bare, wrong), files=bare.files, published=True))
                origin.files["file-0.safetensors"] = wrong["file-0.safetensors"]
                with pytest.raises(FalError, match="is not its content") as caught:
                    await c.stage("n1", message_of(lie))
                assert (caught.value.code, caught.value.field) == (Code.CORRUPT, "file-0.safetensors")
                await c.scheduler.until(lambda: "BAD_ATTESTATION" in c.scheduler.kinds())
                assert c.rigs["n1"].exposed() == []

        run(main())


def test_what_a_node_vouched_for_wrongly_is_thrown_away_and_its_signer_named(tmp_path: Path) -> None:
    contents = contents_of(6 * PIECE)
    with HttpOrigin(contents, Faults(etag="none")) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1 n2") as c:
                s = c.scheduler
                s.attests = False
                bare = s.registered(await listed(origin))
                origin.files["file-0.safetensors"] = flipped(contents["file-0.safetensors"], 3 * PIECE + 7)
                first = asyncio.create_task(c.stage("n1", message_of(bare)))
                await s.until(lambda: s.attestations)
                second = asyncio.create_task(c.stage("n2", message_of(bare)))
                await s.until(lambda: len(s.attestations) >= 2)
                assert {x.signers[n] for x in s.attestations for n in x.piece_signers} == {"n1"}
                origin.files["file-0.safetensors"] = contents["file-0.safetensors"]
                s.attest(content_of(bare, contents))
                for path in await asyncio.gather(first, second):
                    assert tree(path) == contents
                await s.until(lambda: "BAD_PEER" in s.kinds())
                assert {event.subject for event in s.events if event.kind == "BAD_PEER"} == {"n1"}

        run(main())


def test_two_islands_read_the_origin_once_each(tmp_path: Path) -> None:
    contents = contents_of(24 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1 n2 n3 n4") as c:
                c.scheduler.islands = [frozenset({"n1", "n2"})]
                known = await attested(c.scheduler, origin, contents)
                before = origin.bytes_sent
                await asyncio.gather(*(c.stage(name, message_of(known)) for name in c.rigs))
                assert 2.0 <= (origin.bytes_sent - before) / known.bytes_total <= 3.0

        run(main())


def test_a_dead_peer_and_a_scheduler_that_is_away_stop_nobody(tmp_path: Path) -> None:
    contents = contents_of(60 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1 n2") as c:
                known = await attested(c.scheduler, origin, contents)
                origin.faults.stall_after = 8 * PIECE
                async with c.node("n3") as third:
                    c.rigs["n3"] = third
                    await c.scheduler.until(lambda: "n3" in c.scheduler.nodes)
                    stages = {n: asyncio.create_task(c.stage(n, message_of(known))) for n in c.rigs}
                    await c.scheduler.until(
                        lambda: all(known.id in n.seen and n.seen[known.id].wanted for n in c.scheduler.nodes.values())
                    )
                    dying = stages.pop("n3")
                    dying.cancel()
                    await asyncio.gather(dying, return_exceptions=True)
                await c.scheduler.stop()
                origin.faults.stall_after = -1
                origin.faults.go.set()
                for path in await asyncio.gather(*stages.values()):
                    assert tree(path) == contents
                sessions = c.scheduler.sessions
                await c.scheduler.start()
                await c.scheduler.until(lambda: c.scheduler.sessions >= sessions + 2)

                def told_again() -> bool:
                    nodes = c.scheduler.nodes.values()
                    return all(known.id in node.seen and node.seen[known.id].ready for node in nodes)

                await c.scheduler.until(told_again)

        run(main())


def test_wishes_drops_and_revocation(tmp_path: Path) -> None:
    contents = contents_of(5 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1") as c:
                s, rig = c.scheduler, c.rigs["n1"]
                known = await attested(s, origin, contents)
                asked = agent_pb2.Artifact(model="default/m", artifact_id=known.id)  # by name: the manifest is fetched
                s.wish("n1", [weights_pb2.Wished(artifact=asked, tier="disk")])
                await s.until(lambda: known.id in s.nodes["n1"].seen and s.nodes["n1"].seen[known.id].ready)
                assert list(s.nodes["n1"].seen[known.id].pinned_by) == ["wish"]
                s.nodes["n1"].tell(drop=weights_pb2.DropArtifact(id=known.id, reason="evict"))
                s.wish("n1", [])
                await s.until(lambda: not s.nodes["n1"].seen[known.id].pinned_by)
                assert rig.exposed() == [known.manifest_digest]  # it was pinned when it should have gone
                s.nodes["n1"].tell(drop=weights_pb2.DropArtifact(id=known.id, reason="evict"))
                await s.until(lambda: known.id not in s.nodes["n1"].seen)
                assert rig.exposed() == []
                await c.stage("n1", message_of(known))
                s.nodes["n1"].tell(
                    drop=weights_pb2.DropArtifact(id=known.manifest_digest, reason="licence ended", revoked=True)
                )
                await s.until(lambda: s.kinds().count("EVICTED") == 2)
                assert rig.exposed() == []
                for message in (message_of(known), asked):
                    with pytest.raises(FalError, match="licence ended") as caught:
                        await c.stage("n1", message)
                    assert caught.value.code is Code.FAILED_PRECONDITION

        run(main())


@pytest.mark.parametrize("pinned", [True, False])
def test_verify_finds_a_flipped_byte_and_a_peer_repairs_it(
    tmp_path: Path, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "TEND_S", 0.05)  # what nobody wants is ended soon
    contents = contents_of(5 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with cluster(tmp_path, "n1 n2") as c:
                s = c.scheduler
                known = await attested(s, origin, contents)
                paths = [await c.stage(name, message_of(known)) for name in c.rigs]
                origin.faults.answers += [(404, {}, "gone")] * 1000
                if not pinned:
                    await c.rigs["n1"].client.unpin("r")
                file = paths[0] / "file-0.safetensors"
                file.chmod(0o644)
                with file.open("r+b") as out:
                    out.seek(2 * PIECE + 1)
                    out.write(b"\x00\x01\x02\x03")
                s.nodes["n1"].tell(verify=weights_pb2.VerifyArtifact(id=known.id))
                await s.until(lambda: "REPAIRED" in s.kinds())
                assert "CORRUPT_FILE" in s.kinds()
                assert tree(await c.stage("n1", message_of(known))) == contents

        run(main())


def test_two_revisions_at_once_and_shared_files(tmp_path: Path) -> None:
    old, new = contents_of(9 * PIECE, 7 * PIECE), contents_of(9 * PIECE, 7 * PIECE)
    new["file-1.safetensors"] = random.Random(5).randbytes(7 * PIECE)
    with HttpOrigin(old) as first, HttpOrigin(new) as second:

        async def main() -> None:
            async with cluster(tmp_path, "n1 n2") as c:
                one = await attested(c.scheduler, first, old)
                two = await attested(c.scheduler, second, new)
                jobs = [c.stage(name, message_of(artifact)) for name in c.rigs for artifact in (one, two)]
                paths = await asyncio.gather(*jobs)
                assert [tree(path) for path in paths] == [old, new, old, new]

        run(main())


def test_a_full_disk_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of(12 * PIECE)
    full = True
    from fal_fsd.disk.writer import Writer

    real = Writer.write

    def write(self: Any, data: memoryview) -> None:
        if full:
            raise FalError(Code.NO_CAPACITY, "the cache disk is full", remedy="Free some.")
        real(self, data)

    monkeypatch.setattr(Writer, "write", write)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            nonlocal full
            async with cluster(tmp_path, "n1") as c:
                known = await attested(c.scheduler, origin, contents)
                request = fsd_pb2.StageRequest(artifact=message_of(known), owner="r")
                async for told in c.rigs["n1"].stub.Stage(request):
                    if "the cache disk is full" in told.waits_for:
                        full = False
                    if told.ready:
                        assert tree(Path(told.path)) == contents
                assert not full
                assert "DISK_FULL" in c.scheduler.kinds()

        run(main())
