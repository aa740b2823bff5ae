"""What must hold whatever happens, judged from outside: by machines, messages and commits, not by the code's own word.

`Checker` is told of every container, message and commit, and remembers the first rules broken. What a message touched
is checked after it, everything after every hundredth. `unsettled` is the question asked after healing: what is
still not as it should be?
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fal_agent.core.assignments import Complete, Delta
from fal_agent.core.tasks import Task
from fal_contract.limits import LOST_AFTER_S
from fal_contract.v1 import agent_pb2, state_pb2
from fal_scheduler.codec import decode
from fal_scheduler.core import invariants
from fal_scheduler.core.events import Effect, Logged
from fal_scheduler.core.liveness import UNKNOWN_AFTER_S
from fal_scheduler.core.records import Goal, Runner, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.views import runner_phase, wanted
from fal_scheduler.leadership import Leadership
from sim.host import Host
from sim.network import Stream
from sim.schedulers import Scheduler, SchedulerHooks

FULL_EVERY: Final = 100  # messages
TRACE_MAX: Final = 400
HEARD_MAX: Final = 50  # messages of one node
# Alarms that a cluster on its own store never raises, whatever the weather.
SUSPICIONS: Final = ("CLONE", "FOREIGN_NODE", "STORE_NEW", "STORE_FOREIGN", "STORE_OLDER")


@dataclass(slots=True)
class Wish:
    """One command about an app. It may take effect from `asked_s` until `done_s`; a failed one may have done so too."""

    kind: str  # "apply", "scale", "delete"
    wanted: int
    asked_s: float
    done_s: float = float("inf")


@dataclass
class Excuses:
    """Why a healthy container may be stopped."""

    runners: set[str] = field(default_factory=set)  # a command named them
    wishes: dict[str, list[Wish]] = field(default_factory=dict)  # by app
    lost: set[str] = field(default_factory=set)  # apps of which a lost node's or wounded runners were replaced
    orphans: bool = False  # an operator settled orphans

    def of(self, runner_id: str, app: str, born_s: float) -> str:
        """The excuse, or nothing."""
        if runner_id in self.runners:
            return "a command stops it"
        if app in self.lost:
            return "its app was replaced after a loss"
        if self.orphans:
            return "orphans were settled"
        most = 0
        for wish in self.wishes.get(app, ()):
            if wish.done_s >= born_s and (wish.kind != "scale" or wish.wanted < most):
                return f"{wish.kind} at {wish.asked_s:.1f}"
            most = max(most, wish.wanted)
        return ""


class Checker(SchedulerHooks):
    """See the module. `broken` fills at the first violation; the cluster then stops."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.schedulers: list[Scheduler] = []
        self.broken: list[str] = []
        self.excuses = Excuses()
        self.restored = False  # an older store was put in place: suspicion is right
        self.messages = 0
        self.counts: dict[str, int] = {}
        self.trace: deque[str] = deque(maxlen=TRACE_MAX)
        self.recordings: dict[str, dict[int, list[bytes]]] = {}  # node -> term -> what its session was sent
        self._committed: set[tuple[str, str, int]] = set()  # (runner, assignment, goal) that was ever durable
        self._born_s: dict[str, float] = {}  # runner -> first commit
        self._app_of: dict[str, str] = {}
        self._heard_s: dict[tuple[str, str], deque[float]] = {}
        self._began_s: dict[str, float] = {}

    def note(self, text: str) -> None:
        """Keep a line for whoever repeats this seed."""
        self.trace.append(f"{_now_s():9.3f} {text}")

    def fail(self, rule: str, text: str) -> None:
        """A rule is broken."""
        self.note(f"BROKEN {rule}: {text}")
        self.broken.append(f"{rule}: {text}")

    def count(self, what: str) -> None:
        """Of things that happened, so that a test can say what it saw."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def wounded(self, runner_id: str) -> None:
        """The monitor of its container died. It, or after an agent's restart its replacement, may be drained."""
        self.excuses.lost.add(self._app_of.get(runner_id, ""))

    # ---- the store

    def committed(self, key: str, value: bytes) -> None:
        """The backend took a record."""
        if "/runner/" not in key:
            return
        record = decode(key, value)
        assert isinstance(record, Runner)
        self._born_s.setdefault(record.id, _now_s())
        self._app_of[record.id] = record.app
        if record.assignment is not None:
            self._committed.add((record.id, record.assignment.id, int(record.goal)))

    # ---- schedulers

    def term_began(self, scheduler: Scheduler, leadership: Leadership) -> None:
        """See SchedulerHooks."""
        self.note(f"{scheduler.name} leads term {leadership.view.term}")
        self.count("terms")
        self._began_s[scheduler.name] = _now_s()
        leadership.engine.subscribe(lambda effect: self._effect(scheduler, leadership.view, effect))

    def _effect(self, scheduler: Scheduler, view: State, effect: Effect) -> None:
        if not isinstance(effect, Logged):
            return
        self.note(f"{scheduler.name} logs {effect.kind} {effect.subject}: {effect.message}")
        limit_s = {"NODE_LOST": LOST_AFTER_S, "NODE_UNKNOWN": UNKNOWN_AFTER_S}
        if effect.kind in limit_s:
            self.count(effect.kind)
            silent_s = self._longest_silence(scheduler.name, effect.subject)
            if silent_s < limit_s[effect.kind] - 0.5:  # deadlines are judged by ticks
                self.fail("silence", f"{effect.kind} {effect.subject}, silent for {silent_s:.1f} s at most")
        if effect.kind == "NODE_LOST":
            for runner_id in view.runners_by_node.get(effect.subject, ()):
                self.excuses.lost.add(view.runners[runner_id].app)

    def _longest_silence(self, scheduler: str, node_id: str) -> float:
        """Of this term's. A judgement may wait for a stalled store, so it need not be the silence that lasts."""
        heard = [at_s for at_s in self._heard_s.get((scheduler, node_id), ()) if at_s >= self._began_s[scheduler]]
        marks = [self._began_s[scheduler], *heard, _now_s()]
        return max(later - earlier for earlier, later in itertools.pairwise(marks))

    def heard(self, scheduler: Scheduler, node_id: str) -> None:
        """See SchedulerHooks."""
        self._heard_s.setdefault((scheduler.name, node_id), deque(maxlen=HEARD_MAX)).append(_now_s())

    def sent(self, scheduler: Scheduler, stream: Stream, message: agent_pb2.SchedulerMessage) -> None:
        """Only what is durable is told, and no GPU is promised under a container that still holds it."""
        self._record(scheduler, stream.node, message)
        kind = message.WhichOneof("kind")
        if kind not in ("complete", "delta"):
            return
        put = message.complete.assignments if kind == "complete" else message.delta.put
        _chain(stream, message)
        live = self.hosts[stream.node].live()
        for assignment in put:
            if (assignment.runner_id, assignment.id, assignment.goal) not in self._committed:
                what = f"{assignment.runner_id} goal {assignment.goal}"
                self.fail("durable-first", f"{scheduler.name} told {stream.node} of {what} before its commit")
            leadership = scheduler.leadership
            withdrawn = leadership is not None and assignment.runner_id not in leadership.view.runners
            if assignment.goal != state_pb2.GOAL_RUN or withdrawn:  # the drop is on its way to the store
                continue
            for other, gpus in live.items():
                if other != assignment.runner_id and set(gpus) & set(assignment.gpus):
                    text = f"{assignment.runner_id} was promised GPUs of {other}, which runs on {stream.node}"
                    self.fail("promised-once", text)

    def _record(self, scheduler: Scheduler, node_id: str, message: agent_pb2.SchedulerMessage) -> None:
        """Keep what this session was sent, for ghosts."""
        leadership = scheduler.leadership
        term = leadership.view.term if leadership is not None else 0
        tape = self.recordings.setdefault(node_id, {})
        if message.HasField("welcome"):
            tape[message.welcome.term] = []
        if term in tape:
            tape[term].append(message.SerializeToString())

    def processed(self, node_id: str) -> None:
        """See SchedulerHooks. What a message touched is checked after it; everything now and then."""
        self.messages += 1
        leader = self.leader()
        if leader is not None:
            self._promises(leader.view, node_id)
        self._machine(self.hosts[node_id])
        if self.messages % FULL_EVERY == 0:
            self.everything()

    # ---- machines

    def container_started(self, host: Host, runner_id: str, gpus: tuple[str, ...]) -> None:
        """See Watcher."""
        self.note(f"{host.node_id} starts {runner_id} on {','.join(gpus) or 'no GPU'}")
        self.count("starts")
        for other in self.hosts.values():
            live = other.live()
            if runner_id in live:
                self.fail("runner-once", f"{runner_id} starts on {host.node_id} and runs on {other.node_id}")
            for held_by, held in live.items() if other is host else ():
                if set(held) & set(gpus):
                    self.fail("gpu-once", f"{runner_id} starts on GPUs of {held_by} on {host.node_id}")

    def container_stopped(self, host: Host, runner_id: str, *, ready: bool) -> None:
        """See Watcher."""
        self.note(f"{host.node_id} stops {runner_id}{' (ready)' if ready else ''}")
        self.count("stops")
        if not ready:
            return
        excuse = self.excuses.of(runner_id, self._app_of.get(runner_id, ""), self._born_s.get(runner_id, 0.0))
        if not excuse:
            self.fail("no-idle-stop", f"{runner_id} served on {host.node_id} and was stopped, nobody asked for it")

    def took_in(self, host: Host, message: Complete | Delta, before: dict[str, Task], after: dict[str, Task]) -> None:
        """See Watcher: nothing older than what was seen has an effect, nothing is admitted on a GPU that is not free,
        and the set that is held is the one that was sent."""
        fresh = [task for id, task in after.items() if task.live and (id not in before or not before[id].live)]
        if message.term < host.term_seen:
            raised = [id for id, task in after.items() if id in before and task.goal > before[id].goal]
            for id in [*(task.runner_id for task in fresh), *raised]:
                text = f"{host.node_id} obeyed term {message.term} for {id}, it had seen {host.term_seen}"
                self.fail("older-term", text)
        host.term_seen = max(host.term_seen, message.term)
        if host.stream is not None and host.node is not None:
            meant = host.stream.sets.get(message.revision)
            held = {id: (one.id, int(one.goal)) for id, one in host.node._set.by_runner.items()}
            if held != meant:
                self.fail("same-set", f"{host.node_id} holds {held} at revision {message.revision}, sent was {meant}")
        for task in fresh:
            for gpu in task.assignment.gpus:
                if host.sick_since_s.get(gpu, float("inf")) < _now_s() - 0.1:
                    self.fail("admission", f"{host.node_id} admitted {task.runner_id} on {gpu}, which is not free")
                for other in after.values():
                    if other.live and other.runner_id != task.runner_id and gpu in other.assignment.gpus:
                        text = f"{host.node_id} admitted {task.runner_id} on {gpu} of {other.runner_id}"
                        self.fail("admission", text)

    def _machine(self, host: Host) -> None:
        """No GPU under two containers."""
        holder: dict[str, str] = {}
        for runner_id, gpus in host.live().items():
            for gpu in gpus:
                if gpu in holder:
                    self.fail("gpu-once", f"{gpu} of {host.node_id} is under {holder[gpu]} and {runner_id}")
                holder[gpu] = runner_id

    def _promises(self, view: State, node_id: str) -> None:
        """No GPU promised to two records."""
        holder: dict[str, str] = {}
        for runner_id in view.runners_by_node.get(node_id, ()):
            for gpu in view.runners[runner_id].gpus:
                if gpu in holder:
                    self.fail("promised-once", f"{gpu} of {node_id} is promised to {holder[gpu]} and {runner_id}")
                holder[gpu] = runner_id

    # ---- everything

    def leader(self) -> Leadership | None:
        """Of those who believe that they lead, the one of the highest term."""
        leading = [term for scheduler in self.schedulers if (term := scheduler.leadership) is not None]
        return max(leading, key=lambda leadership: leadership.view.term, default=None)

    def everything(self) -> None:
        """All machines, all records, the core's own audit, alarms, processes."""
        for host in self.hosts.values():
            self._machine(host)
        seen: dict[str, str] = {}
        for host in self.hosts.values():
            for runner_id in host.live():
                if runner_id in seen:
                    self.fail("runner-once", f"{runner_id} runs on {seen[runner_id]} and {host.node_id}")
                seen[runner_id] = host.node_id
        for process in [one.process for one in (*self.schedulers, *self.hosts.values()) if one.process is not None]:
            for crash in process.crashes:
                self.fail("crash", crash)
        for scheduler in self.schedulers:
            if scheduler.failed is not None:
                self.fail("scheduler", f"{scheduler.name} ended by itself: {scheduler.failed!r}")
        leader = self.leader()
        if leader is None:
            return
        for node_id in leader.view.nodes:
            self._promises(leader.view, node_id)
        for found in invariants.audit(leader.view):
            for violation in found:
                self.fail(violation.rule, violation.message)
        for kind, subject in leader.view.alarms:
            if kind == "INVARIANT" or (kind in SUSPICIONS and not self.restored):
                self.fail("alarm", f"{kind} {subject}: {leader.view.alarms[kind, subject].message}")

    # ---- after healing

    def unsettled(self, *, exactly: bool) -> list[str]:
        """What is not as it should be; `exactly`: surplus runners count too."""
        leader = self.leader()
        if leader is None or not leader.view.settled:
            return ["nobody leads"]
        found = [*self._standing(leader), *self._apps(leader.view, exactly=exactly), *self._reservations(leader.view)]
        if not found:
            found += self._agreed(leader)
        return found

    def _standing(self, leader: Leadership) -> Iterator[str]:
        view = leader.view
        if view.hold_all:
            yield f"the store is suspected: {view.hold_all}"
        for node_id in self.hosts:
            if view.health_of(node_id) != "ready" or view.live[node_id].hold:
                yield f"{node_id} is {view.health_of(node_id)}"
        for node_id, runner_id in view.orphans:
            yield f"{runner_id} on {node_id} is an orphan"

    def _apps(self, view: State, *, exactly: bool) -> Iterator[str]:
        serving = {id for host in self.hosts.values() for id in host.serving()}
        for app in view.apps.values():
            if app.deleting:
                yield f"{app.id} is still being deleted"
                continue
            runners = [view.runners[id] for id in view.runners_by_app.get(app.id, ())]
            for runner in runners:
                phase = runner_phase(view, runner)
                if not phase.reason and runner.id not in serving:
                    yield f"{runner.id} does not run and has no reason"
            ready = [r for r in runners if r.id in serving and r.goal is Goal.RUN and r.revision == app.revision]
            missing = wanted(view, app) - len(ready)
            if missing > 0 and self._fits(view, view.revision_of(app).spec):
                yield f"{app.id} has {len(ready)} ready of {wanted(view, app)}, and there is room"
            elif exactly and missing < 0:
                yield f"{app.id} has {len(ready)} ready, it should have {wanted(view, app)}"

    def _fits(self, view: State, spec: Spec) -> bool:
        """Whether some machine has room for one more, by what really runs there."""
        for host in self.hosts.values():
            if view.nodes[host.node_id].cordoned or host.gpu_model not in (spec.machine_type or (host.gpu_model,)):
                continue
            held = {gpu for gpus in host.live().values() for gpu in gpus}
            memory = sum(view.runners[id].memory_bytes for id in host.live() if id in view.runners)
            roomy = host.hardware.memory_bytes - memory >= spec.resources.memory_bytes
            if roomy and host.gpus - len(held) >= spec.num_gpus:
                return True
        return False

    def _reservations(self, view: State) -> Iterator[str]:
        """Records and containers say the same."""
        for host in self.hosts.values():
            real, records = host.live(), view.runners_by_node.get(host.node_id, {})
            for runner_id in real.keys() - records.keys():
                yield f"{runner_id} runs on {host.node_id} and has no record"
            for runner_id in records.keys() - real.keys():
                phase = runner_phase(view, view.runners[runner_id])
                yield f"{runner_id} has a record on {host.node_id} and does not run: {phase}"
            occupancy = view.fleet.occupancy.get(host.node_id)
            held = dict(occupancy.gpus) if occupancy is not None else {}
            expected = {gpu: runner_id for runner_id, gpus in real.items() for gpu in gpus}
            if held != expected:
                yield f"on {host.node_id} the scheduler believes held {held}, really held are {expected}"

    def _agreed(self, leader: Leadership) -> Iterator[str]:
        """Every agent holds exactly the set that the scheduler believes it to hold."""
        for host in self.hosts.values():
            meant = {r.id: int(r.goal) for r in leader.engine.assignments(host.node_id)}  # type: ignore[attr-defined]
            held = {id: int(a.goal) for id, a in host.node._set.by_runner.items()} if host.node is not None else {}
            if held != meant:
                yield f"{host.node_id} holds the set {held}, the scheduler means {meant}"


def _chain(stream: Stream, message: agent_pb2.SchedulerMessage) -> None:
    """What the node holds after this message, if it takes in every one before."""
    if message.HasField("complete"):
        complete = message.complete
        stream.sets[complete.revision] = {a.runner_id: (a.id, int(a.goal)) for a in complete.assignments}
    else:
        delta = message.delta
        kept = {id: one for id, one in stream.sets[delta.base].items() if id not in delta.drop}
        stream.sets[delta.revision] = kept | {a.runner_id: (a.id, int(a.goal)) for a in delta.put}


def _now_s() -> float:
    return asyncio.get_running_loop().time()
