"""Images over a real engine: packed once, signed with what the node's cache tells, given to apps, removed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from fake_cache import FakeCache, holding
from fal_contract.artifact import Artifact, ArtifactFile, from_manifest, listing_id, to_manifest
from fal_contract.cache_key import OUTPUT_URI
from fal_contract.errors import Code, FalError
from fal_contract.limits import IMAGE_BYTES_MAX, IMAGE_BYTES_MAX_DEFAULT, MESSAGE_BYTES_MAX
from fal_contract.pieces import piece_bytes_of
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2, weights_pb2
from fal_scheduler import task_outputs
from fal_scheduler.api import apps, compile_caches, images, weights
from fal_scheduler.core.image_source import check_platform, check_source
from fal_scheduler.leadership import Leadership
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from scheduler_rig import ACTOR, Agent, app_request, eventually, join, leading, status_of

ID = "t/img"
SOURCE = "docker://registry:5000/team/repo:1"
DIGEST = "sha256:" + "ab" * 32
MIB = 1 << 20


def image(size: int = 10 * MIB, *, format_: str = "erofs", content: str = "a") -> Artifact:
    """What a node's cache holds of a packed image: every piece has a digest of its own."""
    files = (
        ArtifactFile("config.json", 100, sha256=b"c" * 32),
        ArtifactFile(f"image.{format_}", size, sha256=content.encode().ljust(32, b"i")),
    )
    piece_bytes = piece_bytes_of("image", size + 100)
    bare = Artifact(listing_id(OUTPUT_URI, files), "image", OUTPUT_URI, piece_bytes, files)
    return replace(bare, hashes=tuple(at.to_bytes(32, "big") for at in range(bare.layout.count)))


def output(made: Artifact, **facts: object) -> state_pb2.ModelManifest:
    """What its runner's end tells."""
    message = to_manifest(replace(made, hashes=None))
    given = {"source": "elsewhere", "digest": DIGEST, "format": "erofs", "platform": "linux/s390x", "layer_bytes": 7}
    message.image.CopyFrom(state_pb2.ImageFacts(**{**given, **facts}))  # type: ignore[arg-type]
    return message


def request(id_: str = ID, source: str = SOURCE, **more: object) -> cluster_pb2.AddImageRequest:
    return cluster_pb2.AddImageRequest(id=id_, source=source, **more)  # type: ignore[arg-type]


class Packer(Agent):
    """A node that packs, with its weight cache; tasks run until the test ends them."""

    def __init__(self, leader: Leadership, node_id: str = "n1") -> None:
        super().__init__(leader, node_id)
        self.features = ("images", "pack")
        self.running: dict[str, agent_pb2.Assignment] = {}
        self.on_assignment = self._pack
        self.cache = FakeCache(leader.caches.run, node_id)
        self.holds: dict[str, Artifact] = {}

    async def __aenter__(self) -> Packer:
        await super().__aenter__()
        self.cache.dial()
        await self.cache.until(lambda: self.cache.welcome is not None)
        self._answering = asyncio.create_task(self._answer())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._answering.cancel()
        await asyncio.gather(self._answering, return_exceptions=True)
        await self.cache.hang_up()
        await super().__aexit__()

    async def _answer(self) -> None:
        for at in count():
            await self.cache.until(lambda at=at: len(self.cache.manifests_wanted) > at, timeout_s=600)  # type: ignore[misc]
            wanted = self.cache.manifests_wanted[at]
            if wanted in self.holds:
                self.cache.say(weights_pb2.CacheUp(manifest=to_manifest(self.holds[wanted])))

    def _pack(self, assignment: agent_pb2.Assignment) -> agent_pb2.RunnerStatus | None:
        if not assignment.spec.build.image:
            return self._obey(assignment)
        if (told := self.statuses.get(assignment.runner_id)) and told.state == state_pb2.RUNNER_STATE_TERMINATED:
            return told
        if assignment.goal != state_pb2.GOAL_RUN:
            return status_of(assignment, state_pb2.RUNNER_STATE_TERMINATED)
        self.running.setdefault(assignment.runner_id, assignment)
        return status_of(assignment, state_pb2.RUNNER_STATE_SETUP, reason="the build task runs")

    def end(self, runner_id: str, told: state_pb2.ModelManifest | None = None, **more: object) -> None:
        fields: dict[str, object] = {"exit_code": 0, **more}
        status = status_of(self.running[runner_id], state_pb2.RUNNER_STATE_TERMINATED, **fields)
        if told is not None:
            status.output.CopyFrom(told)
        self.report(status)

    async def packed(self, leader: Leadership, made: Artifact | None = None, **more: object) -> str:
        """A whole task; returns its runner."""
        made = made or image()
        self.holds.setdefault(made.id, made)
        view = await images.add_image(leader, request(**more), ACTOR)  # type: ignore[arg-type]
        await eventually(lambda: view.runner in self.running)
        self.end(view.runner, output(made))
        await eventually(lambda: view.runner not in leader.view.runners)
        return view.runner


def with_packer(folder: Path, test: Callable[[Leadership, Packer], Awaitable[None]]) -> None:
    async def body() -> None:
        async with leading(folder) as leader:
            await join(leader, "n1")
            async with Packer(leader) as node:
                await test(leader, node)

    asyncio.run(body())


def seen(leader: Leadership, id_: str = ID) -> cluster_pb2.ImageView:
    return images.get_image(leader, cluster_pb2.GetImageRequest(id=id_))


async def refused(call: Awaitable[object]) -> FalError:
    with pytest.raises(FalError) as caught:
        await call
    return caught.value


# --- packing ----------------------------------------------------------------------------------------------------------


def test_an_image_is_packed_signed_and_wished_on_two_nodes(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        runner = await node.packed(leader)
        view, made = seen(leader), image()
        assert (view.state, view.model.kind, view.model.attestation, view.model.attested_by) == (
            "ready", "image", "pack", "n1",
        )  # fmt: skip
        facts = view.model.image  # what was asked for stands, whatever the packer says it read
        assert (facts.source, facts.digest, facts.platform) == (SOURCE, DIGEST, "linux/amd64")
        assert (view.model.artifact_id, view.model.manifest_digest) == (made.id, made.manifest_digest)
        kept = from_manifest(leader.models.manifest_of(made.id), ca_key=leader.ca.public_key)
        assert kept.hashes == made.hashes
        (wish,) = leader.view.catalog.wishes_of(ID)
        assert (wish.target, wish.replicas, wish.created_by) == ("replicas", 2, ACTOR)
        node.cache.report(holding(made.id, made.bytes_total, kind="image"))
        await eventually(lambda: seen(leader).nodes_ready == 1)
        assert node.running[runner].spec.network == "host"
        assert leader.packs.idle

    with_packer(tmp_path, body)


def test_the_manifest_of_a_large_image_is_fetched_and_fits_its_messages(tmp_path: Path) -> None:
    made = image(IMAGE_BYTES_MAX_DEFAULT - MIB)
    assert 2 * MIB < to_manifest(made).ByteSize() < MESSAGE_BYTES_MAX
    assert image(IMAGE_BYTES_MAX).layout.count <= (1 << 16) + 1

    async def body(leader: Leadership, node: Packer) -> None:
        await node.packed(leader, made)
        assert seen(leader).model.bytes == made.bytes_total
        kept = from_manifest(leader.models.manifest_of(made.id), ca_key=leader.ca.public_key)
        assert kept.hashes == made.hashes

    with_packer(tmp_path, body)


def test_the_cache_that_packed_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_outputs, "AGAIN_S", 0.02)

    async def body(leader: Leadership, node: Packer) -> None:
        await node.cache.hang_up()
        made = image()
        node.holds[made.id] = made
        view = await images.add_image(leader, request(), ACTOR)
        await eventually(lambda: view.runner in node.running)
        node.end(view.runner, output(made))
        await eventually(lambda: not leader.packs.idle)
        assert seen(leader).state == "packing"
        node.cache.dial(holding(made.id, made.bytes_total, kind="image"))
        await eventually(lambda: seen(leader).state == "ready")

    with_packer(tmp_path, body)


def test_a_new_leader_goes_on_with_a_pack(tmp_path: Path) -> None:
    async def body() -> None:
        backend = MemoryBackend()
        async with leading(tmp_path, MemoryStore(backend)) as leader:
            await join(leader, "n1")
            async with Packer(leader) as node:
                view = await images.add_image(leader, request(), ACTOR)
                await eventually(lambda: view.runner in node.running)
        async with leading(tmp_path, MemoryStore(backend)) as leader:
            again = await images.add_image(leader, request(), ACTOR)
            assert (again.state, again.runner) == ("packing", view.runner)
            later = Packer(leader)
            made = image()
            later.holds[made.id] = made
            status = status_of(node.running[view.runner], state_pb2.RUNNER_STATE_TERMINATED, exit_code=0)
            status.output.CopyFrom(output(made))
            later.statuses[view.runner] = status  # it ended while nobody led
            async with later:
                await eventually(lambda: ID in leader.view.models)
                assert not later.running

    asyncio.run(body())


def lies() -> dict[str, tuple[state_pb2.ModelManifest, Artifact]]:
    """What a node's runner tells, and what its cache then holds."""
    made = image()
    tall = to_manifest(made)
    tall.image.CopyFrom(output(made).image)
    signed = output(made)
    signed.signature = b"a node's"
    alien = replace(made, hashes=None, uri="s3://b/x", id=listing_id("s3://b/x", made.files))
    third = (*made.files, ArtifactFile("zzz", 1, sha256=b"z" * 32))
    more = replace(made, hashes=None, files=third, id=listing_id(OUTPUT_URI, third))
    return {
        "kind": (output(replace(made, kind="cache")), made),
        "pieces told at once": (tall, made),
        "signed": (signed, made),
        "id": (output(replace(made, id="cd" * 32)), made),
        "origin": (output(alien), made),
        "pieces": (output(replace(made, piece_bytes=1 << 20)), made),
        "large": (output(image(600 * MIB)), image(600 * MIB)),
        "format": (output(made, format="tar"), made),
        "digest": (output(made, digest="latest"), made),
        "files": (output(more), made),
        "other content": (output(made), replace(made, files=(made.files[0], image(content="b").files[1]))),
        "signed by its cache": (output(made), replace(made, signature=b"a node's")),
    }


def test_what_no_pack_may_leave_is_refused(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        for at, (what, (told, held)) in enumerate(lies().items()):
            id_ = f"t/lie-{at}"
            view = await images.add_image(leader, request(id_, bytes_max=500 * MIB), ACTOR)
            await eventually(lambda view=view: view.runner in node.running)  # type: ignore[misc]
            node.holds[told.artifact_id] = replace(held, id=told.artifact_id)
            node.end(view.runner, told)
            await eventually(lambda id_=id_: seen(leader, id_).state == "failed")  # type: ignore[misc]
            assert "refused" in seen(leader, id_).reason, what
        assert not leader.view.models

    with_packer(tmp_path, body)


def test_a_manifest_that_another_node_tells_is_not_taken_for_it(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        made = image()
        await join(leader, "n2")
        other = FakeCache(leader.caches.run, "n2").dial()
        await other.until(lambda: other.welcome is not None)
        view = await images.add_image(leader, request(), ACTOR)
        await eventually(lambda: view.runner in node.running)
        node.end(view.runner, output(made))
        await node.cache.until(lambda: bool(node.cache.manifests_wanted))
        wrong = tuple(b"w" * 32 for _ in made.hashes or ())
        other.say(weights_pb2.CacheUp(manifest=to_manifest(replace(made, hashes=wrong))))
        other.rates(origin__x=1)  # told after it
        await eventually(lambda: bool(leader.caches.table.node("n2").rates))  # type: ignore[union-attr]
        assert seen(leader).state == "packing"
        node.cache.say(weights_pb2.CacheUp(manifest=to_manifest(made)))
        await eventually(lambda: ID in leader.view.models)
        assert from_manifest(leader.models.manifest_of(made.id)).hashes == made.hashes
        await other.hang_up()

    with_packer(tmp_path, body)


def test_a_pack_that_fails_says_why_with_its_last_lines(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        view = await images.add_image(leader, request(), ACTOR)
        await eventually(lambda: view.runner in node.running)
        await eventually(lambda: "the build task runs on name-n1" in seen(leader).reason)
        node.end(
            view.runner, exit_code=1, log_tail=["asking registry:5000", "error: it is not there. Correct its name."]
        )
        await eventually(lambda: seen(leader).state == "failed")
        failed = seen(leader)
        assert (failed.reason, failed.runner) == ("it is not there. Correct its name.", view.runner)
        assert list(failed.log_tail)[:1] == ["asking registry:5000"]
        listed = images.list_images(leader, cluster_pb2.ListImagesRequest(team="t")).images
        assert [(one.id, one.state) for one in listed] == [(ID, "failed")]
        assert not compile_caches.list_entries(leader, cluster_pb2.ListCacheEntriesRequest()).entries
        again = await images.add_image(leader, request(), ACTOR)
        assert again.state == "packing"

    with_packer(tmp_path, body)


# --- apps -------------------------------------------------------------------------------------------------------------


def test_an_app_gets_its_image_streamed_the_pieces_first_that_a_start_has_read(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        made = image()
        await node.packed(leader, made)
        await apps.apply_app(leader, app_request("a", image="img"), ACTOR)
        await eventually(lambda: any(x.app == "t/a" for x in node.held.values()))
        held = next(x for x in node.held.values() if x.app == "t/a")
        (got,) = held.artifacts
        assert (got.model, got.kind, got.stream, got.allow_provisional) == (ID, "image", True, False)
        assert (got.artifact_id, got.manifest_digest, got.uri) == (made.id, made.manifest_digest, OUTPUT_URI)
        assert not got.first_pieces
        assert seen(leader).apps == ["t/a"]
        node.tell_access(agent_pb2.AccessList(artifact_id=made.id, pieces=[5, 1], runner_id=held.runner_id))
        await eventually(lambda: list(seen(leader).model.image.first_pieces) == [5, 1])
        await apps.apply_app(leader, app_request("b", image="img"), ACTOR)
        await eventually(lambda: any(x.app == "t/b" for x in node.held.values()))
        (got,) = next(x for x in node.held.values() if x.app == "t/b").artifacts
        assert list(got.first_pieces) == [5, 1]
        await node.cache.until(
            lambda: (
                node.cache.wishes is not None
                and [list(one.artifact.first_pieces) for one in node.cache.wishes.wishes] == [[5, 1]]
            )
        )

    with_packer(tmp_path, body)


def test_an_image_in_use_stays_and_one_that_is_not_goes_from_the_nodes(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        made = image()
        await node.packed(leader, made)
        node.cache.report(holding(made.id, made.bytes_total, kind="image"))
        await eventually(lambda: seen(leader).nodes_ready == 1)
        await apps.apply_app(leader, app_request("a", image="img"), ACTOR)
        error = await refused(images.remove_model(leader, cluster_pb2.RemoveModelRequest(id=ID), ACTOR))
        assert error.code is Code.FAILED_PRECONDITION
        assert "t/a" in error.what
        await apps.delete_app(leader, cluster_pb2.DeleteAppRequest(id="t/a"), ACTOR)
        await eventually(lambda: not leader.view.apps)
        reply = await images.remove_model(leader, cluster_pb2.RemoveModelRequest(id=ID), ACTOR)
        assert (reply.outcome, list(reply.nodes)) == ("removed", ["name-n1"])
        await node.cache.until(lambda: made.id in node.cache.drops)
        assert not node.cache.drops[made.id].revoked
        assert not images.list_images(leader, cluster_pb2.ListImagesRequest()).images

    with_packer(tmp_path, body)


def test_an_image_is_added_again_while_a_node_still_has_it_as_it_was_signed(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        made = image()
        await node.packed(leader, made)
        node.holds[made.id] = from_manifest(leader.models.manifest_of(made.id))
        assert node.holds[made.id].signature
        await images.remove_model(leader, cluster_pb2.RemoveModelRequest(id=ID), ACTOR)
        await node.packed(leader, made)
        assert seen(leader).state == "ready"

    with_packer(tmp_path, body)


def test_an_artifact_that_another_name_needs_is_not_dropped(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        made = image()
        await node.packed(leader, made)
        await node.packed(leader, made, id_="t/twin")
        node.cache.report(holding(made.id, made.bytes_total, kind="image"))
        await eventually(lambda: seen(leader).nodes_ready == 1)
        reply = await images.remove_model(leader, cluster_pb2.RemoveModelRequest(id=ID), ACTOR)
        assert (reply.outcome, list(reply.nodes)) == ("removed", [])
        assert seen(leader, "t/twin").nodes_ready == 1

    with_packer(tmp_path, body)


def test_a_model_is_removed_by_the_same_call(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"x")

    async def body(leader: Leadership, node: Packer) -> None:
        add = cluster_pb2.AddModelRequest(id="t/m", uri=folder.as_uri())
        await weights.add_model(leader, add, ACTOR)
        reply = await images.remove_model(leader, cluster_pb2.RemoveModelRequest(id="t/m"), ACTOR)
        assert reply.outcome == "removed"
        assert "t/m" not in leader.view.models

    with_packer(tmp_path, body)


# --- bad input --------------------------------------------------------------------------------------------------------


BAD: list[tuple[dict[str, object], str, str]] = [
    ({"id_": "img"}, "id", "name"),
    ({"id_": "t/"}, "id", ""),
    ({"id_": "t/host"}, "id", "own system"),
    ({"id_": "system/img"}, "id", "system"),
    ({"source": "oci:/some/where"}, "source", "operator's machine"),
    ({"source": "rootfs:/x"}, "source", "falctl image add"),
    ({"source": "registry/repo:1"}, "source", "docker://"),
    ({"source": "docker://user:hunter2@registry/repo"}, "source", "--auth-secret"),
    ({"source": "docker://registry/Repo:1"}, "source", "names no image"),
    ({"source": "docker://registry/repo:1;rm -rf /"}, "source", "names no image"),
    ({"source": "docker://registry/../x"}, "source", "names no image"),
    ({"source": "docker://registry/repo@sha256:12"}, "source", "names no image"),
    ({"source": "docker://" + "a" * 2000}, "source", "names no image"),
    ({"platform": "windows/amd64"}, "platform", "linux/arm64"),
    ({"platform": "linux/amd64 --x"}, "platform", "no platform"),
    ({"auth_secret": "../x"}, "auth_secret", "../x"),
    ({"auth_secret": "missing"}, "auth_secret", "not set"),
    ({"bytes_max": IMAGE_BYTES_MAX + 1}, "bytes_max", "out of bounds"),
    ({"timeout_s": 1e9}, "timeout_s", "out of bounds"),
    ({"timeout_s": float("nan")}, "timeout_s", "out of bounds"),
    ({"pools": ["nowhere"]}, "pools", "no pool"),
    ({"pools": ["p"] * 65}, "pools", "too many"),
]


def test_bad_input_is_refused_before_anything_changes(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Packer) -> None:
        before = leader.view.store_revision
        for change, field, text in BAD:
            error = await refused(images.add_image(leader, request(**change), ACTOR))  # type: ignore[arg-type]
            assert error.field == field, change
            assert text in str(error), change
            assert "hunter2" not in str(error)
        assert leader.view.store_revision == before
        for call, message in (
            (images.get_image, cluster_pb2.GetImageRequest(id="t/x")),
            (images.remove_model, cluster_pb2.RemoveModelRequest(id="t/x")),
        ):
            error = await refused(_called(call, leader, message))
            assert error.code is Code.NOT_FOUND

    with_packer(tmp_path, body)


async def _called(call: Callable[..., object], leader: Leadership, message: object) -> None:
    if call is images.remove_model:
        await images.remove_model(leader, message, ACTOR)  # type: ignore[arg-type]
    else:
        call(leader, message)


@pytest.mark.parametrize(
    "source",
    [
        "docker://busybox",
        "docker://library/busybox:1.36",
        "docker://registry.example.com:5000/a/b_c/d--e:v1.2-rc_3",
        f"docker://ghcr.io/org/app@{DIGEST}",
        f"docker://[::1]:5000/app:1@{DIGEST}",
        "docker://127.0.0.1:5000/x",
    ],
)
def test_sources_of_registries_are_taken(source: str) -> None:
    assert check_source(source) == source
    assert check_platform("") == "linux/amd64"
    assert check_platform("linux/arm/v7") == "linux/arm/v7"
