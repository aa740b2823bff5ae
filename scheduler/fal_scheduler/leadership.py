"""What one term has: the engine and the edges that stand on it. And how the APIs find it, or say that there is none.

Made by `leader` when a campaign is won, dropped when leadership is lost: whatever holds it answers NOT_LEADER from
then on. Must not start or stop anything itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.cache_builds import CacheBuilds
from fal_scheduler.cache_sessions import CacheSessions
from fal_scheduler.core.state import State
from fal_scheduler.dispatch import Dispatcher
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.event_feed import EventFeed
from fal_scheduler.image_packs import ImagePacks
from fal_scheduler.models import ModelRegistrar
from fal_scheduler.revocations import RevocationIndex
from fal_scheduler.sessions import AgentSessions
from fal_scheduler.store.interface import Loaded


@dataclass(frozen=True, slots=True)
class Leadership:
    """One term's parts. `commits`: store commits since it began; `store`: the store's name; `load`: its records."""

    engine: EnginePort
    sessions: AgentSessions
    caches: CacheSessions
    dispatcher: Dispatcher
    feed: EventFeed
    models: ModelRegistrar
    manifests: ManifestBlobs
    builds: CacheBuilds
    packs: ImagePacks
    alarms: EdgeAlarms
    revocations: RevocationIndex
    ca: CertificateAuthority
    clock: Clock
    store: str
    commits: Callable[[], int]
    load: Callable[[], Awaitable[Loaded]]

    @property
    def view(self) -> State:
        """The engine's state, to be read between awaits."""
        return self.engine.view


class CurrentLeadership:
    """Where servicers look for the term's parts at each call, and where standbys look who leads instead."""

    def __init__(self) -> None:
        self._now: Leadership | None = None
        self._leader: tuple[str, ...] = ()  # where another leads, as far as is known
        self._seen = False  # whether the store answers who leads
        self._changed = asyncio.Event()

    def set(self, leadership: Leadership | None) -> None:
        """A term began or ended."""
        self._now = leadership
        self._leader = ()
        self._tell()

    def see(self, addresses: tuple[str, ...]) -> None:
        """The store says where the leader listens; nothing where there is none, or it said nothing of itself."""
        if self._now is None and (addresses != self._leader or not self._seen):
            self._leader, self._seen = addresses, True
            self._tell()

    def lose_sight(self) -> None:
        """The store does not answer who leads."""
        if self._seen:
            self._seen, self._leader = False, ()
            self._tell()

    @property
    def leads(self) -> bool:
        """Whether this process leads."""
        return self._now is not None

    def get(self) -> Leadership:
        """The term's parts. Raises NOT_LEADER."""
        if self._now is None:
            raise not_leading(self._leader)
        return self._now

    async def soon(self, wait_s: float, *, failed: str = "") -> Leadership:
        """As `get`, once this process leads, or another is known to lead than at `failed`; `wait_s` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self._now is None and self._seen and (not self._leader or failed in self._leader):
                    await self._changed.wait()
        return self.get()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def not_leading(leader: tuple[str, ...] = ()) -> FalError:
    """What a standby answers."""
    if leader:
        return FalError(
            Code.NOT_LEADER,
            f"this scheduler is a standby; {leader[0]} leads",
            remedy="Ask the leader.",
            leader=leader,
        )
    return FalError(
        Code.NOT_LEADER,
        "this scheduler is a standby, or about to take over",
        remedy="Try the other schedulers, then this one again.",
    )


__all__ = ["CurrentLeadership", "Leadership", "not_leading"]
