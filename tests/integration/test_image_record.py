"""Recorded starts at a real cache: what is read through the mount is told in order, also of what is whole already."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from fal_contract.clock import SystemClock
from fal_contract.v1 import agent_pb2
from fal_fsd.mount import kernel, probe
from fal_fsd.mount.keeper import Keeper
from fal_fsd.mount.probe import YES
from fsd_rig import Rig, plain_message, running, write

pytestmark = pytest.mark.root
PIECE = 256 << 10
CONTENTS = {"config.json": b"{}", "image.erofs": bytes(range(256)) * (9 * PIECE // 256)}
TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def _needs_fuse(tmp_path: Path) -> None:
    if (why := probe(tmp_path)["fuse"]) != YES:
        pytest.skip(why)


def image_message(origin: Path) -> agent_pb2.Artifact:
    message = plain_message(write(origin, CONTENTS), CONTENTS)
    message.kind = "image"
    return message


async def read(path: Path, *offsets: int) -> None:
    """In another process: the mount is served by this one."""
    for offset in offsets:
        argv = ["dd", f"if={path}", "of=/dev/null", "bs=4096", "count=1", f"skip={offset // 4096}", "status=none"]
        await asyncio.to_thread(subprocess.run, argv, check=True, timeout=TIMEOUT_S)


async def recorded(rig: Rig, message: agent_pb2.Artifact) -> None:
    [artifact_id] = [found.artifact_id for found in await rig.client.artifacts()]
    folder, whole = await rig.client.view(message, "r", record=True)
    assert not whole
    assert await rig.client.view(message, "r", record=True) == (folder, False)
    await read(folder / "image.erofs", 5 * PIECE, 0, 5 * PIECE + 4096, 3 * PIECE)
    with await asyncio.to_thread(open, folder / "image.erofs", "rb") as held:
        # Piece 0 is config.json's.
        assert await rig.client.take_access(artifact_id) == [6, 1, 4]
        assert await rig.client.take_access(artifact_id) == []
        assert not kernel.mounted_below(rig.folder / "state" / "mounts")
        held.seek(8 * PIECE)
        assert await asyncio.to_thread(held.read, 4096) == CONTENTS["image.erofs"][8 * PIECE : 8 * PIECE + 4096]
    assert (await rig.client.view(message, "r"))[1]


def test_a_start_from_a_whole_image_is_recorded(tmp_path: Path) -> None:
    message = image_message(tmp_path / "origin")

    async def main() -> None:
        async with asyncio.timeout(TIMEOUT_S), running(tmp_path, mount="auto") as rig:
            await rig.client.stage(message, "r")
            await recorded(rig, message)

    try:
        asyncio.run(main())
    finally:
        Keeper((tmp_path / "state" / "mounts").absolute(), SystemClock()).end()
        assert not kernel.mounted_below((tmp_path / "state" / "mounts").absolute())


def test_nothing_is_recorded_without_mounts(tmp_path: Path) -> None:
    message = image_message(tmp_path / "origin")

    async def main() -> None:
        async with asyncio.timeout(TIMEOUT_S), running(tmp_path) as rig:
            await rig.client.stage(message, "r")
            assert (await rig.client.view(message, "r", record=True))[1]
            [found] = await rig.client.artifacts()
            assert await rig.client.take_access(found.artifact_id) == []

    asyncio.run(main())
