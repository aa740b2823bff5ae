"""The pool of prepared containers under calls that overlap: one becomes one container, and nobody's is taken away."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fal_contract.errors import Code, FalError
from fal_runtime.driver import ContainerSpec, Prepared
from fal_runtime.oci import prepared
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.prepared import Pool, shape_of
from fal_runtime.oci.record import ContainerFiles, Created

MODE = Mode("runc", True)
TIMEOUT_S = 10.0


def spec(tmp_path: Path, id: str, **more: Any) -> ContainerSpec:
    return ContainerSpec(id=id, command=("/bin/true",), socket_dir=tmp_path / id, **more)


class World:
    """A pool with ready containers that nothing is behind; taking one away waits until `free` says so."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        (tmp_path / "containers").mkdir()
        place = SimpleNamespace(
            prepared=tmp_path / "prepared", containers=tmp_path / "containers", layout=SimpleNamespace(env={})
        )
        self.pool = Pool(place)  # type: ignore[arg-type]
        self.dead: set[str] = set()
        self.discarded: list[str] = []
        self.became: list[tuple[str, str]] = []
        self.free, self.waiting = asyncio.Event(), asyncio.Event()
        shape = shape_of(spec(tmp_path, "x"), warm=False)
        for number in range(count):
            (tmp_path / "prepared" / f"pool-{number}").mkdir(parents=True)
            files = ContainerFiles(tmp_path / "prepared" / f"pool-{number}")
            created = Created(number, 1, 1, 1, "boot")
            self.pool._ready.append(prepared._Ready(files, shape, created))
        monkeypatch.setattr(prepared, "alive", lambda pid, ticks: f"pool-{pid}" not in self.dead)
        monkeypatch.setattr(prepared, "has_program", lambda pid, name, path: True)
        monkeypatch.setattr(self.pool, "_discard", self.discard)
        monkeypatch.setattr(self.pool, "_bind", lambda files, spec, text: self.became.append((files.id, spec.id)))

    async def discard(self, files: ContainerFiles) -> None:
        self.waiting.set()
        await self.free.wait()
        self.discarded.append(files.id)


def test_one_that_became_somebody_while_another_is_taken_away_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        world = World(tmp_path, monkeypatch, 3)
        emptying = asyncio.create_task(world.pool.prepare((), MODE))
        await world.waiting.wait()
        assert await world.pool.claim(spec(tmp_path, "a"))
        world.free.set()
        await emptying
        ((taken, who),) = world.became
        assert who == "a"
        assert sorted([taken, *world.discarded]) == ["pool-0", "pool-1", "pool-2"]

    asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))


def test_two_that_ask_at_once_get_different_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        world = World(tmp_path, monkeypatch, 2)
        world.dead.add("pool-0")
        first = asyncio.create_task(world.pool.claim(spec(tmp_path, "a")))
        await world.waiting.wait()  # it found pool-0 dead
        assert await world.pool.claim(spec(tmp_path, "b"))
        world.free.set()
        assert not await first
        assert (world.became, world.discarded) == ([("pool-1", "b")], ["pool-0"])

    asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))


@pytest.mark.parametrize("name", ["OPTIND", "UID", "IFS"])
def test_variables_that_a_shell_treats_in_its_own_way_are_left_to_the_cold_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With OPTIND=abc dash ends at once; bash lets nobody set UID."""

    async def main() -> None:
        world = World(tmp_path, monkeypatch, 1)
        assert not await world.pool.claim(spec(tmp_path, "a", env={name: "abc"}))
        assert await world.pool.claim(spec(tmp_path, "b", env={f"{name}_": "abc"}))

    asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))


def test_a_full_disk_is_an_error_that_the_agent_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> None:
        raise OSError(28, os.strerror(28), "/state/prepared/x")

    async def main() -> None:
        world = World(tmp_path, monkeypatch, 0)
        monkeypatch.setattr(world.pool, "_add", full)
        with pytest.raises(FalError, match="No space left") as told:
            await world.pool.prepare([Prepared(spec(tmp_path, "x"), 1)], MODE)
        assert told.value.code is Code.DRIVER_FAILED

    asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))


def test_cleaning_waits_for_what_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        world = World(tmp_path, monkeypatch, 0)
        made, go = asyncio.Event(), asyncio.Event()

        async def add(shape: ContainerSpec, mode: Mode) -> None:
            (tmp_path / "prepared" / "pool-9").mkdir(parents=True)
            made.set()
            await go.wait()
            files = ContainerFiles(tmp_path / "prepared" / "pool-9")
            world.pool._ready.append(prepared._Ready(files, shape, Created(9, 1, 1, 1, "boot")))

        monkeypatch.setattr(world.pool, "_add", add)
        making = asyncio.create_task(world.pool.prepare([Prepared(spec(tmp_path, "x"), 1)], MODE))
        await made.wait()
        cleaning = asyncio.create_task(world.pool.clean())
        go.set()
        await making
        assert await cleaning == []

    asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))
