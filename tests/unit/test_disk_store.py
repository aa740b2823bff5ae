"""The store around the parts: READY by one rename, shared files, pins, room, removal, restarts."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from disk_rig import artifact_of, bring, bytes_of, content, flip, open_store, put, stage, tree_of
from fal_contract.clock import ManualClock
from fal_contract.errors import Code, FalError
from fal_fsd.disk.reading import Cancelled
from fal_fsd.disk.store import DiskStore

FILES = content(1, {"a/model.bin": 300_000, "config.json": 100, "empty": 0, "z": 65_536})
OTHER = {**content(2, {"lora.bin": 200_000}), "config.json": FILES["config.json"], "empty": b""}
NEVER = threading.Event()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    made = open_store(tmp_path / "s")
    yield made
    made.close()


# ---- READY


def test_ready_is_a_read_only_tree_of_the_same_inodes(store: DiskStore) -> None:
    artifact = stage(store, FILES)
    path = store.path_of(artifact.id)
    assert path is not None
    assert path == store.path_of(artifact.manifest_digest)
    assert tree_of(path) == FILES
    for file in artifact.files:
        info = (path / file.path).stat()
        assert stat.S_IMODE(info.st_mode) == 0o444
        assert info.st_ino == store.layout.blob(file.sha256.hex()).stat().st_ino
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((path / "a").stat().st_mode) == 0o555
    assert not store.layout.part(artifact.id).exists()
    assert store.finish(artifact.id) == path


def test_finish_refuses_what_is_incomplete_unattested_or_another_digest(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    with pytest.raises(FalError) as raised:
        store.finish(artifact.id)
    assert raised.value.code == Code.NOT_FOUND
    part = store.open_part(artifact, model="t/m")
    bring(part, FILES, [0])
    with pytest.raises(FalError, match="lacks 6 pieces"):
        store.finish(artifact.id)
    bring(part, FILES)
    wrong = [sha256(b"x").digest()] * len(FILES)
    with pytest.raises(FalError) as raised:
        store.finish(artifact.id, sha256=wrong)
    assert raised.value.code == Code.CORRUPT
    assert store.path_of(artifact.id) is None
    assert store.finish(artifact.id, sha256=[file.sha256 for file in artifact.files])


def test_ready_survives_and_serves_after_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    artifact = stage(store, FILES, owner="r")
    store.close()
    store = open_store(tmp_path / "s")
    assert store.path_of(artifact.manifest_digest) is not None
    part = store.open_part(artifact, model="t/m")
    assert part.finished
    assert part.complete
    where = part.locate(1)
    assert where is not None
    assert os.pread(where[0], where[2], where[1]) == bytes_of(artifact, FILES, 1)
    assert store.artifact(artifact.manifest_digest) == artifact
    store.close()


# ---- shared files


def test_two_artifacts_share_their_equal_files(store: DiskStore) -> None:
    one, two = stage(store, FILES), artifact_of(OTHER, uri="s3://b/other")
    part = store.open_part(two, model="t/other")
    assert {two.layout.span(piece).file for piece in part.have} == {0}  # config.json is here already
    bring(part, OTHER)
    path = store.finish(two.id)
    assert tree_of(path) == OTHER
    shared = store.layout.tree(one.manifest_digest) / "config.json"
    assert (path / "config.json").samefile(shared)
    assert store.room().bytes_used == sum(map(len, FILES.values())) + 200_000
    part.close()
    assert store.drop(one.id, force=False)
    assert tree_of(path) == OTHER
    assert store.verify(two.id, NEVER) == []
    assert store.room().bytes_used == sum(map(len, OTHER.values()))
    assert store.drop(two.id, force=False)
    assert not list(store.layout.blobs.glob("??/*"))


def test_what_is_here_under_another_name_is_ready_at_once(store: DiskStore) -> None:
    stage(store, FILES)
    again = artifact_of(FILES, uri="s3://elsewhere/m")
    path = store.adopt(again, model="t/again", owner="r")
    assert path is not None
    assert path == store.path_of(again.id)
    assert store.pinned(again.id)
    part_of_it = artifact_of({"new/name": FILES["z"]}, uri="s3://z")
    adopted = store.adopt(part_of_it)
    assert adopted is not None
    assert tree_of(adopted) == {"new/name": FILES["z"]}
    assert store.adopt(artifact_of(OTHER)) is None
    assert store.adopt(artifact_of(FILES, uri="s3://y", attested=False)) is None


def test_one_of_two_names_goes_and_the_tree_stays(store: DiskStore) -> None:
    first = stage(store, FILES)
    second = artifact_of(FILES, uri="s3://elsewhere/m")
    store.adopt(second)
    assert store.drop(first.id, force=False)
    path = store.path_of(second.id)
    assert path is not None
    assert tree_of(path) == FILES


def test_a_file_twice_in_one_artifact(store: DiskStore) -> None:
    files = {"a": FILES["z"], "b": FILES["z"], "c": b"", "d": b""}
    artifact = stage(store, files)
    path = store.path_of(artifact.id)
    assert path is not None
    assert tree_of(path) == files
    assert store.drop(artifact.id, force=False)
    assert not list(store.layout.blobs.glob("??/*"))


# ---- a folder as the origin


@pytest.mark.parametrize("attested", [True, False])
def test_a_folder_is_copied_in_and_checked(store: DiskStore, tmp_path: Path, attested: bool) -> None:
    folder = tmp_path / "origin"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    artifact = artifact_of(FILES, sha=attested)
    part = store.open_part(artifact, model="t/m")
    put(part, 0, bytes_of(artifact, FILES, 0))
    read: list[int] = []
    store.copy_in(part, folder, NEVER, read.append)
    assert part.complete
    assert sum(read) == sum(map(len, FILES.values())) - artifact.layout.length(0)
    store.attest(artifact_of(FILES))
    assert tree_of(store.finish(artifact.id)) == FILES


def test_a_folder_that_is_not_what_was_registered(store: DiskStore, tmp_path: Path) -> None:
    folder = tmp_path / "origin"
    (folder / "a").mkdir(parents=True)
    for path, data in FILES.items():
        (folder / path).write_bytes(data)
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        store.copy_in(part, folder, stop)
    flip(folder / "a/model.bin", 200_000)
    with pytest.raises(FalError, match=r"a/model\.bin") as raised:
        store.copy_in(part, folder, NEVER)
    assert raised.value.code == Code.CORRUPT
    (folder / "a/model.bin").unlink()  # an ordinary user could not write to it any more
    (folder / "a/model.bin").write_bytes(b"short")
    with pytest.raises(FalError) as raised:
        store.copy_in(part, folder, NEVER)
    assert raised.value.code == Code.CORRUPT
    (folder / "a/model.bin").unlink()
    with pytest.raises(FalError) as raised:
        store.copy_in(part, folder, NEVER)
    assert raised.value.code == Code.NOT_FOUND
    os.mkfifo(folder / "a/model.bin")
    with pytest.raises(FalError) as raised:
        store.copy_in(part, folder, NEVER)
    assert raised.value.code == Code.CORRUPT
    assert store.path_of(artifact.id) is None


# ---- verification


def test_a_flipped_byte_is_found_taken_back_and_repaired(store: DiskStore) -> None:
    artifact = stage(store, FILES)
    path = store.path_of(artifact.id)
    assert path is not None
    flip(path / "a/model.bin", 70_000)
    read: list[int] = []
    assert store.verify(artifact.id, NEVER, read.append) == [1]
    assert sum(read) == artifact.bytes_total
    assert store.path_of(artifact.id) is None
    assert not path.exists()
    part = store.open_part(artifact, model="t/m")
    assert list(part.have.missing()) == [1]
    bring(part, FILES)
    assert tree_of(store.finish(artifact.id)) == FILES
    assert store.verify(artifact.id, NEVER) == []


def test_a_part_that_is_open_goes_on_after_its_file_was_damaged(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    bring(part, FILES)
    path = store.finish(artifact.id)
    flip(path / "z", 5)
    reader = os.open(path / "z", os.O_RDONLY)
    (bad,) = store.verify(artifact.id, NEVER)
    assert not part.has(bad)
    assert part.locate(bad) is None
    bring(part, FILES)
    assert tree_of(store.finish(artifact.id)) == FILES
    assert os.pread(reader, 100_000, 0) != FILES["z"]  # the old inode is nobody's to change
    os.close(reader)


def test_damage_to_a_shared_file_takes_every_artifact_back(tmp_path: Path) -> None:
    lost: list[str] = []
    store = DiskStore(
        tmp_path / "s", bytes_max=None, clock=ManualClock(), reserve_bytes=0, on_lost=lambda id, _: lost.append(id)
    )
    one, two = stage(store, FILES), stage(store, OTHER, uri="s3://b/other")
    path = store.path_of(one.id)
    assert path is not None
    flip(path / "config.json", 3)
    assert len(store.verify(one.id, NEVER)) == 1
    assert store.path_of(two.id) is None
    assert lost == [two.id]
    for artifact, files in ((one, FILES), (two, OTHER)):
        part = store.open_part(artifact, model="t/m")
        bring(part, files)
        assert tree_of(store.finish(artifact.id)) == files
    store.close()


def test_first_use_after_a_restart_finds_a_flipped_byte(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    artifact = stage(store, FILES, owner="r")
    path = store.path_of(artifact.id)
    assert path is not None
    store.close()
    flip(path / "a/model.bin", 1)
    store = open_store(tmp_path / "s")
    assert store.first_use_check(artifact.id) == [0]
    assert store.path_of(artifact.id) is None
    assert store.pinned(artifact.id)
    store.close()


def test_first_use_reads_once_each_start_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "s")
    artifact = stage(store, FILES, owner="r")
    read: list[int] = []
    from fal_fsd.disk.part import DiskPart

    real = DiskPart.read_digest
    monkeypatch.setattr(DiskPart, "read_digest", lambda part, piece: (read.append(piece), real(part, piece))[1])
    assert store.first_use_check(artifact.id) == []
    assert read == []  # it was checked as it came
    store.boot = "another"
    assert store.first_use_check(artifact.id) == []
    assert read == list(range(artifact.layout.count))
    assert store.first_use_check(artifact.id) == []
    assert len(read) == artifact.layout.count
    store.close()


def test_verify_of_a_part_takes_bad_pieces_back(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    bring(part, FILES, [0, 1, 2])
    store.sync()
    flip(part.file_path(0), 70_000)
    part.file_path(0).chmod(0o644)
    assert store.verify(artifact.id, NEVER) == [1]
    assert list(part.have) == [0, 2]
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        store.verify(artifact.id, stop)


# ---- pins


def test_pins_are_their_owners(store: DiskStore) -> None:
    artifact = stage(store, FILES, owner="a")
    store.pin(artifact.manifest_digest, "b")
    assert store.unpin("c") == []
    assert store.unpin("b", "0" * 64) == []
    assert store.pinned(artifact.id)
    assert not store.drop(artifact.id, force=False)
    assert store.unpin("a") == [artifact.id]
    assert store.pinned(artifact.manifest_digest)
    assert store.artifacts()[0].pinned_by == ("b",)
    assert store.unpin("b", artifact.manifest_digest) == [artifact.id]
    assert not store.pinned(artifact.id)
    with pytest.raises(FalError) as raised:
        store.pin("f" * 64, "a")
    assert raised.value.code == Code.NOT_FOUND


def test_pins_survive_clock_jumps_and_end_by_time_that_passed(tmp_path: Path) -> None:
    clock = ManualClock()
    store = open_store(tmp_path / "s", clock=clock)
    artifact = stage(store, FILES)
    store.pin(artifact.id, "r", expires_at_s=clock.wall_s() + 100)
    clock.skew(1e6)
    assert store.pinned(artifact.id)
    clock.skew(-3e6)
    assert store.pinned(artifact.id)
    store.close()
    clock.skew(5e6)  # while we are down: could be real, so at most an hour counts
    store = open_store(tmp_path / "s", clock=clock)
    store.pin(artifact.id, "r", expires_at_s=clock.wall_s() + 4000)
    store.close()
    clock.skew(1e7)
    store = open_store(tmp_path / "s", clock=clock)
    assert store.pinned(artifact.id)
    clock.skew(-1e7)
    assert store.pinned(artifact.id)
    clock.advance(500)
    assert not store.pinned(artifact.id)
    store._tick()
    assert store.artifacts()[0].pinned_by == ()
    store.close()


# ---- room


def test_a_model_larger_than_the_quota_is_refused_for_good(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", bytes_max=100_000)
    with pytest.raises(FalError, match="never fit") as raised:
        store.open_part(artifact_of(FILES), model="t/m")
    assert raised.value.code == Code.NO_CAPACITY
    assert store.artifacts() == []
    store.close()


def test_room_is_made_of_what_is_worth_least(tmp_path: Path) -> None:
    gone: list[str] = []
    clock = ManualClock()
    store = DiskStore(
        tmp_path / "s", bytes_max=1_000_000, clock=clock, reserve_bytes=0, on_gone=lambda ids: gone.extend(ids)
    )
    made = [stage(store, content(n, {"x": 200_000}), uri=f"s3://b/{n}") for n in range(4)]
    for _ in range(3):
        store.touch(made[0].id)
    store.touch(made[2].manifest_digest)
    store.pin(made[1].id, "r")
    store.set_last_copies([made[3].id])
    store.evict()
    assert gone == []  # 80 % is below the high mark
    newer = stage(store, content(9, {"x": 200_000}), uri="s3://b/9")
    assert gone == [made[2].id]  # down to 80 %: never asked for is least, but that one is the last copy
    assert {x.id for x in store.artifacts()} == {made[0].id, made[1].id, made[3].id, newer.id}
    store.close()


def test_room_is_made_by_the_schedulers_values_where_it_told_some(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", bytes_max=1_000_000)
    made = [stage(store, content(n, {"x": 200_000}), uri=f"s3://b/{n}") for n in range(4)]
    for _ in range(9):
        store.touch(made[0].id)  # asked for here, but the cluster does not want it any more
    store.values_ms = {made[0].id: 0, made[1].id: 10_000_000, made[2].id: 1}
    stage(store, content(9, {"x": 200_000}), uri="s3://b/9")
    assert store.artifacts()
    assert made[0].id not in {x.id for x in store.artifacts()}
    assert len(store.artifacts()) == 4
    store.close()


def test_what_is_pinned_or_open_stays_and_the_newcomer_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", bytes_max=500_000)
    pinned = stage(store, content(1, {"x": 200_000}), uri="s3://b/1", owner="r")
    opened = stage(store, content(2, {"x": 200_000}), uri="s3://b/2")
    store.opened(opened.id)
    newcomer = artifact_of(content(3, {"x": 200_000}), uri="s3://b/3")
    with pytest.raises(FalError, match="pinned or in use") as raised:
        store.open_part(newcomer, model="t/n")
    assert raised.value.code == Code.NO_CAPACITY
    assert not store.drop(opened.id, force=False)
    store.closed(opened.id)
    part = store.open_part(newcomer, model="t/n")
    assert {x.id for x in store.artifacts()} == {pinned.id, newcomer.id}
    assert store.evict(400_000) == []  # a part that is being brought is in use
    part.close()
    assert store.evict(400_000) == [newcomer.id]
    store.close()


def test_an_evicted_part_locates_nothing_any_more(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", bytes_max=500_000)
    artifact = artifact_of(content(1, {"x": 200_000}))
    part = store.open_part(artifact, model="t/m")
    bring(part, content(1, {"x": 200_000}))
    store.finish(artifact.id)
    where = part.locate(0)
    assert where is not None
    assert store.evict(500_000) == [artifact.id]
    assert part.locate(0) is None
    assert len(os.pread(where[0], where[2], where[1])) == where[2]  # whoever sends from it just now may
    with pytest.raises(FalError):
        part.writer(0, source="x")
    part.close()
    store.close()


def test_what_was_dropped_can_be_brought_anew_while_the_old_part_is_open(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    old = store.open_part(artifact, model="t/m")
    bring(old, FILES)
    store.finish(artifact.id)
    assert store.drop(artifact.id, force=False)
    new = store.open_part(artifact, model="t/m")
    assert not new.have
    bring(new, FILES)
    assert tree_of(store.finish(artifact.id)) == FILES
    old.close()
    assert new.locate(0) is not None
    assert store.artifacts()[0].bytes_disk == artifact.bytes_total


def test_everything_at_once(tmp_path: Path, base_seed: int) -> None:
    """Writing, reading, syncing, attesting, verifying, finishing and dropping in threads: no deadlock, right bytes."""
    store = DiskStore(tmp_path / "s", bytes_max=None, clock=ManualClock(), reserve_bytes=0, sync_interval_s=0.001)
    known, signed = artifact_of(FILES, sha=False), artifact_of(FILES)
    failures: list[BaseException] = []
    done = threading.Event()

    def loop(work: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(f"{base_seed}/{number}")
        while not done.wait(0.001):
            try:
                work(rng)
            except FalError as exc:
                expected = {Code.CANCELLED, Code.NOT_FOUND, Code.FAILED_PRECONDITION}
                failures.extend([] if exc.code in expected else [exc])
            except Cancelled:
                pass
            except BaseException as exc:
                failures.append(exc)

    def write(rng: random.Random) -> None:
        part = store.part(signed.id)
        missing = list(part.have.missing()) if part is not None and not part.gone else []
        if part is not None and missing:
            piece = rng.choice(missing)
            writer = part.writer(piece, source="x")
            if writer is not None:
                try:
                    writer.write(memoryview(bytes_of(signed, FILES, piece)))
                    writer.finish()
                finally:
                    writer.abort()

    def read(rng: random.Random) -> None:
        part = store.part(signed.id)
        piece = rng.randrange(signed.layout.count)
        if part is not None and part.has(piece):
            digest = part.digest_of(piece)
            assert digest in (None, (signed.hashes or ())[piece])

    def check(_: random.Random) -> None:
        assert store.verify(signed.id, done) == []
        store.sync()
        store.artifacts()
        store.room()

    threads = [
        threading.Thread(target=loop, args=(work, n)) for n, work in enumerate([write, write, write, read, check])
    ]
    for thread in threads:
        thread.start()
    try:
        for turn in range(6):
            part = store.open_part(known if turn % 2 else signed, model="t/m")
            with part.changed:
                assert part.changed.wait_for(lambda part=part: part.complete, 60)  # type: ignore[misc]
            store.attest(signed)
            assert tree_of(store.finish(signed.id)) == FILES
            assert store.drop(signed.id, force=False)
            part.close()
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    store.close()


# ---- withdrawn


def test_what_is_withdrawn_goes_at_once_or_when_unpinned(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    artifact = stage(store, FILES, owner="r")
    path = store.path_of(artifact.id)
    assert path is not None
    bound = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    assert not store.drop(artifact.id, force=True, reason="licence withdrawn")
    assert not path.exists()
    assert store.path_of(artifact.id) is None
    assert os.listdir(bound)  # a container that has it bound reads on until it is stopped
    with pytest.raises(FalError, match="licence withdrawn"):
        store.open_part(artifact, model="t/m")
    assert store.adopt(artifact) is None
    with pytest.raises(FalError):
        store.pin(artifact.id, "other")
    store.close()
    store = open_store(tmp_path / "s")
    assert os.listdir(bound)
    assert store.unpin("r") == [artifact.id]
    assert not os.listdir(bound)
    os.close(bound)
    assert store.artifacts() == []
    assert store.revoked(artifact.id) == "licence withdrawn"
    assert not list(store.layout.blobs.glob("??/*"))
    store.close()


def test_withdrawing_one_name_leaves_the_tree_to_another_of_the_same_content(store: DiskStore) -> None:
    one = stage(store, FILES, owner="r")
    other = artifact_of(FILES, uri="s3://elsewhere/m")
    path = store.adopt(other, model="u/m")
    assert path is not None
    assert not store.drop(one.id, force=True, reason="licence withdrawn")
    assert store.path_of(other.id) == path
    assert tree_of(path) == FILES
    assert store.unpin("r") == [one.id]
    assert tree_of(path) == FILES
    assert store.verify(other.id, NEVER) == []
    store.drop(other.manifest_digest, force=True, reason="everywhere")
    assert not path.exists()
    assert store.artifacts() == []


def test_what_was_never_here_can_be_withdrawn(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    assert store.drop(artifact.manifest_digest, force=True, reason="gone")
    with pytest.raises(FalError, match="gone"):
        store.open_part(artifact, model="t/m")


# ---- starts


def test_a_second_fsd_is_refused(store: DiskStore, tmp_path: Path) -> None:
    with pytest.raises(FalError) as raised:
        open_store(tmp_path / "s")
    assert raised.value.code == Code.ALREADY_EXISTS


def test_parts_that_nobody_wants_are_swept_at_a_start(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    kept, left = artifact_of(FILES), artifact_of(OTHER)
    bring(store.open_part(kept, model="t/k", owner="r"), FILES, [0])
    bring(store.open_part(left, model="t/l"), OTHER, [0])
    store.close()
    (tmp_path / "s/parts/stranger").mkdir()
    (tmp_path / "s/models/stranger").mkdir()
    (tmp_path / "s/blobs/ab").mkdir()
    (tmp_path / "s/blobs/ab/abstranger").write_bytes(b"x")
    store = open_store(tmp_path / "s")
    assert [x.id for x in store.artifacts()] == [kept.id]
    assert [x.name for x in store.layout.parts.iterdir()] == [kept.id]
    assert not list(store.layout.models.iterdir())
    assert not list(store.layout.blobs.glob("??/*"))
    store.unpin("r")
    part = store.open_part(kept, model="t/k")
    store.abandon(kept.id)
    assert part.has(0)  # it is open
    part.close()
    store.abandon(kept.id)
    assert store.artifacts() == []
    store.close()


def test_a_damaged_database_is_refused_and_models_are_found_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    artifact = stage(store, FILES)
    store.close()
    path = tmp_path / "s/cache.db"
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    path.write_bytes(b"no database at all, for sure" * 100)
    with pytest.raises(FalError) as raised:
        open_store(tmp_path / "s")
    assert raised.value.code == Code.CORRUPT
    path.rename(tmp_path / "aside")
    flip(tmp_path / "s/models" / artifact.manifest_digest / "z", 1)
    store = open_store(tmp_path / "s")
    assert store.path_of(artifact.id) is not None
    assert len(store.first_use_check(artifact.id)) == 1  # nothing is believed of what it knew
    store.close()


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path / "s").close()
    db = sqlite3.connect(tmp_path / "s/cache.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(FalError) as raised:
        open_store(tmp_path / "s")
    assert raised.value.code == Code.VERSION_MISMATCH


def test_a_state_folder_of_the_release_before_is_taken_over(tmp_path: Path) -> None:
    artifact = artifact_of(FILES)
    tree = tmp_path / "s/models" / artifact.manifest_digest
    for path, data in FILES.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
        (tree / path).chmod(0o444)
    db = sqlite3.connect(tmp_path / "s/pins.db")
    db.executescript(
        """
        CREATE TABLE artifact (digest TEXT PRIMARY KEY, model TEXT NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
        CREATE TABLE pin (digest TEXT NOT NULL, owner TEXT NOT NULL, PRIMARY KEY (digest, owner)) WITHOUT ROWID;
        PRAGMA user_version = 1;
        """
    )
    db.execute("INSERT INTO artifact VALUES (?, 't/m', ?)", (artifact.manifest_digest, artifact.bytes_total))
    db.execute("INSERT INTO pin VALUES (?, 'runner-1')", (artifact.manifest_digest,))
    db.commit()
    db.close()
    damaged = tmp_path / "s/models" / ("0" * 64)
    damaged.mkdir()
    (damaged / "x").write_bytes(b"?")
    store = open_store(tmp_path / "s")
    assert store.path_of(artifact.manifest_digest) is not None
    assert store.pinned(artifact.manifest_digest)
    assert not damaged.exists()
    assert store.adopt(artifact) == store.path_of(artifact.manifest_digest)
    assert store.unpin("runner-1")
    store.close()
    store = open_store(tmp_path / "s")
    assert store.verify(artifact.id, NEVER) == []
    assert not (tmp_path / "s/pins.db").exists()
    store.close()


@pytest.mark.parametrize("ending", ["renamed", "demoting"])
def test_a_crash_between_tree_and_catalog_is_settled(tmp_path: Path, ending: str) -> None:
    store = open_store(tmp_path / "s")
    artifact = stage(store, FILES, owner="r")
    if ending == "demoting":
        from fal_contract.pieces import Bitmap
        from fal_fsd.disk.progress import Progress

        store.layout.make_part(artifact)
        progress = Progress(store.layout.part(artifact.id), artifact.id, artifact.layout.count)
        progress.save(Bitmap(artifact.layout.count))
        progress.close()
    else:
        store.put(artifact, "part")
    store.close()
    store = open_store(tmp_path / "s")
    assert (store.path_of(artifact.id) is not None) == (ending == "renamed")
    part = store.open_part(artifact, model="t/m")
    bring(part, FILES)
    assert tree_of(store.finish(artifact.id)) == FILES
    assert store.pinned(artifact.id)
    store.close()


def test_more_names_than_an_inode_may_have(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    stage(store, FILES)
    again = artifact_of(FILES | {"more": b"x"}, uri="s3://more")
    part = store.open_part(again, model="t/m")
    bring(part, FILES | {"more": b"x"})
    real = os.link

    def link(source: Path, target: Path) -> None:
        if "blobs" in str(source):
            raise OSError(errno.EMLINK, "Too many links")
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    assert tree_of(store.finish(again.id)) == FILES | {"more": b"x"}
    assert store.first_use_check(again.id) == []


def test_many_artifacts_list_fast_enough_to_be_listed(store: DiskStore) -> None:
    """Counts only: each row once, with its own pins and names."""
    with store.catalog.transaction():
        for n in range(2000):
            artifact = replace(artifact_of({"x": b"x"}), id=f"{n:064x}")
            store.put(artifact, "ready")
            store.catalog.name(artifact.id, f"t/{n}")
            store.pins.pin([artifact.id], f"runner-{n}")
    records = store.artifacts()
    assert [(x.models, x.pinned_by) for x in records[:2]] == [(("t/0",), ("runner-0",)), (("t/1",), ("runner-1",))]
    assert len(records) == 2000
