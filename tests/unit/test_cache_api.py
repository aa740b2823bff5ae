"""Where models are, wishes and withdrawals: the operators' API and nodes' caches over a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from fake_cache import FakeCache, holding, wanting
from fal_contract.artifact import (
    Artifact,
    ArtifactFile,
    attestation_text,
    from_manifest,
    listing_id,
    to_manifest,
)
from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2, weights_pb2
from fal_scheduler.api import caches, nodes, weights
from fal_scheduler.core.events import AddModel, AttestModel, RefuseModel
from fal_scheduler.core.records import Model
from fal_scheduler.leadership import Leadership
from scheduler_rig import ACTOR, Agent, join, leading

SIZE = 1000 * 1_000_000
FILES = [ArtifactFile("model.safetensors", SIZE, "etag-1")]
URI = "s3://bucket/model"
A = listing_id(URI, FILES)


class Nodes:
    """A leader with three nodes: agents that obey and caches; n1 and n2 in pool east, n3 in west."""

    def __init__(self, leader: Leadership) -> None:
        self.leader = leader
        self.caches = {name: FakeCache(leader.caches.run, name) for name in ("n1", "n2", "n3")}

    async def add(self) -> Model:
        model = Model("t/m", "model", URI, bytes=SIZE, files=1, artifact_id=A, resolved_uri=URI)
        await self.leader.engine.submit(AddModel(model, ACTOR))
        return self.leader.view.models["t/m"]

    def dial(self, **artifacts: object) -> None:
        """All caches; an artifact for those that are named."""
        for name, cache in self.caches.items():
            cache.dial(*([artifacts[name]] if name in artifacts else []))  # type: ignore[arg-type]

    async def settled(self) -> None:
        for cache in self.caches.values():
            await cache.until(lambda cache=cache: cache.wishes is not None)

    def where(self, *, everywhere: bool = True) -> dict[str, cluster_pb2.ModelOnNode]:
        reply = caches.where_model(self.leader, cluster_pb2.WhereModelRequest(id="t/m", all=everywhere))
        return {one.node_id: one for one in reply.nodes}


def nodes_test(folder: Path, test: Callable[[Nodes], Awaitable[None]]) -> None:
    async def body() -> None:
        async with leading(folder) as leader, AsyncExitStack() as stack:
            for name, pool in (("n1", "east"), ("n2", "east"), ("n3", "west")):
                await join(leader, name, pool=pool)
                await stack.enter_async_context(Agent(leader, name))
            made = Nodes(leader)
            try:
                await test(made)
            finally:
                for cache in made.caches.values():
                    if cache.task is not None:
                        await cache.hang_up()

    asyncio.run(body())


def refused(call: Callable[[], object]) -> FalError:
    with pytest.raises(FalError) as caught:
        call()
    return caught.value


def test_two_islands_are_told_apart(tmp_path: Path) -> None:
    async def test(rig: Nodes) -> None:
        await rig.add()
        rig.dial(n1=holding(A, SIZE, bytes_from_origin=SIZE), n2=wanting(A, SIZE, SIZE // 2, rate_bytes_s=100_000_000))
        await rig.settled()
        lone = rig.caches["n3"]
        lone.rates(origin__bucket=0)
        lone.unreachable("n1", "n2")
        rig.caches["n1"].unreachable("n3")
        rig.caches["n2"].unreachable("n3")
        await eventually_where(rig, "n3", "no path to any of the 2 nodes that have it (name-n1, name-n2)")
        there = rig.where()
        assert there["n3"].ready_in_s == -1
        assert (there["n1"].ready_in_s, there["n1"].because, there["n1"].pool) == (0, "ready", "east")
        assert there["n2"].ready_in_s == pytest.approx(6.0)  # five for the bytes, one for the attestation
        assert there["n2"].cached.bytes_disk == SIZE // 2
        assert set(rig.where(everywhere=False)) == {"n1", "n2"}
        reply = caches.where_model(rig.leader, cluster_pb2.WhereModelRequest(id="t/m", all=True))
        assert [one.node_id for one in reply.nodes] == ["n1", "n2", "n3"]
        assert (reply.bytes_from_origin, reply.bytes_total) == (SIZE, SIZE)
        lone.rates(origin__bucket=50_000_000)
        await eventually_where(rig, "n3", "origin 50 MB/s")
        assert rig.where()["n3"].ready_in_s == pytest.approx(21.0)
        view = weights.get_model(rig.leader, cluster_pb2.GetModelRequest(id="t/m"))
        assert (view.nodes_ready, view.nodes_staging) == (1, 1)

    nodes_test(tmp_path, test)


async def eventually_where(rig: Nodes, node_id: str, because: str) -> None:
    """A report is on its way."""
    async with asyncio.timeout(20):
        while not rig.where()[node_id].because.startswith(because):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_wishes_reach_the_nodes_that_they_mean(tmp_path: Path) -> None:
    async def test(rig: Nodes) -> None:
        await rig.add()
        rig.dial(n3=holding(A, SIZE))
        await rig.settled()
        leader = rig.leader
        staged = await weights.stage_model(
            leader, cluster_pb2.StageModelRequest(id="t/m", target="pool/east", tier="memory"), ACTOR
        )
        assert list(staged.nodes) == ["name-n1", "name-n2"]
        for name in ("n1", "n2"):
            cache = rig.caches[name]
            await cache.until(lambda cache=cache: cache.wished() == {A: "memory"})
        replicas = await weights.stage_model(
            leader, cluster_pb2.StageModelRequest(id="t/m", target="replicas", replicas=1, ttl_s=3600), ACTOR
        )
        assert list(replicas.nodes) == ["name-n1", "name-n2", "name-n3"]
        await rig.caches["n3"].until(lambda: rig.caches["n3"].wished() == {A: "disk"})
        wished = rig.caches["n3"].wishes
        assert wished is not None
        artifact = wished.wishes[0].artifact
        assert (artifact.model, artifact.uri, artifact.bytes) == ("t/m", URI, SIZE)
        assert wished.wishes[0].expires_at_s > leader.clock.wall_s()
        error = refused(lambda: caches.evict_model(leader, cluster_pb2.EvictModelRequest(id="t/m")))
        assert error.code is Code.FAILED_PRECONDITION
        assert "unstage" in error.remedy
        await nodes.cordon_node(leader, cluster_pb2.CordonNodeRequest(node="n3", cordon=True), ACTOR)
        gone = await weights.unstage_model(leader, cluster_pb2.UnstageModelRequest(id="t/m"), ACTOR)
        assert list(gone.nodes) == []
        for cache in rig.caches.values():
            await cache.until(lambda cache=cache: cache.wished() == {})
        # The cordoned holder is kept for a replica; a second one goes to an open node.
        again = await weights.stage_model(
            leader, cluster_pb2.StageModelRequest(id="t/m", target="replicas", replicas=2), ACTOR
        )
        assert "name-n3" in again.nodes
        assert len(again.nodes) == 2

    nodes_test(tmp_path, test)


def test_evict_and_verify_reach_holders_only(tmp_path: Path) -> None:
    async def test(rig: Nodes) -> None:
        await rig.add()
        rig.dial(n1=holding(A, SIZE), n2=holding(A, SIZE))
        await rig.settled()
        request = cluster_pb2.EvictModelRequest(id="t/m", nodes=["name-n1"])
        assert list(caches.evict_model(rig.leader, request).nodes) == ["name-n1"]
        await rig.caches["n1"].until(lambda: A in rig.caches["n1"].drops)
        assert not rig.caches["n1"].drops[A].revoked
        everywhere = cluster_pb2.EvictModelRequest(id="t/m")
        assert list(caches.verify_model(rig.leader, everywhere).nodes) == ["name-n1", "name-n2"]
        await rig.caches["n2"].until(lambda: rig.caches["n2"].verified == [A])
        assert A not in rig.caches["n2"].drops
        for names, code in ((["n9"], Code.NOT_FOUND), (["n3"], Code.FAILED_PRECONDITION), (["x"] * 1001, Code.INVALID)):
            wrong = cluster_pb2.EvictModelRequest(id="t/m", nodes=names)
            for call in (caches.evict_model, caches.verify_model):
                assert (refused(lambda call=call, wrong=wrong: call(rig.leader, wrong))).code is code
        unknown = cluster_pb2.EvictModelRequest(id="t/none")
        assert (refused(lambda: caches.evict_model(rig.leader, unknown))).code is Code.NOT_FOUND
        where = cluster_pb2.WhereModelRequest(id="t/none")
        assert (refused(lambda: caches.where_model(rig.leader, where))).code is Code.NOT_FOUND
        manifest = weights_pb2.GetManifestRequest(id="f" * 64)
        assert (refused(lambda: caches.get_manifest(rig.leader, manifest))).code is Code.NOT_FOUND

    nodes_test(tmp_path, test)


def test_revoked_and_refused_models_leave_the_nodes(tmp_path: Path) -> None:
    async def test(rig: Nodes) -> None:
        await rig.add()
        rig.dial(n1=wanting(A, SIZE), n2=wanting(A, SIZE))
        one, two, away = (rig.caches[name] for name in ("n1", "n2", "n3"))
        await one.until(lambda: "n2" in one.neighbours(A))
        await rig.leader.engine.submit(RefuseModel("t/m", "model.safetensors is not what the origin says", ACTOR))
        await one.until(lambda: A in one.drops)
        assert not one.drops[A].revoked
        await away.hang_up()
        await weights.revoke_model(
            rig.leader, cluster_pb2.RevokeModelRequest(id="t/m", reason="the licence ended"), ACTOR
        )
        await two.until(lambda: A in two.drops and two.drops[A].revoked)
        away.dial(holding(A, SIZE))
        await away.until(lambda: A in away.drops)
        assert away.drops[A].revoked
        assert away.drops[A].reason == "revoked: the licence ended"

    nodes_test(tmp_path, test)


def test_a_manifest_that_this_scheduler_lost_comes_back_from_a_node_and_goes_to_the_others(tmp_path: Path) -> None:
    async def test(rig: Nodes) -> None:
        model = await rig.add()
        file = ArtifactFile("model.safetensors", SIZE, "etag-1", b"1" * 32)
        count = -(-SIZE // (4 << 20))
        content = Artifact(A, "model", URI, 4 << 20, (file,), tuple([b"2" * 32] * count))
        content = replace(content, signature=rig.leader.ca.sign(attestation_text(content)))
        await rig.leader.engine.submit(AttestModel(model.id, content.manifest_digest, SIZE, 1, ACTOR))
        rig.dial(n1=wanting(A, SIZE))
        one, two = rig.caches["n1"], rig.caches["n2"]
        await rig.settled()
        async with asyncio.timeout(20):
            while not rig.leader.models.wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        two.report(holding(A, SIZE, manifest_digest=content.manifest_digest))
        await two.until(lambda: two.manifests_wanted == [A])
        forged = to_manifest(replace(content, signature=b"no"))
        two.say(weights_pb2.CacheUp(manifest=forged))
        two.say(weights_pb2.CacheUp(manifest=to_manifest(content)))
        await one.until(lambda: A in one.attested)
        assert from_manifest(one.attested[A], ca_key=rig.leader.ca.public_key) == content
        for name in (A, content.manifest_digest):
            read = caches.get_manifest(rig.leader, weights_pb2.GetManifestRequest(id=name))
            assert read.signature == content.signature
        assert one.manifests_wanted == []

    nodes_test(tmp_path, test)
