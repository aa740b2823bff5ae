"""A GPU breaks under a runner of a real cluster: replaced first, drained then; the GPU is looked at and given back."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e_cluster import STRANGERS, Cluster, Node, until
from fal_agent.inventory.sim_faults import FAULT_FILE
from fal_contract.v1 import agent_pb2
from fal_contract.v1 import cluster_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.slow]
FOUND_S = 60.0  # an agent looks every five seconds


@pytest.fixture(scope="module")
def node(shared_cluster: Cluster) -> Iterator[Node]:
    """A machine of its own, so that its broken GPUs are nobody else's."""
    node = shared_cluster.add_node("gpubox", driver="process", gpus="2xA100-40GB", pool=STRANGERS)
    yield node
    node.process.end(signal.SIGKILL)
    shared_cluster.call("RevokeNode", pb.RevokeNodeRequest(node=shared_cluster.node("gpubox").node.id))


def gpus(cluster: Cluster) -> dict[str, agent_pb2.Gpu]:
    return {gpu.id: gpu for gpu in cluster.node("gpubox").inventory.gpus}


def health(cluster: Cluster, gpu: str) -> tuple[str, str]:
    row = gpus(cluster)[gpu]
    return row.health_state, row.health_class


def held(cluster: Cluster, app: str) -> dict[str, str]:
    """Ready runners of an app → the GPU of each."""
    ready = cluster.ready(app)
    return {view.runner.id: view.runner.gpus[0] for view in cluster.runners(app) if view.runner.id in ready}


def free(cluster: Cluster) -> int:
    return len(cluster.node("gpubox").gpus_free)


def break_gpus(node: Node, faults: dict[str, Any]) -> None:
    """Written beside and renamed: the agent never reads half of it."""
    beside = node.state_dir / "faults.new"
    beside.write_text(json.dumps(faults))
    beside.replace(Path(node.state_dir) / FAULT_FILE)


def test_a_gpu_breaks_under_a_runner_and_comes_back(real: Cluster, node: Node) -> None:
    [first] = real.apply("frail", driver="process", machine_type=["A100-40GB"], pools=[STRANGERS])
    sick = held(real, "frail")[first]
    index = str(gpus(real)[sick].index)
    break_gpus(node, {index: {"ecc": {"volatile_uncorrected": 1}, "no_reset": True}})
    until(lambda: list(held(real, "frail").values()) not in ([], [sick]), "another serves", within_s=FOUND_S)
    until(lambda: first not in real.ready("frail"), "the first has left", within_s=FOUND_S)
    assert health(real, sick)[1] == "reset"
    alarms = {alarm["kind"]: alarm for alarm in real.ask("status", "status")["alarms"]}
    assert sick in alarms["GPU_QUARANTINED"]["message"]
    # A reset is refused, so it stays; an operator learns why. Then one is possible.
    until(lambda: gpus(real)[sick].diagnoses == 1, "it was diagnosed", within_s=FOUND_S)
    until(lambda: "could not be reset" in gpus(real)[sick].health_reason, "in vain", within_s=FOUND_S)
    break_gpus(node, {index: {}})
    shown = real.ask("gpu", "gpu", "release", "gpubox", index)
    assert shown["lines"][-1].startswith("passed"), shown
    until(lambda: health(real, sick) == ("", ""), "it is back", within_s=FOUND_S)
    assert len(held(real, "frail")) == 1, "nobody was moved back"

    [second] = held(real, "frail")
    [other] = held(real, "frail").values()
    shown = real.ask("gpu", "gpu", "quarantine", "gpubox", other, "--reason", "RMA 4711")
    assert shown["runners"] == [second]
    until(lambda: list(held(real, "frail").values()) == [sick], "it moved to the one that is well", within_s=FOUND_S)
    assert "RMA 4711" in real.falctl("gpu", "show", "gpubox", other[:12]).stdout
    assert health(real, other) == ("quarantined", "operator")
    real.call("ReleaseGpu", pb.ReleaseGpuRequest(node="gpubox", gpu=other, force=True))
    assert health(real, other) == ("", "")


def test_an_idle_gpu_is_cut_and_made_whole(real: Cluster, node: Node) -> None:
    until(lambda: free(real) == 2, "both are free", within_s=FOUND_S)
    first = next(gpu.id for gpu in gpus(real).values() if gpu.index == 0)
    done = real.falctl("gpu", "mig", "gpubox", "0", "--layout", "2x1g.5gb+3g.20gb")
    assert done.returncode == 0, done.stderr
    until(lambda: free(real) == 4, "its instances are told")
    parts = sorted(gpu.mig_profile for gpu in gpus(real).values() if gpu.parent_id == first)
    assert parts == ["1g.5gb", "1g.5gb", "3g.20gb"]
    assert "NUMA" in real.falctl("gpu", "topo", "gpubox").stdout
    real.call("SetMig", pb.SetMigRequest(node="gpubox", gpu=first))
    until(lambda: set(gpus(real)) >= {first} and free(real) == 2, "it is whole")
