"""What `falctl node show` says of features."""

from __future__ import annotations

from fal_contract.v1 import agent_pb2
from falctl.nodes import lacking


def test_a_feature_that_does_not_work_is_named_with_its_reason() -> None:
    tried = {"egress": "CNI plugin ptp is not in /usr/lib/cni", "images": "works", "seccomp": "true"}
    capabilities = agent_pb2.Capabilities(features=["images"], details=tried)
    assert lacking(capabilities) == [("egress", "CNI plugin ptp is not in /usr/lib/cni")]
    assert lacking(agent_pb2.Capabilities()) == [], "a node of a release before features"
