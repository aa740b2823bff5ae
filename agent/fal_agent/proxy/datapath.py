"""What all connections of one proxy process share: slots, bounds, identity, and the hooks around them.

Created by `server`, used by `pump`. Single-threaded: everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from fal_agent.proxy.messages import RunnerEntry
from fal_agent.proxy.slots import Outcome, Refused, SlotTable
from fal_agent.proxy.tally import Tally
from fal_agent.proxy.worker_pool import WorkerConnection, WorkerPool
from fal_contract.identity import PeerIdentity
from fal_contract.limits import (
    DATA_CONNECT_TIMEOUT_S,
    DATA_CONNECTIONS_MAX,
    DATA_HEAD_TIMEOUT_S,
    DATA_SERVER_IDLE_S,
)
from fal_contract.revocation import RevokedPeer, RevokedPeers
from fal_contract.telemetry import get_logger

_log = get_logger("proxy.datapath")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of a proxy; tests make them small."""

    connections_max: int = DATA_CONNECTIONS_MAX
    head_timeout_s: float = DATA_HEAD_TIMEOUT_S
    idle_timeout_s: float = DATA_SERVER_IDLE_S  # between requests of a connection
    stall_timeout_s: float = 60.0  # a peer that neither sends nor takes bytes it owes
    connect_timeout_s: float = DATA_CONNECT_TIMEOUT_S
    discard_bytes_max: int = 1 << 20  # of a body that nobody wants
    discard_timeout_s: float = 2.0


class Connection(Protocol):
    """What the data path knows of a client's connection."""

    @property
    def idle(self) -> bool:
        """No request is under way."""
        ...

    def abort(self) -> None:
        """End it now."""
        ...

    def close_if_idle(self) -> None:
        """End it, unless a request is under way."""
        ...

    @property
    def peer(self) -> PeerIdentity | None:
        """Who is at the other end; None over plain TCP."""
        ...


class DataPath:
    """Shared state of all connections."""

    def __init__(
        self, *, node_id: str, slots: SlotTable, rng: Random, bounds: Bounds, on_change: Callable[[], None]
    ) -> None:
        self.now_s = asyncio.get_running_loop().time  # the loop's monotonic clock
        self.node_id = node_id
        self.slots = slots
        self.bounds = bounds
        self.connections: set[Connection] = set()
        self.workers = WorkerPool()
        self.tally = Tally()
        self.revoked = RevokedPeers()
        self.empty = asyncio.Event()  # there are no connections
        self.empty.set()
        # While a successor is served: its address is ours, new requests are for it.
        self.handed_over = False
        self.on_finished: Callable[[str, Outcome], None] | None = None
        self._rng = rng
        self._on_change = on_change

    def joined(self, connection: Connection) -> None:
        """A connection was made."""
        self.connections.add(connection)
        self.empty.clear()

    def left(self, connection: Connection) -> None:
        """A connection ended; one that never joined is fine."""
        self.connections.discard(connection)
        if not self.connections:
            self.empty.set()

    def set_revoked(self, peers: Iterable[RevokedPeer]) -> None:
        """Refuse these from now on; connections that are open with them end, requests on them fail."""
        self.revoked = RevokedPeers(peers)
        for connection in list(self.connections):
            if connection.peer is not None and self.revoked.is_revoked(connection.peer):
                _log.warning("revoked: cut", peer=connection.peer.subject, serial=connection.peer.serial)
                connection.abort()

    def admit(self, runner_id: str, ticket_term: int) -> RunnerEntry | Refused:
        """A slot, or why there is none."""
        admitted = self.slots.admit(runner_id, ticket_term, self.now_s())
        if isinstance(admitted, RunnerEntry):
            self._on_change()
        else:
            self.tally.refuse(admitted.code.value)
        return admitted

    def release(self, runner_id: str, outcome: Outcome, began_s: float) -> None:
        """A request that was admitted at `began_s` ended."""
        now_s = self.now_s()
        self.slots.release(runner_id, outcome, now_s)
        self.tally.end(outcome.value, now_s - began_s)
        if self.on_finished is not None:
            self.on_finished(runner_id, outcome)
        self._on_change()

    def keep(self, worker: WorkerConnection) -> None:
        """A worker's connection is free again; forgotten runners' are not kept."""
        if self.handed_over or not self.slots.serves(worker.entry.runner_id):
            worker.abort()
        else:
            self.workers.give(worker, self.now_s())

    def new_request_id(self) -> bytes:
        """For requests that came without one."""
        return b"%016x" % self._rng.getrandbits(64)
