"""What a container is given: names, threads, environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_fakes import assignment
from fal_agent.launch import container_spec
from fal_agent.ports import Places
from fal_contract.v1 import state_pb2
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
