"""An agent killed just before or just after each move of a runner's end: the next one finishes it and tells it once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent_fakes import Box, assignment, model, until, welcome
from fal_agent import wire
from fal_agent.core.tasks import Action, Phase
from fal_agent.node import Node
from fal_agent.runner import Runner
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.fake import Script
from virtual_time import LoopClock, run_virtually

A = "default/digits-00000001"
MOVES = (Action.DRAIN, Action.STOP, Action.COLLECT, Action.REMOVE, Action.RELEASE)


async def begin(box: Box, goal: state_pb2.Goal.ValueType, revision: int) -> tuple[Node, agent_pb2.RunnerStatus | None]:
    """A new agent with one runner in its set, and what its Hello told of it."""
    node = box.agent(agent_id=f"a-{revision}")
    await node.start()
    told = {status.runner_id: status for status in node.hello().runners}.get(A)
    node.welcome(wire.leader_of(welcome()))
    wish = assignment(gpus=["GPU-0"], artifacts=[model()], goal=goal)
    await node.receive(
        wire.complete_of(agent_pb2.Complete(revision=revision, term=1, store_revision=revision, assignments=[wish]))
    )
    return node, told


def phase(node: Node) -> Phase | None:
    return next((task.phase for task in node.tasks() if task.runner_id == A), None)


class Cut:
    """The agent stands still for ever at one move, and the test ends it there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, move: Action, *, done: bool) -> None:
        self.reached = asyncio.Event()
        self.once = True
        perform = Runner._perform

        async def cut(runner: Runner, action: Action) -> None:
            if action is not move or not self.once:
                await perform(runner, action)
                return
            if done:  # its effects are there, what the agent knew of them is not
                before, runner._see = runner._see, _blind  # type: ignore[method-assign, assignment]
                await perform(runner, action)
                runner._see = before  # type: ignore[method-assign]
            self.once = False
            self.reached.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(Runner, "_perform", cut)


def _blind(_: Any) -> bool:
    return False


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("ignores_term", [False, True])
def test_killed_at_each_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: Action, done: bool, ignores_term: bool
) -> None:
    async def main() -> None:
        box = Box(tmp_path, LoopClock())
        box.machine.script_of = lambda spec: Script(ready_after_s=0.5, lines=("last words",), ignore_term=ignores_term)
        node, _ = await begin(box, state_pb2.GOAL_RUN, 1)
        await until(lambda: phase(node) is Phase.SERVING)
        goal = state_pb2.GOAL_DRAIN if move is Action.DRAIN else state_pb2.GOAL_STOP
        cut = Cut(monkeypatch, move, done=done)
        put = assignment(gpus=["GPU-0"], artifacts=[model()], goal=goal)
        await node.receive(wire.delta_of(agent_pb2.Delta(base=1, revision=2, term=1, store_revision=2, put=[put])))
        async with asyncio.timeout(200):
            await cut.reached.wait()
        await node.close()

        heir, _ = await begin(box, goal, 3)
        await until(lambda: phase(heir) is Phase.GONE, within_s=300)
        [status] = [one for one in heir.take_report().runners if one.runner_id == A]
        assert status.state == state_pb2.RUNNER_STATE_TERMINATED
        assert status.exit_code == (137 if ignores_term else 0)
        assert status.HasField("exit_code")
        assert list(status.log_tail) == ["last words"]
        assert box.machine.containers == {}
        assert box.cache.pins == {}
        assert A not in box.proxy.entries
        assert [path for path in box.places.runners.rglob("*") if path.is_file()] == []
        await heir.close()
        third, told = await begin(box, goal, 4)
        assert told is not None, "it is kept until the scheduler drops it"
        assert (told.state, told.exit_code) == (status.state, status.exit_code)
        assert (await third_drop(third)) == [A]
        await third.close()
        fourth = box.agent(agent_id="a-9")
        await fourth.start()
        assert [one.runner_id for one in fourth.hello().runners] == [], "told no more"
        await fourth.close()

    run_virtually(main())


async def third_drop(node: Node) -> list[str]:
    await node.receive(wire.delta_of(agent_pb2.Delta(base=4, revision=5, term=1, store_revision=5, drop=[A])))
    return list(node.take_report().gone)
