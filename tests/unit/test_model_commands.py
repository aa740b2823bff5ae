"""Commands about models and wishes on the pure core: what they change, what they stop, every refusal they owe."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_world import World, spec_of
from fal_contract.errors import Code, FalError
from fal_contract.limits import WISHES_PER_MODEL_MAX
from fal_scheduler.core.catalog import Catalog
from fal_scheduler.core.events import (
    ApplyApp,
    DeleteApp,
    Event,
    Logged,
    ModelChanged,
    Moment,
    Outcome,
    WishesChanged,
)
from fal_scheduler.core.model_commands import check_ttl, in_use
from fal_scheduler.core.model_events import (
    AddModel,
    AttestModel,
    CollectModels,
    IdentifyModel,
    RefuseModel,
    RevokeModel,
    StageModel,
    UnstageModel,
)
from fal_scheduler.core.records import Goal, Model, ModelState, Runner, Wish
from fal_scheduler.core.views import app_reason, runner_phase

SPEC, _ = spec_of()
M = Model("default/m", "model", "s3://b/m", artifact_id="a1" * 32, resolved_uri="s3://b/m", bytes=10, files=1)


@pytest.fixture
def world() -> World:
    return World(Random(1), nodes=2)


def refused(world: World, event: Event) -> FalError:
    before = dict(world.state.models), dict(world.state.catalog.wishes), dict(world.state.runners)
    with pytest.raises(FalError) as caught:
        world.core.step(event, Moment(world.now_s, world.wall_s))
    assert (dict(world.state.models), dict(world.state.catalog.wishes), dict(world.state.runners)) == before
    assert caught.value.remedy
    return caught.value


def did(world: World, event: Event) -> Outcome:
    outcome = world.step(event)
    assert outcome is not None
    return outcome


def logged(outcome: Outcome, kind: str) -> Logged:
    (found,) = (one for one in outcome.effects if isinstance(one, Logged) and one.kind == kind)
    return found


def runners(world: World, app: str = "default/b") -> list[Runner]:
    return [one for one in world.state.runners.values() if one.app == app]


def test_a_model_cannot_become_another(world: World) -> None:
    assert did(world, AddModel(M)).reply.outcome == "created"  # type: ignore[union-attr]
    assert did(world, AddModel(M)).reply.outcome == "unchanged"  # type: ignore[union-attr]
    for other in (
        replace(M, uri="s3://b/other"),
        replace(M, kind="lora"),
        replace(M, revision="v2"),
        replace(M, artifact_id="b2" * 32),
    ):
        assert refused(world, AddModel(other)).code is Code.ALREADY_EXISTS


def test_a_runner_is_placed_while_its_model_is_registered_only_so_that_staging_begins(world: World) -> None:
    world.step(AddModel(M))
    world.step(ApplyApp("default/b", replace(SPEC, model=M.id), "x"))
    (runner,) = runners(world)
    assert runner.node
    assert [(one.model, one.manifest_digest) for one in runner.residencies] == [(M.id, "")]
    outcome = did(world, AttestModel(M.id, "aa", 10, 1, attestation="version", attested_by="n-1"))
    assert ModelChanged(M.id) in outcome.effects
    assert runners(world) == [runner], "its node learns it from the cache's own stream"
    model = world.state.models[M.id]
    assert (model.state, model.attestation, model.attested_by) == (ModelState.ATTESTED, "version", "n-1")
    world.step(ApplyApp("default/b", replace(SPEC, model=M.id, env={"A": "1"}), "z"))
    world.heal()
    (runner,) = runners(world)
    assert [(one.model, one.manifest_digest) for one in runner.residencies] == [(M.id, "aa")]


@pytest.mark.parametrize("provisional", [True, False])
def test_a_refused_model_stops_its_runners_and_names_those_that_could_read_it(world: World, provisional: bool) -> None:
    world.step(AddModel(M))
    world.step(AddModel(replace(M, id="default/other", artifact_id="b2" * 32, uri="s3://b/o")))
    spec = replace(SPEC, model=M.id, stream_weights=True, allow_provisional=provisional)
    world.step(ApplyApp("default/b", spec, "x"))
    world.step(ApplyApp("default/c", replace(spec, model="default/other"), "x"))
    world.heal()
    (runner,) = runners(world)
    outcome = did(world, RefuseModel(M.id, "w.safetensors: another SHA-256, read by n-7"))
    assert world.state.runners[runner.id].goal is Goal.STOP
    assert "n-7" in world.state.runners[runner.id].goal_reason
    assert (runner.id in logged(outcome, "ATTESTATION_FAILED").message) is provisional
    assert "n-7" in logged(outcome, "ATTESTATION_FAILED").message
    assert all(one.goal is Goal.RUN for one in runners(world, "default/c"))
    world.heal()
    (waiting,) = runners(world)
    assert waiting.node == ""
    reason = runner_phase(world.state, waiting).reason
    assert "model default/m is refused: w.safetensors" in reason
    assert app_reason(world.state, world.state.apps["default/b"]) == reason
    again = did(world, AddModel(replace(M, artifact_id="c3" * 32)))  # registered anew: the app goes on by itself
    assert again.reply is not None
    assert again.reply.outcome == "created"
    (placed,) = runners(world)
    assert placed.node
    assert refused(world, ApplyApp("default/d", replace(SPEC, model="default/no"), "x")).code is Code.NOT_FOUND


def test_what_is_attested_is_not_refused_any_more(world: World) -> None:
    world.step(AddModel(M))
    world.step(AttestModel(M.id, "aa", 10, 1))
    assert refused(world, RefuseModel(M.id, "late news")).code is Code.FAILED_PRECONDITION
    assert refused(world, AttestModel(M.id, "bb", 10, 1)).code is Code.FAILED_PRECONDITION


def test_an_old_revision_serves_on_while_the_new_ones_model_is_refused(world: World) -> None:
    world.step(ApplyApp("default/b", SPEC, "y"))
    world.heal()
    (serving,) = runners(world)
    world.step(AddModel(M))
    world.step(ApplyApp("default/b", replace(SPEC, model=M.id), "z"))
    world.step(RefuseModel(M.id, "wrong bytes"))
    world.heal()
    old, new = sorted(runners(world), key=lambda one: one.revision)
    assert old == serving, "nothing took its place, so it stays"
    assert (new.revision, new.node) == (2, "")


def test_a_revoked_model_stops_every_runner_for_good_and_takes_no_app(world: World) -> None:
    world.step(AddModel(M))
    world.step(AttestModel(M.id, "aa", 10, 1))
    world.step(ApplyApp("default/b", replace(SPEC, loras=(M.id,)), "x"))
    world.step(StageModel(Wish(M.id, "replicas", 2)))
    world.heal()
    (runner,) = runners(world)
    outcome = did(world, RevokeModel(M.id, "licence ended", actor="operator/ada"))
    assert all(one in outcome.effects for one in (ModelChanged(M.id), WishesChanged(M.id)))
    stopped = world.state.runners[runner.id]
    assert (stopped.goal, stopped.goal_reason) == (Goal.STOP, "model default/m was withdrawn: licence ended")
    assert not world.state.wishes
    world.heal()
    (waiting,) = runners(world)
    assert (waiting.node, "licence ended" in runner_phase(world.state, waiting).reason) == ("", True)
    assert world.state.catalog.withdrawn_because(M.artifact_id) == "licence ended"
    for event in (
        AddModel(M),
        AddModel(replace(M, id="default/other-name")),
        ApplyApp("default/c", replace(SPEC, model=M.id), "x"),
        StageModel(Wish(M.id, "replicas", 1)),
    ):
        error = refused(world, event)
        assert error.code is Code.FAILED_PRECONDITION
        assert "licence ended" in error.what
    assert did(world, RevokeModel(M.id)).reply.outcome == "unchanged"  # type: ignore[union-attr]


def test_an_artifact_stays_as_long_as_one_name_may_use_it(world: World) -> None:
    twin = replace(M, id="default/twin")
    world.step(AddModel(M))
    world.step(AddModel(twin))
    world.step(RevokeModel(M.id, "one contract ended"))
    assert world.state.catalog.withdrawn_because(M.artifact_id) == ""
    world.step(RevokeModel(twin.id, "the other one, too"))
    assert world.state.catalog.withdrawn_because(M.artifact_id) == "the other one, too"
    assert world.state.catalog.withdrawn_because("ff" * 32) == "", "what nobody registered is not withdrawn"


def test_wishes_are_made_changed_and_taken_back(world: World) -> None:
    world.step(AddModel(M))
    assert WishesChanged(M.id) in did(world, StageModel(Wish(M.id, "pool/east"), actor="operator/ada")).effects
    node = world.state.nodes["n-1"]
    world.step(StageModel(Wish(M.id, f"node/{node.name}", tier="memory", expires_at_s=world.wall_s + 10)))
    world.step(StageModel(Wish(M.id, "replicas", 3)))
    world.step(StageModel(Wish(M.id, "replicas", 4)))
    assert [(x.target, x.replicas) for x in world.state.catalog.wishes_of(M.id)] == [
        ("node/n-1", 0), ("pool/east", 0), ("replicas", 4),
    ]  # fmt: skip
    assert refused(world, UnstageModel(M.id, "pool/west")).code is Code.NOT_FOUND
    world.step(UnstageModel(M.id, f"node/{node.name}"))
    world.step(UnstageModel(M.id))
    assert not world.state.wishes
    did(world, UnstageModel(M.id))  # nothing to take back is fine where all are meant


@pytest.mark.parametrize(
    ("wish", "code", "why"),
    [
        (Wish("default/no", "replicas", 1), Code.NOT_FOUND, "default/no"),
        (Wish(M.id, "replicas", 0), Code.INVALID, "replicas"),
        (Wish(M.id, "replicas", 10**9), Code.INVALID, "replicas"),
        (Wish(M.id, "pool/east", 2), Code.INVALID, "replicas"),
        (Wish(M.id, "pool/no"), Code.NOT_FOUND, "'no'"),
        (Wish(M.id, "node/no"), Code.NOT_FOUND, "'no'"),
        (Wish(M.id, "region/eu"), Code.INVALID, "target"),
        (Wish(M.id, "pool"), Code.INVALID, "target"),
        (Wish(M.id, ""), Code.INVALID, "target"),
        (Wish(M.id, "pool/east", tier="tape"), Code.INVALID, "tier"),
    ],
)
def test_a_wish_that_means_nothing_is_refused(world: World, wish: Wish, code: Code, why: str) -> None:
    world.step(AddModel(M))
    error = refused(world, StageModel(wish))
    assert error.code is code
    assert why in error.what


def test_wishes_have_a_bound(world: World) -> None:
    world.step(AddModel(M))
    for number in range(WISHES_PER_MODEL_MAX):
        wish = Wish(M.id, f"pool/p{number}")
        world.state.catalog.set_wish(None, wish)
    assert refused(world, StageModel(Wish(M.id, "replicas", 1))).code is Code.BUSY


@pytest.mark.parametrize("ttl_s", [-1.0, float("inf"), float("nan"), 1e12])
def test_a_wish_lasts_a_sane_time(ttl_s: float) -> None:
    with pytest.raises(FalError, match="ttl_s"):
        check_ttl(ttl_s)


def test_collecting_forgets_what_nobody_needs_and_nothing_else(world: World) -> None:
    kept = replace(M, id="default/kept", artifact_id="b2" * 32)
    used = replace(M, id="default/used", artifact_id="c3" * 32)
    for model in (M, kept, used):
        world.step(AddModel(model))
    world.step(ApplyApp("default/b", replace(SPEC, model=used.id), "x"))
    world.step(RevokeModel(M.id, "x"))
    world.step(RevokeModel(used.id, "x"))
    world.step(StageModel(Wish(kept.id, "pool/east", expires_at_s=world.wall_s + 5)))
    world.step(StageModel(Wish(kept.id, "replicas", 1)))
    world.now_s += 10
    assert in_use(world.state) == {used.id}
    outcome = did(world, CollectModels((M.id, kept.id, used.id, "default/no")))
    assert outcome.reply is not None
    assert outcome.reply.lines == (M.id,)
    assert set(world.state.models) == {kept.id, used.id}
    assert [wish.target for wish in world.state.catalog.all_wishes()] == ["replicas"]
    world.step(DeleteApp("default/b"))
    world.heal()
    assert did(world, CollectModels((used.id,))).reply.lines == (used.id,)  # type: ignore[union-attr]


def test_a_record_of_the_first_release_is_completed_once(world: World) -> None:
    old = Model("default/old", "model", "file:///m", ModelState.ATTESTED, "aa", 10, 1)
    world.step(AddModel(old))
    world.step(IdentifyModel(old.id, "d4" * 32, "file:///m"))
    model = world.state.models[old.id]
    assert (model.artifact_id, model.attestation, model.attested_by) == ("d4" * 32, "read", "scheduler")
    assert world.state.models_by_artifact["d4" * 32] == (old.id,)
    assert world.state.models_by_digest["aa"] == (old.id,)
    assert did(world, IdentifyModel(old.id, "e5" * 32, "file:///m")).reply.outcome == "unchanged"  # type: ignore[union-attr]


NAMES = st.from_regex(r"(a|b|a-b)/[ab]{1,2}", fullmatch=True)


@given(
    st.lists(st.tuples(NAMES, st.sampled_from(["model", "lora", ""]), st.sampled_from(["x", "y", ""])), max_size=30),
    st.sampled_from(["", "a", "b", "a-b"]),
    st.sampled_from(["", "model", "lora"]),
    st.sampled_from(["", "a", "ab"]),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None, database=None)
def test_pages_are_complete_in_order_and_every_index_follows(
    edits: list[tuple[str, str, str]], team: str, kind: str, prefix: str, limit: int
) -> None:
    """Kind "" removes the model. Pages of any size give what a plain filter gives."""
    catalog = Catalog()
    for id_, new_kind, artifact in edits:
        before = catalog.models.get(id_)
        after = Model(id_, new_kind, "s3://b/x", artifact_id=artifact, manifest_digest=artifact) if new_kind else None
        if before is not None or after is not None:
            catalog.set_model(before, after)
    expected = [
        model
        for _, model in sorted(catalog.models.items())
        if team in ("", model.id.split("/")[0])
        and kind in ("", model.kind)
        and model.id.split("/")[1].startswith(prefix)
    ]
    found: list[Model] = []
    after_id, pages = "", 0
    while True:
        page, after_id, total = catalog.page(team=team, kind=kind, prefix=prefix, after=after_id, limit=limit)
        assert total == len(expected)
        found += page
        pages += 1
        if not after_id:
            break
    assert found == expected
    assert pages == max(1, -(-len(expected) // limit))
    for index, field in ((catalog.by_artifact, "artifact_id"), (catalog.by_digest, "manifest_digest")):
        entries = {(key, id_) for key, ids in index.items() for id_ in ids}
        assert entries == {(getattr(m, field), m.id) for m in catalog.models.values() if getattr(m, field)}
