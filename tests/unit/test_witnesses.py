"""Who testifies that a silent node lives: caches of other failure domains, while they are heard themselves."""

from __future__ import annotations

import pytest

from fake_engine import FakeEngine
from fal_contract.limits import CACHE_PEERS_TOLD_MAX, WITNESS_S
from fal_contract.v1 import weights_pb2
from fal_fsd.peers_told import PeersTold
from fal_scheduler.core.cache_events import PeerReach
from fal_scheduler.core.records import Node, Pool
from fal_scheduler.core.told import Health, NodeLive
from fal_scheduler.witnesses import Witnesses


class _Clock:
    now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


class _Rig:
    """Zones a and b, two nodes each; a-0 is silent."""

    def __init__(self) -> None:
        self.engine, self.clock = FakeEngine(), _Clock()
        self.heard = {"a-0", "a-1", "b-0", "b-1"}
        self.told: list[PeerReach] = []
        for zone in ("a", "b"):
            self.engine.put(Pool(zone, zone=zone))
            for at in range(2):
                self.engine.put(Node(f"{zone}-{at}", f"{zone}-{at}", zone))
                self.engine.view.live[f"{zone}-{at}"] = NodeLive(f"{zone}-{at}", Health.READY)
        self.engine.view.live["a-0"].health = Health.UNKNOWN
        self.witnesses = Witnesses(
            lambda: self.engine.view, self.told.append, self.clock, lambda node_id: node_id in self.heard
        )

    def connected(self, node_id: str, *peers: str) -> None:
        self.witnesses.told(node_id, weights_pb2.CacheReport(connected=peers, connected_told=True))

    def tick(self) -> list[tuple[str, str]]:
        self.told.clear()
        self.clock.now_s += WITNESS_S
        self.witnesses.tick()
        return [(one.node_id, one.by) for one in self.told]


def test_only_another_domain_testifies_and_only_of_silent_nodes() -> None:
    rig = _Rig()
    rig.connected("a-1", "a-0")
    assert rig.tick() == [], "who shares its fate is no witness"
    rig.connected("b-1", "a-0", "a-1", "nobody")
    rig.connected("b-0", "a-0", "b-1")
    assert rig.tick() == [("a-0", "b-0")], "one word is enough"
    assert [one.arrived_s for one in rig.told] == [rig.clock.now_s]
    rig.witnesses.tick()
    assert len(rig.told) == 1, "not sooner than it is due"
    rig.engine.view.live["a-0"].health = Health.READY
    assert rig.tick() == []


def test_a_cache_that_is_not_heard_testifies_nothing_not_even_later() -> None:
    rig = _Rig()
    rig.connected("b-0", "a-0")
    rig.heard.discard("b-0")
    assert rig.tick() == []
    rig.heard.add("b-0")
    assert rig.tick() == [], "its next session tells it again"
    rig.connected("b-0", "a-0")
    assert rig.tick() == [("a-0", "b-0")]
    rig.connected("b-0")
    assert rig.tick() == []
    rig.witnesses.told("b-0", weights_pb2.CacheReport(unreachable=["a-0"], unreachable_told=True))
    assert rig.tick() == [], "a report about something else"


@pytest.mark.parametrize("count", [CACHE_PEERS_TOLD_MAX + 1])
def test_what_a_cache_tells_is_bounded_and_told_when_it_changes(count: int) -> None:
    class Around:
        @staticmethod
        def unreachable() -> tuple[str, ...]:
            return ("n-9",)

        @staticmethod
        def connected() -> tuple[str, ...]:
            return tuple(f"n-{at:03}" for at in range(count, 0, -1))

    told = PeersTold(Around())  # type: ignore[arg-type]
    assert told.due
    report = weights_pb2.CacheReport()
    told.into(report)
    assert report.connected_told
    assert report.unreachable_told
    assert list(report.connected) == [f"n-{at:03}" for at in range(1, CACHE_PEERS_TOLD_MAX + 1)]
    assert not told.due
    again = weights_pb2.CacheReport()
    told.into(again)
    assert not again.ByteSize()
    told.begun()
    assert told.due
