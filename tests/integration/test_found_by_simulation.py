"""Faults that the simulation found, each as the shortest history that shows it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

from agent_fakes import Box, MemoryJournal, assignment, until, welcome
from core_world import sim_gpus
from engine_rig import Rig, deploy
from fal_agent.core.assignments import Assignment, Complete, Delta
from fal_agent.core.tasks import Phase
from fal_agent.wire import assignment_of, leader_of
from fal_runtime.fake import Script
from fal_scheduler.core.events import HelloNeeded, Logged, NodeReport, StopRunner
from fal_scheduler.core.fleet import Fleet, NodeFacts
from fal_scheduler.core.records import RunnerState
from fal_scheduler.core.told import RunnerStatus
from fal_scheduler.store.faults import Fault, FaultKind
from virtual_time import LoopClock, run_virtually


def test_a_journal_that_takes_its_time_still_has_every_move(tmp_path: Path) -> None:
    """News of its own move interrupted the save of it; after kill -9 a finished runner was started again."""

    async def main() -> None:
        box = Box(tmp_path, LoopClock(), rng=Random(3))
        box.machine.script_of = lambda spec: Script(exit_after_s=5.0)
        box.journal.write_s = 0.01
        node = box.agent()
        await node.start()
        node.welcome(leader_of(welcome()))
        await node.receive(Complete(1, 1, 1, (_read("default/a-00000001"),)))
        await until(lambda: node.tasks()[0].phase is Phase.GONE)
        await asyncio.sleep(1.0)
        await node.close()
        (task,) = MemoryJournal(box.disk).recorded().tasks.values()
        assert task.phase is Phase.GONE

    run_virtually(main())


def test_a_runner_that_came_back_is_not_told_as_gone(tmp_path: Path) -> None:
    """Forgotten and assigned again between two reports: its old life's end ended the new one."""

    async def main() -> None:
        box = Box(tmp_path, LoopClock(), rng=Random(3))
        box.machine.script_of = lambda spec: Script(exit_after_s=1.0)
        node = box.agent()
        await node.start()
        node.welcome(leader_of(welcome()))
        await node.receive(Complete(1, 1, 1, (_read("default/a-00000001"),)))
        await until(lambda: node.tasks()[0].phase is Phase.GONE)
        node.take_report()
        await node.receive(Delta(1, 2, 1, 2, drop=("default/a-00000001",)))
        await node.receive(Delta(2, 3, 1, 3, put=(_read("default/a-00000001", id="as-second"),)))
        report = node.take_report()
        assert list(report.gone) == []
        assert [one.assignment_id for one in report.runners] == ["as-second"]
        await node.close()

    run_virtually(main())


def _read(runner: str, **changes: object) -> Assignment:
    return assignment_of(assignment(runner, **changes))


def test_a_gpu_named_twice_is_free_when_both_are_gone() -> None:
    """The record of an older store went, and the GPU counted as free under the container that really runs."""
    fleet = Fleet()
    gpus = sim_gpus("n", 2, "H100-80GB", 80)
    fleet.set_node(NodeFacts("n", True, False, False, True, "fake", "p", {}, 64_000, 1 << 40, gpus))
    gpu = gpus[0].id
    for name in ("record", "orphan", "third"):
        fleet.hold("n", name, (gpu,), 0, 0)
    for name in ("record", "third"):
        fleet.release("n", name, (gpu,), 0, 0)
        assert fleet.free_gpus("n") == (gpus[1].id,)
    assert fleet.occupancy["n"].gpus == {gpu: "orphan"}
    fleet.release("n", "orphan", (gpu,), 0, 0)
    assert fleet.free_gpus("n") == (gpu, gpus[1].id)


def test_a_term_raised_during_a_stall_kills_no_node() -> None:
    """The tick waited for the store with what nodes had told since behind it: all of them seemed silent."""

    async def main() -> None:
        rig = Rig()
        await rig.found(4)
        rig.store.add(Fault(FaultKind.STALL, 20.0))
        deployed = asyncio.create_task(rig.engine.submit(deploy(least=2)))
        await asyncio.sleep(0.5)
        hello = asyncio.create_task(rig.hello("n-0", term_seen=9, cluster_id=rig.engine.view.meta.cluster_id))  # type: ignore[union-attr]
        for _ in range(8):
            await asyncio.sleep(4.0)
            rig.heartbeat("n-0", "n-1", "n-2", "n-3")
        await asyncio.gather(deployed, hello)
        assert rig.engine.view.term == 10
        logged = {effect.kind for effect in rig.effects if isinstance(effect, Logged)}
        assert "TERM_RAISED" in logged
        assert "NODE_UNKNOWN" not in logged
        await rig.engine.stop()

    run_virtually(main())


def test_runners_lost_together_are_one_failure() -> None:
    """A machine that rebooted counted as one failure in a row for each of its runners."""

    async def main() -> None:
        rig = Rig()
        await rig.found(1)
        await rig.engine.submit(deploy(least=4))
        await asyncio.sleep(2.0)
        rig.tell(RunnerState.IDLE)
        await asyncio.sleep(2.0)
        rig.tell(RunnerState.TERMINATED)
        await asyncio.sleep(2.0)
        backoff = rig.engine.view.backoffs["default/a"]
        assert backoff.failures == 1
        await rig.engine.stop()

    run_virtually(main())


def test_the_end_of_a_runner_told_while_its_record_seemed_gone_is_told_again() -> None:
    """Its drop was under way, so its end was late news; the commit failed and the record stayed for ever."""

    async def main() -> None:
        rig = Rig()
        await rig.found(1)
        await rig.engine.submit(deploy())
        await asyncio.sleep(2.0)
        (runner,) = rig.engine.assignments("n-0")
        await rig.engine.submit(StopRunner(runner.id))
        rig.store.add(Fault(FaultKind.FAIL, 20.0))
        await rig.hello("n-0")  # it never heard of the runner, so the record is dropped
        assert runner.id not in rig.engine.view.runners
        assert runner.id in {one.id for one in rig.engine.assignments("n-0")}, "not durable: the node is told of it"
        refused = RunnerStatus(runner.id, RunnerState.TERMINATED, runner.assignment.id, refused=True)  # type: ignore[union-attr]
        rig.engine.offer(NodeReport("n-0", "s-n-0", rig.clock.monotonic_s(), statuses=(refused,)))
        await asyncio.sleep(21.0)
        assert runner.id in rig.engine.view.runners, "the commit failed"
        assert [one for one in rig.effects if isinstance(one, HelloNeeded)] == [HelloNeeded("n-0")]
        await rig.hello("n-0", statuses=(refused,))
        await asyncio.sleep(2.0)
        assert runner.id not in rig.engine.view.runners
        await rig.engine.stop()

    run_virtually(main())
