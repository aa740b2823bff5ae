"""GPU names, `--sim-gpus`, driver trouble, and what the agent and scheduler are shown."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from fake_nvml import FakeDevice, FakeNvml
from fal_agent.inventory.catalog import CATALOG, normalise
from fal_agent.inventory.driver_thread import DriverThread
from fal_agent.inventory.host import read_host
from fal_agent.inventory.machine import InventoryMachine, open_inventory, told_of
from fal_agent.inventory.model import Host, Snapshot
from fal_agent.inventory.nvml import NvmlInventory
from fal_agent.inventory.simulated import SimulatedInventory
from fal_agent.inventory.spec import parse_sim_gpus
from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2

HOST = Host(cpu_cores=8, memory_bytes=1 << 36, disk_bytes=1 << 40, disk_free_bytes=1 << 39, kernel="6.1")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("product", "mib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "H100-80GB"),
        ("NVIDIA H100 PCIe", 81559, "H100-80GB"),
        ("NVIDIA H100 NVL", 95830, "H100-94GB"),
        ("NVIDIA H200", 143771, "H200-141GB"),
        ("NVIDIA B200", 183359, "B200-180GB"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100-40GB"),
        ("NVIDIA A100-SXM4-40GB", 40536, "A100-40GB"),
        ("NVIDIA L40S", 46068, "L40S-48GB"),
        ("NVIDIA L40", 46068, "L40-48GB"),
        ("NVIDIA L4", 23034, "L4-24GB"),
        ("Tesla T4", 15360, "T4-16GB"),
        ("Tesla V100-SXM2-32GB", 32510, "V100-32GB"),
        ("NVIDIA A10G", 23028, "A10G-24GB"),
        ("NVIDIA A10", 23028, "A10-24GB"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX4090-24GB"),
        ("NVIDIA RTX A6000", 49140, "RTXA6000-48GB"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX6000ADA-48GB"),
        ("NVIDIA GeForce RTX 4090 D", 24564, "RTX-4090-D-24GB"),
        ("NVIDIA GeForce RTX 3090 Ti", 24564, "RTX-3090-TI-24GB"),
        ("NVIDIA H100 64GB", 65000, "H100-63GB"),
        ("NVIDIA Foo X9 32GB", 32768, "FOO-X9-32GB"),
        ("NVIDIA", 8192, "GPU-8GB"),
    ],
)
def test_product_names_become_model_names(product: str, mib: int, name: str) -> None:
    assert normalise(product, mib * MIB) == name


@pytest.mark.parametrize("model", CATALOG.values(), ids=str)
def test_every_model_of_the_catalog_is_recognised_by_its_own_product(model: Any) -> None:
    assert normalise(model.product, model.memory_bytes) == model.name


# --- --sim-gpus


def simulated(text: str, node_name: str = "n-1") -> Snapshot:
    inventory = SimulatedInventory(parse_sim_gpus(text), node_name=node_name, read_host=lambda: HOST)
    return asyncio.run(inventory.snapshot())


def test_simulated_gpus_are_the_same_after_a_restart_and_differ_between_nodes() -> None:
    ids = [gpu.id for gpu in simulated("8xH100-80GB").gpus]
    assert ids == [gpu.id for gpu in simulated("8xH100-80GB").gpus]
    assert not set(ids) & {gpu.id for gpu in simulated("8xH100-80GB", "n-2").gpus}
    assert len(set(ids)) == 8


def test_groups_and_profiles() -> None:
    gpus = simulated("2xh100-80gb:mig=3g.40gb*1+1g.10gb*4, 1xT4-16GB").gpus
    assert sorted(gpu.mig_profile for gpu in gpus) == ["", *["1g.10gb"] * 8, *["3g.40gb"] * 2]
    assert len({gpu.parent_id for gpu in gpus if gpu.mig_profile}) == 2
    assert gpus[-1].model == "T4-16GB"
    assert gpus[-1].links == ()
    assert [gpu.index for gpu in gpus] == [0] * 5 + [1] * 5 + [2]


@pytest.mark.parametrize(
    ("text", "says", "remedy"),
    [
        ("", "not a GPU specification", "8xH100-80GB"),
        ("H100-80GB", "not a GPU specification", "COUNTxMODEL"),
        ("8xH100", "unknown GPU model 'H100'", "Did you mean H100-80GB or H100-94GB?"),
        ("8xH100-80G", "unknown GPU model", "Did you mean H100-80GB?"),
        ("8xZZZ", "unknown GPU model", "Known: "),
        ("0xT4-16GB", "asks for 0 GPUs", "1 to 64"),
        ("40xT4-16GB,40xL4-24GB", "asks for 80 GPUs", "at most 64"),
        ("1xT4-16GB,", "not a GPU specification", "groups are separated"),
        ("1xT4-16GB:mig=1g.10gb", "which it cannot", "Leave out"),
        ("1xA100-80GB:mig=9g.10gb", "MIG profile '9g.10gb'", "1g.10gb"),
        ("1xA100-80GB:mig=1g.10gb*8", "8 slices of 7", "fewer"),
        ("1xA100-40GB:mig=3g.40gb*2", "80 GB of 40 GB", "fewer"),
        ("1xA100-80GB:foo=1", "unknown option 'foo=1'", "mig="),
    ],
)
def test_bad_specifications_name_field_value_and_remedy(text: str, says: str, remedy: str) -> None:
    with pytest.raises(FalError) as caught:
        parse_sim_gpus(text)
    assert caught.value.code is Code.INVALID
    assert caught.value.field == "sim_gpus"
    assert says in caught.value.what
    assert remedy in caught.value.remedy


# --- NVML in trouble


def nvml(library: Any, *, timeout_s: float = 5.0, sys_pci: Path = Path("/nowhere")) -> NvmlInventory:
    return NvmlInventory(read_host=lambda: HOST, library=library, timeout_s=timeout_s, sys_pci=sys_pci)


def test_the_fake_plays_functions_that_exist_with_the_same_parameters() -> None:
    played = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(played) > 20
    for name in played:
        real = inspect.unwrap(getattr(pynvml, name))
        ours = list(inspect.signature(getattr(FakeNvml, name)).parameters)[1:]
        accepted = inspect.signature(real).parameters
        assert len(ours) <= len(accepted), name


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver library"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "reboot"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "the NVIDIA driver says"),
    ],
)
def test_a_machine_without_a_driver_is_a_node_without_gpus(error: int, says: str) -> None:
    snapshot = asyncio.run(nvml(FakeNvml([], init_error=error)).snapshot())
    assert snapshot.gpus == ()
    assert says in snapshot.problem
    assert snapshot.host == HOST


def test_a_driver_that_goes_away_and_comes_back() -> None:
    library = FakeNvml([FakeDevice("Tesla T4", 15360 * MIB, ecc=False)])

    async def scenario() -> None:
        inventory = nvml(library)
        first = await inventory.snapshot()
        assert first.gpus[0].ok
        library.initialised, library.init_error = 0, pynvml.NVML_ERROR_DRIVER_NOT_LOADED
        without = await inventory.snapshot()
        assert "not loaded" in without.gpus[0].degraded
        assert "not loaded" in without.problem
        library.init_error = None
        back = await inventory.snapshot()
        assert back.gpus[0].ok
        assert back.problem == ""
        assert back.generation == first.generation + 2
        await inventory.close()

    asyncio.run(scenario())


def test_what_a_part_does_not_support_is_left_unknown(tmp_path: Path) -> None:
    (tmp_path / "0000:18:00.0").mkdir()
    (tmp_path / "0000:18:00.0" / "numa_node").write_text("1\n")
    library = FakeNvml(
        [FakeDevice("Tesla T4", 15360 * MIB, ecc=False), FakeDevice("Tesla T4", 15360 * MIB)], memory_v2=False
    )
    first, second = asyncio.run(nvml(library, sys_pci=tmp_path).snapshot()).gpus
    assert first.ecc == second.ecc
    assert (first.numa_node, second.numa_node) == (1, -1)
    assert first.memory_used_bytes == 500 * MIB  # the old call counts what the driver keeps
    assert first.power_w == 71
    assert first.device_nodes == ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")


def test_mig_mode_without_instances_is_no_gpu_to_use() -> None:
    (gpu,) = asyncio.run(
        nvml(FakeNvml([FakeDevice("NVIDIA H100 PCIe", 81559 * MIB, mig_enabled=True)])).snapshot()
    ).gpus
    assert "no instances" in gpu.degraded


def test_straight_nvlinks_are_counted_per_peer() -> None:
    trio = [
        FakeDevice("Tesla V100-SXM2-32GB", 32510 * MIB, nvlinks_to={1: 2, 2: 1}),
        FakeDevice("Tesla V100-SXM2-32GB", 32510 * MIB, nvlinks_to={0: 2}),
        FakeDevice("Tesla V100-SXM2-32GB", 32510 * MIB, nvlinks_to={0: 1}),
    ]
    gpus = asyncio.run(nvml(FakeNvml(trio)).snapshot()).gpus
    links = {
        (gpu.index, next(o.index for o in gpus if o.id == link.peer_id)): link for gpu in gpus for link in gpu.links
    }
    assert [links[0, 1].count, links[0, 2].count, links[1, 0].count] == [2, 1, 2]
    assert str(links[1, 2].kind) == "PCIE_HOST"


def test_links_are_asked_once_while_the_devices_stay() -> None:
    library = FakeNvml([FakeDevice("NVIDIA H200", 143771 * MIB, nvlinks_to_switch=18) for _ in range(8)])

    async def scenario() -> tuple[int, int, int]:
        inventory = nvml(library)
        counts = []
        for _ in range(2):
            await inventory.snapshot()
            counts.append(library.calls.count("nvmlDeviceGetNvLinkState"))
        library.devices[0].lost = True
        await inventory.snapshot()
        await inventory.close()
        return counts[0], counts[1], library.calls.count("nvmlDeviceGetNvLinkState")

    once, twice, changed = asyncio.run(scenario())
    assert once == twice > 0
    assert changed > twice


def test_a_hung_driver_is_given_up_and_not_asked_again_until_it_answers() -> None:
    library = FakeNvml([FakeDevice("Tesla T4", 15360 * MIB)])
    release, asked = threading.Event(), 0
    counted = library.nvmlDeviceGetCount

    def hang() -> int:
        nonlocal asked
        asked += 1
        release.wait(20)
        return counted()

    async def scenario() -> None:
        inventory = nvml(library, timeout_s=0.05)
        machine = InventoryMachine(inventory)
        assert (await machine.look()).gpus
        library.nvmlDeviceGetCount = hang  # type: ignore[method-assign]
        for says in ("within 0.05 s", "an earlier question"):
            with pytest.raises(FalError, match=says) as caught:
                await inventory.snapshot()
            assert caught.value.code is Code.TIMEOUT
        view = await machine.look()
        assert ["has not answered" in gpu.unhealthy for gpu in view.gpus.values()] == [True]
        assert view.inventory.gpus[0].health == agent_pb2.GPU_HEALTH_QUARANTINED
        assert asked == 1
        release.set()
        async with asyncio.timeout(10):
            while True:
                try:
                    snapshot = await inventory.snapshot()
                    break
                except FalError:
                    await asyncio.sleep(0.01)
        assert snapshot.gpus[0].ok
        await inventory.close()

    asyncio.run(scenario())


def test_a_call_that_outlives_the_loop_harms_nobody() -> None:
    release = threading.Event()
    thread = DriverThread("test", timeout_s=0.01)

    async def scenario() -> None:
        with pytest.raises(FalError):
            await thread.call(lambda: release.wait(20))

    asyncio.run(scenario())
    release.set()
    thread.close()


def test_errors_of_the_driver_thread_reach_the_caller() -> None:
    async def scenario() -> None:
        thread = DriverThread("test", timeout_s=5)

        def boom() -> None:
            raise ValueError("boom")

        with pytest.raises(ValueError, match="boom"):
            await thread.call(boom)
        assert await thread.call(lambda: 5) == 5
        thread.close()

    asyncio.run(scenario())


# --- what others are shown


def test_the_scheduler_is_told_every_field() -> None:
    snapshot = simulated("2xH100-80GB,1xA100-80GB:mig=1g.10gb")
    told = told_of(snapshot)
    first, cut = told.gpus[0], told.gpus[2]
    assert (first.model, first.product) == ("H100-80GB", "NVIDIA H100 80GB HBM3")
    assert (first.memory_bytes, first.health) == (81559 * MIB, agent_pb2.GPU_HEALTH_OK)
    assert [(link.peer_id, link.kind, link.count) for link in first.links] == [(told.gpus[1].id, "NVLINK", 18)]
    assert (cut.model, cut.mig_profile) == ("A100-80GB-MIG-1g.10gb", "1g.10gb")
    assert cut.parent_id.startswith("GPU-")
    assert (told.cpu_milli, told.memory_bytes, told.kernel) == (8000, 1 << 36, "6.1")


def test_the_view_of_the_agent_follows_faults_and_uses() -> None:
    inventory = SimulatedInventory(parse_sim_gpus("2xT4-16GB"), node_name="n", read_host=lambda: HOST)
    told: list[str] = []

    async def scenario() -> None:
        machine = InventoryMachine(inventory, on_problem=told.append)
        first = await machine.look()
        one, two = first.gpus
        inventory.vanish(one)
        inventory.use(two, memory_bytes=3 << 30, pids=[9])
        second = await machine.look()
        assert "not found" in second.gpus[one].unhealthy
        assert (second.gpus[two].unhealthy, second.gpus[two].memory_used_bytes, second.gpus[two].pids) == (
            "",
            3 << 30,
            (9,),
        )
        assert second.inventory.generation > first.inventory.generation
        assert (second.cpu_milli, second.memory_bytes) == (8000, 1 << 36)
        await machine.close()

    asyncio.run(scenario())
    assert told == []


def test_who_asks_while_a_look_is_under_way_shares_the_next_one() -> None:
    inventory = SimulatedInventory(parse_sim_gpus("2xT4-16GB"), node_name="n", read_host=lambda: HOST)

    class Slow:
        looks = 0
        go = asyncio.Event()
        begun = asyncio.Event()

        async def snapshot(self) -> Snapshot:
            self.looks += 1
            seen = await inventory.snapshot()
            self.begun.set()
            await self.go.wait()
            return seen

        async def close(self) -> None:
            return

    async def scenario() -> None:
        slow = Slow()
        machine = InventoryMachine(slow)
        first = asyncio.create_task(machine.look())
        await slow.begun.wait()
        others = [asyncio.create_task(machine.look()) for _ in range(50)]
        await asyncio.sleep(0)
        others[0].cancel()
        gpu = (await inventory.snapshot()).gpus[0].id
        inventory.use(gpu, memory_bytes=1 << 30, pids=[9])  # after the first look, before theirs
        slow.go.set()
        assert (await first).gpus[gpu].pids == ()
        seen = [(await other).gpus[gpu].pids for other in others[1:]]
        assert (slow.looks, seen) == (2, [(9,)] * 49)

    asyncio.run(scenario())


def test_a_first_look_that_fails_is_an_error() -> None:
    class Broken:
        async def snapshot(self) -> Snapshot:
            raise FalError(Code.TIMEOUT, "hung", remedy="Reboot.")

        async def close(self) -> None:
            return

    with pytest.raises(FalError, match="hung"):
        asyncio.run(InventoryMachine(Broken()).look())


def test_options_choose_the_provider(tmp_path: Path) -> None:
    chosen: Callable[[str], Any] = lambda text: open_inventory(sim_gpus=text, node_name="n", state_dir=tmp_path)  # noqa: E731
    assert isinstance(chosen("1xT4-16GB"), SimulatedInventory)
    assert isinstance(chosen(""), NvmlInventory)
    with pytest.raises(FalError):
        chosen("nonsense")


def test_the_host_is_read_from_the_kernel(tmp_path: Path) -> None:
    host = read_host(tmp_path)
    total_kib = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert abs(host.memory_bytes - total_kib * 1024) < 1 << 20
    assert host.cpu_cores >= 1
