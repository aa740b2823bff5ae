"""Why runners go where they go: one verdict a node, counts per reason, the nearest miss.

Pure. The filters and their order are placement's (`FILTERS`); a property test holds that a node is feasible here
exactly where `Placer.place` could choose it. Called for pending runners (at most once a second each) and for
`falctl explain`; costs a few microseconds a node.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from fal_scheduler.core.driver_versions import rank
from fal_scheduler.core.fleet import NOBODY, GpuClass, NodeFacts, Occupancy, kind_of, number_of, share_of
from fal_scheduler.core.place import Placer, is_model, is_profile, memory_of, static_refusal
from fal_scheduler.core.ranking import ANYBODY, Ask, FragmentsFn, ReadyFn
from fal_scheduler.core.records import ModelState, Spec
from fal_scheduler.core.state import Pending, State
from fal_scheduler.core.told import Gpu

FILTERS: Final = (
    "health",
    "cordoned",
    "held",
    "avoided",
    "pool",
    "labels",
    "driver",
    "network",
    "images",
    "pack",
    "io-limit",
    "gpu-driver",
    "cuda",
    "affinity",
    "anti-affinity",
    "gpu-model",
    "mig",
    "gpu-memory",
    "gpu-count",
    "gpu-health",
    "gpu-free",
    "gpu-share",
    "gpu-topology",
    "memory",
    "cpu",
)
# What a node may not refuse any more when runners on it have stopped.
FREED_BY_STOPPING: Final = frozenset({"anti-affinity", "gpu-free", "gpu-share", "gpu-topology", "memory", "cpu"})
_GIB: Final = 1 << 30
_JOINED: Final = {"nvlink": "joined by NVLink", "pcie": "under one PCIe switch", "numa": "in one NUMA node"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What placement thinks of one node: feasible with a score, or refused by a filter for a detail.

    `short` is how much it lacks of what the filter counts (GPUs, bytes, thousandths of a core or of a GPU). `score`:
    how many nodes are better; 0 is where the next runner would go. `why`: the terms by which it is (`Ranking.why`).
    """

    node_id: str
    node_name: str
    filter: str = ""
    detail: str = ""
    short: int = 0
    score: int = 0
    why: tuple[tuple[str, int], ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether it could take the runner now."""
        return not self.filter


def explain(
    state: State, spec: Spec, ask: Ask = ANYBODY, ready: ReadyFn | None = None, fragments: FragmentsFn | None = None
) -> list[Verdict]:
    """A verdict for every node that has a record, in order of name and id. `ask`: who would get the runner."""
    nodes = sorted(state.nodes.values(), key=lambda node: (node.name, node.id))
    found = [_verdict(state, state.fleet.facts[node.id], node.name, spec, ask) for node in nodes]
    if not any(verdict.feasible for verdict in found):
        return found
    ranked = Placer(state.fleet).rank(spec, ask, ready, fragments)
    places = {node_id: place for place, node_id in enumerate(ranked)}
    return [
        replace(verdict, score=places[verdict.node_id], why=ranked[verdict.node_id]) if verdict.feasible else verdict
        for verdict in found
    ]


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


def why_pending(state: State, spec: Spec, ask: Ask = ANYBODY) -> Pending:
    """What an operator reads of a runner that found no node (its models aside: `model_awaited`)."""
    pending = summarise(explain(state, spec, ask), spec)
    kinds = {kind_of(gpu): None for facts in state.fleet.facts.values() for gpu in facts.gpus}
    models = {kind[0] for kind in kinds}
    if spec.num_gpus and spec.machine_type and not any(_of_model(kind, spec) for kind in kinds):
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


def takes(state: State, node_id: str, spec: Spec, ask: Ask) -> bool:
    """Whether one node could take a runner of `spec` now."""
    facts = state.fleet.facts.get(node_id)
    return facts is not None and _verdict(state, facts, facts.node_id, spec, ask).feasible


def takes_if(state: State, facts: NodeFacts, spec: Spec, ask: Ask) -> bool:
    """Whether a node could take it if it were as `facts` say."""
    return _verdict(state, facts, facts.node_id, spec, ask).feasible


def takes_without(state: State, node_id: str, spec: Spec, ask: Ask, gone: tuple[str, ...]) -> bool:
    """Whether it could if the runners `gone`, which are on it, were not."""
    facts, held = state.fleet.facts.get(node_id), state.fleet.occupancy.get(node_id)
    if facts is None or held is None:
        return False
    stay = {gpu: {id_: milli for id_, milli in by.items() if id_ not in gone} for gpu, by in held.holders.items()}
    holders = {gpu: by for gpu, by in stay.items() if by}
    rest = Occupancy(holders, dict(held.apps), held.memory_bytes, held.cpu_milli)
    for runner_id in gone:
        runner = state.runners[runner_id]
        rest.memory_bytes -= runner.memory_bytes
        rest.cpu_milli -= runner.cpu_milli
        for app in runner.apps:
            rest.apps[app] -= 1
    rest.apps = {app: count for app, count in rest.apps.items() if count > 0}
    return _verdict(state, facts, facts.node_id, spec, ask, rest).feasible


def _verdict(state: State, facts: NodeFacts, name: str, spec: Spec, ask: Ask, held: Occupancy | None = None) -> Verdict:
    """What placement thinks of one node, or would if it held only `held`."""
    held = held or state.fleet.occupancy.get(facts.node_id) or Occupancy()
    found = _standing(state, facts, name) or (_avoided(name) if facts.node_id in ask.avoid else None)
    found = found or _static(facts, name, spec) or _company(held, name, spec)
    if found is None and spec.num_gpus:
        found = _gpus(state, facts, held, name, spec, ask.team)
    if found is None:
        found = _amounts(facts, held, name, spec)
    return Verdict(facts.node_id, name, *(found or ()))


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


def _avoided(name: str) -> _Refusal:
    return "avoided", f"{name} is kept free for another app, or is what the runner is to get away from", 0


def _company(held: Occupancy, name: str, spec: Spec) -> _Refusal | None:
    """Filters about the apps that run there."""
    rules = spec.placement
    if rules.affinity and not any(app in held.apps for app in rules.affinity):
        return "affinity", f"{name} runs none of {', '.join(rules.affinity)}", 0
    there = [app for app in rules.anti_affinity if app in held.apps]
    if there:
        return "anti-affinity", f"{name} runs {', '.join(there)}", len(there)
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


def _of_model(kind: GpuClass, spec: Spec) -> bool:
    return any(is_model(kind, machine_type) for machine_type in spec.machine_type or ("",))


def _gpus(state: State, facts: NodeFacts, held: Occupancy, name: str, spec: Spec, team: str) -> _Refusal | None:
    """Filters about GPUs, by the kind that comes closest."""
    kinds: dict[GpuClass, list[Gpu]] = {}
    for gpu in facts.gpus:
        if _of_model(kind_of(gpu), spec):
            kinds.setdefault(kind_of(gpu), []).append(gpu)
    if not kinds:
        has = ", ".join(sorted({gpu.model for gpu in facts.gpus})) or "no GPU"
        return "gpu-model", f"{name} has {has}, none of {' or '.join(spec.machine_type) or 'GPU'}", 0
    split = {kind: gpus for kind, gpus in kinds.items() if is_profile(kind, spec)}
    if not split:
        has = ", ".join(dict.fromkeys(kind[2] or "whole GPUs" for kind in kinds))
        return "mig", f"{name} has {has}, asked are {spec.mig_profile or 'whole GPUs'}", 0
    large = {kind: gpus for kind, gpus in split.items() if memory_of(kind, spec) >= spec.gpu_memory_bytes_min}
    if not large:
        most = max(memory_of(kind, spec) for kind in split)
        share = f"{spec.gpu_milli / 1000:g} of {name}'s GPUs has" if spec.fractional else f"{name}'s GPUs have"
        return (
            "gpu-memory",
            f"{share} {most / _GIB:.1f} GiB, {spec.gpu_memory_bytes_min / _GIB:.1f} asked",
            spec.gpu_memory_bytes_min - most,
        )
    found = [_kind(state, facts.node_id, kind, gpus, held, name, spec, team) for kind, gpus in large.items()]
    if None in found:
        return None
    return max((one for one in found if one is not None), key=lambda one: (FILTERS.index(one[0]), -one[2]))


def _kind(
    state: State, node_id: str, kind: GpuClass, gpus: list[Gpu], held: Occupancy, name: str, spec: Spec, team: str
) -> _Refusal | None:
    """What one kind of GPU of the node lacks."""
    model, count = kind[0], spec.num_gpus
    healthy = [gpu for gpu in gpus if gpu.healthy]
    if len(gpus) < count:
        return "gpu-count", f"{name} has {len(gpus)} {model}, {count} asked", count - len(gpus)
    if len(healthy) < count:
        sick = next(gpu for gpu in gpus if not gpu.healthy)
        why = f"{name} has {len(healthy)} of {len(gpus)} {model} healthy ({sick.id}: {sick.health_reason})"
        return "gpu-health", why, count - len(healthy)
    if spec.fractional:
        return _share(healthy, held, name, spec, team)
    free = [at for at, gpu in enumerate(gpus) if gpu.healthy and gpu.id not in held.holders]
    if len(free) < count:
        return "gpu-free", f"{name} has {len(free)} of {len(gpus)} {model} free, {count} asked", count - len(free)
    rule = spec.placement.gpu_topology if count > 1 else ""
    if rule:
        fleet = state.fleet.fresh()
        row = next(row for row in fleet.rows_of[node_id] if fleet.classes[row] == kind)
        if fleet.boards[row].choose(free, count, rule) is None:
            why = f"{name} has {len(free)} of {len(gpus)} {model} free, but no {count} of them {_JOINED[rule]}"
            return "gpu-topology", why, 0
    return None


def _share(healthy: list[Gpu], held: Occupancy, name: str, spec: Spec, team: str) -> _Refusal | None:
    """What a node lacks to give a fraction of one GPU, by the one with most left."""
    ours = (NOBODY, number_of(team))
    most = max((share for share, whose in (share_of(gpu, held) for gpu in healthy) if whose in ours), default=0)
    if most >= spec.gpu_milli:
        return None
    asked = f"{spec.gpu_milli / 1000:g} asked; only runners of one team share"
    return (
        "gpu-share",
        f"{name} has at most {most / 1000:g} of a GPU left for this team, {asked}",
        spec.gpu_milli - most,
    )


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
