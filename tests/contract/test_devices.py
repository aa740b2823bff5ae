"""What can be done to GPUs, and what their driver tells by itself: one contract for simulated GPUs and for NVML."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from fake_nvml import FakeDevice, FakeNvml
from fal_agent.inventory import checking
from fal_agent.inventory.host import read_host
from fal_agent.inventory.model import Checked, DeviceEvent, Devices, Gpu, Snapshot
from fal_agent.inventory.nvml import NvmlInventory
from fal_agent.inventory.sim_faults import FAULT_FILE, FaultFile
from fal_agent.inventory.simulated import SimulatedInventory
from fal_agent.inventory.spec import parse_sim_gpus
from fal_contract.errors import Code, FalError
from fal_contract.limits import GPU_EVENTS_MAX

WAIT_S = 20.0


@dataclass
class Subject:
    """A provider with two H100 and an A10, and the strings that move its hardware."""

    devices: Devices
    xid: Callable[[str, int], None]
    slow: Callable[[str], None]
    bad_check: Callable[[str], None]
    no_reset: Callable[[str], None]
    resets: list[str] = field(default_factory=list)
    library: FakeNvml | None = None


def _simulated(tmp_path: Path) -> Subject:
    groups = parse_sim_gpus("2xH100-80GB,1xA10-24GB")
    sim = SimulatedInventory(groups, node_name="n-1", read_host=lambda: read_host(tmp_path))
    return Subject(
        sim,
        xid=sim.xid,
        slow=lambda gpu: sim.break_gpu(gpu, throttled=("heat",), utilisation_percent=95, clock_mhz=400, pcie_width=4),
        bad_check=lambda gpu: sim.break_gpu(gpu, check="wrong bits"),
        no_reset=lambda gpu: sim.break_gpu(gpu, no_reset=True),
    )


def _nvml(tmp_path: Path) -> Subject:
    h100 = [FakeDevice("NVIDIA H100 80GB HBM3", 81559 << 20, nvlinks_to_switch=18) for _ in range(2)]
    library = FakeNvml([*h100, FakeDevice("NVIDIA A10", 23028 << 20, ecc=False)])
    by_id = {device.uuid: device for device in library.devices}
    wrong: dict[str, None] = {}
    stubborn: dict[str, None] = {}
    resets: list[str] = []

    async def check(gpu_id: str) -> Checked:
        return Checked(gpu_id not in wrong, "wrong bits" if gpu_id in wrong else "fine")

    async def reset(gpu_id: str) -> None:
        assert library.initialised == 0, "the library is let go of first"
        assert library.sets_open == 0, "and nobody waits for events"
        if gpu_id in stubborn:
            raise FalError(Code.FAILED_PRECONDITION, f"GPU {gpu_id} could not be reset: in use", remedy="Restart.")
        by_id[gpu_id].volatile = 0
        resets.append(gpu_id)

    devices = NvmlInventory(
        read_host=lambda: read_host(tmp_path), library=library, check=check, reset=reset, event_wait_ms=20
    )

    def slow(gpu_id: str) -> None:
        device = by_id[gpu_id]
        device.throttle = pynvml.nvmlClocksThrottleReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonSwPowerCap
        device.clock_mhz, device.pcie_width = 400, 4

    return Subject(
        devices,
        xid=lambda gpu_id, code: library.tell(by_id[gpu_id], pynvml.nvmlEventTypeXidCriticalError, code),
        slow=slow,
        bad_check=lambda gpu_id: wrong.update({gpu_id: None}),
        no_reset=lambda gpu_id: stubborn.update({gpu_id: None}),
        resets=resets,
        library=library,
    )


PLAYED = {"simulated": _simulated, "nvml-fake": _nvml}


@pytest.fixture(params=PLAYED)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return PLAYED[request.param](tmp_path)


class Heard:
    """Events as they come, to be waited for."""

    def __init__(self) -> None:
        self.events: list[DeviceEvent] = []
        self._more = asyncio.Event()

    def __call__(self, event: DeviceEvent) -> None:
        self.events.append(event)
        self._more.set()

    async def until(self, count: int) -> list[DeviceEvent]:
        async with asyncio.timeout(WAIT_S):
            while len(self.events) < count:
                self._more.clear()
                await self._more.wait()
        return self.events


def run(devices: Devices, scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        try:
            async with asyncio.timeout(60):
                await scenario()
        finally:
            await devices.close()
            await devices.close()

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "nvml-events"]


def named(snapshot: Snapshot, gpu_id: str) -> Gpu:
    return next(gpu for gpu in snapshot.gpus if gpu.id == gpu_id)


def test_xids_are_heard_in_their_order_with_their_device(subject: Subject) -> None:
    async def scenario() -> None:
        heard = Heard()
        subject.devices.listen(heard)
        one, two, _ = (gpu.id for gpu in (await subject.devices.snapshot()).gpus)
        subject.xid(one, 31)
        subject.xid(two, 79)
        subject.xid(one, 48)
        events = await heard.until(3)
        assert events == [DeviceEvent(one, "xid", 31), DeviceEvent(two, "xid", 79), DeviceEvent(one, "xid", 48)]
        await subject.devices.close()
        subject.xid(one, 13)
        assert len(heard.events) == 3

    run(subject.devices, scenario)


def test_slowness_is_seen_and_is_no_news_for_placement(subject: Subject) -> None:
    async def scenario() -> None:
        first = await subject.devices.snapshot()
        assert first.gpus[0].throttled == ()
        subject.slow(first.gpus[0].id)
        gpu = (second := await subject.devices.snapshot()).gpus[0]
        assert (gpu.throttled, gpu.clock_mhz, gpu.pcie_width, gpu.pcie_width_max) == (("heat",), 400, 4, 16)
        assert gpu.ok
        assert second.generation == first.generation

    run(subject.devices, scenario)


def test_a_check_finds_what_is_wrong(subject: Subject) -> None:
    async def scenario() -> None:
        one, two, _ = (gpu.id for gpu in (await subject.devices.snapshot()).gpus)
        subject.bad_check(one)
        assert await subject.devices.check(one) == Checked(False, "wrong bits")
        assert (await subject.devices.check(two)).passed

    run(subject.devices, scenario)


def test_a_reset_clears_and_one_that_is_refused_says_so(subject: Subject) -> None:
    async def scenario() -> None:
        heard = Heard()
        subject.devices.listen(heard)
        one, two, _ = (gpu.id for gpu in (await subject.devices.snapshot()).gpus)
        await subject.devices.reset(one)
        assert named(await subject.devices.snapshot(), one).ok
        subject.no_reset(two)
        with pytest.raises(FalError) as refused:
            await subject.devices.reset(two)
        assert refused.value.code is Code.FAILED_PRECONDITION
        assert two in refused.value.what
        # Events are heard again afterwards.
        await subject.devices.snapshot()
        subject.xid(two, 13)
        assert (await heard.until(1))[-1] == DeviceEvent(two, "xid", 13)

    run(subject.devices, scenario)


def test_a_device_is_cut_and_made_whole_again(subject: Subject) -> None:
    async def scenario() -> None:
        first = await subject.devices.snapshot()
        device = first.gpus[0]
        await subject.devices.set_mig(device.id, ["1g.10gb", "3g.40gb", "1g.10gb"])
        cut = await subject.devices.snapshot()
        parts = [gpu for gpu in cut.gpus if gpu.parent_id == device.id]
        assert sorted(gpu.mig_profile for gpu in parts) == ["1g.10gb", "1g.10gb", "3g.40gb"]
        assert {gpu.model for gpu in parts} == {"H100-80GB-MIG-1g.10gb", "H100-80GB-MIG-3g.40gb"}
        assert all(gpu.ok for gpu in cut.gpus), "what went was meant to go"
        assert device.id not in {gpu.id for gpu in cut.gpus}
        assert len(cut.gpus) == 5
        assert cut.generation > first.generation

        await subject.devices.set_mig(device.id, ["7g.80gb"] if subject.library else ["2g.20gb"])
        other = [gpu for gpu in (await subject.devices.snapshot()).gpus if gpu.parent_id == device.id]
        assert len(other) == 1
        assert {gpu.id for gpu in other}.isdisjoint(gpu.id for gpu in parts)

        await subject.devices.set_mig(device.id, [])
        whole = await subject.devices.snapshot()
        assert [gpu.id for gpu in whole.gpus] == [gpu.id for gpu in first.gpus]
        assert all(gpu.ok for gpu in whole.gpus)

    run(subject.devices, scenario)


@pytest.mark.parametrize(
    ("layout", "word"),
    [(["3g"], "3g"), (["1g.10gb"] * 8, "many"), (["5g.50gb"], "5g.50gb")],
)
def test_a_layout_that_is_none_changes_nothing(subject: Subject, layout: list[str], word: str) -> None:
    async def scenario() -> None:
        first = await subject.devices.snapshot()
        with pytest.raises(FalError) as refused:
            await subject.devices.set_mig(first.gpus[0].id, layout)
        assert word in str(refused.value)

    run(subject.devices, scenario)


def test_a_part_without_mig_is_refused(subject: Subject) -> None:
    async def scenario() -> None:
        first = await subject.devices.snapshot()
        with pytest.raises(FalError):
            await subject.devices.set_mig(first.gpus[2].id, ["1g.10gb"])
        assert [gpu.id for gpu in (await subject.devices.snapshot()).gpus] == [gpu.id for gpu in first.gpus]

    run(subject.devices, scenario)


# --- NVML alone


def test_a_mode_that_waits_for_a_reset_says_so(tmp_path: Path) -> None:
    subject = _nvml(tmp_path)
    assert subject.library is not None
    subject.library.mig_pending = True

    async def scenario() -> None:
        first = await subject.devices.snapshot()
        with pytest.raises(FalError) as refused:
            await subject.devices.set_mig(first.gpus[0].id, ["1g.10gb"])
        assert "next reset" in refused.value.what

    run(subject.devices, scenario)


def test_an_event_set_that_ends_is_made_anew_and_a_look_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fal_agent.inventory.nvml_events._AGAIN_S", 0.02)
    subject = _nvml(tmp_path)
    library = subject.library
    assert library is not None

    async def scenario() -> None:
        heard = Heard()
        subject.devices.listen(heard)
        one = (await subject.devices.snapshot()).gpus[0].id
        library.tell_error(pynvml.NVML_ERROR_GPU_IS_LOST)
        assert await heard.until(1) == [DeviceEvent("", "lost")]
        subject.xid(one, 48)
        assert (await heard.until(2))[1] == DeviceEvent(one, "xid", 48)

    run(subject.devices, scenario)
    assert library.sets_open == 0


def test_memory_errors_and_devices_without_events(tmp_path: Path) -> None:
    subject = _nvml(tmp_path)
    library = subject.library
    assert library is not None

    async def scenario() -> None:
        heard = Heard()
        subject.devices.listen(heard)
        one = (await subject.devices.snapshot()).gpus[0].id
        library.tell(library.devices[0], pynvml.nvmlEventTypeDoubleBitEccError)
        assert await heard.until(1) == [DeviceEvent(one, "ecc")]
        assert library.registered == [device.uuid for device in library.devices[:2]], "an A10 here has none"

    run(subject.devices, scenario)


def test_a_storm_of_events_is_bounded_and_ends_with_a_look(tmp_path: Path) -> None:
    subject = _nvml(tmp_path)

    async def scenario() -> None:
        heard = Heard()
        subject.devices.listen(heard)
        one = (await subject.devices.snapshot()).gpus[0].id
        subject.xid(one, 0)
        await heard.until(1)
        events = subject.devices._events  # type: ignore[attr-defined]
        for code in range(2 * GPU_EVENTS_MAX):  # as the thread does, while the loop is busy
            events._hear(DeviceEvent(one, "xid", code))
        got = await heard.until(1 + GPU_EVENTS_MAX + 1)
        assert len(got) == GPU_EVENTS_MAX + 2
        assert got[-1] == DeviceEvent("", "lost")

    run(subject.devices, scenario)


# --- the check and the reset as programs


def checked(code: str, **options: Any) -> Checked:
    return asyncio.run(checking.check("GPU-x", command=(sys.executable, "-c", code), **options))


def test_the_checks_program_is_believed_only_where_it_speaks_clearly() -> None:
    head = "import json,os; "
    good = checked(
        head + "print('noise'); print(json.dumps({'passed': True, 'text': os.environ['CUDA_VISIBLE_DEVICES']}))"
    )
    assert good == Checked(True, "GPU-x")
    assert checked(head + "print(json.dumps({'passed': 'yes', 'text': 't'}))") == Checked(False, "t")
    assert checked("raise SystemExit(3)") == Checked(False, "the check ended with code 3: it said nothing")
    died = checked("import os; print('half'); os.abort()")
    assert (died.passed, "half" in died.text) == (False, True)
    flood = checked("print('x' * 1_000_000); print('[1]')")
    assert (flood.passed, flood.text) == (False, "the check ended with code 0: [1]")


def test_a_check_that_hangs_is_killed_with_its_children() -> None:
    hung = Checked(False, "the check did not end within 0.5 s")
    assert checked("import time; time.sleep(600)", timeout_s=0.5) == hung
    with_child = "import subprocess; subprocess.Popen(['sleep', '600'])"  # it holds the pipe open
    assert checked(with_child, timeout_s=0.5) == hung


def test_our_check_says_when_nothing_can_be_tried() -> None:
    said = asyncio.run(checking.check("GPU-none"))
    assert said.passed
    assert "not tried" in said.text


def test_a_reset_says_what_the_program_said(tmp_path: Path) -> None:
    program = tmp_path / "smi"
    program.write_text("#!/bin/sh\necho \"$@\"\necho 'In use by another client' >&2\nexit 19\n")
    program.chmod(0o755)
    with pytest.raises(FalError) as refused:
        asyncio.run(checking.reset("GPU-x", program=str(program)))
    assert refused.value.what == "GPU GPU-x could not be reset: In use by another client"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n')
    asyncio.run(checking.reset("GPU-x", program=str(program)))
    assert (tmp_path / "said").read_text() == "--gpu-reset -i GPU-x\n"
    with pytest.raises(FalError, match="there is no"):
        asyncio.run(checking.reset("GPU-x", program="no-such-program-here"))


# --- the simulated provider's file


def test_faults_come_and_go_by_the_file(tmp_path: Path) -> None:
    sim = SimulatedInventory(
        parse_sim_gpus("2xH100-80GB"), node_name="n", read_host=lambda: read_host(tmp_path),
        fault_file=tmp_path / FAULT_FILE,
    )  # fmt: skip
    file = tmp_path / FAULT_FILE

    async def scenario() -> None:
        heard = Heard()
        sim.listen(heard)
        one, two = (gpu.id for gpu in (await sim.snapshot()).gpus)
        file.write_text(f'{{"0": {{"temperature_c": 97, "xids": [48]}}, "{two}": {{"gone": true, "xids": []}}}}')
        snapshot = await sim.snapshot()
        assert (named(snapshot, one).temperature_c, named(snapshot, two).present) == (97, False)
        assert heard.events == [DeviceEvent(one, "xid", 48)]
        file.write_text('{"0": {"xids": [48, 79, 13], "ecc": {"volatile_uncorrected": 2}}}')
        snapshot = await sim.snapshot()
        assert [event.code for event in heard.events] == [48, 79, 13]
        assert named(snapshot, one).ecc.volatile_uncorrected == 2
        assert named(snapshot, two).ok
        file.write_text("{ not JSON")
        assert named(await sim.snapshot(), one).ecc.volatile_uncorrected == 2, "as it was"
        file.unlink()
        assert all(gpu.ok for gpu in (await sim.snapshot()).gpus)

    run(sim, scenario)


def test_xids_that_were_there_at_the_start_are_old_news(tmp_path: Path) -> None:
    path = tmp_path / FAULT_FILE
    path.write_text('{"0": {"xids": [48]}}')
    file = FaultFile(path)
    assert file.read({"0": "GPU-a"}) is not None
    path.write_text('{"0": {"xids": [48, 79]}, "9": {}}')
    read = file.read({"0": "GPU-a"})
    assert read is not None
    assert read[1] == [("GPU-a", 79)]
    assert file.read({"0": "GPU-a"}) is None


def test_a_fault_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / FAULT_FILE
    path.write_text('{"0": {"temperatur": 97}}')
    assert FaultFile(path).read({"0": "GPU-a"}) is None


def test_snapshots_go_on_with_what_was_seen_last_while_a_device_is_reset(tmp_path: Path) -> None:
    subject = _nvml(tmp_path)
    inventory = subject.devices
    began, go = asyncio.Event(), asyncio.Event()

    async def reset(gpu_id: str) -> None:
        began.set()
        await go.wait()

    inventory._reset = reset  # type: ignore[attr-defined]

    async def scenario() -> None:
        first = await inventory.snapshot()
        resetting = asyncio.create_task(inventory.reset(first.gpus[0].id))
        await began.wait()
        assert await inventory.snapshot() == first
        assert subject.library is not None
        assert subject.library.initialised == 0
        go.set()
        await resetting
        assert replace(await inventory.snapshot(), host=first.host) == first

    run(inventory, scenario)
