"""Sessions over a real engine: resync after a gap, clones, terms, a store that forgot."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.identity import Role
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2
from fal_scheduler.api import apps, callers, nodes, status
from fal_scheduler.core.events import Confirm
from fal_scheduler.core.told import Hold
from fal_scheduler.leadership import Leadership
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from scheduler_rig import ACTOR, Agent, Test, app_request, deployed, eventually, join, leading, ready


def engine_test(folder: Path, test: Test) -> None:
    async def body() -> None:
        async with leading(folder) as leader:
            await test(leader)

    asyncio.run(body())


def alarms(leader: Leadership) -> set[str]:
    return {x.kind for x in status.get_status(leader, cluster_pb2.GetStatusRequest()).alarms}


async def ended(agent: Agent) -> FalError:
    assert agent.task is not None
    with pytest.raises(FalError) as caught:
        await asyncio.wait_for(agent.task, 20)
    return caught.value


def test_a_gap_ends_the_session_and_a_new_hello_mends_everything(tmp_path: Path) -> None:
    async def test(leader: Leadership) -> None:
        await join(leader, "n1")
        async with Agent(leader, "n1") as agent:
            await deployed(leader, runners=2)
            lost = next(iter(agent.statuses))
            agent._seq += 1  # a report is lost on the way
            agent.report()
            assert (await ended(agent)).code is Code.CONFLICT
            assert not leader.sessions.connected("n1")
            del agent.statuses[lost]  # and meanwhile a container went away
            agent.dial()
            await eventually(lambda: leader.sessions.connected("n1") and ready(leader) == 2)
            assert set(agent.held) == set(leader.view.runners)

    engine_test(tmp_path, test)


def test_a_reboot_is_no_clone_and_a_clone_quarantines_both(tmp_path: Path) -> None:
    async def test(leader: Leadership) -> None:
        await join(leader, "n1")
        await join(leader, "n2")
        async with Agent(leader, "n1") as first, Agent(leader, "n1", boot_id="b2") as second:
            assert "newer session" in (await ended(first)).what
            assert leader.view.live["n1"].hold is Hold.NONE  # as after a reboot
            assert "CLONE" not in alarms(leader)
            first.dial()
            assert "newer session" in (await ended(second)).what
            await eventually(lambda: leader.view.live["n1"].hold is Hold.CLONE)
            assert "CLONE" in alarms(leader)
            await apps.apply_app(leader, app_request(), ACTOR)
            (view,) = nodes.list_nodes(leader, cluster_pb2.ListNodesRequest(node="n1")).nodes
            assert "two machines" in view.reason
            async with Agent(leader, "n2") as other:
                await eventually(lambda: ready(leader) == 1)
                assert len(other.held) == 1
            assert not first.held
            assert not second.held

    engine_test(tmp_path, test)


def test_a_node_that_saw_a_higher_term_raises_ours_before_it_is_welcomed(tmp_path: Path) -> None:
    async def test(leader: Leadership) -> None:
        await join(leader, "n1")
        agent = Agent(leader, "n1")
        agent.term_seen = 41
        async with agent:
            assert agent.welcome is not None
            assert agent.welcome.term == leader.view.term == 42
            await deployed(leader)
            assert {x.term for x in agent.held.values()} == {42}

    engine_test(tmp_path, test)


def test_an_empty_store_stops_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            await join(leader, "n1")
            async with Agent(leader, "n1") as agent:
                await deployed(leader, runners=3)
                running = dict(agent.statuses)
                assert agent.welcome is not None
                incarnation = agent.welcome.incarnation
        async with leading(tmp_path, MemoryStore(MemoryBackend())) as leader:  # the same CA, another store
            again = Agent(leader, "n1")
            again.statuses, again.incarnation = dict(running), incarnation
            again.dial()
            await eventually(lambda: len(leader.view.orphans) == 3)
            assert "STORE_NEW" in alarms(leader)
            await asyncio.sleep(0.1)
            assert again.held == {}
            assert {x.state for x in again.statuses.values()} == {state_pb2.RUNNER_STATE_IDLE}
            again.hang_up()
            assert again.task is not None
            await again.task

    asyncio.run(body())


@pytest.mark.parametrize("what", ["node", "store"])
def test_a_confirm_ends_the_sessions_it_concerns_and_they_are_welcomed_to_the_new_life(
    what: str, tmp_path: Path
) -> None:
    """A node judges by its Welcome: one that was welcomed before the confirm would go on distrusting us."""

    async def test(leader: Leadership) -> None:
        await join(leader, "n1")
        await join(leader, "n2")
        status = agent_pb2.RunnerStatus(
            runner_id="t/a-1", assignment_id="a1", app="t/a", revision=1, state=state_pb2.RUNNER_STATE_IDLE
        )
        agent = Agent(leader, "n1")
        agent.statuses["t/a-1"] = status
        if what == "node":
            agent.cluster_id = "c-elsewhere000"
        else:
            agent.epoch_seen = 7
        async with Agent(leader, "n2") as other:
            agent.dial()
            held = Hold.FOREIGN if what == "node" else Hold.STORE
            await eventually(lambda: leader.sessions.connected("n1") and leader.view.live["n1"].hold is held)
            await eventually(lambda: agent.welcome is not None)
            await leader.engine.submit(Confirm(what, "", ACTOR))
            end = await ended(agent)
            assert (end.code, end.retryable) == (Code.UNAVAILABLE, True)
            assert "confirm" in end.what
            agent.welcome = None
            agent.dial()
            await eventually(lambda: agent.welcome is not None and leader.view.live["n1"].hold is Hold.NONE)
            assert agent.welcome is not None
            if what == "node":
                assert list(agent.welcome.accepted_clusters) == ["c-elsewhere000"]
            else:
                assert agent.welcome.epoch == 8
            assert other.task is not None
            assert not other.task.done(), "a node that nobody doubted keeps its session"
            agent.hang_up()
            assert agent.task is not None
            await agent.task

    engine_test(tmp_path, test)


def test_a_revoked_gateway_is_refused_here_and_told_to_the_nodes(tmp_path: Path) -> None:
    async def test(leader: Leadership) -> None:
        now_s = leader.clock.wall_s()
        gateway = leader.ca.new_identity(role=Role.SERVING, name="gw-1", now_s=now_s - 10.0).peer
        await join(leader, "n1")
        async with Agent(leader, "n1") as agent:
            assert not leader.revocations.is_revoked(gateway)
            request = cluster_pb2.RevokeRequest(subject="serving/gw-1", reason="stolen")
            reply = await callers.revoke(leader, request, "admin/ada")
            assert reply.revoked_at_s >= now_s
            assert leader.revocations.is_revoked(gateway)
            await eventually(lambda: agent.revoked == ["serving/gw-1"])
            later = leader.ca.new_identity(role=Role.SERVING, name="gw-1", now_s=leader.clock.wall_s() + 10.0).peer
            assert not leader.revocations.is_revoked(later)
            assert [x.actor for x in collect(leader) if x.kind == "CALLER_REVOKED"] == ["admin/ada"]
            with pytest.raises(FalError, match="yourself"):
                await callers.revoke(leader, cluster_pb2.RevokeRequest(subject="admin/ada"), "admin/ada")

    engine_test(tmp_path, test)


def test_what_a_node_tells_as_events_reaches_operators(tmp_path: Path) -> None:
    async def test(leader: Leadership) -> None:
        await join(leader, "n1")
        async with Agent(leader, "n1") as agent:
            agent.tell_event("JOURNAL_FULL", "journal", "no room left on the state disk")
            seen: list[cluster_pb2.Event] = []

            def told() -> bool:
                seen[:] = [x for x in collect(leader) if x.kind == "JOURNAL_FULL"]
                return bool(seen)

            await eventually(told)
            assert (seen[0].actor, seen[0].subject) == ("node/n1", "journal")

    engine_test(tmp_path, test)


def collect(leader: Leadership) -> list[cluster_pb2.Event]:
    return [status.event_to(x) for x in leader.engine.events.since(0)]  # type: ignore[attr-defined]
