"""Which path leads to each node, found by trying. Over `datapath`'s connections; used by `dispatch`.

Each node of the route table is probed once it is known and when its addresses change; a node without a working path
is probed again with a growing pause, a direct one after a failed connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal

from fal_contract.datapath import Address, DirectConnections, TunnelListener
from fal_contract.errors import Code
from fal_contract.http_client import HttpConnection, NotSent

Path = Literal["direct", "tunnel", "none"]

_PROBES_AT_ONCE: Final = 16
_RETRY_BASE_S: Final = 1.0
_RETRY_CAP_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class NodePath:
    """How one node is reached."""

    node_id: str
    path: Path
    reason: str  # why not directly
    wants_tunnel: bool


@dataclass(slots=True)
class _Node:
    addresses: tuple[Address, ...]
    tried: asyncio.Event = field(default_factory=asyncio.Event)
    direct: bool = False
    reason: str = "not tried yet"
    again: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class NodePaths:
    """Paths to all nodes of the route table."""

    def __init__(
        self,
        direct: DirectConnections,
        tunnels: TunnelListener | None,
        *,
        rng: Random,
        on_change: Callable[[], None],
    ) -> None:
        self._direct = direct
        self._tunnels = tunnels
        self._rng = rng
        self._on_change = on_change
        self._nodes: dict[str, _Node] = {}
        self._probing = asyncio.Semaphore(_PROBES_AT_ONCE)
        if tunnels is not None:
            tunnels.on_change = lambda node_id: on_change()

    def know(self, nodes: Mapping[str, tuple[Address, ...]]) -> None:
        """All nodes that matter, with their addresses."""
        for node_id in [known for known in self._nodes if nodes.get(known) != self._nodes[known].addresses]:
            self._forget(node_id)
        for node_id, addresses in nodes.items():
            if node_id not in self._nodes:
                node = self._nodes[node_id] = _Node(addresses)
                node.task = asyncio.create_task(self._watch(node_id, node), name=f"path-{node_id}")

    def reachable(self, node_id: str) -> bool:
        """False when no path is known to work; a node that was not tried yet counts as reachable."""
        node = self._nodes.get(node_id)
        return node is None or node.direct or not node.tried.is_set() or self._has_tunnel(node_id)

    def reason(self, node_id: str) -> str:
        """Why a node cannot be reached; empty when it can."""
        return "" if self.reachable(node_id) else f"node {node_id}: {self._nodes[node_id].reason}"

    def paths(self) -> list[NodePath]:
        """Every node that was tried, sorted."""
        return [
            NodePath(
                node_id,
                "direct" if node.direct else "tunnel" if self._has_tunnel(node_id) else "none",
                "" if node.direct else node.reason,
                self._tunnels is not None and not node.direct,
            )
            for node_id, node in sorted(self._nodes.items())
            if node.tried.is_set()
        ]

    async def connection(self, node_id: str, *, fresh: bool = False) -> HttpConnection:
        """A connection to the node, dialled or dug. Raises NotSent."""
        node = self._nodes.get(node_id)
        if node is None:
            raise NotSent(Code.UNAVAILABLE, f"node {node_id} is not in the route table", remedy="Try again.")
        await node.tried.wait()
        if node.direct:
            try:
                return await self._direct.acquire(node_id, node.addresses, fresh=fresh)
            except NotSent as error:
                node.direct, node.reason = False, error.what
                node.again.set()
                self._on_change()
                if not self._has_tunnel(node_id):
                    raise
        if self._tunnels is None or not self._has_tunnel(node_id):
            raise NotSent(Code.UNAVAILABLE, f"node {node_id} cannot be reached: {node.reason}", remedy="Wait for it.")
        return await self._tunnels.acquire(node_id)

    def sweep(self) -> None:
        """Close connections that were idle for too long."""
        self._direct.sweep()

    async def close(self) -> None:
        """End all probes and connections."""
        tasks = [node.task for node in self._nodes.values() if node.task]
        for node_id in list(self._nodes):
            self._forget(node_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._direct.close()
        if self._tunnels is not None:
            await self._tunnels.close()

    def _forget(self, node_id: str) -> None:
        node = self._nodes.pop(node_id)
        if node.task is not None:
            node.task.cancel()
        node.tried.set()  # nobody may wait for it for ever
        self._direct.forget(node_id)

    def _has_tunnel(self, node_id: str) -> bool:
        return self._tunnels is not None and self._tunnels.stands(node_id)

    async def _watch(self, node_id: str, node: _Node) -> None:
        """Probe until it works; again when a connection failed."""
        failures = 0
        while True:
            async with self._probing:
                try:
                    await self._direct.probe(node_id, node.addresses)
                    node.direct, node.reason, failures = True, "", 0
                except NotSent as error:
                    node.direct, node.reason = False, error.what
                    failures += 1
            node.tried.set()
            node.again.clear()
            self._on_change()
            pause_s = None
            if not node.direct:
                cap_s = min(_RETRY_CAP_S, _RETRY_BASE_S * 2 ** min(failures, 10))
                pause_s = self._rng.uniform(cap_s / 2, cap_s)
            try:
                async with asyncio.timeout(pause_s):
                    await node.again.wait()
            except TimeoutError:
                pass
