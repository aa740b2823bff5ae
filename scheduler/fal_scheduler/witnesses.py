"""Which caches are connected with which nodes: who may testify that a node which is silent here still lives.

Nothing is told to the core of nodes that speak, so in good times this costs nothing; of a silent one it is told every
WITNESS_S who of another failure domain reaches it. A cache whose session ended testifies nothing. Bounded by nodes
times CACHE_PEERS_TOLD_MAX. Made by `cache_sessions`; must not decide anything.
"""

from __future__ import annotations

from collections.abc import Callable

from fal_contract.clock import Clock
from fal_contract.limits import CACHE_PEERS_TOLD_MAX, WITNESS_S
from fal_contract.v1 import weights_pb2
from fal_scheduler.core.cache_events import PeerReach
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health


class Witnesses:
    """See the module. `heard(node_id)`: whether that cache's session stands."""

    def __init__(
        self,
        view: Callable[[], State],
        offer: Callable[[PeerReach], None],
        clock: Clock,
        heard: Callable[[str], bool],
    ) -> None:
        self._view = view
        self._offer = offer
        self._clock = clock
        self._heard = heard
        self._reaches: dict[str, tuple[str, ...]] = {}
        self._due_s = 0.0

    def told(self, node_id: str, report: weights_pb2.CacheReport) -> None:
        """With whom a cache is connected now, all of them, where its report tells that."""
        if report.connected_told:
            nodes = self._view().nodes
            self._reaches[node_id] = tuple(one for one in report.connected[:CACHE_PEERS_TOLD_MAX] if one in nodes)

    def tick(self) -> None:
        """Tell the core who reaches nodes that are silent."""
        now_s, state = self._clock.monotonic_s(), self._view()
        if now_s < self._due_s:
            return
        self._due_s = now_s + WITNESS_S
        for node_id in [node_id for node_id in self._reaches if not self._heard(node_id)]:
            del self._reaches[node_id]
        silent = [one.node_id for one in state.live.values() if one.health in (Health.UNKNOWN, Health.LOST)]
        if not silent:
            return
        wanted = dict.fromkeys(silent)
        for by in sorted(self._reaches):
            domain = state.domain_of(by)
            for node_id in self._reaches[by]:
                if node_id in wanted and state.domain_of(node_id) != domain:
                    del wanted[node_id]
                    self._offer(PeerReach(node_id, by, now_s))


__all__ = ["Witnesses"]
