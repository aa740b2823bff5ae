"""What falctl says of a node that is drained."""

from __future__ import annotations

import pytest

from fal_contract.clock import SystemClock
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import state_pb2
from falctl.nodes_out import drain_text


@pytest.mark.parametrize(
    ("own_s", "notice_s", "said"),
    [
        (0.0, 0.0, "drain, 0 runners left"),
        (9000.0, 0.0, "drain, 0 runners left, 2h"),
        (9000.0, 86_460.0, "drain, beside spot, 0 runners left, 2h"),
        (0.0, 9000.0, "drain, beside spot, 0 runners left, 2h"),
    ],
)
def test_the_nearer_deadline_is_named(own_s: float, notice_s: float, said: str) -> None:
    now_s = SystemClock().wall_s()
    drain = state_pb2.Drain(kind="drain", deadline_at_s=own_s and now_s + own_s)
    if notice_s:
        drain.notice, drain.notice_at_s = "spot", now_s + notice_s
    text = drain_text(pb.NodeView(node=state_pb2.Node(name="n", drain=drain)))
    assert text.startswith(said), text
