"""Containers of images that still arrive: reads wait, the plain file takes over beneath them, a kill is a kill."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_fsd.mount.probe import YES, probe
from fal_runtime.driver import ContainerSpec, Image, Resources
from fal_runtime.oci import loop, mounts
from fal_runtime.oci.driver import OciDriver
from image_folders import make_folder, tools_missing
from mount_rig import Forks, Rig, rig

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
    pytest.mark.skipif(bool(tools_missing()), reason=f"no images here: {tools_missing()}"),
]
PIECE = 1 << 16
FILE_BYTES = 1 << 20
NAMES = ("a", "b", "c")
TIMEOUT_S = 120.0
DOWN_TIMEOUT_S = 15.0
GO_ON = "until [ -e /models/go ]; do sleep 0.05; done"


def content(name: str) -> bytes:
    return random.Random(name).randbytes(FILE_BYTES)


def digest(name: str) -> str:
    return f"{hashlib.md5(content(name)).hexdigest()}  /data/{name}"


def add_data(root: Path) -> None:
    (root / "data").mkdir()
    for name in NAMES:
        (root / "data" / name).write_bytes(content(name))


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[OciDriver]:
    made = OciDriver(tmp_path / "state")
    yield made
    run(made.clean(frozenset()))
    made.close()
    assert [point for point in mounts.mount_points() if made._run in point.parents] == []


@pytest.fixture(params=["erofs", "squashfs"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """A mount of an image, nothing of which is here; peers give at once what is asked for, but a part of /data/b."""
    if (why := probe(tmp_path)["fuse"]) != YES:
        pytest.skip(why)
    folder = make_folder(tmp_path / "packed", format=request.param, change=add_data)
    files = [[path.name, path.stat().st_size] for path in sorted(folder.iterdir())]
    spec = {"files": files, "piece_bytes": PIECE, "seed": 1, "folder": str(folder)}
    forks = Forks()
    try:
        with rig(forks, tmp_path / "fsd", [spec], read_timeout_s=TIMEOUT_S) as made:
            made.serve(give=True, withheld=[piece_of("b", made)])
            made.do("open")
            yield made
    finally:
        forks.close()


def piece_of(name: str, served: Rig) -> int:
    """A piece with bytes of the middle of /data/NAME. What is read ahead of a reader depends on the moment, so which
    pieces are here by then does; this one is only when a test says so."""
    artifact = served.artifacts[0]
    middle = content(name)[FILE_BYTES // 2 :][:512]  # random bytes are packed as they are
    for index, file in enumerate(artifact.files):
        if (at := served.content(file.path).find(middle)) >= 0:
            return artifact.layout.covering(index, at, 1).start
    raise AssertionError(f"/data/{name} is not in the image as it is")


async def until_waiting(served: Rig) -> None:
    """The container's read of what is withheld has arrived at the server."""
    await say(served, "until_waiting_for", piece=piece_of("b", served))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


def arriving(served: Rig) -> Image:
    artifact = served.artifacts[0].id
    return Image(artifact, served.folder / artifact, finished=False)


def spec_of(image: Image, script: str, tmp_path: Path) -> ContainerSpec:
    return ContainerSpec(
        id=f"arriving-{os.urandom(4).hex()}", command=("/bin/sh", "-c", script), image=image,
        models_dir=tmp_path / "models", resources=Resources(scratch_bytes=1 << 20),
    )  # fmt: skip


async def follow(driver: OciDriver, id: str, acts: list[Callable[[], Coroutine[Any, Any, Any]]]) -> list[str]:
    """What the container says until it ends; after each of its lines the next act is done."""
    said: list[str] = []
    async with aclosing(driver.logs(id, tail_lines=10, follow=True)) as lines:
        async for line in lines:
            said.append(line.text)
            if acts:
                await acts.pop(0)()
    return said


async def say(served: Rig, op: str, **words: Any) -> Any:
    return await asyncio.to_thread(served.do, op, **words)


async def go(driver: OciDriver, id: str, tmp_path: Path) -> None:
    await driver.attach_model(id, "go", tmp_path)


def test_a_container_reads_what_comes_and_then_the_plain_file(driver: OciDriver, served: Rig, tmp_path: Path) -> None:
    image, plain = arriving(served), tmp_path / "packed"
    spec = spec_of(image, f"md5sum /data/a; {GO_ON}; md5sum /data/b /data/a", tmp_path)

    async def finish() -> None:
        await say(served, "give", on=False)
        await driver.image_finished(Image(image.id, plain))
        await driver.image_finished(Image(image.id, plain))
        await say(served, "close")
        await say(served, "until_lingering", count=0)  # nothing on this machine has the FUSE mount open
        await say(served, "stop", keep=False)
        served.server.kill()
        await go(driver, spec.id, tmp_path)

    async def main() -> list[str]:
        await driver.create(spec)
        await driver.start(spec.id)
        return await follow(driver, spec.id, [finish])

    assert run(main()) == [digest(name) for name in "aba"]
    assert run(driver.wait(spec.id)).exit_code == 0


def test_fsd_is_killed_while_a_container_waits_for_its_image(driver: OciDriver, served: Rig, tmp_path: Path) -> None:
    if served.status["modes"]["resend"] != YES:
        pytest.skip("requests cannot be sent again here")
    spec = spec_of(arriving(served), f"echo up; {GO_ON}; md5sum /data/b", tmp_path)

    async def kill() -> None:
        await go(driver, spec.id, tmp_path)
        await until_waiting(served)
        await asyncio.to_thread(served.server.kill)
        await asyncio.to_thread(lambda: served.serve(give=True))

    async def main() -> list[str]:
        await driver.create(spec)
        await driver.start(spec.id)
        return await follow(driver, spec.id, [kill])

    assert run(main()) == ["up", digest("b")]


def test_a_peer_that_never_answers_holds_up_neither_kill_nor_unmount(
    driver: OciDriver, served: Rig, tmp_path: Path
) -> None:
    spec = spec_of(arriving(served), f"echo up; {GO_ON}; md5sum /data/b", tmp_path)

    async def main() -> None:
        await driver.create(spec)
        await driver.start(spec.id)
        async with aclosing(driver.logs(spec.id, tail_lines=10, follow=True)) as lines:
            assert (await anext(lines)).text == "up"
        await go(driver, spec.id, tmp_path)
        await until_waiting(served)
        place = driver._place.images.folder / arriving(served).id
        number = os.minor(os.stat(place).st_dev)
        async with asyncio.timeout(DOWN_TIMEOUT_S):
            await driver.remove(spec.id)
        async with asyncio.timeout(DOWN_TIMEOUT_S):
            assert await driver.clean(frozenset()) == [f"image mount {place.name}"]
        assert not place.exists()
        backing = await asyncio.to_thread(loop.backing, number, tmp_path)
        assert backing is None or backing[0] != os.stat(served.folder).st_dev

    run(main())


def test_an_image_is_taken_up_by_the_next_driver(driver: OciDriver, served: Rig, tmp_path: Path) -> None:
    """The agent was restarted while the image arrived; only the new one hears that it is whole."""
    image = arriving(served)
    spec = spec_of(image, f"md5sum /data/a; {GO_ON}; md5sum /data/b", tmp_path)

    async def restart() -> None:
        await say(served, "give", on=False)
        shutil.copytree(tmp_path / "packed", tmp_path / "plain")
        again = OciDriver(tmp_path / "state")
        assert await again.clean(frozenset({spec.id})) == []
        await again.image_finished(Image(image.id, tmp_path / "plain"))
        again.close()
        await go(driver, spec.id, tmp_path)

    async def main() -> list[str]:
        await driver.create(spec)
        await driver.start(spec.id)
        return await follow(driver, spec.id, [restart])

    assert run(main()) == [digest("a"), digest("b")]
