"""The store contract, on all three stores. Real etcd, real files; leases of the fake are short."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from etcd_server import EtcdServer, why_no_etcd
from fal_contract.errors import Code, FalError
from fal_contract.limits import COMMIT_BYTES_MAX, COMMIT_OPERATIONS_MAX, STORE_KEY_BYTES_MAX
from fal_scheduler.store.etcd import EtcdStore
from fal_scheduler.store.faults import Fault, FaultKind, FaultStore
from fal_scheduler.store.interface import Guard, Store, Write
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from fal_scheduler.store.sqlite import SqliteStore

WAIT_S = 20.0


@dataclass(frozen=True)
class World:
    """`new()` makes a handle on the same records, as another scheduler would."""

    new: Callable[[], Store]


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory, kept_folders: set[Path]) -> Iterator[EtcdServer]:
    if why := why_no_etcd():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("etcd")
    kept_folders.add(folder)
    with EtcdServer(folder) as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", pytest.param("etcd", marks=pytest.mark.etcd)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    if request.param == "memory":
        backend = MemoryBackend(lease_ttl_s=2.0)
        return World(lambda: MemoryStore(backend, commit_s=0.001))
    if request.param == "sqlite":
        return World(lambda: SqliteStore(tmp_path / "state" / "store.db", standby=True))
    server: EtcdServer = request.getfixturevalue("etcd")
    prefix = f"/test{tmp_path}"
    return World(lambda: EtcdStore([server.endpoint], prefix=prefix, lease_ttl_s=2.0, timeout_s=10.0))


def play(world: World, scenario: Callable[..., Awaitable[Any]], handles: int = 1) -> None:
    """Run `scenario(store, …)` with so many opened handles and close them."""

    async def main() -> None:
        stores = [world.new() for _ in range(handles)]
        try:
            async with asyncio.timeout(60.0):
                for store in stores:
                    await store.open()
                await scenario(*stores)
        finally:
            for store in stores:
                await store.close()

    asyncio.run(main())


async def refusal(work: Awaitable[Any]) -> FalError:
    with pytest.raises(FalError) as caught:
        await work
    return caught.value


def test_a_new_store_is_empty_and_its_first_term_is_1(world: World) -> None:
    async def scenario(store: Store) -> None:
        loaded = await store.load()
        assert (loaded.revision, loaded.records) == (0, {})
        guard = await store.campaign("one")
        assert (guard.term, guard.holder) == (1, "one")

    play(world, scenario)


def test_a_commit_sets_overwrites_and_deletes_and_raises_the_revision_by_one(world: World) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.campaign("one")
        assert await store.commit(guard, [Write("a", b"1"), Write("b/ü", b"\x00\xff"), Write("c", b"")]) == 1
        assert await store.commit(guard, [Write("a", b"2"), Write("b/ü", None), Write("never/there", None)]) == 2
        loaded = await store.load()
        assert (loaded.revision, loaded.records) == (2, {"a": b"2", "c": b""})
        assert store.statistics()["commits"] == 2.0
        assert store.statistics()["operations"] == 6.0

    play(world, scenario)


def test_records_term_and_revision_survive_reopening(world: World) -> None:
    async def first(store: Store) -> None:
        guard = await store.campaign("one")
        await store.commit(guard, [Write("a", b"1")])

    async def second(store: Store) -> None:
        assert (await store.load()).records == {"a": b"1"}
        guard = await store.campaign("two")
        assert guard.term == 2
        assert await store.commit(guard, [Write("b", b"2")]) == 2
        assert (await store.load()).records == {"a": b"1", "b": b"2"}

    play(world, first)
    play(world, second)


def test_the_term_honours_what_agents_told(world: World) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.campaign("one", term_min=40)
        assert guard.term == 40
        await store.resign(guard)
        guard = await store.campaign("one", term_min=7)
        assert guard.term == 41

    play(world, scenario)


def test_a_raised_term_is_durable_and_voids_the_old_guard(world: World) -> None:
    async def first(store: Store) -> None:
        old = await store.campaign("one")
        new = await store.raise_term(old, 90)
        assert (new.term, new.holder) == (90, "one")
        assert await store.raise_term(new, 12) == new
        assert (await refusal(store.commit(old, [Write("a", b"old")]))).code is Code.NOT_LEADER
        assert (await refusal(store.raise_term(old, 95))).code is Code.NOT_LEADER
        assert (await store.load()).records == {}

    async def second(store: Store) -> None:
        assert (await store.campaign("one")).term == 91

    play(world, first)
    play(world, second)


def test_a_raised_term_commits(world: World) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.raise_term(await store.campaign("one"), 90)
        assert await store.commit(guard, [Write("a", b"1")]) == 1

    play(world, scenario)


def test_one_leads_the_next_waits_and_the_deposed_can_do_nothing(world: World) -> None:
    async def scenario(one: Store, two: Store) -> None:
        old = await one.campaign("one")
        await one.commit(old, [Write("a", b"1")])
        waiting = asyncio.create_task(two.campaign("two"))
        lost = asyncio.create_task(one.lost(old))
        done, _ = await asyncio.wait({waiting, lost}, timeout=0.5)
        assert not done
        await one.resign(old)
        new = await asyncio.wait_for(waiting, WAIT_S)
        await asyncio.wait_for(lost, WAIT_S)
        assert new.term == old.term + 1
        assert (await refusal(one.commit(old, [Write("a", b"old")]))).code is Code.NOT_LEADER
        assert (await refusal(one.raise_term(old, 50))).code is Code.NOT_LEADER
        await one.resign(old)  # of no effect on the new leader
        assert await two.commit(new, [Write("b", b"2")]) == 2
        assert (await one.load()).records == {"a": b"1", "b": b"2"}

    play(world, scenario, handles=2)


def test_a_forged_or_foreign_guard_is_refused(world: World) -> None:
    async def scenario(one: Store, two: Store) -> None:
        guard = await one.campaign("one")
        for forged in (Guard(guard.term, "one", b"77777"), Guard(guard.term + 1, "one", guard.token)):
            assert (await refusal(one.commit(forged, [Write("a", b"x")]))).code is Code.NOT_LEADER
        await refusal(two.commit(Guard(guard.term, "two", b"77777"), [Write("a", b"x")]))
        assert await one.commit(guard, [Write("a", b"1")]) == 1
        assert (await two.load()).records == {"a": b"1"}

    play(world, scenario, handles=2)


def test_a_store_that_leads_does_not_campaign_again(world: World) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.campaign("one")
        assert (await refusal(store.campaign("one"))).code is Code.FAILED_PRECONDITION
        assert await store.commit(guard, [Write("a", b"1")]) == 1

    play(world, scenario)


def test_a_cancelled_campaign_leaves_the_leadership_free(world: World) -> None:
    async def scenario(one: Store, two: Store) -> None:
        guard = await one.campaign("one")
        waiting = asyncio.create_task(two.campaign("two"))
        await asyncio.wait({waiting}, timeout=0.3)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await one.resign(guard)
        assert (await asyncio.wait_for(one.campaign("one"), WAIT_S)).term == guard.term + 1

    play(world, scenario, handles=2)


def test_closing_ends_the_leadership(world: World) -> None:
    async def scenario(one: Store, two: Store) -> None:
        guard = await one.campaign("one")
        lost = asyncio.create_task(one.lost(guard))
        await asyncio.sleep(0)
        await one.close()
        await asyncio.wait_for(lost, WAIT_S)
        assert (await asyncio.wait_for(two.campaign("two"), WAIT_S)).term == guard.term + 1

    play(world, scenario, handles=2)


@pytest.mark.parametrize(
    "writes",
    [
        [],
        [Write(f"k{n}", b"") for n in range(COMMIT_OPERATIONS_MAX + 1)],
        [Write("a", b"1"), Write("a", None)],
        [Write("", b"1")],
        [Write("a\nb", b"1")],
        [Write("k" * (STORE_KEY_BYTES_MAX + 1), b"1")],
        [Write("big", bytes(COMMIT_BYTES_MAX))],
    ],
    ids=["none", "101 operations", "twice", "empty key", "newline", "long key", "over 1 MiB"],
)
def test_a_commit_beyond_the_bounds_is_refused_before_anything(world: World, writes: list[Write]) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.campaign("one")
        error = await refusal(store.commit(guard, [Write("good", b"1"), *writes] if writes else writes))
        assert error.code is Code.INVALID
        assert error.field.startswith("writes")
        loaded = await store.load()
        assert (loaded.revision, loaded.records) == (0, {})

    play(world, scenario)


def test_the_largest_commits_pass(world: World) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.campaign("one")
        big = bytes(range(256)) * 4096
        whole = [Write("big", big[: COMMIT_BYTES_MAX - 3])]
        spread = [Write(f"k{n:03}", big[n : n + 10_000]) for n in range(COMMIT_OPERATIONS_MAX)]
        assert await store.commit(guard, whole) == 1
        assert await store.commit(guard, spread) == 2
        assert await store.commit(guard, [Write(write.key, None) for write in spread]) == 3
        assert (await store.load()).records == {"big": whole[0].value}

    play(world, scenario)


def test_five_thousand_records_load_as_one_snapshot(world: World) -> None:
    async def scenario(store: Store, reader: Store) -> None:
        guard = await store.campaign("one")
        expected = {f"team/t/runner/{n:05}": b"%d" % n * 50 for n in range(5000)}
        writes = [Write(key, value) for key, value in expected.items()]
        for at in range(0, len(writes), COMMIT_OPERATIONS_MAX):
            await store.commit(guard, writes[at : at + COMMIT_OPERATIONS_MAX])
        loaded = await reader.load()
        assert (loaded.revision, loaded.records) == (50, expected)

    play(world, scenario, handles=2)


def test_a_load_beside_commits_sees_whole_commits_only(world: World) -> None:
    async def scenario(store: Store, reader: Store) -> None:
        guard = await store.campaign("one")

        async def write() -> None:
            for n in range(1, 41):
                await store.commit(guard, [Write(f"k{i:02}", b"%d" % n) for i in range(60)])

        writing = asyncio.create_task(write())
        loads = 0
        while not writing.done():
            loaded = await reader.load()
            assert set(loaded.records.values()) <= {b"%d" % loaded.revision}
            loads += 1
            await asyncio.sleep(0)
        await writing
        assert loads >= 2
        assert (await reader.load()).revision == 40

    play(world, scenario, handles=2)


def test_concurrent_commits_are_safe(world: World) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.campaign("one")
        revisions = await asyncio.gather(*(store.commit(guard, [Write(f"k{n}", b"x")]) for n in range(50)))
        assert sorted(revisions) == list(range(1, 51))
        loaded = await store.load()
        assert (loaded.revision, len(loaded.records)) == (50, 50)

    play(world, scenario)


def test_a_cancelled_commit_leaves_the_store_whole(world: World) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.campaign("one")
        task = asyncio.create_task(store.commit(guard, [Write("a", b"1"), Write("b", b"1")]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        loaded = await store.load()
        assert (loaded.revision, loaded.records) in ((0, {}), (1, {"a": b"1", "b": b"1"}))
        await store.resign(guard)
        await store.load()
        guard = await store.campaign("one")
        assert await store.commit(guard, [Write("c", b"1")]) == loaded.revision + 1

    play(world, scenario)


def test_a_lost_answer_may_have_happened_and_asks_for_a_load(world: World) -> None:
    async def scenario(inner: Store) -> None:
        store = FaultStore(inner, [Fault(FaultKind.LOSE_ANSWER), Fault(FaultKind.LOSE_REQUEST), Fault(FaultKind.FAIL)])
        guard = await store.campaign("one")
        assert (await refusal(store.commit(guard, [Write("a", b"1")]))).code is Code.STORE_UNKNOWN
        assert (await refusal(store.commit(guard, [Write("b", b"1")]))).code is Code.STORE_FAILED
        assert (await store.load()).records == {"a": b"1"}
        assert (await refusal(store.commit(guard, [Write("b", b"1")]))).code is Code.STORE_UNKNOWN
        assert (await store.load()).records == {"a": b"1"}
        assert (await refusal(store.commit(guard, [Write("b", b"1")]))).code is Code.STORE_FAILED
        assert await store.commit(guard, [Write("b", b"1")]) == 2
        assert store.statistics()["faults"] == 3.0

    play(world, scenario)


def test_statistics_count_refusals(world: World) -> None:
    async def scenario(store: Store) -> None:
        guard = await store.campaign("one")
        await store.commit(guard, [Write("a", b"12")])
        await refusal(store.commit(Guard(9, "x", b"77777"), [Write("a", b"1")]))
        counted = store.statistics()
        assert (counted["commits"], counted["bytes"], counted["failed"]) == (1.0, 3.0, 1.0)
        assert 0.0 <= counted["commit_s_max"] <= counted["commit_s_sum"] < WAIT_S

    play(world, scenario)
