"""Recordings of starts: each ends, by question, by time or because it could not begin."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from fal_contract.artifact import Artifact, ArtifactFile
from fal_contract.errors import Code, FalError
from fal_fsd.ports import InFlight, Part
from fal_fsd.recording import RECORDING_S, RECORDINGS_MAX, Recordings
from virtual_time import run_virtually


class Mounts:
    """What Recordings asks of the mounts, with the parts that are open."""

    def __init__(self) -> None:
        self.available = ""
        self.refuses = False
        self.parts: dict[str, Part] = {}

    async def open(self, part: Part) -> Path:
        await asyncio.sleep(1.0)
        if self.refuses:
            raise FalError(Code.NO_CAPACITY, "too many mounts", remedy="-")
        self.parts[part.artifact.id] = part
        return Path("/mounts") / part.artifact.id

    async def close(self, artifact_id: str) -> None:
        await asyncio.sleep(1.0)
        del self.parts[artifact_id]

    def take_access(self, artifact_id: str) -> list[int]:
        return [2, 1] if artifact_id in self.parts else []


Scenario = Callable[[Mounts, InFlight, Recordings], Awaitable[None]]


def play(scenario: Scenario) -> None:
    async def main() -> None:
        mounts = Mounts()
        await scenario(mounts, cast(InFlight, mounts), Recordings())

    run_virtually(main())


def image(number: int) -> Artifact:
    files = (ArtifactFile("image.erofs", 4),)
    return Artifact(f"{number:064x}", "image", "file:///x", 4, files)


def test_a_recording_that_nobody_asks_for_ends_by_itself(tmp_path: Path) -> None:
    async def scenario(mounts: Mounts, mount: InFlight, recordings: Recordings) -> None:
        for number in range(RECORDINGS_MAX):
            assert await recordings.open(mount, image(number), tmp_path) is not None
        assert await recordings.open(mount, image(99), tmp_path) is None
        assert len(mounts.parts) == RECORDINGS_MAX
        await asyncio.sleep(RECORDING_S / 2)
        assert await recordings.open(mount, image(0), tmp_path) is not None  # begins its time anew
        await asyncio.sleep(RECORDING_S / 2 + 10.0)
        assert mounts.parts.keys() == {image(0).id}
        assert await recordings.open(mount, image(99), tmp_path) is not None
        await asyncio.sleep(RECORDING_S + 10.0)
        assert mounts.parts == {}

    play(scenario)


def test_what_was_asked_for_is_over_once(tmp_path: Path) -> None:
    async def scenario(mounts: Mounts, mount: InFlight, recordings: Recordings) -> None:
        await recordings.open(mount, image(1), tmp_path)
        assert await recordings.take(mount, image(1).id) == [2, 1]
        assert mounts.parts == {}
        assert await recordings.take(mount, image(1).id) == []
        await asyncio.sleep(2 * RECORDING_S)  # its time is over, too: nothing is closed twice

    play(scenario)


def test_a_mount_that_fails_leaves_nothing_and_the_plain_folder_is_used(tmp_path: Path) -> None:
    async def scenario(mounts: Mounts, mount: InFlight, recordings: Recordings) -> None:
        mounts.refuses = True
        for number in range(2 * RECORDINGS_MAX):
            assert await recordings.open(mount, image(number), tmp_path) is None
        mounts.refuses = False
        assert await recordings.open(mount, image(1), tmp_path) is not None
        await recordings.take(mount, image(1).id)

    play(scenario)


@pytest.mark.parametrize("after_s", [0.5, 1.5])
def test_who_gives_up_halfway_leaves_a_recording_that_ends(tmp_path: Path, after_s: float) -> None:
    async def scenario(mounts: Mounts, mount: InFlight, recordings: Recordings) -> None:
        async def start() -> None:
            await recordings.open(mount, image(1), tmp_path)
            await recordings.take(mount, image(1).id)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(after_s):
                await start()
        await recordings.take(mount, image(1).id)
        assert mounts.parts == {}

    play(scenario)
