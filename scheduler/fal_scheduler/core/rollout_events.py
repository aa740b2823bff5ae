"""Commands about rollouts. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SetRollout:
    """Steer a rollout. `action`: "pause", "resume", "promote" (a canary goes on to all) or "abort" (back again)."""

    id: str
    action: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class SetRevision:
    """Let a kept revision run again. `revision` 0: the newest below the one that runs."""

    id: str
    revision: int = 0
    actor: str = ""


RolloutCommand = SetRollout | SetRevision
