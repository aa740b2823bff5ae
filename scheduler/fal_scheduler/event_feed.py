"""Events as operators follow them: the engine's log, and what the edges note beside it.

A reader is woken when there is something new and reads from the log's ring by number, so that a slow one costs
nothing and sees from a gap in the numbers what it missed. One object per leader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from fal_contract.errors import Code, FalError
from fal_scheduler.core.events import Effect, Logged
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.event_log import EventLog

FOLLOWERS_MAX: Final = 256
_SUFFIX_CHARS: Final = 8  # of a runner's id (fal_contract.ids)


class EventFeed:
    """Appends the edges' notes to the engine's log and wakes followers."""

    def __init__(self, engine: EnginePort, log: EventLog) -> None:
        self._log = log
        self._wakers: set[asyncio.Event] = set()
        self._closed: FalError | None = None
        self._unsubscribe = engine.subscribe(self._on_effect)

    def note(self, event: Logged) -> None:
        """Something happened at an edge."""
        self._log.append(event)
        self._wake()

    def latest(self, kind: str, subject: str) -> Logged | None:
        """The newest event of this kind about `subject` that is still in memory."""
        return self._log.latest(kind, subject)

    async def follow(self, *, after: int, subject: str, follow: bool) -> AsyncIterator[Logged]:
        """Events with a higher number, oldest first; with `follow` until the caller goes away.

        `subject`: only about it, or about the runners of the app that it names. Raises BUSY at the bound of readers,
        and the reason of `close` when the leader is one no longer.
        """
        if follow and len(self._wakers) >= FOLLOWERS_MAX:
            raise FalError(Code.BUSY, f"{FOLLOWERS_MAX} readers follow events", remedy="Close some, or try later.")
        waker = asyncio.Event()
        self._wakers.add(waker)
        try:
            while True:
                waker.clear()
                for event in self._log.since(after):
                    after = event.number
                    if not subject or is_about(event, subject):
                        yield event
                if not follow:
                    return
                if self._closed is not None:
                    raise self._closed
                await waker.wait()
        finally:
            self._wakers.discard(waker)

    def close(self, why: FalError) -> None:
        """Stop listening to the engine; followers read what is there and then get `why`."""
        self._unsubscribe()
        self._closed = why
        self._wake()

    def _on_effect(self, effect: Effect) -> None:
        if isinstance(effect, Logged):
            self._wake()

    def _wake(self) -> None:
        for waker in self._wakers:
            waker.set()


def is_about(event: Logged, subject: str) -> bool:
    """Whether an event is about `subject`, or about a runner of the app `subject`."""
    head, dash, suffix = event.subject.rpartition("-")
    of_app = bool(dash) and head == subject and "/" in subject and len(suffix) == _SUFFIX_CHARS
    return event.subject == subject or of_app


__all__ = ["EventFeed", "is_about"]
