"""A container with CDI devices of a driver that is not there, seen from inside."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from driver_tree import UUIDS, VERSION, make_tree
from fal_contract.errors import Code, FalError
from fal_runtime import host_image
from fal_runtime.cdi.driver_tree import find_driver, write_specification
from fal_runtime.cdi.model import Edits, NodeEdit
from fal_runtime.cdi.nvidia import INSIDE, Gpu, qualified
from fal_runtime.cdi.reader import Reader, complete
from fal_runtime.cdi.registry import split
from fal_runtime.driver import ContainerSpec, Resources
from fal_runtime.oci import attach, cgroups, rootfs
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.driver import OciDriver
from fal_runtime.oci.spec import DeviceNode
from image_folders import image_of, make_folder, tools_missing

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
TIMEOUT_S = 60.0
PYTHON = host_image.this_layout().python
LOOK = """
import ctypes, json, os, stat, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def opened(path):
    try:
        fd = os.open(path, os.O_RDWR)
        got = os.read(fd, 2)
        os.close(fd)
        return got.hex()
    except OSError as error:
        return error.errno
def made(path, major, minor):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        return opened(path)
    except OSError as error:
        return error.errno
folder = sys.argv[1]
print(json.dumps({
    "nodes": sorted(name for name in os.listdir("/dev") if name.startswith("nvidia")),
    "opened": {name: opened("/dev/" + name) for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm")},
    "numbers": [os.major(os.stat("/dev/nvidia0").st_rdev), os.minor(os.stat("/dev/nvidia0").st_rdev)],
    "made": [made(folder_ + "/own", 10, 237) for folder_ in ("/dev", "/tmp")],
    "libraries": {name: open(f"{folder}/lib/{name}").read() for name in sorted(os.listdir(folder + "/lib"))},
    "path": os.environ["PATH"], "library_path": os.environ["LD_LIBRARY_PATH"],
    "env": {name: os.environ.get(name) for name in ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")},
    "smi": subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout,
    "written": opened(f"{folder}/lib/libcuda.so.1"),
}))
"""


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


@pytest.fixture
def cdi(tmp_path: Path) -> Path:
    """A folder with the specification of the driver that is not there."""
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o755)
    _folder, dev = make_tree(tmp_path / "tree")
    gpus = [Gpu((uuid, str(at)), (f"/dev/nvidia{at}",)) for at, uuid in enumerate(UUIDS)]
    write_specification(tmp_path / "cdi", gpus, find_driver(VERSION, root=tmp_path / "tree", dev=dev))
    return tmp_path / "cdi"


@pytest.fixture(params=[True, False], ids=["user namespace", "none"])
def driver(request: pytest.FixtureRequest, tmp_path: Path, cdi: Path) -> Iterator[OciDriver]:
    runtime = shutil.which("runc")
    if runtime is None:
        pytest.skip("needs runc")
    made = OciDriver(tmp_path / "state", mode=Mode(runtime, request.param), cdi=(cdi,))
    yield made
    run(made.clean(frozenset()))
    made.close()


async def said(driver: OciDriver, spec: ContainerSpec) -> tuple[dict[str, Any], str]:
    """What the look printed, and its devices cgroup's list while it waited to be started."""
    await driver.create(spec)
    listed = ""
    for hierarchy in cgroups.hierarchies():
        for path in hierarchy.glob(f"falctl/*.{spec.id}/devices.list"):
            listed = path.read_text()
    await driver.start(spec.id)
    status = await driver.wait(spec.id)
    lines = [line.text async for line in driver.logs(spec.id, tail_lines=100, follow=False)]
    assert status.exit_code == 0, (status, lines)
    return json.loads(lines[-1]), listed


def spec(*names: str) -> ContainerSpec:
    env = {"LD_LIBRARY_PATH": "/mine"}
    return ContainerSpec(f"cdi-{os.urandom(4).hex()}", (PYTHON, "-c", LOOK, INSIDE), env=env, cdi=names)


def test_only_what_was_granted_is_there(driver: OciDriver) -> None:
    seen, listed = run(said(driver, spec(qualified(UUIDS[0]))))
    assert seen["nodes"] == ["nvidia-uvm", "nvidia0", "nvidiactl"]
    assert seen["opened"] == {"nvidia0": "0000", "nvidia1": errno.ENOENT, "nvidiactl": "", "nvidia-uvm": ""}
    assert seen["numbers"] == [1, 5]
    assert set(seen["made"]) <= {errno.EPERM, errno.EACCES}
    assert set(seen["libraries"]) == {
        *("libcuda.so", "libcuda.so.1", f"libcuda.so.{VERSION}", "libnvidia-ml.so.1", f"libnvidia-ml.so.{VERSION}"),
        *("libnvidia-ptxjitcompiler.so.1", f"libnvidia-ptxjitcompiler.so.{VERSION}", f"libnvidia-gpucomp.so.{VERSION}"),
    }
    assert seen["libraries"]["libcuda.so.1"] == f"libcuda {VERSION}\n"
    assert seen["library_path"] == f"/mine:{INSIDE}/lib"
    assert seen["path"].endswith(f":{INSIDE}/bin")
    assert seen["smi"] == "GPU: /dev/nvidia0\n"
    assert seen["written"] in (errno.EROFS, errno.EACCES)
    if listed:
        assert "c 1:5 rw" in listed
        assert "c 10:237" not in listed


def test_both_gpus_by_the_name_for_all(driver: OciDriver) -> None:
    seen, listed = run(said(driver, spec("nvidia.com/gpu=all")))
    assert seen["nodes"] == ["nvidia-uvm", "nvidia0", "nvidia1", "nvidiactl"]
    assert seen["opened"]["nvidia1"] != errno.EPERM
    assert "c 10:237 rw" in listed or not listed


def test_without_devices_there_is_nothing_of_the_driver(driver: OciDriver) -> None:
    look = ContainerSpec(f"cdi-{os.urandom(4).hex()}", (PYTHON, "-c", "import os; print(os.listdir('/dev'))"))

    async def main() -> str:
        await driver.create(look)
        await driver.start(look.id)
        await driver.wait(look.id)
        return "".join([line.text async for line in driver.logs(look.id, tail_lines=9, follow=False)])

    assert "nvidia" not in run(main())


def test_a_device_that_is_gone_is_one_clear_error(driver: OciDriver, tmp_path: Path) -> None:
    async def refused(name: str) -> FalError:
        with pytest.raises(FalError) as caught:
            await driver.create(spec(name))
        assert await driver.list() == []
        return caught.value

    unknown = run(refused("nvidia.com/gpu=GPU-nobody"))
    assert unknown.code is Code.NOT_FOUND
    assert UUIDS[0] in unknown.remedy
    (tmp_path / "tree/dev/nvidia0").unlink()
    gone = run(refused(qualified(UUIDS[0])))
    assert gone.code is Code.NOT_FOUND
    assert "nvidia0" in gone.what


HOOK = """#!/bin/sh
read state
case "$state" in *'"id":"'*) id=yes ;; *) id=no ;; esac
echo "$1 $HOOK $id" >> "$2"
"""


def test_hooks_of_a_specification_run_where_the_standard_says(driver: OciDriver, cdi: Path, tmp_path: Path) -> None:
    """On the host, with the container's state on their input. Those that run inside need a program there."""
    hook, told = tmp_path / "hook", tmp_path / "told"
    hook.write_text(HOOK)
    hook.chmod(0o755)
    names = ("prestart", "createRuntime", "poststart", "poststop")
    hooks = [
        {"hookName": name, "path": str(hook), "args": ["hook", name, str(told)], "env": ["HOOK=1"], "timeout": 20}
        for name in names
    ]
    inside = {"hookName": "startContainer", "path": "/bin/sh", "args": ["sh", "-c", "echo begun > /tmp/begun"]}
    device = {"name": "hooked", "containerEdits": {"hooks": [*hooks, inside]}}
    document = {"cdiVersion": "0.6.0", "kind": "example.com/thing", "devices": [device]}
    (cdi / "hooks.json").write_text(json.dumps(document))
    (cdi / "hooks.json").chmod(0o644)
    look = ("/bin/cat", "/tmp/begun")
    spec = ContainerSpec(f"cdi-{os.urandom(4).hex()}", look, cdi=("example.com/thing=hooked",))

    async def main() -> list[str]:
        await driver.create(spec)
        # runc 1.1 runs poststart here already.
        assert [line.split()[0] for line in told.read_text().splitlines()][:2] == ["prestart", "createRuntime"]
        await driver.start(spec.id)
        await driver.wait(spec.id)
        lines = [line.text async for line in driver.logs(spec.id, tail_lines=9, follow=False)]
        await driver.remove(spec.id)
        return lines

    assert run(main()) == ["begun"]
    assert told.read_text().splitlines() == [f"{name} 1 yes" for name in names]


def test_a_hook_that_fails_is_one_clear_error(driver: OciDriver, cdi: Path) -> None:
    device = {
        "name": "broken", "containerEdits": {"hooks": [{"hookName": "createRuntime", "path": "/bin/false"}]},
    }  # fmt: skip
    document = {"cdiVersion": "0.6.0", "kind": "example.com/thing", "devices": [device]}
    (cdi / "broken.json").write_text(json.dumps(document))
    (cdi / "broken.json").chmod(0o644)
    broken = ContainerSpec(f"cdi-{os.urandom(4).hex()}", ("/bin/true",), cdi=("example.com/thing=broken",))

    async def main() -> FalError:
        with pytest.raises(FalError) as caught:
            await driver.create(broken)
        assert await driver.list() == []
        return caught.value

    error = run(main())
    assert error.code is Code.DRIVER_FAILED
    assert "hook" in error.what


@pytest.mark.skipif(bool(tools_missing()), reason=f"no images here: {tools_missing()}")
@pytest.mark.parametrize("scratch_bytes", [0, 4 << 20], ids=["read-only", "overlay"])
def test_a_real_image_gets_the_driver_too(driver: OciDriver, tmp_path: Path, scratch_bytes: int) -> None:
    """What the image says of libraries goes on; `/opt` of a hostile one may lead anywhere inside, never out of it."""
    config = {"Env": ["LD_LIBRARY_PATH=/own/lib", "PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all"]}
    image = image_of(make_folder(tmp_path / "i", config=config))
    script = (
        f"cat {INSIDE}/lib/libcuda.so.1; echo $LD_LIBRARY_PATH; echo $PATH; echo $NVIDIA_VISIBLE_DEVICES; "
        "ls /dev | grep nvidia | tr '\\n' ' '; (echo x >> /opt/falctl/driver/lib/libcuda.so.1) 2>/dev/null; echo $?"
    )
    one = ContainerSpec(
        f"cdi-{os.urandom(4).hex()}", ("/bin/sh", "-c", script), image=image, cdi=(qualified(UUIDS[0]),),
        env={"NVIDIA_VISIBLE_DEVICES": "void"}, resources=Resources(scratch_bytes=scratch_bytes, pids_max=64),
    )  # fmt: skip

    async def main() -> list[str]:
        await driver.create(one)
        await driver.start(one.id)
        await driver.wait(one.id)
        return [line.text async for line in driver.logs(one.id, tail_lines=99, follow=False)]

    lines = run(main())
    assert lines[:4] == [f"libcuda {VERSION}", f"/own/lib:{INSIDE}/lib", f"/bin:{INSIDE}/bin", "void"]
    assert lines[4].split()[:3] == ["nvidia-uvm", "nvidia0", "nvidiactl"]
    assert not lines[-1].endswith("0"), "the driver's file was written"


@pytest.mark.skipif(bool(tools_missing()), reason=f"no images here: {tools_missing()}")
def test_an_image_cannot_lead_the_drivers_files_out_of_it(driver: OciDriver, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    image = image_of(make_folder(tmp_path / "i", change=lambda root: (root / "opt").symlink_to(outside)))
    one = ContainerSpec(
        f"cdi-{os.urandom(4).hex()}", ("/bin/cat", f"{INSIDE}/lib/libcuda.so.1"), image=image,
        cdi=(qualified(UUIDS[0]),), resources=Resources(scratch_bytes=4 << 20, pids_max=64),
    )  # fmt: skip

    async def main() -> list[str]:
        await driver.create(one)
        await driver.start(one.id)
        await driver.wait(one.id)
        return [line.text async for line in driver.logs(one.id, tail_lines=9, follow=False)]

    assert run(main()) == [f"libcuda {VERSION}"]
    assert os.listdir(outside) == []


WAIT = """
import json, os, time
def named():
    return sorted(name for name in os.listdir("/dev") if name.startswith("nvidia"))
print(json.dumps({"before": named()}), flush=True)
while not os.path.islink("/dev/nvidia1"):
    time.sleep(0.01)
def opened(path):
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        return 0
    except OSError as error:
        return error.errno
for _ in range(500):
    if opened("/dev/nvidia1") == 0:
        break
    time.sleep(0.01)
def removed(path):
    try:
        os.unlink(path)
        return 0
    except OSError as error:
        return error.errno
print(json.dumps({
    "after": named(), "one": opened("/dev/nvidia1"),
    "cap": opened("/dev/nvidia-caps/nvidia-cap1"), "folder": sorted(os.listdir("/dev/fal")),
    "removed": removed("/dev/fal/nvidia1"),
}), flush=True)
"""


def test_a_live_container_gets_a_gpu(driver: OciDriver, cdi: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What its devices share is there from the start; nodes come when it is known which."""
    folder = tmp_path / "devices"
    shared, own = split([qualified(UUIDS[1])], Reader((cdi,)).registry())
    assert [node.path for node in own.nodes] == ["/dev/nvidia1"]
    assert own == Edits(nodes=own.nodes), "nothing that a live container could not get"
    as_made, real = complete(shared, user_namespace=True), rootfs.binds
    monkeypatch.setattr(driver._place, "edits", lambda spec, **more: as_made)
    monkeypatch.setattr(rootfs, "binds", lambda *given: (*real(*given), attach.bind(folder)))
    waiter = ContainerSpec(f"cdi-{os.urandom(4).hex()}", (PYTHON, "-c", WAIT), uid_range_start=0x7F00_0000)
    attach.open_folder(folder, owner_uid=0x7F00_0000)
    attach.open_folder(folder, owner_uid=0x7F00_0000)

    async def main() -> list[Any]:
        await driver.create(waiter)
        await driver.start(waiter.id)
        seen: list[Any] = []
        async with aclosing(driver.logs(waiter.id, tail_lines=9, follow=True)) as lines:
            async for line in lines:
                seen.append(json.loads(line.text))
                if len(seen) == 1:
                    status = await driver.status(waiter.id)
                    assert status is not None
                    cap = NodeEdit("/dev/nvidia-caps/nvidia-cap1", kind="c", major=1, minor=5)
                    nodes = [cap, *complete(own, user_namespace=True).nodes]
                    held = [DeviceNode(node.path, "c", node.major or 0, node.minor or 0) for node in as_made.nodes]
                    for _ in range(2):  # again changes nothing
                        attach.attach(
                            folder, nodes, pid=status.pid or 0, cgroup_path=driver._place.cgroup_path(waiter.id),
                            owner_uid=0x7F00_0000, held=held,
                        )  # fmt: skip
        await driver.remove(waiter.id)
        return seen

    try:
        before, after = run(main())
    finally:
        attach.close_folder(folder)
    assert before == {"before": ["nvidia-uvm", "nvidiactl"]}
    assert after["after"] == ["nvidia-caps", "nvidia-uvm", "nvidia1", "nvidiactl"]
    assert (after["one"], after["cap"]) == (0, 0)
    assert after["folder"] == ["nvidia-caps", "nvidia1"]
    assert after["removed"] in (errno.EROFS, errno.EACCES)
    assert not folder.exists()
