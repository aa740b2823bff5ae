"""The smallest changes that would give a runner a place. Pure. Called by explanations, never by placement.

Every change is checked by placement's own filters on the node as it would be then; what does not admit is not told. The
order is by what it disturbs: nothing (a setting of a node or quota), the app's own wishes, other runners, new hardware;
then by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from fal_contract.ids import team_of
from fal_scheduler.core import quotas
from fal_scheduler.core.explain import explain, takes_if, takes_without
from fal_scheduler.core.fleet import NodeFacts, Occupancy
from fal_scheduler.core.ranking import Ask
from fal_scheduler.core.records import Goal, Runner, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.waiting import reserved_for_others

CHANGES_TOLD_MAX: Final = 5
NODES_LOOKED_AT_MAX: Final = 500
SETTING: Final = 0
ASK_LESS: Final = 1
OTHERS: Final = 2
HARDWARE: Final = 3
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Admission:
    """One change. `disturbs`: what it touches, the least first; `size`: how much of it; `command`: how to do it."""

    text: str
    disturbs: int
    size: int
    command: str = ""
    node_id: str = ""
    stops: tuple[str, ...] = ()
    spec: Spec | None = None  # where the app must ask for something else

    @property
    def order(self) -> tuple[int, int, str]:
        """The smallest first."""
        return self.disturbs, self.size, self.text


def smallest_changes(state: State, app_id: str, spec: Spec) -> tuple[Admission, ...]:
    """Up to CHANGES_TOLD_MAX, the smallest first; empty where it has a place now, or nothing small helps."""
    ask = Ask(app_id, team_of(app_id), avoid=reserved_for_others(state, app_id))
    verdicts = explain(state, spec, ask)
    fits = any(verdict.feasible for verdict in verdicts)
    refusal = quotas.refusal(state, team_of(app_id), spec)
    if refusal:
        return (_quota(state, app_id, spec),) if fits else ()
    if fits:
        return ()
    found: dict[str, Admission] = {}
    for verdict in verdicts[:NODES_LOOKED_AT_MAX]:
        facts = state.fleet.facts[verdict.node_id]
        for change in _of_node(state, facts, verdict.node_name, verdict.filter, spec, ask):
            found.setdefault(change.text, change)
    for change in _of_types(state, spec, ask):
        found.setdefault(change.text, change)
    found.setdefault("node", _one_more(spec))
    return tuple(sorted(found.values(), key=lambda change: change.order)[:CHANGES_TOLD_MAX])


def _quota(state: State, app_id: str, spec: Spec) -> Admission:
    team = team_of(app_id)
    needed = state.held_milli.get(team, 0) + quotas.milli_of(spec)
    more = needed - state.quotas[team].gpu_milli
    gpus = f"{needed / 1000:g}"
    return Admission(
        f"raise the quota of team {team} to {gpus} GPUs", SETTING, more, f"falctl quota set {team} --gpus {gpus}"
    )


def _of_node(state: State, facts: NodeFacts, name: str, filter_name: str, spec: Spec, ask: Ask) -> Iterator[Admission]:
    """What would make one node take it, by what refuses it there first."""
    match filter_name:
        case "cordoned" if takes_if(state, replace(facts, cordoned=False), spec, ask):
            yield Admission(f"uncordon {name}", SETTING, 0, f"falctl node uncordon {name}", facts.node_id)
        case "labels":
            labels = {key: value for key, value in spec.labels.items() if facts.labels.get(key) != value}
            if takes_if(state, replace(facts, labels={**facts.labels, **labels}), spec, ask):
                words = " ".join(f"{key}={value}" for key, value in sorted(labels.items()))
                yield Admission(
                    f"label {name} {words}", SETTING, len(labels), f"falctl node label {name} {words}", facts.node_id
                )
        case "gpu-health":
            sick = [gpu for gpu in facts.gpus if not gpu.healthy]
            mended = replace(facts, gpus=tuple(replace(gpu, healthy=True) for gpu in facts.gpus))
            if sick and takes_if(state, mended, spec, ask):
                yield Admission(
                    f"release {len(sick)} quarantined GPUs of {name} ({sick[0].health_reason})", SETTING, len(sick),
                    f"falctl gpu release {name} {sick[0].id}", facts.node_id,
                )  # fmt: skip
        case "memory" | "cpu":
            yield from _less(state, facts, name, spec, ask)
            yield from _stops(state, facts, name, spec, ask)
        case "gpu-free" | "gpu-share" | "gpu-topology" | "anti-affinity":
            yield from _stops(state, facts, name, spec, ask)


def _less(state: State, facts: NodeFacts, name: str, spec: Spec, ask: Ask) -> Iterator[Admission]:
    """Ask for as much memory and CPU as is free there."""
    held = state.fleet.occupancy.get(facts.node_id) or Occupancy()
    memory, cpu = facts.memory_bytes - held.memory_bytes, facts.cpu_milli - held.cpu_milli
    asked = spec.resources
    less = replace(asked, memory_bytes=min(asked.memory_bytes, memory), cpu_milli=min(asked.cpu_milli, cpu))
    if less.memory_bytes <= 0 or less.cpu_milli < 0 or (asked.cpu_milli and not less.cpu_milli):
        return
    smaller = replace(spec, resources=less)
    if not takes_if(state, facts, smaller, ask):
        return
    words = []
    if less.memory_bytes != asked.memory_bytes:
        words.append(f"memory_gib from {asked.memory_bytes / _GIB:.1f} to {less.memory_bytes / _GIB:.1f}")
    if less.cpu_milli != asked.cpu_milli:
        words.append(f"cpu from {asked.cpu_milli / 1000:g} to {less.cpu_milli / 1000:g}")
    size = (asked.memory_bytes - less.memory_bytes) // (1 << 20) + asked.cpu_milli - less.cpu_milli
    yield Admission(
        f"lower {' and '.join(words)} for {name}", ASK_LESS, size, "falctl app apply", facts.node_id, (), smaller
    )


def _stops(state: State, facts: NodeFacts, name: str, spec: Spec, ask: Ask) -> Iterator[Admission]:
    """End as few runners there as will do: those of the lowest priority, of the largest holdings, the youngest."""
    mine = (state.runners[id_] for id_ in state.runners_by_node.get(facts.node_id, ()))
    others = [one for one in mine if one.goal is Goal.RUN and one.app != ask.app]
    others.sort(key=lambda one: (one.priority, -quotas.held_by(one), -one.created_at_s, one.id))
    for one in others:
        if takes_without(state, facts.node_id, spec, ask, (one.id,)):
            yield _stop(name, facts, (one,))
            return
    gone: list[Runner] = []
    for one in others:
        gone.append(one)
        if takes_without(state, facts.node_id, spec, ask, tuple(runner.id for runner in gone)):
            yield _stop(name, facts, tuple(gone))
            return


def _stop(name: str, facts: NodeFacts, gone: tuple[Runner, ...]) -> Admission:
    first = gone[0]
    rest = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    text = f"end {first.id} (priority {first.priority}){rest} on {name}"
    size = sum(1000 + max(0, 100 + one.priority) for one in gone)
    return Admission(text, OTHERS, size, f"falctl runner stop {first.id}", facts.node_id, tuple(one.id for one in gone))


def _of_types(state: State, spec: Spec, ask: Ask) -> Iterator[Admission]:
    """Take another GPU model that is there."""
    if not spec.num_gpus or not spec.machine_type:
        return
    models = sorted({gpu.model for facts in state.fleet.facts.values() for gpu in facts.gpus if not gpu.mig_profile})
    for model in models:
        other = replace(spec, machine_type=(*spec.machine_type, model))
        if model not in spec.machine_type and any(verdict.feasible for verdict in explain(state, other, ask)):
            yield Admission(f"add {model} to machine_type", ASK_LESS, 1 << 20, "falctl app apply", spec=other)


def _one_more(spec: Spec) -> Admission:
    what = " or ".join(spec.machine_type) or "any"
    gpus = f" with {spec.num_gpus} × {what} GPU" if spec.num_gpus else ""
    pools = f" to pool {' or '.join(spec.pools)}" if spec.pools else ""
    return Admission(f"add a node{gpus}{pools}", HARDWARE, spec.num_gpus, "falctl node token create")


__all__ = ["Admission", "smallest_changes"]
