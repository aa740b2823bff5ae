"""The agent's journal: every cut, damage, full disks, versions, compaction."""

from __future__ import annotations

import asyncio
import os
import resource
import struct
from pathlib import Path

import pytest

from fal_agent.core.assignments import Assignment, Goal
from fal_agent.core.standing import Standing
from fal_agent.core.tasks import Exit, Phase, Task
from fal_agent.journal import FileJournal
from fal_agent.journal_codec import Forget, Record, Recorded
from fal_contract.errors import Code, FalError

SAMPLE = Path(__file__).parents[1] / "data" / "journal" / "v1.journal"

ASSIGNMENT = Assignment(
    "as-1", 3, "default/digits-00000001", Goal.DRAIN, "scaled down", "default/digits", 2, "default/digits",
    ("GPU-a", "GPU-b"), 1 << 30, 500, 2, 30.0, 60.0, 1.5, "host", "none", b"\x0a\x03abc",
)  # fmt: skip
RECORDS: list[Record] = [
    Standing("c-1", 2, 7, "i-1", 99),
    Task(ASSIGNMENT, Phase.SERVING, started_at_s=10.5, ready_at_s=12.5, phases=(("stage", 0.5), ("create", 0.25))),
    Task(Assignment("as-2", 7, "default/other-00000002")),
    Task(
        Assignment("as-3", 7, "default/gone-00000003"), Phase.COLLECTED, failure="not ready within 600 s",
        exit=Exit(137, True, "killed for memory", 99.5), log_tail=("one", "two"),
    ),
    Forget("default/other-00000002"),
    Standing("c-1", 2, 8, "i-1", 100),
]  # fmt: skip


def fold(records: list[Record]) -> Recorded:
    recorded = Recorded()
    for record in records:
        recorded.add(record)
    return recorded


def write(path: Path, *records: Record) -> None:
    async def main() -> None:
        journal = FileJournal(path, on_event=no_event)
        for record in records:
            await journal.write(record)
        journal.close()

    asyncio.run(main())


def read(path: Path, events: list[str] | None = None) -> Recorded:
    journal = FileJournal(path, on_event=lambda kind, *_: events.append(kind) if events is not None else no_event(kind))
    journal.close()
    return journal.recorded()


def no_event(kind: str, *_: str) -> None:
    raise AssertionError(kind)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "j", *RECORDS)
    assert read(tmp_path / "j") == fold(RECORDS)


def test_the_recorded_sample_of_version_1_is_still_read(tmp_path: Path) -> None:
    copy = tmp_path / "j"
    copy.write_bytes(SAMPLE.read_bytes())
    assert read(copy) == fold(RECORDS)
    assert copy.read_bytes() == SAMPLE.read_bytes()


def test_every_cut_leaves_a_prefix_and_goes_on(tmp_path: Path) -> None:
    path, ends = tmp_path / "j", []
    for n in range(len(RECORDS) + 1):
        write(path, *(RECORDS[n - 1 : n]))
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(ends[0], len(whole)):
        path.write_bytes(whole[:cut])
        events: list[str] = []
        count = sum(end <= cut for end in ends) - 1
        assert read(path, events) == fold(RECORDS[:count])
        assert events == ([] if cut in ends else ["JOURNAL_CUT"])
        assert path.stat().st_size == ends[count]
    write(path, RECORDS[-1])
    assert read(path) == fold(RECORDS)


def test_a_torn_tail_of_zeros_is_cut(tmp_path: Path) -> None:
    write(tmp_path / "j", *RECORDS)
    with (tmp_path / "j").open("ab") as file:
        file.write(bytes(4096))
    events: list[str] = []
    assert read(tmp_path / "j", events) == fold(RECORDS)
    assert events == ["JOURNAL_CUT"]


def test_every_damaged_byte_before_the_last_record_refuses_the_start(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, *RECORDS[:-1])
    last = path.stat().st_size
    write(path, RECORDS[-1])
    whole = path.read_bytes()
    for at in [*range(4), *range(8, last, 7)]:
        damaged = whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]
        path.write_bytes(damaged)
        with pytest.raises(FalError) as caught:
            read(path)
        assert caught.value.code is Code.CORRUPT
        assert str(path) in caught.value.what
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"", b"FAL", b"SQLite format 3\0"])
def test_another_file_is_refused_untouched(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(FalError) as caught:
        read(tmp_path / "j")
    assert caught.value.code is Code.CORRUPT
    assert (tmp_path / "j").read_bytes() == content


def test_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    content = struct.pack("<4sI", b"FALJ", 2) + b"something new"
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(FalError, match="version 2, this agent reads up to 1") as caught:
        read(tmp_path / "j")
    assert caught.value.code is Code.VERSION_MISMATCH
    assert (tmp_path / "j").read_bytes() == content


def test_a_full_disk_writes_nothing_and_recovers(tmp_path: Path) -> None:
    path = tmp_path / "j"

    async def main() -> None:
        journal = FileJournal(path, on_event=no_event)
        await journal.write(RECORDS[0])
        size = path.stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            for _ in range(2):
                with pytest.raises(FalError, match="File too large") as caught:
                    await journal.write(RECORDS[1], RECORDS[2])
                assert caught.value.code is Code.STORE_FAILED
                assert path.stat().st_size == size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await journal.write(RECORDS[1])
        journal.close()

    asyncio.run(main())
    assert read(path) == fold(RECORDS[:2])


def test_the_bound_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        journal = FileJournal(tmp_path / "j", on_event=no_event, bytes_max=400)
        for _ in range(3):
            await journal.write(RECORDS[0])
        with pytest.raises(FalError, match="400 bytes"):
            await journal.write(*RECORDS)
        journal.close()
        assert (tmp_path / "j").stat().st_size <= 400

    asyncio.run(main())


def test_compaction_keeps_the_state_and_bounds_the_file(tmp_path: Path) -> None:
    path = tmp_path / "j"

    async def main() -> int:
        journal = FileJournal(path, on_event=no_event)
        largest = 0
        big = Task(Assignment("as-4", 7, "default/big-00000004", wire=bytes(16 << 10)))
        for _ in range(60):
            await journal.write(*RECORDS, big)
            largest = max(largest, path.stat().st_size)
        await journal.write(Forget("default/big-00000004"))
        journal.close()
        return largest

    assert asyncio.run(main()) < (256 << 10) + (20 << 10)
    assert read(path) == fold(RECORDS)
    assert [p.name for p in tmp_path.iterdir()] == ["j"]


def test_concurrent_writers_each_get_a_whole_record(tmp_path: Path) -> None:
    async def main() -> None:
        journal = FileJournal(tmp_path / "j", on_event=no_event)
        tasks = [Task(Assignment(f"as-{n}", 1, f"default/app-{n:08}")) for n in range(30)]
        writers = [asyncio.create_task(journal.write(task)) for task in tasks]
        await asyncio.sleep(0)
        writers[0].cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        journal.close()

    asyncio.run(main())
    assert len(read(tmp_path / "j").tasks) >= 29


def test_writers_that_wait_share_a_flush_and_one_that_is_too_much_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = 0
    flush = os.fdatasync

    def counted(fd: int) -> None:
        nonlocal flushes
        flushes += 1
        flush(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    small = [Standing("c", 1, term, "i") for term in range(50)]
    large = Standing("c" * 900, 1, 0, "i")

    async def scenario() -> None:
        journal = FileJournal(tmp_path / "j", on_event=no_event, bytes_max=40_000)
        await asyncio.gather(*(journal.write(record) for record in small))
        assert flushes == 1
        asking = asyncio.create_task(journal.write(*[large] * 60))
        answers = await asyncio.gather(*(journal.write(record) for record in small), return_exceptions=True)
        assert answers == [None] * len(small)
        with pytest.raises(FalError, match="40000 bytes"):
            await asking
        cancelled = asyncio.create_task(journal.write(Standing("last", 1, 1, "i")))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        journal.close()

    asyncio.run(scenario())
    assert read(tmp_path / "j").standing.cluster_id == "last"
