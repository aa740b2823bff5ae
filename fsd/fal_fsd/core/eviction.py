"""What goes when the disk gets full. Pure and deterministic.

What an artifact is worth here is the time that it saves: requests per hour x seconds to bring it back, for each GiB
that it takes. The least valuable goes first; what no other node of the cluster has goes last; what is pinned or open
never goes. Requests are counted as heat: each adds one, and it halves every HALF_LIFE_S, so that last week's favourite
does not stay for ever. The scheduler tells a value in the same unit where it knows of apps that use an artifact: it
sees the requests of the whole cluster, and who else has it; its word counts instead of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

HALF_LIFE_S: Final = 6 * 3600.0
# An artifact that nobody asked for since it came is still worth a little: what costs more to bring back stays longer.
_IDLE_REQUESTS_PER_HOUR: Final = 1e-3
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Candidate:
    """An artifact on this node.

    `bytes_total`: of all its files. `bytes_freed`: of those that no other artifact here shares. `last_copy`: no other
    node of the cluster has it. `open`: a mount or a reader holds it. `told_ms`: milliseconds saved per hour and GiB, by
    the scheduler's word; None: it said nothing.
    """

    id: str
    bytes_total: int
    bytes_freed: int
    requests_per_hour: float
    seconds_back: float
    last_copy: bool = False
    pinned: bool = False
    open: bool = False
    told_ms: int | None = None


def cooled(heat: float, age_s: float) -> float:
    """What is left of `heat` after `age_s` seconds."""
    return heat * math.exp2(-max(age_s, 0.0) / HALF_LIFE_S)


def requests_per_hour(heat: float) -> float:
    """The steady rate of requests that would keep `heat` where it is."""
    return heat * math.log(2) * 3600.0 / HALF_LIFE_S


def value(candidate: Candidate) -> float:
    """Seconds saved per hour and GiB."""
    if candidate.told_ms is not None:
        return candidate.told_ms / 1000
    rate = max(candidate.requests_per_hour, _IDLE_REQUESTS_PER_HOUR)
    return rate * max(candidate.seconds_back, 0.0) * _GIB / max(candidate.bytes_total, 1)


def bytes_to_free(*, used: int, needed: int, bytes_max: int, high_percent: int, low_percent: int) -> int:
    """How much must go before `needed` bytes come: nothing below the high mark, else down to the low one."""
    if (used + needed) * 100 <= bytes_max * high_percent:
        return 0
    return max(used + needed - bytes_max * low_percent // 100, 0)


def choose(candidates: Iterable[Candidate], bytes_wanted: int) -> list[str]:
    """Ids to evict, in this order, until `bytes_wanted` are free or nothing is left that may go.

    Artifacts that free nothing by themselves (all files shared) are taken only when the others do not suffice.
    """
    chosen, freed = [], 0
    free = [x for x in candidates if not x.pinned and not x.open]
    for candidate in sorted(free, key=lambda x: (x.last_copy, x.bytes_freed == 0, value(x), x.id)):
        if freed >= bytes_wanted:
            break
        chosen.append(candidate.id)
        freed += candidate.bytes_freed
    return chosen


__all__ = ["HALF_LIFE_S", "Candidate", "bytes_to_free", "choose", "cooled", "requests_per_hour", "value"]
