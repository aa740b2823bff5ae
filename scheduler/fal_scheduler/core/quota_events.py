"""Commands about quotas. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SetQuota:
    """Give a team a quota. `gpu_milli`: thousandths of GPUs; `borrow`: it may hold more while nobody else waits."""

    team: str
    gpu_milli: int
    borrow: bool = True
    actor: str = ""


@dataclass(frozen=True, slots=True)
class UnsetQuota:
    """Take a team's quota away: it may hold what is free, and nothing is kept for it."""

    team: str
    actor: str = ""


QuotaCommand = SetQuota | UnsetQuota
