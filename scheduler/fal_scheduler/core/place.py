"""Where a runner goes: filters, then the ranking of `core.ranking`. Total and deterministic: no clock, no I/O.

Pure. `place` answers the common question (which node, which GPUs) on the fleet's columns; `explain` answers the
operator's (why not the others) node by node and costs a few microseconds for each. Both apply the same filters, which
a property test holds. Machine types are tried in order: a later one only where no node of an earlier one can take it.

Called by `starts` and by views. Must change nothing but its caches.

A gang (runners on several nodes, all or none) will be placed here as well: its members one after the other, each on
columns where those before it are held, all of them released where one finds no place. `Gang` is what it would return.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fal_contract.errors import Code, FalError
from fal_scheduler.core.driver_versions import at_least
from fal_scheduler.core.fleet import NOBODY, Bools, Fleet, GpuClass, Ints, NodeFacts, number_of
from fal_scheduler.core.ranking import ANYBODY, Ask, FragmentsFn, Ranking, ReadyFn, Rows, unmet_wishes
from fal_scheduler.core.records import HOST_IMAGE, Spec

# Features of nodes (agent.proto, Capabilities).
IMAGES: Final = "images"
PACK: Final = "pack"
_MASKS_MAX = 256
_MIG = "-MIG-"  # between a device's model and its instance's profile, in the model of an instance


@dataclass(frozen=True, slots=True)
class Placement:
    """A node and what a runner gets there. `why`: the terms by which it was best, see `Ranking.why`."""

    node_id: str
    gpus: tuple[str, ...]
    memory_bytes: int
    cpu_milli: int
    gpu_milli: int = 0
    ready_ms: int = 0
    why: tuple[tuple[str, int], ...] = ()


Gang = tuple[Placement, ...]


class _Groups:
    """Rows that are the same in some respect. `first`: a row of each group; `group`: which each row is in."""

    def __init__(self, column: Ints) -> None:
        _, first, group = np.unique(column, return_index=True, return_inverse=True)
        self.first: list[int] = first.tolist()
        self.group: Ints = group.ravel()

    def all_of(self, found: Iterable[bool]) -> Bools:
        """Rows whose group is found to be so; one answer a group."""
        rows: Bools = np.fromiter(found, np.bool_, len(self.first))[self.group]
        return rows


@dataclass(slots=True)
class _Joined:
    """Rows with enough GPUs joined as asked, as far as the fleet's list of touched rows was seen."""

    epoch: int
    rows: Bools
    seen: int = 0


class Placer:
    """`place` with its caches: which rows could ever take a spec, by the parts of the spec that decide it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._version = -1
        self._masks: dict[object, tuple[Bools, ...]] = {}
        self._missing: dict[object, Ints] = {}
        self._profiles: _Groups | None = None
        self._classes: _Groups | None = None
        self._boards: dict[tuple[int, str], _Joined] = {}

    def place(
        self,
        spec: Spec,
        ask: Ask = ANYBODY,
        ready: ReadyFn | None = None,
        fragments: FragmentsFn | None = None,
    ) -> Placement | None:
        """The best node for one runner of `spec` now, or None.

        `ready` predicts times (else all are equal), `fragments` scores what the placement would strand.
        """
        for ranking in self._rankings(spec, ask, ready, fragments):
            at, equal = ranking.first()
            return self._placement(spec, ask, ranking, at, equal)
        return None

    def rank(
        self,
        spec: Spec,
        ask: Ask = ANYBODY,
        ready: ReadyFn | None = None,
        fragments: FragmentsFn | None = None,
    ) -> dict[str, tuple[tuple[str, int], ...]]:
        """Every node that could take it, the best first, with its terms. Costs a sort: for explanations."""
        found: dict[str, tuple[tuple[str, int], ...]] = {}
        for ranking in self._rankings(spec, ask, ready, fragments, all_types=True):
            for at in ranking.order():
                found.setdefault(self._fleet.node_ids[ranking.rows[at]], ranking.why(at))
        return found

    def suited(self, spec: Spec, ask: Ask = ANYBODY) -> tuple[Bools, Bools]:
        """Rows of ready nodes of a kind that could take it, whatever runs there; and those of them with room now."""
        fleet = self._fleet.fresh()
        kinds: Bools = fleet.ready & np.logical_or.reduce(self._masks_of(spec))
        return kinds, kinds & self._open(spec, ask)

    def _rankings(
        self, spec: Spec, ask: Ask, ready: ReadyFn | None, fragments: FragmentsFn | None, *, all_types: bool = False
    ) -> list[Ranking]:
        """Feasible rows with their terms, one for each machine type; only the first unless `all_types`."""
        fleet = self._fleet.fresh()
        open_rows = self._open(spec, ask)
        found: list[Ranking] = []
        for mask in self._masks_of(spec):
            rows = np.flatnonzero(open_rows & mask)
            if not rows.size:
                continue
            times = ready_of(fleet, rows, spec, ready)
            unmet = unmet_wishes(fleet, rows, spec, ask, self._labels_missing(spec))
            found.append(Ranking(fleet, rows, spec, ask, times, unmet, fragments))
            if not all_types:
                break
        return found

    def _open(self, spec: Spec, ask: Ask) -> Bools:
        """Rows that have room now, whatever kind they are."""
        fleet, rules = self._fleet, spec.placement
        rows: Bools = fleet.ready & (fleet.memory_free >= spec.resources.memory_bytes)
        rows &= fleet.cpu_free >= spec.resources.cpu_milli
        if spec.num_gpus == 0:
            rows &= fleet.first
        elif spec.fractional:
            rows &= fleet.shareable(ask.team, spec.gpu_milli)
        else:
            rows &= fleet.free >= spec.num_gpus
        if rules.gpu_topology and spec.num_gpus > 1:
            rows &= self._joined(spec.num_gpus, rules.gpu_topology)
        if rules.affinity:
            rows &= fleet.rows_running(rules.affinity)
        if rules.anti_affinity:
            rows &= ~fleet.rows_running(rules.anti_affinity)
        for node_id in ask.avoid:  # order does not matter: each clears rows of its own
            avoided = fleet.rows_of.get(node_id)
            if avoided is not None:
                rows[avoided.start : avoided.stop] = False
        return rows

    def _joined(self, count: int, rule: str) -> Bools:
        """Rows with so many free GPUs joined as asked; kept, and brought along where something changed."""
        fleet = self._fleet
        have = self._boards.get((count, rule))
        if have is None or have.epoch != fleet.epoch:
            if len(self._boards) >= _MASKS_MAX:
                self._boards.clear()
            have = self._boards[count, rule] = _Joined(fleet.epoch, np.zeros(len(fleet.node_ids), np.bool_))
            changed = list(range(len(fleet.node_ids)))
        else:
            changed = fleet.touched[have.seen :]
        alike: dict[tuple[int, bytes], bool] = {}
        for row, free in zip(changed, fleet.teams[changed] == NOBODY, strict=True):
            board = fleet.boards[row]
            key = (id(board), free.tobytes())
            if key not in alike:
                alike[key] = board.choose(np.flatnonzero(free).tolist(), count, rule) is not None
            have.rows[row] = alike[key]
        have.seen = len(fleet.touched)
        return have.rows

    def _placement(self, spec: Spec, ask: Ask, ranking: Ranking, at: int, equal: int) -> Placement:
        fleet, row = self._fleet, int(ranking.rows[at])
        gpus = choose_gpus(fleet, row, spec, ask.team)
        memory, cpu = spec.resources.memory_bytes, spec.resources.cpu_milli
        ready_ms, why = int(ranking.ready_ms[at]), ranking.why(at, equal)
        return Placement(fleet.node_ids[row], gpus, memory, cpu, spec.gpu_milli, ready_ms, why)

    def _masks_of(self, spec: Spec) -> tuple[Bools, ...]:
        """One mask a machine type, the preferred first; one in all where any will do."""
        fleet = self._fleet
        if self._version != fleet.version or len(self._masks) > _MASKS_MAX:
            self._masks.clear()
            self._missing.clear()
            self._profiles, self._classes = _Groups(fleet.profile), _Groups(fleet.kind)
            self._version = fleet.version
        key = (
            spec.machine_type,
            spec.num_gpus,
            spec.gpu_memory_bytes_min,
            spec.gpu_milli,
            spec.mig_profile,
            spec.pools,
            tuple(sorted(spec.labels.items())),
            spec.image == "host",
            spec.network,
            spec.packs,
            spec.resources.io_bytes_s > 0,
            spec.driver_version_min,
            spec.cuda_version_min,
        )
        masks = self._masks.get(key)
        if masks is None:
            types: tuple[str, ...] = spec.machine_type if spec.num_gpus and spec.machine_type else ("",)
            assert self._profiles is not None
            assert self._classes is not None
            facts = [fleet.facts[fleet.node_ids[row]] for row in self._profiles.first]
            nodes = self._profiles.all_of(static_refusal(one, spec) is None for one in facts)
            kinds = [fleet.classes[row] for row in self._classes.first]
            masks = self._masks[key] = tuple(
                nodes & self._classes.all_of(fits_class(kind, spec, machine_type) for kind in kinds)
                for machine_type in types
            )
        return masks

    def _labels_missing(self, spec: Spec) -> Ints | None:
        """How many preferred labels each row of the fleet lacks."""
        wanted = spec.placement.labels_preferred
        if not wanted:
            return None
        key = tuple(sorted(wanted.items()))
        missing = self._missing.get(key)
        if missing is None:
            fleet, profiles = self._fleet, self._profiles
            assert profiles is not None
            labels = [fleet.facts[fleet.node_ids[row]].labels for row in profiles.first]
            lacks = [sum(1 for name, value in wanted.items() if one.get(name) != value) for one in labels]
            missing = self._missing[key] = np.array(lacks, np.int64)[profiles.group]
        return missing


def ready_of(fleet: Fleet, rows: Rows, spec: Spec, ready: ReadyFn | None) -> Ints:
    """Milliseconds until the first output on each row; zeros without a prediction."""
    if ready is None:
        return np.zeros(len(rows), np.int64)
    return ready(spec, fleet.node_ids)[rows]  # the same list each time, which a cache may know


def static_refusal(facts: NodeFacts, spec: Spec) -> str | None:
    """The first of pool, labels, driver, network, features and versions that forbids the node, whatever runs there."""
    if spec.pools and facts.pool not in spec.pools:
        return "pool"
    if any(facts.labels.get(name) != value for name, value in spec.labels.items()):
        return "labels"
    if spec.image != "host" and facts.driver == "process":
        return "driver"
    if spec.network == "host" and not facts.host_network and not spec.packs:  # our own task pulls from a registry
        return "network"
    # The process driver keeps nothing apart: all its containers reach what the node reaches, and it says so.
    if spec.network == "egress" and facts.driver != "process" and "egress" not in facts.features:
        return "network"
    if spec.image != HOST_IMAGE and IMAGES not in facts.features:
        return "images"
    if spec.packs and PACK not in facts.features:
        return "pack"
    if spec.resources.io_bytes_s and facts.driver != "process" and "io-limit" not in facts.features:
        return "io-limit"
    if not at_least(facts.driver_version, spec.driver_version_min):
        return "gpu-driver"
    if not at_least(facts.cuda_version, spec.cuda_version_min):
        return "cuda"
    return None


def fits_class(kind: GpuClass, spec: Spec, machine_type: str) -> bool:
    """Whether GPUs of this kind will do; always true for a runner without GPUs."""
    if spec.num_gpus == 0:
        return True
    return (
        is_model(kind, machine_type) and is_profile(kind, spec) and memory_of(kind, spec) >= spec.gpu_memory_bytes_min
    )


def is_model(kind: GpuClass, machine_type: str) -> bool:
    """Whether GPUs of this kind are of the model; an instance is also of its device's. Empty: any model."""
    model = kind[0]
    return model != "" and machine_type in ("", model, model.partition(_MIG)[0])


def is_profile(kind: GpuClass, spec: Spec) -> bool:
    """Whether GPUs of this kind are whole devices, or instances of the profile, as asked; or asked for by model."""
    model, _, profile = kind
    return profile == spec.mig_profile or (not spec.mig_profile and model in spec.machine_type)


def memory_of(kind: GpuClass, spec: Spec) -> int:
    """Bytes of GPU memory that a runner of `spec` gets of each such GPU."""
    return kind[1] * spec.gpu_milli // 1000 if spec.fractional else kind[1]


def choose_gpus(fleet: Fleet, row: int, spec: Spec, team: str) -> tuple[str, ...]:
    """GPUs of a row for one runner. Whole ones: the best set of the board (`core.boards`).

    A share: of the GPU that its team shares already and that has the least left, else of one that nobody holds.
    """
    count, gpus, teams = spec.num_gpus, fleet.gpus[row], fleet.teams[row]
    if count == 0:
        return ()
    if spec.fractional:
        shares = fleet.shares[row]
        ours = np.flatnonzero((teams == number_of(team)) & (shares >= spec.gpu_milli))
        if ours.size:
            return (gpus[int(ours[np.argmin(shares[ours])])].id,)
    free = np.flatnonzero(teams == NOBODY).tolist()
    chosen = fleet.boards[row].choose(free, count, spec.placement.gpu_topology if count > 1 else "")
    if chosen is None:  # the columns said that there are enough
        why = f"{fleet.node_ids[row]} has no {count} GPUs that are free and joined as asked"
        raise FalError(Code.INTERNAL, why, remedy="Report this.")
    return tuple(gpus[at].id for at in chosen)


__all__ = ["ANYBODY", "IMAGES", "PACK", "Ask", "Gang", "Placement", "Placer", "choose_gpus", "fits_class"]
