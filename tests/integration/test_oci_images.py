"""Containers of real images on a real runtime: roots, users, bounds, hostile images, what is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_runtime.driver import ContainerSpec, ContainerStatus, Image, Resources
from fal_runtime.oci import mounts
from fal_runtime.oci.driver import OciDriver
from image_folders import image_of, make_folder, tools_missing

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
    pytest.mark.skipif(bool(tools_missing()), reason=f"no images here: {tools_missing()}"),
]
TIMEOUT_S = 60.0
MIB = 1 << 20


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    made = OciDriver(tmp_path / "state")
    yield made
    run(made.clean(frozenset()))
    made.close()
    assert [point for point in mounts.mount_points() if made._run in point.parents] == []


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


def spec_of(image: Image, *command: str, **more: Any) -> ContainerSpec:
    more.setdefault("resources", Resources(scratch_bytes=4 * MIB, pids_max=64))
    return ContainerSpec(id=f"t-{os.urandom(4).hex()}", command=command, image=image, **more)


async def finished(driver: OciDriver, spec: ContainerSpec) -> tuple[ContainerStatus, list[str]]:
    """Run to its end; what it said."""
    await driver.create(spec)
    await driver.start(spec.id)
    status = await driver.wait(spec.id)
    return status, [line.text async for line in driver.logs(spec.id, tail_lines=10_000, follow=False)]


async def up(driver: OciDriver, spec: ContainerSpec) -> str:
    """Start it and return its first line."""
    await driver.create(spec)
    await driver.start(spec.id)
    async with aclosing(driver.logs(spec.id, tail_lines=1, follow=True)) as lines:
        async for line in lines:
            return line.text
    raise AssertionError(f"{spec.id} ended without a word: {await driver.status(spec.id)}")


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


@pytest.mark.parametrize("format", ["erofs", "squashfs"])
def test_a_container_runs_from_an_image(driver: OciDriver, tmp_path: Path, format: str) -> None:
    image = image_of(make_folder(tmp_path / "i", format=format))
    script = (
        "id -u; stat -c %u:%a /etc/only-root; cat /etc/only-root; echo new >/etc/new; cat /etc/new; cat /etc/hostname"
    )
    status, lines = run(finished(driver, spec_of(image, *shell(script))))
    assert status.exit_code == 0, lines
    assert lines == ["0", "0:600", "secret of the image's root", "new", "runner"]
    assert not (tmp_path / "i" / "new").exists()


def test_the_image_names_the_process(driver: OciDriver, tmp_path: Path) -> None:
    config = {
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id; echo $GREETING; echo $HOME; pwd; echo $FAL_X"], "User": "worker",
        "Env": ["GREETING=hello", "FAL_X=no"], "WorkingDir": "/var",
    }  # fmt: skip
    image = image_of(make_folder(tmp_path / "i", config=config))
    status, lines = run(finished(driver, spec_of(image, env={"FAL_X": "ours"})))
    assert status.exit_code == 0, lines
    assert lines == ["uid=1000(worker) gid=1000(worker) groups=44(video)", "hello", "/home/worker", "/var", "ours"]
