"""Who is whose neighbour in an artifact's swarm. Pure.

Every member stands on several hash rings of its region; its neighbours are the next one before and after it on each.
A ring is connected by itself, several together are an expander; a join or leave touches two members of each ring, all
others keep their neighbours. The rings do not depend on the artifact, so that swarms share connections; the seeds do.

Seeds read the origin and carry pieces between regions: each region has some, all seeds are linked to each other, and
every other member is linked to one seed of its region (where regions are not larger than the seeds can serve). One
more ring over all regions holds the swarm together should all seeds of a region go at once.

Members that cannot be dialled stand on no ring: each is linked to the dialled members at its place on the rings (they
need one end that can be dialled), and to the others of its zone, which may reach it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

NEIGHBOURS_MEANT: Final = 16
SEEDS_MEANT: Final = 16
_REGION_RINGS: Final = 6
_SHUT_RINGS: Final = 3  # through which a member that cannot be dialled is linked: six of those that can
_SEED_POINTS: Final = 8  # of each seed on its region's ring, to spread the others evenly
_SERVED_PER_SEED: Final = 48


@dataclass(frozen=True, slots=True)
class SwarmMember:
    """A node that wants an artifact, or has it. `dialled`: others can open connections to it (False: behind NAT)."""

    node_id: str
    region: str = ""
    zone: str = ""
    pool: str = ""
    complete: bool = False
    dialled: bool = True
    reaches_origin: bool = True


@dataclass(frozen=True, slots=True, order=True)
class Neighbour:
    """As a member is told it."""

    node_id: str
    seed: bool


def _hash(*parts: object) -> int:
    return int.from_bytes(blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest())


class _Ring:
    """Points in order of hash; each belongs to a node."""

    __slots__ = ("_points",)

    def __init__(self) -> None:
        self._points: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._points)

    def add(self, at: int, node_id: str) -> None:
        insort(self._points, (at, node_id))

    def remove(self, at: int, node_id: str) -> None:
        del self._points[bisect_left(self._points, (at, node_id))]

    def around(self, at: int, node_id: str) -> Iterator[str]:
        """The next ones before and after this place, other than `node_id`."""
        points = self._points
        if points:
            place = bisect_left(points, (at, node_id))
            here = place < len(points) and points[place] == (at, node_id)
            yield points[place - 1][1]
            yield points[(place + here) % len(points)][1]

    def after(self, at: int) -> str:
        """Whose point comes next. The ring must not be empty."""
        return self._points[bisect_left(self._points, (at, "")) % len(self._points)][1]

    def nearest(self, other: _Ring, at: int, node_id: str) -> Iterator[str]:
        """Members of `other` for whom the point (at, node_id) of this ring is the next before or after."""
        points = self._points
        place = bisect_left(points, (at, node_id))
        low, high = points[place - 1], points[(place + 1) % len(points)]
        yield from other.between(low, high)

    def between(self, low: tuple[int, str], high: tuple[int, str]) -> Iterator[str]:
        """Members on the arc from low to high, going up and around; everybody when both are the same."""
        first, last = bisect_left(self._points, low), bisect_left(self._points, high)
        arc = self._points[first:last] if low < high else self._points[first:] + self._points[:last]
        return (node_id for _, node_id in arc)

    def served_by(self, seeds: _Ring, seed: str) -> Iterator[str]:
        """Members of this ring for whom `seeds.after` is this seed."""
        points = seeds._points
        for place, (at, node_id) in enumerate(points):
            if node_id == seed:
                yield from self.between((points[place - 1][0] + 1, ""), (at + 1, ""))


class _Region:
    """Rings of one region. `ranked`: everybody in the order in which they become seeds."""

    __slots__ = ("open", "ranked", "seed_points", "seeds", "shut", "zones")

    def __init__(self) -> None:
        self.open = [_Ring() for _ in range(_REGION_RINGS)]
        self.shut = [_Ring() for _ in range(_REGION_RINGS)]
        self.zones: dict[str, _Ring] = {}  # of those who cannot be dialled
        self.ranked: list[tuple[bool, int, str]] = []
        self.seeds: tuple[str, ...] = ()
        self.seed_points = _Ring()


class SwarmView:
    """Members of one artifact's swarm, and who is told of whom. Deterministic: the same members, the same answer.

    `put` and `drop` cost O(log n) and a copy of the region's rings; `neighbours_of` O(neighbours).
    """

    def __init__(self, artifact_id: str) -> None:
        self.artifact_id = artifact_id
        self._members: dict[str, SwarmMember] = {}
        self._points: dict[str, tuple[int, ...]] = {}
        self._regions: dict[str, _Region] = {}
        self._all = _Ring()
        self._seeds: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._members

    @property
    def seeds(self) -> frozenset[str]:
        """Who reads the origin and carries pieces between regions."""
        return self._seeds

    def member(self, node_id: str) -> SwarmMember:
        """As it was put. Raises KeyError."""
        return self._members[node_id]

    def region_members(self, region: str) -> int:
        """How many members this region has."""
        found = self._regions.get(region)
        return len(found.ranked) if found is not None else 0

    def put(self, member: SwarmMember) -> frozenset[str]:
        """Add a member, or change one; node ids (its own too) that must be told of their neighbours again."""
        old = self._members.get(member.node_id)
        if old == member:
            return frozenset()
        if old is not None and _standing(old) == _standing(member):
            self._members[member.node_id] = member
            return frozenset((member.node_id, *self._linked(member.node_id)))
        told = self.drop(member.node_id) if old is not None else frozenset()
        before = self._shape(member.region)
        self._members[member.node_id] = member
        self._place(member)
        self._choose_seeds()
        return told | {member.node_id} | self._linked(member.node_id) | self._changed(member.region, before)

    def drop(self, node_id: str) -> frozenset[str]:
        """Take a member out; idempotent. Node ids that must be told of their neighbours again."""
        member = self._members.get(node_id)
        if member is None:
            return frozenset()
        told, before = self._linked(node_id), self._shape(member.region)
        self._displace(member)
        del self._members[node_id]
        self._choose_seeds()
        return (told | self._changed(member.region, before)) - {node_id}

    def neighbours_of(self, node_id: str) -> tuple[Neighbour, ...]:
        """In order of node id; none for a stranger. Symmetric."""
        if node_id not in self._members:
            return ()
        return tuple(Neighbour(other, other in self._seeds) for other in sorted(self._linked(node_id)))

    def _place(self, member: SwarmMember) -> None:
        node_id = member.node_id
        points = tuple(_hash("ring", salt, node_id) for salt in range(_REGION_RINGS + 1))
        self._points[node_id] = points
        region = self._regions.setdefault(member.region, _Region())
        insort(region.ranked, self._rank(member))
        for ring, at in zip(region.open if member.dialled else region.shut, points, strict=False):
            ring.add(at, node_id)
        if member.dialled:
            self._all.add(points[-1], node_id)
        else:
            region.zones.setdefault(member.zone, _Ring()).add(points[-1], node_id)

    def _displace(self, member: SwarmMember) -> None:
        node_id = member.node_id
        points = self._points.pop(node_id)
        region = self._regions[member.region]
        region.ranked.remove(self._rank(member))
        for ring, at in zip(region.open if member.dialled else region.shut, points, strict=False):
            ring.remove(at, node_id)
        if member.dialled:
            self._all.remove(points[-1], node_id)
        else:
            region.zones[member.zone].remove(points[-1], node_id)
            if not len(region.zones[member.zone]):
                del region.zones[member.zone]
        if not region.ranked:
            del self._regions[member.region]

    def _rank(self, member: SwarmMember) -> tuple[bool, int, str]:
        return (not member.reaches_origin, _hash("seed", self.artifact_id, member.node_id), member.node_id)

    def _choose_seeds(self) -> None:
        """The first of each region. Those that can be dialled are not preferred: a seed dials the others anyhow."""
        count = _seeds_per_region(len(self._regions))
        for region in self._regions.values():
            seeds = tuple(node_id for _, _, node_id in region.ranked[:count])
            if seeds != region.seeds:
                region.seeds, region.seed_points = seeds, _Ring()
                for seed in seeds:
                    for point in range(_SEED_POINTS):
                        region.seed_points.add(_hash("serves", point, seed), seed)
        self._seeds = frozenset(seed for region in self._regions.values() for seed in region.seeds)

    def _shape(self, region: str) -> tuple[frozenset[str], bool, bool, frozenset[str]]:
        """The seeds, what else rules a region's links, and who is linked across for want of it."""
        found = self._regions.get(region)
        if found is None:
            return self._seeds, False, False, frozenset()
        alone = not len(found.open[0])
        across = {x for node_id in self._in_region(region) for x in self._linked(node_id)} if alone else set()
        return self._seeds, len(found.ranked) <= NEIGHBOURS_MEANT + 1, self._served(found), frozenset(across)

    def _changed(self, region: str, before: tuple[frozenset[str], bool, bool, frozenset[str]]) -> frozenset[str]:
        """Who must be told beyond the neighbours of who came or went."""
        after = self._shape(region)
        told = set(before[3] ^ after[3])
        if before[1:3] != after[1:3] or bool(before[3]) != bool(after[3]):
            told.update(self._in_region(region))
        changed = {seed for seed in before[0] ^ self._seeds if seed in self._members}
        if before[0] != self._seeds:
            told |= self._seeds | changed
        for seed in changed:
            told |= self._linked(seed)
            told.update(self._in_region(self._members[seed].region))
        return frozenset(told & self._members.keys())

    def _in_region(self, region: str) -> Iterator[str]:
        found = self._regions.get(region)
        return (node_id for _, _, node_id in found.ranked) if found is not None else iter(())

    def _linked(self, node_id: str) -> frozenset[str]:
        member, points = self._members[node_id], self._points[node_id]
        region = self._regions[member.region]
        if len(region.ranked) <= NEIGHBOURS_MEANT + 1:
            links = set(self._in_region(member.region))
        else:
            links = set(self._on_rings(member, points, region))
        links.update(self._across(member, points[-1]))
        if node_id in self._seeds:
            links |= self._seeds
            if self._served(region):
                for ring in (region.open[0], region.shut[0]):
                    links.update(ring.served_by(region.seed_points, node_id))
        elif self._served(region):
            links.add(region.seed_points.after(points[0]))
        links.discard(node_id)
        return frozenset(links)

    @staticmethod
    def _served(region: _Region) -> bool:
        return 0 < len(region.ranked) <= _SERVED_PER_SEED * len(region.seeds)

    def _on_rings(self, member: SwarmMember, points: tuple[int, ...], region: _Region) -> Iterator[str]:
        node_id = member.node_id
        if not member.dialled:
            for ring, at in zip(region.open[:_SHUT_RINGS], points, strict=False):
                yield from ring.around(at, node_id)
            yield from region.zones[member.zone].around(points[-1], node_id)
            return
        for number, (ring, at) in enumerate(zip(region.open, points, strict=False)):
            yield from ring.around(at, node_id)
            if number < _SHUT_RINGS:
                yield from ring.nearest(region.shut[number], at, node_id)

    def _across(self, member: SwarmMember, at: int) -> Iterator[str]:
        """The ring of all regions: who cannot be dialled is beside it where its region has nobody who can."""
        if member.dialled:
            yield from self._all.around(at, member.node_id)
        for region in self._regions.values():
            if len(region.open[0]) or not len(region.shut[0]):
                continue
            if not member.dialled and self._regions[member.region] is region:
                yield from self._all.around(at, member.node_id)
            elif member.dialled:
                for zone in region.zones.values():
                    yield from self._all.nearest(zone, at, member.node_id)


def _standing(member: SwarmMember) -> tuple[object, ...]:
    """What decides its place."""
    return (member.region, member.zone, member.dialled, member.reaches_origin)


def _seeds_per_region(regions: int) -> int:
    """16 in all, 4 of each where regions are many, 2 and 1 where they are very many: all are linked to each other."""
    if regions <= 4:
        return SEEDS_MEANT // max(regions, 1)
    return 4 if regions <= 12 else 2 if regions <= 24 else 1


__all__ = ["NEIGHBOURS_MEANT", "SEEDS_MEANT", "Neighbour", "SwarmMember", "SwarmView"]
