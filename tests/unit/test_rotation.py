"""The last parts of a log that is replaced under its name, as conmon does it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from fal_runtime.log_file import tail
from fal_runtime.oci.rotation import Rotations, settle

TIMEOUT_S = 20.0


def line(text: str) -> bytes:
    return f"2026-11-21T00:00:00.5+00:00 stdout F {text}\n".encode()


def rotate(log: Path, text: str) -> None:
    """A new file over the old one."""
    fresh = log.with_name("log.tmp")
    fresh.write_bytes(line(text))
    fresh.rename(log)


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not done():  # noqa: ASYNC110  (of the file system)
            await asyncio.sleep(0)


def shown(log: Path) -> list[str]:
    return [one.text for one in tail(log, 100)]


def test_what_was_written_before_a_rotation_stays(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(line("one"))

    async def main() -> None:
        rotations = Rotations()
        rotations.watch(log)
        rotations.watch(log)
        with log.open("ab") as file:
            file.write(line("two"))
        for text, before in (("three", ["one", "two"]), ("four", ["three"]), ("five", ["four"])):
            rotate(log, text)
            await until(lambda before=before: shown(log)[:-1] == before)  # type: ignore[misc]
        assert len(list(tmp_path.iterdir())) == 3
        rotations.drop(log)
        assert shown(log) == ["four", "five"]

    asyncio.run(main())


def test_a_rotation_that_nobody_saw_is_settled_later(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(line("one"))
    settle(log)
    rotate(log, "two")
    settle(log)
    settle(log)
    assert shown(log) == ["one", "two"]
    log.unlink()
    settle(log)  # between two names: nothing is lost
    assert (tmp_path / "log.held").exists()
    settle(tmp_path / "none" / "log")


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        rotations = Rotations()
        logs = [tmp_path / str(n) / "log" for n in range(3)]
        for log in logs:
            log.parent.mkdir()
            log.write_bytes(b"")
            rotations.watch(log)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        for log in logs:
            rotations.drop(log)
        assert len(os.listdir("/proc/self/fd")) == before
        rotations.watch(logs[0])
        rotations.close()
        rotations.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())
