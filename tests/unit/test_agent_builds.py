"""Compile caches on a node: a build task runs once and leaves what fsd takes in; entries are shown only when proven."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agent_fakes import Box, assignment, model, until, welcome
from fal_agent import wire
from fal_agent.core.entries import allowed, refusal
from fal_agent.core.tasks import Phase
from fal_agent.launch import container_id, model_name, output_folder
from fal_agent.node import Node
from fal_contract.artifact import cache_entry_text
from fal_contract.cache_key import entry_model
from fal_contract.errors import Code, FalError
from fal_contract.limits import BUILD_OUTPUT_PIN_S, CACHE_ENTRY_WAIT_S
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.driver import ContainerSpec
from fal_runtime.fake import Script
from virtual_time import LoopClock, run_virtually

BUILD = "system/build-abab-00000001-00000001"
RUNNER = "t/app-00000001"
KEY = "cd" * 32
CA, NODE = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
Scenario = Callable[[Box], Awaitable[None]]


def play(tmp_path: Path, scenario: Scenario) -> None:
    async def main() -> None:
        box = Box(tmp_path, LoopClock())
        box.ca_key = CA.public_key()
        await scenario(box)

    run_virtually(main())


async def begin(box: Box, *assignments: agent_pb2.Assignment, node: Node | None = None) -> Node:
    if node is None:
        node = box.agent()
        await node.start()
    node.hello()
    node.welcome(wire.leader_of(welcome()))
    message = agent_pb2.Complete(revision=1, term=1, store_revision=1, assignments=assignments)
    await node.receive(wire.complete_of(message))
    return node


def build(bytes_max: int = 1 << 20, **changes: object) -> agent_pb2.Assignment:
    task = state_pb2.BuildTask(namespace="cluster", key=KEY, bytes_max=bytes_max)
    app = BUILD.rsplit("-", 1)[0]
    return assignment(BUILD, app=app, share_group=app, build=task, **changes)


def status(node: Node, runner: str = BUILD) -> agent_pb2.RunnerStatus:
    return next(x for x in node.hello().runners if x.runner_id == runner)


def over(node: Node) -> Callable[[], bool]:
    return lambda: all(task.phase is Phase.GONE for task in node.tasks())


def kinds(node: Node) -> list[str]:
    return [event.kind for event in node.take_report().events]


# --- build tasks ------------------------------------------------------------------------------------------------------


def test_a_build_task_runs_once_and_its_output_is_told(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(exit_after_s=50.0, ready_after_s=None, lines=("compiling",))
        node = await begin(box, build())
        folder = output_folder(box.places, BUILD)
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        assert folder.is_dir()
        spec = box.machine.containers[container_id(BUILD)].spec
        (mount,) = spec.mounts
        assert (mount.source, mount.target, mount.read_only) == (folder, "/output", False)
        assert spec.env["FAL_BUILD_OUTPUT"] == "/output"
        assert status(node).state == state_pb2.RUNNER_STATE_SETUP
        assert status(node).reason == "the build task runs"
        await until(over(node))
        told = status(node)
        assert (told.state, told.exit_code, told.output.kind) == (state_pb2.RUNNER_STATE_TERMINATED, 0, "cache")
        assert box.cache.taken_in == [
            (folder, entry_model("cluster", KEY), 1 << 20, f"build {BUILD}", BUILD_OUTPUT_PIN_S)
        ]
        assert not folder.exists()
        assert not box.proxy.entries  # nobody ever sends it a request
        await node.close()

    play(tmp_path, scenario)


def test_output_outlives_the_agent_that_took_it_in(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(exit_after_s=5.0, ready_after_s=None)
        node = await begin(box, build())
        await until(over(node))
        await node.close()
        again = box.agent()
        await again.start()
        assert status(again).output == status(node).output
        await again.close()

    play(tmp_path, scenario)


def test_a_restarted_agent_goes_on_with_a_build(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(exit_after_s=30.0, ready_after_s=None)
        node = await begin(box, build())
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        await node.close()
        again = box.agent()
        await again.start()
        await begin(box, build(), node=again)
        await until(over(again))
        assert status(again).output.kind == "cache"
        assert box.machine.running_max == 1
        await again.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize("code", [1, 137])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, code: int) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(
            exit_after_s=5.0, exit_code=code, ready_after_s=None, lines=("no compiler",)
        )
        node = await begin(box, build())
        await until(over(node))
        told = status(node)
        assert (told.exit_code, told.HasField("output"), list(told.log_tail)) == (code, False, ["no compiler"])
        assert not box.cache.taken_in
        assert not output_folder(box.places, BUILD).exists()
        await node.close()

    play(tmp_path, scenario)


def test_a_build_ends_at_its_time(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(ready_after_s=None)
        node = await begin(box, build())
        await until(over(node), within_s=200)
        assert status(node).reason == "did not end within 60 s"
        assert not box.cache.taken_in
        await node.close()

    play(tmp_path, scenario)


def test_a_build_that_writes_too_much_is_stopped(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(ready_after_s=None)
        node = await begin(box, build(bytes_max=100_000))
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        (output_folder(box.places, BUILD) / "large").write_bytes(b"x" * 200_000)
        await until(over(node))
        assert "at most 100000 are allowed" in status(node).reason
        assert not box.cache.taken_in
        await node.close()

    play(tmp_path, scenario)


def test_what_fsd_does_not_take_fails_the_build_with_its_reason(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(exit_after_s=5.0, ready_after_s=None)
        why = FalError(Code.INVALID, "folder = '/x' has no files", remedy="Give one that has.")
        box.cache.refuse[entry_model("cluster", KEY)] = why
        node = await begin(box, build())
        await until(over(node))
        assert "has no files" in status(node).reason
        assert not status(node).HasField("output")
        await node.close()

    play(tmp_path, scenario)


def test_output_waits_for_an_fsd_that_is_away(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(exit_after_s=5.0, ready_after_s=None)
        node = await begin(box, build())
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        box.cache.away = True
        await until(lambda: "fsd does not answer" in status(node).reason)
        box.cache.away = False
        await until(over(node))
        assert status(node).output.kind == "cache"
        await node.close()

    play(tmp_path, scenario)


# --- entries ----------------------------------------------------------------------------------------------------------


def entry(namespace: str = "team/t", *, key: ec.EllipticCurvePrivateKey = CA, name: str = "") -> agent_pb2.Artifact:
    artifact = model(name or entry_model(namespace, KEY), kind="cache")
    artifact.namespace, artifact.cache_key = namespace, KEY
    text = cache_entry_text(namespace, KEY, artifact.manifest_digest)
    artifact.entry_signature = key.sign(text, ec.ECDSA(hashes.SHA256()))
    return artifact


def changed(**fields: object) -> agent_pb2.Artifact:
    artifact = entry()
    for name, value in fields.items():
        setattr(artifact, name, value)
    return artifact


BAD = {
    "foreign": (entry("team/b"), "'team/b'"),
    "of no namespace": (entry(""), "namespace ''"),
    "of the scheduler's own team": (entry("team/system"), "team/system"),
    "signed by a node": (entry(key=NODE), "not signed"),
    "of another key": (changed(cache_key="ef" * 32), "not signed"),
    "of other content": (changed(manifest_digest="ef" * 32), "not signed"),
    "moved to another namespace": (changed(namespace="cluster"), "not signed"),
    "without content": (changed(manifest_digest=""), "not signed"),
    "without signature": (changed(entry_signature=b""), "not signed"),
}


@pytest.mark.parametrize("what", sorted(BAD))
def test_an_entry_that_is_not_proven_is_left_out_with_an_event(tmp_path: Path, what: str) -> None:
    bad, why = BAD[what]

    async def scenario(box: Box) -> None:
        node = await begin(box, assignment(RUNNER, app="t/app", artifacts=[bad, entry("cluster"), model("t/m")]))
        await until(lambda: node.tasks()[0].phase is Phase.SERVING)
        good = model_name(entry_model("cluster", KEY))
        assert set(box.machine.models_of(container_id(RUNNER))) == {good, "t.m"}
        env = box.machine.containers[container_id(RUNNER)].spec.env
        assert env["FAL_COMPILE_CACHE"] == f"{KEY}=/models/{good}"
        assert env["FAL_MODEL_DIR"] == "/models/t.m"
        assert bad.model not in box.cache.pins[RUNNER]
        (event,) = [event for event in node.take_report().events if event.kind == "CACHE_REFUSED"]
        assert event.subject == RUNNER
        assert why in event.message
        assert [x.model for x in status(node, RUNNER).residencies] == ["t/m"]
        await node.close()

    play(tmp_path, scenario)


def test_every_entry_is_refused_where_the_cas_key_is_not_known() -> None:
    message = assignment(RUNNER, app="t/app", artifacts=[entry(), model("t/m")])
    kept, refused = allowed(message, None)
    assert [one.model for one in kept.artifacts] == ["t/m"]
    assert list(refused) == [entry().model]
    assert len(message.artifacts) == 2  # what came is left as it is
    assert allowed(message, CA.public_key()) == (message, {})
    assert not refusal(entry("cluster"), "b/app", CA.public_key())


@pytest.mark.parametrize(
    ("code", "kind"),
    [(Code.CORRUPT, "CACHE_REFUSED"), (Code.NOT_FOUND, "CACHE_REFUSED"), (Code.UNAVAILABLE, "CACHE_MISSED")],
)
def test_a_container_starts_without_an_entry_that_does_not_come(tmp_path: Path, code: Code, kind: str) -> None:
    async def scenario(box: Box) -> None:
        box.cache.refuse[entry().model] = FalError(code, "its pieces are not what was attested", remedy="None.")
        node = await begin(box, assignment(RUNNER, app="t/app", artifacts=[entry()]))
        await until(lambda: node.tasks()[0].phase is Phase.SERVING)
        assert not box.machine.models_of(container_id(RUNNER))
        assert kind in kinds(node)
        await node.close()

    play(tmp_path, scenario)


def test_a_slow_entry_is_waited_for_so_long_only(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.stage_s = CACHE_ENTRY_WAIT_S + 1
        node = await begin(box, assignment(RUNNER, app="t/app", artifacts=[entry()]))
        await until(lambda: node.tasks()[0].phase is Phase.SERVING, within_s=200)
        assert "CACHE_MISSED" in kinds(node)
        await node.close()

    play(tmp_path, scenario)


def test_an_app_cannot_set_what_names_its_caches(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        message = assignment(RUNNER, app="t/app", artifacts=[entry()])
        message.spec.env["FAL_COMPILE_CACHE"] = "/x"
        node = await begin(box, message)
        await until(lambda: node.tasks()[0].phase is Phase.SERVING)
        spec: ContainerSpec = box.machine.containers[container_id(RUNNER)].spec
        assert spec.env["FAL_COMPILE_CACHE"] == f"{KEY}=/models/{model_name(entry().model)}"
        await node.close()

    play(tmp_path, scenario)
