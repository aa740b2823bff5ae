"""An app's runners by what is to be done with them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from fal_scheduler.core.records import Runner


@dataclass(slots=True)
class Runners:
    """An app's runners that should serve, by what is to be done with them."""

    unplaced: list[Runner] = field(default_factory=list)  # no node: can go without anybody's notice
    starting: list[Runner] = field(default_factory=list)  # on a node, not ready yet
    ready: list[Runner] = field(default_factory=list)  # ready, or was when its node fell silent

    @property
    def count(self) -> int:
        """All of them."""
        return len(self.unplaced) + len(self.starting) + len(self.ready)
