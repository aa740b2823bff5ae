"""Weights that arrive while the container runs: attached unfinished, replaced when whole, given up, cancelled."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent_fakes import Box, assignment, model, until, welcome
from fal_agent import wire
from fal_agent.arrivals import processes_of
from fal_agent.core.tasks import Phase
from fal_agent.launch import container_id, model_name
from fal_agent.node import Node
from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2, state_pb2
from virtual_time import LoopClock, run_virtually

RUNNER = "default/digits-00000001"
MODEL = "default/digits-model"


def play(tmp_path: Path, scenario: Callable[[Box], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(Box(tmp_path, LoopClock()))

    run_virtually(main())


async def begin(box: Box, **changes: object) -> Node:
    """A node with one runner whose app streams its weights."""
    artifact = model(MODEL)
    artifact.stream = True
    node = box.agent()
    await node.start()
    node.hello()
    node.welcome(wire.leader_of(welcome()))
    message = agent_pb2.Complete(
        revision=1, term=1, store_revision=1, assignments=[assignment(RUNNER, artifacts=[artifact], **changes)]
    )
    await node.receive(wire.complete_of(message))
    return node


def shown(box: Box) -> Path | None:
    container = box.machine.containers.get(container_id(RUNNER))
    return container.models.get(model_name(MODEL)) if container else None


def phase(node: Node) -> Phase | None:
    return next((task.phase for task in node.tasks()), None)


def test_a_container_starts_on_the_mount_and_gets_the_plain_tree_later(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount, box.cache.stage_s = True, 100.0
        node = await begin(box)
        await until(lambda: phase(node) is Phase.SERVING, within_s=50)
        assert shown(box) == Path("/in-flight") / MODEL
        await until(lambda: shown(box) == Path("/cache") / MODEL, within_s=100)
        assert phase(node) is Phase.SERVING
        await node.close()

    play(tmp_path, scenario)


def test_without_a_mount_the_container_waits(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.stage_s = 100.0
        node = await begin(box)
        await asyncio.sleep(50)
        assert phase(node) is Phase.ADMITTED
        await until(lambda: phase(node) is Phase.SERVING, within_s=400)
        assert shown(box) == Path("/cache") / MODEL
        await node.close()

    play(tmp_path, scenario)


def test_weights_are_followed_again_after_a_restart_of_the_agent(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount, box.cache.stage_s = True, 100.0
        first = await begin(box)
        await until(lambda: phase(first) is Phase.SERVING, within_s=50)
        await first.close()
        assert shown(box) == Path("/in-flight") / MODEL
        second = box.agent(agent_id="a-2")
        await second.start()
        await until(lambda: shown(box) == Path("/cache") / MODEL, within_s=150)
        await second.close()

    play(tmp_path, scenario)


def test_an_fsd_that_is_away_for_a_while_changes_nothing(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount, box.cache.stage_s = True, 1.0
        box.cache.refuse[MODEL] = FalError(Code.UNAVAILABLE, "fsd restarts", remedy="-")
        node = await begin(box)
        await until(lambda: phase(node) is Phase.SERVING, within_s=50)
        await asyncio.sleep(30)
        assert phase(node) is Phase.SERVING
        del box.cache.refuse[MODEL]
        await until(lambda: shown(box) == Path("/cache") / MODEL, within_s=30)
        await node.close()

    play(tmp_path, scenario)


def test_weights_that_can_never_be_finished_end_the_runner_with_the_reason(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount, box.cache.stage_s = True, 20.0
        box.cache.refuse[MODEL] = FalError(Code.CONFLICT, "the file changed at the origin", remedy="Register it again.")
        node = await begin(box)
        await until(lambda: phase(node) is Phase.GONE, within_s=100)
        task = node.tasks()[0]
        assert "weights of default/digits-model cannot be finished: the file changed at the origin" in task.failure
        await node.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize(("goal", "asked"), [(state_pb2.GOAL_KILL, True), (state_pb2.GOAL_STOP, False)])
def test_a_kill_first_ends_reads_that_wait(tmp_path: Path, goal: state_pb2.Goal, asked: bool) -> None:
    async def scenario(box: Box) -> None:
        box.cache.mount, box.cache.stage_s = True, 1000.0
        node = await begin(box)
        await until(lambda: phase(node) is Phase.SERVING, within_s=50)
        pid = box.machine.containers[container_id(RUNNER)].status.pid
        kill = agent_pb2.Delta(
            base=1, revision=2, term=1, store_revision=2, put=[assignment(RUNNER, goal=goal, goal_reason="test")]
        )
        await node.receive(wire.delta_of(kill))
        await until(lambda: phase(node) is Phase.GONE, within_s=100)
        assert (pid in box.cache.cancelled) == asked
        await node.close()

    play(tmp_path, scenario)


def test_processes_of_a_container_are_its_first_and_all_below(tmp_path: Path) -> None:
    for pid, children in ((10, "11 12"), (11, ""), (12, "13"), (13, "")):
        task = tmp_path / str(pid) / "task" / str(pid)
        task.mkdir(parents=True)
        (task / "children").write_text(children)
    assert sorted(processes_of(10, proc=tmp_path)) == [10, 11, 12, 13]
    assert processes_of(None) == []
    assert os.getpid() in processes_of(os.getpid())
