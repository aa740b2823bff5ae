"""Rules of the light fleet: what a step touched is checked after it, everything every FULL_EVERY steps, rest in calm.

Judged by the machines themselves, by what really arrived and by plain counting of records; of the scheduler's own
code only `invariants.audit` and what operators are shown (`runner_phase`) are used.

    gpu-once, runner-once, older-term      a GPU, a runner, a term: on machines, in truth
    promised-once, reservation             the same in records, and memory
    silence, all-silent, unseen            nodes judged by what could really be heard
    served-stop, grace, share, quota       runners that served and were asked to leave, and why
    made, forecast, starved                runners that were made, or wait
    rollback                               a revision that failed too often goes back
    reason, negative, audit, alarm         every runner explained, every prediction a time, the core's own rules
    ledger                                 the usage ledger against the machines' own clocks
    rest                                   after a calm: drains, rollouts, queues and runners are where they should be
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fal_contract.ids import team_of
from fal_contract.limits import LOST_AFTER_S, NOTICE_MARGIN_S, ROLLOUT_FAILURES_MAX
from fal_scheduler.core import invariants
from fal_scheduler.core.events import ApplyApp, DeleteApp, Event, Logged, Outcome, ScaleApp, StopRunner
from fal_scheduler.core.records import Goal, Runner, RunnerState
from fal_scheduler.core.rollout import RECREATING, ROLLING_BACK
from fal_scheduler.core.rollout_events import SetRevision, SetRollout
from fal_scheduler.core.told import Health
from fal_scheduler.core.views import runner_phase
from sim.fleet_node import NEVER, Box, FleetNode, may_share

if TYPE_CHECKING:
    from sim.fleet_leader import Leader
    from sim.fleet_world import FleetWorld

FULL_EVERY: Final = 100
STARVED_EVERY: Final = 10
UNKNOWN_AFTER_S: Final = 14.0  # the third heartbeat would be missed before the next tick
SEEN_WITHIN_S: Final = 15.0 + 1.5  # of the last word; a tick may be late
PREEMPTED: Final = ("preempted by", "taken back for")
IDLE: Final = ("idle for", "no request came")
LEDGER_SLACK_MS: Final = 1500
ASKED_S: Final = 60.0  # within these its runners may be stopped on an operator's word
ASKING: Final = (ApplyApp, ScaleApp, DeleteApp, SetRevision, SetRollout, StopRunner)


@dataclass(slots=True)
class Spent:
    """What one container really used. `told`: its end was told to a scheduler that kept it."""

    gpu_ms: float = 0.0
    ended: bool = False


class FleetChecker:
    """See the module. `counts`: what happened, for tests that must not prove nothing."""

    def __init__(self, world: FleetWorld) -> None:
        self.world = world
        self.counts: Counter[str] = Counter()
        self.spent: dict[str, Spent] = {}  # by assignment
        self._steps = 0
        self._asked_s: dict[str, float] = {}  # app -> when an operator commanded something about it

    def fail(self, rule: str, what: str) -> None:
        """A rule is broken: end with what led to it."""
        from sim.fleet_world import Broken

        world = self.world
        head = f"{rule}: {what}\n(seed {world.seed}, {world.now_s:.1f} s; last events:)\n"
        raise Broken(head + "\n".join(world.last))

    # --- after every step -------------------------------------------------------------------------------------------

    def stepped(self, leader: Leader, event: Event, outcome: Outcome) -> None:
        """What a step touched."""
        self._steps += 1
        self.counts[type(event).__name__] += 1
        if isinstance(event, ASKING):
            app_id = event.id.rpartition("-")[0] if isinstance(event, StopRunner) else event.id
            self._asked_s[app_id] = self.world.now_s
        touched: dict[str, None] = {}
        left: dict[str, list[Runner]] = {}
        made: dict[str, list[Runner]] = {}
        for change in outcome.changes:
            before, after = change.before, change.after
            if not isinstance(before, Runner) and not isinstance(after, Runner):
                continue
            assert before is None or isinstance(before, Runner)
            assert after is None or isinstance(after, Runner)
            for one in (before, after):
                if one is not None and one.node:
                    touched[one.node] = None
            if after is not None and after.node and (before is None or not before.node):
                self._placed(leader, after)
            if after is not None and before is None:
                made.setdefault(after.app, []).append(after)
            if before is not None and after is not None and before.goal is Goal.RUN and after.goal > Goal.RUN:
                self._asked_to_leave(leader, after)
                left.setdefault(after.app, []).append(after)
        for app_id, runners in made.items():
            self._made(leader, app_id, runners)
        for app_id, runners in left.items():
            self._share(leader, app_id, runners)
        if left:
            self._quota_kept(leader, [one for group in left.values() for one in group])
        for node_id in touched:
            self._promises(leader, node_id)
        if self._steps % FULL_EVERY == 0:
            self.everything()
        elif self._steps % STARVED_EVERY == 0 and leader.state.waiting.asleep:
            self._starved(leader)

    def _placed(self, leader: Leader, runner: Runner) -> None:
        self.counts["placed"] += 1
        state, team = leader.state, team_of(runner.app)
        quota = state.quotas.get(team)
        if quota is None or quota.borrow or not runner.gpus:
            return
        held = sum(_milli(one) for one in state.runners.values() if team_of(one.app) == team)
        if held > quota.gpu_milli:
            self.fail("quota", f"{runner.id} was placed: {team} holds {held} of {quota.gpu_milli}, and may not borrow")

    def _made(self, leader: Leader, app_id: str, made: list[Runner]) -> None:
        """No more runners than demand, forecast and what must be replaced ask for."""
        state, app = leader.state, self.world.apps.get(app_id)
        record = state.apps.get(app_id)
        if app is None or record is None or record.rollout is not None:
            return
        mine = [state.runners[id_] for id_ in state.runners_by_app.get(app_id, ())]
        there = [one for one in mine if one.goal is Goal.RUN and one.id not in state.abandoned]
        going = [one for one in there if one.revision == record.revision]  # older ones give way to these
        scaling = state.scaling_of(record)
        requests = max(app.level, app.most_lately(self.world.now_s, 60.0))
        demand = -(-requests // scaling.max_multiplexing) + scaling.concurrency_buffer
        most = min(scaling.max_concurrency, max(scaling.min_concurrency, demand) + scaling.forecast_concurrency)
        most = max(most, len(there) - len(made))
        leaving = sum(1 for one in going if self._must_go(leader, one))
        wanted = state.demand.wanted.get(app_id, 0)
        if len(going) > wanted + leaving:
            self.fail("made", f"{made[0].id} is one of {len(going)}: {wanted} are wanted, {leaving} must leave")
        if wanted > most:
            what = f"{app_id} should have {wanted} runners: {most} at most are asked for or were there"
            self.fail("forecast", f"{what}, {requests} requests")

    def _must_go(self, leader: Leader, runner: Runner) -> bool:
        node = leader.state.nodes.get(runner.node)
        if node is None:
            return False
        facts = leader.state.fleet.facts.get(runner.node)
        sick = {gpu.id for gpu in facts.gpus if gpu.health_class} if facts is not None else set()
        return node.drain is not None or not sick.isdisjoint(runner.gpus)

    def _asked_to_leave(self, leader: Leader, runner: Runner) -> None:
        """A runner's goal rose: the reason that is given must be true."""
        why = runner.goal_reason
        self.counts[f"left: {' '.join(why.split()[:2])}"] += 1
        state, world = leader.state, self.world
        node = world.nodes[runner.node]
        box = node.boxes.get(runner.id)
        if why.startswith(IDLE) or " should have " in why:
            app = state.apps.get(runner.app)
            if leader.in_grace and world.now_s - self._asked_s.get(runner.app, -ASKED_S) >= ASKED_S:
                self.fail("grace", f"{runner.id} leaves ({why}) {world.now_s - leader.began_s:.0f} s into the term")
            gave_way = "gives way" in why
            if why.startswith(IDLE) and box is not None and box.live and box.serves and node.up and app is not None:
                keep_s = state.scaling_of(app).keep_alive_s if box.used_s != NEVER else 10.0
                idle_s = 0.0 if box.in_flight else world.now_s - max(box.used_s, box.started_s)
                if not gave_way and idle_s < keep_s - 1.0 and box.runner.id in self._told_idle(leader, node):
                    self.fail("served-stop", f"{runner.id} leaves ({why}), it has been idle for {idle_s:.1f} s")
        if runner.goal is Goal.STOP and box is not None and box.serves and node.up and box.in_flight:
            allowed = ("deadline", "force", "op", "deleted", "aborted", "replaced: GPU")
            if not any(word in why for word in allowed):
                self.fail("served-stop", f"{runner.id} is stopped with {box.in_flight} requests under way: {why}")
        if "reached its deadline" in why:
            drain = state.nodes[runner.node].drain
            assert drain is not None
            margin_s = NOTICE_MARGIN_S if drain.kind in ("spot", "notice") else 0.0
            deadlines = [drain.deadline_at_s - margin_s] if drain.deadline_at_s else []
            deadlines += [drain.notice_at_s - NOTICE_MARGIN_S] if drain.notice_at_s else []
            if leader.wall_s < min(deadlines, default=0.0) - 0.5 and not drain.force:
                self.fail("served-stop", f"{runner.id} is stopped before the deadline of its node's drain")

    def _told_idle(self, leader: Leader, node: FleetNode) -> dict[str, Box]:
        """Containers of which the leader knows what there is to know."""
        if not node.connected or leader.inbox or node.changed:
            return {}
        return node.boxes

    def _share(self, leader: Leader, app_id: str, runners: list[Runner]) -> None:
        """So many of an app's runners at once, where nothing forces more."""
        state = leader.state
        app = state.apps.get(app_id)
        gentle = [one for one in runners if self._gentle(leader, one)]
        if app is None or not gentle or (app.rollout is not None and app.rollout.phase == RECREATING):
            return
        mine = [state.runners[id_] for id_ in state.runners_by_app.get(app_id, ())]
        leaving = [one for one in mine if one.node and one.goal > Goal.RUN and not _unused(one)]
        silent = [one for one in mine if one.node and one.goal is Goal.RUN and _silent(leader, one.node)]
        have = len(mine)
        most = max(1, have * state.revision_of(app).spec.rollout.disturbed_perc // 100)
        self.counts["share checked"] += 1
        if len(leaving) + len(silent) > most:
            what = f"{app_id}: {len(leaving)} leave and {len(silent)} are silent of {have}, {most} may be disturbed"
            self.fail("share", f"{what} ({gentle[0].id}: {gentle[0].goal_reason})")

    def _gentle(self, leader: Leader, runner: Runner) -> bool:
        why = runner.goal_reason
        if runner.goal is not Goal.DRAIN:
            return False
        by_revision = why.startswith("replaced by revision")
        return "is drained" in why or why.startswith(PREEMPTED) or (by_revision and self._rolls(leader, runner.app))

    def _rolls(self, leader: Leader, app_id: str) -> bool:
        app = leader.state.apps.get(app_id)
        return app is not None and app.rollout is not None

    def _quota_kept(self, leader: Leader, runners: list[Runner]) -> None:
        """Nobody is preempted below what their team is promised."""
        state = leader.state
        victims = [one for one in runners if one.goal_reason.startswith(PREEMPTED)]
        for team in sorted({team_of(one.app) for one in victims}):
            self.counts["preempted"] += 1
            quota = state.quotas.get(team)
            if quota is None:
                continue
            left = 0
            for one in state.runners.values():
                if team_of(one.app) == team and one.node and not one.goal_reason.startswith(PREEMPTED):
                    left += _milli(one)
            if left < quota.gpu_milli:
                who = ", ".join(one.id for one in victims)
                self.fail("quota", f"{who} preempted: {team} is left with {left} of its quota of {quota.gpu_milli}")

    def _promises(self, leader: Leader, node_id: str) -> None:
        """By records alone: what is promised of a node exists and is promised once."""
        state, node = leader.state, self.world.nodes[node_id]
        holders: dict[str, list[Runner]] = {}
        memory = 0
        for runner_id in state.runners_by_node.get(node_id, ()):
            runner = state.runners[runner_id]
            memory += runner.memory_bytes
            for gpu in runner.gpus:
                holders.setdefault(gpu, []).append(runner)
        for gpu, runners in holders.items():
            if len(runners) > 1 and not may_share(runners[0], runners[1:]):
                self.fail("promised-once", f"{gpu} is promised to {', '.join(one.id for one in runners)}")
        if memory > node.inventory.memory_bytes:
            self.fail("reservation", f"{node_id} has promised {memory} bytes")

    # --- what is logged ---------------------------------------------------------------------------------------------

    def logged(self, leader: Leader, event: Logged) -> None:
        """A judgement about a node must be true."""
        self.counts[event.kind] += 1
        self.world.trace(f"   {event.kind} {event.subject}: {event.message}")
        if event.kind == "MASS_STOP":
            self.world.faults.mass_stop()
        if event.kind not in ("NODE_UNKNOWN", "NODE_LOST"):
            return
        silent_s = leader.silent_s(event.subject)
        limit_s = UNKNOWN_AFTER_S if event.kind == "NODE_UNKNOWN" else LOST_AFTER_S
        if silent_s < limit_s - 0.01 and not leader.unacknowledged and not leader.waits:
            self.fail("silence", f"{event.kind} {event.subject}, which was silent for {silent_s:.1f} s")
        if event.kind == "NODE_LOST":
            ids = [node_id for node_id in leader.state.nodes if node_id in leader.state.live]
            if all(leader.silent_s(node_id) > UNKNOWN_AFTER_S for node_id in ids):
                self.fail("all-silent", f"{event.subject} counts as lost although every node is silent")
            if self.world.faults.reached_as_told(leader, event.subject) and silent_s < 120.0:
                self.fail("silence", f"{event.subject} counts as lost although gateways reach it")

    # --- machines ---------------------------------------------------------------------------------------------------

    def started(self, node: FleetNode, box: Box) -> None:
        """A container was admitted."""
        self.counts["starts"] += 1
        runner = box.runner
        assert runner.assignment is not None
        homes = self.world.homes.get(runner.id, {})
        if len(homes) > 1:
            self.fail("runner-once", f"{runner.id} starts on {node.id} and lives on {', '.join(homes)}")
        for gpu in runner.gpus:
            others = [one.runner for one in node.live() if gpu in one.status.gpus and one is not box]
            if not may_share(runner, others):
                self.fail("gpu-once", f"{runner.id} starts on {gpu} of {others[0].id}")
        if runner.assignment.term < 1 or node.term_seen > self.world.store.term:
            self.fail(
                "older-term", f"{node.id} has seen term {node.term_seen}, the store is at {self.world.store.term}"
            )

    def ended(self, node: FleetNode, box: Box, reason: str) -> None:
        """A container is about to end: what it used is known for good."""
        self.counts["ends"] += 1
        assert box.runner.assignment is not None
        self.spent[box.runner.assignment.id] = Spent(box.gpu_seconds(self.world.now_s) * _share_of(box.runner), True)

    # --- everything -------------------------------------------------------------------------------------------------

    def everything(self) -> None:
        """All machines, all records, all that is said about them."""
        leader = self.world.leader
        if leader is None:
            return
        self.counts["everything"] += 1
        state = leader.state
        for found in invariants.audit(state):
            for violation in found:
                self.fail("audit", f"{violation.rule}: {violation.message}")
        for node in self.world.nodes.values():
            self._machine(node)
            self._promises(leader, node.id)
        for runner in state.runners.values():
            phase = runner_phase(state, runner)
            if not phase.reason and phase.state not in (RunnerState.IDLE, RunnerState.RUNNING):
                self.fail("reason", f"{runner.id} is {phase.state.name} and nobody says why")
        for kind, subject in state.alarms:
            if kind in ("INVARIANT", "STORE_OLDER", "CLONE", "FOREIGN_NODE"):
                self.fail("alarm", f"{kind} {subject}: {state.alarms[kind, subject].message}")
        self._predictions(leader)
        self._rolled_back(leader)
        self._seen(leader)
        self._held(leader)
        self._starved(leader)

    def _machine(self, node: FleetNode) -> None:
        holders: dict[str, list[Runner]] = {}
        for box in node.live():
            for gpu in box.status.gpus:
                holders.setdefault(gpu, []).append(box.runner)
        for gpu, runners in holders.items():
            if len(runners) > 1 and not may_share(runners[0], runners[1:]):
                self.fail("gpu-once", f"{gpu} is under {', '.join(one.id for one in runners)}")

    def _predictions(self, leader: Leader) -> None:
        """Every part of every prediction is a time."""
        for runner_id, made in leader.state.predictions.items():
            for term in made.prediction.terms:
                if term.ms < 0:
                    self.fail("negative", f"{runner_id}: {term.name} is predicted to take {term.ms} ms")
        for family, have in leader.state.learning.families.items():
            for x in (0, 1000, 1_000_000):
                if have.points and have.line.at(x) < 0:
                    self.fail("negative", f"{family} at {x} is {have.line.at(x)}")

    def _rolled_back(self, leader: Leader) -> None:
        """A revision that failed often enough does not go on."""
        state = leader.state
        for app_id in state.rolling:
            app = state.apps[app_id]
            rollout, policy = app.rollout, state.revision_of(app).spec.rollout
            if rollout is None or rollout.paused or not policy.rollback or app_id in state.dirty:
                continue
            failed = rollout.failures >= ROLLOUT_FAILURES_MAX and rollout.phase != ROLLING_BACK
            if failed and (app_id, rollout.from_revision) in state.revisions:
                self.fail("rollback", f"revision {app.revision} of {app_id} failed {rollout.failures} times")

    def _seen(self, leader: Leader) -> None:
        """A silent node is seen as such in time."""
        if leader.deaf or leader.inbox or leader.waits or not leader.state.settled:
            return
        for node in self.world.silent():
            live = leader.state.live.get(node.id)
            if live is None or live.health is not Health.READY or node.id not in leader.state.nodes:
                continue
            # A stall that was counted after the node's last word was read is taken off its silence, whenever it was.
            silent_s = leader.silent_s(node.id) - (leader.state.stall_total_s - live.stall_at_heard_s)
            if silent_s > SEEN_WITHIN_S and leader.last_tick_s > self.world.now_s - 1.0:
                self.fail("unseen", f"{node.id} has been silent for {silent_s:.1f} s and counts as ready")

    def _held(self, leader: Leader) -> None:
        """What teams hold is counted right."""
        held: Counter[str] = Counter()
        for runner in leader.state.runners.values():
            held[team_of(runner.app)] += _milli(runner)
        counted = {team: milli for team, milli in leader.state.held_milli.items() if milli}
        if counted != {team: milli for team, milli in held.items() if milli}:
            self.fail("quota", f"teams hold {dict(held)}, counted are {counted}")

    def _starved(self, leader: Leader) -> None:
        """Nobody waits for long where a machine has room: what grew woke whom it concerns."""
        state = leader.state
        if leader.unacknowledged or leader.inbox or state.dirty or not state.settled:
            return
        for need in state.waiting.asleep:
            app_id = state.waiting.by_need[need][0][1]
            app = state.apps.get(app_id)
            if app is None or state.waiting.asleep[need] != "place" or state.freed or state.freed_all:
                continue
            if any(not state.runners[id_].node for id_ in state.runners_by_app.get(app_id, ())):
                self.counts["asleep looked at"] += 1
                node_id = self._room(leader, app_id)
                if node_id:
                    self.fail("starved", f"{app_id} sleeps in the queue, and {node_id} has room")

    def _room(self, leader: Leader, app_id: str) -> str:
        """A node that could take one more runner of the app by records and what nodes told; empty: none."""
        state = leader.state
        spec = state.revision_of(state.apps[app_id]).spec
        team = team_of(app_id)
        for node_id, node in state.nodes.items():
            live = state.live.get(node_id)
            if live is None or live.inventory is None or live.health is not Health.READY or live.hold or live.orphans:
                continue
            if node.cordoned or state.reserved.get(node_id, app_id) != app_id:
                continue
            used: dict[str, int] = {}
            teams: dict[str, set[str]] = {}
            memory = cpu = 0
            for id_ in state.runners_by_node.get(node_id, ()):
                runner = state.runners[id_]
                memory, cpu = memory + runner.memory_bytes, cpu + runner.cpu_milli
                for gpu in runner.gpus:
                    used[gpu] = used.get(gpu, 0) + (runner.gpu_milli or 1000)
                    teams.setdefault(gpu, set()).add(team_of(runner.app) if runner.gpu_milli else "")
            free = 0
            for one in live.inventory.gpus:
                well = one.healthy and one.id not in node.quarantined_gpus
                right = not spec.machine_type or one.model in spec.machine_type
                fits = used.get(one.id, 0) + (spec.gpu_milli or 1000) <= 1000 and teams.get(one.id, {team}) == {team}
                free += well and right and fits
            inventory = live.inventory
            fits_cpu = cpu + spec.resources.cpu_milli <= inventory.cpu_milli
            if free >= spec.num_gpus and fits_cpu and memory + spec.resources.memory_bytes <= inventory.memory_bytes:
                return node_id
        return ""

    # --- after a calm -----------------------------------------------------------------------------------------------

    def at_rest(self) -> None:
        """Everything has healed and had time: nothing is left to do."""
        leader = self.world.leader
        assert leader is not None
        leader.hear()
        self.counts["rests"] += 1
        found = [*self._nodes_rest(leader), *self._apps_rest(leader)]
        if found:
            self.fail("rest", "; ".join(found[:5]))
        self._ledger(leader)

    def _nodes_rest(self, leader: Leader) -> list[str]:
        state, found = leader.state, []
        for node in self.world.nodes.values():
            if state.health_of(node.id) is not Health.READY:
                found.append(f"{node.id} is {state.health_of(node.id)}")
            records = state.runners_by_node.get(node.id, {})
            real = {box.runner.id for box in node.live()}
            if real != set(records):
                found.append(f"{node.id} runs {sorted(real - set(records))} more, lacks {sorted(set(records) - real)}")
        found += [f"{node_id} is still drained" for node_id in state.draining]
        found += [f"{runner_id} on {node_id} is an orphan" for node_id, runner_id in state.orphans]
        return found

    def _apps_rest(self, leader: Leader) -> list[str]:
        state, found = leader.state, []
        for app_id, record in state.apps.items():
            app = self.world.apps.get(app_id)
            if app is None or record.deleting:
                found.append(f"{app_id} is still being deleted")
                continue
            version = int(state.revision_of(record).spec.env["V"])
            if record.rollout is not None and not self._blocked(leader, app_id):
                found.append(f"the rollout of {app_id} is still {record.rollout.phase}")
            scaling = state.scaling_of(record)
            wanted = min(
                scaling.max_concurrency, max(scaling.min_concurrency, -(-app.level // scaling.max_multiplexing))
            )
            serving = [box for box in app.boxes.values() if box.serves and box.goal is Goal.RUN]
            starting = [box for box in app.boxes.values() if not box.serves]
            lately = self.world.now_s - app.changed_s < 300.0
            backing_off = app_id in state.backoffs and leader.now_s < state.backoffs[app_id].until_s
            patient = lately or starting or backing_off or version in app.bad
            if len(serving) < wanted and not patient and (room := self._may_run(leader, app_id)):
                found.append(f"{app_id} has {len(serving)} serving of {wanted}, and {room} has room")
        return found

    def _blocked(self, leader: Leader, app_id: str) -> bool:
        """Whether it waits for a place that there is not, or for a backoff."""
        state = leader.state
        backing_off = app_id in state.backoffs and leader.now_s < state.backoffs[app_id].until_s
        unplaced = any(not state.runners[id_].node for id_ in state.runners_by_app.get(app_id, ()))
        rollout = state.apps[app_id].rollout
        began_s = max(rollout.began_at_s, rollout.phase_at_s, rollout.progress_at_s) if rollout is not None else 0.0
        fresh = rollout is not None and leader.wall_s - began_s < 900.0
        return backing_off or unplaced or fresh

    def _may_run(self, leader: Leader, app_id: str) -> str:
        """A node with room, where the team's quota does not stand in the way."""
        state, team = leader.state, team_of(app_id)
        if team in state.quotas:
            quota, held = (
                state.quotas[team],
                sum(_milli(one) for one in state.runners.values() if team_of(one.app) == team),
            )
            if held + 2000 > quota.gpu_milli:
                return ""
        return self._room(leader, app_id)

    def _ledger(self, leader: Leader) -> None:
        """Nothing is counted twice; of what ended and was told nothing is missing."""
        state = leader.state
        spent = dict(self.spent)
        for node in self.world.nodes.values():
            for box in node.live():
                assert box.runner.assignment is not None
                real = box.gpu_seconds(self.world.now_s) * _share_of(box.runner)
                spent[box.runner.assignment.id] = Spent(real)
        total = folded = 0.0
        for usage in state.usage.values():
            real = spent.get(usage.assignment, Spent()).gpu_ms
            total += usage.gpu_ms
            if usage.gpu_ms > real + LEDGER_SLACK_MS:
                self.fail(
                    "ledger", f"{usage.assignment} of {usage.runner} is billed {usage.gpu_ms} ms, used {real:.0f}"
                )
        folded = sum(row.gpu_ms for day in state.usage_days.values() for row in day.rows)
        ended = sum(one.gpu_ms for one in spent.values() if one.ended)
        running = sum(one.gpu_ms for one in spent.values() if not one.ended)
        self.counts["ledger checked"] += 1
        if total + folded > ended + running + LEDGER_SLACK_MS * (1 + len(spent)) * 0.01:
            self.fail("ledger", f"{total + folded:.0f} ms are billed, {ended + running:.0f} were used")
        if total + folded < ended * 0.95:
            self.fail("ledger", f"{total + folded:.0f} ms are billed, {ended:.0f} were used by what ended")


def _share_of(runner: Runner) -> float:
    """GPU milliseconds for each second of a GPU that it holds."""
    return float(runner.gpu_milli or 1000)


def _milli(runner: Runner) -> int:
    return len(runner.gpus) * (runner.gpu_milli or 1000)


def _unused(runner: Runner) -> bool:
    """Whether it leaves because fewer are wanted, or before it served: that disturbs nobody."""
    why = runner.goal_reason
    if runner.goal is Goal.STOP and why.startswith("replaced by revision"):  # it was starting: who served is drained
        return True
    return why.startswith(IDLE) or any(words in why for words in (" should have ", "stood in for", "started elsewhere"))


def _silent(leader: Leader, node_id: str) -> bool:
    live = leader.state.live.get(node_id)
    return live is not None and live.health in (Health.UNKNOWN, Health.LOST)


__all__ = ["FleetChecker", "Spent"]
