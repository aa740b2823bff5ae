"""Which peers this cache reaches and which it does not, as the scheduler was told last. Whole lists, when they changed.

The scheduler does not send peers to nodes that they cannot reach, and holds a node for alive that others still reach.
"""

from __future__ import annotations

from fal_contract.limits import CACHE_PEERS_TOLD_MAX
from fal_contract.v1 import weights_pb2
from fal_fsd.surroundings import Surroundings


class PeersTold:
    """What was told in this session."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._told: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def begun(self) -> None:
        """A session begins; its Hello does not tell these."""
        self._told = ((), ())

    @property
    def due(self) -> bool:
        """Whether something changed since."""
        return self._now() != self._told

    def into(self, report: weights_pb2.CacheReport) -> None:
        """What changed."""
        (unreachable, connected), (lost, found) = self._now(), self._told
        if unreachable != lost:
            report.unreachable.extend(unreachable)
            report.unreachable_told = True
        if connected != found:
            report.connected.extend(connected)
            report.connected_told = True
        self._told = unreachable, connected

    def _now(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        connected = sorted(self._around.connected())[:CACHE_PEERS_TOLD_MAX]
        return tuple(self._around.unreachable()), tuple(connected)


__all__ = ["PeersTold"]
