"""Which gateway reaches which node by which path, and which nodes are asked to dial which gateways.

A path is what a gateway has measured: "direct", "tunnel" or "none". A gateway that cannot dial a node says that it
wants a tunnel, and the node is told the whole set of such gateways. A gateway whose stream breaks stays in the sets
for a while, and a new leader tells no set before gateways had time to come back: tunnels in use are not torn down
because a scheduler changed. Leader-local; told again by gateways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from fal_contract.limits import LEASE_TTL_S
from fal_contract.v1 import agent_pb2

PATHS: Final = ("direct", "tunnel", "none")
QUIET_S: Final = 5.0  # gateways of the last term come back within this


@dataclass(slots=True)
class _Gateway:
    endpoints: tuple[agent_pb2.Endpoint, ...]
    paths: dict[str, str] = field(default_factory=dict)  # node -> path
    wants: set[str] = field(default_factory=set)  # nodes that should dial it
    left_at_s: float | None = None


class TunnelBook:
    """All gateways' paths of one term. `push` sends a message to a node, False where it has no session now.

    `now_s`: when the term began, monotonic; no set is told in its first `quiet_s`.
    """

    def __init__(
        self,
        push: Callable[[str, agent_pb2.SchedulerMessage], bool],
        *,
        now_s: float,
        quiet_s: float = QUIET_S,
        stay_s: float = LEASE_TTL_S,
    ) -> None:
        self._push = push
        self._stay_s = stay_s
        self._quiet_until_s: float | None = now_s + quiet_s
        self._due: set[str] = set()
        self._gateways: dict[str, _Gateway] = {}

    def enter(self, gateway_id: str, endpoints: Sequence[agent_pb2.Endpoint]) -> None:
        """A gateway's stream began; what it wanted before stands until it says otherwise."""
        known = self._gateways.get(gateway_id)
        if known is None:
            self._gateways[gateway_id] = _Gateway(tuple(endpoints))
            return
        known.left_at_s = None
        if known.endpoints != tuple(endpoints):
            known.endpoints = tuple(endpoints)
            self._push_sets(known.wants)

    def leave(self, gateway_id: str, now_s: float) -> None:
        """Its stream ended."""
        known = self._gateways.get(gateway_id)
        if known is not None:
            known.left_at_s = now_s
            known.paths.clear()

    def tick(self, now_s: float) -> None:
        """Forget gateways that stayed away; tell what was held back once the term's first seconds are over."""
        if self._quiet_until_s is not None and now_s >= self._quiet_until_s:
            self._quiet_until_s = None
            due, self._due = self._due, set()
            self._push_sets(due)
        for gateway_id, known in list(self._gateways.items()):
            if known.left_at_s is not None and now_s - known.left_at_s > self._stay_s:
                del self._gateways[gateway_id]
                self._push_sets(known.wants)

    def reach(self, gateway_id: str, node_id: str, path: str, *, wants_tunnel: bool) -> None:
        """A gateway tried a node."""
        known = self._gateways[gateway_id]
        known.paths[node_id] = path
        wants = wants_tunnel and bool(known.endpoints)
        if wants != (node_id in known.wants):
            (known.wants.add if wants else known.wants.discard)(node_id)
            self._push_sets({node_id})

    def reached_by(self, gateway_id: str) -> dict[str, str]:
        """Nodes that the gateway reaches, and how."""
        return {node: path for node, path in self._gateways[gateway_id].paths.items() if path != "none"}

    def paths(self, node_id: str) -> dict[str, str]:
        """How gateways reach a node: gateway id to path, where it has been tried."""
        return {i: known.paths[node_id] for i, known in sorted(self._gateways.items()) if node_id in known.paths}

    def gateway_set(self, node_id: str) -> agent_pb2.GatewaySet:
        """Gateways that the node should dial, in order of id; none while it is too early to know them all."""
        if self._quiet_until_s is not None:
            return agent_pb2.GatewaySet()
        return agent_pb2.GatewaySet(
            gateways=[
                agent_pb2.GatewayAddress(gateway_id=i, endpoints=known.endpoints)
                for i, known in sorted(self._gateways.items())
                if node_id in known.wants
            ]
        )

    def _push_sets(self, nodes: set[str]) -> None:
        if self._quiet_until_s is not None:
            self._due |= nodes
            return
        for node_id in sorted(nodes):
            self._push(node_id, agent_pb2.SchedulerMessage(gateways=self.gateway_set(node_id)))


__all__ = ["PATHS", "TunnelBook"]
