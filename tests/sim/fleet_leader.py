"""A leader of the light fleet: the production core, and what the engine does around it, without I/O. Pure.

Steps gather in batches that a store acknowledges at once, late or never; what was not acknowledged is told to nobody.
A process that stands still takes in afterwards what arrived meanwhile. Heartbeats that would change nothing are not
stepped but noted where they would have been (`hear`); a test compares both ways.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fal_contract.errors import FalError
from fal_contract.limits import (
    FAILOVER_GRACE_S,
    HEARTBEAT_INTERVAL_S,
    LOST_AFTER_S,
    NOTICE_MARGIN_S,
)
from fal_scheduler.codec import encode
from fal_scheduler.core import suspicion
from fal_scheduler.core.demand_events import DemandTold
from fal_scheduler.core.events import (
    AssignmentChanged,
    Effect,
    Event,
    GatewayReach,
    HelloNeeded,
    Logged,
    Moment,
    NodeHello,
    NodeReport,
    Outcome,
    Proceed,
    Tick,
)
from fal_scheduler.core.liveness import UNKNOWN_AFTER_S
from fal_scheduler.core.node_events import NodeNotice, RebootDue
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import Change, Record, Runner, runner_key
from fal_scheduler.core.rollout import CANARY
from fal_scheduler.core.state import State
from fal_scheduler.core.step import SETTLE_S, BrokenInvariant, Core
from fal_scheduler.core.told import Health
from fal_scheduler.recovery import recover
from sim.fleet_node import WALL_START_S, FleetNode

if TYPE_CHECKING:
    from sim.fleet_world import FleetWorld

UNACKNOWLEDGED_MAX: Final = 300  # changes; then events wait
IDLE_TICK_S: Final = 10.0  # where nothing is due; the engine ticks each second, which then does nothing
PROCEEDS_MAX: Final = 5000
UNCOUNTED_STALL_S: Final = 1.5  # as the engine counts: so late may a tick be that is no stall
_JUDGED_AT_S: Final = (UNKNOWN_AFTER_S, LOST_AFTER_S)


class FleetStore:
    """What survives a leader: records, and the newest term."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.term = 0
        self.revision = 0

    def commit(self, changes: list[Change]) -> None:
        """Make durable."""
        self.revision += 1
        for change in changes:
            if change.after is None:
                self.records.pop(change.key, None)
            else:
                self.records[change.key] = change.after


class Leader:
    """See the module. `now_s` is its own monotonic clock: the world's, moved by `offset_s`."""

    def __init__(self, world: FleetWorld, *, offset_s: float, skew_s: float) -> None:
        self.world, self.store = world, world.store
        self.offset_s, self.skew_s = offset_s, skew_s
        self.began_s = world.now_s
        self.store.term += 1
        encoded = {key: encode(record) for key, record in self.store.records.items()}
        state, found = recover(encoded, term=self.store.term, revision=self.store.revision, now_s=self.now_s)
        assert not found, found
        self.grace = not state.grace_over
        self.core = Core(state, Placer(state.fleet), world.ids)
        self.unacknowledged: list[tuple[list[Change], tuple[Effect, ...]]] = []
        self.inbox: deque[Event] = deque()
        self.waits = False  # the store does not answer
        self.deaf = False  # the process stands still
        self.deaf_s: list[tuple[float, float]] = []
        self.paused_until_s = 0.0
        self.recheck = False
        self.last_tick_s = world.now_s
        self.busy = True
        self.steps = 0
        self.heard_s: dict[str, float] = {}  # node -> the world's time of what arrived last

    @property
    def state(self) -> State:
        """All that it knows."""
        return self.core.state

    @property
    def now_s(self) -> float:
        """Its monotonic clock."""
        return self.world.now_s + self.offset_s

    @property
    def wall_s(self) -> float:
        """Its wall clock."""
        return WALL_START_S + self.skew_s + self.world.now_s

    @property
    def in_grace(self) -> bool:
        """Whether nothing may be scaled down yet."""
        return self.grace and self.world.now_s - self.began_s < FAILOVER_GRACE_S - 0.01

    # --- events -----------------------------------------------------------------------------------------------------

    def offer(self, event: Event) -> None:
        """An event arrives; it is stepped at once or waits."""
        self.inbox.append(event)
        self.pump()

    def pump(self) -> None:
        """Step what waits, then what the core has left to do."""
        while self.inbox and self._may_step():
            event = self.inbox[0]
            needed = suspicion.term_needed(self.state, event)
            if needed > self.state.term:
                if self.unacknowledged:
                    return
                self.store.term = self.state.term = needed
            self.inbox.popleft()
            self._step(event)
        for _ in range(PROCEEDS_MAX):
            if not self.state.dirty or not self._may_step() or self.world.now_s < self.paused_until_s:
                return
            self._step(Proceed())
        self.world.checker.fail("never-done", f"{list(self.state.dirty)} stay dirty")

    def _may_step(self) -> bool:
        return not self.deaf and sum(len(one) for one, _ in self.unacknowledged) < UNACKNOWLEDGED_MAX

    def _step(self, event: Event) -> None:
        self.steps += 1
        if isinstance(event, NodeReport):
            self.heard_s[event.node_id] = max(self.heard_s.get(event.node_id, 0.0), event.arrived_s - self.offset_s)
        try:
            outcome = self.core.step(event, Moment(self.now_s, self.wall_s))
        except FalError as refusal:
            self.world.trace(f"{type(event).__name__} refused {refusal.what}")
            return
        except BrokenInvariant as broken:
            self.world.checker.fail("invariant", f"{event}: {broken}")
            return
        self._take(event, outcome)

    def _take(self, event: Event, outcome: Outcome) -> None:
        if outcome.changes or outcome.effects:
            self.busy = self.busy or isinstance(event, Tick)  # there may be more of what the tick found
            self.world.trace(f"{type(event).__name__} {len(outcome.changes)} {len(outcome.effects)}")
        if self.waits:
            self.unacknowledged.append((list(outcome.changes), outcome.effects))
        else:
            self._acknowledged(list(outcome.changes), outcome.effects)
        self.world.checker.stepped(self, event, outcome)

    def _acknowledged(self, changes: list[Change], effects: tuple[Effect, ...]) -> None:
        if changes:
            self.store.commit(changes)
            self.state.store_revision = self.store.revision
        self.tell(effects)

    def tell(self, effects: tuple[Effect, ...]) -> None:
        """Give effects out."""
        for effect in effects:
            match effect:
                case AssignmentChanged(node_id=node_id, runner_id=runner_id):
                    self.deliver(node_id, runner_id)
                case HelloNeeded(node_id=node_id):
                    self.world.soon(lambda node_id=node_id: self.world.connect(node_id))
                case RebootDue(node_id=node_id):
                    self.world.soon(lambda node_id=node_id: self.world.reboot(node_id))
                case Logged():
                    self.world.checker.logged(self, effect)
                case _:
                    pass

    # --- to nodes ---------------------------------------------------------------------------------------------------

    def durable(self, runner_id: str) -> Runner | None:
        """A runner as the store has it."""
        found = self.store.records.get(runner_key(runner_id))
        assert found is None or isinstance(found, Runner)
        return found

    def deliver(self, node_id: str, runner_id: str) -> None:
        """A node learns what became of one assignment, if its line stands."""
        node = self.world.nodes.get(node_id)
        live = self.state.live.get(node_id)
        if node is None or not node.connected or not node.talks or (live is not None and live.hold):
            return
        runner = self.durable(runner_id)
        if runner is not None and runner.node == node_id:
            self.world.assigned(node, runner, self.state.term)
        else:
            self.world.dropped(node, runner_id)

    def deliver_all(self, node: FleetNode) -> None:
        """A node learns all of its assignments."""
        node.term_seen = max(node.term_seen, self.state.term)
        known = self.state.runners_by_node.get(node.id, {})
        for runner_id in sorted({*known, *node.boxes}):
            self.deliver(node.id, runner_id)

    # --- heartbeats -------------------------------------------------------------------------------------------------

    def hear(self, only: FleetNode | None = None) -> None:
        """Heartbeats that have arrived until now."""
        if self.deaf:
            return
        nodes = [only] if only is not None else list(self.world.nodes.values())
        now_s, stall_s, lives = self.world.now_s, self.state.stall_total_s, self.state.live
        for node in nodes:
            if not (node.connected and node.talks):
                continue
            beat_s = now_s - (now_s - node.beat_s) % HEARTBEAT_INTERVAL_S
            live = lives.get(node.id)
            if live is None or beat_s <= self.heard_s.get(node.id, 0.0) or live.session_id != node.session_id:
                continue
            self.heard_s[node.id] = beat_s
            if live.health is not Health.READY or not self.world.elide:
                self.offer(NodeReport(node.id, node.session_id, beat_s + self.offset_s))
            else:
                live.heard_at_s = max(live.heard_at_s, beat_s + self.offset_s)
                live.stall_at_heard_s = stall_s

    def silent_s(self, node_id: str) -> float:
        """For how long it could have heard the node and did not."""
        since_s = max(self.began_s, self.heard_s.get(node_id, 0.0))
        deaf_s = sum(max(0.0, end - max(start, since_s) - UNCOUNTED_STALL_S) for start, end in self.deaf_s)
        return self.world.now_s - since_s - deaf_s

    # --- time -------------------------------------------------------------------------------------------------------

    def tick(self, stall_s: float = 0.0, *, hears: bool = True) -> None:
        """A second, or several in which nothing was due."""
        self.last_tick_s, self.busy = self.world.now_s, False
        if self.deaf or self.inbox:
            return
        if hears:
            self.hear()
        recheck = self.recheck and self.world.now_s >= self.paused_until_s
        self.recheck = self.recheck and not recheck
        self.offer(Tick(stall_s, recheck=recheck, at_s=self.now_s))

    def next_tick_s(self) -> float:
        """When it ticks next, in the world's time: at whole seconds after the last, as soon as something is due."""
        after_s = self.last_tick_s + 1.0
        if self.busy or self.recheck:
            return after_s
        due_s = min([*self._due(), self.last_tick_s + IDLE_TICK_S])
        return max(after_s, self.last_tick_s + math.ceil(due_s - self.last_tick_s))

    def _due(self) -> list[float]:
        state, offset_s, wall_s = self.state, self.offset_s, WALL_START_S + self.skew_s
        found = [at_s - offset_s for at_s in state.demand.look_at_s.values()]
        found += [one.until_s - offset_s for id_, one in state.backoffs.items() if id_ in state.waiting]
        if not state.grace_over:
            found.append(self.began_s + FAILOVER_GRACE_S)
        if not state.settled:
            found.append(self.began_s + SETTLE_S)
        for node in self.world.silent():
            if node.id in state.nodes and state.health_of(node.id) is not Health.LOST:
                silent_s = self.silent_s(node.id)
                found += [self.world.now_s + at_s - silent_s for at_s in _JUDGED_AT_S if at_s > silent_s]
        for node_id in state.draining:
            if (drain := state.nodes[node_id].drain) is not None:
                for at_s in (drain.deadline_at_s, drain.notice_at_s):
                    found += [at_s - wall_s, at_s - wall_s - NOTICE_MARGIN_S] if at_s else []
        for app_id in state.rolling:
            app = state.apps[app_id]
            if app.rollout is not None and not app.rollout.paused:
                policy = state.revision_of(app).spec.rollout
                found.append(max(app.rollout.began_at_s, app.rollout.progress_at_s) + policy.serves_within_s - wall_s)
                if app.rollout.phase == CANARY and app.rollout.phase_at_s:
                    found.append(app.rollout.phase_at_s + policy.canary_hold_s - wall_s)
        return [at_s for at_s in found if at_s > self.last_tick_s]

    # --- faults -----------------------------------------------------------------------------------------------------

    def stand_still(self) -> None:
        """The process stops for a while."""
        self.hear()
        self.deaf = True
        self.deaf_s.append((self.world.now_s, math.inf))

    def go_on(self, *, tick_first: bool) -> None:
        """It runs again: a tick says how long it was, before or after what arrived is taken in."""
        start_s, _ = self.deaf_s.pop()
        self.deaf_s.append((start_s, self.world.now_s))
        self.deaf = False
        self.inbox = deque(_read_at(event, self.now_s) for event in self.inbox)
        stall_s = max(0.0, self.world.now_s - start_s - UNCOUNTED_STALL_S)
        if tick_first:
            self.inbox.appendleft(Tick(stall_s, at_s=self.now_s))
        self.pump()
        self.hear()
        if not tick_first:
            self.tick(stall_s)

    def store_answers(self, *, done: bool) -> None:
        """What waited for the store was done, or was not."""
        self.waits = False
        waiting, self.unacknowledged = self.unacknowledged, []
        if done:
            for changes, effects in waiting:
                self._acknowledged(changes, effects)
        else:
            undone = [change for changes, _ in waiting for change in changes]
            for change in reversed(undone):
                self.state.apply(change.undone())
            self.tell(self.core.taken_back(Moment(self.now_s, self.wall_s), undone).effects)
            self.paused_until_s, self.recheck = self.world.now_s + 1.0, True
        self.pump()


def _read_at(event: Event, now_s: float) -> Event:
    """What arrived at a process that stood still is stamped when it reads it."""
    if isinstance(event, NodeReport | NodeHello | DemandTold | GatewayReach | NodeNotice):
        return replace(event, arrived_s=now_s)
    return event
