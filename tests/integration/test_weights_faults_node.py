"""Bad bytes, full disks, withdrawn models, races, and a scheduler that is gone: real caches, a real scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2, cluster_pb2, fsd_pb2, state_pb2
from fal_fsd.disk.store import RESERVE_BYTES
from fsd_rig import tree
from origin_servers import HttpOrigin, HubServer
from weights_rig import PIECE, Chain, Node, Shared, asked, contents_of, doing, flip_on_disk, write_secret


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("w"), "n1 n2 n3")
    yield made
    made.close()


def test_what_came_from_where_is_told_for_good(shared: Shared) -> None:
    contents = contents_of(2 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model = await c.add("counted", origin.url)
            await c.stage("n1", model)
            await c.stage("n2", model)

            async def told() -> bool:
                found = {name: told.cached for name, told in (await c.where("counted")).items()}
                counts = {name: (x.bytes_from_origin, x.bytes_from_peers) for name, x in found.items() if x.ready}
                return counts == {"n1": (model.bytes, 0), "n2": (0, model.bytes)}

            await c.until(told)
            await c.nodes["n2"].kill()
            await c.nodes["n2"].start()
            await c.until(lambda: c.linked("n2"))
            await c.until(told)
            assert (await c.nodes["n2"].cached(model)).bytes_from_peers == model.bytes

        shared.run(main)


def test_a_peer_that_sends_a_flipped_byte_is_reported_and_not_believed(shared: Shared) -> None:
    contents = contents_of(3 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model = await c.add("lied-about", origin.url)
            flip_on_disk(await c.stage("n1", model) / "file-0.safetensors", PIECE + 3)
            assert tree(await c.stage("n2", model)) == contents
            told = await c.until(lambda: c.events("BAD_PEER"))
            assert c.nodes["n1"].node_id in {event.subject for event in told}
            await c.nodes["n2"].kill()  # or the next tests find n1 banned for ten minutes
            await c.nodes["n2"].start()
            await c.until(lambda: c.linked("n2"))

        shared.run(main)


def test_a_byte_flipped_on_the_disk_is_found_by_verify_and_on_first_use(shared: Shared) -> None:
    contents = contents_of(3 * PIECE, 100)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model = await c.add("rotten", origin.url)
            first, second = [await c.stage(name, model) for name in ("n1", "n2")]
            origin.faults.answers += [(404, {}, "gone")] * 1000
            flip_on_disk(first / "file-0.safetensors", 2 * PIECE + 1)
            await c.stub.VerifyModel(cluster_pb2.EvictModelRequest(id="t/rotten", nodes=["n1"]), timeout=20)
            await c.until(lambda: repaired(c))
            assert tree(await c.stage("n1", model)) == contents
            await c.nodes["n2"].kill()
            flip_on_disk(second / "file-1.safetensors", 7)
            await c.nodes["n2"].start()
            await c.until(lambda: c.linked("n2"))
            assert tree(await c.stage("n2", model)) == contents
            assert len(await c.events("CORRUPT_FILE")) >= 2

        shared.run(main)


async def repaired(c: Chain) -> bool:
    return bool(await c.events("REPAIRED"))


def test_pins_are_let_go_by_their_owner_alone(shared: Shared) -> None:
    contents = contents_of(PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model, node = await c.add("pinned", origin.url), c.nodes["n1"]
            path = await c.stage("n1", model, "runner-1")
            await node.client.unpin("runner-2")
            await c.stub.StageModel(cluster_pb2.StageModelRequest(id=model.id, target="node/n1"), timeout=20)

            async def wished() -> bool:
                return "wish" in (await node.cached(model)).pinned_by

            await c.until(wished)
            await c.stub.UnstageModel(cluster_pb2.UnstageModelRequest(id=model.id), timeout=20)

            async def runners_alone() -> bool:
                return list((await node.cached(model)).pinned_by) == ["runner-1"]

            await c.until(runners_alone)
            await c.stub.EvictModel(cluster_pb2.EvictModelRequest(id=model.id), timeout=20)
            await node.kill()
            await node.start()
            await c.until(lambda: c.linked("n1"))
            assert list((await node.cached(model)).pinned_by) == ["runner-1"]
            assert tree(path) == contents
            await node.client.unpin("runner-1")
            await c.stub.EvictModel(cluster_pb2.EvictModelRequest(id=model.id), timeout=20)

            async def gone() -> bool:
                return not (await node.cached(model)).artifact_id

            await c.until(gone)
            assert not path.exists()

        shared.run(main)


def test_a_withdrawn_model_leaves_a_node_that_was_off(shared: Shared) -> None:
    contents = contents_of(PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model, node = await c.add("licensed", origin.url), c.nodes["n3"]
            path = await c.stage("n3", model, "")
            await node.kill()
            request = cluster_pb2.RevokeModelRequest(id=model.id, reason="the licence ended")
            await c.stub.RevokeModel(request, timeout=20)
            assert path.exists()
            await node.start()

            async def gone() -> bool:
                return not path.exists()

            await c.until(gone)
            with pytest.raises(FalError, match="the licence ended"):
                await c.stage("n3", model)
            with pytest.raises(FalError, match=r"withdrawn|licence") as caught:
                await c.add("licensed", origin.url)
            assert caught.value.remedy

        shared.run(main)


def test_two_revisions_of_one_branch_race(shared: Shared) -> None:
    first, second = contents_of(2 * PIECE, 10), contents_of(2 * PIECE, 10)
    second["file-1.safetensors"] = first["file-1.safetensors"]
    with HubServer() as hub:

        async def main(c: Chain) -> None:
            write_secret(c.secrets, f'[hf]\nendpoint = "{hub.endpoint}"\n')
            hub.add("org/raced", first)
            one = await c.add("raced-1", "hf://org/raced", revision="main")
            hub.cdn.faults.stall_after = PIECE // 2
            async with doing(c.stage("n1", one)) as staging:
                hub.add("org/raced", second)
                two = await c.add("raced-2", "hf://org/raced", revision="main")
                assert one.resolved_uri != two.resolved_uri
                hub.cdn.faults.stall_after = -1
                hub.cdn.faults.go.set()
                paths = await asyncio.gather(c.stage("n1", two), c.stage("n2", one), c.stage("n2", two))
                assert tree(await staging) == first
                assert [tree(path) for path in paths] == [second, first, second]
            with pytest.raises(FalError) as caught:
                await c.add("raced-1", "hf://org/raced", revision="main")
            assert caught.value.code is Code.ALREADY_EXISTS

        shared.run(main)


def test_a_small_adapter_overtakes_checkpoints_that_do_not_move(shared: Shared) -> None:
    large, small = contents_of(2 * PIECE), contents_of(1000)
    with HttpOrigin(large) as slow, HttpOrigin(small) as quick:

        async def main(c: Chain) -> None:
            slow.put_list()
            quick.put_list()
            checkpoint = await c.add("big", slow.url)
            adapter = await c.add("adapter", quick.url, kind="lora")
            slow.faults.stall_after = 0
            async with doing(c.stage("n1", checkpoint)) as staging:
                assert tree(await c.stage("n1", adapter)) == small
                assert not staging.done()
                slow.faults.stall_after = -1
                slow.faults.go.set()
                assert tree(await staging) == large

        shared.run(main)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../outside", "a//b", "a\\b/..", ".", ""])
def test_paths_that_lead_elsewhere_are_refused_at_both_ends(shared: Shared, path: str) -> None:
    contents = contents_of(100)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            data = contents["file-0.safetensors"]
            one = {"path": path, "size_bytes": 100, "sha256": hashlib.sha256(data).hexdigest()}
            origin.put("falctl-files.json", json.dumps({"files": [one]}).encode())
            with pytest.raises(FalError) as caught:
                await c.add("elsewhere", origin.url)
            assert caught.value.code in (Code.INVALID, Code.CORRUPT)
            manifest = state_pb2.ModelManifest(
                files=[state_pb2.ModelFile(path=path, bytes=100, sha256=hashlib.sha256(data).digest())]
            )
            message = agent_pb2.Artifact(
                model="t/e", kind="model", uri=origin.url, manifest_digest="a" * 64, bytes=100, manifest=manifest
            )
            node = c.nodes["n1"]
            before = node.exposed()
            with pytest.raises(FalError) as caught:
                await node.client.stage(message, "runner")
            assert caught.value.code in (Code.INVALID, Code.CORRUPT)
            assert node.exposed() == before

        shared.run(main)


def test_a_file_named_twice_is_refused(shared: Shared) -> None:
    with HttpOrigin(contents_of(100)) as origin:

        async def main(c: Chain) -> None:
            one = {"path": "file-0.safetensors", "size_bytes": 100}
            origin.put("falctl-files.json", json.dumps({"files": [one, one]}).encode())
            with pytest.raises(FalError, match="file-0") as caught:
                await c.add("twice", origin.url)
            assert caught.value.code in (Code.INVALID, Code.CORRUPT)

        shared.run(main)


def test_a_link_out_of_a_folder_is_refused(shared: Shared, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w.safetensors").symlink_to(tmp_path / "secret")

    async def main(c: Chain) -> None:
        with pytest.raises(FalError, match=r"w\.safetensors") as caught:
            await c.add("linked", (tmp_path / "m").as_uri())
        assert caught.value.code is Code.INVALID

    shared.run(main)


def test_a_model_larger_than_the_quota_is_refused_with_a_remedy(shared: Shared) -> None:
    contents = contents_of(3 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model = await c.add("huge", origin.url)
            node = await c.node("small", "--disk-bytes-max", str(2 * PIECE))
            with pytest.raises(FalError) as caught:
                await node.client.stage(asked(model), "runner")
            assert caught.value.code is Code.NO_CAPACITY
            assert caught.value.remedy
            assert node.exposed() == []
            await node.kill()

        shared.run(main)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is a tmpfs that is mounted")
def test_a_disk_that_fills_half_way_is_waited_out(shared: Shared) -> None:
    contents = contents_of(6 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model = await c.add("cramped", origin.url)
            state = c.root / "cramped" / "state"
            state.mkdir(parents=True)
            await command("mount", "-t", "tmpfs", "-o", f"size={RESERVE_BYTES + 8 * PIECE}", "none", str(state))
            try:
                node = await c.node("cramped", "--origin-bytes-s", str(PIECE))  # slow enough to be met half way
                await fill_and_free(c, node, model)
                assert tree(await node.client.stage(asked(model), "runner")) == contents
                await node.close()
            finally:
                await command("umount", "-l", str(state))

        shared.run(main)


def fill(file: Path) -> None:
    """Until nothing goes into the disk any more."""
    with file.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(bytes(1 << 20)):
            pass


async def command(*words: str) -> None:
    assert await (await asyncio.create_subprocess_exec(*words)).wait() == 0, words


async def fill_and_free(c: Chain, node: Node, model: state_pb2.Model) -> None:
    """Half of it is here when the disk fills; nothing is READY until there is room again, then all of it."""
    filler = node.folder / "state" / "filler"
    request = fsd_pb2.StageRequest(artifact=asked(model), owner="runner")
    waited = False
    async for told in node.stub.Stage(request, timeout=80):
        if told.bytes_done >= PIECE and not filler.exists() and not waited:
            fill(filler)
        if "room on the disk" in told.waits_for and not waited:
            waited = True
            assert not told.ready
            assert node.exposed() == []
            filler.unlink()
    assert waited
    assert [e for e in await c.events("DISK_FULL") if e.subject == model.id]


def test_what_is_under_way_ends_well_without_a_scheduler(shared: Shared) -> None:
    """Attested content becomes READY; what nobody attested waits for the scheduler and is READY once it is back."""
    known, fresh = contents_of(3 * PIECE), contents_of(3 * PIECE)
    with HttpOrigin(known) as one, HttpOrigin(fresh) as two:

        async def main(c: Chain) -> None:
            for origin in (one, two):
                origin.put_list()
            attested, registered = await c.add("known", one.url), await c.add("fresh", two.url)
            await c.stage("n3", attested, "")
            await c.stub.EvictModel(cluster_pb2.EvictModelRequest(id=attested.id), timeout=20)

            async def nowhere() -> bool:
                return not (await c.nodes["n3"].cached(attested)).artifact_id

            await c.until(nowhere)
            attested = await c.model("known")
            one.faults.stall_after = two.faults.stall_after = PIECE // 2
            async with doing(staged(c, attested)) as first, doing(staged(c, registered)) as second:

                async def moving() -> bool:
                    return min(one.bytes_sent, two.bytes_sent) >= PIECE // 4

                await c.until(moving)
                c.scheduler.end(signal.SIGKILL)
                for origin in (one, two):
                    origin.faults.stall_after = -1
                    origin.faults.go.set()
                assert await first == [known, known]

                async def waits() -> bool:
                    return "attest" in (await c.nodes["n1"].cached(registered)).waits_for

                await c.until(waits)
                assert not second.done()
                await c.restart_scheduler()
                assert await second == [fresh, fresh]

        shared.run(main)


async def staged(c: Chain, model: state_pb2.Model) -> list[dict[str, bytes]]:
    return [tree(path) for path in await asyncio.gather(c.stage("n1", model), c.stage("n2", model))]
