"""The agent and secrets: asked for at the start, tried again while nobody answers, not asked for again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from agent_fakes import Box, assignment, until, welcome
from fal_agent import wire
from fal_agent.core.tasks import Phase
from fal_agent.node import Node
from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2
from fal_runtime.driver import ContainerSpec
from fal_runtime.fake import Script
from virtual_time import LoopClock, run_virtually

A = "default/digits-00000001"
VALUE = b"hunter2"


class Scheduler:
    """Gives secrets; `refusals` come first."""

    def __init__(self, *refusals: FalError) -> None:
        self.refusals = list(refusals)
        self.asked: list[str] = []

    async def secrets(self, runner_id: str) -> Mapping[str, bytes]:
        self.asked.append(runner_id)
        if self.refusals:
            raise self.refusals.pop(0)
        return {"token": VALUE}


def away() -> FalError:
    return FalError(Code.UNAVAILABLE, "no scheduler gave the secrets", remedy="It is asked again.")


async def begin(box: Box, scheduler: Scheduler, *names: str) -> Node:
    box.secrets = scheduler.secrets
    node = box.agent()
    await node.start()
    node.hello()
    node.welcome(wire.leader_of(welcome()))
    message = agent_pb2.Complete(revision=1, term=1, store_revision=1, assignments=[assignment(secrets=list(names))])
    await node.receive(wire.complete_of(message))
    return node


def phase(node: Node) -> Phase | None:
    return next((task.phase for task in node.tasks() if task.runner_id == A), None)


def test_a_runner_gets_them_though_the_scheduler_was_away(tmp_path: Path) -> None:
    async def main() -> None:
        box, scheduler = Box(tmp_path, LoopClock()), Scheduler(away(), away())
        made: list[ContainerSpec] = []

        def script(spec: ContainerSpec) -> Script:
            made.append(spec)
            return Script(ready_after_s=1.0)

        box.machine.script_of = script
        node = await begin(box, scheduler, "token")
        seen: list[str] = []

        def serving() -> bool:
            seen.extend(status.reason for status in node.take_report().runners)
            return phase(node) is Phase.SERVING

        await until(serving)
        assert any("no scheduler gave the secrets; tried again" in reason for reason in seen), seen
        assert scheduler.asked == [A] * 3, "made once, asked until it was given, not again for the same container"
        assert made[-1].secrets == {"token": VALUE}
        assert "hunter2" not in repr(made[-1])
        assert not any(VALUE in entry for entry in box.disk), "the journal has names only"
        assert not any(VALUE in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        await node.close()
        again = box.agent()  # restarted: the container runs, nobody needs to be asked
        await again.start()
        await asyncio.sleep(5)
        assert scheduler.asked == [A] * 3
        await again.close()

    run_virtually(main())


def test_a_secret_that_is_lost_ends_the_runner_with_its_name(tmp_path: Path) -> None:
    async def main() -> None:
        lost = FalError(Code.NOT_FOUND, "secret 'default/token' is not set", remedy="Set it.")
        box = Box(tmp_path, LoopClock())
        node = await begin(box, Scheduler(lost), "token")
        reasons: list[str] = []

        def told() -> bool:
            reasons.extend(status.reason for status in node.take_report().runners)
            return any("'default/token' is not set" in reason for reason in reasons)

        await until(told)
        await node.close()

    run_virtually(main())


def test_nobody_is_asked_where_none_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        box, scheduler = Box(tmp_path, LoopClock()), Scheduler()
        node = await begin(box, scheduler)
        await until(lambda: phase(node) is Phase.SERVING)
        assert scheduler.asked == []
        await node.close()

    run_virtually(main())
