"""Where FUSE does not work, the mounts say why and change nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_fsd.mount import InFlightMounts, kernel, probe
from fal_fsd.mount.probe import MODES, OFF_VARIABLE, switched_off
from fsd_fakes import FakePart, make_artifact

REPOSITORY = Path(__file__).parents[2]


def start(folder: Path) -> InFlightMounts:
    """Started, stopped; what it said in between is asserted on."""
    made = InFlightMounts(folder, on_wanted=lambda *_: None)
    artifact, contents = make_artifact([100])

    async def main() -> None:
        assert made.available == "it was not started"
        assert await made.start() == []
        assert "no FUSE here" in made.available
        part = FakePart(artifact, contents)
        with pytest.raises(FalError) as caught:
            await made.open(part)
        assert caught.value.code is Code.FAILED_PRECONDITION
        made.arrived(artifact.id, 0)
        made.fail(artifact.id, "x")
        assert made.cancel_reads([os.getpid()]) == 0
        await made.close(artifact.id)
        part.close()
        await made.stop()

    asyncio.run(main())
    return made


def test_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "DEVICE", tmp_path / "fuse")
    found = start(tmp_path / "mounts").modes
    assert "No such file" in found["fuse"]
    assert set(found) == set(MODES)
    assert list((tmp_path / "mounts").iterdir()) == []


def test_switched_off_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF_VARIABLE, "fuse, resend")
    assert start(tmp_path).modes["fuse"] == "switched off"
    monkeypatch.setenv(OFF_VARIABLE, "fusion")
    with pytest.raises(FalError, match="fusion"):
        switched_off()


def test_without_the_right_to_mount(tmp_path: Path) -> None:
    program = (
        f"from pathlib import Path; from fal_fsd.mount import probe; print(probe(Path({str(tmp_path)!r}))['fuse'])"
    )
    argv = [sys.executable, "-c", program]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv")
        argv = ["setpriv", "--bounding-set=-sys_admin", *argv]
    paths = os.pathsep.join(str(REPOSITORY / root) for root in ("proto", "fsd"))
    done = subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60, check=True
    )
    assert "not permitted" in done.stdout or "denied" in done.stdout or "No such" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_probe_leaves_nothing(tmp_path: Path) -> None:
    found = probe(tmp_path)
    assert tuple(found) == MODES
    assert all(found.values())
    assert list(tmp_path.iterdir()) == []
    assert kernel.mounted_below(tmp_path) == []
