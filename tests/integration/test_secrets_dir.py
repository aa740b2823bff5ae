"""Secrets in real containers and processes: files in memory that their container alone can read, gone with it."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import Bench, oci_bench, oci_missing, process_bench
from fal_contract.errors import FalError
from fal_runtime import secrets_dir
from fal_runtime.driver import ContainerSpec

VALUE = b"hunter2\x00\xff in memory only"
LOOK = """
import json, os, pathlib
folder = pathlib.Path(os.environ["FAL_SECRETS_DIR"])
said = {path.name: path.read_bytes().hex() for path in sorted(folder.iterdir())}
said["modes"] = [oct(folder.stat().st_mode & 0o777)] + [oct(p.stat().st_mode & 0o777) for p in sorted(folder.iterdir())]
try:
    (folder / "mine").write_text("x")
    said["wrote"] = True
except OSError:
    said["wrote"] = False
said["folder"] = str(folder)
said["environ"] = "hunter" + "2" in str(os.environ)
print(json.dumps(said), flush=True)
while True:
    __import__("time").sleep(60)
"""


@pytest.fixture(params=["process", pytest.param("oci", marks=[pytest.mark.oci, pytest.mark.root])])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "oci" and oci_missing():
        pytest.skip(f"no containers here: {oci_missing()}")
    made = oci_bench(tmp_path) if request.param == "oci" else process_bench(tmp_path)
    yield made

    async def clean() -> None:
        await made.again().clean(frozenset())

    asyncio.run(clean())


async def first_line(bench: Bench, id: str) -> str:
    async with aclosing(bench.driver.logs(id, tail_lines=1, follow=True)) as lines:
        async for line in lines:
            return line.text
    raise AssertionError("it ended without a word")


def mounts() -> str:
    return Path("/proc/self/mounts").read_text()


def holding(needle: bytes, root: Path) -> list[Path]:
    """Files below `root` with these bytes."""
    return [
        path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and needle in path.read_bytes()
    ]


def test_a_container_reads_its_own_and_nothing_is_left(bench: Bench, tmp_path: Path) -> None:
    async def scenario() -> None:
        spec = bench.spec("sec", secrets={"token": VALUE, "b.json": b"{}"})
        spec = ContainerSpec(id=spec.id, command=(bench.python, "-c", LOOK), secrets=spec.secrets)
        before = mounts().count("falctl-secrets")
        async with asyncio.timeout(60):
            await bench.driver.create(spec)
            await bench.driver.start(spec.id)
            said = json.loads(await first_line(bench, spec.id))
            assert bytes.fromhex(said["token"]) == VALUE
            assert bytes.fromhex(said["b.json"]) == b"{}"
            assert said["modes"][1:] == ["0o400", "0o400"]
            assert said["modes"][0] in ("0o500", "0o700")
            assert not said["environ"]
            assert said["wrote"] is (bench.name == "process")
            status = await bench.driver.status(spec.id)
            assert status is not None
            assert b"hunter2" not in Path(f"/proc/{status.pid}/environ").read_bytes()
            assert b"hunter2" not in Path(f"/proc/{status.pid}/cmdline").read_bytes()
            assert holding(b"hunter2", tmp_path) == [], "not beside the container, not in its logs"
            place = Path(said["folder"])  # of the process driver: on the host
            if bench.name == "process":
                assert oct(place.stat().st_mode & 0o777) == "0o700"
            await bench.driver.remove(spec.id)
        assert mounts().count("falctl-secrets") == before
        assert not place.exists()

    asyncio.run(scenario())


@pytest.mark.root
def test_the_folder_is_read_only_and_cannot_hold_links(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    place = tmp_path / "s"
    try:
        secrets_dir.create(place, {"a": b"1" * 5000, "b": b""}, owner_uid=12345)
        assert (place / "a").read_bytes() == b"1" * 5000
        assert (place.stat().st_uid, (place / "a").stat().st_uid) == (12345, 12345)
        with pytest.raises(OSError, match="Read-only"):
            (place / "c").write_bytes(b"x")
        (line,) = [line for line in mounts().splitlines() if f" {place} " in line]
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(line.split()[3].split(","))
    finally:
        secrets_dir.remove(place)
    assert not place.exists()


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".x", "A"])
def test_names_that_are_no_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FalError, match="file name") as refused:
        secrets_dir.create_plain(tmp_path / "s", {name: VALUE})
    assert "hunter2" not in str(refused.value)
    assert not (tmp_path / "s").exists()
