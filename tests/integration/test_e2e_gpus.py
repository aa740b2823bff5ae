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

pytestmark = [pytest.mark.root, pytest.mark.slow]
FOUND_S = 60.0  # an agent looks every five seconds


@pytest.fixture(scope="module")
def node(shared_cluster: Cluster) -> Iterator[Node]:
    """A machine of its own, so that its broken GPUs are nobody else's."""
    node = shared_cluster.add_node("gpubox", driver="process", gpus="2xA100-40GB", pool=STRANGERS)
    yield node
    node.process.end(signal.SIGKILL)
    shared_cluster.call("RevokeNode", _revoke(shared_cluster))


def _revoke(cluster: Cluster) -> Any:
    from fal_contract.v1 import cluster_pb2 as pb

    return pb.RevokeNodeRequest(node=cluster.node("gpubox").node.id)


def gpus(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in cluster.ask("gpus", "gpu", "list") if row["node_name"] == "gpubox"}


def health(cluster: Cluster, gpu: str) -> tuple[str, str]:
    row = gpus(cluster)[gpu]
    return row["health_state"], row["health_class"]


def break_gpus(node: Node, faults: dict[str, Any]) -> None:
    """Written beside and renamed: the agent never reads half of it."""
    beside = node.state_dir / "faults.new"
    beside.write_text(json.dumps(faults))
    beside.replace(Path(node.state_dir) / FAULT_FILE)


def test_a_gpu_breaks_under_a_runner_and_comes_back(real: Cluster, node: Node) -> None:
    [first] = real.apply("frail", driver="process", machine_type=["A100-40GB"], pools=[STRANGERS])
    [(sick, _)] = [(gpu, row) for gpu, row in gpus(real).items() if row["runner"] == first]
    index = str(gpus(real)[sick]["index"])
    break_gpus(node, {index: {"ecc": {"volatile_uncorrected": 1}, "no_reset": True}})
    until(lambda: health(real, sick) == ("quarantined", "reset"), "the fault is told", within_s=FOUND_S)
    until(
        lambda: first not in real.ready("frail") and len(real.ready("frail")) == 1, "another serves", within_s=FOUND_S
    )
    [second] = real.ready("frail")
    assert gpus(real)[sick]["runner"] in ("", first)
    alarms = {alarm["kind"]: alarm for alarm in real.ask("status", "status")["alarms"]}
    assert sick in alarms["GPU_QUARANTINED"]["message"]
    # A reset is refused, so it stays; then it works.
    until(lambda: gpus(real)[sick]["diagnoses"] >= 1, "it was diagnosed", within_s=FOUND_S)
    done = real.falctl("gpu", "release", "gpubox", index)
    assert (done.returncode, "stays quarantined" in done.stderr) == (1, True), done.stderr
    break_gpus(node, {index: {}})
    shown = real.ask("gpu", "gpu", "release", "gpubox", index)
    assert shown["lines"][-1].startswith("passed"), shown
    until(lambda: health(real, sick) == ("", ""), "it is back", within_s=FOUND_S)
    kinds = {alarm["kind"] for alarm in real.ask("status", "status")["alarms"]}
    assert "GPU_QUARANTINED" not in kinds
    assert list(real.ready("frail")) == [second], "nobody was moved back"


def test_an_operators_word_outlives_the_agent_and_moves_the_runner(real: Cluster, node: Node) -> None:
    [first] = real.apply("moved", driver="process", machine_type=["A100-40GB"], pools=[STRANGERS])
    [gpu] = [id_ for id_, row in gpus(real).items() if row["runner"] == first]
    shown = real.ask("gpu", "gpu", "quarantine", "gpubox", gpu, "--reason", "RMA 4711")
    assert shown["runners"] == [first]
    until(lambda: first not in real.ready("moved") and len(real.ready("moved")) == 1, "it moved", within_s=FOUND_S)
    node.process.end(signal.SIGKILL)
    node.process.start()
    real.wait_node("gpubox", "ready")
    assert health(real, gpu) == ("quarantined", "operator")
    assert [row["id"] for row in real.ask("gpus", "gpu", "list", "--sick") if row["node_name"] == "gpubox"] == [gpu]
    assert "RMA 4711" in real.falctl("gpu", "show", "gpubox", gpu[:12]).stdout
    until(lambda: gpus(real)[gpu]["runner"] == "", "it is empty")
    assert real.ask("gpu", "gpu", "release", "gpubox", gpu)["gpu"] == gpu
    assert health(real, gpu) == ("", "")


def test_an_idle_gpu_is_cut_and_made_whole(real: Cluster, node: Node) -> None:
    until(lambda: all(row["free"] for row in gpus(real).values()), "both are free", within_s=FOUND_S)
    first = next(id_ for id_, row in gpus(real).items() if row["index"] == 0)
    done = real.falctl("gpu", "mig", "gpubox", "0", "--layout", "2x1g.5gb+3g.20gb")
    assert done.returncode == 0, done.stderr
    until(lambda: len(gpus(real)) == 4, "its instances are told")
    parts = {row["mig_profile"] for row in gpus(real).values() if row["parent_id"] == first}
    assert parts == {"1g.5gb", "3g.20gb"}
    assert "NUMA" in real.falctl("gpu", "topo", "gpubox").stdout
    [runner] = real.apply("sliced", driver="process", machine_type=["A100-40GB-MIG-3g.20gb"], pools=[STRANGERS])
    done = real.falctl("gpu", "mig", "gpubox", first, "--off")
    assert (done.returncode, runner in done.stderr) == (1, True), done.stderr
    real.delete("sliced")
    until(lambda: all(row["free"] for row in gpus(real).values()), "all are free again")
    done = real.falctl("gpu", "mig", "gpubox", first, "--off")
    assert done.returncode == 0, done.stderr
    until(lambda: set(gpus(real)) >= {first} and len(gpus(real)) == 2, "it is whole")
