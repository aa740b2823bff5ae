"""One contract for every inventory provider: simulated, NVML over a fake library, NVML over a real driver."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fake_nvml import FakeDevice, FakeInstance, FakeNvml
from fal_agent.inventory.host import read_host
from fal_agent.inventory.model import Ecc, Gpu, Inventory, LinkKind, Snapshot
from fal_agent.inventory.nvml import NvmlInventory
from fal_agent.inventory.simulated import SimulatedInventory
from fal_agent.inventory.spec import parse_sim_gpus

_MODEL = re.compile(r"[A-Z0-9-]+-\d+GB(-MIG-[1-7]g\.\d+gb(\.\w+|\+\w+)*)?")


@dataclass
class Subject:
    """A provider and the strings that move its hardware."""

    inventory: Inventory
    heat: Callable[[str, int], None]
    break_memory: Callable[[str, Ecc], None]
    use: Callable[[str, int, tuple[int, ...]], None]
    vanish: Callable[[str, bool], None]


def _simulated(tmp_path: Path) -> Subject:
    groups = parse_sim_gpus("4xH100-80GB,2xL40S-48GB,1xA100-80GB:mig=1g.10gb*7")
    inventory = SimulatedInventory(groups, node_name="n-1", read_host=lambda: read_host(tmp_path))
    return Subject(
        inventory,
        heat=inventory.set_temperature,
        break_memory=inventory.set_ecc,
        use=lambda gpu_id, used, pids: inventory.use(gpu_id, memory_bytes=used, pids=pids),
        vanish=lambda gpu_id, gone: inventory.vanish(gpu_id) if gone else inventory.restore(gpu_id),
    )


def devices() -> list[FakeDevice]:
    sxm = [FakeDevice("NVIDIA H100 80GB HBM3", 81559 << 20, nvlinks_to_switch=18, numa=n // 2) for n in range(4)]
    pcie = [FakeDevice("NVIDIA L40S", 46068 << 20, numa=1, volatile=0) for _ in range(2)]
    slices = [FakeInstance("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9728 << 20) for _ in range(7)]
    cut = FakeDevice("NVIDIA A100-SXM4-80GB", 81920 << 20, numa=1, mig=slices, mig_enabled=True)
    return [*sxm, *pcie, cut]


def _fake(tmp_path: Path) -> Subject:
    library = FakeNvml(devices())
    by_id = {device.uuid: device for device in library.devices}

    def break_memory(gpu_id: str, ecc: Ecc) -> None:
        device = by_id[gpu_id]
        device.volatile, device.aggregate = ecc.volatile_uncorrected, ecc.aggregate_uncorrected
        device.remapped = (0, ecc.remapped_rows, int(ecc.remap_pending), int(ecc.remap_failed))

    def use(gpu_id: str, used: int, pids: tuple[int, ...]) -> None:
        by_id[gpu_id].used_bytes, by_id[gpu_id].pids = used, pids

    return Subject(
        NvmlInventory(read_host=lambda: read_host(tmp_path), library=library),
        heat=lambda gpu_id, degrees: setattr(by_id[gpu_id], "temperature_c", degrees),
        break_memory=break_memory,
        use=use,
        vanish=lambda gpu_id, gone: setattr(by_id[gpu_id], "lost", gone),
    )


PLAYED = {"simulated": _simulated, "nvml-fake": _fake}


@pytest.fixture(params=PLAYED)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return PLAYED[request.param](tmp_path)


@pytest.fixture(params=[*PLAYED, pytest.param("nvml", marks=pytest.mark.gpu)])
def inventory(request: pytest.FixtureRequest, tmp_path: Path) -> Inventory:
    if request.param != "nvml":
        return PLAYED[request.param](tmp_path).inventory
    real = NvmlInventory(read_host=lambda: read_host(tmp_path))
    if not asyncio.run(_once(real)).gpus:
        pytest.skip("no NVIDIA driver or GPU on this machine")
    return NvmlInventory(read_host=lambda: read_host(tmp_path))


async def _once(inventory: Inventory) -> Snapshot:
    try:
        return await inventory.snapshot()
    finally:
        await inventory.close()


def run(inventory: Inventory, scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        try:
            await scenario()
        finally:
            await inventory.close()
            await inventory.close()

    asyncio.run(main())


def test_every_gpu_is_described(inventory: Inventory) -> None:
    snapshot = asyncio.run(_once(inventory))
    assert snapshot.gpus
    assert snapshot.generation == 1
    assert snapshot.driver_version
    assert snapshot.problem == ""
    assert len({gpu.id for gpu in snapshot.gpus}) == len(snapshot.gpus)
    assert [gpu.index for gpu in snapshot.gpus] == sorted(gpu.index for gpu in snapshot.gpus)
    for gpu in snapshot.gpus:
        assert gpu.id.startswith("MIG-" if gpu.mig_profile else "GPU-")
        assert _MODEL.fullmatch(gpu.model), gpu.model
        assert gpu.product
        assert 1 << 30 <= gpu.memory_bytes < 1 << 40
        assert 0 <= gpu.memory_used_bytes <= gpu.memory_bytes
        assert re.fullmatch(r"[0-9A-F]{8}:[0-9A-F]{2}:[0-9A-F]{2}\.\d", gpu.pci_bus_id.upper())
        assert gpu.temperature_c < 120


def test_the_host_is_described(inventory: Inventory) -> None:
    host = asyncio.run(_once(inventory)).host
    assert host.cpu_cores >= 1
    assert host.memory_bytes > 1 << 28
    assert 0 <= host.disk_free_bytes <= host.disk_bytes
    assert host.kernel


def test_links_name_every_other_gpu_and_agree_from_both_ends(inventory: Inventory) -> None:
    gpus = {gpu.id: gpu for gpu in asyncio.run(_once(inventory)).gpus}
    linkable = {gpu.id for gpu in gpus.values() if not gpu.mig_profile}
    for gpu in gpus.values():
        expected = linkable - {gpu.id} if gpu.id in linkable else set()
        assert {link.peer_id for link in gpu.links} == expected
        for link in gpu.links:
            back = next(other for other in gpus[link.peer_id].links if other.peer_id == gpu.id)
            assert (back.kind, back.count) == (link.kind, link.count)
            assert link.count >= 1


def test_mig_instances_stand_instead_of_their_device(inventory: Inventory) -> None:
    gpus = asyncio.run(_once(inventory)).gpus
    listed = {gpu.id for gpu in gpus}
    for gpu in gpus:
        assert bool(gpu.mig_profile) == bool(gpu.parent_id) == ("-MIG-" in gpu.model)
        assert gpu.parent_id not in listed


def test_looking_again_changes_nothing(inventory: Inventory) -> None:
    async def scenario() -> None:
        first, second = await inventory.snapshot(), await inventory.snapshot()
        assert [gpu.id for gpu in first.gpus] == [gpu.id for gpu in second.gpus]
        assert first.generation == second.generation

    run(inventory, scenario)


# --- the same hardware and the same faults in each played provider


def _named(snapshot: Snapshot, gpu_id: str) -> Gpu:
    return next(gpu for gpu in snapshot.gpus if gpu.id == gpu_id)


def test_models_links_and_instances_are_those_of_the_hardware(subject: Subject) -> None:
    gpus = asyncio.run(_once(subject.inventory)).gpus
    models = [gpu.model for gpu in gpus]
    assert models == ["H100-80GB"] * 4 + ["L40S-48GB"] * 2 + ["A100-80GB-MIG-1g.10gb"] * 7
    h100, l40s = gpus[0], gpus[4]
    kinds = {link.peer_id: (link.kind, link.count) for link in h100.links}
    assert all(kinds[gpu.id] == (LinkKind.NVLINK, 18) for gpu in gpus[1:4])
    assert kinds[l40s.id][0] is LinkKind.SYSTEM
    assert {link.peer_id: link.kind for link in l40s.links}[gpus[5].id] is LinkKind.PCIE_HOST
    assert len({gpu.parent_id for gpu in gpus[6:]}) == 1


def test_a_vanished_gpu_stays_listed_as_degraded_until_it_is_back(subject: Subject) -> None:
    async def scenario() -> None:
        before = await subject.inventory.snapshot()
        gone = before.gpus[1].id
        subject.vanish(gone, True)
        without = await subject.inventory.snapshot()
        assert [gpu.id for gpu in without.gpus] == [gpu.id for gpu in before.gpus]
        assert "not found any more" in _named(without, gone).degraded
        assert without.generation == before.generation + 1
        assert all(gpu.ok for gpu in without.gpus if gpu.id != gone)
        again = await subject.inventory.snapshot()
        assert again.generation == without.generation
        assert _named(again, gone).degraded == _named(without, gone).degraded
        subject.vanish(gone, False)
        back = await subject.inventory.snapshot()
        assert _named(back, gone).ok
        assert back.generation == without.generation + 1

    run(subject.inventory, scenario)


@pytest.mark.parametrize(
    ("ecc", "says"),
    [
        (Ecc(volatile_uncorrected=2), "2 uncorrected"),
        (Ecc(remap_pending=True), "reset"),
        (Ecc(remap_failed=True), "replace"),
    ],
)
def test_memory_faults_degrade(subject: Subject, ecc: Ecc, says: str) -> None:
    async def scenario() -> None:
        first = await subject.inventory.snapshot()
        subject.break_memory(first.gpus[0].id, ecc)
        broken = await subject.inventory.snapshot()
        assert says in broken.gpus[0].degraded
        assert broken.gpus[0].ecc == ecc
        assert broken.gpus[1].ok
        assert broken.generation == first.generation + 1

    run(subject.inventory, scenario)


def test_old_errors_and_remapped_rows_do_not_degrade(subject: Subject) -> None:
    async def scenario() -> None:
        first = await subject.inventory.snapshot()
        subject.break_memory(first.gpus[0].id, Ecc(aggregate_uncorrected=9, remapped_rows=3))
        assert (await subject.inventory.snapshot()).gpus[0].ok

    run(subject.inventory, scenario)


def test_heat_degrades_once_and_passes(subject: Subject) -> None:
    async def scenario() -> None:
        first = await subject.inventory.snapshot()
        gpu_id = first.gpus[0].id
        generations, fit = [], []
        for degrees in (94, 95, 97, 60):
            subject.heat(gpu_id, degrees)
            snapshot = await subject.inventory.snapshot()
            generations.append(snapshot.generation - first.generation)
            fit.append(_named(snapshot, gpu_id).ok)
            assert _named(snapshot, gpu_id).temperature_c == degrees
        assert fit == [True, False, False, True]
        assert generations == [0, 1, 1, 2]

    run(subject.inventory, scenario)


def test_use_of_memory_is_seen_and_is_no_news(subject: Subject) -> None:
    async def scenario() -> None:
        first = await subject.inventory.snapshot()
        subject.use(first.gpus[0].id, 5 << 30, (42, 7))
        second = await subject.inventory.snapshot()
        assert second.gpus[0].memory_used_bytes == 5 << 30
        assert sorted(second.gpus[0].pids) == [7, 42]
        assert second.generation == first.generation

    run(subject.inventory, scenario)
