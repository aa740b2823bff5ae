"""The line of apps that wait for a place: classes of equal needs, each in order. Pure. Part of `State`.

How it is woken, and in what order, is `core.waiting`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fal_scheduler.core.records import HOST_IMAGE, Spec

AGEING_S: Final = 60.0  # of waiting count as much as one point of priority
PLACE: Final = "place"
QUOTA: Final = "quota"

Need = tuple[object, ...]
Order = tuple[int, str]  # ms, app


@dataclass(slots=True)
class Waiting:
    """Apps with runners that have no node, by what they need; the first of each class first."""

    apps: dict[str, tuple[Need, Order]] = field(default_factory=dict)
    by_need: dict[Need, list[Order]] = field(default_factory=dict)
    asleep: dict[Need, str] = field(default_factory=dict)  # classes that found no place, and why: "place" or "quota"

    def __contains__(self, app_id: object) -> bool:
        return app_id in self.apps

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.apps))

    def __len__(self) -> int:
        return len(self.apps)

    def put(self, app_id: str, need: Need, order_ms: int) -> None:
        """The app waits, or waits for something else now. Its place in the order stays while its need does."""
        have = self.apps.get(app_id)
        if have is not None and have[0] == need and have[1][0] <= order_ms:
            return
        self.pop(app_id)
        order = (order_ms, app_id)
        self.apps[app_id] = (need, order)
        insort(self.by_need.setdefault(need, []), order)

    def pop(self, app_id: str) -> None:
        """The app waits no more."""
        have = self.apps.pop(app_id, None)
        if have is None:
            return
        need, order = have
        line = self.by_need[need]
        del line[bisect_left(line, order)]
        if not line:
            del self.by_need[need]
            self.asleep.pop(need, None)

    def sleep(self, need: Need, why: str) -> None:
        """The class found no place."""
        if need in self.by_need:
            self.asleep[need] = why


def need_of(spec: Spec, team: str) -> Need:
    """What decides where a runner can be: equal needs are one class."""
    rules, resources = spec.placement, spec.resources
    return (
        team,
        spec.num_gpus,
        spec.gpu_milli,
        spec.machine_type,
        spec.gpu_memory_bytes_min,
        spec.mig_profile,
        resources.memory_bytes,
        resources.cpu_milli,
        resources.io_bytes_s > 0,
        spec.pools,
        tuple(sorted(spec.labels.items())),
        spec.image == HOST_IMAGE,
        spec.network,
        spec.packs,
        spec.driver_version_min,
        spec.cuda_version_min,
        rules.affinity,
        rules.anti_affinity,
        rules.gpu_topology,
    )


def order_ms(spec: Spec, since_s: float) -> int:
    """Where a waiter stands; smaller is earlier. `since_s`: wall clock, so that a new leader finds the same order."""
    return round((since_s - spec.priority * AGEING_S) * 1000)


def affinity_of(need: Need) -> tuple[str, ...]:
    """Apps beside which the class must be."""
    found = need[-3]
    assert isinstance(found, tuple)
    return found
