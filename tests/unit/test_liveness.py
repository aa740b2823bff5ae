"""Liveness of a serving runner in virtual time: rhythm, failures in a row, what its container went through."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from random import Random

from fal_agent.liveness import Wounds, watch
from fal_runtime.driver import ContainerSpec
from fal_runtime.fake import FakeDriver, Machine, Script
from virtual_time import LoopClock, run_virtually


@dataclass(frozen=True)
class Every:
    interval_s: float = 10.0
    failures_max: int = 3


class Rig:
    """A running container, a worker that answers as the test says, and everything that was told."""

    def __init__(self) -> None:
        self.machine = Machine(clock=LoopClock(), script_of=lambda spec: Script())
        self.driver = FakeDriver(self.machine)
        self.events: list[tuple[str, str, str]] = []
        self.troubles: list[str] = []
        self.asked_s: list[float] = []
        self.answers: list[str] = []
        self.orphan = False
        self.wounds = Wounds(self.driver, lambda *event: self.events.append(event), "t/a-1", "c")

    async def begin(self) -> asyncio.Task[str]:
        await self.driver.create(ContainerSpec(id="c", command=("true",)))
        await self.driver.start("c")
        return asyncio.create_task(
            watch(Every(), self.ask, self.wounds, self.troubles.append, Random(1), lambda: not self.orphan)
        )

    async def ask(self) -> str:
        self.asked_s.append(asyncio.get_running_loop().time())
        return self.answers.pop(0) if self.answers else ""

    def change(self, **fields: object) -> None:
        container = self.machine.containers["c"]
        container.status = replace(container.status, **fields)  # type: ignore[arg-type]


def test_three_failures_in_a_row_end_it_and_a_good_answer_between_them_does_not() -> None:
    async def main() -> None:
        rig = Rig()
        rig.answers = ["503", "503", "", "503", "no answer", "no answer"]
        why = await (await rig.begin())
        assert why == "liveness probe failed 3 times in a row: no answer"
        assert len(rig.asked_s) == 6
        assert all(9.9 < later - earlier < 10.1 for earlier, later in zip(rig.asked_s, rig.asked_s[1:], strict=False))
        assert rig.troubles[1] == "liveness probe failed 2 of 3 times: 503"
        assert rig.troubles[2] == ""

    run_virtually(main())


def test_an_orphan_is_never_ended_by_its_probe() -> None:
    async def main() -> None:
        rig = Rig()
        rig.orphan, rig.answers = True, ["503"] * 20
        job = await rig.begin()
        await asyncio.sleep(150)
        assert not job.done()
        rig.orphan = False
        await asyncio.sleep(20)
        assert "failed" in job.result()

    run_virtually(main())


def test_a_wound_is_told_once_and_it_serves_on() -> None:
    async def main() -> None:
        rig = Rig()
        job = await rig.begin()
        await asyncio.sleep(30)
        assert rig.events == []
        rig.change(oom_killed=True)
        await asyncio.sleep(30)
        rig.change(reason="log and exit code lost: conmon died")
        await asyncio.sleep(60)
        assert [(kind, subject) for kind, subject, _ in rig.events] == [
            ("OUT_OF_MEMORY", "t/a-1"),
            ("CONTAINER_WOUNDED", "t/a-1"),
        ]
        assert rig.troubles[-1] == "log and exit code lost: conmon died"
        assert not job.done()
        await rig.driver.remove("c")
        await asyncio.sleep(30)
        assert rig.troubles[-1] == ""
        job.cancel()

    run_virtually(main())
