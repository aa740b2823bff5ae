"""A cache's session with the scheduler: nothing that changes beside it is lost, and nothing ends it for good."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fal_contract.artifact import Artifact, from_manifest
from fal_contract.v1 import agent_pb2, weights_pb2
from fal_fsd import fetching, wishes
from fal_fsd.core.eviction import value
from fal_fsd.disk.room import candidates
from fal_fsd.disk.store import DiskStore
from fsd_cluster import PIECE, cluster, content_of, contents_of, listed, run
from fsd_rig import plain_message, write
from origin_servers import HttpOrigin


def test_what_changes_between_hello_and_welcome_is_told(tmp_path: Path) -> None:
    contents = {"a": b"x" * 5000}
    message = plain_message(write(tmp_path / "model", contents), contents)

    async def main() -> None:
        async with cluster(tmp_path, "n1") as c:
            s = c.scheduler
            await s.stop()
            s.welcomes.clear()
            await s.start()
            await s.until(lambda: "n1" in s.nodes)  # it has said Hello, and waits
            await c.stage("n1", message)
            s.welcomes.set()
            await s.until(lambda: [x for x in s.nodes["n1"].seen.values() if x.ready])

    run(main())


def test_a_new_leader_hears_again_who_cannot_be_reached_and_how_fast_bytes_come(tmp_path: Path) -> None:
    rate = weights_pb2.LinkRate(source="origin:o", rate_bytes_s=7)

    async def main() -> None:
        async with cluster(tmp_path, "n1") as c:
            s, around = c.scheduler, c.rigs["n1"].cache.around
            around.unreachable = lambda: ("n9",)
            around.link_rates = lambda: [rate]
            c.rigs["n1"].cache.news.wake()

            def told() -> bool:
                peers = [x for x in s.reports if x.unreachable_told and list(x.unreachable) == ["n9"]]
                return bool(peers) and any(rate in x.links for x in s.reports)

            await s.until(told)
            await s.stop()
            s.reports.clear()
            await s.start()
            await s.until(told)

    run(main())


def test_a_message_that_cannot_be_written_down_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    async def main() -> None:
        async with cluster(tmp_path, "n1") as c:
            s = c.scheduler
            with monkeypatch.context() as patch:
                patch.setattr(DiskStore, "artifact", full)
                s.nodes["n1"].tell(want_manifest=weights_pb2.WantManifest(id="0" * 64))
                s.nodes["n1"].tell(drop=weights_pb2.DropArtifact(id="0" * 64, reason="x"))
                c.rigs["n1"].cache.news.event("MARK", "n1", "a report after it")
                await s.until(lambda: "MARK" in s.kinds())
            assert s.sessions == 1

    run(main())


def test_a_mistake_of_ours_ends_a_session_and_another_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with cluster(tmp_path, "n1") as c:
            s, node = c.scheduler, c.rigs["n1"].cache.node
            broken = asyncio.Event()

            async def take() -> list[weights_pb2.CacheUp]:
                monkeypatch.undo()
                broken.set()
                raise RuntimeError("dictionary changed size during iteration")

            monkeypatch.setattr(node, "take", take)
            node.news.event("LOST", "n1", "nobody hears this one")
            await broken.wait()
            await s.until(lambda: s.sessions == 2)
            node.news.event("MARK", "n1", "but this one")
            await s.until(lambda: "MARK" in s.kinds())

    run(main())


def test_an_older_set_of_wishes_undoes_nothing_of_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {name: {"f": name.encode() * 5000} for name in "ab"}
    messages = {name: plain_message(write(tmp_path / name, contents[name]), contents[name]) for name in "ab"}
    wished = {name: weights_pb2.Wished(artifact=message, tier="disk") for name, message in messages.items()}

    async def main() -> None:
        async with cluster(tmp_path, "n1") as c:
            s, node = c.scheduler, c.rigs["n1"].cache.node
            held, go, resolve = asyncio.Event(), asyncio.Event(), node.resolve

            async def slow(message: agent_pb2.Artifact) -> Artifact:
                if message.manifest_digest == messages["a"].manifest_digest:
                    held.set()
                    await go.wait()
                return await resolve(message)

            monkeypatch.setattr(node, "resolve", slow)
            s.wish("n1", [wished["a"]])
            await held.wait()
            s.wish("n1", [wished["b"], wished["a"]])
            node.news.event("MARK", "n1", "both sets are here")
            await s.until(lambda: "MARK" in s.kinds())
            go.set()
            await s.until(lambda: sum(x.ready for x in s.nodes["n1"].seen.values()) == 2)
            await s.until(lambda: all(list(x.pinned_by) == ["wish"] for x in s.nodes["n1"].seen.values()))
            s.wish("n1", [])
            await s.until(lambda: not any(x.pinned_by for x in s.nodes["n1"].seen.values()))

    run(main())


def test_what_leaves_the_memory_makes_room_for_what_comes_into_it(tmp_path: Path) -> None:
    contents = {name: {"f": name.encode() * 20_000} for name in "ab"}
    messages = {name: plain_message(write(tmp_path / name, contents[name]), contents[name]) for name in "ab"}

    async def main() -> None:
        async with cluster(tmp_path, "") as c:
            s, rig = c.scheduler, await c.add("n1", memory_bytes_max=30_000)  # for one of them
            if why := rig.cache.around.memory.available:
                pytest.skip(f"nothing can be locked here: {why}")

            def in_memory() -> list[str]:
                return [one.manifest_digest for one in s.nodes["n1"].seen.values() if one.bytes_memory]

            for hot, cold in ("ab", "ba", "ab"):
                tiers = {hot: "memory", cold: "disk"}  # what comes into the memory is followed first
                s.wish("n1", [weights_pb2.Wished(artifact=messages[x], tier=tier) for x, tier in tiers.items()])
                digest = messages[hot].manifest_digest
                await s.until(lambda digest=digest: in_memory() == [digest])  # type: ignore[misc]
            assert "NOT_IN_MEMORY" not in s.kinds()

    run(main())


def test_values_that_the_scheduler_tells_are_those_that_eviction_goes_by(tmp_path: Path) -> None:
    contents = {name: {"f": name.encode() * 5000} for name in "ab"}
    messages = {name: plain_message(write(tmp_path / name, contents[name]), contents[name]) for name in "ab"}

    async def main() -> None:
        async with cluster(tmp_path, "n1") as c:
            s, store = c.scheduler, c.rigs["n1"].cache.store
            for message in messages.values():
                await c.stage("n1", message, "")
            ids = {name: store.catalog.resolve(message.manifest_digest)[0] for name, message in messages.items()}
            for kept, gone in ("ab", "ba"):
                values = {ids[kept]: 1000, ids[gone]: 1}
                s.nodes["n1"].tell(values=weights_pb2.ArtifactValues(values=values))
                c.rigs["n1"].cache.node.news.event("MARK", "n1", f"{kept} is told")
                await s.until(lambda kept=kept: [x for x in s.events if x.message == f"{kept} is told"])  # type: ignore[misc]
                assert [one.id for one in sorted(candidates(store), key=value)] == [ids[gone], ids[kept]]

    run(main())


def test_a_wish_that_could_not_be_followed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wishes, "RETRY_S", 0.2)
    monkeypatch.setattr(fetching, "_ALONE_AFTER_S", 0.2)
    contents = contents_of(3 * PIECE)

    async def main(origin: HttpOrigin) -> None:
        async with cluster(tmp_path, "n1") as c:
            s = c.scheduler
            known = content_of(await listed(origin), contents)
            asked = agent_pb2.Artifact(model="default/m", artifact_id=known.id)
            s.wish("n1", [weights_pb2.Wished(artifact=asked, tier="disk")])
            await s.until(lambda: "WISH_FAILED" in s.kinds())
            origin.faults.answers += [(403, {}, "no")] * 2
            s.signed(known)
            await s.until(lambda: known.id in s.nodes["n1"].seen and s.nodes["n1"].seen[known.id].ready)

    with HttpOrigin(contents) as origin:
        run(main(origin))


def test_what_a_pack_task_left_is_told_with_the_digests_of_its_pieces_until_it_is_signed(tmp_path: Path) -> None:
    piece = 256 << 10
    contents = {"config.json": b"{}", "image.erofs": bytes(range(256)) * (5 * piece // 512)}
    folder = write(tmp_path / "packed", contents)

    async def main() -> None:
        async with cluster(tmp_path, "") as c:
            s = c.scheduler

            async def told(artifact_id: str) -> Artifact:
                s.manifests_told.clear()
                s.nodes["n1"].tell(want_manifest=weights_pb2.WantManifest(id=artifact_id))
                await s.until(lambda: s.manifests_told)
                return from_manifest(s.manifests_told[0])

            async with c.node("n1") as rig:
                await s.until(lambda: "n1" in s.nodes)
                taken = from_manifest(
                    await rig.client.ingest(
                        folder, model="default/img", bytes_max=1 << 30, owner="build r", keep_s=60, kind="image"
                    )
                )
                assert (taken.kind, taken.piece_bytes, taken.layout.count) == ("image", piece, 4)
                assert await told(taken.id) == taken
            await s.until(lambda: "n1" not in s.nodes)
            async with c.node("n1") as rig:  # another process: only its disk knows
                await s.until(lambda: "n1" in s.nodes)
                assert await told(taken.id) == taken
                assert not rig.exposed()
                s.attest(s.signed(taken))
                await s.until(lambda: [x for x in s.nodes["n1"].seen.values() if x.ready])
                assert rig.exposed()

    run(main())
