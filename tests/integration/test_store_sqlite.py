"""What only the SQLite store has: its file. Damage, newer formats, kill -9, full disks, locks."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_scheduler.store.interface import Store, Write
from fal_scheduler.store.sqlite import SqliteStore

WRITER = """
import asyncio, sys
from pathlib import Path
from fal_scheduler.store.interface import Write
from fal_scheduler.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    guard = await store.campaign("writer")
    n = (await store.load()).revision
    while True:
        n += 1
        revision = await store.commit(guard, [Write(f"k{i}", b"%d" % n) for i in range(20)])
        print(revision, flush=True)

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def fill(path: Path, *, commits: int = 20) -> None:
    async def main() -> None:
        store = SqliteStore(path)
        await store.open()
        guard = await store.campaign("filler")
        for n in range(commits):
            await store.commit(guard, [Write(f"k{n}-{i}", bytes(700)) for i in range(20)])
        await store.close()

    asyncio.run(main())


def refused(path: Path) -> FalError:
    async def main() -> FalError:
        with pytest.raises(FalError) as caught:
            await SqliteStore(path).open()
        return caught.value

    return asyncio.run(main())


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file of the folder with its hash; the lock file is not the store's."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if not file.name.endswith(".lock")
    }


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda path: path.write_bytes(b""), Code.CORRUPT),
        (lambda path: path.write_bytes(b"not a database, but longer than a header" * 10), Code.CORRUPT),
        (lambda path: os.truncate(path, 20_000), Code.CORRUPT),
        (lambda path: overwrite(path, 8192, os.urandom(60_000)), Code.CORRUPT),
        (lambda path: overwrite(path, 68, struct.pack(">I", 1)), Code.CORRUPT),
        (lambda path: overwrite(path, 60, struct.pack(">I", 2)), Code.VERSION_MISMATCH),
    ],
    ids=["emptied", "text", "truncated", "overwritten", "another program's", "newer format"],
)
def test_a_file_that_is_not_ours_to_use_is_refused_and_not_touched(
    path: Path, damage: Callable[[Path], object], code: Code
) -> None:
    fill(path)
    damage(path)
    before = fingerprint(path.parent)
    error = refused(path)
    assert error.code is code
    assert str(path) in error.what
    assert error.remedy
    assert fingerprint(path.parent) == before
    assert list(before) == ["store.db"], "no -wal, -shm or copy may stay behind"


def test_a_damaged_file_with_a_log_beside_it_is_refused_and_not_touched(path: Path) -> None:
    fill(path)
    reader = sqlite3.connect(path)  # keeps the log when the writer closes
    reader.execute("SELECT count(*) FROM record").fetchone()
    fill(path)
    saved = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.name.startswith("store.db")}
    reader.close()
    for name, data in saved.items():
        (path.parent / name).write_bytes(data)
    assert (path.parent / "store.db-wal").stat().st_size > 0
    pages = path.stat().st_size // 4096
    for page in range(1, pages):  # the log still holds whole copies of the pages that it has; these are not in it
        overwrite(path, page * 4096, os.urandom(4096))
    wal = path.parent / "store.db-wal"
    os.truncate(wal, 32 + 24)  # a log without a whole frame repairs nothing
    before = fingerprint(path.parent)
    assert refused(path).code is Code.CORRUPT
    assert fingerprint(path.parent) == before


def test_a_file_torn_by_a_crash_that_its_log_repairs_is_accepted(path: Path) -> None:
    """As when the machine dies while the log is folded into the file: half of the pages are new, none is lost."""
    fill(path, commits=1)
    reader = sqlite3.connect(path)  # keeps the log when the writer closes
    reader.execute("SELECT count(*) FROM record").fetchone()
    fill(path, commits=2)
    saved = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.name.startswith("store.db")}
    reader.close()
    for name, data in saved.items():
        (path.parent / name).write_bytes(data)
    path.with_name("store.db-shm").unlink()  # gone with the machine
    wal = path.with_name("store.db-wal").read_bytes()
    logged = {int.from_bytes(wal[at : at + 4], "big") for at in range(32, len(wal), 24 + 4096)}
    torn = sorted(page for page in logged if 1 < page <= path.stat().st_size // 4096)
    assert torn
    for page in torn:
        overwrite(path, (page - 1) * 4096, os.urandom(4096))

    async def main() -> None:
        store = SqliteStore(path)
        await store.open()
        loaded = await store.load()
        assert loaded.revision == 3
        assert len(loaded.records) == 40
        await store.close()

    asyncio.run(main())


def test_every_acknowledged_commit_survives_kill_9(path: Path) -> None:
    acknowledged = 0
    for stop_after in (1, 7, 40, 150):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert writer.stdout is not None
        for _ in range(stop_after):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split("\n")
        writer.stdout.close()
        writer.wait(timeout=30)
        acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])

        async def check(acknowledged: int = acknowledged) -> int:
            store = SqliteStore(path)
            await store.open()
            loaded = await store.load()
            guard = await store.campaign("checker")
            await store.resign(guard)
            await store.close()
            assert loaded.revision in (acknowledged, acknowledged + 1)  # one may have been on its way
            assert set(loaded.records.values()) == {b"%d" % loaded.revision}
            assert len(loaded.records) == 20
            return guard.term

        term = asyncio.run(check())
    assert term == 8  # a writer and a checker, four times


def test_a_second_scheduler_is_told_who_has_the_file(path: Path) -> None:
    async def main() -> None:
        first = SqliteStore(path)
        await first.open()
        await first.campaign("scheduler-a")
        with pytest.raises(FalError) as caught:
            await SqliteStore(path).open()
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert f"scheduler-a (pid {os.getpid()})" in caught.value.what
        await first.close()

    asyncio.run(main())


def test_a_waiting_scheduler_takes_over_from_a_killed_one(path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert writer.stdout is not None
    writer.stdout.readline()

    async def main() -> None:
        standby = SqliteStore(path, standby=True)
        await standby.open()
        waiting = asyncio.create_task(standby.campaign("standby"))
        done, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert not done
        writer.kill()
        guard = await asyncio.wait_for(waiting, 20.0)
        assert guard.term == 2
        loaded = await standby.load()
        assert await standby.commit(guard, [Write("after", b"1")]) == loaded.revision + 1
        await standby.close()

    try:
        asyncio.run(main())
    finally:
        writer.kill()
        writer.stdout.close()
        writer.wait(timeout=30)


def test_a_file_at_its_bound_fails_commits_clearly_and_serves_on(path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(path, file_bytes_max=40 * 4096)
        await store.open()
        guard = await store.campaign("one")
        error = await fill_until_refused(store.commit, guard)
        assert error.code is Code.STORE_FAILED
        assert "full" in error.what
        before = await store.load()
        assert await store.commit(guard, [Write("k0", None), Write("k1", None)]) == before.revision + 1
        assert await store.commit(guard, [Write("small", b"1")]) == before.revision + 2
        await store.close()

    asyncio.run(main())


@pytest.mark.root
def test_a_full_disk_fails_commits_clearly_and_the_store_goes_on_when_there_is_room(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)

    async def main() -> None:
        store = SqliteStore(disk / "store.db")
        await store.open()
        guard = await store.campaign("one")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(400_000))
        error = await fill_until_refused(store.commit, guard)
        assert error.code is Code.STORE_FAILED
        before = await store.load()
        ballast.unlink()
        assert await store.commit(guard, [Write("after", b"1")]) == before.revision + 1
        await store.close()
        again = SqliteStore(disk / "store.db")
        await again.open()
        assert (await again.load()).records == {**before.records, "after": b"1"}
        await again.close()

    try:
        asyncio.run(main())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


async def fill_until_refused(commit: Callable[..., Awaitable[int]], guard: object) -> FalError:
    for n in range(2000):
        try:
            await commit(guard, [Write(f"k{n}", os.urandom(20_000))])
        except FalError as error:
            return error
    raise AssertionError("the store never got full")


def test_a_file_replaced_under_the_store_is_noticed(path: Path) -> None:
    fill(path)

    async def main() -> None:
        store: Store = SqliteStore(path)
        await store.open()
        guard = await store.campaign("one")
        copy = path.with_name("copy.db")
        copy.write_bytes(path.read_bytes())
        copy.rename(path)
        with pytest.raises(FalError) as caught:
            await store.commit(guard, [Write("a", b"1")])
        assert caught.value.code is Code.STORE_FAILED
        assert "replaced" in caught.value.what
        await store.close()

    asyncio.run(main())


def test_a_crash_while_the_store_is_made_leaves_nothing_in_the_way(path: Path) -> None:
    path.with_name("store.db.new").write_bytes(b"half of a new store")
    fill(path, commits=1)
    assert fingerprint(path.parent).keys() == {"store.db"}


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = refused(tmp_path / "file" / "store.db")
    assert error.code is Code.STORE_FAILED
    assert "cannot be opened" in error.what
