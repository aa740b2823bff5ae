"""Builds of the compile cache over a real engine: one a key, run once, signed, bounded, never merged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cache_facts import GOOD
from fal_contract.artifact import (
    Artifact,
    ArtifactFile,
    attestation_text,
    cache_entry_text,
    from_manifest,
    listing_id,
    signed_by,
    to_manifest,
)
from fal_contract.cache_key import OUTPUT_URI, cache_key, entry_model
from fal_contract.errors import Code, FalError
from fal_contract.limits import CACHE_NAMESPACE_BYTES_MAX
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2
from fal_fsd.ingest import URI
from fal_scheduler import cache_builds, task_outputs
from fal_scheduler.api import apps, compile_caches, nodes, runners, weights
from fal_scheduler.core import builds
from fal_scheduler.core.build_events import BuildEnded, EvictCacheEntry, PutCacheEntry, TrimCache
from fal_scheduler.core.model_events import AddModel
from fal_scheduler.core.records import CacheEntry, ImageFacts, Model, ModelState
from fal_scheduler.leadership import Leadership
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from scheduler_rig import ACTOR, Agent, app_request, eventually, join, leading, status_of

KEY = cache_key(GOOD)
COMMAND = ["python3", "-m", "compile"]


def artifact(content: str = "a", *, size: int = 10) -> Artifact:
    """What a node's cache takes in of one file."""
    digest = content.encode().ljust(32, b"0")
    files = (ArtifactFile("kernels/k.so", size, sha256=digest),)
    return Artifact(listing_id(OUTPUT_URI, files), "cache", OUTPUT_URI, 1 << 20, files, (digest,))


def request(namespace: str = "cluster", **more: object) -> cluster_pb2.BuildCacheRequest:
    return cluster_pb2.BuildCacheRequest(**{"namespace": namespace, "facts": GOOD, "command": COMMAND, **more})  # type: ignore[arg-type]


class Builder(Agent):
    """A node whose builds run until the test ends them."""

    def __init__(self, leader: Leadership, node_id: str = "n1", *, gpus: int = 8) -> None:
        super().__init__(leader, node_id, gpus=gpus)
        self.running: dict[str, agent_pb2.Assignment] = {}
        self.seen: list[str] = []
        self.on_assignment = self._build

    def _build(self, assignment: agent_pb2.Assignment) -> agent_pb2.RunnerStatus | None:
        if not assignment.spec.HasField("build"):
            return self._obey(assignment)
        if (told := self.statuses.get(assignment.runner_id)) and told.state == state_pb2.RUNNER_STATE_TERMINATED:
            return told
        if assignment.goal != state_pb2.GOAL_RUN:
            return status_of(assignment, state_pb2.RUNNER_STATE_TERMINATED)
        if assignment.runner_id not in self.running:
            self.running[assignment.runner_id] = assignment
            self.seen.append(assignment.runner_id)
        return status_of(assignment, state_pb2.RUNNER_STATE_SETUP)

    def end(self, runner_id: str, *, code: int = 0, output: Artifact | None = None, **more: object) -> None:
        """The build's container has exited; its node tells so until the scheduler forgets the runner."""
        status = status_of(self.running[runner_id], state_pb2.RUNNER_STATE_TERMINATED, exit_code=code, **more)
        if output is not None:
            status.output.CopyFrom(to_manifest(output))
        self.report(status)

    async def built(self, leader: Leadership, output: Artifact | None = None, **more: object) -> str:
        """A whole build; returns its runner."""
        view = await compile_caches.build_cache(leader, request(**more), ACTOR)
        await eventually(lambda: view.runner in self.running)
        self.end(view.runner, output=output or artifact())
        await eventually(lambda: view.runner not in leader.view.runners)
        return view.runner


def with_builder(folder: Path, test: Callable[[Leadership, Builder], Awaitable[None]]) -> None:
    async def body() -> None:
        async with leading(folder) as leader:
            await join(leader, "n1")
            async with Builder(leader) as node:
                await test(leader, node)

    asyncio.run(body())


def events_of(leader: Leadership, kind: str) -> list[str]:
    return [event.message for event in leader.feed._log.since(0) if event.kind == kind]


def listed(leader: Leadership, namespace: str = "") -> list[cluster_pb2.CacheEntryView]:
    message = cluster_pb2.ListCacheEntriesRequest(namespace=namespace)
    return list(compile_caches.list_entries(leader, message).entries)


async def refused(call: Awaitable[object]) -> FalError:
    with pytest.raises(FalError) as caught:
        await call
    return caught.value


def test_a_build_becomes_a_signed_entry(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        runner = await node.built(leader)
        assignment = node.seen and node.seen[0]
        assert assignment == runner
        (view,) = listed(leader)
        entry, made = view.entry, artifact()
        assert (view.state, view.namespace, view.key) == ("ready", "cluster", KEY)
        assert dict(entry.facts) == GOOD
        assert (entry.task, entry.bytes, entry.manifest_digest) == (runner, 10, made.manifest_digest)
        text = cache_entry_text("cluster", KEY, made.manifest_digest)
        assert signed_by(leader.ca.public_key, entry.signature, text)
        assert not signed_by(
            leader.ca.public_key, entry.signature, cache_entry_text("team/t", KEY, made.manifest_digest)
        )
        kept = from_manifest(leader.models.manifest_of(made.id), ca_key=leader.ca.public_key)
        assert kept.attested
        model = leader.view.models[entry.model]
        assert (model.kind, model.attestation, model.attested_by) == ("cache", "build", "n1")
        await eventually(lambda: not any(app.startswith("system/") for app in leader.view.apps))
        assert not leader.view.catalog.builds
        assert events_of(leader, "CACHE_BUILT")

    with_builder(tmp_path, body)


def test_a_build_runs_our_image_without_network_model_or_environment(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        view = await compile_caches.build_cache(leader, request("team/t", num_gpus=2, timeout_s=60), ACTOR)
        await eventually(lambda: view.runner in node.running)
        assignment = node.running[view.runner]
        spec = assignment.spec
        assert (spec.image, spec.network, list(spec.command)) == ("host", "none", COMMAND)
        assert not spec.env
        assert not spec.model
        assert not assignment.artifacts
        assert len(assignment.gpus) == 2
        assert (spec.build.namespace, spec.build.key, spec.scaling.startup_timeout_s) == ("team/t", KEY, 60)
        assert assignment.app.startswith(f"system/build-{KEY[:12]}-")

    with_builder(tmp_path, body)


def engine_image(team: str = "t", **changes: object) -> Model:
    facts = ImageFacts("docker://r/engine:1", "sha256:" + "ab" * 32, "erofs")
    made = Model(
        f"{team}/engine", "image", facts.source, ModelState.ATTESTED, "ef" * 32, 10, 2, artifact_id="12" * 32,
        resolved_uri="push://ingest", attestation="pack", attested_by="n1", image=facts,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_teams_own_image_builds_for_that_team_alone_and_is_named_in_the_key(tmp_path: Path) -> None:
    right = GOOD | {"engine_image": "sha256:" + "ab" * 32}

    async def body(leader: Leadership, node: Builder) -> None:
        await leader.engine.submit(AddModel(engine_image()))
        for namespace, image, facts, field in (
            ("cluster", "t/engine", right, "image"),
            ("team/b", "t/engine", right, "image"),
            ("team/t", "t/missing", right, "image"),
            ("team/t", "t/engine", GOOD, "facts.engine_image"),
        ):
            asked = request(namespace, image=image, facts=facts)
            error = await refused(compile_caches.build_cache(leader, asked, ACTOR))
            assert error.field == field, (namespace, image)
        view = await compile_caches.build_cache(leader, request("team/t", image="t/engine", facts=right), ACTOR)
        assert view.key == cache_key(right)
        runner = leader.view.runners[view.runner]
        assert leader.view.revisions[runner.app, 1].spec.image == "t/engine"
        assert "images" in (leader.view.pending[runner.app, 1].reason)  # this node runs none

    with_builder(tmp_path, body)


def test_fifty_callers_see_one_build(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        views = await asyncio.gather(*(compile_caches.build_cache(leader, request(), ACTOR) for _ in range(50)))
        assert {view.state for view in views} == {"building"}
        (runner,) = {view.runner for view in views}
        await eventually(lambda: runner in node.running)
        node.end(runner, output=artifact())
        await eventually(lambda: bool(leader.view.catalog.cache_entries))
        after = await asyncio.gather(*(compile_caches.build_cache(leader, request(), ACTOR) for _ in range(50)))
        assert {view.state for view in after} == {"ready"}
        assert node.seen == [runner]

    with_builder(tmp_path, body)


def test_namespaces_are_built_apart_and_never_merged(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        await node.built(leader, artifact("c"))
        await node.built(leader, artifact("t"), namespace="team/t")
        assert len(node.seen) == 2
        digests = {view.namespace: view.entry.manifest_digest for view in listed(leader)}
        assert digests == {"cluster": artifact("c").manifest_digest, "team/t": artifact("t").manifest_digest}
        assert [view.namespace for view in listed(leader, "team/t")] == ["team/t"]

    with_builder(tmp_path, body)


def test_a_team_gets_its_own_entry_then_the_clusters_never_anothers(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        await node.built(leader, artifact("b"), namespace="team/b")
        await apps.apply_app(leader, app_request("a", compile_caches=[KEY]), ACTOR)
        await eventually(lambda: any(x.app == "t/a" for x in node.held.values()))
        assert not next(x for x in node.held.values() if x.app == "t/a").artifacts
        await node.built(leader, artifact("c"))
        await apps.apply_app(leader, app_request("b", compile_caches=[KEY]), ACTOR)
        await eventually(lambda: any(x.app == "t/b" for x in node.held.values()))
        (got,) = next(x for x in node.held.values() if x.app == "t/b").artifacts
        assert (got.namespace, got.kind, got.cache_key) == ("cluster", "cache", KEY)
        assert got.manifest_digest == artifact("c").manifest_digest
        assert got.manifest.artifact_id == artifact("c").id
        await node.built(leader, artifact("t"), namespace="team/t")
        await apps.apply_app(leader, app_request("c", compile_caches=[KEY]), ACTOR)
        await eventually(lambda: any(x.app == "t/c" for x in node.held.values()))
        (got,) = next(x for x in node.held.values() if x.app == "t/c").artifacts
        assert (got.namespace, got.manifest_digest) == ("team/t", artifact("t").manifest_digest)
        assert signed_by(
            leader.ca.public_key, got.entry_signature, cache_entry_text("team/t", KEY, got.manifest_digest)
        )

    with_builder(tmp_path, body)


@pytest.mark.parametrize(
    ("code", "more", "why"),
    [
        (3, {"reason": "exit code 3", "log_tail": ["no compiler"]}, "exit code 3"),
        (0, {"reason": "too large"}, "too large"),
    ],
)
def test_a_build_that_fails_is_told_and_never_tried_again_by_itself(
    tmp_path: Path, code: int, more: dict[str, object], why: str
) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        view = await compile_caches.build_cache(leader, request(), ACTOR)
        await eventually(lambda: view.runner in node.running)
        node.end(view.runner, code=code, **more)
        await eventually(lambda: view.runner not in leader.view.runners)
        seen = await compile_caches.build_cache(leader, request(command=[]), ACTOR)
        assert (seen.state, seen.reason, seen.runner) == ("failed", why, view.runner)
        assert list(seen.log_tail) == more.get("log_tail", [])
        assert events_of(leader, "CACHE_BUILD_FAILED")
        await eventually(lambda: not leader.view.apps)
        assert not leader.view.backoffs
        assert node.seen == [view.runner]
        again = await compile_caches.build_cache(leader, request(), ACTOR)
        assert again.state == "building"
        assert again.runner != view.runner

    with_builder(tmp_path, body)


def test_a_build_whose_node_or_runner_goes_has_failed(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        view = await compile_caches.build_cache(leader, request(), ACTOR)
        await eventually(lambda: view.runner in node.running)
        await runners.stop_runner(leader, cluster_pb2.StopRunnerRequest(id=view.runner, reason="enough"), ACTOR)
        await eventually(lambda: listed(leader)[0].state == "failed")
        assert listed(leader)[0].reason == "enough"
        view = await compile_caches.build_cache(leader, request(), ACTOR)
        await eventually(lambda: view.runner in node.running)
        await nodes.revoke_node(leader, cluster_pb2.RevokeNodeRequest(node="n1"), ACTOR)
        await eventually(lambda: listed(leader)[0].state == "failed")
        assert "gone" in listed(leader)[0].reason

    with_builder(tmp_path, body)


def test_a_new_leader_goes_on_with_a_build(tmp_path: Path) -> None:
    async def body() -> None:
        backend = MemoryBackend()
        async with leading(tmp_path, MemoryStore(backend)) as leader:
            await join(leader, "n1")
            async with Builder(leader) as node:
                view = await compile_caches.build_cache(leader, request(), ACTOR)
                await eventually(lambda: view.runner in node.running)
        async with leading(tmp_path, MemoryStore(backend)) as leader:
            seen = await compile_caches.build_cache(leader, request(), ACTOR)
            assert (seen.state, seen.runner) == ("building", view.runner)
            later = Builder(leader)
            status = status_of(node.running[view.runner], state_pb2.RUNNER_STATE_TERMINATED, exit_code=0)
            status.output.CopyFrom(to_manifest(artifact()))
            later.statuses[view.runner] = status  # it ended while nobody led
            async with later:
                await eventually(lambda: bool(leader.view.catalog.cache_entries))
                assert not later.seen

    asyncio.run(body())


def tampered() -> dict[str, Artifact]:
    made = artifact()
    other = artifact("z")
    return {
        "kind": replace(made, kind="model"),
        "signed": replace(made, signature=b"a node's"),
        "id": replace(made, id=other.id),
        "origin": Artifact(listing_id("s3://b/x", made.files), "cache", "s3://b/x", 1 << 20, made.files, made.hashes),
        "large": artifact(size=1 << 20),
    }


@pytest.mark.parametrize("what", sorted(tampered()))
def test_output_that_no_build_may_leave_is_refused_with_an_event(tmp_path: Path, what: str) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        await node.built(leader, tampered()[what], bytes_max=1000)
        (view,) = listed(leader)
        assert view.state == "failed"
        assert "refused" in view.reason
        assert events_of(leader, "CACHE_REFUSED")
        assert not leader.view.catalog.cache_entries
        assert not leader.view.models

    with_builder(tmp_path, body)


def test_output_that_can_never_be_kept_ends_its_build_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_outputs, "AGAIN_S", 0.01)
    monkeypatch.setattr(cache_builds, "TRIES_MAX", 3)

    async def body(leader: Leadership, node: Builder) -> None:
        tries: list[Artifact] = []

        async def never(kept: Artifact) -> None:
            tries.append(kept)
            raise FalError(Code.STORE_FAILED, "the disk is full", remedy="Make room.")

        monkeypatch.setattr(leader.builds, "keep", never)
        await node.built(leader)
        (view,) = listed(leader)
        assert (view.state, len(tries)) == ("failed", 3)
        assert "the disk is full" in view.reason

    with_builder(tmp_path, body)


def test_only_a_build_tasks_runner_leaves_an_entry(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        await apps.apply_app(leader, app_request("a"), ACTOR)
        await eventually(lambda: any(x.app == "t/a" for x in node.held.values()))
        held = next(x for x in node.held.values() if x.app == "t/a")
        ended: list[object] = []
        leader.engine.subscribe(lambda effect: ended.append(effect) if isinstance(effect, BuildEnded) else None)
        lie = status_of(held, state_pb2.RUNNER_STATE_TERMINATED, exit_code=0, output=to_manifest(artifact()))
        node.report(lie)  # a customer's runner that says that it built something
        await eventually(lambda: bool(events_of(leader, "RUNNER_FAILED")))
        assert not ended
        assert not leader.view.catalog.cache_entries
        entry = CacheEntry("cluster", KEY, entry_model("cluster", KEY), "ab" * 32, task=held.runner_id)
        error = await refused(
            leader.engine.submit(PutCacheEntry(entry, Model(entry.model, "cache", "x"), held.runner_id))
        )
        assert error.code is Code.FAILED_PRECONDITION

    with_builder(tmp_path, body)


def test_an_entry_never_changes(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        await node.built(leader, artifact("a"))
        first = leader.view.catalog.cache_entries["cluster", KEY]
        assert (await compile_caches.build_cache(leader, request(), ACTOR)).state == "ready"
        await compile_caches.evict_entry(
            leader, cluster_pb2.EvictCacheEntryRequest(namespace="cluster", key=KEY), ACTOR
        )
        assert not leader.view.models
        view = await compile_caches.build_cache(leader, request(), ACTOR)
        await eventually(lambda: view.runner in node.running)
        # While this build ran, somebody else's came to its end: the store holds what it held first.
        change = replace(first, manifest_digest="cd" * 32)
        leader.view.catalog.cache_entries["cluster", KEY] = change
        node.end(view.runner, output=artifact("b"))
        await eventually(lambda: view.runner not in leader.view.runners)
        assert leader.view.catalog.cache_entries["cluster", KEY] is change
        assert "other content" in events_of(leader, "CACHE_REFUSED")[0]

    with_builder(tmp_path, body)


def test_namespaces_are_bounded_and_the_oldest_that_no_app_names_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        keys = []
        for number in range(40):
            facts = GOOD | {"dtype": f"d{number}"}
            keys.append(cache_key(facts))
            await node.built(leader, artifact(f"{number}", size=100), facts=facts, bytes_max=100)
            if number == 0:
                await apps.apply_app(leader, app_request("a", compile_caches=[keys[0]]), ACTOR)
        assert len(listed(leader)) == 40
        monkeypatch.setattr(builds, "CACHE_NAMESPACE_BYTES_MAX", 500)
        monkeypatch.setattr(builds, "_EVICTED_AT_ONCE_MAX", 16)
        await node.built(leader, artifact("t"), namespace="team/t")
        assert len(listed(leader, "cluster")) == 40  # another namespace's room is its own
        facts = GOOD | {"dtype": "last"}
        await node.built(leader, artifact("last", size=100), facts=facts)
        left = {view.key for view in listed(leader, "cluster")}
        assert left == {keys[0], *keys[-3:], cache_key(facts)}
        assert len(events_of(leader, "CACHE_EVICTED")) == 36
        assert len(leader.view.models) == 6
        error = await refused(leader.engine.submit(TrimCache("cluster", 501)))
        assert error.code is Code.NO_CAPACITY

    with_builder(tmp_path, body)


BAD: list[tuple[str, dict[str, object]]] = [
    ("namespace", {"namespace": "team/system"}),
    ("facts", {"facts": {}}),
    ("facts", {"facts": GOOD | {"weights": "ab"}}),
    ("image", {"image": "docker.io/a/b"}),
    ("command", {"command": [""]}),
    ("command", {"command": ["x" * 40_000]}),
    ("num_gpus", {"num_gpus": 17}),
    ("pools", {"pools": ["p", "nowhere"]}),
    ("num_gpus", {"machine_type": "H100-80GB"}),
    ("machine_type", {"machine_type": "x" * 300, "num_gpus": 1}),
    ("bytes_max", {"bytes_max": CACHE_NAMESPACE_BYTES_MAX}),
    ("timeout_s", {"timeout_s": -1}),
    ("timeout_s", {"timeout_s": float("nan")}),
]


@pytest.mark.parametrize(("field", "more"), BAD)
def test_wrong_requests_name_the_field_and_change_nothing(tmp_path: Path, field: str, more: dict[str, object]) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        error = await refused(compile_caches.build_cache(leader, request(**more), ACTOR))
        assert (error.code, error.field) == (Code.INVALID, field)
        assert not leader.view.apps

    with_builder(tmp_path, body)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        assert (await refused(compile_caches.build_cache(leader, request(command=[]), ACTOR))).code is Code.NOT_FOUND
        assert (await refused(leader.engine.submit(EvictCacheEntry("cluster", KEY)))).code is Code.NOT_FOUND
        message = cluster_pb2.EvictCacheEntryRequest(namespace="cluster", key="ab")
        assert (await refused(compile_caches.evict_entry(leader, message, ACTOR))).field == "key"
        with pytest.raises(FalError, match="no namespace"):
            listed(leader, "x")

    with_builder(tmp_path, body)


def test_the_schedulers_own_team_is_nobodys(tmp_path: Path) -> None:
    async def body(leader: Leadership, node: Builder) -> None:
        spec = app_request("a").spec
        mine = cluster_pb2.ApplyAppRequest(id="system/build-x", spec=spec)
        assert (await refused(apps.apply_app(leader, mine, ACTOR))).field == "team"
        with pytest.raises(FalError):
            apps.plan_app(leader, mine)
        assert (await refused(apps.scale_app(leader, cluster_pb2.ScaleAppRequest(id="system/x"), ACTOR))).field == "id"
        model = cluster_pb2.AddModelRequest(id="system/m", uri="file:///m")
        assert (await refused(weights.add_model(leader, model, ACTOR))).field == "id"
        # An app cannot make itself a build: what only the scheduler sets is not taken over.
        spec.build.namespace = "cluster"
        await apps.apply_app(leader, cluster_pb2.ApplyAppRequest(id="t/a", spec=spec), ACTOR)
        assert leader.view.revision_of(leader.view.apps["t/a"]).spec.build is None

    with_builder(tmp_path, body)


def test_both_sides_name_what_was_taken_in_alike() -> None:
    assert URI == OUTPUT_URI
    assert attestation_text(artifact())
