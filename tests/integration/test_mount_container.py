"""Unfinished models in live containers: reads wait, the plain folder takes over, a kill is a kill."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_fsd.mount.probe import YES, probe
from fal_runtime import host_image
from fal_runtime.driver import ContainerSpec
from fal_runtime.oci.driver import OciDriver
from mount_rig import Forks, Rig, rig

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
PIECE = 1 << 16
SPEC: dict[str, Any] = {"files": [["sub/a.bin", 3 * PIECE]], "piece_bytes": PIECE, "seed": 9}
TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 15.0

READER = """
import hashlib, json, os, time

def say(what, data):
    print(json.dumps([what, hashlib.sha256(data).hexdigest(), len(data)]), flush=True)

PATH, PIECE = "/models/m/sub/a.bin", 1 << 16
print("ready", flush=True)
while not os.path.exists(PATH):
    time.sleep(0.01)
old = os.open(PATH, os.O_RDONLY)
host_uid = int(open("/proc/self/uid_map").read().split()[1])
print(json.dumps(["uid", os.getuid(), host_uid, oct(os.fstat(old).st_mode)]), flush=True)
say("first", os.pread(old, PIECE, 0))
while os.stat(PATH).st_dev == os.fstat(old).st_dev:
    time.sleep(0.01)
new = os.open(PATH, os.O_RDONLY)
say("new", os.pread(new, PIECE, PIECE))
say("old", os.pread(old, PIECE, 2 * PIECE))
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[OciDriver]:
    made = OciDriver(tmp_path / "state")
    yield made
    run(made.clean(frozenset()))
    made.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Rig]:
    """A mount of `SPEC`, nothing of which is here."""
    if (why := probe(tmp_path)["fuse"]) != YES:
        pytest.skip(why)
    forks = Forks()
    try:
        with rig(forks, tmp_path / "fsd", [SPEC], read_timeout_s=TIMEOUT_S) as made:
            made.serve()
            made.do("open")
            yield made
    finally:
        forks.close()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


def container(tmp_path: Path) -> ContainerSpec:
    python = host_image.this_layout().python
    return ContainerSpec(
        id=f"inflight-{os.urandom(4).hex()}", command=(python, "-c", READER), models_dir=tmp_path / "models"
    )


async def follow(driver: OciDriver, id: str, acts: dict[str, Callable[[], Coroutine[Any, Any, Any]]], last: str) -> Any:
    """What the container says by word, until `last`; after a word its act is done."""
    said: dict[str, Any] = {}
    async with aclosing(driver.logs(id, tail_lines=10, follow=True)) as lines:
        async for line in lines:
            word, *more = json.loads(line.text) if line.text.startswith("[") else [line.text]
            said[word] = more
            if word in acts:
                await acts[word]()
            if word == last:
                return said
    raise AssertionError(f"it ended: {said}")


def test_a_container_reads_what_comes_and_then_the_plain_files(driver: OciDriver, served: Rig, tmp_path: Path) -> None:
    content = served.content("sub/a.bin")
    plain = tmp_path / "plain"
    (plain / "sub").mkdir(parents=True)
    (plain / "sub" / "a.bin").write_bytes(content)
    spec = container(tmp_path)

    async def do(op: str, **words: Any) -> None:
        await asyncio.to_thread(served.do, op, **words)

    async def attach() -> None:
        await driver.attach_model(spec.id, "m", served.folder / served.artifacts[0].id)

    async def first_piece() -> None:
        await do("until_waiting", count=1)
        await do("put", pieces=[0])

    async def finish() -> None:
        await do("put", pieces=[1, 2])
        await driver.attach_model(spec.id, "m", plain)
        await do("close")
        await do("forget_part")

    async def main() -> Any:
        await driver.create(spec)
        await driver.start(spec.id)
        return await follow(driver, spec.id, {"ready": attach, "uid": first_piece, "first": finish}, "old")

    said = run(main())
    uid, host_uid, mode = said["uid"]
    assert (uid, mode) == (0, "0o100444")
    assert host_uid >= 100_000  # root of a user namespace, nobody here
    for word, piece in (("first", 0), ("new", 1), ("old", 2)):
        data = content[piece * PIECE : (piece + 1) * PIECE]
        assert said[word] == [hashlib.sha256(data).hexdigest(), PIECE], word


def test_a_container_that_waits_for_a_piece_is_killed_at_once(driver: OciDriver, served: Rig, tmp_path: Path) -> None:
    spec = container(tmp_path)

    async def main() -> None:
        await driver.create(spec)
        await driver.start(spec.id)
        mounted = served.folder / served.artifacts[0].id
        await follow(driver, spec.id, {"ready": lambda: driver.attach_model(spec.id, "m", mounted)}, "uid")
        await asyncio.to_thread(served.do, "until_waiting", count=1)
        async with asyncio.timeout(KILL_TIMEOUT_S):  # a bound that the operator relies on
            await driver.remove(spec.id)
        await asyncio.to_thread(served.do, "until_waiting", count=0)
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await asyncio.to_thread(served.do, "close")
            await asyncio.to_thread(served.do, "until_lingering", count=0)

    run(main())
