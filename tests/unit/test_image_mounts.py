"""Unmounting an image whose umount hangs: one thread for it, a bound for who waits, nothing of the next mount's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fal_contract.errors import FalError
from fal_runtime.oci import image_mounts, mounts
from fal_runtime.oci.image_mounts import ImageMounts

ID = "ab" * 32
TIMEOUT_S = 20.0


class Kernel:
    """What is mounted where; an umount hangs until `goes_on`."""

    def __init__(self) -> None:
        self.mounted: set[Path] = set()
        self.goes_on = threading.Event()
        self.began = 0

    def umount(self, place: Path) -> None:
        self.began += 1
        self.mounted.discard(place)  # detached at once; what hangs is its end
        assert self.goes_on.wait(TIMEOUT_S)

    def device_at(self, place: Path) -> int | None:
        return 7 if place in self.mounted else None


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel()
    monkeypatch.setattr(mounts, "umount", made.umount)
    monkeypatch.setattr(image_mounts, "_device_at", made.device_at)
    monkeypatch.setattr(image_mounts, "STUCK_S", 0.05)
    monkeypatch.setattr(image_mounts, "ABORTED_S", 0.05)
    yield made
    made.goes_on.set()


def test_a_hung_unmount_is_one_thread_and_leaves_the_next_mount_alone(kernel: Kernel, tmp_path: Path) -> None:
    async def main() -> None:
        images, place = ImageMounts(tmp_path, lambda _: frozenset()), tmp_path / ID
        kernel.mounted.add(place)
        for _ in range(5):
            with pytest.raises(FalError, match="cannot be unmounted"):
                await images.release(ID)
        assert kernel.began == 1
        attempt = images._unmounting[ID]
        kernel.mounted.add(place)  # another container came
        kernel.goes_on.set()
        await asyncio.wait_for(asyncio.wait({attempt.end}), TIMEOUT_S)
        assert place in kernel.mounted
        assert await images.release(ID)
        assert (kernel.mounted, images._unmounting, images._locks) == (set(), {}, {})

    asyncio.run(main())


def test_locks_go_with_their_last_user(kernel: Kernel, tmp_path: Path) -> None:
    async def main() -> None:
        images = ImageMounts(tmp_path, lambda _: frozenset())
        kernel.goes_on.set()
        async with images._locked(ID):
            waiting = asyncio.create_task(images.release(ID))
            await asyncio.sleep(0)
            assert images._locks[ID].users == 2
        assert await waiting
        assert images._locks == {}
        with pytest.raises(FalError, match="not a file name"):
            await images.release("../x")

    asyncio.run(main())


def test_an_abort_leaves_the_control_filesystem_as_it_was(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.goes_on.set()
    monkeypatch.setattr(image_mounts, "_FUSE", tmp_path)

    def mount(_source: str, target: Path, *_more: object) -> None:
        kernel.mounted.add(target)
        (tmp_path / "42").mkdir()

    monkeypatch.setattr(mounts, "mount", mount)
    image_mounts._abort(42)
    assert (tmp_path / "42" / "abort").read_text() == "1"
    assert (kernel.began, kernel.mounted) == (1, set())
    (tmp_path / "42" / "abort").unlink()
    image_mounts._abort(42)  # it is mounted by others now: left there
    assert (tmp_path / "42" / "abort").exists()
    assert kernel.began == 1
