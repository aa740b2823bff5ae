"""The session over links in memory, in virtual time: beginning, reports, heartbeats, gaps, reconnects, logs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from agent_fakes import Box, Dial, Wire, assignment, until, welcome
from fal_agent.core.notice import Announced
from fal_agent.core.tasks import Phase
from fal_agent.node import Node
from fal_agent.ports import Usage
from fal_agent.session import Session
from fal_contract.errors import Code, FalError
from fal_contract.limits import RECONNECT_CAP_S
from fal_contract.revocation import RevokedPeer
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.fake import Script
from virtual_time import LoopClock, run_virtually

A = "default/digits-00000001"


class Bench:
    """A node with a session, and the scheduler's side in the test's hand."""

    def __init__(self, box: Box, node: Node, dial: Dial, states: list[str]) -> None:
        self.box, self.node, self.dial, self.states = box, node, dial, states

    @property
    def wire(self) -> Wire:
        return self.dial.wires[-1]

    async def hello(self, **leader: object) -> agent_pb2.Hello:
        """Wait for the node to dial and say hello; welcome it."""
        count = len([s for s in self.states if s == "connected"])
        await until(lambda: len(self.dial.wires) > count)
        first = await self.wire.up.get()
        assert (first.seq, first.WhichOneof("kind")) == (1, "hello")
        self.wire.tell(welcome=welcome(**leader))
        return first.hello

    def complete(self, *assignments: agent_pb2.Assignment, revision: int = 1, term: int = 1) -> None:
        self.wire.tell(complete=agent_pb2.Complete(revision=revision, term=term, assignments=assignments))

    async def reports(self, within_s: float) -> list[tuple[float, agent_pb2.AgentMessage]]:
        """Everything the node sends in this time, with the time of arrival."""
        loop = asyncio.get_running_loop()
        seen: list[tuple[float, agent_pb2.AgentMessage]] = []
        try:
            async with asyncio.timeout(within_s):
                while True:
                    message = await self.wire.up.get()
                    seen.append((loop.time(), message))
        except TimeoutError:
            return seen

    def phase(self, runner: str = A) -> Phase | None:
        return next((task.phase for task in self.node.tasks() if task.runner_id == runner), None)


Scenario = Callable[[Bench], Awaitable[None]]


@asynccontextmanager
async def bench(
    root: Path, refuse: FalError | None = None, reboot: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[Bench]:
    box, dial, states = Box(root, LoopClock()), Dial(), []
    box.reboot = reboot
    dial.refuse = refuse
    node = box.agent()
    await node.start()
    session = Session(node, dial, Random(7), on_state=lambda state, why: states.append(state))
    job = asyncio.create_task(session.run())
    try:
        yield Bench(box, node, dial, states)
    finally:
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        await node.close()


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scenario], None]:
    def run(scenario: Scenario) -> None:
        async def main() -> None:
            async with bench(tmp_path) as made:
                await scenario(made)

        run_virtually(main())

    return run


def test_an_idle_node_sends_a_heartbeat_every_five_seconds(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        hello = await b.hello()
        assert (hello.node_id, hello.boot_id, hello.versions.max) == ("n-000000000001", "boot-1", 1)
        assert len(hello.inventory.gpus) == 4
        seen = await b.reports(60)
        assert 11 <= len(seen) <= 13
        assert all(later - earlier <= 5.2 for (earlier, _), (later, _) in itertools.pairwise(seen))
        assert [m.seq for _, m in seen] == list(range(2, 2 + len(seen)))
        assert not any(m.report.runners or m.report.HasField("inventory") for _, m in seen)

    play(scenario)


def test_the_first_report_goes_at_once_and_the_rest_gather(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello()
        b.complete(assignment())
        await until(lambda: b.phase() is Phase.SERVING)
        await b.reports(4.0)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for served in range(1, 200):
            b.box.proxy.usages[A] = Usage(served=served, last_used_age_s=0.0)
            b.box.push(b.node)
            await asyncio.sleep(0.005)
        seen = [(at_s, m.report) for at_s, m in await b.reports(0.3) if m.report.runners]
        assert b.wire.up.empty()
        assert 9 <= len(seen) + 1 <= 13 or len(seen) <= 13
        assert seen[-1][1].runners[0].served == 199
        assert loop.time() - began_s < 2

    play(scenario)


def test_a_gap_or_a_deposed_leader_starts_the_session_over(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello()
        b.complete(assignment(), revision=3, term=4)
        await until(lambda: b.phase() is Phase.SERVING)
        b.wire.tell(delta=agent_pb2.Delta(base=4, revision=5, term=4, drop=[A]))
        await b.wire.closed.wait()
        hello = await b.hello()
        assert hello.term_seen == 4
        assert hello.runners[0].state == state_pb2.RUNNER_STATE_IDLE
        b.complete(assignment(goal=state_pb2.GOAL_KILL), term=3)
        await b.wire.closed.wait()
        assert b.phase() is Phase.SERVING

    play(scenario)


def test_a_delta_before_a_complete_and_an_unreadable_assignment_start_over(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello()
        b.wire.tell(delta=agent_pb2.Delta(base=0, revision=1, term=1, put=[assignment()]))
        await b.wire.closed.wait()
        await b.hello()
        b.complete(assignment(goal=77))
        await b.wire.closed.wait()
        assert b.node.tasks() == []

    play(scenario)


def test_without_a_scheduler_all_goes_on_and_is_told_on_return(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        b.box.machine.script_of = lambda spec: Script(exit_after_s=500.0 if spec.id.endswith("2") else None)
        await b.hello()
        b.complete(assignment(), assignment("default/digits-00000002"))
        await until(lambda: b.phase() is Phase.SERVING)
        b.dial.refuse = FalError(Code.UNAVAILABLE, "connection refused", remedy="Wait.")
        b.wire.cut()
        await asyncio.sleep(3600)
        assert b.phase() is Phase.SERVING
        waits = [later - earlier for earlier, later in itertools.pairwise(b.dial.at_s[2:])]
        assert max(waits) <= RECONNECT_CAP_S
        assert len(set(waits)) > 100  # jittered
        assert 3600 / RECONNECT_CAP_S < len(waits) < 3600
        b.dial.refuse = None
        hello = await b.hello()
        states = {status.runner_id[-1]: status.state for status in hello.runners}
        assert states == {"1": state_pb2.RUNNER_STATE_IDLE, "2": state_pb2.RUNNER_STATE_TERMINATED}

    play(scenario)


def test_a_revoked_node_serves_on_and_tries_slowly(tmp_path: Path) -> None:
    async def main() -> None:
        refusal = FalError(Code.UNAUTHENTICATED, "the certificate is revoked", remedy="Join again.")
        async with bench(tmp_path, refusal) as b:
            await asyncio.sleep(3600)
            assert 60 <= len(b.dial.at_s) <= 200
            assert set(b.states) == {"disconnected"}
            b.dial.refuse = None
            await b.hello()

    run_virtually(main())


def test_a_scheduler_that_never_answers_is_given_up(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await until(lambda: b.dial.wires)
        silent = b.wire
        await asyncio.sleep(29)
        assert not silent.closed.is_set()
        await asyncio.sleep(2)
        assert silent.closed.is_set()
        await until(lambda: len(b.dial.wires) == 2)

    play(scenario)


def test_the_proxy_learns_the_term_and_the_gateways(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello()
        b.complete(term=6)
        endpoint = agent_pb2.Endpoint(network="net", host="10.0.0.1", port=99)
        gateway = agent_pb2.GatewayAddress(gateway_id="g-1", endpoints=[endpoint])
        b.wire.tell(gateways=agent_pb2.GatewaySet(gateways=[gateway]))
        await until(lambda: b.box.proxy.gateways)
        assert b.box.proxy.term == 6
        assert b.box.proxy.gateways[0].endpoints == (("10.0.0.1", 99),)
        revoked = agent_pb2.RevokedCertificate(serial="serving.g-2", subject="serving/g-2", revoked_at_s=5.0)
        b.wire.tell(revocations=agent_pb2.RevocationSet(revoked=[revoked]))
        await until(lambda: b.box.proxy.revoked)
        assert b.box.proxy.revoked == [RevokedPeer("serving.g-2", "serving/g-2", 5.0)]
        b.box.proxy.away = True
        b.wire.tell(gateways=agent_pb2.GatewaySet())
        await until(lambda: any(m.report.events for _, m in [(0, b.wire.up.get_nowait())]) if b.wire.up.qsize() else 0)
        assert not b.wire.closed.is_set()

    play(scenario)


def test_logs_are_streamed_cancelled_and_bounded(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello()
        b.complete(assignment())
        await until(lambda: b.phase() is Phase.SERVING)
        for n in range(500):
            b.box.machine.log("default.digits-00000001", f"line {n}")

        def ask(id: int, **more: object) -> None:
            b.wire.tell(log_request=agent_pb2.LogRequest(id=id, runner_id=A, **more))  # type: ignore[arg-type]

        async def chunks(id: int, within_s: float = 1.0) -> list[agent_pb2.LogChunk]:
            seen = [m.log_chunk for _, m in await b.reports(within_s)]
            return [chunk for chunk in seen if chunk.id == id]

        ask(1, tail_lines=300)
        got = await chunks(1)
        lines = [line.text for chunk in got for line in chunk.lines]
        assert lines == [f"line {n}" for n in range(200, 500)]
        assert [chunk.end for chunk in got] == [False] * (len(got) - 1) + [True]

        ask(2, tail_lines=0, follow=True)
        await asyncio.sleep(0.1)
        b.box.machine.log("default.digits-00000001", "é" * 4000)
        got = await chunks(2)
        assert len(got[0].lines[0].text.encode()) <= 4096
        ask(2, cancel=True)
        b.box.machine.log("default.digits-00000001", "not told")
        assert await chunks(2) == []

        b.wire.tell(log_request=agent_pb2.LogRequest(id=3, runner_id="default/none-00000009"))
        (answer,) = await chunks(3)
        assert answer.end
        assert "does not exist" in answer.error
        for id in range(10, 30):
            ask(id, follow=True)
        refused = [m.log_chunk for _, m in await b.reports(1.0) if m.log_chunk.error]
        assert len(refused) == 4
        assert "16 logs" in refused[0].error

    play(scenario)


def test_what_is_cancelled_while_it_sends_leaves_the_session_as_it_is(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello()
        b.complete(assignment())
        await until(lambda: b.phase() is Phase.SERVING)
        await b.reports(1.0)
        for n in range(3):
            b.box.machine.log("default.digits-00000001", f"line {n}")
        b.wire.room.clear()
        b.wire.tell(log_request=agent_pb2.LogRequest(id=1, runner_id=A, tail_lines=3, follow=True))
        await asyncio.sleep(1.0)  # it waits for room
        b.wire.tell(log_request=agent_pb2.LogRequest(id=1, cancel=True))
        await asyncio.sleep(1.0)
        b.wire.room.set()
        sent = [message for _, message in await b.reports(12.0)]
        assert [line.text for m in sent for line in m.log_chunk.lines] == ["line 0", "line 1", "line 2"]
        assert len([m for m in sent if m.HasField("report")]) >= 2, "it goes on reporting"
        assert [m.seq for m in sent] == list(range(sent[0].seq, sent[0].seq + len(sent))), "nothing is missing"
        assert len(b.dial.wires) == 1, "in the same session"

    play(scenario)


def test_a_session_that_is_cancelled_under_the_agent_is_opened_again(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello()
        b.complete(assignment())
        await until(lambda: b.phase() is Phase.SERVING)
        (listening,) = [task for task in asyncio.all_tasks() if task.get_name() == "listen"]
        listening.cancel()
        await b.hello()
        await until(lambda: b.states == ["connected", "disconnected", "connected"])

    play(scenario)


def test_a_session_can_be_started_over(tmp_path: Path) -> None:
    async def main() -> None:
        box, dial = Box(tmp_path, LoopClock()), Dial()
        node = box.agent()
        await node.start()
        session = Session(node, dial, Random(7))
        job = asyncio.create_task(session.run())
        await until(lambda: dial.wires)
        dial.wires[0].tell(welcome=welcome())
        await until(lambda: session.connected)
        node.endpoints = (agent_pb2.Endpoint(network="lan", host="10.0.0.1", port=9),)
        session.start_over()
        await until(lambda: len(dial.wires) == 2)
        hello = (await dial.wires[1].up.get()).hello
        assert hello.endpoints[0].port == 9
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        await node.close()

    run_virtually(main())


def test_a_scheduler_that_chose_a_version_we_do_not_speak_is_refused(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello(version=9)
        await b.wire.closed.wait()
        assert b.states[-1] == "disconnected"
        assert "connected" not in b.states

    play(scenario)


def test_what_is_announced_is_told_once_it_is_known_and_with_each_hello(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        hello = await b.hello()
        assert not hello.HasField("notice"), "not known yet"
        b.complete()
        await b.reports(6.0)
        b.node.announce(Announced("spot", b.box.clock.wall_s() + 90.0, "power"))
        told = [m.report.notice for _, m in await b.reports(11.0) if m.report.HasField("notice")]
        assert [(one.kind, one.reason) for one in told] == [("spot", "power")]
        assert told[0].within_s == pytest.approx(90.0, abs=0.2)
        b.wire.cut()
        again = (await b.hello()).notice
        assert again.kind == "spot"
        assert 0.0 < again.within_s < 80.0
        b.complete()
        await b.reports(1.0)
        b.node.announce(None)
        told = [m.report.notice for _, m in await b.reports(6.0) if m.report.HasField("notice")]
        assert [one.kind for one in told] == [""]
        b.node.announce(Announced("notice", None, "some time"))
        told = [m.report.notice for _, m in await b.reports(6.0) if m.report.HasField("notice")]
        assert [one.within_s for one in told] == [-1.0]

    play(scenario)


def test_a_machine_is_rebooted_once_when_nothing_runs_and_only_of_the_boot_named(tmp_path: Path) -> None:
    async def main() -> None:
        asked = asyncio.Event()
        calls: list[float] = []

        async def reboot() -> None:
            calls.append(asyncio.get_running_loop().time())
            asked.set()
            await asyncio.sleep(300.0)
            raise FalError(Code.TIMEOUT, "it is still up", remedy="Go and look.")

        async with bench(tmp_path, reboot=reboot) as b:
            await b.hello()
            b.complete(assignment())
            await until(lambda: b.phase() is Phase.SERVING)
            b.wire.tell(reboot=agent_pb2.RebootOrder(boot_id="boot-1"))
            refused = [m.reboot_refusal for _, m in await b.reports(6.0) if m.WhichOneof("kind") == "reboot_refusal"]
            assert [one.boot_id for one in refused] == ["boot-1"]
            assert A in refused[0].error
            b.complete(assignment(goal=state_pb2.GOAL_KILL), revision=2)
            await until(lambda: b.phase() is Phase.GONE)
            b.wire.tell(reboot=agent_pb2.RebootOrder(boot_id="boot-0"))
            assert not [m for _, m in await b.reports(6.0) if m.WhichOneof("kind") == "reboot_refusal"]
            assert not calls, "of an earlier boot: it has happened"
            for _ in range(2):
                b.wire.tell(reboot=agent_pb2.RebootOrder(boot_id="boot-1"))
            async with asyncio.timeout(10.0):
                await asked.wait()
            refused = [m.reboot_refusal for _, m in await b.reports(310.0) if m.WhichOneof("kind") == "reboot_refusal"]
            assert [(one.error, one.remedy) for one in refused] == [("it is still up", "Go and look.")]
            assert len(calls) == 1

    run_virtually(main())


def test_without_a_command_a_reboot_is_refused(play: Callable[[Scenario], None]) -> None:
    async def scenario(b: Bench) -> None:
        await b.hello()
        b.complete()
        b.wire.tell(reboot=agent_pb2.RebootOrder(boot_id="boot-1"))
        refused = [m.reboot_refusal for _, m in await b.reports(6.0) if m.WhichOneof("kind") == "reboot_refusal"]
        assert "reboot_command" in refused[0].error

    play(scenario)
