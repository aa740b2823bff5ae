"""A part on disk: what counts, what survives, what is refused."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from blake3 import blake3

from disk_rig import artifact_of, bring, bytes_of, content, flip, open_store, put, tree_of
from fal_contract.errors import Code, FalError
from fal_contract.pieces import Bitmap
from fal_fsd.disk import part as part_module
from fal_fsd.disk.reading import Cancelled
from fal_fsd.disk.store import DiskStore
from fal_fsd.ports import BadPiece

FILES = content(1, {"a/model.bin": 300_000, "config.json": 100, "empty": 0, "z": 65_536})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    made = open_store(tmp_path / "s")
    yield made
    made.close()


def test_a_piece_counts_when_its_digest_is_right(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    assert artifact.hashes is not None
    assert put(part, 3, bytes_of(artifact, FILES, 3)) == artifact.hashes[3]
    assert part.has(3)
    assert list(part.have) == [3]
    assert part.digest_of(3) == artifact.hashes[3]
    where = part.locate(3)
    assert where is not None
    assert os.pread(where[0], where[2], where[1]) == bytes_of(artifact, FILES, 3)
    assert part.locate(0) is None
    assert part.digest_of(0) is None
    assert part.writer(3, source="x") is None


def test_bad_bytes_do_not_count(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    with pytest.raises(BadPiece) as raised:
        put(part, 0, bytes(artifact.layout.length(0)), source="evil")
    assert raised.value.source == "evil"
    assert not part.has(0)
    bring(part, FILES)
    assert tree_of(store.finish(artifact.id)) == FILES


def test_a_short_piece_is_bad_and_a_long_one_is_refused(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    writer = part.writer(0, source="x")
    assert writer is not None
    with pytest.raises(BadPiece):
        writer.finish()
    writer = part.writer(0, source="x")
    assert writer is not None
    with pytest.raises(ValueError, match="piece 0"):
        writer.write(memoryview(bytes(artifact.layout.length(0) + 1)))
    writer.abort()
    assert not part.has(0)


def test_one_writer_a_piece(store: DiskStore) -> None:
    part = store.open_part(artifact_of(FILES), model="t/m")
    first = part.writer(0, source="x")
    assert first is not None
    assert part.writer(0, source="y") is None
    first.abort()
    first.abort()
    second = part.writer(0, source="y")
    assert second is not None
    second.abort()
    with pytest.raises(FalError):
        second.write(memoryview(b"x"))


def test_provisional_pieces_take_what_is_expected(store: DiskStore) -> None:
    artifact = artifact_of(FILES, sha=False)
    part = store.open_part(artifact, model="t/m")
    good = bytes_of(artifact, FILES, 0)
    with pytest.raises(BadPiece):
        put(part, 0, good, expect=bytes(32))
    digest = put(part, 0, good, expect=blake3(good).digest())
    assert part.digest_of(0) == digest
    put(part, 1, b"x" * artifact.layout.length(1), source="liar")  # nobody knows yet
    with pytest.raises(FalError) as raised:
        store.finish(artifact.id)
    assert raised.value.code == Code.FAILED_PRECONDITION


def test_attestation_takes_back_what_differs_and_names_its_source(tmp_path: Path) -> None:
    known, signed = artifact_of(FILES, sha=False), artifact_of(FILES)
    assert signed.id == known.id
    store = open_store(tmp_path / "s")
    part = store.open_part(known, model="t/m")
    put(part, 0, bytes_of(known, FILES, 0))
    lie = b"x" * known.layout.length(1)
    put(part, 1, lie, source="liar")
    (bad,) = store.attest(signed)
    assert (bad.piece, bad.digest, bad.source) == (1, blake3(lie).digest(), "liar")
    assert list(part.have) == [0]
    with pytest.raises(BadPiece):
        put(part, 1, lie)
    bring(part, FILES)
    assert tree_of(store.finish(known.id)) == FILES
    store.close()


def test_the_lie_is_still_known_after_a_restart(tmp_path: Path) -> None:
    known, signed = artifact_of(FILES, sha=False), artifact_of(FILES)
    store = open_store(tmp_path / "s")
    part = store.open_part(known, model="t/m", owner="r")
    put(part, 0, bytes_of(known, FILES, 0))
    put(part, 1, b"x" * known.layout.length(1))
    store.close()
    store = open_store(tmp_path / "s")
    part = store.open_part(signed, model="t/m")
    assert [x.piece for x in part.discarded] == [1]
    assert part.artifact.attested
    assert list(part.have) == [0]
    store.close()


def test_what_is_attested_is_the_same_listing(store: DiskStore) -> None:
    known = artifact_of(FILES, sha=False)
    other = artifact_of(content(2, {"b": 70_000}))
    object.__setattr__(other, "id", known.id)
    store.open_part(known, model="t/m")
    with pytest.raises(FalError) as raised:
        store.attest(other)
    assert raised.value.code == Code.INVALID


def test_a_part_resumes_with_everything_that_was_checked(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m", owner="r")
    bring(part, FILES, [0, 2])
    store.close()
    store = open_store(tmp_path / "s")
    (record,) = store.artifacts()
    assert record.bytes_disk == artifact.layout.length(0) + artifact.layout.length(2)
    part = store.open_part(artifact, model="t/m")
    assert list(part.have) == [0, 2]
    bring(part, FILES)
    assert tree_of(store.finish(artifact.id)) == FILES
    store.close()


def crash(store: DiskStore) -> None:
    """As kill -9 leaves it: nothing is synced or written down at the end."""
    store._syncer.close()
    for part in list(store._parts.values()):
        part.mark_gone("the process died")
        part.close()
    store.catalog.close()
    os.close(store._lock_fd)


def test_unsynced_pieces_are_hashed_again_not_believed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m", owner="r")
    bring(part, FILES, [0, 1])
    path = part.file_path(0)
    crash(store)
    flip(path, artifact.layout.span(1).offset + 7)  # as if the power had failed
    store = open_store(tmp_path / "s")
    part = store.open_part(artifact, model="t/m")
    assert list(part.have) == [0]
    store.close()


def test_damaged_bits_are_not_believed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    artifact = artifact_of(FILES)
    bring(store.open_part(artifact, model="t/m", owner="r"), FILES, [0])
    store.close()
    flip(tmp_path / "s" / "parts" / artifact.id / "bits", 90)
    store = open_store(tmp_path / "s")
    assert not store.open_part(artifact, model="t/m").have
    store.close()


def test_a_truncated_data_file_loses_its_pieces_only(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m", owner="r")
    bring(part, FILES)
    path = part.file_path(0)
    store.close()
    os.truncate(path, 10)
    store = open_store(tmp_path / "s")
    part = store.open_part(artifact, model="t/m")
    assert set(part.have.missing()) == set(artifact.layout.of_file(0))
    store.close()


def test_writers_wait_when_a_whole_batch_is_not_durable(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_module, "SYNC_BATCH_BYTES", 2 * 65_536)
    allowed = threading.Event()
    syncing = threading.Event()
    real = os.fdatasync

    def slow(fd: int) -> None:
        syncing.set()
        assert allowed.wait(30)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    bring(part, FILES, [0, 1])
    third = threading.Thread(target=bring, args=(part, FILES, [2]))
    third.start()
    assert syncing.wait(30)
    assert not part.has(2)
    assert part.bytes_unsynced <= 2 * 65_536
    allowed.set()
    third.join(30)
    assert part.has(2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_writing(store: DiskStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(FalError) as raised:
        put(part, 0, bytes_of(artifact, FILES, 0))
    assert raised.value.code == Code.NO_CAPACITY
    assert not part.has(0)
    monkeypatch.setattr(os, "pwrite", real)
    bring(part, FILES)
    assert tree_of(store.finish(artifact.id)) == FILES


def test_a_failed_sync_takes_its_pieces_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[tuple[str, list[int]]] = []
    store = open_store(tmp_path / "s")
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    bring(part, FILES, [0, 1])
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    lost.append((artifact.id, part.sync()))
    assert lost == [(artifact.id, [0, 1])]
    assert not part.have
    with pytest.raises(FalError) as raised:
        part.writer(0, source="x")
    assert raised.value.code == Code.STORE_FAILED
    monkeypatch.setattr(os, "fdatasync", real)
    bring(part, FILES)
    assert tree_of(store.finish(artifact.id)) == FILES
    store.close()


def test_bits_that_cannot_be_written_keep_the_pieces(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    bring(part, FILES, [0])
    assert part._progress is not None
    with monkeypatch.context() as patch:
        patch.setattr(part._progress, "save", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        assert part.sync() == []
    assert part.has(0)
    with pytest.raises(FalError) as raised:
        part.writer(1, source="x")
    assert raised.value.code == Code.NO_CAPACITY
    assert part.sync() == []
    assert part.bytes_unsynced == 0


def test_sha256_follows_the_pieces_as_they_come(store: DiskStore) -> None:
    artifact = artifact_of(FILES, sha=False)
    part = store.open_part(artifact, model="t/m")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(part.sha256_of(0, threading.Event())))
    reader.start()
    bring(part, FILES, reversed(artifact.layout.of_file(0)))
    reader.join(30)
    assert found == [sha256(FILES["a/model.bin"]).digest()]


def test_sha256_ends_when_nobody_wants_it(store: DiskStore) -> None:
    part = store.open_part(artifact_of(FILES, sha=False), model="t/m")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        part.sha256_of(0, stop)


def test_descriptors_outlive_finishing(store: DiskStore) -> None:
    artifact = artifact_of(FILES)
    part = store.open_part(artifact, model="t/m")
    bring(part, FILES)
    before = part.locate(0)
    path = store.finish(artifact.id)
    assert part.locate(0) == before
    assert before is not None
    assert os.fstat(before[0]).st_ino == (path / "a/model.bin").stat().st_ino
    assert part.file_path(0) == path / "a/model.bin"
    assert part.finished
    assert part.writer(0, source="x") is None


def test_bits_of_another_artifact_are_none(tmp_path: Path) -> None:
    from fal_fsd.disk.progress import Progress, read_bits

    one = Progress(tmp_path, "a" * 64, 10)
    one.save(Bitmap(10, [1, 2]))
    one.close()
    assert list(read_bits(tmp_path, "a" * 64, 10) or ()) == [1, 2]
    assert read_bits(tmp_path, "b" * 64, 10) is None
    assert read_bits(tmp_path, "a" * 64, 11) is None
