"""GPUs of a node as CDI names: the node's own file, written anew when the driver or the GPUs change."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from driver_tree import UUIDS, VERSION, make_tree
from fake_nvml import FakeDevice, FakeInstance, FakeNvml
from fal_agent.inventory import cdi
from fal_agent.inventory.cdi import GpuNames
from fal_agent.inventory.host import read_host
from fal_agent.inventory.machine import InventoryMachine
from fal_agent.inventory.model import Gpu, Host, Snapshot
from fal_agent.inventory.nvml import NvmlInventory
from fal_agent.launch import Devices, devices
from fal_agent.ports import MachineView
from fal_contract.v1 import agent_pb2
from fal_runtime.cdi.driver_tree import FILE_NAME, find_driver
from fal_runtime.cdi.nvidia import Driver, own_nodes
from fal_runtime.cdi.reader import Reader

HOST = Host(1, 1 << 30, 1 << 30, 1 << 30, "6.18")
Find = Callable[[str], Driver]


def gpu(uuid: str, node: str, index: int = 0) -> Gpu:
    return Gpu(uuid, index, "H100-80GB", "H100", 80 << 30, device_nodes=(node, "/dev/nvidiactl"))


def snapshot(*gpus: Gpu, version: str = VERSION) -> Snapshot:
    return Snapshot(1, gpus, version, "12.4", HOST)


@pytest.fixture
def find(tmp_path: Path) -> Find:
    _folder, dev = make_tree(tmp_path / "tree", nodes=False)
    return lambda version: find_driver(version, root=tmp_path / "tree", dev=dev)


def test_own_file_names_what_there_is_and_follows_changes(tmp_path: Path, find: Find) -> None:
    names = GpuNames(tmp_path / "own", (tmp_path / "etc",), find=find)
    one, two = gpu(UUIDS[0], "/dev/null"), gpu(UUIDS[1], "/dev/zero", 1)
    assert names.refresh(snapshot(one)) == {UUIDS[0]: f"nvidia.com/gpu={UUIDS[0]}"}
    file = tmp_path / "own" / FILE_NAME
    first = file.read_text()
    assert VERSION in first
    before = file.stat().st_mtime_ns
    assert names.refresh(snapshot(one))
    assert file.stat().st_mtime_ns == before, "nothing changed, nothing is written"
    assert set(names.refresh(snapshot(one, two))) == set(UUIDS)
    assert set(names.refresh(snapshot(two))) == {UUIDS[1]}
    names.refresh(snapshot(two, version="560.1"))
    assert VERSION not in file.read_text(), "libraries of another driver are not shown"
    assert names.refresh(snapshot()) == {}
    assert not file.exists()


def test_a_control_node_that_comes_later_is_in_the_file(
    tmp_path: Path, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-uvm is loaded on first use, maybe by the first process after the agent."""
    there = ["/dev/nvidiactl"]
    monkeypatch.setattr(cdi, "control_nodes", lambda: tuple(there))
    names = GpuNames(tmp_path / "own", (), find=lambda version: replace(find(version), control_nodes=tuple(there)))
    for _ in range(2):
        names.refresh(snapshot(gpu(UUIDS[0], "/dev/null")))
    file = tmp_path / "own" / FILE_NAME
    assert "nvidia-uvm" not in file.read_text()
    there.append(cdi.UVM)
    names.refresh(snapshot(gpu(UUIDS[0], "/dev/null")))
    assert "/dev/nvidia-uvm" in file.read_text()


def test_a_gpu_without_its_node_has_no_name(tmp_path: Path, find: Find) -> None:
    names = GpuNames(tmp_path / "own", (), find=find)
    assert names.refresh(snapshot(gpu(UUIDS[0], "/dev/nvidia77"))) == {}


def test_what_others_wrote_counts_first(tmp_path: Path, find: Find) -> None:
    theirs = tmp_path / "etc"
    theirs.mkdir(mode=0o755)
    device = {"name": UUIDS[0], "containerEdits": {"env": ["THEIRS=1"]}}
    document = {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": [device]}
    (theirs / "nvidia.json").write_text(json.dumps(document))
    (theirs / "nvidia.json").chmod(0o644)
    names = GpuNames(tmp_path / "own", (theirs,), find=find)
    both = (gpu(UUIDS[0], "/dev/null"), gpu(UUIDS[1], "/dev/zero", 1))
    assert set(names.refresh(snapshot(*both))) == set(UUIDS)
    registry = Reader((tmp_path / "own", theirs)).registry()
    assert registry.devices[f"nvidia.com/gpu={UUIDS[0]}"][0].path == str(theirs / "nvidia.json")
    assert registry.devices[f"nvidia.com/gpu={UUIDS[1]}"][0].path == str(tmp_path / "own" / FILE_NAME)


def test_an_assignments_devices_are_names_only_where_all_have_one() -> None:
    view = MachineView(
        agent_pb2.Inventory(), {}, devices={"a": ("/dev/nvidia0", "/dev/nvidiactl"), "b": ("/dev/nvidiactl",)},
        cdi={"a": "nvidia.com/gpu=a"},
    )  # fmt: skip
    assert devices(["a"], view) == Devices(cdi=("nvidia.com/gpu=a",))
    assert devices(["a", "b"], view) == Devices(nodes=("/dev/nvidia0", "/dev/nvidiactl"))
    assert devices([], view) == Devices()
    assert devices(["b"], replace(view, devices={})) == Devices()


def test_mig_instances_have_the_nodes_of_their_capabilities_alone(tmp_path: Path) -> None:
    parts = [FakeInstance("A100 MIG 1g.10gb", 9728 << 20, gpu_instance=at) for at in (7, 9)]
    library = FakeNvml([FakeDevice("NVIDIA A100-SXM4-80GB", 81920 << 20, mig=parts, mig_enabled=True)])
    for at, minor in ((7, 66), (9, 84)):
        folder = tmp_path / "gpu0" / "mig" / f"gi{at}"
        (folder / "ci0").mkdir(parents=True)
        (folder / "access").write_text(f"DeviceFileMinor: {minor}\nDeviceFileMode: 292\n")
        (folder / "ci0" / "access").write_text(f"DeviceFileMinor: {minor + 1}\n")

    async def main() -> list[Gpu]:
        inventory = NvmlInventory(read_host=lambda: HOST, library=library, capabilities=tmp_path)
        try:
            return list((await inventory.snapshot()).gpus)
        finally:
            await inventory.close()

    first, second = asyncio.run(main())
    assert own_nodes(first.device_nodes) == (
        "/dev/nvidia0",
        "/dev/nvidia-caps/nvidia-cap66",
        "/dev/nvidia-caps/nvidia-cap67",
    )
    assert own_nodes(second.device_nodes)[1:] == ("/dev/nvidia-caps/nvidia-cap84", "/dev/nvidia-caps/nvidia-cap85")
    (tmp_path / "gpu0/mig/gi9/ci0/access").unlink()
    assert asyncio.run(main())[1].device_nodes == (), "without its capabilities nothing would open it"


def test_the_machine_tells_names(tmp_path: Path, find: Find) -> None:
    library = FakeNvml([FakeDevice("NVIDIA H100 80GB HBM3", 81920 << 20)])

    async def main() -> MachineView:
        inventory = NvmlInventory(read_host=lambda: read_host(tmp_path), library=library)
        machine = InventoryMachine(inventory, names=GpuNames(tmp_path / "own", (), find=find))
        try:
            return await machine.look()
        finally:
            await machine.close()

    view = asyncio.run(main())
    assert bool(view.cdi) == os.path.exists("/dev/nvidia0")
    assert view.devices
