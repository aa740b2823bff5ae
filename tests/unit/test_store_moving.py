"""Filling stores: what is refused before anything changes, and what a cut leaves behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fal_contract import snapshot_file
from fal_contract.errors import Code, FalError
from fal_contract.snapshot_file import RECORD, SnapshotWriter, chunks, entry
from fal_scheduler.codec import decode, encode
from fal_scheduler.core.records import META_KEY, Meta, Pool, key_of
from fal_scheduler.moving import migrate, restore
from fal_scheduler.offline import target_store
from fal_scheduler.options import Options
from fal_scheduler.recovery import recover
from fal_scheduler.store.faults import Fault, FaultKind, FaultStore
from fal_scheduler.store.interface import Store, Write
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from fal_scheduler.store_mark import MARK_KEY
from sim.schedulers import authority

CLUSTER = "c-010101010101"


def records(pools: int = 250, *, cluster_id: str = CLUSTER, epoch: int = 3) -> dict[str, bytes]:
    kept = {META_KEY: encode(Meta(cluster_id, epoch, "first", 1.0))}
    for number in range(pools):
        pool = Pool(f"p{number}")
        kept[key_of(pool)] = encode(pool)
    return kept


def saved(path: Path, kept: dict[str, bytes], **changes: object) -> Path:
    """A snapshot of these records."""
    head = {"cluster_id": CLUSTER, "epoch": 3, "term": 7, "revision": 9, "records": len(kept), **changes}
    with SnapshotWriter(path) as writer:
        for body in chunks(entry(RECORD, key, kept[key]) for key in sorted(kept)):
            writer.write(body)
        writer.finish(head, sha256=writer.sha256)
    return path


def backend_of(kept: dict[str, bytes]) -> MemoryBackend:
    backend = MemoryBackend()
    backend.records, backend.revision, backend.term = dict(kept), 9, 7
    return backend


def meta_of(backend: MemoryBackend) -> Meta:
    meta = decode(META_KEY, backend.records[META_KEY])
    assert isinstance(meta, Meta)
    return meta


def fill(tmp_path: Path, store: Store, file: Path, *, force: bool = False) -> None:
    async def body() -> None:
        await restore(store, file, ca=authority(CLUSTER), blobs=tmp_path / "blobs", force=force)

    asyncio.run(body())


def refused(code: Code, work: Callable[[], object], match: str) -> None:
    with pytest.raises(FalError, match=match) as caught:
        work()
    assert caught.value.code is code


def test_a_restore_raises_the_epoch_and_gives_another_incarnation(tmp_path: Path) -> None:
    kept, backend = records(), MemoryBackend()
    fill(tmp_path, MemoryStore(backend), saved(tmp_path / "f", kept))
    meta = meta_of(backend)
    assert (meta.cluster_id, meta.epoch) == (CLUSTER, 4)
    assert meta.incarnation != "first"
    assert {key: value for key, value in backend.records.items() if key != META_KEY} == {
        key: value for key, value in kept.items() if key != META_KEY
    }
    assert backend.term > 7
    recover(backend.records, term=backend.term, revision=backend.revision, now_s=0.0)


def test_the_same_snapshot_restored_twice_is_another_life_each_time(tmp_path: Path) -> None:
    backend, file = MemoryBackend(), saved(tmp_path / "f", records())
    fill(tmp_path, MemoryStore(backend), file)
    first = meta_of(backend)
    fill(tmp_path, MemoryStore(backend), file, force=True)
    second = meta_of(backend)
    assert second.epoch == first.epoch + 1
    assert second.incarnation != first.incarnation


def test_what_is_wrong_with_a_file_is_said_before_anything_changes(tmp_path: Path) -> None:
    file = saved(tmp_path / "f", records())
    whole = file.read_bytes()
    backend = MemoryBackend()

    def attempt(raw: bytes) -> Callable[[], object]:
        file.write_bytes(raw)
        return lambda: fill(tmp_path, MemoryStore(backend), file)

    refused(Code.CORRUPT, attempt(whole[:-1]), "it is cut: 1 bytes")
    refused(Code.CORRUPT, attempt(whole[:100]), "does not begin")
    refused(Code.CORRUPT, attempt(whole + b"x"), "added")
    refused(Code.CORRUPT, attempt(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]), "digest")
    refused(Code.CORRUPT, attempt(b"something else" * 1000), "does not begin")
    refused(Code.VERSION_MISMATCH, attempt(whole.replace(b"snapshot 1", b"snapshot 2", 1)), "format 2")
    file.unlink()
    refused(Code.NOT_FOUND, lambda: fill(tmp_path, MemoryStore(backend), file), "cannot be read")
    other = saved(tmp_path / "other", records(cluster_id="c-020202020202"), cluster_id="c-020202020202")
    refused(Code.FAILED_PRECONDITION, lambda: fill(tmp_path, MemoryStore(backend), other), "c-020202020202")
    assert not backend.records
    assert backend.revision == 0


def test_a_store_with_records_is_replaced_only_by_force(tmp_path: Path) -> None:
    backend, file = backend_of(records(3)), saved(tmp_path / "f", records(2))
    refused(Code.FAILED_PRECONDITION, lambda: fill(tmp_path, MemoryStore(backend), file), "not empty")
    assert meta_of(backend).epoch == 3
    fill(tmp_path, MemoryStore(backend), file, force=True)
    assert len(backend.records) == 3


def test_a_store_that_somebody_leads_on_is_left_alone(tmp_path: Path) -> None:
    file = saved(tmp_path / "f", records(2))

    async def body() -> None:
        backend = MemoryBackend()
        other = MemoryStore(backend)
        guard = await other.campaign("scheduler-a")
        with pytest.raises(FalError, match="a scheduler leads on the memory store: scheduler-a"):
            await restore(
                MemoryStore(backend), file, ca=authority(CLUSTER), blobs=tmp_path / "b", force=True, wait_s=0.1
            )
        await other.commit(guard, [Write("x", b"still ours")])
        await other.close()

    asyncio.run(body())


class Killed(Exception):
    """The process that moves ends here."""


def may_be_led_on(backend: MemoryBackend) -> bool:
    if not backend.records:
        return False
    try:
        recover(backend.records, term=backend.term, revision=backend.revision, now_s=0.0)
    except FalError as error:
        return error.code is not Code.FAILED_PRECONDITION
    return True


COMMITS = 7  # of a move of 350 records: the mark, four batches, the source's mark, the last


@pytest.mark.parametrize("point", ["before commit", "after commit"])
@pytest.mark.parametrize("cut", range(COMMITS + 1))
def test_a_move_that_is_killed_anywhere_leaves_one_store_at_most_and_is_done_again(cut: int, point: str) -> None:
    kept = records(350)

    async def body() -> None:
        source, target = backend_of(kept), MemoryBackend()
        passed = 0

        def hook(now: str) -> None:
            nonlocal passed
            assert may_be_led_on(source) + may_be_led_on(target) <= 1
            if now == point:
                passed += 1
                if passed == cut + 1:
                    raise Killed

        killed = cut < COMMITS
        try:
            stores = (FaultStore(MemoryStore(backend), hook=hook) for backend in (source, target))
            await migrate(*stores, where="there", force=False)
        except Killed:
            assert killed
        else:
            assert (killed, passed) == (False, COMMITS)
        assert may_be_led_on(source) + may_be_led_on(target) <= 1
        if not may_be_led_on(target):
            await migrate(MemoryStore(source), MemoryStore(target), where="there", force=False)
        assert target.records.keys() == kept.keys()
        assert may_be_led_on(target)
        with pytest.raises(FalError, match="moved to there"):
            recover(source.records, term=1, revision=1, now_s=0.0)
        with pytest.raises(FalError, match="moved to there"):  # the target may have changed since
            await migrate(MemoryStore(source), MemoryStore(target), where="there", force=True)

    asyncio.run(body())


def test_a_move_that_was_cut_goes_on_to_the_same_store_only() -> None:
    async def body() -> None:
        source, target, other = backend_of(records(3)), MemoryBackend(), MemoryBackend()
        faults = FaultStore(MemoryStore(target), [Fault(FaultKind.NONE)] * 2 + [Fault(FaultKind.FAIL)])
        with pytest.raises(FalError):
            await migrate(MemoryStore(source), faults, where="there", force=False)
        assert not may_be_led_on(source)
        with pytest.raises(FalError, match="was not finished"):
            recover(target.records, term=1, revision=1, now_s=0.0)
        for where in ("elsewhere", "there"):
            with pytest.raises(FalError, match="moved to there"):
                await migrate(MemoryStore(source), MemoryStore(other), where=where, force=True)
        assert not other.records
        await migrate(MemoryStore(source), MemoryStore(target), where="there", force=False)
        assert MARK_KEY not in target.records

    asyncio.run(body())


def test_a_snapshot_is_not_written_over_another_by_accident_and_never_in_part(tmp_path: Path) -> None:
    file = saved(tmp_path / "f", records(1))
    before = file.read_bytes()
    refused(Code.ALREADY_EXISTS, lambda: SnapshotWriter(file), "exists")
    with SnapshotWriter(file, replace=True) as writer:
        writer.write(b"abc")
        refused(Code.CORRUPT, lambda: writer.finish({}, sha256="0" * 64), "not those that were sent")
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert snapshot_file.check(file)["records"] == 2
    assert json.dumps(snapshot_file.read_head(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("banana", "names no store"),
        ("mysql://h", "names no store"),
        ("sqlite://store.db", "names no store"),
        ("sqlite://{tmp}/other.db", "does not end in store.db"),
        ("sqlite://{tmp}/nowhere/store.db", "is in no existing folder"),
        ("etcd://", "names no etcd member"),
        ("etcd://h:99999", "is not host:port"),
    ],
)
def test_a_store_that_cannot_be_meant_is_refused_and_nothing_is_made(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(FalError, match=words) as refused:
        target_store(text.format(tmp=tmp_path), Options(data_dir=tmp_path))
    assert refused.value.remedy
    assert not list(tmp_path.iterdir())
