"""Why runners go where they go: one verdict a node, counts per reason, the nearest miss.

Pure. The filters and their order are placement's (`FILTERS`); a property test holds that a node is feasible here
exactly where `Placer.place` could choose it. Called for pending runners (at most once a second each) and for
`falctl explain`; costs a few microseconds a node.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fal_scheduler.core.driver_versions import rank
from fal_scheduler.core.fleet import NodeFacts, Occupancy
from fal_scheduler.core.place import score_of, static_refusal
from fal_scheduler.core.records import ModelState, Spec
from fal_scheduler.core.state import Pending, State
from fal_scheduler.core.told import Gpu

FILTERS: Final = (
    "health",
    "cordoned",
    "held",
    "pool",
    "labels",
    "driver",
    "network",
    "images",
    "pack",
    "io-limit",
    "gpu-driver",
    "cuda",
    "gpu-model",
    "gpu-memory",
    "gpu-count",
    "gpu-health",
    "gpu-free",
    "memory",
    "cpu",
)
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Verdict:
    """What placement thinks of one node: feasible with a score, or refused by a filter for a detail.

    `short` is how much it lacks of what the filter counts (GPUs, bytes, thousandths of a core).
    """

    node_id: str
    node_name: str
    filter: str = ""
    detail: str = ""
    short: int = 0
    score: int = 0

    @property
    def feasible(self) -> bool:
        """Whether it could take the runner now."""
        return not self.filter


def explain(state: State, spec: Spec) -> list[Verdict]:
    """A verdict for every node that has a record, in order of name and id."""
    nodes = sorted(state.nodes.values(), key=lambda node: (node.name, node.id))
    return [_verdict(state, state.fleet.facts[node.id], node.name, spec) for node in nodes]


def summarise(verdicts: Iterable[Verdict], spec: Spec) -> Pending:
    """Verdicts as one reason, counts per filter, and the node that came closest."""
    verdicts = list(verdicts)
    refused = Counter(verdict.filter for verdict in verdicts if not verdict.feasible)
    counts = tuple((name, refused[name]) for name in FILTERS if refused[name])
    feasible = len(verdicts) - refused.total()
    if feasible:
        return Pending(f"{feasible} nodes could take it now", feasible, counts)
    if not verdicts:
        return Pending("the cluster has no nodes", nearest_miss="")
    closest = max(verdicts, key=lambda verdict: (FILTERS.index(verdict.filter), -verdict.short))
    return Pending(_reason(verdicts, closest, spec), 0, counts, closest.detail)


def model_awaited(state: State, spec: Spec) -> str:
    """Why a model or LoRA of `spec` keeps runners from being placed; empty when none does.

    One that is registered only does not: its node stages it meanwhile, and starts nothing before it may.
    """
    for name in spec.artifacts:
        model = state.models.get(name)
        kind = "image" if name == spec.image else "model"
        if model is None:
            verb = "add it with `falctl image add`" if kind == "image" else "register it with `falctl weights add`"
            return f"{kind} {name} is not registered; {verb}"
        if model.state is ModelState.REFUSED:
            return f"{kind} {name} is refused: {model.reason}; apply the app with another {kind}"
        if model.state is ModelState.REVOKED:
            return f"{kind} {name} was withdrawn: {model.reason}; apply the app with another {kind}"
        if kind == "image" and model.state is not ModelState.ATTESTED:
            return f"image {name} is not whole yet; `falctl image show` tells what it waits for"
    return ""


def why_pending(state: State, spec: Spec) -> Pending:
    """What an operator reads of a runner that found no node (its models aside: `model_awaited`)."""
    pending = summarise(explain(state, spec), spec)
    models = {gpu.model for facts in state.fleet.facts.values() for gpu in facts.gpus}
    if spec.num_gpus and spec.machine_type and not models.intersection(spec.machine_type):
        wanted = " or ".join(spec.machine_type)
        near = difflib.get_close_matches(spec.machine_type[0], sorted(models), n=1, cutoff=0.3)
        hint = f"; the nearest model is {near[0]}" if near else ""
        return Pending(f"no node has GPU model {wanted}{hint}", 0, pending.refused, pending.nearest_miss)
    return pending


def _reason(verdicts: list[Verdict], closest: Verdict, spec: Spec) -> str:
    """One sentence for all nodes together."""
    if closest.filter == "gpu-count":
        return f"no node has {spec.num_gpus} such GPUs; {closest.detail}"
    if len(verdicts) == 1:
        return f"the only node cannot take it: {closest.detail}"
    counts = Counter(verdict.filter for verdict in verdicts)
    why = ", ".join(f"{counts[name]} {name}" for name in FILTERS if counts[name])
    return f"none of {len(verdicts)} nodes can take it ({why}); closest: {closest.detail}"


def _verdict(state: State, facts: NodeFacts, name: str, spec: Spec) -> Verdict:
    held = state.fleet.occupancy.get(facts.node_id) or Occupancy()
    found = _standing(state, facts, name) or _static(facts, name, spec)
    if found is None and spec.num_gpus:
        found = _gpus(facts, held, name, spec)
    if found is None:
        found = _amounts(facts, held, name, spec)
    if found is None:
        return Verdict(facts.node_id, name, score=score_of(state.fleet, facts, spec))
    return Verdict(facts.node_id, name, *found)


_Refusal = tuple[str, str, int]


def _standing(state: State, facts: NodeFacts, name: str) -> _Refusal | None:
    """Filters about the node as such."""
    if not facts.ready:
        return "health", f"{name} {state.health_of(facts.node_id).text}", 0
    if facts.cordoned:
        reason = state.nodes[facts.node_id].cordon_reason
        return "cordoned", f"{name} is cordoned{': ' + reason if reason else ''}", 0
    if facts.held:
        live = state.live.get(facts.node_id)
        why = state.frozen.get(facts.node_id) or (live.hold_reason if live is not None else "")
        return "held", f"{name} waits for `falctl operator confirm`: {why}", 0
    return None


def _static(facts: NodeFacts, name: str, spec: Spec) -> _Refusal | None:
    """Filters about what the node is."""
    match static_refusal(facts, spec):
        case "pool":
            return "pool", f"{name} is in pool {facts.pool}, not in {', '.join(spec.pools)}", 0
        case "labels":
            missing = [f"{key}={value}" for key, value in spec.labels.items() if facts.labels.get(key) != value]
            return "labels", f"{name} lacks {', '.join(sorted(missing))}", len(missing)
        case "driver":
            return "driver", f"{name} runs plain processes, which cannot use image {spec.image}", 0
        case "network" if spec.network == "host":
            return "network", f"{name} is in pool {facts.pool}, which does not set allow_host_network", 0
        case "network":
            return "network", f"{name} cannot give containers network {spec.network!r} (`falctl node show {name}`)", 0
        case "images":
            return "images", f"{name} cannot run images, only its own system: {_lacks(facts)}", 0
        case "pack":
            return "pack", f"{name} cannot pack images: {_lacks(facts)}", 0
        case "io-limit":
            return "io-limit", f"{name} cannot bound the speed of disks (`falctl node show {name}`)", 0
        case "gpu-driver":
            return _too_old(name, "GPU driver", facts.driver_version, spec.driver_version_min, "gpu-driver")
        case "cuda":
            return _too_old(name, "CUDA", facts.cuda_version, spec.cuda_version_min, "cuda")
    return None


def _too_old(name: str, what: str, version: str, least: str, filter_name: str) -> _Refusal:
    """How far it is from the least that will do, so that the nearest miss is the newest."""
    has = f"{what} {version}" if version else f"no {what}"
    return filter_name, f"{name} has {has}, {least} or newer asked", rank(least) - rank(version)


def _lacks(facts: NodeFacts) -> str:
    """What its driver can do; `falctl node show` tells why it cannot do the rest."""
    return f"its {facts.driver} driver can do {', '.join(sorted(facts.features)) or 'nothing beyond that'}"


def _gpus(facts: NodeFacts, held: Occupancy, name: str, spec: Spec) -> _Refusal | None:
    """Filters about GPUs, by the kind that comes closest."""
    of_model = [gpu for gpu in facts.gpus if not spec.machine_type or gpu.model in spec.machine_type]
    wanted = " or ".join(spec.machine_type) or "GPU"
    if not of_model:
        has = ", ".join(sorted({gpu.model for gpu in facts.gpus})) or "no GPU"
        return "gpu-model", f"{name} has {has}, none of {wanted}", 0
    large = [gpu for gpu in of_model if gpu.memory_bytes >= spec.gpu_memory_bytes_min]
    if not large:
        most = max(gpu.memory_bytes for gpu in of_model)
        lacks = spec.gpu_memory_bytes_min - most
        return (
            "gpu-memory",
            f"{name}'s GPUs have {most / _GIB:.1f} GiB, {spec.gpu_memory_bytes_min / _GIB:.1f} asked",
            lacks,
        )
    kinds: dict[tuple[str, int], list[Gpu]] = {}
    for gpu in large:
        kinds.setdefault((gpu.model, gpu.memory_bytes), []).append(gpu)
    found = [_kind(gpus, held, name, spec.num_gpus) for gpus in kinds.values()]
    if None in found:
        return None
    return max((one for one in found if one is not None), key=lambda one: (FILTERS.index(one[0]), -one[2]))


def _kind(gpus: list[Gpu], held: Occupancy, name: str, count: int) -> _Refusal | None:
    """What one kind of GPU of the node lacks."""
    model = gpus[0].model
    healthy = [gpu for gpu in gpus if gpu.healthy]
    free = sum(1 for gpu in healthy if gpu.id not in held.gpus)
    if len(gpus) < count:
        return "gpu-count", f"{name} has {len(gpus)} {model}, {count} asked", count - len(gpus)
    if len(healthy) < count:
        sick = next(gpu for gpu in gpus if not gpu.healthy)
        why = f"{name} has {len(healthy)} of {len(gpus)} {model} healthy ({sick.id}: {sick.health_reason})"
        return "gpu-health", why, count - len(healthy)
    if free < count:
        return "gpu-free", f"{name} has {free} of {len(gpus)} {model} free, {count} asked", count - free
    return None


def _amounts(facts: NodeFacts, held: Occupancy, name: str, spec: Spec) -> _Refusal | None:
    """Filters about memory and CPU. A node that has free GPUs of one kind only is judged by its node-wide numbers."""
    memory = facts.memory_bytes - held.memory_bytes
    lacks = spec.resources.memory_bytes - memory
    if lacks > 0:
        asked = spec.resources.memory_bytes / _GIB
        return "memory", f"{name} has {memory / _GIB:.1f} GiB of memory free, {asked:.1f} asked", lacks
    cpu = facts.cpu_milli - held.cpu_milli
    lacks = spec.resources.cpu_milli - cpu
    if lacks > 0:
        return "cpu", f"{name} has {cpu / 1000:.1f} cores free, {spec.resources.cpu_milli / 1000:.1f} asked", lacks
    return None
