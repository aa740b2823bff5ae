"""Prepared containers of the oci driver: isolated like cold ones, used once, whole or gone after a kill."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_contract.errors import FalError
from fal_runtime import host_image
from fal_runtime.driver import ContainerSpec, Phase, Prepared, Resources
from fal_runtime.oci import cgroups, mounts, prepared
from fal_runtime.oci.driver import OciDriver

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
TIMEOUT_S = 30.0
PYTHON = host_image.this_layout().python
LIMITS = Resources(memory_bytes=128 << 20, pids_max=50, open_files_max=1234)


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    made = OciDriver(tmp_path / "state")
    yield made
    run(made.prepare(()))
    run(made.clean(frozenset()))
    made.close()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


def spec_of(tmp_path: Path, name: str, *command: str, **more: Any) -> ContainerSpec:
    return ContainerSpec(
        id=f"{name}-{os.urandom(4).hex()}",
        command=command,
        resources=more.pop("resources", LIMITS),
        socket_dir=tmp_path / f"s-{name}",
        models_dir=tmp_path / f"m-{name}",
        **more,
    )


async def lines_of(driver: OciDriver, id: str) -> list[str]:
    return [line.text async for line in driver.logs(id, tail_lines=1000, follow=False)]


async def said(driver: OciDriver, spec: ContainerSpec) -> list[str]:
    await driver.create(spec)
    await driver.start(spec.id)
    status = await driver.wait(spec.id)
    lines = await lines_of(driver, spec.id)
    assert status.exit_code == 0, (status, lines)
    return lines


async def first_line(driver: OciDriver, id: str) -> str:
    async with aclosing(driver.logs(id, tail_lines=1, follow=True)) as lines:
        async for line in lines:
            return line.text
    raise AssertionError(f"{id} ended without a word: {await driver.status(id)}")


def is_pooled(driver: OciDriver, id: str) -> bool:
    return (driver._containers / id).is_symlink()


LOOK = """
import json, os, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
mounts = sorted((m[4], m[5].split(",")[0]) for m in (line.split() for line in open("/proc/self/mountinfo")))
print(json.dumps({
    "pid": os.getpid(), "uid": os.getuid(), "env": dict(os.environ), "cwd": os.getcwd(),
    "argv": open("/proc/self/cmdline").read(),
    "limits": [resource.getrlimit(n) for n in range(16)], "umask": os.umask(0),
    "status": {k: status[k].strip() for k in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "SigIgn", "SigBlk")},
    "mounts": [m for m in mounts if m[0] != "/run/fal-bind"], "fds": os.listdir("/proc/self/fd"),
    "net": os.listdir("/sys/class/net"), "oom": open("/proc/self/oom_score_adj").read(),
    "session": os.getsid(0) == os.getpid(), "files": sorted(os.listdir("/run/fal")),
}))
"""


def test_a_prepared_container_is_like_a_cold_one(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        env = {"PLAIN": "1", "QUOTED": 'it\'s "a" $HOME `x`\nsecond line', "PATH": "/usr/bin:/bin"}
        spec = spec_of(tmp_path, "one", PYTHON, "-c", LOOK, "an 'argument'\nof two lines", env=env)
        cold = json.loads((await said(driver, spec))[-1])
        await driver.prepare([Prepared(spec, 1)])
        again = replace(spec, id=spec.id + "b", socket_dir=tmp_path / "s2", models_dir=tmp_path / "m2")
        warm = json.loads((await said(driver, again))[-1])
        assert is_pooled(driver, again.id)
        assert not is_pooled(driver, spec.id)
        assert cold == warm
        await driver.remove(again.id)
        assert not (driver._containers / again.id).is_symlink()

    run(main())


def test_it_is_used_once_and_refilled_on_request(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        specs = [spec_of(tmp_path, f"n{n}", "/bin/sh", "-c", f"echo {n}; exec sleep 600") for n in range(3)]
        await driver.prepare([Prepared(specs[0], 2)])
        pids = set()
        for n, spec in enumerate(specs):
            await driver.create(spec)
            created = await driver.status(spec.id)
            assert created is not None
            assert created.phase is Phase.CREATED
            await driver.start(spec.id)
            assert await first_line(driver, spec.id) == str(n)
            status = await driver.status(spec.id)
            assert status is not None
            pids.add(status.pid)
            assert (status.phase, status.cgroup in cgroups.below("/falctl")) == (Phase.RUNNING, True)
        assert [is_pooled(driver, spec.id) for spec in specs] == [True, True, False]
        assert len(pids) == 3
        other = spec_of(tmp_path, "other", "/bin/true", resources=Resources(pids_max=9))
        await driver.prepare([Prepared(other, 1)])
        await driver.prepare([Prepared(specs[0], 1)])  # takes the other shape's away
        await driver.create(other)
        assert not is_pooled(driver, other.id)
        assert len(list((driver._containers.parent / "prepared").iterdir())) == 3

    run(main())


def test_limits_exit_codes_and_signals_are_as_ever(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        bomb = "blocks = [bytearray(1 << 20) for _ in range(512)]"
        for name, words, code in (
            ("bomb", (PYTHON, "-c", bomb), 137),
            ("three", ("/bin/sh", "-c", "exit 3"), 3),
        ):
            spec = spec_of(tmp_path, name, *words)
            await driver.prepare([Prepared(spec, 1)])
            await driver.create(spec)
            assert is_pooled(driver, spec.id)
            await driver.start(spec.id)
            status = await driver.wait(spec.id)
            assert (status.exit_code, status.oom_killed) == (code, code == 137)
            assert await OciDriver(driver._containers.parent).status(spec.id) == status
        never = spec_of(tmp_path, "never", "/bin/sh", "-c", "echo ran")
        await driver.prepare([Prepared(never, 1)])
        await driver.create(never)
        assert (await driver.stop(never.id, grace_s=1)).phase is Phase.EXITED
        assert await lines_of(driver, never.id) == []

    run(main())


def test_a_missing_program_is_told_as_ever(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        spec = spec_of(tmp_path, "missing", "/no/such/program")
        await driver.prepare([Prepared(spec, 1)])
        with pytest.raises(FalError, match="no such file"):
            await driver.create(spec)
        assert await driver.list() == []

    run(main())


def test_sockets_and_models_of_a_prepared_container(driver: OciDriver, tmp_path: Path) -> None:
    program = """
import os, socket, time
server = socket.socket(socket.AF_UNIX)
server.bind(os.environ["FAL_SOCKET_DIR"] + "/worker.sock")
server.listen()
os.symlink("/host.sock", os.environ["FAL_SOCKET_DIR"] + "/link.sock")
while not os.path.exists("/models/m/weights"):
    time.sleep(0.01)
print(open("/models/m/weights").read(), flush=True)
time.sleep(600)
"""

    async def main() -> None:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "weights").write_text("w")
        spec = spec_of(tmp_path, "sock", PYTHON, "-c", program)
        await driver.prepare([Prepared(spec, 1)])
        await driver.create(spec)
        assert is_pooled(driver, spec.id)
        await driver.start(spec.id)
        await driver.attach_model(spec.id, "m", tmp_path / "weights")
        assert await first_line(driver, spec.id) == "w"
        assert spec.socket_dir is not None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(spec.socket_dir / "worker.sock"))
        os.unlink(spec.socket_dir / "link.sock")
        with socket.socket(socket.AF_UNIX) as host, socket.socket(socket.AF_UNIX) as client:
            host.bind(str(tmp_path / "h.sock"))
            host.listen()
            (spec.socket_dir / "link.sock").symlink_to(tmp_path / "h.sock")
            with pytest.raises(OSError) as caught:
                client.connect(str(spec.socket_dir / "link.sock"))
            assert caught.value.errno == errno.ELOOP
        await driver.remove(spec.id)
        assert not [point for point in mounts.mount_points() if tmp_path in point.parents]
        assert not spec.socket_dir.exists()

    run(main())


def test_secrets_come_with_the_binding(driver: OciDriver, tmp_path: Path) -> None:
    program = "cd $FAL_SECRETS_DIR && pwd && ls -l && grep -r . . | sort && ! touch x 2>/dev/null && ! rm a 2>/dev/null"

    async def main() -> None:
        values = {"a": b"first", "long": b"s" * 20_000}
        spec = spec_of(tmp_path, "secret", "/bin/sh", "-c", program, secrets=values)
        cold = await said(driver, spec)
        assert "./a:first" in cold
        await driver.prepare([Prepared(replace(spec, secrets={"other": b"another team's"}), 1)])
        again = replace(spec, id=spec.id + "b", socket_dir=tmp_path / "s2", models_dir=tmp_path / "m2")
        warm = await said(driver, again)
        assert is_pooled(driver, again.id)
        assert [line for line in warm if "root" not in line] == [line for line in cold if "root" not in line]
        assert [line.split()[:5] for line in warm if "root" in line] == [
            line.split()[:5] for line in cold if "root" in line
        ]
        text = b"".join(file.read_bytes() for file in (tmp_path / "state").rglob("*.json"))
        assert b"first" not in text  # kept nowhere else
        await driver.remove(again.id)
        assert not [point for point in mounts.mount_points() if "secrets" in point.name and tmp_path in point.parents]

    run(main())


class _KilledError(BaseException):
    """In place of the agent's own end."""


@pytest.mark.parametrize("broken", ["unclaimed", "before the link", "before the start", "before the message"])
def test_a_killed_agent_leaves_a_whole_container_or_none(
    driver: OciDriver, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        spec = spec_of(tmp_path, "killed", "/bin/sh", "-c", "echo up; exec sleep 600")
        await driver.prepare([Prepared(spec, 1)])
        if broken == "before the link":
            monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            ready = driver._pool._ready.pop()
            with pytest.raises(KeyboardInterrupt):
                driver._pool._bind(ready.files, spec, b"exec true\n")
            monkeypatch.undo()
        elif broken != "unclaimed":
            await driver.create(spec)
        if broken == "before the message":
            monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(_KilledError()))
            with pytest.raises(_KilledError):
                await driver.start(spec.id)
            monkeypatch.undo()
        again = OciDriver(tmp_path / "state")
        words = await again.clean(frozenset({spec.id}))
        status = await again.status(spec.id)
        if broken in ("unclaimed", "before the link"):
            assert any("prepared container" in word for word in words)
            assert status is None
            assert not [point for point in mounts.mount_points() if tmp_path in point.parents]
            assert list((tmp_path / "state" / "prepared").iterdir()) == []
            await again.create(spec)
        await again.start(spec.id)
        if broken == "before the message":  # it never was anybody, and says so by its end
            assert (await again.wait(spec.id)).exit_code == 0
            assert await lines_of(again, spec.id) == []
        else:
            assert await first_line(again, spec.id) == "up"
            assert await lines_of(again, spec.id) == ["up"]
            assert (await again.kill(spec.id)).exit_code == 137
        again.close()
        driver._pool._ready.clear()

    run(main())


def test_what_depends_on_who_it_becomes_is_never_prepared(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "plain", "/bin/true")
    assert prepared.fits(spec)
    for other in (
        replace(spec, network="host"),
        replace(spec, network="egress"),
        replace(spec, gpu_devices=("/dev/null",)),
        replace(spec, cdi=("a/b=c",)),
        replace(spec, privileges=("CAP_CHOWN",)),
        replace(spec, uid_range_start=1 << 30),
        replace(spec, socket_dir=None),
    ):
        assert not prepared.fits(other)
    for same in (replace(spec, id="x", command=("y",), env={"A": "1"}, socket_dir=tmp_path / "z"),):
        assert prepared.shape_of(same, warm=False) == prepared.shape_of(spec, warm=False)
    some = prepared.shape_of(replace(spec, secrets={"a": b"b"}), warm=False)
    assert some == prepared.shape_of(replace(spec, secrets={"c": b"d", "e": b""}), warm=False)
    assert "b'b'" not in str(some.secrets)
    for other in (
        replace(spec, resources=Resources()),
        replace(spec, models_dir=None),
        replace(spec, secrets={"a": b"b"}),
    ):
        assert prepared.shape_of(other, warm=False) != prepared.shape_of(spec, warm=False)
