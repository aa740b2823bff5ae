"""What one term has: the engine and the edges that stand on it. And how the APIs find it, or say that there is none.

Made by `leader` when a campaign is won, dropped when leadership is lost: whatever holds it answers NOT_LEADER from
then on. Must not start or stop anything itself.
"""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True, slots=True)
class Leadership:
    """One term's parts. `commits`: store commits since it began; `store`: the store's name."""

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

    @property
    def view(self) -> State:
        """The engine's state, to be read between awaits."""
        return self.engine.view


class CurrentLeadership:
    """Where servicers look for the term's parts at each call."""

    def __init__(self) -> None:
        self._now: Leadership | None = None

    def set(self, leadership: Leadership | None) -> None:
        """A term began or ended."""
        self._now = leadership

    @property
    def leads(self) -> bool:
        """Whether this process leads."""
        return self._now is not None

    def get(self) -> Leadership:
        """The term's parts. Raises NOT_LEADER."""
        if self._now is None:
            raise not_leading()
        return self._now


def not_leading() -> FalError:
    """What a standby answers."""
    return FalError(
        Code.NOT_LEADER,
        "this scheduler is a standby, or about to take over",
        remedy="Try the other schedulers, then this one again.",
    )


__all__ = ["CurrentLeadership", "Leadership", "not_leading"]
