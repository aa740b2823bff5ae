"""What it is worth to have an app's artifacts in memory, on disk, or staged ahead, and where. Pure; reads the State.

Arrivals of an app fall on the nodes that could take its next runner, the best of them first: those with room now, then
those that would be ready first. Each is believed to get half as many starts as the one before. What memory saves is
the learnt difference of a start from disk and from memory, else the time to read the bytes from disk. What a copy on
disk saves is the time to bring it again; its app's arrivals are shared by the nodes that have it.

Called by `cache_warmth` (leader-local, nothing of it is stored) with columns that are fresh. Must change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final
from zlib import crc32

import numpy as np

from fal_contract.ids import team_of
from fal_contract.limits import STAGE_AHEAD_HORIZON_MAX_S, WARM_APPS_MAX, WARM_NODES_PER_APP_MAX
from fal_contract.origin_source import origin_source
from fal_scheduler.core.forecast import BRING_BACK_MS, foretold_runners
from fal_scheduler.core.keep_warm import value
from fal_scheduler.core.place import Ask, Placer
from fal_scheduler.core.ready_at import ASSUMED_BYTES_S, NEVER_MS, PEERS_AT_ONCE_MAX, ready_ms
from fal_scheduler.core.ready_columns import Columns
from fal_scheduler.core.ready_needs import artifact_of, needed
from fal_scheduler.core.ready_views import DISK, LOADED_FROM, MEMORY, OneNode
from fal_scheduler.core.records import Model, ModelState, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.warm_tiers import STAGE_WORTH, Keepable

DISK_BYTES_S: Final = 1_000_000_000  # where nobody has measured a node's disk
EQUAL_PERC: Final = 15  # as placement: times within that of the best, or EQUAL_MS, count as equal
EQUAL_MS: Final = 1000
_MS: Final = 1000
_STAGED: Final = (ModelState.REGISTERED, ModelState.ATTESTED)


@dataclass(frozen=True, slots=True)
class Asked:
    """An app that is asked for. Rates: millionths of a request per minute, of late and at a time to come."""

    app_id: str
    spec: Spec
    models: tuple[Model, ...]
    rate: int


@dataclass(frozen=True, slots=True)
class Suited:
    """Nodes that could take an app's next runner, the best first. `copies`: on how many of them it should be staged."""

    node_ids: tuple[str, ...]
    copies: int = 0


def asked_for(state: State, wall_s: float) -> list[Asked]:
    """Apps with arrivals and models, those asked for most first."""
    found: list[Asked] = []
    for app_id, arrivals in state.demand.arrivals.items():
        app = state.apps.get(app_id)
        if app is None or app.deleting:
            continue
        back_s = state.demand.bring_back_ms.get(app_id, BRING_BACK_MS) / _MS
        now = arrivals.as_of(wall_s)
        rate = max(now.rate, now.rate_at(wall_s + back_s))
        if rate <= 0:
            continue
        spec = state.revision_of(app).spec
        models = tuple(model for model in needed(state, spec) if model.state in _STAGED)
        if models:
            found.append(Asked(app_id, spec, models, rate))
    return sorted(found, key=lambda one: (-one.rate, one.app_id))[:WARM_APPS_MAX]


def suited_nodes(state: State, placer: Placer, one: Asked, wall_s: float) -> Suited:
    """Where the next runners of an app would go, and how many the forecast expects before one could be brought."""
    fleet = state.fleet
    kinds, open_now = placer.suited(one.spec, Ask(one.app_id, team_of(one.app_id)))
    rows = np.flatnonzero(kinds)
    if not rows.size:
        return Suited(())
    times = ready_ms(state, one.spec, fleet.node_ids, app=one.app_id)[rows]
    best_ms = int(times.min())
    classes = (times - best_ms) // max(EQUAL_MS, best_ms * EQUAL_PERC // 100)
    turn = (rows - crc32(one.app_id.encode())) % len(fleet.node_ids)  # equal nodes: others for other apps
    order = rows[np.lexsort((turn, classes, ~open_now[rows]))]
    ids = dict.fromkeys(fleet.node_ids[row] for row in order[: 8 * WARM_NODES_PER_APP_MAX].tolist())
    nodes = tuple(ids)[:WARM_NODES_PER_APP_MAX]
    at = int(times[rows == order[0]][0])
    return Suited(nodes, _copies(state, one, at, wall_s))


def _copies(state: State, one: Asked, best_ms: int, wall_s: float) -> int:
    """Runners that the forecast expects within the time that a start takes, beyond those that are there."""
    demand, app = state.demand, state.apps[one.app_id]
    if best_ms >= NEVER_MS:
        return 0
    back_ms = max(best_ms, demand.bring_back_ms.get(one.app_id, BRING_BACK_MS))
    back_ms = min(back_ms, int(STAGE_AHEAD_HORIZON_MAX_S) * _MS)
    rate = demand.arrivals[one.app_id].as_of(wall_s).rate_at(wall_s + back_ms / _MS)
    multiplexing = state.scaling_of(app).max_multiplexing
    expected = foretold_runners(rate, back_ms, demand.request_ms(one.app_id), multiplexing, STAGE_WORTH)
    there = len(state.runners_by_app.get(one.app_id, ()))
    return min(max(0, expected - there), WARM_NODES_PER_APP_MAX)


def memory_saves_ms(columns: Columns, node_id: str, one: Asked, model: Model) -> int:
    """Milliseconds that a start on this node is shorter where this artifact is in memory instead of on disk."""
    state, view = columns.state, OneNode(columns, columns.row_of[node_id])
    gpus = one.spec.num_gpus > 0
    gpu, total = view.gpu if gpus else "", max(1, sum(other.bytes for other in one.models))
    known = [state.learning.known(f"setup/{LOADED_FROM[tier]}/{gpu}") for tier in (DISK, MEMORY)]
    if all(known):
        app = f"app/{one.app_id}"
        slow, fast = (int(view.by_gpu("setup", total >> 10, app, gpus, tier)) for tier in (DISK, MEMORY))
        return max(0, slow - fast) * model.bytes // total
    facts = state.cache_facts.nodes.get(node_id)
    rate = facts.rates.get("disk", 0) if facts is not None else 0
    return model.bytes * _MS // (rate or DISK_BYTES_S)


class MemoryWorth:
    """What each node's memory could keep, gathered app by app. `found`: node -> artifact."""

    def __init__(self, kept: Mapping[str, Iterable[str]]) -> None:
        self.found: dict[str, dict[str, Keepable]] = {}
        self._kept: dict[str, list[str]] = {}  # artifact -> nodes that keep it now
        for node_id, artifacts in kept.items():
            for artifact in artifacts:
                self._kept.setdefault(artifact, []).append(node_id)

    def add(self, columns: Columns, one: Asked, suited: Suited) -> None:
        """An app's arrivals, on the nodes where its next runners would go and on those that keep what it uses."""
        facts = columns.state.cache_facts
        for model in one.models:
            artifact = artifact_of(model)
            holders = facts.holders.get(artifact, {})
            rates = {node_id: one.rate >> at for at, node_id in enumerate(suited.node_ids)}
            for node_id in self._kept.get(artifact, ()):
                rates.setdefault(node_id, one.rate >> len(suited.node_ids))
            for node_id, rate in rates.items():
                fact = holders.get(node_id)
                if fact is None or not fact.ready or node_id not in columns.row_of:
                    continue
                there = self.found.setdefault(node_id, {})
                worth = rate * memory_saves_ms(columns, node_id, one, model)
                have = there.get(artifact)
                there[artifact] = Keepable(artifact, model.bytes, worth + (have.worth if have is not None else 0))


def bring_back_ms(columns: Columns, model: Model, node_ids: Iterable[str]) -> dict[str, int]:
    """Milliseconds to fetch all of an artifact again for each of these nodes, from the origin and who else has it."""
    rows = [columns.row_of[node_id] for node_id in node_ids if node_id in columns.row_of]
    origin = np.maximum(columns.origin(origin_source(model.resolved_uri or model.uri))[rows], 0)
    have = columns.artifact(artifact_of(model))
    others = np.clip(columns.holders(have)[columns.pool[rows]] - have.known[rows], 0, PEERS_AT_ONCE_MAX)
    supply = origin + others * np.maximum(columns.peer()[rows], 0)
    supply = np.where(supply > 0, supply, ASSUMED_BYTES_S)
    times = model.bytes * _MS // supply
    return {columns.node_ids[row]: int(ms) for row, ms in zip(rows, times.tolist(), strict=True)}


def rates_of(asked: Iterable[Asked]) -> dict[str, tuple[Model, int]]:
    """For each artifact that apps use: its model and the arrivals of all these apps."""
    found: dict[str, tuple[Model, int]] = {}
    for one in asked:
        for model in one.models:
            _, rate = found.get(artifact_of(model), (model, 0))
            found[artifact_of(model)] = model, rate + one.rate
    return found


def artifact_values(columns: Columns, model: Model, rate: int) -> dict[str, int]:
    """Of one artifact, for each node that has it: milliseconds saved by hour and GiB (`ArtifactValues`).

    To a power of two, so that it is seldom another.
    """
    facts = columns.state.cache_facts.holders.get(artifact_of(model), {})
    holders = [node_id for node_id, fact in facts.items() if fact.ready]
    share = rate // max(1, len(holders))
    by_node = bring_back_ms(columns, model, holders)
    return {node_id: rounded(value(share, ms, model.bytes) * 60 // 1_000_000) for node_id, ms in by_node.items()}


def rounded(number: int) -> int:
    """The power of two below, or 0."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0


__all__ = [
    "Asked", "MemoryWorth", "Suited", "artifact_values", "asked_for", "bring_back_ms", "memory_saves_ms", "rates_of",
    "rounded", "suited_nodes",
]  # fmt: skip
