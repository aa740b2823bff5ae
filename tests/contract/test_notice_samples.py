"""Bytes of notices, reboots and witnesses as the release that brought them recorded them: they keep their meaning.

`tests/data/wire/v1-notices/NAME.binpb` was written once from `SAMPLES` and never changes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import Message

from fal_contract.v1 import agent_pb2, weights_pb2
from fal_scheduler import wire

FOLDER = Path(__file__).parents[1] / "data" / "wire" / "v1-notices"
NOTICE = agent_pb2.Notice(kind="spot", within_s=90.5, reason="AWS: spot interruption (terminate)")
SAMPLES: dict[str, Message] = {
    "hello": agent_pb2.AgentMessage(seq=1, hello=agent_pb2.Hello(node_id="n-1", boot_id="b-1", notice=NOTICE)),
    "report": agent_pb2.AgentMessage(seq=2, report=agent_pb2.Report(notice=agent_pb2.Notice())),
    "reboot": agent_pb2.SchedulerMessage(reboot=agent_pb2.RebootOrder(boot_id="b-1")),
    "refusal": agent_pb2.AgentMessage(
        seq=3, reboot_refusal=agent_pb2.RebootRefusal(boot_id="b-1", error="no power", remedy="Go and look.")
    ),
    "connected": weights_pb2.CacheUp(report=weights_pb2.CacheReport(connected=["n-1", "n-2"], connected_told=True)),
}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_recorded_bytes_mean_what_they_meant(name: str) -> None:
    raw = (FOLDER / f"{name}.binpb").read_bytes()
    assert type(SAMPLES[name]).FromString(raw) == SAMPLES[name]
    assert SAMPLES[name].SerializeToString(deterministic=True) == raw


def test_no_recording_is_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.binpb")} == SAMPLES.keys()


def test_they_reach_their_readers_whole() -> None:
    hello = agent_pb2.AgentMessage.FromString((FOLDER / "hello.binpb").read_bytes()).hello
    told = wire.notice_of(hello.notice, node_id="n-1", session_id="s", arrived_s=1.0)
    assert (told.kind, told.within_s, told.reason) == (NOTICE.kind, NOTICE.within_s, NOTICE.reason)
    report = agent_pb2.AgentMessage.FromString((FOLDER / "report.binpb").read_bytes()).report
    assert report.HasField("notice"), "that nothing is announced is told, too"
    refusal = agent_pb2.AgentMessage.FromString((FOLDER / "refusal.binpb").read_bytes()).reboot_refusal
    assert wire.refusal_of(refusal, node_id="n-1", session_id="s", arrived_s=1.0).remedy == "Go and look."
