"""What waits in front and has the right to a place takes it from what has less. Pure.

An app may take from runners whose priority is lower by `PREEMPTION_GAP` at least, and a team within its quota from what
others hold above theirs. Never below a team's quota, never more of an app's runners at once than may be disturbed (the
others follow), never from build tasks. On every node that could take the runner, the fewest victims are chosen, then
the youngest; the node with the fewest is taken. Victims are drained: they finish their requests. The node is kept free
for who preempts, until it is placed, wants nothing any more, or `RESERVED_S` are over. Who waits for a backoff takes
nothing from anybody, and nothing is kept free for it.

With at most 16 GPUs on a node every set of up to three victims is looked at; larger sets are grown from the largest
holders, the youngest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from fal_contract.ids import team_of
from fal_scheduler.core import quotas
from fal_scheduler.core.disruption import allowed
from fal_scheduler.core.explain import model_awaited, takes_without
from fal_scheduler.core.ranking import Ask
from fal_scheduler.core.records import App, Goal, Runner, Spec
from fal_scheduler.core.scaling import in_grace
from fal_scheduler.core.state import State
from fal_scheduler.core.stops import stop
from fal_scheduler.core.waiting import backoff_of, first_able, reserved_for_others
from fal_scheduler.core.waiting_line import PLACE
from fal_scheduler.core.work import Work

PREEMPTION_GAP: Final = 10  # points of priority
RESERVED_S: Final = 600.0
LOOK_EVERY_S: Final = 5.0  # an app that waits looks for victims so often at most
LOOKS_PER_TICK_MAX: Final = 2  # each goes through the nodes
NODES_LOOKED_AT_MAX: Final = 2000
SETS_EXACT_MAX: Final = 3
NOTHING: Final[Mapping[str, int]] = {}  # leaves already

Cost = tuple[int, int, float, str]  # of victims: fewer, of lower priority, younger, then the node's id


@dataclass(frozen=True, slots=True)
class Victims:
    """Runners of one node that would make room, in order of id."""

    node_id: str
    runners: tuple[Runner, ...]

    @property
    def cost(self) -> Cost:
        """Fewer first, of lower priority, then younger, then the node's id."""
        youngest = -sum(runner.created_at_s for runner in self.runners) / max(1, len(self.runners))
        return len(self.runners), max(one.priority for one in self.runners), youngest, self.node_id


def preempt(work: Work, app: App, spec: Spec) -> bool:
    """Make room for a runner of `app`, which waits in front. True where victims leave, or already do."""
    state, now_s = work.state, work.moment.now_s
    if app.id in state.reserved.values():
        return True
    if now_s < state.preempt_at_s.get(app.id, 0.0) or work.full:
        return False
    state.preempt_at_s[app.id] = now_s + LOOK_EVERY_S
    found = find(state, app, spec)
    if found is None:
        return False
    state.reserved[found.node_id] = app.id
    state.reserved_at_s[found.node_id] = now_s
    _take(work, app, spec, found)
    return True


def _take(work: Work, app: App, spec: Spec, found: Victims) -> None:
    """Drain victims, of each app as many as may be disturbed now; the tick goes on with the others."""
    state = work.state
    claims = quotas.within(state, team_of(app.id), quotas.milli_of(spec))
    for victim in found.runners:
        if work.full or not allowed(state, victim.app, _running(state, victim.app)):
            continue
        why = f"preempted by {app.id} (priority {spec.priority} over {victim.priority})"
        if claims and victim.priority > spec.priority - PREEMPTION_GAP:
            why = f"taken back for team {team_of(app.id)}, which is within its quota"
        stop(work, victim, Goal.DRAIN, why)
        work.log("RUNNER_PREEMPTED", victim.id, why, by=app.id, node=found.node_id)


def find(state: State, app: App, spec: Spec) -> Victims | None:
    """The best victims for one runner of `app`; None where nobody may be asked to leave."""
    ask = Ask(app.id, team_of(app.id), avoid=reserved_for_others(state, app.id))
    going = _leaving_milli(state)
    nodes = []
    for node_id in sorted(state.runners_by_node):
        eligible = _eligible(state, app, spec, node_id, going)
        if eligible and (least := _least(state, node_id, eligible, spec)) is not None:
            nodes.append((least, eligible))
            if len(nodes) == NODES_LOOKED_AT_MAX:
                break
    nodes.sort(key=lambda one: one[0])
    best: Victims | None = None
    for least, eligible in nodes:
        if best is not None and best.cost < least:
            break
        found = _fewest(state, least[-1], eligible, spec, ask, going)
        if found is not None and (best is None or found.cost < best.cost):
            best = found
    return best


def _least(state: State, node_id: str, eligible: list[Runner], spec: Spec) -> Cost | None:
    """What no set of victims on this node can cost less than, by their GPUs alone; None where even all are too few."""
    count = next((count for count in range(1, len(eligible) + 1) if _frees(state, node_id, eligible, spec, count)), 0)
    if not count:
        return None
    priority = sorted(one.priority for one in eligible)[count - 1]
    youngest = -sum(sorted((one.created_at_s for one in eligible), reverse=True)[:count]) / count
    return count, priority, youngest, node_id


def _frees(state: State, node_id: str, eligible: list[Runner], spec: Spec, count: int) -> bool:
    """Whether the largest holders, so many of them, could free the GPUs that `spec` asks for; others do not count."""
    facts = state.fleet.facts.get(node_id)
    if facts is None or spec.gpu_milli or not spec.num_gpus:
        return True
    held = {gpu: None for id_ in state.runners_by_node[node_id] for gpu in state.runners[id_].gpus}
    most = sorted((len(one.gpus) for one in eligible), reverse=True)[:count]
    return len(facts.gpus) - len(held) + sum(most) >= spec.num_gpus


def _eligible(state: State, app: App, spec: Spec, node_id: str, going: Mapping[str, int] = NOTHING) -> list[Runner]:
    """Who may be asked to leave, the youngest of the lowest priority first."""
    claims = quotas.within(state, team_of(app.id), quotas.milli_of(spec))
    found = []
    for runner_id in state.runners_by_node[node_id]:
        runner = state.runners[runner_id]
        revision = state.revisions.get((runner.app, runner.revision))
        if runner.goal is not Goal.RUN or runner_id in state.frozen or runner.app == app.id:
            continue
        if revision is None or revision.spec.build is not None:
            continue
        lower = runner.priority <= spec.priority - PREEMPTION_GAP
        reclaimed = claims and team_of(runner.app) in state.quotas and team_of(runner.app) != team_of(app.id)
        if (lower or reclaimed) and _spare_milli(state, team_of(runner.app), going) > 0:
            found.append(runner)
    found.sort(key=lambda one: (one.priority, -one.created_at_s, one.id))
    return found


def _fewest(
    state: State, node_id: str, eligible: list[Runner], spec: Spec, ask: Ask, going: Mapping[str, int] = NOTHING
) -> Victims | None:
    if not takes_without(state, node_id, spec, ask, tuple(one.id for one in eligible)):
        return None  # not even all of them
    best: Victims | None = None
    for count in range(1, min(SETS_EXACT_MAX, len(eligible)) + 1):
        if not _frees(state, node_id, eligible, spec, count):
            continue
        for chosen in combinations(eligible, count):
            if _may_go(state, chosen, going) and takes_without(
                state, node_id, spec, ask, tuple(one.id for one in chosen)
            ):
                found = Victims(node_id, tuple(sorted(chosen, key=lambda one: one.id)))
                if best is None or found.cost < best.cost:
                    best = found
        if best is not None:
            return best
    grown: list[Runner] = []
    for runner in sorted(eligible, key=lambda one: (-quotas.held_by(one), one.priority, -one.created_at_s, one.id)):
        if _may_go(state, (*grown, runner), going):
            grown.append(runner)
        if grown and takes_without(state, node_id, spec, ask, tuple(one.id for one in grown)):
            return Victims(node_id, tuple(sorted(grown, key=lambda one: one.id)))
    return None


def _leaving_milli(state: State) -> dict[str, int]:
    """By team: thousandths of GPUs that are still held by runners which were asked to go."""
    found: dict[str, int] = {}
    for runner in state.runners.values():
        if runner.node and runner.goal is not Goal.RUN:
            team = team_of(runner.app)
            found[team] = found.get(team, 0) + quotas.held_by(runner)
    return found


def _spare_milli(state: State, team: str, going: Mapping[str, int]) -> int:
    """What may be taken from a team: what it borrowed, but for what leaves it already."""
    return quotas.borrowed_milli(state, team) - going.get(team, 0)


def _may_go(state: State, chosen: tuple[Runner, ...], going: Mapping[str, int] = NOTHING) -> bool:
    """No team falls below its quota."""
    by_team: dict[str, int] = {}
    for runner in chosen:
        team = team_of(runner.app)
        by_team[team] = by_team.get(team, 0) + quotas.held_by(runner)
    return all(milli <= _spare_milli(state, team, going) for team, milli in by_team.items())


def _running(state: State, app_id: str) -> int:
    return sum(1 for id_ in state.runners_by_app.get(app_id, ()) if state.runners[id_].goal is Goal.RUN)


def tick(work: Work) -> None:
    """Go on with what is under way, look again for who waits in front, and give back what is kept for nobody."""
    state, now_s = work.state, work.moment.now_s
    held = bool(state.hold_all) or not state.settled  # nothing is stopped by itself
    for node_id, app_id in list(state.reserved.items()):
        app = state.apps.get(app_id)
        over = now_s - state.reserved_at_s[node_id] >= RESERVED_S
        if app is None or app_id not in state.waiting or over or backoff_of(state, app_id, app.revision, now_s):
            release(work, node_id)
        elif node_id in state.runners_by_node and not held:
            spec = state.revision_of(app).spec
            ask = Ask(app.id, team_of(app.id), avoid=reserved_for_others(state, app.id))
            going = _leaving_milli(state)
            eligible = _eligible(state, app, spec, node_id, going)
            leaving = any(state.runners[id_].goal is not Goal.RUN for id_ in state.runners_by_node[node_id])
            if eligible and not leaving and (found := _fewest(state, node_id, eligible, spec, ask, going)) is not None:
                _take(work, app, spec, found)
    if not held and not in_grace(state, now_s):
        _look_again(work)


def _look_again(work: Work) -> None:
    """The first of classes that sleep, a few at a tick: who may be asked to leave changes without any capacity."""
    state, now_s = work.state, work.moment.now_s
    looks = 0
    for need, why in list(state.waiting.asleep.items()):
        app = state.apps.get(first_able(state, need, now_s))
        if (
            app is None
            or why != PLACE
            or state.preempt_at_s.get(app.id, 0.0) > now_s
            or app.id in state.reserved.values()
            or app.id in state.demand.gave_way.values()  # idle runners leave for it already
            or model_awaited(state, state.revision_of(app).spec)
        ):
            continue
        looks += 1
        if looks > LOOKS_PER_TICK_MAX:
            return
        preempt(work, app, state.revision_of(app).spec)


def keep_free_no_more(work: Work, app_id: str) -> None:
    """The app has its place."""
    for node_id in [node_id for node_id, owner in work.state.reserved.items() if owner == app_id]:
        release(work, node_id)


def backs_off(work: Work, app_id: str) -> None:
    """A runner of the app failed. While nothing of it may start, what is kept free for it is of use to others."""
    app = work.state.apps.get(app_id)
    if app is not None and backoff_of(work.state, app_id, app.revision, work.moment.now_s) is not None:
        keep_free_no_more(work, app_id)


def release(work: Work, node_id: str) -> None:
    """The node is everybody's again."""
    work.state.reserved.pop(node_id, None)
    work.state.reserved_at_s.pop(node_id, None)
    work.capacity_grew(node_id)


__all__ = ["PREEMPTION_GAP", "Victims", "backs_off", "find", "keep_free_no_more", "preempt", "release", "tick"]
