"""The rules that never break (design, section 5), checked on the proposed state before its commit.

Pure. `check` looks at what a batch touched and costs a few microseconds a change; `audit` looks at everything, in
slices. Both recompute from the records themselves and do not trust the indexes that placement uses. A violation
names the objects to be frozen. Called by `step` and by the engine; changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from fal_contract.ids import team_of
from fal_scheduler.core.bindings import same_engine, shared
from fal_scheduler.core.fleet import WHOLE
from fal_scheduler.core.gpu_faults import as_placed
from fal_scheduler.core.records import App, Change, Goal, Meta, Record, Revision, Runner
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health, Hold, NodeLive


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule and the ids of the objects that broke it."""

    rule: str
    message: str
    subjects: tuple[str, ...]


def check(state: State, changes: Sequence[Change]) -> list[Violation]:
    """Rules about the changes themselves, and about every object and node that they touch."""
    found: list[Violation] = []
    placed: dict[str, dict[str, None]] = {}  # by node
    for change in changes:
        before, after = change.before, change.after
        found += _transition(before, after)
        if isinstance(after, Runner):
            # A record that changed twice in a batch is judged by what it came to.
            if state.runners.get(after.id) is after:
                found += _runner(state, after)
                if after.assignment is not None and after.assignment.term > state.term:
                    found.append(_violation("term", f"{after.id} is assigned in a term to come", after.id))
            if after.node and not (isinstance(before, Runner) and before.node):
                placed.setdefault(after.node, {})[after.id] = None
        elif isinstance(after, App):
            if state.apps.get(after.id) is after:
                found += _app(state, after)
        elif isinstance(before, Revision) and after is None:
            found += _revision_gone(state, before)
    for node_id, runner_ids in placed.items():
        found += _node(state, node_id, runner_ids)
    return found


def audit(state: State) -> Iterator[list[Violation]]:
    """All rules over everything, a slice at a time: advance it between other work."""
    for runner_ids in _slices(state.runners):
        yield [found for id_ in runner_ids if id_ in state.runners for found in _runner(state, state.runners[id_])]
    for app_ids in _slices(state.apps):
        yield [found for id_ in app_ids if id_ in state.apps for found in _app(state, state.apps[id_])]
    for node_ids in _slices(state.runners_by_node):
        yield [found for id_ in node_ids for found in _node(state, id_, state.runners_by_node.get(id_, {}), told=False)]


def _slices(keys: Iterable[str], size: int = 100) -> Iterator[list[str]]:
    rest = iter(list(keys))
    while part := list(islice(rest, size)):
        yield part


def _violation(rule: str, message: str, *subjects: str) -> Violation:
    return Violation(rule, message, subjects)


def _transition(before: Record | None, after: Record | None) -> list[Violation]:
    """What one record may become."""
    match before, after:
        case Runner(), Runner():
            return _runner_transition(before, after)
        case Revision(), Revision():
            return [_violation("revision-immutable", f"revision {after.number} of {after.app} changed", after.app)]
        case App(), App() if after.generation < before.generation + (after.revision != before.revision):
            return [
                _violation("app-forward", f"the generation of {after.id} fell, or its revision changed in it", after.id)
            ]
        case Meta(), Meta() if after.epoch < before.epoch or after.cluster_id != before.cluster_id:
            return [_violation("meta-forward", "the cluster's epoch or id went back", "meta")]
    return []


def _runner_transition(before: Runner, after: Runner) -> list[Violation]:
    found: list[Violation] = []
    if after.goal < before.goal:
        found.append(_violation("goal-forward", f"{after.id}: {before.goal.name} → {after.goal.name}", after.id))
    moved = before.bindings != after.bindings and (not shared(after) or after.goal is not Goal.RUN)
    if moved or before.share_group != after.share_group:
        found.append(_violation("bindings-fixed", f"{after.id} serves another app or revision", after.id))
    old, new = before.assignment, after.assignment
    if old is not None and new is not None:
        if new.term < old.term:
            found.append(_violation("term", f"the term of {after.id}'s assignment fell", after.id))
        # Its node must be told through the end of one assignment before another begins.
        if old.id == new.id and (before.node, before.gpus) != (after.node, after.gpus):
            found.append(_violation("assignment-fixed", f"{after.id} moved under one assignment", after.id))
        if old.id != new.id:
            found.append(_violation("assignment-once", f"{after.id} was assigned again while assigned", after.id))
    return found


def _runner(state: State, runner: Runner) -> list[Violation]:
    found: list[Violation] = []
    if (runner.assignment is None) != (runner.node == ""):
        found.append(_violation("assignment", f"{runner.id} has a node or an assignment, not both", runner.id))
    if not runner.node and (runner.gpus or runner.memory_bytes or runner.cpu_milli):
        found.append(_violation("reservation", f"{runner.id} holds something on no node", runner.id))
    if runner.assignment is not None:
        sharing = state.runners_by_assignment[runner.assignment.id]
        if len(sharing) > 1:
            found.append(_violation("assignment-unique", f"assignment {runner.assignment.id} is shared", *sharing))
    found += _bindings(state, runner)
    if runner.goal in (Goal.RUN, Goal.DRAIN) and (runner.app, runner.revision) not in state.revisions:
        found.append(_violation("reference", f"{runner.id} serves a revision that is not there", runner.id))
    elif runner.goal is Goal.RUN and runner.app not in state.apps:
        found.append(_violation("reference", f"{runner.id} serves an app that is not there", runner.id))
    return found


def _bindings(state: State, runner: Runner) -> list[Violation]:
    """Apps that share a runner are of its team and share group, of one engine; what each needs is to be loaded."""
    if len(runner.bindings) <= 1:
        return [] if runner.bindings else [_violation("bindings", f"{runner.id} serves no app", runner.id)]
    found: list[Violation] = []
    if len(runner.apps) != len(runner.bindings):
        found.append(_violation("bindings", f"{runner.id} serves an app twice", runner.id))
    if any(team_of(app_id) != team_of(runner.id) for app_id in runner.apps):
        found.append(_violation("share-team", f"{runner.id} serves apps of several teams", runner.id))
    keys = [(one.app, one.revision) for one in runner.bindings]
    specs = [state.revisions[key].spec for key in keys if key in state.revisions]
    if any(spec.share_group != runner.share_group or not same_engine(specs[0], spec) for spec in specs):
        found.append(_violation("share-engine", f"{runner.id} serves apps of several engines or groups", runner.id))
    if len(specs) < len(keys) and runner.goal is Goal.RUN:
        found.append(_violation("reference", f"{runner.id} serves a revision that is not there", runner.id))
    ids = [one.id for one in runner.residencies]
    if any(one.residency and one.residency not in ids for one in runner.bindings):
        found.append(_violation("residency", f"{runner.id} serves an app whose model it is not to load", runner.id))
    return found


def _app(state: State, app: App) -> list[Violation]:
    revision = state.revisions.get((app.id, app.revision))
    if revision is None:
        return [_violation("reference", f"revision {app.revision} of {app.id} is not there", app.id)]
    named = (revision.spec.model, *revision.spec.loras) if revision.spec.model else revision.spec.loras
    missing = [model for model in named if model not in state.models]
    if missing:
        return [_violation("reference", f"{app.id} names {', '.join(missing)}, not registered", app.id)]
    return []


def _revision_gone(state: State, revision: Revision) -> list[Violation]:
    used = [id_ for id_ in state.runners_by_app.get(revision.app, ()) if state.runners[id_].goal is Goal.RUN]
    if any(state.runners[id_].revision_for(revision.app) == revision.number for id_ in used):
        return [_violation("reference", f"a revision of {revision.app} went while runners serve it", revision.app)]
    return []


@dataclass(frozen=True, slots=True)
class Holding:
    """What one container holds on a node; `gpu_milli`: thousandths of each GPU, 0: all."""

    runner_id: str
    gpus: tuple[str, ...]
    memory_bytes: int
    cpu_milli: int
    gpu_milli: int


def _node(state: State, node_id: str, placed: Collection[str], *, told: bool = True) -> list[Violation]:
    """What was just placed on a node may be there, exists there, is promised to nobody else, and fits.

    Orphans count where `told`. Conflicts among what the node itself tells are its reality, not our promise.
    """
    live = state.live.get(node_id)
    inventory = live.inventory if live is not None else None
    holders: dict[str, list[Holding]] = {}
    memory = cpu = 0
    found: list[Violation] = []
    for holding in _held(state, node_id, told=told):
        memory += holding.memory_bytes
        cpu += holding.cpu_milli
        for gpu in holding.gpus:
            holders.setdefault(gpu, []).append(holding)
    for gpu, sharing in holders.items():
        if any(holding.runner_id in placed for holding in sharing):
            found += _gpu(node_id, gpu, sharing)
    if inventory is None or not told or live is None:
        return found
    # What was adopted is there already, whatever it takes.
    fresh = [id_ for id_ in placed if id_ in state.runners and id_ not in live.statuses]
    healthy = {gpu.id: gpu.healthy for gpu in as_placed(inventory.gpus, _quarantined(state, node_id))}
    for runner_id in fresh:
        runner = state.runners[runner_id]
        found += _may_be_there(state, live, runner, healthy)
        over = (runner.memory_bytes and memory > inventory.memory_bytes) or (
            runner.cpu_milli and cpu > inventory.cpu_milli
        )
        if over:
            found.append(_violation("capacity", f"{node_id} is promised more than it has", runner_id, node_id))
    return found


def _gpu(node_id: str, gpu: str, sharing: Sequence[Holding]) -> list[Violation]:
    """Rule 1: a whole-GPU runner is alone, only fractional ones of one team share, up to the whole."""
    ids = tuple(holding.runner_id for holding in sharing)
    odd = next((holding for holding in sharing if not 0 <= holding.gpu_milli <= WHOLE), None)
    if odd is not None:
        return [_violation("gpu-share", f"{odd.runner_id} has {odd.gpu_milli} thousandths of {gpu}", odd.runner_id)]
    if len(sharing) == 1:
        return []
    if not all(holding.gpu_milli for holding in sharing):
        return [_violation("gpu-once", f"GPU {gpu} of {node_id} is promised to {' and '.join(ids)}", *ids)]
    if len({team_of(id_) for id_ in ids}) > 1:
        return [_violation("gpu-team", f"GPU {gpu} of {node_id} is shared by teams: {', '.join(ids)}", *ids)]
    total = sum(holding.gpu_milli for holding in sharing)
    if total > WHOLE:
        return [_violation("gpu-share", f"{total} thousandths of GPU {gpu} of {node_id} are promised", *ids)]
    return []


def _quarantined(state: State, node_id: str) -> Mapping[str, str]:
    node = state.nodes.get(node_id)
    return node.quarantined_gpus if node is not None else {}


def _may_be_there(state: State, live: NodeLive, runner: Runner, healthy: Mapping[str, bool]) -> list[Violation]:
    """The plan checked again on the records themselves: one from stale columns is refused, and its node frozen."""
    node_id = runner.node
    found: list[Violation] = []
    node = state.nodes.get(node_id)
    if node is None or node.revoked or node.cordoned or live.health is not Health.READY:
        found.append(
            _violation("node-open", f"{runner.id} gets node {node_id}, which takes nothing", runner.id, node_id)
        )
    if live.hold is not Hold.NONE or node_id in state.frozen:
        found.append(_violation("node-held", f"{runner.id} gets node {node_id}, which is held", runner.id, node_id))
    if any(gpu not in healthy for gpu in runner.gpus):
        message = f"{runner.id} gets GPUs that {node_id} does not have"
        found.append(_violation("gpu-exists", message, runner.id, node_id))
    elif not all(healthy[gpu] for gpu in runner.gpus):
        found.append(_violation("gpu-healthy", f"{runner.id} gets a sick GPU of {node_id}", runner.id, node_id))
    return found


def _held(state: State, node_id: str, *, told: bool) -> Iterator[Holding]:
    for runner_id in state.runners_by_node.get(node_id, ()):
        runner = state.runners[runner_id]
        yield Holding(runner_id, runner.gpus, runner.memory_bytes, runner.cpu_milli, runner.gpu_milli)
    live = state.live.get(node_id)
    if told and live is not None:
        for runner_id, one in live.orphans.items():
            yield Holding(runner_id, one.gpus, one.memory_bytes, one.cpu_milli, one.gpu_milli)
