"""The watch over a node's GPUs on simulated ones: faults told, kept and diagnosed; orders; what admission refuses."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent_fakes import assignment
from fal_agent import wire
from fal_agent.core.admission import NodeView, admit
from fal_agent.core.assignments import Goal
from fal_agent.core.tasks import Phase, Task
from fal_agent.gpu_care import GpuCare
from fal_agent.gpu_file import FILE, GpuFile
from fal_agent.gpu_orders import GpuOrders
from fal_agent.gpu_processes import strangers, unkillable
from fal_agent.inventory.machine import InventoryMachine
from fal_agent.inventory.model import Checked, Ecc, Host
from fal_agent.inventory.simulated import SimulatedInventory
from fal_agent.inventory.spec import parse_sim_gpus
from fal_agent.ports import MachineView
from fal_contract.clock import ManualClock
from fal_contract.errors import Code
from fal_contract.limits import (
    GPU_DIAGNOSE_WAIT_S,
    GPU_FOREIGN_S,
    GPU_GONE_S,
    GPU_ORDERS_PER_NODE_MAX,
    GPU_STUCK_S,
)
from fal_contract.v1 import agent_pb2

HOST = Host(cpu_cores=8, memory_bytes=1 << 36, disk_bytes=1 << 40, disk_free_bytes=1 << 39, kernel="6.1")
A = "default/a-00000001"


class Rig:
    """A node's GPUs and the watch over them; `agent` is a start of the agent on the same machine."""

    def __init__(self, folder: Path, gpus: str = "3xH100-80GB") -> None:
        self.folder = folder
        self.clock = ManualClock()
        self.sim = SimulatedInventory(parse_sim_gpus(gpus), node_name="n", read_host=lambda: HOST)
        self.events: list[tuple[str, str, str]] = []
        self.tasks: list[Task] = []
        self.boot = "boot-1"
        self.options: dict[str, Any] = {}
        self.care = self.agent()

    def agent(self) -> GpuCare:
        def tell(kind: str, subject: str, message: str) -> None:
            self.events.append((kind, subject, message))

        file = GpuFile(self.folder / FILE, boot_id=self.boot, on_event=tell)
        self.care = GpuCare(
            InventoryMachine(self.sim), self.sim, clock=self.clock, on_event=tell, file=file, **self.options
        )
        self.care.start(lambda: self.tasks)
        return self.care

    async def look(self, *, after_s: float = 5.0) -> MachineView:
        self.clock.advance(after_s)
        return await self.care.look()

    async def looks(self, seconds: float) -> MachineView:
        for _ in range(int(seconds / 5.0)):
            await self.look()
        return await self.look()

    async def settled(self) -> MachineView:
        """After what is under way."""
        async with asyncio.timeout(20):
            while self.care._diagnoses:
                await asyncio.gather(*self.care._diagnoses.values())
        return await self.look()

    def hold(self, gpu: str, runner: str = A, *, goal: Goal = Goal.RUN, phase: Phase = Phase.SERVING) -> None:
        given = wire.assignment_of(assignment(runner, gpus=[gpu]))
        self.tasks = [*self.tasks, Task(replace(given, goal=goal), phase=phase)]

    def kinds(self, gpu: str) -> list[str]:
        return [kind for kind, subject, _ in self.events if subject == gpu]


Scenario = Callable[[Rig, str, str], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Rig]:
    def run(scenario: Scenario, **options: Any) -> Rig:
        async def main() -> Rig:
            rig = Rig(tmp_path)
            rig.options = options
            rig.agent()
            view = await rig.look()
            one, two, _ = view.gpus
            try:
                async with asyncio.timeout(60):
                    await scenario(rig, one, two)
            finally:
                await rig.care.close()
            return rig

        return asyncio.run(main())

    return run


def gpu_in(view: MachineView, gpu_id: str) -> agent_pb2.Gpu:
    return next(gpu for gpu in view.inventory.gpus if gpu.id == gpu_id)


def state(view: MachineView, gpu_id: str) -> tuple[str, str]:
    gpu = gpu_in(view, gpu_id)
    assert (gpu.health == agent_pb2.GPU_HEALTH_OK) == (not view.gpus[gpu_id].unhealthy)
    return gpu.health_state, gpu.health_class


def test_one_gpu_is_quarantined_reset_checked_and_comes_back(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.hold(one)
        rig.sim.set_ecc(one, Ecc(volatile_uncorrected=2, aggregate_uncorrected=2))
        view = await rig.look()
        assert state(view, one) == ("quarantined", "reset")
        assert state(view, two) == ("", "")
        assert gpu_in(view, one).health_since_s == rig.clock.wall_s()
        await rig.looks(600)
        assert "GPU_DIAGNOSING" not in rig.kinds(one), "its runner has it still"
        rig.tasks = []
        assert state(await rig.look(), one)[0] == "diagnosing"
        assert state(await rig.settled(), one) == ("", "")

    rig = play(scenario)
    one = rig.events[0][1]
    assert rig.kinds(one) == ["GPU_FAULT", "GPU_DIAGNOSING", "GPU_VERIFIED"]


def test_a_program_that_fails_quarantines_nothing_and_is_told(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.hold(one)
        await rig.look()
        for _ in range(5):
            rig.sim.xid(one, 31)
        assert state(await rig.look(), one) == ("", "")
        assert rig.kinds(one) == ["GPU_XID"], "once a minute at most"
        assert A in rig.events[-1][2]
        for number in range(2, 4):
            rig.tasks = []
            rig.hold(one, f"default/a-0000000{number}")
            await rig.look()
            rig.sim.xid(one, 31)
        view = await rig.look()
        assert state(view, one) == ("suspect", ""), "no new runner, and nobody moves"
        rig.tasks = []
        await rig.look()
        assert state(await rig.settled(), one) == ("", "")

    play(scenario)


def test_a_dead_one_waits_for_an_operator(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.sim.xid(one, 79)
        assert rig.care.changed.is_set()
        assert state(await rig.look(), one) == ("quarantined", "dead")
        assert state(await rig.looks(900), one) == ("quarantined", "dead")
        assert "GPU_DIAGNOSING" not in rig.kinds(one)
        result = await rig.care.order(agent_pb2.GpuOrder(id=7, gpu=one, action="release"))
        assert (result.id, result.error) == (7, "")
        assert result.lines[-1].startswith("passed")
        assert state(await rig.look(), one) == ("", "")

    play(scenario)


def test_one_that_vanishes_is_dead_and_one_whose_driver_hangs_is_not(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.sim.vanish(one)
        view = await rig.look()
        assert view.gpus[one].unhealthy
        assert state(view, one) == ("", ""), "not for new runners, but nobody moves yet"
        assert state(await rig.looks(GPU_GONE_S), one) == ("quarantined", "dead")
        rig.sim.restore(one)
        assert state(await rig.looks(60), one) == ("quarantined", "dead")
        assert (await rig.care.order(agent_pb2.GpuOrder(id=1, gpu=one, action="clear"))).error == ""
        assert state(await rig.look(), one) == ("", "")

    play(scenario)


def test_diagnoses_that_fail_are_few_and_far_between(play: Callable[..., Rig]) -> None:
    checks: list[str] = []

    async def check(gpu_id: str) -> Checked:
        checks.append(gpu_id)
        return Checked(False, "wrong bits")

    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.sim.xid(one, 119)
        await rig.look()
        view = await rig.settled()
        assert (len(checks), state(view, one)) == (1, ("quarantined", "reset"))
        assert "wrong bits" in gpu_in(view, one).health_reason
        await rig.looks(GPU_DIAGNOSE_WAIT_S - 20)
        assert len(checks) == 1
        for _ in range(40):
            await rig.look(after_s=600)
            await rig.settled()
        assert len(checks) == 5
        assert gpu_in(await rig.look(), one).diagnoses == 5

    play(scenario, check=check)


def test_what_may_not_be_reset_stays_until_the_next_boot(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.sim.xid(one, 95)
        await rig.look()
        view = await rig.settled()
        assert "may not" in gpu_in(view, one).health_reason
        await rig.care.close()
        rig.agent()
        assert state(await rig.looks(30), one) == ("quarantined", "reset")
        await rig.care.close()
        rig.boot = "boot-2"
        rig.agent()
        await rig.looks(5)
        assert state(await rig.settled(), one) == ("", "")

    play(scenario, may_reset=False)


def test_faults_and_generations_outlive_the_agent(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.sim.xid(one, 79)
        before = await rig.look()
        await rig.care.close()
        rig.events.clear()
        rig.agent()
        assert [event[0] for event in rig.events] == ["GPU_FAULT"]
        after = await rig.look()
        assert state(after, one) == ("quarantined", "dead")
        assert gpu_in(after, one).health_since_s == gpu_in(before, one).health_since_s
        assert after.inventory.generation > before.inventory.generation
        assert after.gpus[one].changed_at == before.gpus[one].changed_at
        assert after.gpus[two].changed_at == before.gpus[two].changed_at

    play(scenario)


@pytest.mark.parametrize("content", ["", "{", '{"version": 99}', '{"version": 1, "boot_id": 3}', "[]"])
def test_a_damaged_file_is_moved_aside_and_told(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    rig = Rig(tmp_path)
    assert [kind for kind, _, _ in rig.events] == ["GPU_FILE_DAMAGED"]
    assert (tmp_path / FILE).with_suffix(".damaged").read_text() == content


def test_a_full_disk_is_told_once(play: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    async def scenario(rig: Rig, one: str, two: str) -> None:
        await rig.care._save()
        kept = (rig.folder / FILE).read_bytes()
        monkeypatch.setattr("fal_agent.gpu_file._replace", full)
        rig.sim.xid(one, 79)
        await rig.look()
        rig.sim.xid(two, 79)
        await rig.look()
        await rig.care._save()
        assert [kind for kind, _, _ in rig.events].count("GPU_FILE_FAILED") == 1
        monkeypatch.undo()
        await rig.care._save()
        assert (rig.folder / FILE).read_bytes() != kept
        assert set(json.loads((rig.folder / FILE).read_bytes())["gpus"]) == {one, two}

    play(scenario)


def test_a_foreign_process_is_named_and_the_gpu_comes_back_when_it_ends(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.sim.use(one, memory_bytes=4 << 30, pids=[4711])
        view = await rig.look()
        assert state(view, one) == ("", "")
        view = await rig.looks(GPU_FOREIGN_S)
        assert state(view, one) == ("quarantined", "foreign")
        assert "4711" in gpu_in(view, one).health_reason
        rig.sim.use(one, memory_bytes=0)
        await rig.look()
        assert state(await rig.settled(), one) == ("", "")

    play(scenario)


# ---- generations and admission


def view_of(view: MachineView) -> NodeView:
    return NodeView(gpus=view.gpus)


def test_an_assignment_on_an_older_state_of_its_gpu_is_refused(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        first = await rig.look()
        rig.sim.xid(one, 48)
        await rig.look()
        now = await rig.settled()
        assert state(now, one) == ("", ""), "it was quarantined, and came back"
        for gpu, generation, refused in (
            (one, first.inventory.generation, True),
            (one, now.inventory.generation, False),
            (two, first.inventory.generation, False),
            (one, 0, False),
        ):
            given = wire.assignment_of(assignment(gpus=[gpu], inventory_generation=generation))
            refusal = admit(given, view_of(now), [], leader_term=1)
            assert (refusal is not None) == refused, (gpu == one, generation)
            assert refusal is None or (refusal.code, "has changed" in refusal.reason) == (Code.CONFLICT, True)

    play(scenario)


def test_generations_rise_with_what_is_told_only(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        first = (await rig.look()).inventory.generation
        rig.sim.use(one, memory_bytes=1 << 20)
        assert (await rig.looks(60)).inventory.generation == first
        rig.sim.xid(one, 79)
        assert (await rig.look()).inventory.generation == first + 1
        assert (await rig.looks(60)).inventory.generation == first + 1

    play(scenario)


# ---- orders


def test_what_is_in_use_is_not_given_back(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.hold(one)
        rig.sim.xid(one, 48)
        await rig.look()
        result = await rig.care.order(agent_pb2.GpuOrder(id=1, gpu=one, action="release"))
        assert A in result.error
        assert "--force" in result.remedy
        result = await rig.care.order(agent_pb2.GpuOrder(id=2, gpu=one, action="clear"))
        assert (result.error, "given back unseen" in result.lines[0]) == ("", True)
        assert state(await rig.look(), one) == ("", "")

    play(scenario)


@pytest.mark.parametrize(
    ("order", "word"),
    [
        ({"gpu": "GPU-none", "action": "release"}, "GPU-none"),
        ({"gpu": "GPU-none", "action": "clear"}, "GPU-none"),
        ({"gpu": "GPU-none", "action": "mig"}, "GPU-none"),
        ({"action": "paint"}, "paint"),
        ({"action": "mig", "layout": ["9g.1gb"]}, "9g.1gb"),
    ],
)
def test_orders_that_cannot_be(play: Callable[..., Rig], order: dict[str, Any], word: str) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        result = await rig.care.order(agent_pb2.GpuOrder(**{"id": 1, "gpu": one} | order))  # type: ignore[arg-type]
        assert word in result.error
        assert result.remedy

    play(scenario)


def test_the_same_order_again_joins_the_one_under_way(play: Callable[..., Rig]) -> None:
    begun, go, checks = asyncio.Event(), asyncio.Event(), []

    async def check(gpu_id: str) -> Checked:
        checks.append(gpu_id)
        begun.set()
        await go.wait()
        return Checked(True, "fine")

    async def scenario(rig: Rig, one: str, two: str) -> None:
        order = agent_pb2.GpuOrder(id=1, gpu=one, action="release")
        first = asyncio.create_task(rig.care.order(order))
        await begun.wait()
        order2 = agent_pb2.GpuOrder(id=2, gpu=one, action="release")
        second = asyncio.create_task(rig.care.order(order2))
        first.cancel()  # its session ended; what it began goes on
        await asyncio.gather(first, return_exceptions=True)
        assert state(await rig.look(), one)[0] == "diagnosing"
        go.set()
        assert (await second).error == ""
        assert checks == [one]
        assert state(await rig.look(), one) == ("", "")

    play(scenario, check=check)


def test_a_sound_one_that_is_looked_at_for_an_operator_may_turn_out_bad(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        rig.sim.break_gpu(one, check="wrong bits")
        result = await rig.care.order(agent_pb2.GpuOrder(id=1, gpu=one, action="release"))
        assert "wrong bits" in result.error
        assert state(await rig.look(), one) == ("quarantined", "reset")
        rig.sim.break_gpu(one, check="")
        result = await rig.care.order(agent_pb2.GpuOrder(id=2, gpu=one, action="release"))
        assert (result.error, state(await rig.look(), one)) == ("", ("", ""))

    play(scenario)


def test_an_idle_device_is_cut_and_a_used_one_is_not(play: Callable[..., Rig]) -> None:
    async def scenario(rig: Rig, one: str, two: str) -> None:
        layout = ["1g.10gb", "1g.10gb", "3g.40gb"]
        result = await rig.care.order(agent_pb2.GpuOrder(id=1, gpu=one, action="mig", layout=layout))
        assert result.error == ""
        assert len(result.lines) == 3
        view = await rig.look()
        parts = [gpu for gpu in view.inventory.gpus if gpu.parent_id == one]
        assert len(parts) == 3
        assert one not in view.gpus
        rig.hold(parts[0].id)
        await rig.look()
        result = await rig.care.order(agent_pb2.GpuOrder(id=2, gpu=one, action="mig"))
        assert A in result.error
        rig.tasks = []
        await rig.look()
        result = await rig.care.order(agent_pb2.GpuOrder(id=3, gpu=one, action="mig"))
        assert (result.error, list(result.lines)) == ("", [f"{one} is whole"])
        rig.sim.xid(two, 79)
        await rig.look()
        result = await rig.care.order(agent_pb2.GpuOrder(id=4, gpu=two, action="mig", layout=["1g.10gb"]))
        assert "quarantined" in result.error

    play(scenario)


def test_orders_of_a_session_are_answered_bounded_and_end_with_it() -> None:
    sent: list[agent_pb2.GpuOrderResult] = []
    go = asyncio.Event()

    async def carry_out(order: agent_pb2.GpuOrder) -> agent_pb2.GpuOrderResult:
        await go.wait()
        return agent_pb2.GpuOrderResult(id=order.id, lines=["done"])

    three = asyncio.Event()

    async def send(message: agent_pb2.AgentMessage) -> None:
        sent.append(message.gpu_result)
        if len(sent) == 3:
            three.set()

    async def main() -> None:
        orders = GpuOrders(carry_out, send)
        orders.take(agent_pb2.GpuOrder(id=1000, timeout_s=0.01))
        for number in range(1, GPU_ORDERS_PER_NODE_MAX + 2):
            orders.take(agent_pb2.GpuOrder(id=number, timeout_s=60))
            orders.take(agent_pb2.GpuOrder(id=number, timeout_s=60))
        async with asyncio.timeout(20):
            await three.wait()
        assert "goes on" in next(one for one in sent if one.id == 1000).error
        assert all("under way" in one.error for one in sent if one.id != 1000)
        go.set()
        await asyncio.sleep(0)
        await orders.close()
        assert len({one.id for one in sent}) == len(sent)

    asyncio.run(main())


# ---- processes


def proc(
    folder: Path, pid: int, *, cgroup: str = "/", children: tuple[int, ...] = (), wchan: str = "", state: str = "S"
) -> None:
    task = folder / str(pid) / "task" / str(pid)
    task.mkdir(parents=True)
    (folder / str(pid) / "cgroup").write_text(f"0::{cgroup}\n")
    (task / "children").write_text(" ".join(map(str, children)))
    (task / "stat").write_text(f"{pid} (a (strange) name) {state} 1 1")
    (task / "wchan").write_text(wchan or "0")


def test_strangers_are_neither_of_the_family_nor_of_the_group(tmp_path: Path) -> None:
    proc(tmp_path, 10, cgroup="/falctl/a", children=(11,))
    proc(tmp_path, 11, cgroup="/falctl/a")
    proc(tmp_path, 12, cgroup="/falctl/a/exec")  # a daemon of the container's
    proc(tmp_path, 20, cgroup="/falctl/ab")
    proc(tmp_path, 21, cgroup="/user.slice")
    proc(tmp_path, 30, cgroup="/falctl/b")
    pids = (10, 11, 12, 20, 21, 30, 99)
    assert strangers(pids, [10], proc=tmp_path) == (20, 21, 30), "one that has ended accuses nobody"
    assert strangers(pids, [10, 30], proc=tmp_path) == (20, 21)
    assert strangers(pids, [10, None], proc=tmp_path) == ()
    assert strangers(pids, [], proc=tmp_path) == ()
    proc(tmp_path, 40, cgroup="/")
    assert strangers((21,), [40], proc=tmp_path) == (), "a container that nothing keeps apart proves nothing"


@pytest.mark.parametrize(
    ("waits", "on_gpu", "word"),
    [
        ({11: ("D", "nv_wait_for_idle")}, (), "nv_wait_for_idle"),
        ({11: ("D", "")}, (11,), "the driver"),
        ({11: ("D", "")}, (), ""),
        ({11: ("D", "request_wait_answer")}, (11,), ""),
        ({10: ("D", "nv_wait"), 11: ("D", "fuse_readahead")}, (10, 11), ""),
        ({11: ("D", "folio_wait_bit_common")}, (11,), ""),
        ({11: ("S", "nv_wait")}, (11,), ""),
    ],
)
def test_a_wait_for_a_file_is_never_the_gpus_fault(
    tmp_path: Path, waits: dict[int, tuple[str, str]], on_gpu: tuple[int, ...], word: str
) -> None:
    for pid, children in ((10, (11,)), (11, ())):
        state, wchan = waits.get(pid, ("S", "poll"))
        proc(tmp_path, pid, children=children, state=state, wchan=wchan)
    said = unkillable(10, on_gpu, proc=tmp_path)
    assert (word in said) if word else said == ""
    assert unkillable(None, on_gpu, proc=tmp_path) == ""


def test_a_container_that_does_not_end_is_looked_at_after_its_time(
    play: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    async def scenario(rig: Rig, one: str, two: str) -> None:
        def why(first: int | None, on_gpu: object) -> str:
            asked.append(rig.clock.monotonic_s())
            return "process 9 was killed and does not end: it waits in nv_wait"

        monkeypatch.setattr("fal_agent.gpu_looks.unkillable", why)
        rig.hold(one, goal=Goal.STOP)
        began_s = rig.clock.monotonic_s()
        await rig.looks(GPU_STUCK_S - 10)
        assert asked == []
        view = await rig.looks(GPU_STUCK_S)
        assert state(view, one) == ("quarantined", "stuck")
        assert asked[0] - began_s >= GPU_STUCK_S
        rig.tasks = []
        await rig.look()
        assert state(await rig.settled(), one) == ("", "")

    play(scenario)


def test_our_own_process_is_a_stranger_to_nobody() -> None:
    assert strangers([os.getpid()], [os.getpid()]) == ()
