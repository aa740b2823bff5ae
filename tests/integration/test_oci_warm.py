"""Warm workers in containers: they wait, are told once, and whoever is killed meanwhile leaves a whole one or none."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from contract.driver_cases import oci_missing
from fal_runtime import host_image
from fal_runtime.driver import ContainerSpec, Phase, Prepared, Resources
from fal_runtime.oci import cgroups, mounts, prepared
from fal_runtime.oci.driver import OciDriver
from fal_runtime.oci.record import alive
from worker_client import Client

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
TIMEOUT_S = 60.0
DIGITS = Path(__file__).resolve().parents[2] / "ops" / "models" / "digits"
PYTHON = host_image.this_layout().python
LIMITS = Resources(memory_bytes=256 << 20, pids_max=50)
# A warm worker whose libraries are loaded once the models directory holds "loaded"; then it is what it was told.
WARM = """
import os, time
from types import SimpleNamespace
from fal_runtime.worker import warm
threads = []
def load():
    while not os.path.exists("/models/loaded"):
        time.sleep(0.005)
    return SimpleNamespace(set_num_threads=threads.append)
arguments = warm.wait(load=load)
print(arguments, threads, sorted(k for k in os.environ if k.startswith(("FAL_", "A"))), flush=True)
time.sleep(600)
"""
HEARD = "['--model', '/m'] [3] ['A', 'FAL_MODELS_DIR', 'FAL_SOCKET_DIR']"


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    made = OciDriver(tmp_path / "state")
    yield made
    run(made.prepare(()))
    run(made.clean(frozenset()))
    made.close()


def run(main: Coroutine[Any, Any, Any], timeout_s: float = TIMEOUT_S) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(timeout_s):
            return await main

    return asyncio.run(bounded())


def spec_of(tmp_path: Path, name: str, **more: Any) -> ContainerSpec:
    return ContainerSpec(
        id=f"{name}-{os.urandom(4).hex()}",
        command=(PYTHON, "-m", "fal_runtime.worker", "--model", "/m"),
        env={"A": "1", "OMP_NUM_THREADS": "3"},
        resources=LIMITS,
        socket_dir=tmp_path / f"s-{name}",
        models_dir=tmp_path / f"m-{name}",
        warm_command=more.pop("warm_command", (PYTHON, "-c", WARM)),
        **more,
    )


def load(driver: OciDriver, ready: prepared._Ready) -> None:
    """Its libraries have come."""
    record = ready.files.record()
    assert record is not None
    (Path(record.models_dir) / "loaded").touch()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2 * TIMEOUT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def first_line(driver: OciDriver, id: str) -> str:
    async with aclosing(driver.logs(id, tail_lines=100, follow=True)) as lines:
        async for line in lines:
            return line.text
    raise AssertionError(f"{id} ended without a word: {await driver.status(id)}")


def adj(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()


def test_one_that_has_loaded_is_used_before_one_that_still_loads(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        specs = [spec_of(tmp_path, f"n{n}") for n in range(3)]
        await driver.prepare([Prepared(specs[0], 2, warm=True)])
        loading, loaded = driver._pool._ready
        assert adj(loaded.created.pid) == "1000"  # what nobody uses goes first when memory is short
        load(driver, loaded)
        await until(lambda: prepared.listens(loaded))
        assert not prepared.listens(loading)
        for spec, ready in ((specs[0], loaded), (specs[1], loading)):
            await driver.create(spec)
            assert (driver._containers / spec.id).resolve().name == ready.files.id
            created = await driver.status(spec.id)
            assert created is not None
            assert created.phase is Phase.CREATED
            await driver.start(spec.id)  # does not wait for libraries
            started = await driver.status(spec.id)
            assert started is not None
            assert (started.phase, started.pid) == (Phase.RUNNING, ready.created.pid)
            assert adj(ready.created.pid) == "500"
            load(driver, ready)
            assert await first_line(driver, spec.id) == HEARD
        await driver.create(specs[2])  # nothing is left: cold
        assert not (driver._containers / specs[2].id).is_symlink()

    run(main())


def test_it_is_like_any_container_when_it_runs(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        spec = spec_of(tmp_path, "one")
        await driver.prepare([Prepared(spec, 1, warm=True)])
        (ready,) = driver._pool._ready
        await driver.create(spec)
        await driver.start(spec.id)
        assert spec.models_dir is not None
        load(driver, ready)
        assert await first_line(driver, spec.id) == HEARD
        look = "echo $A $OMP_NUM_THREADS; ls /run /run/fal-bind; ! touch /run/fal-bind/x 2>/dev/null && echo no"
        session = await driver.exec(spec.id, ("/bin/sh", "-c", look))
        try:
            words = b""
            while (got := await session.read()) is not None:
                words += got[1]
        finally:
            await session.close()
        assert words.split() == b"1 3 /run: fal fal-bind secrets /run/fal-bind: message no".split()
        status = await driver.status(spec.id)
        assert status is not None
        assert status.cgroup in cgroups.below("/falctl")
        assert (await driver.kill(spec.id)).exit_code == 137
        await driver.remove(spec.id)
        assert not [point for point in mounts.mount_points() if tmp_path in point.parents]

    run(main())


@pytest.mark.parametrize(
    ("broken", "loaded"),
    [
        ("unclaimed", True),
        ("before the link", False),
        ("before the bell", True),
        ("before the bell", False),
        ("before the FIFO goes", True),
        ("before the FIFO goes", False),
    ],
)
def test_a_killed_agent_leaves_a_whole_worker_or_none(
    driver: OciDriver, tmp_path: Path, broken: str, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """In place of the agent's own end."""

    def killed(*_: Any, **__: Any) -> None:
        raise KilledError

    async def main() -> None:
        spec = spec_of(tmp_path, "killed")
        await driver.prepare([Prepared(spec, 1, warm=True)])
        (ready,) = driver._pool._ready
        if loaded:
            load(driver, ready)
            await until(lambda: prepared.listens(ready))
        if broken == "before the link":
            monkeypatch.setattr(Path, "symlink_to", killed)
            with pytest.raises(KilledError):
                driver._pool._bind(ready.files, spec, prepared.message(spec, {}, warm=True))
            monkeypatch.undo()
        elif broken != "unclaimed":
            await driver.create(spec)
            if broken == "before the bell":
                monkeypatch.setattr(prepared, "_opened", killed)
            else:
                monkeypatch.setattr(Path, "unlink", killed)
            with pytest.raises(KilledError):
                await driver.start(spec.id)
            monkeypatch.undo()
        again = OciDriver(tmp_path / "state")
        words = await again.clean(frozenset({spec.id}))
        status = await again.status(spec.id)
        if broken in ("unclaimed", "before the link"):
            assert any("prepared container" in word for word in words)
            assert status is None
            assert list((tmp_path / "state" / "prepared").iterdir()) == []
            assert not [point for point in mounts.mount_points() if tmp_path in point.parents]
        else:
            assert status is not None
            assert status.phase is Phase.CREATED
            await again.start(spec.id)
            load(driver, ready)
            assert await first_line(again, spec.id) == HEARD
            status = await again.status(spec.id)
            assert status is not None
            assert status.phase is Phase.RUNNING
        again.close()
        driver._pool._ready.clear()

    run(main())


def test_one_that_ends_while_it_waits_is_replaced_or_started_cold(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        spec = spec_of(tmp_path, "dies", warm_command=(PYTHON, "-c", WARM))
        for _ in range(prepared.DEATHS_MAX):
            await driver.prepare([Prepared(spec, 1, warm=True)])
            (ready,) = driver._pool._ready
            assert ready.shape.warm_command
            os.kill(ready.created.pid, signal.SIGKILL)
            await until(lambda: not alive(ready.created.pid, ready.created.pid_ticks))  # noqa: B023
        await driver.create(spec)  # it is found dead, taken away, and nobody waits for it
        assert not (driver._containers / spec.id).is_symlink()
        assert list((tmp_path / "state" / "prepared").iterdir()) == []
        await driver.prepare([Prepared(spec, 1, warm=True)])
        (ready,) = driver._pool._ready
        os.kill(ready.created.pid, signal.SIGKILL)
        await until(lambda: not alive(ready.created.pid, ready.created.pid_ticks))
        await driver.prepare([Prepared(spec, 1, warm=True)])
        (ready,) = driver._pool._ready
        assert not ready.shape.warm_command  # such workers end: a shell waits in its place
        again = replace(spec, id=spec.id + "b", socket_dir=tmp_path / "s2", models_dir=tmp_path / "m2")
        await driver.create(again)
        assert (driver._containers / again.id).is_symlink()

    run(main())


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_real_worker_draws_from_warm(driver: OciDriver, tmp_path: Path) -> None:
    """Read-only root, no network, a user namespace, its limits: libraries load, a model comes, a picture is drawn."""
    pytest.importorskip("diffusers")
    worker = (PYTHON, "-m", "fal_runtime.worker")

    async def main() -> None:
        env = {"FAL_MODEL_DIR": "/models/digits", "FAL_SOCKET": "/run/fal/worker.sock", "OMP_NUM_THREADS": "1"}
        limits = Resources(memory_bytes=2 << 30, pids_max=200, cpu_milli=1000)
        spec = replace(
            spec_of(tmp_path, "real", warm_command=(*worker, "--warm")), command=worker, env=env, resources=limits
        )
        await driver.prepare([Prepared(spec, 1, warm=True)])
        (ready,) = driver._pool._ready
        await until(lambda: prepared.listens(ready) or not alive(ready.created.pid, ready.created.pid_ticks))
        await driver.create(spec)
        assert (driver._containers / spec.id).is_symlink()
        await driver.attach_model(spec.id, "digits", DIGITS)
        await driver.start(spec.id)
        said = json.loads(await first_line(driver, spec.id))
        assert (said["event"], said["pid"]) == ("start", 1)
        assert spec.socket_dir is not None
        socket = spec.socket_dir / "worker.sock"
        await until(socket.exists)
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session:
            client = Client(session)
            async with asyncio.timeout(TIMEOUT_S):
                while (await client.get("/readyz"))[0] != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            status, picture, _ = await client.post("/infer", {"prompt": "seven", "seed": 1})
        assert (status, picture[:4]) == (200, b"\x89PNG")
        ended = await driver.stop(spec.id, grace_s=20)
        assert ended.exit_code == 0

    run(main(), 200.0)
