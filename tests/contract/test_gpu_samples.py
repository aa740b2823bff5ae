"""Bytes about GPUs as the release that brought them recorded them: later ones must read them as they were meant.

`tests/data/wire/v1-gpus/NAME.binpb` was written once from `SAMPLES` and never changes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import Message

from fal_agent import wire as agent_wire
from fal_contract.v1 import agent_pb2, state_pb2
from fal_scheduler import wire
from fal_scheduler.codec import decode, encode
from fal_scheduler.codec_nodes import node_from_pb, node_to_pb

FOLDER = Path(__file__).parents[1] / "data" / "wire" / "v1-gpus"
GPU = agent_pb2.Gpu(
    id="GPU-1", index=1, model="H100-80GB", memory_bytes=80 << 30, health=agent_pb2.GPU_HEALTH_QUARANTINED,
    health_reason="XID 48: uncorrectable memory error", health_class="reset", health_since_s=1.5,
    health_state="diagnosing", diagnoses=3,
)  # fmt: skip
RUNNER = state_pb2.Runner(
    id="default/a-00000001", share_group="default/a", node="n-1", gpus=["GPU-1"], goal=state_pb2.GOAL_RUN,
    assignment=state_pb2.AssignmentRef(id="a1b2c3d4", term=7, inventory_generation=9),
    bindings=[state_pb2.Binding(app="default/a", revision=1)],
)  # fmt: skip
SAMPLES: dict[str, Message] = {
    "inventory": agent_pb2.Inventory(generation=9, gpus=[GPU]),
    "assignment": agent_pb2.Assignment(
        id="a1b2c3d4", term=7, runner_id="default/a-00000001", goal=state_pb2.GOAL_RUN, gpus=["GPU-1"],
        inventory_generation=9,
    ),
    "order": agent_pb2.SchedulerMessage(gpu_order=agent_pb2.GpuOrder(
        id=1, gpu="GPU-1", action="mig", layout=["1g.10gb", "2g.20gb"], timeout_s=90)),
    "result": agent_pb2.AgentMessage(seq=2, gpu_result=agent_pb2.GpuOrderResult(
        id=1, error="it is held", remedy="Wait.", lines=["idle"])),
    "node": state_pb2.Node(id="n-1", name="box", pool="p", quarantined_gpus={"GPU-1": "RMA 4711"}),
    "runner": RUNNER,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_recorded_bytes_mean_what_they_meant(name: str) -> None:
    raw = (FOLDER / f"{name}.binpb").read_bytes()
    assert type(SAMPLES[name]).FromString(raw) == SAMPLES[name]
    assert SAMPLES[name].SerializeToString(deterministic=True) == raw


def test_no_recording_is_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.binpb")} == SAMPLES.keys()


def test_they_reach_their_readers_whole() -> None:
    inventory = agent_pb2.Inventory.FromString((FOLDER / "inventory.binpb").read_bytes())
    assert wire.inventory_to(wire.inventory_of(inventory)) == inventory
    assignment = agent_pb2.Assignment.FromString((FOLDER / "assignment.binpb").read_bytes())
    assert agent_wire.assignment_of(assignment).inventory_generation == 9
    node = state_pb2.Node.FromString((FOLDER / "node.binpb").read_bytes())
    assert node_to_pb(node_from_pb(node)) == node
    runner = state_pb2.Runner.FromString((FOLDER / "runner.binpb").read_bytes())
    record = decode("team/default/runner/a-00000001", state_pb2.Record(version=1, runner=runner).SerializeToString())
    assert state_pb2.Record.FromString(encode(record)).runner == runner
