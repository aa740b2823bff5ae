"""Container logs: the line format, tails, rotation under a reader, and waiting for changes."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.limits import LOG_LINE_BYTES_MAX
from fal_runtime import log_file
from fal_runtime.driver import LogLine
from fal_runtime.log_file import Follower, LineAssembler, read_log, tail
from fal_runtime.process_supervisor import Log
from fal_runtime.watch import Watcher

STAMP = "2026-11-21T00:06:35.250000000+00:00"
STAMP_S = 1795219595.25


def record(text: str, *, stream: str = "stdout", end: str = "F") -> bytes:
    return f"{STAMP} {stream} {end} {text}\n".encode()


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", codec="utf-8"), max_size=50)), st.integers(1, 64))
def test_any_cut_of_the_file_gives_the_same_lines(texts: list[str], step: int) -> None:
    data = b"".join(record(text) for text in texts)
    assembler = LineAssembler()
    lines = [line for at in range(0, len(data), step) for line in assembler.feed(data[at : at + step])]
    assert [line.text for line in lines] == texts
    assert {line.time_s for line in lines} <= {STAMP_S}


def test_parts_are_joined_per_stream_and_bounded() -> None:
    assembler = LineAssembler()
    data = record("a", end="P") + record("x", stream="stderr") + record("b") + record("y" * (LOG_LINE_BYTES_MAX + 9))
    first, second, third = assembler.feed(data)
    assert first == LogLine(STAMP_S, "stderr", "x")
    assert second == LogLine(STAMP_S, "stdout", "ab")
    assert third.text == "y" * LOG_LINE_BYTES_MAX + "…"


@pytest.mark.parametrize("bad", [b"\n", b"cut off\n", b"when stdout F x\n", b"\xff stdout F x\n", b"x stdin F x\n"])
def test_damaged_records_are_skipped(bad: bytes) -> None:
    assert [line.text for line in LineAssembler().feed(bad + record("good"))] == ["good"]


def test_bytes_that_are_not_text_are_replaced() -> None:
    (line,) = LineAssembler().feed(f"{STAMP} stdout F ".encode() + b"\xff!\n")
    assert line.text == "\N{REPLACEMENT CHARACTER}!"


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_tail_reads_back_as_far_as_needed(tmp_path: Path, count: int) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(record(f"line {n} F F F {'x' * 40}") for n in range(5000)))
    texts = [line.text.split(" F")[0] for line in tail(path, count)]
    assert texts == [f"line {n}" for n in range(5000 - count, 5000)]
    assert tail(tmp_path / "none", 5) == []
    assert tail(path, 0) == []


def test_what_is_written_while_the_tail_is_read_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.write_bytes(record("before"))
    real = log_file._FINISHED

    class Meanwhile:
        """Somebody writes between the tail's reads."""

        def findall(self, block: bytes) -> list[bytes]:
            with log.open("ab") as file:
                file.write(record("meanwhile"))
            return real.findall(block)

    monkeypatch.setattr(log_file, "_FINISHED", Meanwhile())
    follower = Follower(log, tail_lines=10)
    lines = [*follower.first, *(line for lines in follower.read() for line in lines)]
    follower.close()
    assert [line.text for line in lines] == ["before", "meanwhile"]


def test_the_supervisors_log_is_bounded_and_read_across_rotation(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", 20_000)
    follower = Follower(tmp_path / "log", tail_lines=0)
    seen: list[str] = []
    for number in range(2000):
        log.feed("stdout", f"number {number}\n".encode())
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
        if number % 7 == 0:
            seen += [line.text for lines in follower.read() for line in lines]
    seen += [line.text for lines in follower.read() for line in lines]
    follower.close()
    log.close()
    assert seen == [f"number {n}" for n in range(2000)]
    assert [line.text for line in tail(tmp_path / "log", 150)][-1] == "number 1999"
    assert len(tail(tmp_path / "log", 150)) == 150  # from both files


def test_the_supervisors_log_splits_lines_without_end(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", 1 << 20)
    log.feed("stdout", b"z" * 9000)
    log.feed("stdout", b"end", end=True)
    log.close()
    (line,) = tail(tmp_path / "log", 5)
    assert line.text.startswith("zzz")
    assert len(line.text) == LOG_LINE_BYTES_MAX + 1


def test_follow_sees_lines_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "FOLLOW_RECHECK_S", 100.0)

    async def main() -> float:
        path, done = tmp_path / "log", asyncio.Event()
        path.write_bytes(record("old"))

        async def ended() -> bool:
            return done.is_set()

        lines = read_log(path, Watcher(), ended, tail_lines=1, follow=True)
        async with aclosing(lines):
            assert (await anext(lines)).text == "old"
            waiting = asyncio.ensure_future(anext(lines))
            await asyncio.sleep(0)
            started_s = time.monotonic()
            with path.open("ab") as file:
                file.write(record("new"))
            assert (await waiting).text == "new"
            took_s = time.monotonic() - started_s
            done.set()
            with path.open("ab") as file:
                file.write(record("last"))
            assert [line.text async for line in lines] == ["last"]
        return took_s

    assert asyncio.run(main()) < 50  # else the fallback found them


def test_a_flood_leaves_the_loop_to_others(tmp_path: Path) -> None:
    """Also where nobody who reads the lines ever waits."""

    async def main() -> None:
        path, turns, over = tmp_path / "log", 0, False
        path.write_bytes(record("old"))

        async def ended() -> bool:
            return True

        async def others() -> None:
            nonlocal turns
            while not over:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(others())
        lines = read_log(path, Watcher(), ended, tail_lines=1, follow=True)
        async with aclosing(lines):
            assert (await anext(lines)).text == "old"
            flood = record("x" * 100) * 10_000
            with path.open("ab") as file:
                file.write(flood)
            before = turns
            assert len([line async for line in lines]) == 10_000
        over = True
        await counting
        assert turns - before >= len(flood) // log_file._BLOCK_BYTES

    asyncio.run(main())


def test_a_watcher_closes_what_it_opened(tmp_path: Path) -> None:
    async def main() -> None:
        watcher = Watcher()
        before = len(os.listdir("/proc/self/fd"))
        with watcher.subscribe(tmp_path) as one, watcher.subscribe(tmp_path) as two:
            (tmp_path / "file").write_text("x")
            started_s = time.monotonic()
            await one.changed(100.0)
            await two.changed(100.0)
            assert time.monotonic() - started_s < 50
            assert len(os.listdir("/proc/self/fd")) == before + 1
        with watcher.subscribe(tmp_path / "none") as nothing:
            await nothing.changed(0.01)  # cannot be watched: times out
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())
    asyncio.run(main())  # in another loop, too
