"""The fleet as numpy columns: what placement looks at, kept up to date by `State`.

Pure. A row is one (node, GPU model and size); a node with two kinds of GPU has two rows, one without GPUs has one.
Columns that belong to the node (memory, CPU, ready …) are repeated on its rows. Free numbers count every container
that is known to hold something, orphans included. Row order is by node id, so that the row number breaks ties.

Only `State` writes; `place` reads. Must not decide anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fal_scheduler.core.told import Gpu

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(slots=True)
class NodeFacts:
    """What placement may know of one node; `State` rebuilds it when a record or the inventory changes."""

    node_id: str
    ready: bool
    cordoned: bool
    held: bool
    isolates: bool
    driver: str
    pool: str
    labels: Mapping[str, str]
    cpu_milli: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    features: frozenset[str] = frozenset()  # what its driver can do beyond the least
    host_network: bool = False  # its pool allows containers in the node's own network
    driver_version: str = ""  # of the GPU driver; empty without one
    cuda_version: str = ""


@dataclass(slots=True)
class Occupancy:
    """What containers hold on one node."""

    gpus: dict[str, str] = field(default_factory=dict)  # GPU id -> runner id
    shadowed: dict[str, list[str]] = field(default_factory=dict)  # GPU id -> who holds it too, in turn
    memory_bytes: int = 0
    cpu_milli: int = 0


GpuClass = tuple[str, int]  # model, memory in bytes
NO_GPU: GpuClass = ("", 0)


class Fleet:
    """Columns over all rows. `version` rises when rows are made anew or their static facts change."""

    def __init__(self) -> None:
        self.facts: dict[str, NodeFacts] = {}
        self.occupancy: dict[str, Occupancy] = {}
        self.version = 0
        self._stale = True
        self.node_ids: list[str] = []
        self.classes: list[GpuClass] = []
        self.rows_of: dict[str, range] = {}
        self.nvlinks: dict[str, dict[str, dict[str, int]]] = {}  # node -> GPU -> GPU -> how many
        self._allocate(0)

    def _allocate(self, rows: int) -> None:
        self.ready: Bools = np.zeros(rows, np.bool_)  # heard, not held, not cordoned
        self.first: Bools = np.zeros(rows, np.bool_)  # first row of its node: the one for runners without GPUs
        self.healthy: Ints = np.zeros(rows, np.int64)
        self.total: Ints = np.zeros(rows, np.int64)
        self.free: Ints = np.zeros(rows, np.int64)  # healthy and held by nobody
        self.memory_free: Ints = np.zeros(rows, np.int64)
        self.cpu_free: Ints = np.zeros(rows, np.int64)
        self.rank: Ints = np.zeros(rows, np.int64)

    def set_node(self, facts: NodeFacts) -> None:
        """Add a node or replace what is known of it."""
        have = self.facts.get(facts.node_id)
        if have == facts:
            return
        self.facts[facts.node_id] = facts
        same_rows = have is not None and _classes(have.gpus) == _classes(facts.gpus)
        if have is None or not same_rows or _static(have) != _static(facts):
            self.version += 1
        if same_rows and not self._stale:
            self._fill(facts.node_id)
        else:
            self._stale = True

    def drop_node(self, node_id: str) -> None:
        """Forget a node."""
        if self.facts.pop(node_id, None) is not None:
            self.nvlinks.pop(node_id, None)
            self.version += 1
            self._stale = True

    def hold(self, node_id: str, runner_id: str, gpus: tuple[str, ...], memory_bytes: int, cpu_milli: int) -> None:
        """A container holds these. A GPU that somebody holds already stays with the first while that holds it.

        Records of an older store and the containers that really run may name the same GPU.
        """
        held = self.occupancy.setdefault(node_id, Occupancy())
        for gpu in gpus:
            if held.gpus.setdefault(gpu, runner_id) != runner_id:
                held.shadowed.setdefault(gpu, []).append(runner_id)
        held.memory_bytes += memory_bytes
        held.cpu_milli += cpu_milli
        self._refresh(node_id, memory_bytes, cpu_milli)

    def release(self, node_id: str, runner_id: str, gpus: tuple[str, ...], memory_bytes: int, cpu_milli: int) -> None:
        """A container holds these no longer."""
        held = self.occupancy[node_id]
        for gpu in gpus:
            others = held.shadowed.get(gpu, [])
            if held.gpus.get(gpu) != runner_id:
                if runner_id in others:
                    others.remove(runner_id)
            elif others:
                held.gpus[gpu] = others.pop(0)
            else:
                del held.gpus[gpu]
            if gpu in held.shadowed and not others:
                del held.shadowed[gpu]
        held.memory_bytes -= memory_bytes
        held.cpu_milli -= cpu_milli
        self._refresh(node_id, -memory_bytes, -cpu_milli)

    def _refresh(self, node_id: str, memory_bytes: int, cpu_milli: int) -> None:
        if self._stale or node_id not in self.rows_of:
            return
        facts, held = self.facts[node_id], self.occupancy[node_id].gpus
        for row in self.rows_of[node_id]:
            kind = self.classes[row]
            self.free[row] = sum(
                1 for gpu in facts.gpus if (gpu.model, gpu.memory_bytes) == kind and gpu.healthy and gpu.id not in held
            )
            self.memory_free[row] -= memory_bytes
            self.cpu_free[row] -= cpu_milli

    def fresh(self) -> Fleet:
        """The fleet with its rows made anew where nodes came, went or changed their GPUs."""
        if self._stale:
            self._rebuild()
        return self

    def _rebuild(self) -> None:
        self.node_ids, self.classes, self.rows_of = [], [], {}
        for node_id in sorted(self.facts):
            kinds = _classes(self.facts[node_id].gpus)
            self.rows_of[node_id] = range(len(self.node_ids), len(self.node_ids) + len(kinds))
            self.node_ids += [node_id] * len(kinds)
            self.classes += kinds
        self._allocate(len(self.node_ids))
        self.rank = np.arange(len(self.node_ids), dtype=np.int64)
        self._stale = False
        for node_id in self.facts:
            self._fill(node_id)

    def _fill(self, node_id: str) -> None:
        facts = self.facts[node_id]
        self.nvlinks[node_id] = {
            gpu.id: {link.peer_id: link.count for link in gpu.links if link.kind == "NVLINK"} for gpu in facts.gpus
        }
        held = self.occupancy.get(node_id) or Occupancy()
        rows = self.rows_of[node_id]
        for row in rows:
            kind = self.classes[row]
            gpus = [gpu for gpu in facts.gpus if (gpu.model, gpu.memory_bytes) == kind]
            self.ready[row] = facts.ready and not facts.held and not facts.cordoned
            self.first[row] = row == rows.start
            self.total[row] = len(gpus)
            self.healthy[row] = sum(1 for gpu in gpus if gpu.healthy)
            self.free[row] = sum(1 for gpu in gpus if gpu.healthy and gpu.id not in held.gpus)
            self.memory_free[row] = facts.memory_bytes - held.memory_bytes
            self.cpu_free[row] = facts.cpu_milli - held.cpu_milli

    def free_gpus(self, node_id: str) -> tuple[str, ...]:
        """Ids of the node's healthy GPUs that nobody holds, in the driver's order."""
        facts = self.facts.get(node_id)
        if facts is None:
            return ()
        held = self.occupancy[node_id].gpus if node_id in self.occupancy else {}
        return tuple(gpu.id for gpu in facts.gpus if gpu.healthy and gpu.id not in held)


def _classes(gpus: tuple[Gpu, ...]) -> list[GpuClass]:
    """The kinds of GPU of a node, in order of first appearance; one empty kind where there are none."""
    return list(dict.fromkeys((gpu.model, gpu.memory_bytes) for gpu in gpus)) or [NO_GPU]


def _static(facts: NodeFacts) -> tuple[object, ...]:
    """What placement's cached masks depend on."""
    shape = facts.pool, facts.labels, facts.driver, facts.isolates, len(facts.gpus)
    return *shape, facts.features, facts.host_network, facts.driver_version, facts.cuda_version
