"""The core's dataclasses and the wire's messages say the same: there and back without loss."""

from __future__ import annotations

from typing import Any

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2, state_pb2
from fal_scheduler import wire
from fal_scheduler.core.records import Pool, Probe, Residency, Resources, RunnerState, ScaleOverride, Scaling, Spec
from fal_scheduler.core.told import Capabilities, Gpu, GpuLink, Inventory, RunnerStatus

SPEC = Spec(
    image="host",
    command=("python3", "-m", "x"),
    env={"A": "1"},
    model="t/m",
    loras=("t/l",),
    machine_type=("H100-80GB",),
    num_gpus=2,
    gpu_memory_bytes_min=1 << 30,
    resources=Resources(1000, 1 << 32, 64, 1 << 20),
    pools=("p",),
    labels={"k": "v"},
    network="egress",
    scaling=Scaling(min_concurrency=1, max_concurrency=3),
    probe=Probe(interval_s=1.5),
    termination_grace_s=3.0,
    share_group="g",
)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (SPEC, state_pb2.AppSpec()),
        (Pool("p", "aws", networks=("a", "b"), labels={"x": "y"}, spot=True, generation=3), state_pb2.Pool()),
        (ScaleOverride(min_concurrency=0, keep_alive_s=None), state_pb2.ScaleOverride()),
        (Capabilities("oci", True, "runc 1.1.5", details={"a": "b"}), agent_pb2.Capabilities()),
    ],
)
def test_there_and_back(value: Any, message: Any) -> None:
    assert wire.read(type(value), wire.fill(message, value)) == value


def test_status_there_and_back() -> None:
    status = RunnerStatus(
        "t/a-1",
        RunnerState.RUNNING,
        exit_code=0,
        phases=(("stage", 1.5),),
        residencies=(Residency("r", "t/m", "d"),),
        gpus=("GPU-1",),
        log_tail=("x",),
    )
    assert wire.status_of(wire.status_to(status)) == status
    assert wire.status_of(wire.status_to(RunnerStatus("t/a-1", RunnerState.IDLE))).exit_code is None


def test_inventory_there_and_back() -> None:
    gpus = (
        Gpu("GPU-1", "H100-80GB", 80 << 30, links=(GpuLink("GPU-2", "NVLINK", 18),)),
        Gpu("GPU-2", "H100-80GB", 80 << 30, healthy=False, health_reason="ECC", numa_node=-1),
    )
    inventory = Inventory(3, gpus, "550", "12.4", 64000, 1 << 40, 5, "6.18")
    assert wire.inventory_of(wire.inventory_to(inventory)) == inventory


@pytest.mark.parametrize(
    "status",
    [
        agent_pb2.RunnerStatus(runner_id="t/a-1"),
        agent_pb2.RunnerStatus(runner_id="t/a-1", state=99),  # type: ignore[arg-type]
        agent_pb2.RunnerStatus(runner_id="noteam", state=state_pb2.RUNNER_STATE_IDLE),
    ],
)
def test_strange_statuses_are_refused(status: agent_pb2.RunnerStatus) -> None:
    with pytest.raises(FalError) as caught:
        wire.status_of(status)
    assert caught.value.code is Code.INVALID
