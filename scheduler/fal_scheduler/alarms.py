"""Alarms that the edges raise themselves, beside those of the core: a node's clock, a manifest that is missing.

Leader-local: whoever raised one clears it when the condition ends; a new leader finds out again. Bounded; the oldest
goes first. Read by GetStatus, which shows them with the core's.
"""

from __future__ import annotations

from typing import Final

from fal_scheduler.core.told import Alarm

_ALARMS_MAX: Final = 1000


class EdgeAlarms:
    """By kind and subject; raising one again keeps its age."""

    def __init__(self) -> None:
        self._alarms: dict[tuple[str, str], Alarm] = {}

    def raise_alarm(self, kind: str, subject: str, message: str, *, remedy: str, since_s: float) -> bool:
        """Raise or reword an alarm; True when it is new. `since_s`: Unix seconds."""
        known = self._alarms.get((kind, subject))
        self._alarms[kind, subject] = Alarm(kind, subject, message, remedy, known.since_s if known else since_s)
        if len(self._alarms) > _ALARMS_MAX:
            del self._alarms[next(iter(self._alarms))]
        return known is None

    def clear(self, kind: str, subject: str) -> None:
        """The condition ended."""
        self._alarms.pop((kind, subject), None)

    def all(self) -> tuple[Alarm, ...]:
        """In order of kind and subject."""
        return tuple(self._alarms[key] for key in sorted(self._alarms))
