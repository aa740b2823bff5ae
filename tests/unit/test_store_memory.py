"""The memory store's leases and the fault store's scripts, in virtual time: what simulation relies on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any

import pytest

from fal_contract.errors import Code, FalError
from fal_scheduler.store.faults import Fault, FaultKind, FaultStore, random_script
from fal_scheduler.store.interface import Guard, Write
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from virtual_time import run_virtually

TTL_S = 9.0


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def code_of(work: Coroutine[Any, Any, Any]) -> Code:
    with pytest.raises(FalError) as caught:
        await work
    return caught.value.code


def test_a_renewed_lease_lasts_and_a_crashed_leaders_runs_out() -> None:
    async def main() -> None:
        backend = MemoryBackend(lease_ttl_s=TTL_S)
        one, two = MemoryStore(backend), MemoryStore(backend)
        guard = await one.campaign("one")
        waiting = asyncio.create_task(two.campaign("two"))
        await asyncio.sleep(100 * TTL_S)
        assert not waiting.done()
        assert await one.commit(guard, [Write("a", b"1")]) == 1
        crashed_s = now_s()
        one.crash()
        taken = await waiting
        assert taken.term == guard.term + 1
        assert TTL_S / 2 < now_s() - crashed_s <= TTL_S
        assert await code_of(one.commit(guard, [Write("a", b"2")])) is Code.NOT_LEADER
        await two.close()

    run_virtually(main())


def test_a_leader_that_is_cut_off_is_lost_before_the_next_one_leads() -> None:
    async def main() -> None:
        backend = MemoryBackend(lease_ttl_s=TTL_S)
        one, two = MemoryStore(backend, timeout_s=3.0), MemoryStore(backend)
        guard = await one.campaign("one")
        one.cut = True
        assert await code_of(one.load()) is Code.UNAVAILABLE
        begun_s = now_s()
        assert await code_of(one.commit(guard, [Write("a", b"1")])) is Code.STORE_UNKNOWN
        assert now_s() - begun_s == 3.0
        waiting = asyncio.create_task(two.campaign("two"))
        await one.lost(guard)
        taken = await waiting
        one.cut = False
        assert await code_of(one.commit(guard, [Write("a", b"1")])) is Code.NOT_LEADER
        assert await two.commit(taken, [Write("b", b"1")]) == 1
        assert backend.records == {"b": b"1"}
        await two.close()

    run_virtually(main())


def test_leaders_follow_in_the_order_in_which_they_came() -> None:
    async def main() -> list[str]:
        backend = MemoryBackend(lease_ttl_s=TTL_S)
        order: list[str] = []

        async def lead(name: str) -> None:
            store = MemoryStore(backend)
            guard = await store.campaign(name)
            order.append(f"{name}:{guard.term}")
            await asyncio.sleep(1.0)
            await store.resign(guard)

        async with asyncio.TaskGroup() as tasks:
            for name in "abcde":
                tasks.create_task(lead(name))
        return order

    assert run_virtually(main()) == run_virtually(main()) == ["a:1", "b:2", "c:3", "d:4", "e:5"]


def test_a_copy_is_an_older_store() -> None:
    async def main() -> None:
        backend = MemoryBackend()
        store = MemoryStore(backend)
        guard = await store.campaign("one")
        await store.commit(guard, [Write("a", b"1")])
        copy = MemoryStore(backend.copy())
        await store.commit(guard, [Write("a", b"2")])
        await store.close()
        old = await copy.load()
        assert (old.revision, old.records) == (1, {"a": b"1"})
        assert (await copy.campaign("two", term_min=10)).term == 10
        await copy.close()

    run_virtually(main())


def test_a_stall_takes_its_time_and_hooks_crash_at_their_point() -> None:
    class Crash(Exception):
        pass

    async def main() -> None:
        backend = MemoryBackend(lease_ttl_s=TTL_S)
        crash_at = ""

        def hook(point: str) -> None:
            if point == crash_at:
                raise Crash(point)

        store = FaultStore(MemoryStore(backend), [Fault(FaultKind.STALL, 20.0)], hook=hook)
        guard = await store.campaign("one")
        begun_s = now_s()
        assert await store.commit(guard, [Write("a", b"1")]) == 1
        assert now_s() - begun_s == 20.0
        crash_at = "before commit"
        with pytest.raises(Crash):
            await store.commit(guard, [Write("a", b"2")])
        assert backend.revision == 1
        crash_at = "after commit"
        with pytest.raises(Crash):
            await store.commit(guard, [Write("a", b"3")])
        assert (backend.revision, backend.records) == (2, {"a": b"3"})
        await store.close()

    run_virtually(main())


def test_a_seed_draws_the_same_faults_and_every_kind() -> None:
    script = random_script(Random(7), commits=400, share=0.5)
    assert script == random_script(Random(7), commits=400, share=0.5)
    assert {fault.kind for fault in script} == set(FaultKind)
    assert 150 < sum(fault.kind is not FaultKind.NONE for fault in script) < 250


@pytest.mark.parametrize("seed", range(20))
def test_under_random_faults_the_store_holds_what_the_answers_allow(seed: int) -> None:
    """A done commit is there, a failed one is not, an unknown one is what the next load says."""

    async def main() -> None:
        inner = MemoryStore(MemoryBackend(lease_ttl_s=TTL_S), commit_s=0.01)
        store = FaultStore(inner, random_script(Random(seed), commits=60, share=0.4))
        guard: Guard = await store.campaign("one")
        expected, revision = b"", 0
        for n in range(60):
            value = b"%d" % n
            try:
                revision = await store.commit(guard, [Write("a", value)])
                expected = value
            except FalError as error:
                if error.code is Code.STORE_UNKNOWN:
                    loaded = await store.load()
                    assert loaded.records.get("a", b"") in (expected, value)
                    assert loaded.revision in (revision, revision + 1)
                    expected, revision = loaded.records.get("a", b""), loaded.revision
            loaded = await inner.load()
            assert (loaded.records.get("a", b""), loaded.revision) == (expected, revision)
        await store.close()

    run_virtually(main())
