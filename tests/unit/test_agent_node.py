"""The node on a fake machine in virtual time: runners' lives, restarts, orphans, doubtful schedulers, full disks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent_fakes import Box, MemoryJournal, assignment, model, until, welcome
from fal_agent import wire
from fal_agent.core.tasks import Phase
from fal_agent.node import Node
from fal_agent.ports import Usage
from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.fake import Script
from virtual_time import LoopClock, run_virtually

A, B = "default/digits-00000001", "default/digits-00000002"
Scenario = Callable[[Box], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scenario], None]:
    """Run a scenario on a fresh box in virtual time."""

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            await scenario(Box(tmp_path, LoopClock()))

        run_virtually(main())

    return run


async def begin(box: Box, *assignments: agent_pb2.Assignment, revision: int = 1, **leader: object) -> Node:
    """A started node that a scheduler has welcomed and given a set."""
    node = box.agent()
    await node.start()
    node.hello()
    node.welcome(wire.leader_of(welcome(**leader)))
    await complete(node, *assignments, revision=revision)
    return node


async def complete(node: Node, *assignments: agent_pb2.Assignment, revision: int = 1, term: int = 1) -> None:
    message = agent_pb2.Complete(revision=revision, term=term, store_revision=revision, assignments=assignments)
    await node.receive(wire.complete_of(message))


async def delta(node: Node, base: int, *put: agent_pb2.Assignment, drop: tuple[str, ...] = (), term: int = 1) -> None:
    message = agent_pb2.Delta(base=base, revision=base + 1, term=term, store_revision=base + 1, put=put, drop=drop)
    await node.receive(wire.delta_of(message))


def phase(node: Node, runner: str = A) -> Phase | None:
    return next((task.phase for task in node.tasks() if task.runner_id == runner), None)


def told(node: Node) -> dict[str, agent_pb2.RunnerStatus]:
    return {status.runner_id: status for status in node.take_report().runners}


def kinds(node: Node) -> list[str]:
    return [event.kind for event in node.take_report().events]


def test_a_runner_comes_up_serves_and_goes(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(ready_after_s=2.0, lines=("hello",))
        box.cache.stage_s = 3.0
        node = await begin(box, assignment(gpus=["GPU-1"], artifacts=[model()]))
        assert told(node)[A].state == state_pb2.RUNNER_STATE_STAGING
        await until(lambda: phase(node) is Phase.STARTED)
        assert box.machine.models_of("default.digits-00000001") == {
            "default.digits-model": Path("/cache/default/digits-model")
        }
        await until(lambda: phase(node) is Phase.SERVING)
        status = told(node)[A]
        assert status.state == state_pb2.RUNNER_STATE_IDLE
        assert [p.name for p in status.phases] == ["weights", "make", "stage", "create", "start", "setup"]
        took = {p.name: p.seconds for p in status.phases}
        assert took["weights"] == pytest.approx(3.0, abs=0.1)
        assert took["make"] < 1.0
        assert took["stage"] == pytest.approx(6.0, abs=3.1)  # staged while made, and again to attach
        assert 2.0 <= took["setup"] < 2.6
        assert status.residencies[0].manifest_digest == "ab" * 32
        entry = box.proxy.entries[A]
        assert (entry.max_multiplexing, entry.request_timeout_s, entry.pid) == (2, 100.0, 1001)

        box.proxy.usages[A] = Usage(in_flight=1, served=7, last_used_age_s=0.0)
        box.push(node)
        status = told(node)[A]
        assert (status.state, status.served, status.in_flight) == (state_pb2.RUNNER_STATE_RUNNING, 7, 1)

        await delta(node, 1, assignment(goal=state_pb2.GOAL_DRAIN, gpus=["GPU-1"]))
        await asyncio.sleep(5)
        assert told(node)[A].state == state_pb2.RUNNER_STATE_DRAINING
        assert box.machine.running() == ["default.digits-00000001"]
        box.proxy.usages[A] = Usage(in_flight=0, served=8, last_used_age_s=0.0)
        await until(lambda: phase(node) is Phase.GONE)
        status = told(node)[A]
        assert status.state == state_pb2.RUNNER_STATE_TERMINATED
        assert (status.served, list(status.log_tail), status.exit_code) == (8, ["hello"], 0)
        assert status.gpu_seconds > 5
        assert box.machine.containers == {}
        assert box.cache.pins == {}
        assert A not in box.proxy.entries

        await delta(node, 2, drop=(A,))
        assert list(node.take_report().gone) == [A]
        assert node.tasks() == []
        await node.close()

    play(scenario)


def test_weights_and_container_are_prepared_at_the_same_time(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        box.cache.stage_s, box.machine.script_of = 5.0, lambda spec: Script(create_s=4.0)
        node = await begin(box, assignment(artifacts=[model()]))
        await until(lambda: phase(node) is Phase.STAGED)
        assert asyncio.get_running_loop().time() == pytest.approx(5.0, abs=0.1)
        await node.close()

    play(scenario)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(exit_after_s=1.0, exit_code=3, ready_after_s=None, lines=("no such model",)), "code 3"),
        (Script(ready_after_s=None), "not ready within 60 s (startup_timeout): /readyz: HTTP 503 loading"),
        (Script(refuse_create="no space"), "no space"),
        (Script(refuse_start="bad rootfs"), "bad rootfs"),
    ],
)
def test_a_runner_that_does_not_come_up_says_why(play: Callable[[Scenario], None], script: Script, words: str) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: script
        node = await begin(box, assignment(gpus=["GPU-0"]))
        await until(lambda: phase(node) is Phase.GONE, within_s=120)
        status = told(node)[A]
        assert status.state == state_pb2.RUNNER_STATE_TERMINATED
        assert words in status.reason
        assert list(status.log_tail) == list(script.lines)
        assert box.machine.containers == {}
        # Its GPU is free for the next one.
        await delta(node, 1, assignment(B, gpus=["GPU-0"]))
        assert not told(node)[B].refused
        await node.close()

    play(scenario)


def test_corrupt_weights_end_the_runner_and_fsd_away_does_not(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        box.cache.refuse["default/bad"] = FalError(Code.CORRUPT, "unet.safetensors has a wrong digest", remedy="Fix.")
        box.cache.away = True
        node = await begin(box, assignment(artifacts=[model()]), assignment(B, artifacts=[model("default/bad")]))
        await asyncio.sleep(30)
        assert phase(node) is Phase.ADMITTED
        assert "fsd does not answer" in told(node)[A].reason
        box.cache.away = False
        await until(lambda: phase(node) is Phase.SERVING)
        await until(lambda: phase(node, B) is Phase.GONE)
        assert "unet.safetensors" in told(node)[B].reason
        await node.close()

    play(scenario)


def test_a_worker_that_hangs_is_replaced_and_a_hiccup_is_not(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        node = await begin(box, assignment())
        await until(lambda: phase(node) is Phase.SERVING)
        box.prober.sick.add("default.digits-00000001")
        await asyncio.sleep(15)
        assert "liveness probe failed" in told(node)[A].reason
        box.prober.sick.clear()
        await asyncio.sleep(60)
        assert told(node)[A].reason == ""
        box.prober.sick.add("default.digits-00000001")
        await until(lambda: phase(node) is Phase.GONE)
        assert "3 times in a row" in told(node)[A].reason
        await node.close()

    play(scenario)


def test_goals_interrupt_every_phase(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        box.cache.stage_s = 100.0
        node = await begin(box, assignment(artifacts=[model()]))
        await asyncio.sleep(1)
        await delta(node, 1, assignment(artifacts=[model()], goal=state_pb2.GOAL_KILL))
        began_s = asyncio.get_running_loop().time()
        await until(lambda: phase(node) is Phase.GONE)
        assert asyncio.get_running_loop().time() - began_s < 1
        assert box.machine.containers == {}
        assert box.cache.pins == {}
        await node.close()

    play(scenario)


def test_a_slow_stop_is_killed_after_its_grace(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(ignore_term=True)
        node = await begin(box, assignment(termination_grace_s=7.0))
        await until(lambda: phase(node) is Phase.SERVING)
        began_s = asyncio.get_running_loop().time()
        await delta(node, 1, assignment(termination_grace_s=7.0, goal=state_pb2.GOAL_STOP))
        await until(lambda: phase(node) is Phase.GONE)
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(7.0, abs=0.2)
        assert told(node)[A].exit_code == 137
        await node.close()

    play(scenario)


def test_a_repeated_assignment_changes_nothing_and_a_refusal_stays(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        one, two = assignment(gpus=["GPU-0"]), assignment(B, gpus=["GPU-0"])
        node = await begin(box, one)
        await until(lambda: phase(node) is Phase.SERVING)
        await complete(node, one, two, revision=2)
        assert told(node)[B].refused
        assert f"held by runner {A}" in (await refusal(node, one, two))
        await complete(node, assignment(gpus=["GPU-0"], goal=state_pb2.GOAL_STOP), two, revision=4)
        await until(lambda: phase(node) is Phase.GONE)
        # GPU-0 is free, but what was refused was given to another node: only a new assignment starts it.
        await complete(node, two, revision=5)
        assert told(node)[B].refused
        assert box.machine.running_max == 1
        await complete(node, assignment(B, gpus=["GPU-0"], id="as-other"), revision=6)
        await until(lambda: phase(node, B) is Phase.SERVING)
        await node.close()

    async def refusal(node: Node, *set_: agent_pb2.Assignment) -> str:
        await complete(node, *set_, revision=3)
        return told(node)[B].reason

    play(scenario)


def test_a_restart_takes_everything_back(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(
            ready_after_s={"default.digits-00000001": 0.0}.get(spec.id, 30.0), lines=("last words",)
        )
        crashed = "default/digits-00000003"
        old = await begin(box, assignment(gpus=["GPU-0"]), assignment(B, gpus=["GPU-1"]), assignment(crashed))
        await until(lambda: phase(old) is Phase.SERVING and phase(old, B) is Phase.STARTED)
        await until(lambda: phase(old, crashed) is Phase.STARTED)
        await old.close()  # as far as the world can see, a kill -9
        box.machine.exit("default.digits-00000003", 9)
        pids = {id: c.status.pid for id, c in box.machine.containers.items()}

        node = box.agent(agent_id="a-2")
        await node.start()
        statuses = {status.runner_id: status for status in node.hello().runners}
        assert statuses[A].state == state_pb2.RUNNER_STATE_IDLE
        assert statuses[B].state == state_pb2.RUNNER_STATE_SETUP
        assert list(statuses[A].gpus) == ["GPU-0"]
        await until(lambda: phase(node) is Phase.SERVING and phase(node, B) is Phase.SERVING)
        await until(lambda: phase(node, crashed) is Phase.GONE)
        assert told(node)[crashed].exit_code == 9
        assert {id: c.status.pid for id, c in box.machine.containers.items()} == {
            id: pid for id, pid in pids.items() if id != "default.digits-00000003"
        }
        await node.close()

    play(scenario)


def test_the_agent_may_die_between_any_two_steps(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(create_s=0.3, start_s=0.3, ready_after_s=1.0)
        box.cache.stage_s, box.journal.write_s = 0.5, 0.01
        wish = assignment(gpus=["GPU-0"], artifacts=[model()])
        for lifetime_ms in range(5, 3000, 130):
            node = await begin(box, wish)
            await asyncio.sleep(lifetime_ms / 1000)
            await node.close()
            assert len(box.machine.containers) <= 1
        node = await begin(box, wish)
        await until(lambda: phase(node) is Phase.SERVING)
        assert box.machine.running() == ["default.digits-00000001"]
        stop = assignment(gpus=["GPU-0"], artifacts=[model()], goal=state_pb2.GOAL_STOP)
        for lifetime_ms in range(1, 40, 3):
            await delta(node, 1, stop)
            await asyncio.sleep(lifetime_ms / 1000)
            await node.close()
            node = await begin(box, stop)
        await until(lambda: phase(node) is Phase.GONE)
        assert box.machine.containers == {}
        assert box.cache.pins == {}
        await node.close()

    play(scenario)


def test_what_no_set_names_is_kept_as_an_orphan(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        node = await begin(box, assignment(gpus=["GPU-0"]))
        await until(lambda: phase(node) is Phase.SERVING)
        node.take_report()
        await complete(node, revision=7)  # an empty store
        await delta(node, 7, drop=(A,))
        await asyncio.sleep(1000)
        assert phase(node) is Phase.SERVING
        assert "ORPHAN" in kinds(node)
        assert node.standing.store_revision == 1  # its store is still the one that it worked for
        await delta(node, 8, assignment(B, gpus=["GPU-0"]))
        assert "held by runner" in told(node)[B].reason
        # Adopted under a new assignment it goes on as it is; then a goal stops it.
        await delta(node, 9, assignment(id="as-adopted", gpus=["GPU-3"]))
        assert (told(node)[A].assignment_id, phase(node)) == ("as-adopted", Phase.SERVING)
        await delta(node, 10, assignment(id="as-adopted", goal=state_pb2.GOAL_STOP))
        await until(lambda: phase(node) is Phase.GONE)
        await node.close()

    play(scenario)


def test_the_newest_store_revision_seen_survives_the_agent(play: Callable[[Scenario], None]) -> None:
    """A restarted agent would else take an older copy of the store for the newest."""

    async def scenario(box: Box) -> None:
        node = await begin(box, assignment(gpus=["GPU-0"]))
        await until(lambda: phase(node) is Phase.SERVING)
        await delta(node, 1, assignment(gpus=["GPU-0"]))  # as it is already: nothing else to write
        assert node.standing.store_revision == 2
        assert MemoryJournal(box.disk).recorded().standing.store_revision == 2
        await node.close()

    play(scenario)


@pytest.mark.parametrize("kept", [True, False])
def test_a_lost_journal_makes_orphans_of_all(play: Callable[[Scenario], None], kept: bool) -> None:
    async def scenario(box: Box) -> None:
        box.prober.sick.add("default.digits-00000001")
        old = await begin(box, assignment(gpus=["GPU-0"]))
        await until(lambda: phase(old) is Phase.SERVING)
        await old.close()
        box.disk.clear()
        if not kept:
            next(box.places.runners.iterdir()).unlink()
        box.machine.script_of = lambda spec: Script(ready_after_s=None)
        node = await begin(box)
        await asyncio.sleep(5000)
        assert box.machine.running() == ["default.digits-00000001"]
        hello = node.hello()
        assert hello.runners[0].runner_id == A
        assert list(hello.runners[0].gpus) == (["GPU-0"] if kept else [])
        assert hello.runners[0].app == ("default/digits" if kept else "")
        node.welcome(wire.leader_of(welcome()))
        await complete(node, assignment(goal=state_pb2.GOAL_STOP))
        await until(lambda: phase(node) is Phase.GONE)
        assert box.machine.containers == {}
        await node.close()

    play(scenario)


@pytest.mark.parametrize(
    ("leader", "why"),
    [({"cluster_id": "c-2"}, "c-2"), ({"epoch": 0}, "epoch 0"), ({"cluster_id": ""}, "does not name its cluster")],
)
def test_a_foreign_or_older_scheduler_stops_and_starts_nothing(
    play: Callable[[Scenario], None], leader: dict[str, object], why: str
) -> None:
    async def scenario(box: Box) -> None:
        node = await begin(box, assignment())
        await until(lambda: phase(node) is Phase.SERVING)
        node.hello()
        node.welcome(wire.leader_of(welcome(**leader, term=9)))
        await complete(node, assignment(goal=state_pb2.GOAL_KILL, term=9), assignment(B, term=9), term=9)
        await asyncio.sleep(100)
        assert phase(node) is Phase.SERVING
        report = node.take_report()
        assert [event.kind for event in report.events] == ["DISTRUSTED"]
        status = next(status for status in report.runners if status.runner_id == B)
        assert status.refused
        assert why in status.reason
        assert node.standing.term == 1
        # An operator accepts the node into the other cluster.
        if leader.get("cluster_id"):
            node.welcome(wire.leader_of(welcome(**leader, term=9, accepted_clusters=["c-1"])))
            await complete(node, assignment(goal=state_pb2.GOAL_KILL, term=9), term=9)
            await until(lambda: phase(node) is Phase.GONE)
            assert node.standing.cluster_id == "c-2"
        await node.close()

    play(scenario)


def test_a_deposed_leader_is_fenced_also_after_a_restart(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        node = await begin(box, assignment())
        await complete(node, assignment(), term=5)
        await node.close()
        node = box.agent()
        await node.start()
        assert node.hello().term_seen == 5
        node.welcome(wire.leader_of(welcome(term=4)))
        with pytest.raises(FalError) as caught:
            await complete(node, assignment(goal=state_pb2.GOAL_KILL, term=4), term=4)
        assert caught.value.code is Code.STALE_TERM
        await until(lambda: phase(node) is Phase.SERVING)
        await node.close()

    play(scenario)


def test_a_full_disk_refuses_what_is_new_and_obeys_for_what_runs(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        node = await begin(box, assignment())
        await until(lambda: phase(node) is Phase.SERVING)
        node.take_report()
        box.journal.full = True
        await delta(node, 1, assignment(B))
        report = node.take_report()
        assert {e.kind for e in report.events} == {"JOURNAL_FULL"}
        status = next(s for s in report.runners if s.runner_id == B)
        assert status.refused
        assert "No space left" in status.reason
        assert phase(node) is Phase.SERVING
        await delta(node, 2, assignment(goal=state_pb2.GOAL_STOP))
        await until(lambda: phase(node) is Phase.GONE)
        box.journal.full = False
        await delta(node, 3, assignment(B, id="as-again"))
        await until(lambda: phase(node, B) is Phase.SERVING)
        await node.close()

    play(scenario)


def test_gpu_memory_must_be_free_before_the_gpu_is(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        node = await begin(box, assignment(gpus=["GPU-0"]))
        await until(lambda: phase(node) is Phase.SERVING)
        box.hardware.used["GPU-0"] = 20 << 30
        await node.look()
        assert not any(gpu.health_reason for gpu in node.hello().inventory.gpus)
        node.welcome(wire.leader_of(welcome()))
        await complete(node, assignment(gpus=["GPU-0"], goal=state_pb2.GOAL_STOP))
        await asyncio.sleep(20)
        assert phase(node) is Phase.REMOVED
        assert told(node)[A].state == state_pb2.RUNNER_STATE_TERMINATING
        await until(lambda: phase(node) is Phase.GONE)
        await node.look()
        report = node.take_report()
        assert "GPU_NOT_RELEASED" in [event.kind for event in report.events]
        gpu = report.inventory.gpus[0]
        assert (gpu.health, "20480 MiB" in gpu.health_reason) == (agent_pb2.GPU_HEALTH_QUARANTINED, True)
        await delta(node, 1, assignment(B, gpus=["GPU-0"]))
        assert "20480 MiB" in told(node)[B].reason
        box.hardware.used.clear()
        await node.look()
        assert node.take_report().inventory.gpus[0].health == agent_pb2.GPU_HEALTH_OK
        await node.close()

    play(scenario)


def test_a_proxy_that_is_away_delays_registration_only(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        box.proxy.away = True
        node = await begin(box, assignment())
        await until(lambda: phase(node) is Phase.READY)
        await asyncio.sleep(30)
        assert "proxy does not answer" in told(node)[A].reason
        assert box.machine.running()
        box.proxy.away = False
        await until(lambda: phase(node) is Phase.SERVING)
        assert [entry.runner_id for entry in node.entries()] == [A] == sorted(node.kept())
        await node.close()

    play(scenario)


def test_counts_go_on_when_the_proxy_lost_its_own(play: Callable[[Scenario], None]) -> None:
    async def scenario(box: Box) -> None:
        node = await begin(box, assignment())
        await until(lambda: phase(node) is Phase.SERVING)
        for served, total in ((5, 5), (7, 7), (0, 7), (2, 9)):
            box.proxy.usages[A] = Usage(served=served, last_used_age_s=0.0)
            box.push(node)
            assert next(r for r in node.hello().runners).served == total
        await asyncio.sleep(30)
        assert node.hello().runners[0].last_used_age_s == pytest.approx(30, abs=0.1)
        await node.close()

    play(scenario)
