"""The registrar on a real engine: origins are listed by a stand-in, nodes tell digests, disks are lost."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from blake3 import blake3

from fal_contract.artifact import ArtifactFile, attestation_text, from_manifest, signed_by, to_manifest
from fal_contract.errors import Code, FalError
from fal_contract.limits import MANIFEST_EMBEDDED_BYTES_MAX
from fal_contract.v1 import cluster_pb2, state_pb2, weights_pb2
from fal_scheduler.api import apps, weights
from fal_scheduler.assignments import AssignmentBuilder
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.core.events import Logged
from fal_scheduler.core.model_events import AddModel, AttestModel
from fal_scheduler.core.records import Model, ModelState
from fal_scheduler.leadership import Leadership
from fal_scheduler.models import ModelRegistrar
from fal_scheduler.registry import listing_of
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from scheduler_rig import ACTOR, Agent, app_request, eventually, join, leading

CONTENT = {"model.safetensors": b"w" * 5000, "model_index.json": b"{}"}


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@dataclass(frozen=True)
class Listing:
    uri: str
    files: tuple[ArtifactFile, ...]


@dataclass
class Origin:
    """Stands for every origin: a branch `main` that moves, and files whose digests are published or not."""

    content: dict[str, bytes] = field(default_factory=lambda: dict(CONTENT))
    commit: str = "c0"
    published: bool = False
    asked: list[tuple[str, str, bool]] = field(default_factory=list)

    async def list(self, uri: str, revision: str, allow_pickle: bool) -> Listing:
        self.asked.append((uri, revision, allow_pickle))
        if uri.startswith("s3://gone"):
            raise FalError(Code.NOT_FOUND, f"{uri} is not there", remedy="Check the name.")
        files = [
            ArtifactFile(path, len(c), sha256(c).hex()[:8], sha256(c) if self.published else b"")
            for path, c in sorted(self.content.items())
        ]
        return Listing(uri if "@" in uri or "hf" not in uri else f"{uri}@{self.commit}", tuple(files))


def attestation_of(artifact_id: str, content: dict[str, bytes]) -> weights_pb2.Attestation:
    files = [
        state_pb2.ModelFile(path=path, bytes=len(c), sha256=sha256(c), blake3=blake3(c).digest())
        for path, c in sorted(content.items())
    ]
    return weights_pb2.Attestation(
        artifact_id=artifact_id, files=files, signers=["n1"], piece_signers=[0] * len(content)
    )


@dataclass
class Rig:
    leader: Leadership
    models: ModelRegistrar
    origin: Origin
    notes: list[Logged]
    blobs: Path

    async def add(self, name: str = "t/m", uri: str = "hf://org/m", kind: str = "", revision: str = "main") -> Model:
        await self.models.add(name, uri, kind=kind, revision=revision, actor=ACTOR)
        return self.model(name)

    def model(self, name: str = "t/m") -> Model:
        return self.leader.view.models[name]

    async def settled(self, *names: str) -> None:
        await eventually(lambda: all(self.model(x).state is not ModelState.REGISTERED for x in names or ["t/m"]))
        await eventually(lambda: self.models.idle)


def registrar_test(folder: Path, test: Callable[[Rig], Awaitable[None]]) -> None:
    async def body() -> None:
        async with leading(folder) as leader:
            origin, notes = Origin(), list[Logged]()
            models = ModelRegistrar(
                leader.engine,
                ManifestBlobs(folder / "own-blobs", leader.ca.public_key),
                leader.ca,
                clock=leader.clock,
                note=notes.append,
                lister=origin.list,
            )
            try:
                await test(Rig(leader, models, origin, notes, folder / "own-blobs"))
            finally:
                await models.close()

    asyncio.run(body())


async def refused(call: Awaitable[object]) -> FalError:
    with pytest.raises(FalError) as caught:
        await call
    assert caught.value.remedy
    return caught.value


def test_a_moving_name_is_resolved_once_and_its_listing_stands_before_the_store_names_it(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        model = await rig.add()
        assert (model.state, model.uri, model.resolved_uri) == (ModelState.REGISTERED, "hf://org/m", "hf://org/m@c0")
        assert (model.bytes, model.files, model.revision) == (5002, 2, "main")
        listing = from_manifest(rig.models.manifest_of(model.artifact_id))
        assert (listing.attested, [x.path for x in listing.files]) == (False, sorted(CONTENT))
        assert await rig.add() == model, "the same again"
        rig.origin.commit = "c1"
        error = await refused(rig.add())
        assert error.code is Code.ALREADY_EXISTS
        assert "hf://org/m@c0" in error.what
        assert (await rig.add("t/m2")).resolved_uri == "hf://org/m@c1"

    registrar_test(tmp_path, test)


@pytest.mark.parametrize(
    ("uri", "kind", "revision", "code"),
    [
        ("hf://org/m", "adapter", "", Code.INVALID),
        ("hf://org/m", "cache", "", Code.INVALID),
        ("push://t/x", "", "", Code.INVALID),
        ("file:///nowhere", "", "", Code.INVALID),
        ("file:///tmp", "", "main", Code.INVALID),
        ("org/m", "", "", Code.INVALID),
        ("s3://gone/m", "", "", Code.NOT_FOUND),
    ],
)
def test_what_cannot_be_registered_changes_nothing(
    tmp_path: Path, uri: str, kind: str, revision: str, code: Code
) -> None:
    async def test(rig: Rig) -> None:
        assert (await refused(rig.add(uri=uri, kind=kind, revision=revision))).code is code
        assert (await refused(rig.add("no-team"))).code is Code.INVALID
        assert not rig.leader.view.models
        assert not rig.blobs.exists()

    registrar_test(tmp_path, test)


def test_a_listing_with_paths_that_may_not_be_is_refused(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        for path in ("../x", "/etc/x", "a//b", "a/../b", "x\n"):
            rig.origin.content = {path: b"x"}
            error = await refused(rig.add())
            assert error.code is Code.INVALID
            assert repr(path) in error.what
        rig.origin.content = {}
        assert (await refused(rig.add())).code is Code.INVALID
        assert not rig.leader.view.models

    registrar_test(tmp_path, test)


@pytest.mark.parametrize("published", [True, False])
def test_a_node_that_holds_all_of_it_attests_it_and_the_ca_signs(tmp_path: Path, published: bool) -> None:
    async def test(rig: Rig) -> None:
        rig.origin.published = published
        model = await rig.add()
        await rig.add("t/same")
        rig.models.on_attestation("n1", attestation_of(model.artifact_id, CONTENT))
        rig.models.on_attestation("n2", attestation_of(model.artifact_id, CONTENT))
        await rig.settled("t/m", "t/same")
        for name in ("t/m", "t/same"):
            after = rig.model(name)
            word = "digests" if published else "version"
            assert (after.state, after.attestation, after.attested_by) == (ModelState.ATTESTED, word, "n1")
        artifact = from_manifest(rig.models.manifest_of(after.manifest_digest), ca_key=rig.leader.ca.public_key)
        assert artifact.attested
        assert signed_by(rig.leader.ca.public_key, artifact.signature, attestation_text(artifact))
        assert rig.models.manifest_of(model.artifact_id).signature == artifact.signature
        twin = await rig.add("t/later")
        assert (twin.state, twin.attested_by) == (ModelState.ATTESTED, "n1"), "nobody needs to read it again"
        rig.models.on_attestation("n3", attestation_of(model.artifact_id, {**CONTENT, "model_index.json": b"[]"}))
        await eventually(lambda: rig.models.idle)
        assert rig.model().state is ModelState.ATTESTED, "what is attested stays"

    registrar_test(tmp_path, test)


def test_a_failed_attestation_refuses_it_names_the_signer_and_it_can_be_registered_anew(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await join(rig.leader, "n7")
        model = await rig.add()
        wrong = weights_pb2.PieceClaim(piece=0, blake3=blake3(b"flipped").digest(), signer="n7", signature=b"s")
        rig.models.on_claims("n7", weights_pb2.PieceClaims(artifact_id=model.artifact_id, claims=[wrong]))
        rig.models.on_attestation("n1", attestation_of(model.artifact_id, CONTENT))
        await rig.settled()
        after = rig.model()
        assert after.state is ModelState.REFUSED
        assert "model.safetensors: piece 0" in after.reason
        assert "name-n7 (n7)" in after.reason
        assert [x.subject for x in rig.leader.engine.events.since(0) if x.kind == "ATTESTATION_FAILED"] == ["t/m"]  # type: ignore[attr-defined]
        assert (await rig.add()).state is ModelState.REGISTERED
        rig.models.on_attestation("n1", attestation_of(model.artifact_id, CONTENT))
        await rig.settled()
        assert rig.model().state is ModelState.ATTESTED, "the claims of the first attempt are gone with it"

    registrar_test(tmp_path, test)


def test_claims_count_on_the_signers_own_stream_only(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        model = await rig.add()
        id_ = model.artifact_id

        def claim(piece: int, content: bytes, signer: str) -> weights_pb2.PieceClaim:
            return weights_pb2.PieceClaim(piece=piece, blake3=blake3(content).digest(), signer=signer)

        rig.models.on_claims("n1", weights_pb2.PieceClaims(artifact_id=id_, claims=[claim(0, b"lie", "n2")]))
        rig.models.on_claims("n1", weights_pb2.PieceClaims(artifact_id="ff" * 32, claims=[claim(0, b"x", "n1")]))
        rig.models.on_claims("n1", weights_pb2.PieceClaims(artifact_id=id_, claims=[claim(99, b"x", "n1")]))
        assert [(x.kind, x.subject) for x in rig.notes] == [("BAD_CLAIM", "n1")]
        rig.models.on_attestation("n1", attestation_of(id_, CONTENT))
        await rig.settled()
        assert rig.model().state is ModelState.ATTESTED
        rig.models.on_claims("n1", weights_pb2.PieceClaims(artifact_id=id_, claims=[claim(0, b"late", "n1")]))
        assert len(rig.notes) == 1

    registrar_test(tmp_path, test)


def test_a_message_that_makes_no_sense_changes_nothing_and_is_told(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        model = await rig.add()
        rig.models.on_attestation("n1", attestation_of(model.artifact_id, {"other": b""}))
        rig.models.on_attestation("n1", attestation_of("ff" * 32, CONTENT))
        await eventually(lambda: rig.models.idle)
        assert rig.model().state is ModelState.REGISTERED
        assert [(x.kind, x.subject) for x in rig.notes] == [("BAD_ATTESTATION", "n1")]
        rig.models.on_attestation("n1", attestation_of(model.artifact_id, CONTENT))
        await rig.settled()
        assert rig.model().state is ModelState.ATTESTED

    registrar_test(tmp_path, test)


def test_content_that_was_withdrawn_does_not_come_back_by_another_way(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        model = await rig.add()
        rig.models.on_attestation("n1", attestation_of(model.artifact_id, CONTENT))
        await rig.settled()
        await weights.revoke_model(rig.leader, cluster_pb2.RevokeModelRequest(id="t/m", reason="licence ended"), ACTOR)
        assert (await refused(rig.add("t/again"))).code is Code.FAILED_PRECONDITION
        elsewhere = await rig.add("t/copy", "s3://b/copy")
        rig.models.on_attestation("n1", attestation_of(elsewhere.artifact_id, CONTENT))
        await rig.settled("t/copy")
        assert rig.model("t/copy").state is ModelState.REFUSED
        assert "licence ended" in rig.model("t/copy").reason

    registrar_test(tmp_path, test)


def test_a_lost_manifest_comes_back_from_a_node_and_only_the_right_one(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        model = await rig.add()
        rig.models.on_attestation("n1", attestation_of(model.artifact_id, CONTENT))
        await rig.settled()
        good = from_manifest(rig.models.manifest_of(model.artifact_id))
        (rig.blobs / model.artifact_id).unlink()
        models = ModelRegistrar(
            rig.leader.engine,
            ManifestBlobs(rig.blobs, rig.leader.ca.public_key),
            rig.leader.ca,
            clock=rig.leader.clock,
            note=rig.notes.append,
            lister=rig.origin.list,
        )
        asked: list[str] = []
        models.want_manifest = asked.append
        for _ in range(2):
            with pytest.raises(FalError, match="does not exist"):
                models.manifest_of(model.artifact_id)
        assert asked == [model.artifact_id], "once"
        assert models.wanted == (model.artifact_id,)
        later: list[str] = []
        models.want_manifest = later.append
        assert later == asked, "who comes later hears what is wanted already"
        forged = replace(good, files=(replace(good.files[0], size_bytes=4999), *good.files[1:]))
        strange = replace(good, id="ff" * 32)
        for wrong in (forged, strange, replace(good, signature=b"")):
            assert not models.offer_manifest(to_manifest(wrong))
        assert models.offer_manifest(to_manifest(good))
        assert not models.offer_manifest(to_manifest(good)), "it is here"
        assert models.wanted == ()
        assert from_manifest(models.manifest_of(model.artifact_id)) == good
        await models.close()

    registrar_test(tmp_path, test)


def test_a_registered_models_lost_listing_is_listed_again(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        model = await rig.add()
        (rig.blobs / model.artifact_id).unlink()
        rig.models.resume()
        await eventually(lambda: rig.models.idle)
        assert (rig.blobs / model.artifact_id).exists()
        assert rig.origin.asked[-1] == ("hf://org/m@c0", "", False), "by its commit, not by its branch"
        (rig.blobs / model.artifact_id).unlink()
        rig.origin.content["model_index.json"] = b"[]"
        rig.models.resume()
        await eventually(lambda: rig.models.idle)
        assert rig.models.wanted == (model.artifact_id,)

    registrar_test(tmp_path, test)


@pytest.mark.parametrize("folder_is", ["there", "gone"])
def test_a_record_of_the_first_release_works_on(tmp_path: Path, folder_is: str) -> None:
    """Its manifest has no digests of pieces: they are read again, or told by a node that holds the model."""
    folder = tmp_path / "m"
    folder.mkdir()
    for path, content in CONTENT.items():
        (folder / path).write_bytes(content)

    async def body() -> None:
        backend = MemoryBackend()
        async with leading(tmp_path, MemoryStore(backend)) as leader:
            made = await weights.add_model(
                leader, cluster_pb2.AddModelRequest(id="t/now", uri=f"file://{folder}"), ACTOR
            )
            digest = made.model.manifest_digest
            old = Model("t/m", "model", f"file://{folder}", bytes=5002, files=2)
            await leader.engine.submit(AddModel(old))
            await leader.engine.submit(AttestModel("t/m", digest, 5002, 2))
            files = [state_pb2.ModelFile(path=x.path, bytes=x.bytes, sha256=x.sha256) for x in made.files]
            (tmp_path / "blobs" / digest).write_bytes(state_pb2.ModelManifest(files=files).SerializeToString())
        if folder_is == "gone":
            folder.rename(tmp_path / "elsewhere")
        async with leading(tmp_path, MemoryStore(backend)) as leader:
            await eventually(lambda: bool(leader.view.models["t/m"].artifact_id) and leader.models.idle)
            model = leader.view.models["t/m"]
            assert (model.state, model.attestation, model.attested_by) == (ModelState.ATTESTED, "read", "scheduler")
            artifact = leader.models.desk.artifact_of(model.artifact_id)
            assert artifact.attested is (folder_is == "there")
            assert [x.sha256 for x in artifact.files] == [sha256(c) for _, c in sorted(CONTENT.items())]
            if folder_is == "gone":
                leader.models.on_attestation("n1", attestation_of(model.artifact_id, CONTENT))
                await eventually(lambda: leader.models.desk.artifact_of(model.artifact_id).attested)
            found = from_manifest(leader.models.manifest_of(digest), ca_key=leader.ca.public_key)
            assert found.manifest_digest == digest

    asyncio.run(body())


def test_a_runner_is_assigned_with_the_listing_while_nobody_attested_its_model(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await join(rig.leader, "n1")
        model = await rig.add("t/m")
        await asyncio.to_thread(rig.leader.manifests.put, rig.models.desk.artifact_of(model.artifact_id))
        request = app_request(model="m", stream_weights=True, allow_provisional=True)
        async with Agent(rig.leader, "n1") as agent:
            reply = await apps.apply_app(rig.leader, request, ACTOR)
            assert any("nobody has attested model t/m" in x for x in reply.warnings)
            await eventually(lambda: bool(agent.held))
            (held,) = agent.held.values()
            (told,) = held.artifacts
            assert (told.artifact_id, told.manifest_digest) == (model.artifact_id, "")
            assert (told.uri, told.stream, told.allow_provisional) == ("hf://org/m@c0", True, True)
            assert from_manifest(told.manifest).id == model.artifact_id
            assert (held.spec.stream_weights, held.spec.allow_provisional) == (True, True)

    registrar_test(tmp_path, test)


def test_a_large_manifest_is_named_but_not_carried(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.origin.content = {f"part-{number:05d}.safetensors": os.urandom(8) for number in range(2000)}
        model = await rig.add()
        assert rig.models.manifest_of(model.artifact_id).ByteSize() > MANIFEST_EMBEDDED_BYTES_MAX
        await apps.apply_app(rig.leader, app_request(model="m"), ACTOR)
        await join(rig.leader, "n1")
        async with Agent(rig.leader, "n1"):
            await eventually(lambda: any(x.node for x in rig.leader.view.runners.values()))
            (runner,) = rig.leader.view.runners.values()
            (told,) = AssignmentBuilder(rig.models.desk).build(rig.leader.view, runner).artifacts
            assert (told.HasField("manifest"), told.artifact_id, told.bytes) == (False, model.artifact_id, 16_000)

    registrar_test(tmp_path, test)


def test_one_artifact_is_cut_in_one_way(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add("t/m", kind="model")
        await rig.add("t/l", kind="lora")
        error = await refused(rig.add("t/i", kind="image"))
        assert (error.code, error.field) == (Code.ALREADY_EXISTS, "kind")

    registrar_test(tmp_path, test)


def test_collecting_removes_manifests_that_nothing_names_but_no_fresh_ones(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        leader, stray = rig.leader, listing_of("s3://b/x", "model", [ArtifactFile("a", 1, "v")])
        leader.manifests.put(stray)
        model = await rig.add()
        leader.manifests.put(rig.models.desk.artifact_of(model.artifact_id))
        blobs = leader.manifests.names()
        assert blobs == {stray.id, model.artifact_id}
        await weights.revoke_model(leader, cluster_pb2.RevokeModelRequest(id="t/m"), ACTOR)
        reply = await weights.collect_models(leader, cluster_pb2.CollectModelsRequest(), ACTOR)
        assert (list(reply.models), reply.blobs) == (["t/m"], 0), "a manifest that was just written may be named soon"
        for name in blobs:
            os.utime(tmp_path / "blobs" / name, (1, 1))
        reply = await weights.collect_models(leader, cluster_pb2.CollectModelsRequest(dry_run=True), ACTOR)
        assert (list(reply.models), reply.blobs) == ([], 2)
        assert leader.manifests.names() == blobs
        reply = await weights.collect_models(leader, cluster_pb2.CollectModelsRequest(), ACTOR)
        assert (reply.blobs, leader.manifests.names()) == (2, set())
        leader.models.counts = lambda artifact_id: (1, 0)  # a node has it: the registry must go on telling it to go
        await rig.add("t/other", "s3://b/other")
        await weights.revoke_model(leader, cluster_pb2.RevokeModelRequest(id="t/other"), ACTOR)
        reply = await weights.collect_models(leader, cluster_pb2.CollectModelsRequest(), ACTOR)
        assert not reply.models

    registrar_test(tmp_path, test)


def test_lists_come_in_pages(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        for number in range(5):
            await rig.leader.engine.submit(AddModel(Model(f"t/l{number}", "lora", f"s3://b/{number}")))
        await rig.leader.engine.submit(AddModel(Model("u/m", "model", "s3://b/m")))
        seen: list[str] = []
        after = ""
        while True:
            reply = weights.list_models(rig.leader, cluster_pb2.ListModelsRequest(kind="lora", limit=2, after=after))
            seen += [view.model.id for view in reply.models]
            assert reply.total == 5
            after = reply.next
            if not after:
                break
        assert seen == [f"t/l{number}" for number in range(5)]
        with pytest.raises(FalError, match="limit"):
            weights.list_models(rig.leader, cluster_pb2.ListModelsRequest(limit=10**6))

    registrar_test(tmp_path, test)


def test_a_brief_list_has_what_a_table_shows_and_no_digests(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        model = Model("t/l", "lora", "s3://b/l", bytes=7, files=2, artifact_id="a" * 64, resolved_uri="s3://b/l@1")
        await rig.leader.engine.submit(AddModel(model))
        (whole,) = weights.list_models(rig.leader, cluster_pb2.ListModelsRequest()).models
        (brief,) = weights.list_models(rig.leader, cluster_pb2.ListModelsRequest(brief=True)).models
        shown = {"id", "kind", "uri", "state", "bytes", "files"}
        assert {field.name for field, _ in brief.model.ListFields()} == shown
        assert all(getattr(brief.model, name) == getattr(whole.model, name) for name in shown)
        assert whole.model.artifact_id == "a" * 64

    registrar_test(tmp_path, test)
