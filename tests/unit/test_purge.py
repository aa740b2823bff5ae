"""`fal-agent purge`: what cannot be taken away keeps nothing else running."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fal_agent import purge
from fal_agent.layout import Layout
from fal_contract.errors import Code, FalError

LISTEN = """
import signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("up", flush=True)
    signal.pause()
"""


class Broken:
    """A driver whose first container is damaged."""

    isolates = False

    def __init__(self) -> None:
        self.removed: list[str] = []

    async def list(self) -> list[Any]:
        return [SimpleNamespace(id="damaged"), SimpleNamespace(id="whole")]

    async def remove(self, id: str) -> None:
        if id == "damaged":
            raise ValueError("record.json is cut")
        self.removed.append(id)

    async def clean(self, keep: frozenset[str]) -> None:
        raise FalError(Code.DRIVER_FAILED, "clean: damaged, too", remedy="Look.")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "n")
    made.make()
    return made


@pytest.fixture
def listeners(layout: Layout) -> Iterator[list[subprocess.Popen[bytes]]]:
    """In the places of proxy and fsd; they answer nothing and do not end when asked to."""
    made = []
    for path in (layout.proxy_control, layout.fsd_socket):
        process = subprocess.Popen([sys.executable, "-c", LISTEN, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.stdout.close()
        made.append(process)
    yield made
    for process in made:
        process.kill()
        process.wait(10)


def test_what_fails_keeps_nothing_else_running(
    layout: Layout, listeners: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, told = Broken(), list[str]()
    monkeypatch.setattr(Layout, "driver_as_left", lambda self: driver)
    monkeypatch.setattr(purge, "_END_TIMEOUT_S", 0.2)
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(purge.purge(layout.state_dir, tell=told.append))
    assert [str(error).partition(".")[0] for error in caught.value.exceptions] == [
        "container damaged: ValueError('record",
        "clean: damaged, too",
    ]
    assert driver.removed == ["whole"]
    assert told == [
        "container whole",
        *(f"{n} {p.pid}" for n, p in zip(("fal-proxy", "fal-fsd"), listeners, strict=True)),
    ]
    assert [process.wait(10) for process in listeners] == [-9, -9]


def test_an_agent_that_died_just_now_is_waited_for_and_one_that_lives_is_not_disturbed(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, taken = 0, Layout.lock

    def held_twice(self: Layout) -> int:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise FalError(Code.ALREADY_EXISTS, "another agent", remedy="End it.")
        return taken(self)

    monkeypatch.setattr(Layout, "lock", held_twice)
    assert asyncio.run(purge.purge(layout.state_dir)) == []
    monkeypatch.setattr(purge, "_LOCK_WAIT_S", 0.0)
    tries = 0
    with pytest.raises(FalError, match="another agent"):
        asyncio.run(purge.purge(layout.state_dir))
