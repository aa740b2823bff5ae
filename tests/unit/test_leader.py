"""The life of a leader: what happens to everybody's streams when leadership is lost, and that it is won again."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api import apps, status
from fal_scheduler.leadership import Leadership
from fal_scheduler.store.faults import Fault, FaultKind, FaultStore
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from scheduler_rig import ACTOR, Agent, app_request, campaigning, deployed, eventually, join, ready


async def follow_events(leader: Leadership) -> FalError:
    """What ended the stream."""
    with pytest.raises(FalError) as caught:
        async for _ in status.events(leader, cluster_pb2.EventsRequest(follow=True)):
            pass
    return caught.value


@pytest.mark.parametrize("kind", [FaultKind.LOSE_ANSWER, FaultKind.LOSE_REQUEST])
def test_an_unknown_outcome_ends_the_term_and_the_next_one_knows(tmp_path: Path, kind: FaultKind) -> None:
    async def body() -> None:
        store = FaultStore(MemoryStore(MemoryBackend()))
        async with campaigning(tmp_path, store) as current:
            first = current.get()
            await join(first, "n1")
            agent = Agent(first, "n1")
            async with agent:
                await deployed(first, runners=2)
                following = asyncio.create_task(follow_events(first))
                store.add(Fault(kind))
                with pytest.raises(FalError) as caught:
                    await apps.apply_app(first, app_request("b"), ACTOR)
                assert caught.value.retryable
                assert (await asyncio.wait_for(following, 20)).code is Code.NOT_LEADER
                assert agent.task is not None
                with pytest.raises(FalError) as caught:
                    await asyncio.wait_for(agent.task, 20)
                assert caught.value.code is Code.NOT_LEADER
            await eventually(lambda: current.leads and current.get() is not first, timeout_s=40)
            second = current.get()
            assert second.view.term == first.view.term + 1
            assert ("t/b" in second.view.apps) == (kind is FaultKind.LOSE_ANSWER)
            again = Agent(second, "n1")
            again.statuses = dict(agent.statuses)
            async with again:
                await eventually(lambda: ready(second) == 2)
                assert set(agent.statuses) <= set(second.view.runners)  # none lost, none doubled
                await apps.apply_app(second, app_request("b"), ACTOR)
                await eventually(lambda: ready(second, "b") == 1)

    asyncio.run(body())


def test_a_failed_commit_is_an_error_and_nothing_more(tmp_path: Path) -> None:
    async def body() -> None:
        store = FaultStore(MemoryStore(MemoryBackend()))
        async with campaigning(tmp_path, store) as current:
            leader = current.get()
            store.add(Fault(FaultKind.FAIL))
            with pytest.raises(FalError) as caught:
                await apps.apply_app(leader, app_request(), ACTOR)
            assert caught.value.code is Code.STORE_FAILED
            assert not leader.view.apps
            reply = await apps.apply_app(leader, app_request(), ACTOR)
            assert reply.outcome == "created"
            assert current.get() is leader

    asyncio.run(body())


def test_a_store_that_cannot_be_read_ends_the_process(tmp_path: Path) -> None:
    async def body() -> None:
        backend = MemoryBackend()
        backend.records["team/t/app/a"] = b"\xff\xff"
        with pytest.raises(FalError) as caught:
            async with campaigning(tmp_path, MemoryStore(backend)):
                pass
        assert caught.value.code is Code.CORRUPT
        assert "team/t/app/a" in caught.value.what
        assert backend.records == {"team/t/app/a": b"\xff\xff"}

    asyncio.run(body())


def test_random_faults_lose_no_app_that_was_acknowledged(tmp_path: Path, base_seed: int) -> None:
    """Operators go on through changes of leader; what was answered is there, what failed is whole or absent."""

    async def body() -> None:
        rng = random.Random(base_seed)
        store = FaultStore(MemoryStore(MemoryBackend()))
        acknowledged: set[str] = set()
        async with campaigning(tmp_path, store) as current:
            for number in range(20):
                await eventually(lambda: current.leads, timeout_s=40)
                if rng.randrange(5) == 0:
                    store.add(Fault(rng.choice([FaultKind.FAIL, FaultKind.LOSE_ANSWER, FaultKind.LOSE_REQUEST])))
                try:
                    await apps.apply_app(current.get(), app_request(f"a{number}", runners=0), ACTOR)
                    acknowledged.add(f"t/a{number}")
                except FalError as error:
                    assert error.code in (Code.STORE_FAILED, Code.STORE_UNKNOWN, Code.NOT_LEADER)  # noqa: PT017
            await eventually(lambda: current.leads, timeout_s=40)
            listed = apps.list_apps(current.get(), cluster_pb2.ListAppsRequest(team="t")).apps
            ids = [view.app.id for view in listed]
            assert ids == sorted(ids)
            assert acknowledged <= set(ids)
            assert all(view.revision.number == 1 for view in listed)

    asyncio.run(body())
