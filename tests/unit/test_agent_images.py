"""A runner of a real image on the fakes: made of what can be read, moved to the plain file, its start recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent_fakes import Box, assignment, model, until, welcome
from fal_agent import wire
from fal_agent.core.tasks import Phase
from fal_agent.launch import container_id
from fal_agent.node import Node
from fal_contract.errors import Code, FalError
from fal_contract.limits import IMAGE_START_S
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.driver import Image
from fal_runtime.fake import Script
from virtual_time import LoopClock, run_virtually

RUNNER = "default/digits-00000001"
IMAGE = "default/torch"
ID = "cd" * 32
WHOLE = Image(ID, Path("/cache") / IMAGE)
ARRIVING = Image(ID, Path("/in-flight") / IMAGE, finished=False)
RECORDED = list(range(30, 0, -1))


def play(tmp_path: Path, scenario: Callable[[Box], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(Box(tmp_path, LoopClock()))

    run_virtually(main())


def image(*, first: bool) -> agent_pb2.Artifact:
    made = model(IMAGE, "image")
    made.artifact_id, made.stream = ID, True
    made.first_pieces.extend([3, 1, 2] if first else [])
    return made


async def begin(box: Box, *, first: bool, weights: bool = True, **changes: object) -> Node:
    """A node with one runner of an image and, with `weights`, a model."""
    node = box.agent()
    await node.start()
    node.hello()
    node.welcome(wire.leader_of(welcome()))
    artifacts = [image(first=first), model()] if weights else [image(first=first)]
    wish = assignment(RUNNER, artifacts=artifacts, image=IMAGE, **changes)
    await node.receive(wire.complete_of(agent_pb2.Complete(revision=1, term=1, store_revision=1, assignments=[wish])))
    return node


def phase(node: Node) -> Phase | None:
    return next((task.phase for task in node.tasks()), None)


def test_a_container_is_made_of_an_image_that_arrives_and_moved_when_it_is_whole(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount, box.cache.stage_s = True, 20.0
        box.cache.accesses[ID] = RECORDED
        node = await begin(box, first=True)
        await until(lambda: phase(node) is Phase.SERVING, within_s=150)
        spec = box.machine.containers[container_id(RUNNER)].spec
        assert spec.image == ARRIVING
        assert spec.command == ()  # the image's own, not our worker
        assert "PYTHONPATH" not in spec.env
        assert spec.env["FAL_RUNNER_ID"] == RUNNER
        assert "FAL_STREAM_WEIGHTS" not in spec.env  # an image is no weights
        assert box.machine.models_of(container_id(RUNNER)).keys() == {"default.digits-model"}
        await until(lambda: WHOLE in box.machine.images_finished, within_s=150)
        assert not node.take_report().access  # its order is known
        await node.close()

    play(tmp_path, scenario)


def test_the_first_start_of_an_image_is_recorded(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount = True
        box.cache.accesses[ID] = RECORDED
        box.machine.script_of = lambda spec: Script(ready_after_s=30.0)
        node = await begin(box, first=False)
        await until(lambda: phase(node) is Phase.STARTED)
        assert box.machine.images_finished == []  # it is whole, and read through the mount all the same
        await until(lambda: phase(node) is Phase.SERVING, within_s=100)
        await until(lambda: box.machine.images_finished)
        [access] = node.take_report().access
        assert (access.artifact_id, access.runner_id, list(access.pieces)) == (ID, RUNNER, RECORDED)
        assert not node.take_report().access
        await node.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_runner_that_ends_before_it_is_ready_leaves_no_recording(tmp_path: Path, restarted: bool) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount = True
        box.cache.accesses[ID] = RECORDED
        box.machine.script_of = lambda spec: Script(ready_after_s=1000.0)
        node = await begin(box, first=False)
        await until(lambda: phase(node) is Phase.STARTED)
        assert box.cache.recording == {ID}
        if restarted:
            await node.close()
            node = box.agent(agent_id="a-2")
            await node.start()
        box.machine.exit(container_id(RUNNER), 1)
        await until(lambda: phase(node) is Phase.GONE, within_s=100)
        assert box.cache.recording == set()
        assert not node.take_report().access  # half a start says nothing about a whole one
        await node.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize("ready_after_s", [30.0, 1000.0])
def test_the_whole_image_is_asked_for_once_the_runner_is_ready_or_late(tmp_path: Path, ready_after_s: float) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount = True
        box.machine.script_of = lambda spec: Script(ready_after_s=ready_after_s)
        node = await begin(box, first=True)
        await until(lambda: phase(node) is Phase.STARTED)
        await asyncio.sleep(min(ready_after_s, IMAGE_START_S) - 5.0)
        assert IMAGE not in box.cache.staged
        await until(lambda: IMAGE in box.cache.staged, within_s=20)
        assert (phase(node) is Phase.SERVING) == (ready_after_s < IMAGE_START_S)
        await until(lambda: WHOLE in box.machine.images_finished)
        await node.close()

    play(tmp_path, scenario)


def test_a_start_that_read_next_to_nothing_is_not_told(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount = True
        box.cache.accesses[ID] = [0, 1, 9]
        node = await begin(box, first=False)
        await until(lambda: box.machine.images_finished)
        assert not node.take_report().access
        await node.close()

    play(tmp_path, scenario)


def test_an_image_is_followed_again_after_a_restart_of_the_agent(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount, box.cache.stage_s = True, 50.0
        box.cache.accesses[ID] = RECORDED
        first = await begin(box, first=True, weights=False)
        await until(lambda: phase(first) is Phase.SERVING, within_s=100)
        await first.close()
        box.machine.images_finished.clear()
        second = box.agent(agent_id="a-2")
        await second.start()
        await until(lambda: box.machine.images_finished == [WHOLE], within_s=150)
        await second.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize("code", [Code.CORRUPT, Code.UNAVAILABLE])
def test_an_image_that_cannot_be_had(tmp_path: Path, code: Code) -> None:
    async def scenario(box: Box) -> None:
        box.cache.refuse[IMAGE] = FalError(code, "bad image", remedy="-")
        node = await begin(box, first=True)
        if code is Code.CORRUPT:
            await until(lambda: node.take_report().runners[0].reason.count("bad image"), within_s=100)
        else:
            await until(lambda: phase(node) is Phase.ADMITTED)
            del box.cache.refuse[IMAGE]
            await until(lambda: phase(node) is Phase.SERVING, within_s=100)
        await node.close()

    play(tmp_path, scenario)


def test_a_node_that_cannot_run_images_refuses_them(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        node = box.agent()
        bare = agent_pb2.Capabilities(driver="fake", isolates=True)
        node._facts = replace(node._facts, capabilities=bare)
        await node.start()
        node.hello()
        node.welcome(wire.leader_of(welcome()))
        wish = assignment(RUNNER, artifacts=[image(first=True)], image=IMAGE)
        message = agent_pb2.Complete(revision=1, term=1, store_revision=1, assignments=[wish])
        await node.receive(wire.complete_of(message))
        [status] = node.take_report().runners
        assert status.state == state_pb2.RUNNER_STATE_TERMINATED
        assert IMAGE in status.reason
        await node.close()

    play(tmp_path, scenario)
