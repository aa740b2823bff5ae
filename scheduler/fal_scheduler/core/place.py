"""Where a runner goes: filters, then best fit. Total and deterministic: no clock, no I/O, no randomness.

Pure. `place` answers the common question (which node, which GPUs) on the fleet's columns; `explain` answers the
operator's (why not the others) node by node and costs a few microseconds for each. Both apply the same filters, which
a property test holds. Best fit: fewest GPUs left free, then least memory left (in MiB), then the node's id.

Called by `reconcile` and by views. Must change nothing but the cache of masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from fal_scheduler.core.driver_versions import at_least
from fal_scheduler.core.fleet import Bools, Fleet, GpuClass, Ints, NodeFacts
from fal_scheduler.core.records import HOST_IMAGE, Spec

# Features of nodes (agent.proto, Capabilities).
IMAGES: Final = "images"
PACK: Final = "pack"
_MASKS_MAX = 256
# The score packs three numbers into 53 bits: GPUs left free, MiB left, row. NODES_MAX rows fit 17 bits.
_ROW_BITS = 17
_MEMORY_BITS = 28


@dataclass(frozen=True, slots=True)
class Placement:
    """A node and what a runner gets there."""

    node_id: str
    gpus: tuple[str, ...]
    memory_bytes: int
    cpu_milli: int


class Placer:
    """`place` with its cache: which rows could ever take a spec, by the parts of the spec that decide it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._version = -1
        self._masks: dict[object, tuple[Bools, ...]] = {}

    def place(self, spec: Spec) -> Placement | None:
        """The best node for one runner of `spec` now, or None."""
        fleet = self._fleet.fresh()
        memory, cpu = spec.resources.memory_bytes, spec.resources.cpu_milli
        open_rows = fleet.ready & (fleet.memory_free >= memory) & (fleet.cpu_free >= cpu)
        open_rows &= fleet.first if spec.num_gpus == 0 else fleet.free >= spec.num_gpus
        for mask in self._masks_of(spec):
            rows = np.flatnonzero(open_rows & mask)
            if rows.size:
                row = int(rows[np.argmin(_scores(fleet, rows))])
                node_id = fleet.node_ids[row]
                gpus = choose_gpus(fleet, node_id, fleet.classes[row], spec.num_gpus)
                return Placement(node_id, gpus, memory, cpu)
        return None

    def _masks_of(self, spec: Spec) -> tuple[Bools, ...]:
        """One mask a machine type, the preferred first; one in all where any will do."""
        fleet = self._fleet
        if self._version != fleet.version or len(self._masks) > _MASKS_MAX:
            self._masks.clear()
            self._version = fleet.version
        key = (
            spec.machine_type,
            spec.num_gpus,
            spec.gpu_memory_bytes_min,
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
            masks = self._masks[key] = tuple(_mask(fleet, spec, machine_type) for machine_type in types)
        return masks


def _scores(
    fleet: Fleet, rows: np.ndarray[tuple[int], np.dtype[np.intp]]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    mib = np.minimum(fleet.memory_free[rows] >> 20, (1 << _MEMORY_BITS) - 1)
    scores: Ints = (fleet.free[rows] << (_MEMORY_BITS + _ROW_BITS)) + (mib << _ROW_BITS) + rows
    return scores


def score_of(fleet: Fleet, facts: NodeFacts, spec: Spec) -> int:
    """Best fit as one number, lower is better: GPUs left free and then MiB left, 28 bits for the latter."""
    left = len(fleet.free_gpus(facts.node_id)) - spec.num_gpus
    held = fleet.occupancy.get(facts.node_id)
    memory_left = facts.memory_bytes - (held.memory_bytes if held else 0) - spec.resources.memory_bytes
    return (left << _MEMORY_BITS) + min(memory_left >> 20, (1 << _MEMORY_BITS) - 1)


def _mask(fleet: Fleet, spec: Spec, machine_type: str) -> Bools:
    """Rows that could take the spec if nothing else ran there."""
    good_nodes = {facts.node_id: static_refusal(facts, spec) is None for facts in fleet.facts.values()}
    return np.fromiter(
        (
            good_nodes[node_id] and fits_class(kind, spec, machine_type)
            for node_id, kind in zip(fleet.node_ids, fleet.classes, strict=True)
        ),
        np.bool_,
        len(fleet.node_ids),
    )


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
    """Whether GPUs of this model and size will do; always true for a runner without GPUs."""
    if spec.num_gpus == 0:
        return True
    model, memory_bytes = kind
    return model != "" and machine_type in ("", model) and memory_bytes >= spec.gpu_memory_bytes_min


def choose_gpus(fleet: Fleet, node_id: str, kind: GpuClass, count: int) -> tuple[str, ...]:
    """`count` free healthy GPUs of one kind: a set with the most NVLinks inside, the driver's first among equals.

    Greedy from each start, which is exact on the fully connected and paired boards that exist; at most 16 GPUs.
    """
    if count == 0:
        return ()
    held = fleet.occupancy[node_id].gpus if node_id in fleet.occupancy else {}
    free = [
        gpu.id
        for gpu in fleet.facts[node_id].gpus
        if gpu.healthy and gpu.id not in held and (gpu.model, gpu.memory_bytes) == kind
    ]
    links = fleet.nvlinks[node_id]
    if count == len(free):
        return tuple(free)
    if count == 1:  # where it breaks the fewest links between free ones
        return (min(free, key=lambda gpu: sum(links[gpu].get(other, 0) for other in free)),)
    grown = [_grow(start, free, links, count) for start in free]
    best = max(grown, key=lambda found: found[1])[0]
    return tuple(gpu for gpu in free if gpu in best)


def _grow(start: str, free: list[str], links: dict[str, dict[str, int]], count: int) -> tuple[list[str], int]:
    """From one GPU, add the one with the most links to those chosen, until there are `count`."""
    chosen, total = [start], 0
    while len(chosen) < count:
        rest = [gpu for gpu in free if gpu not in chosen]
        gains = [sum(links[gpu].get(have, 0) for have in chosen) for gpu in rest]
        at = gains.index(max(gains))
        chosen.append(rest[at])
        total += gains[at]
    return chosen, total
