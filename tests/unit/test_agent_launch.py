"""What a container is given: names, threads, environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent_fakes import assignment
from fal_agent.launch import Devices, container_spec
from fal_agent.ports import Places
from fal_contract.v1 import state_pb2
from fal_runtime.driver import Resources
from fal_runtime.fake import FakeDriver

PLACES = Places(Path("/s"), Path("/m"), Path("/r"), ("worker",))


@pytest.mark.parametrize(("cpu_milli", "threads"), [(500, "1"), (1000, "1"), (3999, "3"), (8000, "8")])
def test_math_libraries_start_no_more_threads_than_the_container_may_use(cpu_milli: int, threads: str) -> None:
    wish = assignment(resources=state_pb2.Resources(cpu_milli=cpu_milli))
    assert container_spec(wish, FakeDriver(), PLACES).env["OMP_NUM_THREADS"] == threads


def test_without_a_limit_the_libraries_choose() -> None:
    assert "OMP_NUM_THREADS" not in container_spec(assignment(), FakeDriver(), PLACES).env


def test_the_apps_own_environment_wins() -> None:
    wish = assignment(resources=state_pb2.Resources(cpu_milli=4000))
    wish.spec.env["OMP_NUM_THREADS"] = "2"
    env = container_spec(wish, FakeDriver(), PLACES).env
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["FAL_RUNNER_ID"] == wish.runner_id


def test_gpus_are_asked_for_by_name_and_no_variable_decides() -> None:
    wish = assignment()
    del wish.gpus[:]
    wish.gpus.extend(["GPU-1", "GPU-2"])
    wish.spec.env["NVIDIA_VISIBLE_DEVICES"] = wish.spec.env["CUDA_VISIBLE_DEVICES"] = "all"
    granted = Devices(cdi=("nvidia.com/gpu=GPU-1", "nvidia.com/gpu=GPU-2"))
    spec = container_spec(wish, FakeDriver(), PLACES, granted)
    assert (spec.cdi, spec.gpu_devices) == (granted.cdi, ())
    assert spec.env["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"
    assert spec.env["NVIDIA_VISIBLE_DEVICES"] == "void"
    plain = container_spec(wish, FakeDriver(), PLACES, Devices(nodes=("/dev/nvidia0",)))
    assert (plain.cdi, plain.gpu_devices) == ((), ("/dev/nvidia0",))
    del wish.gpus[:]
    assert container_spec(wish, FakeDriver(), PLACES).env["CUDA_VISIBLE_DEVICES"] == "", "none is not all"


def test_limits_reach_the_container() -> None:
    asked = state_pb2.Resources(
        cpu_milli=1500, memory_bytes=2, pids_max=3, shm_bytes=4, open_files_max=5, locked_memory_bytes=6, io_bytes_s=7,
        scratch_bytes=0,
    )  # fmt: skip
    assert container_spec(assignment(resources=asked), FakeDriver(), PLACES).resources == Resources(
        1500, 2, 3, 5, 4, 6, 7, 0
    )
    plain = container_spec(assignment(resources=state_pb2.Resources(pids_max=1)), FakeDriver(), PLACES).resources
    assert (plain.shm_bytes, plain.open_files_max, plain.scratch_bytes) == (64 << 20, 65_536, 1 << 30)


@pytest.mark.parametrize(
    ("changes", "warm"),
    [
        ({}, True),
        ({"env": {"FAL_DTYPE": "float32", "OMP_NUM_THREADS": "2"}}, True),
        ({"env": {"MKL_NUM_THREADS": "2"}}, False),  # read while libraries are imported
        ({"env": {"PYTHONPATH": "/x"}}, False),
        ({"command": ["/bin/true"]}, False),
        ({"image": "default/torch"}, False),
    ],
)
def test_only_our_own_worker_may_be_warm(changes: dict[str, Any], warm: bool) -> None:
    wish = assignment()
    del wish.spec.command[:]
    wish.spec.MergeFrom(state_pb2.AppSpec(**changes))
    assert container_spec(wish, FakeDriver(), PLACES).warm_command == (("worker", "--warm") if warm else ())
