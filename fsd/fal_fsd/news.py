"""What the scheduler has to be told, gathered until the stream takes it. Implements tools.TransferNews.

Invariants: a change of state wakes the stream at once, progress once a second; without a scheduler nothing grows:
changed artifacts are a set, events the newest few, claims and attestations are made again from the transfers at the
next Hello. One event loop. Owned by fal_fsd.node.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from fal_contract.clock import Clock
from fal_contract.limits import CACHE_EVENTS_MAX, CACHE_REPORT_S, MESSAGE_BYTES_MAX
from fal_contract.telemetry import get_logger
from fal_contract.v1 import state_pb2, weights_pb2
from fal_fsd.claims import to_wire
from fal_fsd.core.messages import Claim

_CLAIMS_PER_MESSAGE: Final = 4096  # about 700 KiB, within one message
_ARTIFACTS_PER_MESSAGE: Final = 4096  # about 1 MiB
_SCHEDULER_PATIENCE_S: Final = 10.0
_log = get_logger("fsd.news")


class News:
    """`configured`: there are schedulers to dial."""

    def __init__(self, clock: Clock, *, configured: bool) -> None:
        self._clock = clock
        self._configured = configured
        self._away_since_s = clock.monotonic_s()
        self._dirty: set[str] = set()
        self._events: deque[weights_pb2.CacheEvent] = deque(maxlen=CACHE_EVENTS_MAX)
        self._claims: dict[str, list[Claim]] = {}
        self._messages: deque[weights_pb2.CacheUp] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.connected = False
        self.waiting = asyncio.Event()
        self.counts: dict[str, int] = {}  # events by kind, since the start of the process

    # ---- tools.TransferNews

    @property
    def scheduled(self) -> bool:
        """False too when the scheduler has been away for a while: nobody will name members of new swarms."""
        return self._configured and (
            self.connected or self._clock.monotonic_s() - self._away_since_s < _SCHEDULER_PATIENCE_S
        )

    def changed(self, artifact_id: str, *, at_once: bool) -> None:
        self._dirty.add(artifact_id)
        if at_once:
            self.wake()
        elif self._timer is None and self.connected:
            self._timer = asyncio.get_running_loop().call_later(CACHE_REPORT_S, self._tick)

    def event(self, kind: str, subject: str, message: str) -> None:
        _log.warning(kind.lower(), subject=subject, message=message)
        self._events.append(
            weights_pb2.CacheEvent(kind=kind, subject=subject, message=message[:1024], at_s=self._clock.wall_s())
        )
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.wake()

    def claims(self, artifact_id: str, claims: Sequence[Claim]) -> None:
        if self.connected:
            self._claims.setdefault(artifact_id, []).extend(claims)
            self.wake()

    def attestation(self, attestation: weights_pb2.Attestation) -> None:
        self._put(weights_pb2.CacheUp(attestation=attestation), attestation.artifact_id)

    # ---- the stream

    def manifest(self, manifest: state_pb2.ModelManifest) -> None:
        """The scheduler wants it, or has never seen it."""
        self._put(weights_pb2.CacheUp(manifest=manifest), manifest.artifact_id)

    def _put(self, message: weights_pb2.CacheUp, artifact_id: str) -> None:
        if not self.connected:
            return
        if (size := message.ByteSize()) > MESSAGE_BYTES_MAX:  # it would end the session, and the next one, too
            why = f"what is to be told of it has {size} bytes, a message {MESSAGE_BYTES_MAX}: it has too many pieces"
            self.event("TOO_LARGE_TO_TELL", artifact_id, why)
            return
        self._messages.append(message)
        self.wake()

    def telling_all(self) -> None:
        """Hello is being made: it tells everything up to now. What changes before the welcome is told after it."""
        self._dirty.clear()

    def begun(self) -> None:
        """A session stands."""
        self.connected = True
        self.wake()

    def ended(self) -> None:
        self.connected = False
        self._away_since_s = self._clock.monotonic_s()
        self._claims.clear()
        self._messages.clear()

    def take_messages(self) -> list[weights_pb2.CacheUp]:
        """Claims and what else is whole by itself, claims first: an attestation speaks about them."""
        messages = []
        for artifact_id, claims in self._claims.items():
            messages += list(claims_messages(artifact_id, claims))
        messages += self._messages
        self._claims.clear()
        self._messages.clear()
        return messages

    def take_report(self) -> tuple[set[str], list[weights_pb2.CacheEvent]]:
        """Artifacts that have changed, and events; both count as told. As many as fit into a message; then the rest."""
        self.waiting.clear()
        dirty = set(islice(self._dirty, _ARTIFACTS_PER_MESSAGE))
        self._dirty -= dirty
        if self._dirty:
            self.wake()
        events = list(self._events)
        self._events.clear()
        return dirty, events

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        self._timer = None
        self.wake()

    def wake(self) -> None:
        """Have the stream take what there is."""
        if self.connected:
            self.waiting.set()


def claims_messages(artifact_id: str, claims: Iterable[Claim]) -> Iterable[weights_pb2.CacheUp]:
    """In messages of a bounded size."""
    wire = [to_wire(claim) for claim in claims]
    for at in range(0, len(wire), _CLAIMS_PER_MESSAGE):
        told = weights_pb2.PieceClaims(artifact_id=artifact_id, claims=wire[at : at + _CLAIMS_PER_MESSAGE])
        yield weights_pb2.CacheUp(claims=told)


__all__ = ["News", "claims_messages"]
