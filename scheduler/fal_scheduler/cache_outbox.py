"""What is due on one cache's stream, and how it goes down: sets of ids that are looked up when they are sent.

Used by `cache_sessions`, one outbox a session. Nothing here can grow beyond what the node holds, but for `control`,
which is bounded: a full one ends the session. Requests go first, then withdrawals, attestations, wishes, swarms, and
last copies at most once a second.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from fal_contract.errors import FalError
from fal_contract.limits import ATTESTED_MANIFEST_BYTES_MAX, DELTA_WINDOW_S, STREAM_QUEUE_MESSAGES_MAX
from fal_contract.telemetry import get_logger
from fal_contract.v1 import state_pb2, weights_pb2
from fal_scheduler.cache_swarms import Swarms
from fal_scheduler.cache_wishes import Manifests, WishKeeper
from fal_scheduler.core.artifact_standing import Standing, standing_of
from fal_scheduler.core.residency import Holding, ResidencyTable
from fal_scheduler.core.state import State
from fal_scheduler.leading_edge import LeadingEdge
from fal_scheduler.stream_edges import send_bounded, too_slow

COPIES_WINDOW_S: Final = 1.0
SWARMS_AT_ONCE_MAX: Final = 16  # messages about swarms that are built in one turn of the loop, for all nodes together

Send = Callable[[weights_pb2.CacheDown], Awaitable[None]]
_log = get_logger("scheduler.caches")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where what is due is looked up."""

    view: Callable[[], State]
    table: ResidencyTable
    swarms: Swarms
    wishes: WishKeeper
    manifests: Manifests
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SWARMS_AT_ONCE_MAX))


@dataclass(eq=False)
class Outbox:
    """One stream. Dicts without values are ordered sets; the `…_told` are what the node was told on it."""

    node_id: str
    sources: Sources
    closed: asyncio.Future[FalError]
    signal: LeadingEdge = field(default_factory=lambda: LeadingEdge(DELTA_WINDOW_S))
    ready: bool = False  # Welcome has been sent
    control: deque[weights_pb2.CacheDown] = field(default_factory=deque)
    drops: dict[str, weights_pb2.DropArtifact] = field(default_factory=dict)
    drops_told: set[str] = field(default_factory=set)
    attested: dict[str, None] = field(default_factory=dict)
    attested_told: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)  # manifests that this scheduler lacks
    stuck: dict[str, None] = field(default_factory=dict)  # attested, but the manifest is not here
    swarms: dict[str, None] = field(default_factory=dict)
    wishes: bool = True
    copies: bool = True
    copies_told: tuple[str, ...] = ()
    copies_at_s: float = float("-inf")
    copies_timer: asyncio.TimerHandle | None = None

    def close(self, error: FalError) -> None:
        """End the session with `error`; the first reason stands."""
        if not self.closed.done():
            self.closed.set_result(error)

    def end(self) -> None:
        """It has ended: no timer is left behind."""
        if self.copies_timer is not None:
            self.copies_timer.cancel()

    # --- what becomes due -------------------------------------------------------------------------------------------

    def push(self, message: weights_pb2.CacheDown) -> bool:
        """A request. False before Welcome; a full queue ends the session."""
        if not self.ready:
            return False
        if len(self.control) >= STREAM_QUEUE_MESSAGES_MAX:
            self.close(too_slow(f"the cache of node {self.node_id}"))
            return False
        self.control.append(message)
        self.signal.set()
        return True

    def swarm_due(self, artifact_id: str) -> None:
        """Its neighbours in a swarm may be others."""
        self.swarms[artifact_id] = None
        self.signal.set()

    def wishes_due(self) -> None:
        """Its wishes are others."""
        self.wishes = True
        self.signal.set()

    def copies_due(self) -> None:
        """Its last copies may be others."""
        self.copies = True
        self.signal.set()

    def judge(self, holding: Holding) -> None:
        """Whether an artifact must go from the node, or has become more than the node knows."""
        artifact_id = holding.artifact_id
        standing = standing_of(self.sources.view().catalog, artifact_id, holding.manifest_digest)
        if standing.reason:
            if artifact_id not in self.drops_told:
                self.drop(artifact_id, standing)
            return
        self.drops_told.discard(artifact_id)
        if standing.attested and not holding.manifest_digest and artifact_id not in self.attested_told:
            self.attested[artifact_id] = None
            self.signal.set()

    def drop(self, artifact_id: str, standing: Standing) -> None:
        """An artifact must go."""
        self.drops[artifact_id] = weights_pb2.DropArtifact(
            id=artifact_id, reason=standing.reason, revoked=standing.revoked
        )
        self.attested.pop(artifact_id, None)
        self.stuck.pop(artifact_id, None)
        self.signal.set()

    def gone(self, artifact_ids: set[str]) -> None:
        """The node has these no longer; when they come again, they are told of again."""
        self.attested_told -= artifact_ids
        self.drops_told -= artifact_ids

    def try_again(self) -> None:
        """What could not be told, and what was to go and is still there."""
        if self.stuck:
            self.attested.update(self.stuck)
            self.signal.set()
        told, self.drops_told = self.drops_told, set()
        node = self.sources.table.node(self.node_id)
        for artifact_id in sorted(told):
            if node is not None and artifact_id in node.holdings:
                self.judge(node.holdings[artifact_id])

    # --- how it goes down -------------------------------------------------------------------------------------------

    async def write(self, send: Send) -> None:
        """Send what is due, until cancelled. Raises UNAVAILABLE when the node takes too long."""
        while True:
            await self.signal.wait()
            while self.control:
                await self._send(send, self.control.popleft())
            while self.drops:
                artifact_id = next(iter(self.drops))
                self.drops_told.add(artifact_id)
                await self._send(send, weights_pb2.CacheDown(drop=self.drops.pop(artifact_id)))
            while self.attested:
                message = self._attested(next(iter(self.attested)))
                if message is not None:
                    await self._send(send, message)
            if self.wishes:
                self.wishes = False
                wishes = self.sources.wishes.message(self.node_id)
                await self._send(send, weights_pb2.CacheDown(wishes=wishes))
            while self.swarms:
                swarm = await self._next_swarm()
                if swarm is not None:
                    await self._send(send, weights_pb2.CacheDown(swarm=swarm))
            if self.copies and self._copies_changed():
                copies = weights_pb2.LastCopies(artifact_ids=self.copies_told)
                await self._send(send, weights_pb2.CacheDown(last_copies=copies))

    async def _next_swarm(self) -> weights_pb2.Swarm | None:
        """A change may concern thousands of nodes: they are told in many turns of the loop, not all in one."""
        async with self.sources.turns:
            artifact_id = next(iter(self.swarms))
            del self.swarms[artifact_id]
            swarm = self.sources.swarms.message(self.node_id, artifact_id)
            await asyncio.sleep(0)
        return swarm

    async def _send(self, send: Send, message: weights_pb2.CacheDown) -> None:
        await send_bounded(send, message, f"the cache of node {self.node_id}")

    def _attested(self, artifact_id: str) -> weights_pb2.CacheDown | None:
        """What became known of an artifact's content; None when it cannot be told now (`try_again`)."""
        del self.attested[artifact_id]
        self.stuck.pop(artifact_id, None)
        standing = standing_of(self.sources.view().catalog, artifact_id)
        if standing.model is None or not standing.attested:
            return None
        try:
            manifest = self.sources.manifests.manifest_of(artifact_id)
        except FalError as error:
            self.stuck[artifact_id] = None
            _log.warning("attested_not_told", node=self.node_id, artifact=artifact_id, message=str(error))
            return None
        self.attested_told.add(artifact_id)
        if manifest.ByteSize() > ATTESTED_MANIFEST_BYTES_MAX:
            head = state_pb2.ModelManifest()
            head.MergeFrom(manifest)
            head.ClearField("files")
            manifest = head
        return weights_pb2.CacheDown(attested=manifest)

    def _copies_changed(self) -> bool:
        """Take in the last copies, once a second at most; a timer wakes the writer for the rest."""
        loop = asyncio.get_running_loop()
        wait_s = self.copies_at_s + COPIES_WINDOW_S - loop.time()
        if wait_s > 0:
            if self.copies_timer is None or self.copies_timer.when() <= loop.time():
                self.copies_timer = loop.call_later(wait_s, self.signal.set)
            return False
        self.copies, self.copies_at_s = False, loop.time()
        copies = tuple(self.sources.table.last_copies(self.node_id))
        if copies == self.copies_told:
            return False
        self.copies_told = copies
        return True


__all__ = ["Outbox", "Send", "Sources"]
