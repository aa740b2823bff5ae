"""Sessions of node agents: what a node tells becomes news for the engine, what the engine decides goes down to it.

One session per node, the newest: whoever says hello for a node takes its place, and the core tells a reboot from a
clone. Down goes Welcome, then the whole assignment set, then deltas chained by revision, at most one in 25 ms. What
waits to go down is a set of runner ids (so it cannot grow) and a short queue of other messages; a full queue or a
send that takes too long ends the session, and the agent starts over. Up, a missing sequence number ends the session;
a repeated one is ignored.

Transport-free: `run` is given an async iterator and a send function, so that a simulation drives this very code.
Only durable assignments are sent (`EnginePort.assignments`). Must not decide anything about runners.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import DELTA_WINDOW_S, HEARTBEAT_INTERVAL_S, STREAM_QUEUE_MESSAGES_MAX
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2
from fal_contract.versions import agree, shared_features
from fal_scheduler import wire
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.assignments import AssignmentBuilder
from fal_scheduler.core.bindings import shared
from fal_scheduler.core.events import (
    AssignmentChanged,
    Effect,
    HelloNeeded,
    Logged,
    NodeChanged,
    NodeDisconnected,
    Revoked,
)
from fal_scheduler.core.node_events import RebootDue
from fal_scheduler.core.records import Goal, Runner
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.exec_streams import ExecStreams
from fal_scheduler.gpu_orders import GpuOrders
from fal_scheduler.leading_edge import LeadingEdge
from fal_scheduler.log_streams import LogStreams
from fal_scheduler.session_messages import hello_in, take_chunk
from fal_scheduler.stream_edges import first_message, send_bounded, too_slow, until_first

SKEW_MAX_S: Final = 30.0
SET_LAG_MAX_S: Final = 15.0  # a node that has not taken in what was sent so long ago has missed it
STUCK_RETRY_S: Final = 1.0  # a runner whose manifest is not there yet

Send = Callable[[agent_pb2.SchedulerMessage], Awaitable[None]]
_Told = tuple[str, int, Goal, str, tuple[str, ...]]  # assignment id, its term, goal, app, ids of residencies

_log = get_logger("scheduler.sessions")


@dataclass(eq=False)
class _Session:
    """One open stream. `told` is what the node holds if all went well, by runner."""

    id: str
    node_id: str
    signal: LeadingEdge
    closed: asyncio.Future[FalError]
    told: dict[str, _Told] = field(default_factory=dict)
    dirty: dict[str, None] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)
    resync: bool = False
    ready: bool = False  # Complete has been sent
    welcomed: tuple[object, ...] = ()  # of which cluster life Welcome told
    revision: int = 0
    revised_at_s: float = 0.0  # when this revision was sent
    control: deque[agent_pb2.SchedulerMessage] = field(default_factory=deque)

    def close(self, error: FalError) -> None:
        """End the session with `error`; the first reason stands."""
        if not self.closed.done():
            self.closed.set_result(error)


class AgentSessions:
    """All sessions of one leader. Make a new one for each term; `close` ends all of them."""

    def __init__(
        self,
        engine: EnginePort,
        builder: AssignmentBuilder,
        *,
        clock: Clock,
        alarms: EdgeAlarms,
        note: Callable[[Logged], None],
        new_id: Callable[[], str],
    ) -> None:
        self._engine = engine
        self._builder = builder
        self._clock = clock
        self._alarms = alarms
        self._note = note
        self._new_id = new_id
        self._sessions: dict[str, _Session] = {}
        self._gateways: Callable[[str], agent_pb2.GatewaySet] = lambda node_id: agent_pb2.GatewaySet()
        self.logs = LogStreams(self.push)
        self.execs = ExecStreams(self.push, self.backlog)
        self.gpu_orders = GpuOrders(self.push)
        self._unsubscribe = engine.subscribe(self._on_effect)

    # --- one stream -------------------------------------------------------------------------------------------------

    async def run(self, peer_name: str, incoming: AsyncIterator[agent_pb2.AgentMessage], send: Send) -> None:
        """Serve one stream until it ends. Returns when the node closed it; raises FalError to close it."""
        message = await first_message(incoming)
        arrived_s = self._clock.monotonic_s()
        hello = hello_in(message, peer_name)
        version = agree(f"node {peer_name}", hello.versions.min, hello.versions.max)
        session = self._enter(peer_name)
        try:
            await self._engine.submit(wire.hello_of(hello, session_id=session.id, arrived_s=arrived_s))
            if hello.HasField("notice"):
                self._notice(session, hello.notice, arrived_s)
            self._check_skew(peer_name, hello.wall_s)
            session.welcomed = self._life()
            welcome = self._welcome(version, shared_features(hello.versions.features))
            await send_bounded(send, agent_pb2.SchedulerMessage(welcome=welcome), f"node {session.node_id}")
            await self._send_complete(session, send)
            await self._serve(session, incoming, send, message.seq)
        finally:
            self._leave(session)

    async def _serve(
        self, session: _Session, incoming: AsyncIterator[agent_pb2.AgentMessage], send: Send, seq: int
    ) -> None:
        """Read and write until either ends or the session is closed; what ended it is raised."""
        writer = asyncio.create_task(self._write(session, send))  # a failed send explains more than the end of input
        reader = asyncio.create_task(self._read(session, incoming, seq))
        await until_first(session.closed, writer, reader)

    def _enter(self, node_id: str) -> _Session:
        session = _Session(
            self._new_id(), node_id, LeadingEdge(DELTA_WINDOW_S), asyncio.get_running_loop().create_future()
        )
        older = self._sessions.get(node_id)
        self._sessions[node_id] = session
        if older is not None:
            older.close(
                FalError(
                    Code.UNAVAILABLE,
                    f"a newer session of node {node_id} took this one's place",
                    remedy="Nothing to do where the agent has restarted; otherwise look for a clone of this machine.",
                )
            )
        return session

    def _leave(self, session: _Session) -> None:
        if self._sessions.get(session.node_id) is session:
            del self._sessions[session.node_id]
            self.logs.node_gone(session.node_id)
            self.execs.node_gone(session.node_id)
            self.gpu_orders.node_gone(session.node_id)
        self._engine.offer(NodeDisconnected(session.node_id, session.id))

    def _welcome(self, version: int, features: list[str]) -> agent_pb2.Welcome:
        view = self._engine.view
        meta = view.meta
        assert meta is not None, "a leader has loaded its store"
        return agent_pb2.Welcome(
            version=version,
            features=features,
            cluster_id=meta.cluster_id,
            epoch=meta.epoch,
            incarnation=meta.incarnation,
            term=view.term,
            accepted_clusters=meta.accepted_clusters,
            heartbeat_interval_s=HEARTBEAT_INTERVAL_S,
        )

    def _life(self) -> tuple[object, ...]:
        """What of the cluster decides whether a node obeys; it was told in Welcome."""
        meta = self._engine.view.meta
        assert meta is not None, "a leader has loaded its store"
        return meta.cluster_id, meta.epoch, meta.accepted_clusters

    def _check_skew(self, node_id: str, wall_s: float) -> None:
        skew_s = wall_s - self._clock.wall_s()
        if wall_s == 0.0 or abs(skew_s) <= SKEW_MAX_S:
            self._alarms.clear("CLOCK_SKEW", node_id)
            return
        text = f"the clock of node {node_id} is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} ours"
        remedy = "Set both clocks (NTP); certificates and stamps depend on them, scheduling does not."
        now_s = self._clock.wall_s()
        if self._alarms.raise_alarm("CLOCK_SKEW", node_id, text, remedy=remedy, since_s=now_s):
            self._note(Logged("CLOCK_SKEW", node_id, text, now_s))

    # --- up ---------------------------------------------------------------------------------------------------------

    async def _read(self, session: _Session, incoming: AsyncIterator[agent_pb2.AgentMessage], seq: int) -> None:
        last = seq
        async for message in incoming:
            arrived_s = self._clock.monotonic_s()
            if message.seq <= last:
                continue  # a duplicate
            if message.seq != last + 1:
                raise FalError(
                    Code.CONFLICT,
                    f"message {last + 1} of node {session.node_id} is missing, {message.seq} came",
                    remedy="The agent starts over by itself.",
                )
            last = message.seq
            self._take(session, message, arrived_s)

    def _take(self, session: _Session, message: agent_pb2.AgentMessage, arrived_s: float) -> None:
        kind = message.WhichOneof("kind")
        if kind == "report":
            report = wire.report_of(message.report, node_id=session.node_id, session_id=session.id, arrived_s=arrived_s)
            self._engine.offer(report)
            if message.report.HasField("notice"):
                self._notice(session, message.report.notice, arrived_s)
            for event in message.report.events:
                self._note(Logged(event.kind, event.subject, event.message, event.time_s, f"node/{session.node_id}"))
            self._check_set(session, message.report.assignments_revision, arrived_s)
        elif kind == "log_chunk":
            self.logs.take(session.node_id, message.log_chunk)
        elif kind == "exec_output":
            self.execs.take(session.node_id, message.exec_output)
        elif kind == "top":
            self.execs.take_top(session.node_id, message.top)
        elif kind == "gpu_result":
            self.gpu_orders.take(session.node_id, message.gpu_result)
        elif kind == "reboot_refusal":
            of = wire.refusal_of(
                message.reboot_refusal, node_id=session.node_id, session_id=session.id, arrived_s=arrived_s
            )
            self._engine.offer(of)
        elif kind == "hello":
            raise invalid("hello", session.node_id, "came twice in one session", remedy="Open a new stream.")
        # A kind of a later release: ignored, as features are agreed before they are used.

    def _notice(self, session: _Session, notice: agent_pb2.Notice, arrived_s: float) -> None:
        """What is announced for the machine; that nothing is matters only where something was."""
        node = self._engine.view.nodes.get(session.node_id)
        if notice.kind or (node is not None and node.drain is not None):
            told = wire.notice_of(notice, node_id=session.node_id, session_id=session.id, arrived_s=arrived_s)
            self._engine.offer(told)

    def _check_set(self, session: _Session, revision: int, arrived_s: float) -> None:
        """Where nothing follows a message that was lost, no gap shows it: the node's reports do."""
        if session.ready and revision < session.revision and arrived_s - session.revised_at_s > SET_LAG_MAX_S:
            raise FalError(
                Code.CONFLICT,
                f"node {session.node_id} holds revision {revision} of its set, {session.revision} was sent",
                remedy="The agent starts over by itself.",
            )

    # --- down -------------------------------------------------------------------------------------------------------

    async def _send_complete(self, session: _Session, send: Send) -> None:
        """The whole set; what does not fit into one message follows as deltas at once."""
        view = self._engine.view
        built = self._build(session, self._engine.assignments(session.node_id))
        head = take_chunk(built)
        session.revision, session.revised_at_s = session.revision + 1, self._clock.monotonic_s()
        complete = agent_pb2.Complete(
            revision=session.revision, term=view.term, store_revision=view.store_revision, assignments=head
        )
        session.told.update(_told(a) for a in head)
        session.ready = True
        await send_bounded(send, agent_pb2.SchedulerMessage(complete=complete), f"node {session.node_id}")
        while built:
            await self._send_delta(session, send, take_chunk(built), [])
        gateways = self._gateways(session.node_id)
        if gateways.gateways:
            await send_bounded(send, agent_pb2.SchedulerMessage(gateways=gateways), f"node {session.node_id}")
        revocations = wire.revocations_to(view.revocations.values())
        if revocations.revoked:
            message = agent_pb2.SchedulerMessage(revocations=revocations)
            await send_bounded(send, message, f"node {session.node_id}")

    async def _write(self, session: _Session, send: Send) -> None:
        if session.dirty or session.resync or session.stuck:  # it changed while Complete was on its way
            session.signal.set()
        while True:
            await self._woken(session)
            while session.control:
                await send_bounded(send, session.control.popleft(), f"node {session.node_id}")
            changed = self._changed(session)
            runners = [(i, self._engine.assignment(session.node_id, i)) for i in changed]
            for i in (i for i, runner in runners if runner is None and i in session.stuck):
                session.stuck.discard(i)
                self._alarms.clear("MANIFEST", i)
            drop = [i for i, runner in runners if runner is None and i in session.told]
            for i in drop:
                del session.told[i]
            put = self._build(session, (runner for i, runner in runners if runner and _differs(session, runner)))
            while put or drop:
                await self._send_delta(session, send, take_chunk(put), drop)
                drop = []

    async def _woken(self, session: _Session) -> None:
        """Wait for something to send; runners that are stuck are tried again now and then."""
        if not session.stuck:
            await session.signal.wait()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(STUCK_RETRY_S):
                await session.signal.wait()
        session.dirty.update(dict.fromkeys(session.stuck))

    def _changed(self, session: _Session) -> list[str]:
        """Runners to look at again, in order of id; clears what was noted. While the node is held nothing is said."""
        live = self._engine.view.live.get(session.node_id)
        if live is not None and live.hold:
            return []  # the end of the hold looks at everything again
        ids = set(session.dirty)
        if session.resync:
            ids.update(session.told, (runner.id for runner in self._engine.assignments(session.node_id)))
        session.dirty.clear()
        session.resync = False
        return sorted(ids)

    async def _send_delta(
        self, session: _Session, send: Send, put: list[agent_pb2.Assignment], drop: list[str]
    ) -> None:
        view = self._engine.view
        delta = agent_pb2.Delta(
            base=session.revision,
            revision=session.revision + 1,
            term=view.term,
            store_revision=view.store_revision,
            put=put,
            drop=drop,
        )
        session.revision, session.revised_at_s = session.revision + 1, self._clock.monotonic_s()
        session.told.update(_told(a) for a in put)
        await send_bounded(send, agent_pb2.SchedulerMessage(delta=delta), f"node {session.node_id}")

    def _build(self, session: _Session, runners: Iterable[Runner]) -> deque[agent_pb2.Assignment]:
        """Messages of these runners; one that cannot be built is held back with an alarm and tried again."""
        built: deque[agent_pb2.Assignment] = deque()
        for runner in runners:
            try:
                built.append(self._builder.build(self._engine.view, runner))
                if runner.id in session.stuck:
                    session.stuck.discard(runner.id)
                    self._alarms.clear("MANIFEST", runner.id)
            except FalError as error:
                session.stuck.add(runner.id)
                now_s = self._clock.wall_s()
                text = f"runner {runner.id} is held back: {error.what}"
                if self._alarms.raise_alarm("MANIFEST", runner.id, text, remedy=error.remedy, since_s=now_s):
                    self._note(Logged("RUNNER_HELD_BACK", runner.id, text, now_s))
        return built

    # --- from the engine and the dispatcher ---------------------------------------------------------------------------

    def _on_effect(self, effect: Effect) -> None:
        if isinstance(effect, AssignmentChanged):
            if (session := self._sessions.get(effect.node_id)) is not None:
                session.dirty[effect.runner_id] = None
                session.signal.set()
        elif isinstance(effect, NodeChanged):
            self._node_changed(effect.node_id)
        elif isinstance(effect, Revoked):
            revocations = wire.revocations_to(self._engine.view.revocations.values())
            for node_id in list(self._sessions):  # one that is not ready yet is told with its Complete
                self.push(node_id, agent_pb2.SchedulerMessage(revocations=revocations))
        elif isinstance(effect, RebootDue) and (session := self._sessions.get(effect.node_id)) is not None:
            # Kept for a session that begins just now; behind its assignments, of which there are none.
            order = agent_pb2.RebootOrder(boot_id=effect.boot_id)
            session.control.append(agent_pb2.SchedulerMessage(reboot=order))
            session.signal.set()
        elif isinstance(effect, HelloNeeded) and (session := self._sessions.get(effect.node_id)) is not None:
            why = f"a commit that failed may have cost news of node {effect.node_id}"
            session.close(FalError(Code.UNAVAILABLE, why, remedy="The agent starts over by itself."))

    def _node_changed(self, node_id: str) -> None:
        session = self._sessions.get(node_id)
        if session is None:
            return
        node = self._engine.view.nodes.get(node_id)
        if node is not None and node.revoked:
            session.close(
                FalError(Code.UNAUTHENTICATED, f"node {node_id} is revoked", remedy="Join again with a new token.")
            )
            return
        if session.welcomed and session.welcomed != self._life():
            why = f"an operator's confirm changed what node {node_id} was welcomed to"
            session.close(FalError(Code.UNAVAILABLE, why, remedy="The agent starts over by itself."))
            return
        # Its hold may have begun or ended, which changes the set as a whole.
        session.resync = True
        session.signal.set()

    def push(self, node_id: str, message: agent_pb2.SchedulerMessage) -> bool:
        """Send something beside assignments; False when the node has no session. A full queue ends the session."""
        session = self._sessions.get(node_id)
        if session is None or not session.ready:
            return False
        if len(session.control) >= STREAM_QUEUE_MESSAGES_MAX:
            session.close(too_slow(f"node {node_id}"))
            return False
        session.control.append(message)
        session.signal.set()
        return True

    def set_gateways(self, gateways: Callable[[str], agent_pb2.GatewaySet]) -> None:
        """Where a new session asks for the gateways that want its tunnel; changes come by `push`."""
        self._gateways = gateways

    def backlog(self, node_id: str) -> int:
        """Messages beside assignments that wait to be sent to a node."""
        session = self._sessions.get(node_id)
        return len(session.control) if session is not None else 0

    def connected(self, node_id: str) -> bool:
        """Whether the node has a session now."""
        return node_id in self._sessions

    def close(self, error: FalError) -> None:
        """End all sessions: the leader is one no longer."""
        self._unsubscribe()
        for session in list(self._sessions.values()):
            session.close(error)

    def statistics(self) -> dict[str, int]:
        """Sessions, and messages that wait."""
        return {
            "sessions": len(self._sessions),
            "waiting": sum(len(x.control) + len(x.dirty) for x in self._sessions.values()),
            "stuck": sum(len(x.stuck) for x in self._sessions.values()),
        }


def _told(assignment: agent_pb2.Assignment) -> tuple[str, _Told]:
    ids = tuple(one.id for one in assignment.residencies)
    told = (assignment.id, assignment.term, Goal(int(assignment.goal)), assignment.app, ids)
    return assignment.runner_id, told


def _differs(session: _Session, runner: Runner) -> bool:
    assert runner.assignment is not None
    ids = tuple(one.id for one in runner.residencies) if shared(runner) and runner.goal is Goal.RUN else ()
    wanted = (runner.assignment.id, runner.assignment.term, runner.goal, runner.app, ids)
    return session.told.get(runner.id) != wanted


__all__ = ["AgentSessions", "Send"]
