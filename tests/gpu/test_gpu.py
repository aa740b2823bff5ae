"""On a machine with an NVIDIA GPU: what the inventory says, our CDI specification of the real driver, containers that
see exactly their GPUs where containers can run, and the worker on the device."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_agent.inventory.cdi import GpuNames
from fal_agent.inventory.host import read_host
from fal_agent.inventory.machine import InventoryMachine
from fal_agent.inventory.model import Snapshot
from fal_agent.inventory.nvml import NvmlInventory
from fal_agent.launch import Devices, devices
from fal_agent.ports import MachineView
from fal_contract.errors import FalError
from fal_runtime import host_image
from fal_runtime.cdi.driver_tree import FILE_NAME, find_driver
from fal_runtime.cdi.nvidia import CONTROL_NODES, INSIDE, qualified
from fal_runtime.cdi.reader import Reader, complete
from fal_runtime.cdi.registry import resolve
from fal_runtime.driver import ContainerSpec, Resources
from fal_runtime.oci.driver import OciDriver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
TIMEOUT_S = 240.0
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


def test_a_gpu_is_checked_and_its_events_are_listened_to(tmp_path: Path) -> None:
    """The check finds a sound, idle GPU sound; the thread that waits for events begins and ends."""

    async def main() -> None:
        inventory = NvmlInventory(read_host=lambda: read_host(tmp_path))
        heard: list[object] = []
        inventory.listen(heard.append)
        try:
            gpu = (await inventory.snapshot()).gpus[0]
            assert gpu.clock_mhz > 0
            assert 0 < gpu.pcie_width <= gpu.pcie_width_max
            assert "nvml-events" in {thread.name for thread in threading.enumerate()}
            checked = await inventory.check(gpu.id)
            assert checked.passed, checked.text
            assert (await inventory.snapshot()).gpus[0].ok
        finally:
            await inventory.close()
        assert "nvml-events" not in {thread.name for thread in threading.enumerate()}
        assert heard == []

    run(main())


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder = tmp_path_factory.mktemp("inventory")

    async def main() -> Snapshot:
        inventory = NvmlInventory(read_host=lambda: read_host(folder))
        try:
            return await inventory.snapshot()
        finally:
            await inventory.close()

    found: Snapshot = run(main())
    return found


@pytest.fixture
def view(tmp_path: Path) -> MachineView:
    """The machine as the agent sees it, with our own CDI file alone."""

    async def main() -> MachineView:
        inventory = NvmlInventory(read_host=lambda: read_host(tmp_path))
        machine = InventoryMachine(inventory, names=GpuNames(tmp_path / "cdi", ()))
        try:
            return await machine.look()
        finally:
            await machine.close()

    found: MachineView = run(main())
    return found


def test_the_inventory_knows_this_machines_gpus(snapshot: Snapshot) -> None:
    assert snapshot.gpus, snapshot.problem
    assert re.fullmatch(r"\d+(\.\d+)+", snapshot.driver_version)
    assert re.fullmatch(r"\d+\.\d+", snapshot.cuda_version)
    for gpu in snapshot.gpus:
        assert gpu.id.startswith(("GPU-", "MIG-"))
        assert gpu.memory_bytes > 1 << 30
        assert gpu.device_nodes, f"{gpu.id} has no device nodes"
        for node in gpu.device_nodes:
            if node.startswith("/dev/nvidia") and node[len("/dev/nvidia") :].isdigit():
                assert os.path.exists(node)


def test_our_specification_of_the_real_driver(snapshot: Snapshot, view: MachineView, tmp_path: Path) -> None:
    assert set(view.cdi) == {gpu.id for gpu in snapshot.gpus}
    driver = find_driver(snapshot.driver_version)
    names = {name for library in driver.libraries for name in library.names}
    assert {"libcuda.so.1", "libnvidia-ml.so.1"} <= names, "the driver's libraries were not found"
    assert "/dev/nvidiactl" in driver.control_nodes
    registry = Reader((tmp_path / "cdi",)).registry()
    assert not registry.problems
    for gpu in snapshot.gpus:
        edits = complete(resolve([qualified(gpu.id)], registry), user_namespace=True)
        own = [node for node in edits.nodes if node.path.removeprefix("/dev/") not in CONTROL_NODES]
        assert own
        assert all(node.kind == "c" and node.major is not None for node in edits.nodes)
        others = {node for other in snapshot.gpus if other.id != gpu.id for node in other.device_nodes}
        if not gpu.mig_profile:
            assert not others & {node.path for node in own}
        assert {f"{INSIDE}/lib/libcuda.so.1", f"{INSIDE}/lib/libnvidia-ml.so.1"} <= {
            mount.container_path for mount in edits.mounts
        }
    assert devices([snapshot.gpus[0].id], view) == Devices(cdi=(qualified(snapshot.gpus[0].id),))
    assert json.loads((tmp_path / "cdi" / FILE_NAME).read_text())["kind"] == "nvidia.com/gpu"


# Loads the driver's libraries from our folder alone, and asks them.
LOAD = """
import ctypes, json, os, sys
folder = sys.argv[1]
nvml = ctypes.CDLL(f"{folder}/libnvidia-ml.so.1")
assert nvml.nvmlInit_v2() == 0
count = ctypes.c_uint()
assert nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
uuids = []
for index in range(count.value):
    handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
        assert nvml.nvmlDeviceGetUUID(handle, text, 96) == 0
        uuids.append(text.value.decode())
cuda = ctypes.CDLL(f"{folder}/libcuda.so.1")
begun, devices, version = cuda.cuInit(0), ctypes.c_int(), ctypes.c_int()
cuda.cuDeviceGetCount(ctypes.byref(devices))
cuda.cuDriverGetVersion(ctypes.byref(version))
print(json.dumps({
    "uuids": uuids, "cuInit": begun, "cuda": devices.value, "version": version.value,
    "nodes": sorted(name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()),
}))
"""


def test_the_libraries_we_name_load_from_one_folder(snapshot: Snapshot, tmp_path: Path) -> None:
    """As a container has them: links of all their names in one folder."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for library in find_driver(snapshot.driver_version).libraries:
        for name in library.names:
            (folder / name).symlink_to(library.path)
    environment = ENVIRONMENT | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["cuInit"] == 0
    whole = {gpu.parent_id or gpu.id for gpu in snapshot.gpus}
    assert set(said["uuids"]) <= whole
    major, minor = map(int, snapshot.cuda_version.split("."))
    assert said["version"] == major * 1000 + minor * 10


@pytest.fixture
def driver(tmp_path: Path, view: MachineView) -> Iterator[OciDriver]:
    why = oci_missing()
    if why:
        pytest.skip(f"no containers here: {why}")
    made = OciDriver(tmp_path / "state", cdi=(tmp_path / "cdi",))
    try:
        run(made.probe())
    except FalError as error:
        made.close()
        pytest.skip(f"no containers here: {error}")
    yield made
    run(made.clean(frozenset()))
    made.close()


def test_a_container_sees_exactly_its_gpus(driver: OciDriver, snapshot: Snapshot, view: MachineView) -> None:
    async def seen(*gpus: str) -> dict[str, Any]:
        spec = ContainerSpec(
            f"gpu-{os.urandom(4).hex()}",
            (host_image.this_layout().python, "-c", LOAD, f"{INSIDE}/lib"),
            env={"CUDA_VISIBLE_DEVICES": ",".join(gpus)},
            resources=Resources(memory_bytes=8 << 30, pids_max=256),
            cdi=devices(gpus, view).cdi,
        )
        await driver.create(spec)
        await driver.start(spec.id)
        status = await driver.wait(spec.id)
        lines = [line.text async for line in driver.logs(spec.id, tail_lines=100, follow=False)]
        await driver.remove(spec.id)
        assert status.exit_code == 0, lines
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    whole = [gpu.id for gpu in snapshot.gpus if not gpu.mig_profile]
    for gpu in snapshot.gpus:
        found = run(seen(gpu.id))
        assert found["cuInit"] == 0
        assert found["cuda"] == 1
        assert found["uuids"] == [gpu.parent_id or gpu.id]
        assert len(found["nodes"]) == 1
    if len(whole) > 1:
        assert set(run(seen(*whole[:2]))["uuids"]) == set(whole[:2])


WORK = """
import json, sys
from pathlib import Path
import torch
if not torch.cuda.is_available():
    print(json.dumps({"skip": f"torch {torch.__version__} has no CUDA"}))
    sys.exit()
from fal_runtime.worker.diffusers_engine import DiffusersEngine
from fal_runtime.worker.request import InferRequest
phases = []
engine = DiffusersEngine(Path(sys.argv[1]))
info = engine.load(phases.append)
engine.warm()
ask = lambda seed: engine.infer(InferRequest("a handwritten seven", seed, info.steps, info.guidance), lambda *at: None)
first, again, other = ask(1), ask(1), ask(2)
Path(sys.argv[2]).write_bytes(first.png)
print(json.dumps({
    "phases": phases, "device": str(engine._pipeline.device), "dtype": str(engine._pipeline.unet.dtype),
    "same": first.png == again.png, "other": first.png != other.png, "width": first.width_px,
    "peak": torch.cuda.max_memory_allocated(), "infer_s": again.infer_s,
}))
"""


@pytest.mark.torch
def test_the_worker_draws_on_the_device(snapshot: Snapshot, tmp_path: Path) -> None:
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("needs the worker extra")
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": snapshot.gpus[0].id}  # a UUID, as in a container
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(REPOSITORY / "ops/models/digits"), str(tmp_path / "seven.png")],
        env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    if "skip" in said:
        pytest.skip(said["skip"])
    assert said["phases"] == ["import", "load"]
    assert said["device"].startswith("cuda")
    assert said["dtype"] == "torch.bfloat16"
    assert said["same"]
    assert said["other"]
    assert said["peak"] > 1 << 20, "nothing was on the device"

    from PIL import Image

    with Image.open(tmp_path / "seven.png") as picture:
        assert picture.size == (said["width"], said["width"])
        low, high = picture.convert("L").getextrema()
    assert high - low > 100, "an empty page"


def test_a_busy_gpu_shows_its_process(snapshot: Snapshot, tmp_path: Path) -> None:
    """The memory that the agent proves free before it gives a GPU away."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs the worker extra")
    hold = (
        "import sys, torch\n"
        "if not torch.cuda.is_available(): print('skip', flush=True); sys.exit()\n"
        "x = torch.ones(1 << 28, device='cuda'); torch.cuda.synchronize(); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold], env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": snapshot.gpus[0].id},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        word = process.stdout.readline().strip()
        if word == "skip":
            pytest.skip("torch without CUDA")
        assert word == "held"

        async def main() -> Snapshot:
            inventory = NvmlInventory(read_host=lambda: read_host(tmp_path))
            try:
                return await inventory.snapshot()
            finally:
                await inventory.close()

        gpu = run(main()).gpus[0]
        assert gpu.memory_used_bytes >= snapshot.gpus[0].memory_used_bytes + (1 << 30)
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
