"""Pushes at the scheduler: what is registered, who may take it, when it counts. Real engine, caches in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from fake_cache import FakeCache, holding, wanting
from fal_contract.artifact import Artifact, from_manifest, listing_id, to_manifest
from fal_contract.errors import Code, FalError
from fal_contract.identity import WRITERS
from fal_contract.pieces import piece_bytes_of
from fal_contract.ticket import check_ticket
from fal_contract.v1 import cluster_pb2, state_pb2, weights_pb2
from fal_scheduler import pushes
from fal_scheduler.api.roles import ROLES
from fal_scheduler.core.model_events import RevokeModel, StageModel
from fal_scheduler.core.records import ModelState, Wish
from fal_scheduler.leadership import Leadership
from fsd_fakes import artifact_of
from scheduler_rig import ACTOR, eventually, join, leading

ID = "t/m"


def pushed(content: bytes = b"weights", *, id_: str = ID, path: str = "w.safetensors") -> Artifact:
    """As `falctl` hashes a folder with one file."""
    uri = f"push://{id_}"
    made = artifact_of({path: content}, piece_bytes=piece_bytes_of("model", len(content)), uri=uri)
    files = tuple(replace(file, version="") for file in made.files)
    return replace(made, id=listing_id(uri, files), files=files)


def request_of(artifact: Artifact, **more: object) -> cluster_pb2.BeginPushRequest:
    fields: dict[str, object] = {"id": ID, "kind": "model", "manifest": to_manifest(artifact), **more}
    return cluster_pb2.BeginPushRequest(**fields)  # type: ignore[arg-type]


class Cluster:
    """A leader and caches n1 n2 n3; n3 is in pool west."""

    def __init__(self, leader: Leadership) -> None:
        self.leader = leader
        self.caches = {name: FakeCache(leader.caches.run, name) for name in ("n1", "n2", "n3")}

    async def begin(self, artifact: Artifact, **more: object) -> cluster_pb2.BeginPushReply:
        return await pushes.begin(self.leader, request_of(artifact, **more), ACTOR)

    async def end(self, artifact: Artifact) -> None:
        await pushes.end(self.leader, cluster_pb2.EndPushRequest(id=ID, artifact_id=artifact.id), ACTOR)

    async def arrives(self, artifact: Artifact, node: str = "n1") -> None:
        """A node tells that it has all of it."""
        self.caches[node].report(holding(artifact.id, artifact.bytes_total, manifest_digest=artifact.manifest_digest))
        holders = self.leader.caches.table.holders
        await eventually(lambda: node in holders(artifact.id) and holders(artifact.id)[node].ready)

    def wishes(self) -> dict[str, tuple[int, bool]]:
        """Target → replicas, whether it has an end."""
        found = self.leader.view.catalog.wishes_of(ID)
        return {wish.target: (wish.replicas, bool(wish.expires_at_s)) for wish in found}


def run(folder: Path, test: Callable[[Cluster], Awaitable[None]], *, dial: bool = True) -> None:
    async def body() -> None:
        async with asyncio.timeout(60), leading(folder) as leader, AsyncExitStack() as stack:
            for name, pool in (("n1", "east"), ("n2", "east"), ("n3", "west")):
                await join(leader, name, pool=pool)
            cluster = Cluster(leader)
            for cache in cluster.caches.values():
                if dial:
                    stack.push_async_callback(cache.dial().hang_up)
                    await cache.until(lambda cache=cache: cache.welcome is not None)
            await test(cluster)

    asyncio.run(body())


async def refused(code: Code, work: Awaitable[object], says: str = "") -> None:
    with pytest.raises(FalError) as caught:
        await work
    assert caught.value.code is code, caught.value
    assert says in str(caught.value)
    assert caught.value.remedy


def test_from_begin_to_attested(tmp_path: Path) -> None:
    async def test(c: Cluster) -> None:
        artifact = pushed()
        reply = await c.begin(artifact)
        assert (reply.artifact_id, reply.present, len(reply.targets)) == (artifact.id, False, 2)
        assert reply.caller == f"{ACTOR}+{artifact.id[:6]}"
        for target in reply.targets:
            cache = c.caches[target.node_id]
            assert (target.tls, target.endpoints[0].host) == (True, f"{target.node_id}.test")
            await cache.until(lambda cache=cache: artifact.id in cache.wished())
            assert cache.wishes is not None
            sent = from_manifest(cache.wishes.wishes[0].artifact.manifest, ca_key=c.leader.ca.public_key)
            assert (sent.hashes, sent.files) == (artifact.hashes, artifact.files)
            for caller, good in ((reply.caller, True), (ACTOR, False), ("n1", False)):
                why = check_ticket(
                    cache.welcome.ticket_keys if cache.welcome is not None else [],
                    target.ticket,
                    caller=caller,
                    artifact_id=artifact.id,
                    now_s=target.ticket_expires_s - 60,
                )
                assert (why == "") == good
        first = reply.targets[0].node_id
        await refused(Code.UNAVAILABLE, c.end(artifact), "no node has told")
        c.caches[first].report(wanting(artifact.id, artifact.bytes_total, 3))
        await refused(Code.UNAVAILABLE, c.end(artifact), "no node has told")
        assert c.leader.view.models[ID].state is ModelState.REGISTERED
        await c.arrives(artifact, first)
        assert (await c.begin(artifact)).present
        await c.end(artifact)
        await c.end(artifact)
        model = c.leader.view.models[ID]
        assert (model.state, model.attestation, model.attested_by) == (ModelState.ATTESTED, "push", ACTOR)
        assert model.manifest_digest == artifact.manifest_digest
        assert c.wishes()["replicas"] == (2, False)
        assert all(c.wishes()[f"node/{target.node_id}"] == (0, True) for target in reply.targets)

    run(tmp_path, test)


def test_who_takes_it(tmp_path: Path) -> None:
    async def test(c: Cluster) -> None:
        artifact = pushed()

        async def nodes(**more: object) -> list[str]:
            return [target.node_id for target in (await c.begin(artifact, **more)).targets]

        assert await nodes() == ["n1", "n2"]
        assert await nodes(avoid=["n1"]) == ["n2", "n3"]
        assert await nodes(pool="west") == ["n3"]
        await refused(Code.NOT_FOUND, c.begin(artifact, pool="north"), "north")
        c.caches["n2"].report(wanting(artifact.id, artifact.bytes_total, 5))
        await eventually(lambda: "n2" in c.leader.caches.table.holders(artifact.id))
        assert (await nodes())[0] == "n2"
        for cache in c.caches.values():
            await cache.hang_up()
        await refused(Code.UNAVAILABLE, c.begin(artifact), "no node is connected")
        small = FakeCache(c.leader.caches.run, "n1", disk=3).dial()
        await small.until(lambda: small.welcome is not None)
        await refused(Code.NO_CAPACITY, c.begin(artifact), "the largest cache holds 3")
        await small.hang_up()

    run(tmp_path, test)


def test_a_longer_wish_of_an_operator_stands(tmp_path: Path) -> None:
    async def test(c: Cluster) -> None:
        artifact = pushed()
        await c.begin(artifact)
        await c.leader.engine.submit(StageModel(Wish(ID, "node/n1", 0, "memory", 0.0), ACTOR))
        await c.leader.engine.submit(StageModel(Wish(ID, "replicas", 3, "disk", 0.0), ACTOR))
        await c.begin(artifact)
        await c.arrives(artifact)
        await c.end(artifact)
        assert c.wishes() == {"node/n1": (0, False), "node/n2": (0, True), "replicas": (3, False)}

    run(tmp_path, test)


def test_one_name_is_one_content(tmp_path: Path) -> None:
    async def test(c: Cluster) -> None:
        first, second = pushed(b"first"), pushed(b"second")
        await c.begin(first)
        await c.begin(second)  # the first never arrived: it is replaced
        assert c.leader.view.models[ID].artifact_id == second.id
        await c.arrives(first)
        await refused(Code.CONFLICT, c.end(first), "somebody else pushed it")
        await c.arrives(second)
        await c.end(second)
        await refused(Code.ALREADY_EXISTS, c.begin(first), "other content")
        assert c.leader.view.models[ID].artifact_id == second.id
        await refused(
            Code.NOT_FOUND, pushes.end(c.leader, cluster_pb2.EndPushRequest(id="t/x", artifact_id=first.id), ACTOR)
        )
        other = replace(second, hashes=(bytes(32),))  # SHA-256 is the same, so the artifact id is
        await refused(Code.CONFLICT, c.begin(other), "digests of pieces")

    run(tmp_path, test)


def test_what_was_withdrawn_is_not_pushed_again(tmp_path: Path) -> None:
    async def test(c: Cluster) -> None:
        artifact = pushed()
        await c.begin(artifact)
        await c.arrives(artifact)
        await c.end(artifact)
        await c.leader.engine.submit(RevokeModel(ID, "the licence ended", ACTOR))
        await refused(Code.FAILED_PRECONDITION, c.begin(artifact), "the licence ended")
        await refused(Code.FAILED_PRECONDITION, c.end(artifact), "the licence ended")
        twin = pushed(id_="t/other")
        await refused(Code.FAILED_PRECONDITION, c.begin(twin, id="t/other"), "the licence ended")
        assert "t/other" not in c.leader.view.models

    run(tmp_path, test)


def _manifest(change: Callable[[state_pb2.ModelManifest], None]) -> state_pb2.ModelManifest:
    manifest = to_manifest(pushed())
    change(manifest)
    return manifest


BAD: list[tuple[dict[str, object], str]] = [
    ({"id": "m"}, "id"),
    ({"id": "t/../m"}, "id"),
    ({"id": "t/other"}, "not that of this push"),
    ({"kind": "cache"}, "cannot be pushed"),
    ({"kind": "lora"}, "not that of this push"),
    ({"manifest": state_pb2.ModelManifest()}, "files"),
    ({"manifest": _manifest(lambda m: m.ClearField("files"))}, "files"),
    ({"manifest": _manifest(lambda m: m.files[0].ClearField("sha256"))}, "sha256"),
    ({"manifest": _manifest(lambda m: m.files[0].ClearField("blake3"))}, "not that of this push"),
    ({"manifest": _manifest(lambda m: setattr(m.files[0], "version", "v"))}, "sha256"),
    ({"manifest": _manifest(lambda m: setattr(m.files[0], "path", "../w"))}, "path"),
    ({"manifest": _manifest(lambda m: setattr(m, "signature", b"s"))}, "signature"),
    ({"manifest": _manifest(lambda m: setattr(m, "piece_bytes", 1 << 20))}, "not that of this push"),
    ({"manifest": _manifest(lambda m: setattr(m, "artifact_id", "a" * 64))}, "not that of this push"),
    ({"manifest": _manifest(lambda m: setattr(m, "uri", "push://t/other"))}, "not that of this push"),
    ({"manifest": to_manifest(pushed(b""))}, "no byte"),
    ({"manifest": to_manifest(pushed(path="w.ckpt"))}, "pickle"),
]


def test_bad_requests_change_nothing(tmp_path: Path) -> None:
    async def test(c: Cluster) -> None:
        for more, says in BAD:
            await refused(Code.INVALID, c.begin(pushed(), **more), says)
        assert not c.leader.view.models

    run(tmp_path, test, dial=False)


def test_pickles_may_be_allowed(tmp_path: Path) -> None:
    async def test(c: Cluster) -> None:
        await c.begin(pushed(path="w.ckpt"), allow_pickle=True)
        assert c.leader.view.models[ID].allow_pickle

    run(tmp_path, test)


def test_a_new_leader_takes_the_manifest_back_from_a_node(tmp_path: Path) -> None:
    async def test(c: Cluster) -> None:
        artifact = pushed()
        await c.begin(artifact)
        signed = c.leader.models.manifest_of(artifact.id)
        c.leader.manifests.drop(artifact.id)
        await c.arrives(artifact)
        with pytest.raises(FalError):
            c.leader.models.manifest_of(artifact.id)
        await c.caches["n1"].until(lambda: artifact.id in c.caches["n1"].manifests_wanted)
        c.caches["n1"].say(weights_pb2.CacheUp(manifest=signed))
        await eventually(lambda: artifact.id not in c.leader.models.wanted)
        await c.end(artifact)
        assert c.leader.view.models[ID].state is ModelState.ATTESTED

    run(tmp_path, test)


def test_viewers_may_not_push() -> None:
    assert ROLES["/fal.v1.Cluster/BeginPush"] == ROLES["/fal.v1.Cluster/EndPush"] == WRITERS


# --- images -----------------------------------------------------------------------------------------------------------


def packed(files: dict[str, bytes] | None = None, *, id_: str = ID) -> Artifact:
    """As `falctl image add` hashes what it has packed."""
    content = files if files is not None else {"config.json": b"{}", "image.erofs": b"\0" * 5000}
    uri = f"push://{id_}"
    size = piece_bytes_of("image", sum(map(len, content.values())))
    made = artifact_of(content, piece_bytes=size, uri=uri, kind="image")
    listed = tuple(replace(file, version="") for file in made.files)
    return replace(made, id=listing_id(uri, listed), files=listed)


FACTS = {
    "source": "oci:/images/app:1", "digest": f"sha256:{'a' * 64}", "format": "erofs", "platform": "linux/amd64",
    "layer_bytes": 7,
}  # fmt: skip


def test_an_image_keeps_its_facts(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        artifact = packed()
        facts = state_pb2.ImageFacts(**FACTS)  # type: ignore[arg-type]
        await cluster.begin(artifact, kind="image", image=facts)
        await cluster.arrives(artifact)
        await cluster.end(artifact)
        model = cluster.leader.view.models[ID]
        assert (model.kind, model.state) == ("image", ModelState.ATTESTED)
        assert model.image is not None
        assert (model.image.digest, model.image.format, model.image.layer_bytes) == (FACTS["digest"], "erofs", 7)
        assert cluster.wishes()["replicas"] == (2, False)

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"source": "docker://registry.example/app"}, "image.source"),
        ({"digest": "sha256:12"}, "image.digest"),
        ({"format": "ext4"}, "image.format"),
        ({"format": "squashfs"}, "manifest"),
        ({"platform": ""}, "image.platform"),
        ({"platform": "plan9/amd64"}, "platform"),
        ({"first_pieces": [0]}, "image.first_pieces"),
    ],
)
def test_facts_that_do_not_fit_are_refused(tmp_path: Path, changed: dict[str, object], field: str) -> None:
    async def test(cluster: Cluster) -> None:
        facts = state_pb2.ImageFacts(**{**FACTS, **changed})  # type: ignore[arg-type]
        with pytest.raises(FalError) as caught:
            await cluster.begin(packed(), kind="image", image=facts)
        assert (caught.value.code, caught.value.field) == (Code.INVALID, field)
        assert not cluster.leader.view.models

    run(tmp_path, test)


def test_an_image_is_two_files_and_has_facts_and_a_model_has_none(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        facts = state_pb2.ImageFacts(**FACTS)  # type: ignore[arg-type]
        more = packed({"config.json": b"{}", "image.erofs": b"x", "setup.sh": b"y"})
        for artifact, fields, field in (
            (more, {"kind": "image", "image": facts}, "manifest"),
            (packed(), {"kind": "image"}, "image"),
            (pushed(), {"image": facts}, "image"),
            (packed(id_="t/host"), {"id": "t/host", "kind": "image", "image": facts}, "id"),
        ):
            with pytest.raises(FalError) as caught:
                await cluster.begin(artifact, **fields)
            assert (caught.value.code, caught.value.field) == (Code.INVALID, field)

    run(tmp_path, test)
