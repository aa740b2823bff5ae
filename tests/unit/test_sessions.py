"""The session protocol over a link in memory: what goes down, what ends a session, what an operator is told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from fake_engine import FakeEngine
from fal_contract.clock import ManualClock
from fal_contract.errors import Code, FalError
from fal_contract.limits import NOTICE_REASON_CHARS_MAX, STREAM_QUEUE_MESSAGES_MAX
from fal_contract.v1 import agent_pb2, state_pb2
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.assignments import AssignmentBuilder
from fal_scheduler.core.events import HelloNeeded, Logged, NodeChanged, NodeDisconnected, NodeHello, NodeReport, Revoked
from fal_scheduler.core.node_events import NodeNotice, RebootDue, RebootRefused
from fal_scheduler.core.records import Drain, Goal, Model, ModelState, Node, Revocation, Spec
from fal_scheduler.sessions import AgentSessions
from fal_scheduler.wire import notice_of
from virtual_time import run_virtually

END = object()


class Blobs:
    """Manifests by digest."""

    def __init__(self) -> None:
        self.manifests: dict[str, state_pb2.ModelManifest] = {}

    def get(self, artifact_id: str) -> state_pb2.ModelManifest:
        if artifact_id not in self.manifests:
            raise FalError(Code.NOT_FOUND, f"the manifest {artifact_id} does not exist", remedy="Register again.")
        return self.manifests[artifact_id]


class Rig:
    """Sessions over a fake engine; `node()` opens a link."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.engine.deploy()
        self.engine.put(Node("n1", "name-n1", "p"))
        self.clock = ManualClock()
        self.alarms = EdgeAlarms()
        self.notes: list[Logged] = []
        self.blobs = Blobs()
        ids = itertools.count(1)
        self.sessions = AgentSessions(
            self.engine,
            AssignmentBuilder(self.blobs),
            clock=self.clock,
            alarms=self.alarms,
            note=self.notes.append,
            new_id=lambda: f"s-{next(ids)}",
        )


class Link:
    """The agent's end of one stream."""

    def __init__(self, rig: Rig, name: str = "n1") -> None:
        self.up: asyncio.Queue[object] = asyncio.Queue()
        self.down: asyncio.Queue[agent_pb2.SchedulerMessage] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self.task = asyncio.create_task(rig.sessions.run(name, self._incoming(), self._send))

    async def _incoming(self) -> AsyncIterator[agent_pb2.AgentMessage]:
        while (item := await self.up.get()) is not END:
            assert isinstance(item, agent_pb2.AgentMessage)
            yield item

    async def _send(self, message: agent_pb2.SchedulerMessage) -> None:
        await self.gate.wait()
        self.down.put_nowait(message)

    def hello(self, node_id: str = "n1", *, seq: int = 1, low: int = 1, high: int = 1, wall_s: float = 0.0) -> None:
        hello = agent_pb2.Hello(
            versions=agent_pb2.Versions(min=low, max=high), node_id=node_id, boot_id="boot-1", wall_s=wall_s
        )
        self.up.put_nowait(agent_pb2.AgentMessage(seq=seq, hello=hello))

    def report(self, seq: int, *states: int) -> None:
        runners = [agent_pb2.RunnerStatus(runner_id=f"t/a-{n}", state=s) for n, s in enumerate(states)]  # type: ignore[arg-type]
        self.up.put_nowait(agent_pb2.AgentMessage(seq=seq, report=agent_pb2.Report(runners=runners)))

    async def next(self, kind: str) -> agent_pb2.SchedulerMessage:
        async with asyncio.timeout(60):
            message = await self.down.get()
        assert message.WhichOneof("kind") == kind, message
        return message

    async def open(self) -> agent_pb2.Complete:
        self.hello()
        await self.next("welcome")
        return (await self.next("complete")).complete

    async def failure(self) -> FalError:
        with pytest.raises(FalError) as caught:
            async with asyncio.timeout(60):
                await self.task
        return caught.value


def session_test(test: Callable[[Rig], Awaitable[None]]) -> None:
    async def body() -> None:
        await test(Rig())

    run_virtually(body())


@asynccontextmanager
async def opened(rig: Rig, name: str = "n1") -> AsyncIterator[Link]:
    link = Link(rig, name)
    await link.open()
    yield link
    link.up.put_nowait(END)
    await asyncio.gather(link.task, return_exceptions=True)


def test_welcome_then_the_whole_set_then_chained_deltas() -> None:
    async def test(rig: Rig) -> None:
        rig.engine.run("t/a-1")
        link = Link(rig)
        link.hello()
        welcome = (await link.next("welcome")).welcome
        assert (welcome.version, welcome.term, welcome.epoch, welcome.cluster_id) == (1, 3, 1, "c-000000000000")
        hello = rig.engine.submitted[0]
        assert isinstance(hello, NodeHello)
        complete = (await link.next("complete")).complete
        assert [x.runner_id for x in complete.assignments] == ["t/a-1"]
        assert complete.assignments[0].goal == state_pb2.GOAL_RUN
        assert complete.assignments[0].spec.image == "host"
        rig.engine.run("t/a-2")
        first = (await link.next("delta")).delta
        assert (first.base, first.revision, [x.runner_id for x in first.put]) == (
            complete.revision,
            complete.revision + 1,
            ["t/a-2"],
        )
        rig.engine.drop(rig.engine.view.runners["t/a-1"])
        rig.engine.run("t/a-2", goal=Goal.DRAIN)
        rig.engine.emit(NodeChanged("n1"))
        second = (await link.next("delta")).delta
        assert (second.base, list(second.drop)) == (first.revision, ["t/a-1"])
        assert [(x.runner_id, x.goal) for x in second.put] == [("t/a-2", state_pb2.GOAL_DRAIN)]
        link.up.put_nowait(END)
        await link.task
        assert rig.engine.offered[-1] == NodeDisconnected("n1", "s-1")

    session_test(test)


def test_deltas_are_coalesced_with_the_first_at_once() -> None:
    async def test(rig: Rig) -> None:
        loop = asyncio.get_running_loop()
        async with opened(rig) as link:
            await asyncio.sleep(1)
            start_s = loop.time()
            rig.engine.run("t/a-0")
            await link.next("delta")
            assert loop.time() == start_s  # the leading edge
            for n in range(1, 40):
                rig.engine.run(f"t/a-{n}")
                await asyncio.sleep(0.0001)
            delta = (await link.next("delta")).delta
            assert len(delta.put) == 39
            assert loop.time() - start_s == pytest.approx(0.025)

    session_test(test)


def test_what_did_not_change_is_not_sent_again() -> None:
    async def test(rig: Rig) -> None:
        rig.engine.run("t/a-1")
        async with opened(rig) as link:
            rig.engine.emit(NodeChanged("n1"))
            await asyncio.sleep(5)
            assert link.down.empty()

    session_test(test)


def test_a_node_that_must_say_hello_again_is_sent_away_and_no_other() -> None:
    async def test(rig: Rig) -> None:
        link = Link(rig)
        await link.open()
        rig.engine.emit(HelloNeeded("n2"))
        await asyncio.sleep(5)
        assert not link.task.done()
        rig.engine.emit(HelloNeeded("n1"))
        with pytest.raises(FalError) as caught:
            await link.task
        assert (caught.value.code, caught.value.retryable) == (Code.UNAVAILABLE, True)
        assert not rig.sessions.connected("n1")

    session_test(test)


def test_a_held_node_gets_nothing_and_then_everything() -> None:
    async def test(rig: Rig) -> None:
        rig.engine.held.add("n1")
        rig.engine.run("t/a-1")
        link = Link(rig)
        assert list((await link.open()).assignments) == []
        rig.engine.held.clear()
        rig.engine.emit(NodeChanged("n1"))
        assert [x.runner_id for x in (await link.next("delta")).delta.put] == ["t/a-1"]
        link.up.put_nowait(END)
        await link.task

    session_test(test)


def test_a_large_set_is_split_into_messages_that_fit() -> None:
    async def test(rig: Rig) -> None:
        spec = Spec("host", command=("true",), env={"BIG": "x" * 100_000})
        rig.engine.deploy("t/big", spec)
        for n in range(50):
            rig.engine.run(f"t/big-{n:02d}", app="t/big")
        link = Link(rig)
        complete = await link.open()
        got, revision = [x.runner_id for x in complete.assignments], complete.revision
        assert 1 <= len(got) < 50
        while len(got) < 50:
            message = await link.next("delta")
            assert message.ByteSize() <= 1 << 21
            assert message.delta.base == revision
            revision = message.delta.revision
            got += [x.runner_id for x in message.delta.put]
        assert got == [f"t/big-{n:02d}" for n in range(50)]
        link.up.put_nowait(END)
        await link.task

    session_test(test)


def test_reports_become_news_and_repeats_are_ignored() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            link.report(2, state_pb2.RUNNER_STATE_SETUP)
            link.report(2, state_pb2.RUNNER_STATE_IDLE)
            link.report(1)
            link.report(3)
            await asyncio.sleep(1)
            reports = [x for x in rig.engine.offered if isinstance(x, NodeReport)]
            assert [len(x.statuses) for x in reports] == [1, 0]
            assert reports[0].statuses[0].state == state_pb2.RUNNER_STATE_SETUP
            assert not link.task.done()

    session_test(test)


def test_notices_become_news_where_they_say_something() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            spot = agent_pb2.Notice(kind="spot", within_s=90.0, reason="r" * 2000)
            for seq, notice in enumerate((agent_pb2.Notice(), spot), start=2):
                link.up.put_nowait(agent_pb2.AgentMessage(seq=seq, report=agent_pb2.Report(notice=notice)))
            await asyncio.sleep(1)
            [told] = [one for one in rig.engine.offered if isinstance(one, NodeNotice)]
            assert (told.node_id, told.kind, told.within_s) == ("n1", "spot", 90.0)
            assert len(told.reason) == NOTICE_REASON_CHARS_MAX
            rig.engine.put(Node("n1", "name-n1", "p", drain=Drain("spot")))
            nothing = agent_pb2.Report(notice=agent_pb2.Notice())
            link.up.put_nowait(agent_pb2.AgentMessage(seq=4, report=nothing))
            await asyncio.sleep(1)
            assert [one.kind for one in rig.engine.offered if isinstance(one, NodeNotice)] == ["spot", ""]
            strange = agent_pb2.Report(notice=agent_pb2.Notice(kind="strike"))
            link.up.put_nowait(agent_pb2.AgentMessage(seq=5, report=strange))
            assert (await link.failure()).code is Code.INVALID

    session_test(test)


def test_an_order_to_reboot_goes_behind_the_set_and_a_refusal_comes_back() -> None:
    async def test(rig: Rig) -> None:
        link = Link(rig)
        link.hello()
        await link.next("welcome")
        rig.engine.emit(RebootDue("n1", "boot-1"))
        rig.engine.emit(RebootDue("n2", "boot-1"))
        await link.next("complete")
        assert (await link.next("reboot")).reboot.boot_id == "boot-1"
        refusal = agent_pb2.RebootRefusal(boot_id="boot-1", error="no power", remedy="Go and look.")
        link.up.put_nowait(agent_pb2.AgentMessage(seq=2, reboot_refusal=refusal))
        await asyncio.sleep(1)
        [told] = [one for one in rig.engine.offered if isinstance(one, RebootRefused)]
        assert (told.node_id, told.boot_id, told.error, told.remedy) == ("n1", "boot-1", "no power", "Go and look.")
        link.up.put_nowait(END)
        await asyncio.gather(link.task, return_exceptions=True)

    session_test(test)


@pytest.mark.parametrize(
    ("within_s", "taken_s"), [(0.0, 0.0), (-3.0, -3.0), (1e30, -1.0), (float("nan"), -1.0), (float("inf"), -1.0)]
)
def test_a_notice_with_a_date_that_is_none_has_none(within_s: float, taken_s: float) -> None:
    notice = agent_pb2.Notice(kind="spot", within_s=within_s)
    assert notice_of(notice, node_id="n1", session_id="s", arrived_s=0.0).within_s == taken_s


def test_a_gap_ends_the_session() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            link.report(2)
            link.report(4)
            error = await link.failure()
            assert error.code is Code.CONFLICT
            assert "message 3" in error.what
            assert error.retryable
        assert isinstance(rig.engine.offered[-1], NodeDisconnected)
        assert not rig.sessions.connected("n1")

    session_test(test)


@pytest.mark.parametrize(("low", "high", "upgrade"), [(2, 4, "Upgrade this process"), (0, 0, "Upgrade node n1")])
def test_versions_that_do_not_meet_are_refused(low: int, high: int, upgrade: str) -> None:
    async def test(rig: Rig) -> None:
        link = Link(rig)
        link.hello(low=low, high=high)
        error = await link.failure()
        assert error.code is Code.VERSION_MISMATCH
        assert upgrade in error.remedy
        assert rig.engine.submitted == []

    session_test(test)


def test_a_hello_for_another_node_is_refused() -> None:
    async def test(rig: Rig) -> None:
        link = Link(rig)
        link.hello("n2")
        error = await link.failure()
        assert (error.code, error.field) == (Code.PERMISSION_DENIED, "node_id")
        assert rig.engine.submitted == []
        assert rig.engine.offered == []

    session_test(test)


def test_no_hello_in_time_ends_the_stream() -> None:
    async def test(rig: Rig) -> None:
        assert (await Link(rig).failure()).code is Code.TIMEOUT
        link = Link(rig)
        link.report(1)
        assert (await link.failure()).code is Code.INVALID

    session_test(test)


def test_the_newest_session_takes_the_place_of_the_older() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as old, opened(rig) as new:
            error = await old.failure()
            assert "newer session" in error.what
            assert "clone" in error.remedy
            rig.engine.run("t/a-1")
            assert [x.runner_id for x in (await new.next("delta")).delta.put] == ["t/a-1"]
            assert rig.engine.offered == [NodeDisconnected("n1", "s-1")]
            assert rig.sessions.connected("n1")

    session_test(test)


def test_a_full_queue_ends_the_session() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            link.gate.clear()
            pushed = [
                rig.sessions.push("n1", agent_pb2.SchedulerMessage()) for _ in range(STREAM_QUEUE_MESSAGES_MAX + 1)
            ]
            assert pushed[-1] is False
            assert all(pushed[:-1])
            assert "too slowly" in (await link.failure()).what

    session_test(test)


def test_a_send_that_hangs_ends_the_session() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            link.gate.clear()
            rig.engine.run("t/a-1")
            assert "too slowly" in (await link.failure()).what

    session_test(test)


def test_clock_skew_is_an_alarm_and_nothing_else() -> None:
    async def test(rig: Rig) -> None:
        link = Link(rig)
        link.hello(wall_s=rig.clock.wall_s() - 45)
        await link.next("welcome")
        await link.next("complete")
        assert [(x.kind, x.subject) for x in rig.alarms.all()] == [("CLOCK_SKEW", "n1")]
        assert [x.kind for x in rig.notes] == ["CLOCK_SKEW"]
        again = Link(rig)
        again.hello(wall_s=rig.clock.wall_s() + 29)
        await again.next("welcome")
        assert rig.alarms.all() == ()
        again.up.put_nowait(END)
        await asyncio.gather(link.task, again.task, return_exceptions=True)

    session_test(test)


def test_a_revoked_node_is_cut() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            rig.engine.put(replace(rig.engine.view.nodes["n1"], revoked=True))
            rig.engine.emit(NodeChanged("n1"))
            assert (await link.failure()).code is Code.UNAUTHENTICATED

    session_test(test)


def test_a_runner_without_its_manifest_is_held_back_and_sent_once_it_is_there() -> None:
    async def test(rig: Rig) -> None:
        rig.engine.put(Model("t/m", "model", "file:///m", ModelState.ATTESTED, "d" * 64, 10, 1, artifact_id="a" * 64))
        rig.engine.deploy("t/b", Spec("host", model="t/m"))
        rig.engine.run("t/b-1", app="t/b")
        rig.engine.run("t/a-1")
        link = Link(rig)
        assert [x.runner_id for x in (await link.open()).assignments] == ["t/a-1"]
        assert [(x.kind, x.subject) for x in rig.alarms.all()] == [("MANIFEST", "t/b-1")]
        rig.blobs.manifests["a" * 64] = state_pb2.ModelManifest(files=[state_pb2.ModelFile(path="x", bytes=10)])
        (put,) = (await link.next("delta")).delta.put
        assert put.artifacts[0].manifest.files[0].path == "x"
        assert rig.alarms.all() == ()
        assert [x.kind for x in rig.notes] == ["RUNNER_HELD_BACK"]
        link.up.put_nowait(END)
        await link.task

    session_test(test)


def test_a_deposed_leader_ends_every_session() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            rig.sessions.close(FalError(Code.NOT_LEADER, "another scheduler leads", remedy="Dial it."))
            assert (await link.failure()).code is Code.NOT_LEADER

    session_test(test)


def chunk(id_: int, text: str, *, end: bool = False) -> agent_pb2.AgentMessage:
    lines = [agent_pb2.LogLine(text=text)]
    return agent_pb2.AgentMessage(log_chunk=agent_pb2.LogChunk(id=id_, lines=lines, end=end))


def test_logs_travel_over_the_nodes_session() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            logs = rig.sessions.logs.follow("n1", "t/a-1", tail_lines=5, follow=True)
            asking = asyncio.ensure_future(anext(logs))
            request = (await link.next("log_request")).log_request
            assert (request.runner_id, request.tail_lines, request.follow) == ("t/a-1", 5, True)
            for seq, text in ((2, "one"), (3, "two")):
                message = chunk(request.id, text)
                message.seq = seq
                link.up.put_nowait(message)
            assert (await asking).lines[0].text == "one"
            assert (await anext(logs)).lines[0].text == "two"
            await logs.aclose()  # type: ignore[attr-defined]
            cancel = (await link.next("log_request")).log_request
            assert (cancel.id, cancel.cancel) == (request.id, True)

    session_test(test)


def test_revoked_callers_are_told_with_the_session_and_at_once() -> None:
    async def test(rig: Rig) -> None:
        rig.engine.put(Revocation("n-9", "node/n-9", 3.0))  # no caller of proxies
        async with opened(rig) as link:
            rig.engine.put(Revocation("serving.gw", "serving/gw", 5.0))
            rig.engine.emit(Revoked("serving/gw"))
            told = (await link.next("revocations")).revocations.revoked
            assert [(x.serial, x.subject, x.revoked_at_s) for x in told] == [("serving.gw", "serving/gw", 5.0)]
        rig.engine.put(Revocation("admin.eve", "admin/eve", 9.0))
        async with opened(rig) as link:
            told = (await link.next("revocations")).revocations.revoked
            assert [x.subject for x in told] == ["admin/eve", "serving/gw"]

    session_test(test)


def test_logs_of_a_silent_node_are_unavailable() -> None:
    async def test(rig: Rig) -> None:
        async def ask() -> FalError:
            with pytest.raises(FalError) as caught:
                await anext(rig.sessions.logs.follow("n1", "t/a-1", tail_lines=5, follow=False))
            return caught.value

        assert (await ask()).code is Code.UNAVAILABLE  # no session
        async with opened(rig):
            assert (await ask()).code is Code.UNAVAILABLE  # a session that does not answer

    session_test(test)


def test_logs_end_with_the_session_and_for_a_slow_reader() -> None:
    async def test(rig: Rig) -> None:
        async with opened(rig) as link:
            logs = rig.sessions.logs.follow("n1", "t/a-1", tail_lines=5, follow=True)
            asking = asyncio.ensure_future(anext(logs))
            id_ = (await link.next("log_request")).log_request.id
            for n in range(200):
                rig.sessions.logs.take("n1", chunk(id_, f"{n}").log_chunk)
            rig.sessions.logs.take("n2", chunk(id_, "of another node").log_chunk)
            got = [await asking] + [x async for x in logs]
            assert len(got) < 100
            assert got[-1].end
            assert "too slow" in got[-1].error
            logs = rig.sessions.logs.follow("n1", "t/a-1", tail_lines=5, follow=True)
            asking = asyncio.ensure_future(anext(logs))
            await link.next("log_request")
            link.up.put_nowait(END)
            assert "broke" in (await asking).error

    session_test(test)
