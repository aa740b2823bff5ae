"""Images on the pure core: one task an image, another try where its node fails it, a name that keeps its content."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from core_world import GIB, World, spec_of
from fal_contract.errors import Code, FalError
from fal_contract.limits import BUILD_WAIT_MAX_S, IMAGE_FIRST_PIECES_MAX, IMAGE_PACK_TRIES_MAX
from fal_scheduler.core.build_events import BuildEnded, FailBuild
from fal_scheduler.core.builds import runner_of, task_of
from fal_scheduler.core.events import ApplyApp, DeleteApp, Event, Moment, NodeReport, Reply, StopRunner, Tick
from fal_scheduler.core.model_commands import in_use, users
from fal_scheduler.core.model_events import AddModel, RevokeModel
from fal_scheduler.core.pack_events import AccessTold, PackImage, PutImage, RemoveModel
from fal_scheduler.core.packs import NAMESPACE, pack_of
from fal_scheduler.core.records import (
    BuildTask,
    Goal,
    ImageFacts,
    Model,
    ModelState,
    Resources,
    Runner,
    RunnerState,
    Scaling,
    Spec,
)
from fal_scheduler.core.told import Capabilities, RunnerStatus

ID = "default/img"
SOURCE = "docker://registry/repo:1"
DIGEST = "sha256:" + "ab" * 32
ABLE = Capabilities("oci", isolates=True, features=("images", "pack"))


def task_spec(id_: str = ID, source: str = SOURCE, platform: str = "linux/amd64") -> Spec:
    return Spec(
        "host",
        network="host",
        resources=Resources(1000, GIB),
        scaling=Scaling(min_concurrency=1, max_concurrency=1),
        build=BuildTask(NAMESPACE, "cd" * 32, 1 << 30, image=id_, source=source, platform=platform),
    )


def image(id_: str = ID, *, pieces: tuple[int, ...] = ()) -> Model:
    facts = ImageFacts(SOURCE, DIGEST, "erofs", "linux/amd64", pieces)
    return Model(
        id_, "image", SOURCE, ModelState.ATTESTED, "ef" * 32, 10 << 20, 2, artifact_id="12" * 32,
        resolved_uri="push://ingest", attestation="pack", attested_by="n", image=facts,
    )  # fmt: skip


@pytest.fixture
def world() -> World:
    made = World(Random(1), nodes=2)
    for node_id in made.state.nodes:
        made.state.live_of(node_id).capabilities = ABLE
        made.state.refresh_node(node_id)
    return made


def begun(world: World, spec: Spec | None = None) -> Runner:
    world.step(PackImage(spec or task_spec(), "operator/ada"))
    return packing(world)


def packing(world: World) -> Runner:
    found = pack_of(world.state, ID)
    assert found is not None
    runner = runner_of(world.state, found[0])
    assert runner is not None
    return runner


def told(world: World, runner: Runner, **more: object) -> list[object]:
    """Its node tells of its end; the effects."""
    assert runner.assignment is not None
    status = RunnerStatus(runner.id, RunnerState.TERMINATED, runner.assignment.id, runner.assignment.term, **more)  # type: ignore[arg-type]
    live = world.state.live[runner.node]
    outcome = world.step(NodeReport(runner.node, live.session_id, world.now_s, statuses=(status,)))
    assert outcome is not None
    return list(outcome.effects)


def lose(world: World, runner: Runner) -> None:
    world.state.abandoned[runner.id] = None
    world.state.dirty[runner.app] = None
    world.step(Tick())


def refused(world: World, event: Event) -> FalError:
    """Why it is refused; nothing has changed then."""
    assert world.step(event) is None
    with pytest.raises(FalError) as caught:
        world.core.step(event, Moment(world.now_s, world.wall_s))
    return caught.value


def done(world: World, event: Event) -> Reply:
    outcome = world.step(event)
    assert outcome is not None
    assert outcome.reply is not None
    return outcome.reply


def add(world: World, **more: object) -> Runner:
    runner = begun(world)
    world.step(PutImage(replace(image(), **more), runner.id))  # type: ignore[arg-type]
    return runner


def app_event() -> ApplyApp:
    spec, digest = spec_of(gpus=0)
    return ApplyApp("default/app", replace(spec, image=ID), digest)


def app_with_image(world: World) -> None:
    assert done(world, app_event()).outcome == "created"


# --- packing ----------------------------------------------------------------------------------------------------------


def test_one_task_packs_an_image_whoever_asks(world: World) -> None:
    runner = begun(world)
    assert runner.node
    assert runner.app.startswith("system/pack-")
    reply = done(world, PackImage(task_spec()))
    assert (reply.outcome, reply.subject) == ("packing", runner.id)
    other = refused(world, PackImage(task_spec(source="docker://registry/other:1")))
    assert (other.code, other.field) == (Code.CONFLICT, "source")
    assert len(world.state.catalog.builds) == 1


def test_a_packed_image_is_kept_and_wished_on_two_nodes(world: World) -> None:
    runner = begun(world)
    assert any(isinstance(x, BuildEnded) for x in told(world, runner, exit_code=0, output=b"manifest"))
    assert packing(world) == runner  # until the answer is durable
    world.step(PutImage(image(), runner.id))
    assert world.state.models[ID].image == image().image
    (wish,) = world.state.catalog.wishes_of(ID)
    assert (wish.target, wish.replicas, wish.expires_at_s, wish.created_by) == ("replicas", 2, 0.0, "operator/ada")
    assert pack_of(world.state, ID) is None
    world.heal()
    assert not world.state.catalog.builds
    assert not world.state.apps
    reply = done(world, PackImage(task_spec()))
    assert reply.outcome == "unchanged"


def test_a_pack_goes_on_with_another_node_when_its_own_is_lost(world: World) -> None:
    first = begun(world)
    lose(world, first)
    second = packing(world)
    assert second.id != first.id
    assert second.node
    assert world.state.runners[first.id].goal is Goal.STOP  # should it come back
    assert "lost" in world.state.runners[first.id].goal_reason
    told(world, world.state.runners[first.id], exit_code=0, output=b"manifest")  # late
    assert first.id not in world.state.runners
    assert packing(world) == second
    world.step(PutImage(image(), second.id))
    world.heal()
    assert not world.state.apps


def test_a_pack_whose_runner_was_never_started_is_tried_again_and_then_has_failed(world: World) -> None:
    seen = [begun(world)]
    for _ in range(IMAGE_PACK_TRIES_MAX - 1):
        told(world, seen[-1], refused=True, reason="NO_CAPACITY: memory")
        seen.append(packing(world))
    assert len({runner.id for runner in seen}) == IMAGE_PACK_TRIES_MAX
    told(world, seen[-1], refused=True, reason="NO_CAPACITY: memory", log_tail=("last words",))
    assert pack_of(world.state, ID) is None
    failure = world.state.build_failures[NAMESPACE, ID]
    assert (failure.reason, failure.lines, failure.runner) == ("NO_CAPACITY: memory", ("last words",), seen[-1].id)


def test_a_pack_that_failed_by_its_own_work_is_not_tried_again(world: World) -> None:
    runner = begun(world)
    told(world, runner, exit_code=1, reason="exited with code 1", log_tail=("asking", "error: no such image"))
    assert pack_of(world.state, ID) is None
    failure = world.state.build_failures[NAMESPACE, ID]
    assert (failure.reason, failure.lines) == ("no such image", ("asking", "error: no such image"))
    again = begun(world)
    assert again.app != runner.app
    assert (NAMESPACE, ID) not in world.state.build_failures


def test_output_that_is_refused_fails_the_pack(world: World) -> None:
    runner = begun(world)
    told(world, runner, exit_code=0, output=b"manifest")
    world.step(FailBuild(runner.id, "its output was refused: …", refused=True))
    assert "refused" in world.state.build_failures[NAMESPACE, ID].reason
    late = refused(world, PutImage(image(), runner.id))
    assert late.code is Code.FAILED_PRECONDITION


def test_a_pack_that_an_operator_stops_has_failed(world: World) -> None:
    runner = begun(world)
    world.step(StopRunner(runner.id, reason="enough"))
    told(world, world.state.runners[runner.id], exit_code=143)
    assert world.state.build_failures[NAMESPACE, ID].reason == "enough"


def test_without_a_node_that_packs_it_waits_and_says_why(world: World) -> None:
    for node_id in world.state.nodes:
        world.state.live_of(node_id).capabilities = Capabilities("oci", isolates=True, features=("images",))
        world.state.refresh_node(node_id)
    runner = begun(world)
    assert not runner.node
    pending = world.state.pending[runner.app, 1]
    assert dict(pending.refused) == {"pack": 2}
    assert "cannot pack images" in pending.reason
    world.now_s += BUILD_WAIT_MAX_S + 1
    world.step(Tick())
    assert "cannot pack images" in world.state.build_failures[NAMESPACE, ID].reason


def test_only_the_runner_that_packs_an_image_brings_it(world: World) -> None:
    runner = begun(world)
    for model in (image("default/other"), replace(image(), image=None)):
        assert refused(world, PutImage(model, runner.id)).code is Code.FAILED_PRECONDITION
    assert refused(world, PutImage(image(), "default/a-1")).code is Code.FAILED_PRECONDITION
    assert ID not in world.state.models
    assert task_of(world.state, runner.id)[2].image == ID


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        (task_spec(), True),
        (task_spec(source=f"docker://elsewhere/repo@{DIGEST}"), True),
        (task_spec(source="docker://registry/repo:2"), False),
        (task_spec(source=f"docker://registry/repo@sha256:{'00' * 32}"), False),
        (task_spec(platform="linux/arm64"), False),
    ],
)
def test_a_names_content_never_changes(world: World, spec: Spec, same: bool) -> None:
    add(world)
    if same:
        reply = done(world, PackImage(spec))
        assert reply.outcome == "unchanged"
        return
    error = refused(world, PackImage(spec))
    assert error.code is Code.ALREADY_EXISTS
    assert "image rm" in error.remedy
    app_with_image(world)
    error = refused(world, PackImage(spec))
    assert "default/app" in error.remedy


def test_a_models_name_is_no_images(world: World) -> None:
    world.step(AddModel(Model("default/m0", "model", "hf://a/b", artifact_id="56" * 32)))
    error = refused(world, PackImage(task_spec("default/m0")))
    assert error.code is Code.ALREADY_EXISTS
    assert "is a model" in error.what


# --- in use -----------------------------------------------------------------------------------------------------------


def test_an_app_is_applied_with_an_image_that_is_there_only(world: World) -> None:
    error = refused(world, app_event())
    assert (error.code, error.field) == (Code.NOT_FOUND, "image")
    assert "falctl image add img docker://" in error.remedy
    add(world)
    app_with_image(world)
    assert ID in in_use(world.state)
    assert users(world.state, ID) == ["default/app"]
    (runner,) = [world.state.runners[i] for i in world.state.runners_by_app["default/app"]]
    assert runner.node


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"kind": "model"}, Code.INVALID),
        ({"state": ModelState.REGISTERED}, Code.FAILED_PRECONDITION),
        ({"state": ModelState.REVOKED, "reason": "licence"}, Code.FAILED_PRECONDITION),
    ],
)
def test_an_app_names_no_image_that_it_could_not_start(world: World, change: dict[str, object], code: Code) -> None:
    add(world, **change)
    error = refused(world, app_event())
    assert (error.code, error.field) == (code, "image")


def test_a_withdrawn_image_stops_its_runners(world: World) -> None:
    add(world)
    app_with_image(world)
    (runner_id,) = world.state.runners_by_app["default/app"]
    world.step(RevokeModel(ID, "licence"))
    runner = world.state.runners[runner_id]
    assert runner.goal is Goal.STOP
    assert runner.goal_reason == f"image {ID} was withdrawn: licence"


# --- the end ----------------------------------------------------------------------------------------------------------


def test_an_image_that_is_used_is_not_removed(world: World) -> None:
    add(world)
    app_with_image(world)
    error = refused(world, RemoveModel(ID))
    assert error.code is Code.FAILED_PRECONDITION
    assert "default/app" in error.what
    world.step(DeleteApp("default/app"))
    world.heal()
    reply = done(world, RemoveModel(ID))
    assert reply.outcome == "removed"
    assert ID not in world.state.models
    assert not world.state.catalog.wishes_of(ID)
    begun(world, task_spec(source="docker://registry/repo:2"))  # the name is free again


def test_removing_an_image_ends_the_task_that_packs_it(world: World) -> None:
    runner = begun(world)
    reply = done(world, RemoveModel(ID))
    assert reply.outcome == "cancelled"
    assert world.state.runners[runner.id].goal is Goal.STOP
    assert refused(world, PutImage(image(), runner.id)).code is Code.FAILED_PRECONDITION
    world.heal()
    assert not world.state.apps
    assert refused(world, RemoveModel(ID)).code is Code.NOT_FOUND


def test_a_failure_is_forgotten_by_name(world: World) -> None:
    told(world, begun(world), exit_code=1)
    world.step(RemoveModel(ID))
    assert not world.state.build_failures


def test_a_withdrawn_image_is_remembered(world: World) -> None:
    add(world)
    world.step(RevokeModel(ID, "licence"))
    error = refused(world, RemoveModel(ID))
    assert "weights gc" in error.remedy
    assert refused(world, PackImage(task_spec())).code is Code.FAILED_PRECONDITION


# --- recorded starts --------------------------------------------------------------------------------------------------


def started(world: World) -> Runner:
    add(world)
    app_with_image(world)
    (runner_id,) = world.state.runners_by_app["default/app"]
    return world.state.runners[runner_id]


def report(world: World, node_id: str, told: AccessTold) -> None:
    assert world.step(NodeReport(node_id, world.state.live[node_id].session_id, world.now_s, access=(told,)))


def pieces(world: World) -> tuple[int, ...]:
    facts = world.state.models[ID].image
    assert facts is not None
    return facts.first_pieces


def test_the_first_recorded_start_orders_an_image(world: World) -> None:
    runner = started(world)
    report(world, runner.node, AccessTold(image().artifact_id, runner.id, (7, 0, 7, 41, 42, 10**6)))
    assert pieces(world) == (7, 0, 41)  # 40 pieces of 10 MiB, and two files: 42 at most
    report(world, runner.node, AccessTold(image().artifact_id, runner.id, (1, 2, 3)))
    assert pieces(world) == (7, 0, 41)


@pytest.mark.parametrize("lie", ["node", "artifact", "runner", "empty"])
def test_what_a_node_cannot_know_orders_nothing(world: World, lie: str) -> None:
    runner = started(world)
    other = next(node_id for node_id in world.state.nodes if node_id != runner.node)
    told_of = AccessTold(image().artifact_id, runner.id, (1,))
    changes: dict[str, dict[str, object]] = {
        "node": {},
        "artifact": {"artifact_id": "34" * 32},
        "runner": {"runner": "default/none-1"},
        "empty": {"pieces": (10**6,)},
    }
    report(world, other if lie == "node" else runner.node, replace(told_of, **changes[lie]))  # type: ignore[arg-type]
    assert pieces(world) == ()


def test_a_recording_is_bounded(world: World) -> None:
    runner = started(world)
    large = replace(world.state.models[ID], bytes=10 << 30)
    world.state.catalog.set_model(world.state.models[ID], large)
    told_pieces = tuple(range(2 * IMAGE_FIRST_PIECES_MAX))
    report(world, runner.node, AccessTold(image().artifact_id, runner.id, told_pieces))
    assert len(pieces(world)) == IMAGE_FIRST_PIECES_MAX
