"""A device for a container that runs already: on this machine's own cgroup tree, and on one of cgroup v2 alone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from contract.driver_cases import oci_missing
from fal_runtime.oci import cgroups

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
TIMEOUT_S = 120.0
CHILD = Path(__file__).parents[1] / "device_attach_child.py"
HAS_V2 = any((hierarchy / "cgroup.controllers").exists() for hierarchy in cgroups.hierarchies())


@pytest.mark.parametrize(
    "tree", ["here", pytest.param("v2", marks=pytest.mark.skipif(not HAS_V2, reason="no cgroup v2 here"))]
)
def test_a_live_container_gets_and_loses_a_device(tmp_path: Path, tree: str) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o755)  # the mapped root walks it
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(CHILD), str(tmp_path / "s"), tree]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["seen"] == [str(errno.EPERM), "0", str(errno.EPERM)]
    assert told["cgroup"] == ("v2" if tree == "v2" else cgroups.mode())
    assert {"cdi", "device-attach"} <= set(told["features"])
    assert not [name for hierarchy in cgroups.hierarchies() for name in hierarchy.glob("falctl/*.attach-*")]
