"""Silence, judged: which nodes are UNKNOWN, which are lost, and when it is we who are cut off.

Pure. Losing contact is not death (design, section 5, rule 3; pitfall 18; adr/0026). Age is counted from the arrival of
the last message at the socket, and every stall of our own is taken off it. A node that has not spoken to this leader
yet is not lost in the leader's first FAILOVER_GRACE_S: it may be on its way to it. Runners of lost nodes are replaced
at a bounded rate, so that a judgement that was wrong costs little. Called by `step` at each tick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fal_contract.limits import (
    DOMAIN_MASS_NODES_MIN,
    FAILOVER_GRACE_S,
    HEARTBEAT_INTERVAL_S,
    HEARTBEATS_MISSED_MAX,
    LOST_AFTER_S,
    LOST_REPLACED_MIN,
    LOST_REPLACED_OF_DOMAIN_MIN,
    LOST_REPLACED_OF_DOMAIN_SHARE,
    LOST_REPLACED_SHARE,
)
from fal_scheduler.core.events import NodeChanged, RouteChanged
from fal_scheduler.core.told import Health, NodeLive
from fal_scheduler.core.work import Work

TICK_S: Final = 1.0  # of the engine
# The third heartbeat would be missed before the next tick: so a silent node is seen within 15 s of its last word.
UNKNOWN_AFTER_S: Final = HEARTBEAT_INTERVAL_S * HEARTBEATS_MISSED_MAX - TICK_S
REPLACED_WINDOW_S: Final = 60.0
_ALARM: Final = "MASS_SILENCE"


@dataclass(frozen=True, slots=True)
class Silence:
    """One node as the judge sees it. `reached`: somebody else has reached it within LOST_AFTER_S.

    `declared`: an operator has declared its pool lost while it was silent. `spared`: it has not had its time to speak
    to this leader yet.
    """

    node_id: str
    domain: str
    age_s: float
    reached: bool = False
    declared: bool = False
    spared: bool = False

    @property
    def overdue(self) -> bool:
        """Whether it is lost, provided that it is not we who are cut off."""
        return self.age_s > LOST_AFTER_S and not self.reached and not self.spared


def judge(nodes: Iterable[Silence]) -> Mapping[str, Health]:
    """READY, UNKNOWN or LOST for each node, by what is heard of all of them."""
    nodes = list(nodes)
    silent = {node.node_id for node in nodes if node.age_s > UNKNOWN_AFTER_S}
    members: dict[str, list[Silence]] = {}
    for node in nodes:
        members.setdefault(node.domain, []).append(node)
    speaking = {domain for domain, group in members.items() if _speaks(group, silent)}
    health: dict[str, Health] = {}
    for node in nodes:
        if node.node_id not in silent:
            health[node.node_id] = Health.READY
        elif node.declared or (node.overdue and speaking):
            health[node.node_id] = Health.LOST
        else:
            health[node.node_id] = Health.UNKNOWN
    return health


def _speaks(group: list[Silence], silent: set[str]) -> bool:
    """Whether a domain still speaks: some node does, and not most of them are silent at once.

    Where most are silent it may be our line to the domain, so such a domain is no witness. One silent node is never
    "most" of a domain of fewer than DOMAIN_MASS_NODES_MIN.
    """
    mute = sum(1 for node in group if node.node_id in silent)
    if mute == len(group):
        return False
    allowed = 1 if len(group) < DOMAIN_MASS_NODES_MIN else 0
    return mute <= max(allowed, len(group) // 2)


def tick(work: Work) -> None:
    """Judge every node that was heard or should have been, and act on what changed."""
    state = work.state
    expected = [node_id for node_id, node in state.nodes.items() if not node.revoked]
    lives = [live for node_id in expected if (live := _live_of_expected(work, node_id)) is not None]
    if not any(_age_s(work, live) > UNKNOWN_AFTER_S for live in lives):
        work.settle(_ALARM, "cluster")
        return  # nobody is silent, nobody is lost; and only news makes a node ready
    silences = [_silence(work, live) for live in lives]
    judged = judge(silences)
    for node_id, health in judged.items():
        live = state.live[node_id]
        if live.health is not health and health is not Health.READY:  # only news makes a node ready
            _changed(work, live, health)
    _tell(work, silences, judged)
    _abandon(work)


def _tell(work: Work, silences: list[Silence], judged: Mapping[str, Health]) -> None:
    """The alarm about silence that is held for ours."""
    held = [one for one in silences if one.overdue and judged[one.node_id] is Health.UNKNOWN]
    if not held:
        work.settle(_ALARM, "cluster")
        return
    domains = {one.domain: None for one in held}
    everywhere = {one.domain: None for one in silences}
    what = f"{len(held)} of {len(silences)} nodes are silent, in {len(domains)} of {len(everywhere)} failure domains"
    work.alarm(
        _ALARM,
        "cluster",
        f"{what}: no domain is left that speaks, so it may be we who are cut off; nothing is replaced",
        "Look at this scheduler's own network first; where a pool is really gone, `falctl pool declare-lost POOL`.",
    )


def _live_of_expected(work: Work, node_id: str) -> NodeLive | None:
    """What is known of a node from which this leader must hear: it was heard, or runners are on it."""
    state = work.state
    live = state.live.get(node_id)
    if live is None and node_id in state.runners_by_node:
        live = state.live_of(node_id)
        live.heard_at_s = state.term_began_s
    return live


def _age_s(work: Work, live: NodeLive) -> float:
    state = work.state
    stalled_s = state.stall_total_s - live.stall_at_heard_s
    return work.moment.now_s - max(live.heard_at_s, state.term_began_s) - stalled_s


def _silence(work: Work, live: NodeLive) -> Silence:
    state, now_s = work.state, work.moment.now_s
    stalled_s, age_s = state.stall_total_s - live.stall_at_heard_s, _age_s(work, live)
    reached = any(now_s - at_s - stalled_s <= LOST_AFTER_S for _, at_s in live.reached.values())
    reached = reached or bool(live.witness and now_s - live.witnessed_at_s - stalled_s <= LOST_AFTER_S)
    node = state.nodes[live.node_id]
    pool = state.pools.get(node.pool)
    declared = pool is not None and work.moment.wall_s - age_s <= pool.lost_declared_at_s
    spared = not live.session_id and now_s - state.term_began_s - state.stall_total_s < FAILOVER_GRACE_S
    return Silence(live.node_id, state.domain_of(live.node_id), age_s, reached, declared, spared)


def _changed(work: Work, live: NodeLive, health: Health) -> None:
    state = work.state
    if live.health is Health.LOST and health is Health.UNKNOWN:
        _forgive(work, live)  # the others fell silent too: it is we who are cut off
    live.health = health
    state.refresh_node(live.node_id)
    state.capacity_at_s = work.moment.now_s
    for runner_id in state.runners_by_node.get(live.node_id, ()):
        work.emit(RouteChanged(runner_id))
    work.emit(NodeChanged(live.node_id))
    kind = "NODE_LOST" if health is Health.LOST else "NODE_UNKNOWN"
    then = "its runners are replaced" if health is Health.LOST else "its runners may well serve"
    work.log(kind, live.node_id, f"silent; {then}")


def _forgive(work: Work, live: NodeLive) -> None:
    state = work.state
    for runner_id in state.runners_by_node.get(live.node_id, ()):
        if state.abandoned.pop(runner_id, "") is None:
            state.dirty[state.runners[runner_id].app] = None


def _abandon(work: Work) -> None:
    """Runners of lost nodes may be replaced, so many in a minute. Their GPUs stay promised until the node speaks."""
    state, now_s = work.state, work.moment.now_s
    recent = state.abandoned_recent
    for domain in list(recent):
        while recent[domain] and now_s - recent[domain][0] >= REPLACED_WINDOW_S:
            recent[domain].popleft()
        if not recent[domain]:
            del recent[domain]
    count = len(state.runners)
    left = max(LOST_REPLACED_MIN, int(count * LOST_REPLACED_SHARE)) - sum(len(times) for times in recent.values())
    of_domain = max(LOST_REPLACED_OF_DOMAIN_MIN, int(count * LOST_REPLACED_OF_DOMAIN_SHARE))
    for live in state.live.values():
        if live.health is not Health.LOST:
            continue
        domain = state.domain_of(live.node_id)
        for runner_id in state.runners_by_node.get(live.node_id, ()):
            if runner_id in state.abandoned:
                continue
            if left <= 0 or len(recent.get(domain, ())) >= of_domain:
                break
            recent.setdefault(domain, deque()).append(now_s)
            state.abandoned[runner_id] = None
            state.dirty[state.runners[runner_id].app] = None
            left -= 1
