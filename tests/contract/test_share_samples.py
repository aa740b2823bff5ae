"""Bytes of runners that apps share, as the release that brought them recorded them: they keep their meaning.

`tests/data/wire/v1-shared/NAME.binpb` was written once from `SAMPLES` and never changes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import Message

from fal_contract import dispatch_wire
from fal_contract.v1 import agent_pb2, serving_pb2, state_pb2
from fal_scheduler import wire

FOLDER = Path(__file__).parents[1] / "data" / "wire" / "v1-shared"
BASE = state_pb2.Residency(id="t/base", model="t/base", manifest_digest="ab" * 32)
INK = state_pb2.Residency(id="t/ink@t/base", model="t/ink", manifest_digest="cd" * 32, base="t/base")
SAMPLES: dict[str, Message] = {
    "assignment": agent_pb2.Assignment(id="a-1", runner_id="t/plain-1", share_group="atelier", residencies=[BASE, INK]),
    "status": agent_pb2.RunnerStatus(
        runner_id="t/plain-1",
        state=state_pb2.RUNNER_STATE_IDLE,
        residencies=[BASE],
        residents=[
            agent_pb2.Resident(id="t/base", state="loaded", bytes=7, stage_seconds=1.5, load_seconds=0.25),
            agent_pb2.Resident(id="t/ink@t/base", state="failed", reason="shapes differ"),
        ],
    ),
    "route": serving_pb2.Route(
        runner_id="t/plain-1",
        app="t/plain",
        shared=[
            serving_pb2.SharedApp(app="t/plain", model="t/base"),
            serving_pb2.SharedApp(app="t/inked", model="t/base"),
        ],
    ),
}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_recorded_bytes_mean_what_they_meant(name: str) -> None:
    raw = (FOLDER / f"{name}.binpb").read_bytes()
    assert type(SAMPLES[name]).FromString(raw) == SAMPLES[name]
    assert SAMPLES[name].SerializeToString(deterministic=True) == raw


def test_no_recording_is_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.binpb")} == SAMPLES.keys()


def test_they_reach_their_readers_whole() -> None:
    told = agent_pb2.RunnerStatus.FromString((FOLDER / "status.binpb").read_bytes())
    status = wire.status_of(told)
    assert [(one.id, one.state, one.bytes, one.load_seconds) for one in status.residents] == [
        ("t/base", "loaded", 7, 0.25),
        ("t/ink@t/base", "failed", 0, 0.0),
    ]
    assert wire.status_to(status) == told
    route = serving_pb2.Route.FromString((FOLDER / "route.binpb").read_bytes())
    [entry] = dispatch_wire.routes(serving_pb2.Routes(routes=[route]))
    assert entry.apps == ("t/plain", "t/inked")
