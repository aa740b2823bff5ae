"""What a node's cache keeps in memory, and what it stages ahead of need, within budgets. Pure; integers only.

`chosen` packs a byte budget by value (`keep_warm.value`: arrivals x milliseconds saved, per GiB), the most valuable
first; a set that is there stays unless another is worth WARM_GAIN_PERC more, so that sets do not flap. `Ahead` is the
budget of what is staged because a forecast says so: bytes an hour and a share of the disk.

Called by `cache_warmth`, which tells caches, and by `falctl sim warm`. Must not know nodes or apps: `warm_worth` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fal_contract.limits import (
    STAGE_AHEAD_BYTES_PER_HOUR,
    STAGE_AHEAD_DISK_PERC,
    STAGE_AHEAD_KEPT_S,
    WARM_GAIN_PERC,
    WARM_PER_NODE_MAX,
)
from fal_scheduler.core.forecast import MICRO
from fal_scheduler.core.keep_warm import value

HOUR_S: Final = 3600.0
STAGE_WORTH: Final = MICRO  # a whole request in the time that it takes; for fewer it displaces what is worth as much


@dataclass(frozen=True, slots=True)
class Keepable:
    """An artifact that could be kept in a tier of a node. `worth`: arrivals (millionths a minute) x ms saved."""

    artifact: str
    size_bytes: int
    worth: int

    @property
    def order(self) -> tuple[int, str]:
        """The most valuable for its size first."""
        return -value(self.worth, 1, self.size_bytes), self.artifact


def chosen(
    found: Iterable[Keepable], budget_bytes: int, before: Mapping[str, object], *, hold: bool = False
) -> tuple[str, ...]:
    """Artifacts to keep within the budget, the most valuable first.

    `before`: what is kept now. `hold`: nothing that fits is taken away (a leader that has not heard everything).
    What is worth nothing is not kept, unless it is held.
    """
    known = sorted(found, key=lambda one: one.order)
    fresh = _packed([one for one in known if one.worth > 0], budget_bytes)
    kept = _packed([one for one in known if one.artifact in before and (one.worth > 0 or hold)], budget_bytes)
    left = budget_bytes - sum(one.size_bytes for one in kept)
    names = {one.artifact for one in kept}
    more = [one for one in known if one.worth > 0 and one.artifact not in names]
    filled = kept + _packed(more, left, count_max=WARM_PER_NODE_MAX - len(kept))
    better = _worth(fresh) * 100 > _worth(filled) * (100 + WARM_GAIN_PERC)
    best = fresh if better and not hold else filled
    return tuple(one.artifact for one in sorted(best, key=lambda one: one.order))


def _packed(known: list[Keepable], budget_bytes: int, *, count_max: int = WARM_PER_NODE_MAX) -> list[Keepable]:
    """By value as long as they fit; or the single one that is worth more than all of these (at least half the best)."""
    taken: list[Keepable] = []
    left = budget_bytes
    for one in known:
        if one.size_bytes <= left and len(taken) < count_max:
            taken.append(one)
            left -= one.size_bytes
    alone = max((one for one in known if one.size_bytes <= budget_bytes), key=lambda one: one.worth, default=None)
    if alone is not None and count_max > 0 and alone.worth > _worth(taken):
        return [alone]
    return taken


def _worth(found: Iterable[Keepable]) -> int:
    return sum(one.worth for one in found)


def room_for(size_bytes: int, rate: int, free_bytes: int, others: Iterable[tuple[int, int]]) -> bool:
    """Whether an artifact fits on a disk without anything going that is asked for more than half as often.

    `others`: (bytes, rate) of what may be evicted. What arrives at one rate is worth its arrivals, whatever its size.
    """
    return size_bytes <= free_bytes + sum(size for size, one in others if 2 * one <= rate)


@dataclass(slots=True)
class Ahead:
    """What one node was told to stage because of a forecast. `until_s`: artifact -> Unix seconds; then it is let go."""

    until_s: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    spent: deque[tuple[float, int]] = field(default_factory=deque)

    def expire(self, wall_s: float) -> bool:
        """Let go of what is over; whether anything was."""
        over = [artifact for artifact, end_s in self.until_s.items() if end_s <= wall_s]
        for artifact in over:
            del self.until_s[artifact], self.sizes[artifact]
        return bool(over)

    def want(self, artifact: str, size_bytes: int, wall_s: float, disk_bytes_max: int) -> bool:
        """Stage it, or keep it for longer; False where the budget is spent. A renewal costs nothing."""
        end_s = self.until_s.get(artifact)
        if end_s is not None:
            if end_s - wall_s < STAGE_AHEAD_KEPT_S / 2:
                self.until_s[artifact] = wall_s + STAGE_AHEAD_KEPT_S
            return True
        while self.spent and self.spent[0][0] <= wall_s - HOUR_S:
            self.spent.popleft()
        spent_bytes = sum(size for _, size in self.spent)
        pinned_bytes = sum(self.sizes.values())
        if spent_bytes + size_bytes > STAGE_AHEAD_BYTES_PER_HOUR or len(self.until_s) >= WARM_PER_NODE_MAX:
            return False
        if pinned_bytes + size_bytes > disk_bytes_max * STAGE_AHEAD_DISK_PERC // 100:
            return False
        self.spent.append((wall_s, size_bytes))
        self.hold(artifact, size_bytes, wall_s + STAGE_AHEAD_KEPT_S)
        return True

    def hold(self, artifact: str, size_bytes: int, until_s: float) -> None:
        """It was staged before this leader; that costs nothing any more."""
        self.until_s[artifact], self.sizes[artifact] = until_s, size_bytes


__all__ = ["STAGE_WORTH", "Ahead", "Keepable", "chosen", "room_for"]
