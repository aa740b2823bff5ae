"""Containers over a real fal-fsd that is killed under them, and over an origin that never answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_contract.v1 import state_pb2
from fal_fsd.mount.probe import YES, probe
from fal_runtime import host_image
from fal_runtime.driver import ContainerSpec
from fal_runtime.oci.driver import OciDriver
from origin_servers import HttpOrigin
from weights_rig import PIECE, Chain, Node, asked, chain, contents_of, run

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
KILLS = 3
SIZE = 2 * PIECE
END_WITHIN_S = 15.0  # a bound that the operator relies on

READER = """
import hashlib, json, os, sys, threading, time

SIZE, NAME = int(sys.argv[1]), "file-0.safetensors"

def say(*words):
    print(json.dumps(words), flush=True)

def whole(path):
    fd, parts, at = os.open(path, os.O_RDONLY), hashlib.sha256(), 0
    say("open", path.split("/")[2])
    while at < SIZE and (data := os.pread(fd, 1 << 20, at)):
        parts.update(data)
        at += len(data)
    os.close(fd)
    return parts.hexdigest()

def finished():
    while True:
        try:
            with open("/models/plain/" + NAME, "rb") as file:
                file.read()
        except OSError as error:
            say("plain-failed", str(error))
        time.sleep(0.02)

say("ready")
for name in sys.argv[2:]:
    while not os.path.exists(f"/models/{name}/{NAME}"):
        time.sleep(0.01)
    if name == "plain":
        threading.Thread(target=finished, daemon=True).start()
    say("read", name, whole(f"/models/{name}/{NAME}"))
say("end")
"""


@asynccontextmanager
async def driving(folder: Path) -> AsyncIterator[OciDriver]:
    driver = OciDriver(folder)
    try:
        yield driver
    finally:
        await driver.clean(frozenset())
        driver.close()


def container(tmp_path: Path, *names: str) -> ContainerSpec:
    python = host_image.this_layout().python
    return ContainerSpec(
        id=f"faults-{os.urandom(4).hex()}", command=(python, "-c", READER, str(SIZE), *names),
        models_dir=tmp_path / "models",
    )  # fmt: skip


async def said(driver: OciDriver, id: str) -> AsyncGenerator[list[str], None]:
    """Line by line."""
    async with aclosing(driver.logs(id, tail_lines=50, follow=True)) as lines:
        async for line in lines:
            assert line.text.startswith("["), line.text
            yield json.loads(line.text)


class Models:
    """A finished one, and some whose origins give the first bytes only until they are let go."""

    def __init__(self, c: Chain, node: Node, stack: ExitStack) -> None:
        self.c = c
        self.node = node
        self.stack = stack
        self.models: dict[str, state_pb2.Model] = {}
        self.origins: dict[str, HttpOrigin] = {}
        self.digests: dict[str, str] = {}

    async def add(self, name: str) -> None:
        contents = contents_of(SIZE)
        self.digests[name] = hashlib.sha256(contents["file-0.safetensors"]).hexdigest()
        origin = self.origins[name] = self.stack.enter_context(HttpOrigin(contents))
        origin.put_list()
        self.models[name] = await self.c.add(name, origin.url)

    async def readable(self, name: str) -> Path:
        """Its mount; nobody has attested it, and its bytes do not come yet."""
        self.origins[name].faults.stall_after = PIECE // 2
        path, ready = await self.node.client.view(asked(self.models[name], allow_provisional=True), "runner")
        assert not ready
        assert path.parent.name == "mounts"
        return path

    def let_go(self, name: str) -> None:
        faults = self.origins[name].faults
        faults.stall_after = -1
        faults.go.set()


@asynccontextmanager
async def node_with_mounts(tmp_path: Path) -> AsyncIterator[Models]:
    if (why := probe(tmp_path)["fuse"]) != YES:
        pytest.skip(why)
    async with AsyncExitStack() as outer:
        c = await outer.enter_async_context(chain(tmp_path))
        node = await c.node("n1", "--mount", "auto")
        yield Models(c, node, outer.enter_context(ExitStack()))


def test_fsd_is_killed_three_times_under_a_container_that_opens_another_model_each_time(tmp_path: Path) -> None:
    names = [f"m{n}" for n in range(KILLS)]

    async def main() -> None:
        async with node_with_mounts(tmp_path) as models, driving(tmp_path / "driver") as driver:
            for name in ("plain", *names):
                await models.add(name)
            spec, node = container(tmp_path, "plain", *names), models.node
            await driver.create(spec)
            await driver.start(spec.id)
            ended = False
            async with aclosing(said(driver, spec.id)) as lines:
                async for word, *more in lines:
                    assert word != "plain-failed", more
                    if word == "ready":
                        await driver.attach_model(spec.id, "plain", await models.c.stage("n1", models.models["plain"]))
                    elif word == "open" and more[0] in names:
                        await node.kill()
                        await node.start()
                        models.let_go(more[0])
                    elif word == "read":
                        assert more[1] == models.digests[more[0]], more[0]
                        left = names[names.index(more[0]) + 1 :] if more[0] in names else names
                        if left:
                            await driver.attach_model(spec.id, left[0], await models.readable(left[0]))
                    ended = word == "end"
            assert ended

    run(main())


def test_a_container_and_a_mount_whose_origin_never_answers_end_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_with_mounts(tmp_path) as models, driving(tmp_path / "driver") as driver:
            await models.add("never")
            spec, node = container(tmp_path, "never"), models.node
            await driver.create(spec)
            await driver.start(spec.id)
            mounted = await models.readable("never")
            await driver.attach_model(spec.id, "never", mounted)
            async with aclosing(said(driver, spec.id)) as lines:
                async for word, *_ in lines:
                    if word == "open":
                        break
            async with asyncio.timeout(END_WITHIN_S):
                await driver.remove(spec.id)
                await node.client.unpin("runner")

                async def unmounted() -> bool:
                    return not os.path.ismount(mounted)

                await models.c.until(unmounted)
            assert node.exposed() == []
            assert not (await node.cached(models.models["never"])).artifact_id

    run(main())


def test_only_who_may_read_what_nobody_attested_is_told_its_mount(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_with_mounts(tmp_path) as models:
            await models.add("new")
            node, model = models.node, models.models["new"]
            await models.readable("new")
            waiting = asyncio.create_task(node.client.view(asked(model), "careful"))

            async def pinned() -> Any:
                return "careful" in (await node.cached(model)).pinned_by

            await models.c.until(pinned)
            assert not waiting.done()
            assert node.exposed() == []
            models.let_go("new")
            path, _ = await waiting
            manifest = (await models.c.model("new")).manifest_digest
            assert manifest, "it was attested before its mount was told"
            assert path.exists()

    run(main())
