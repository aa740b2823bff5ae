"""Bytes of wire version 1 as they were recorded: later releases must read them as they were meant.

`tests/data/wire/v1/NAME.binpb` was written once from `SAMPLES` and never changes; a changed field number or type shows
here. New fields are added to new samples of a new folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import Message

from fal_contract.v1 import agent_pb2, serving_pb2, state_pb2
from fal_scheduler import wire
from fal_scheduler.codec_spec import spec_from_pb, spec_to_pb
from fal_scheduler.core.records import RunnerState

FOLDER = Path(__file__).parents[1] / "data" / "wire" / "v1"

STATUS = agent_pb2.RunnerStatus(
    runner_id="default/digits-7k2m9q4c", assignment_id="a1b2c3d4", term=7, app="default/digits", revision=3,
    state=state_pb2.RUNNER_STATE_TERMINATED, reason="the worker exited", exit_code=137, oom_killed=True,
    log_tail=["last", "words"], started_at_s=1.5, ready_at_s=2.5, served=9, in_flight=1, last_used_age_s=-1.0,
    gpu_seconds=12.25, gpus=["GPU-1"], phases=[agent_pb2.Phase(name="stage", seconds=0.5)], max_multiplexing=4,
    residencies=[state_pb2.Residency(id="main", model="default/m", manifest_digest="ab" * 32)],
    share_group="default/digits", memory_bytes=1 << 32, cpu_milli=1500, refused=True,
)  # fmt: skip
GPU = agent_pb2.Gpu(
    id="GPU-1", index=1, model="H100-80GB", memory_bytes=80 << 30, memory_used_bytes=5, pci_bus_id="0000:01:00.0",
    numa_node=-1, links=[agent_pb2.GpuLink(peer_id="GPU-2", kind="NVLINK", count=18)], mig_profile="1g.10gb",
    parent_id="GPU-0", ecc_uncorrected=2, temperature_c=60, health=agent_pb2.GPU_HEALTH_QUARANTINED,
    health_reason="ECC", product="NVIDIA H100", power_w=700,
)  # fmt: skip
SPEC = state_pb2.AppSpec(
    image="host", command=["a", "b"], env={"K": "V"}, model="default/m", loras=["default/l"],
    machine_type=["H100-80GB"],
    num_gpus=2, gpu_memory_bytes_min=1 << 30, pools=["p"], labels={"l": "v"}, network="none",
    resources=state_pb2.Resources(cpu_milli=1000, memory_bytes=1 << 30, pids_max=64, shm_bytes=1 << 20),
    scaling=state_pb2.Scaling(
        keep_alive_s=60, min_concurrency=1, max_concurrency=2, concurrency_buffer=3, concurrency_buffer_perc=4,
        scaling_delay_s=5, max_multiplexing=6, request_timeout_s=7, startup_timeout_s=8,
    ),
    probe=state_pb2.Probe(ready_path="/readyz", live_path="/livez", interval_s=1, timeout_s=2, failures_max=3),
    termination_grace_s=4, share_group="g",
)  # fmt: skip
ASSIGNMENT = agent_pb2.Assignment(
    id="a1b2c3d4", term=7, runner_id="default/digits-7k2m9q4c", goal=state_pb2.GOAL_DRAIN, goal_reason="replaced",
    app="default/digits", revision=3, share_group="default/digits", gpus=["GPU-1"], spec=SPEC,
    artifacts=[agent_pb2.Artifact(
        model="default/m", kind="model", uri="file:///m", manifest_digest="ab" * 32, bytes=10,
        manifest=state_pb2.ModelManifest(files=[state_pb2.ModelFile(path="w", bytes=10, sha256=b"\x01" * 32)]),
    )],
)  # fmt: skip
ENDPOINT = agent_pb2.Endpoint(network="lan", host="10.0.0.1", port=7443)

SAMPLES: dict[str, Message] = {
    "hello": agent_pb2.AgentMessage(seq=1, hello=agent_pb2.Hello(
        versions=agent_pb2.Versions(min=1, max=2, features=["f"], software="0.1.0"), node_id="n-1", boot_id="b",
        agent_id="a", cluster_id="c-000000000000", epoch_seen=2, term_seen=7, incarnation="i", store_revision_seen=99,
        wall_s=1.5e9, runners=[STATUS], endpoints=[ENDPOINT],
        inventory=agent_pb2.Inventory(generation=4, gpus=[GPU], driver_version="550", cuda_version="12.4",
                                      cpu_milli=64000, memory_bytes=1 << 39, disk_free_bytes=1 << 40, kernel="6.18"),
        capabilities=agent_pb2.Capabilities(driver="oci", isolates=True, runtime="runc 1.1.5", user_namespaces=True,
                                            cgroup="hybrid", details={"d": "e"}),
    )),
    "report": agent_pb2.AgentMessage(seq=2, report=agent_pb2.Report(
        runners=[STATUS], gone=["default/digits-00000000"], assignments_revision=5, tunnels=["gw-1"],
        events=[agent_pb2.NodeEvent(time_s=1.5, kind="JOURNAL_FULL", subject="journal", message="full")],
    )),
    "log-chunk": agent_pb2.AgentMessage(seq=3, log_chunk=agent_pb2.LogChunk(
        id=4, lines=[agent_pb2.LogLine(time_s=1.5, stream="stdout", text="hi")], end=True, error="gone")),
    "welcome": agent_pb2.SchedulerMessage(welcome=agent_pb2.Welcome(
        version=1, features=["f"], cluster_id="c-000000000000", epoch=2, incarnation="i", term=7,
        accepted_clusters=["c-111111111111"], heartbeat_interval_s=5)),
    "complete": agent_pb2.SchedulerMessage(complete=agent_pb2.Complete(
        revision=1, term=7, store_revision=99, assignments=[ASSIGNMENT])),
    "delta": agent_pb2.SchedulerMessage(delta=agent_pb2.Delta(
        base=1, revision=2, term=7, store_revision=100, put=[ASSIGNMENT], drop=["default/digits-00000000"])),
    "gateways": agent_pb2.SchedulerMessage(gateways=agent_pb2.GatewaySet(
        gateways=[agent_pb2.GatewayAddress(gateway_id="gw-1", endpoints=[ENDPOINT])])),
    "gateway-hello": serving_pb2.GatewayMessage(hello=serving_pb2.GatewayHello(
        versions=agent_pb2.Versions(min=1, max=1), gateway_id="gw-1", tunnel_endpoints=[ENDPOINT], apps=["default/a"],
        held=[serving_pb2.HeldLease(lease_id="7-1", runner_id="default/a-1", slots=2, term=7)])),
    "wants": serving_pb2.GatewayMessage(wants=serving_pb2.Wants(wants=[serving_pb2.Want(
        app="default/a", model="default/m", lora="default/l", slots=2, queued=3, oldest_age_s=1.5, priority=-1)])),
    "reached": serving_pb2.GatewayMessage(reached=serving_pb2.Reachability(nodes=[serving_pb2.Reach(
        node_id="n-1", path="tunnel", reason="timed out", wants_tunnel=True)])),
    "leases": serving_pb2.DispatchMessage(leases=serving_pb2.Leases(revoked=["7-1"], leases=[serving_pb2.SlotLease(
        lease_id="7-2", runner_id="default/a-1", node_id="n-1", app="default/a", resident=["default/m"], slots=2,
        term=7, ttl_s=30)])),
    "routes": serving_pb2.DispatchMessage(routes=serving_pb2.Routes(complete=True, removed=["x"], term=7, routes=[
        serving_pb2.Route(runner_id="default/a-1", app="default/a", node_id="n-1", endpoints=[ENDPOINT],
                          state=state_pb2.RUNNER_STATE_UNKNOWN, max_multiplexing=2, resident=["default/m"],
                          request_timeout_s=60)])),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_recorded_bytes_mean_what_they_meant(name: str) -> None:
    raw = (FOLDER / f"{name}.binpb").read_bytes()
    expected = SAMPLES[name]
    assert type(expected).FromString(raw) == expected
    assert expected.SerializeToString(deterministic=True) == raw


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_field_of_a_later_release_is_ignored(name: str) -> None:
    raw = (FOLDER / f"{name}.binpb").read_bytes()
    later = raw + b"\xf2\x7d\x03new"  # field 2014, length-delimited
    read = type(SAMPLES[name]).FromString(later)
    read.DiscardUnknownFields()
    assert read == SAMPLES[name]


def test_recorded_messages_reach_the_core_whole() -> None:
    message = agent_pb2.AgentMessage.FromString((FOLDER / "hello.binpb").read_bytes())
    hello = wire.hello_of(message.hello, session_id="s", arrived_s=0.0)
    (status,) = hello.statuses
    assert (status.state, status.exit_code, status.refused) == (RunnerState.TERMINATED, 137, True)
    assert wire.status_to(status) == STATUS
    assert wire.inventory_to(hello.inventory) == message.hello.inventory
    assert (hello.term_seen, hello.store_revision_seen, hello.boot_id) == (7, 99, "b")
    assert spec_to_pb(spec_from_pb(SPEC)) == SPEC


def test_no_recording_is_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.binpb")} == SAMPLES.keys()
