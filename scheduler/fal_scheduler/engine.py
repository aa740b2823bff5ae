"""The single writer: takes events one at a time through the pure core, commits what they change, tells what came true.

Invariants: nothing is answered or told before its commit is acknowledged; one commit is in flight while the next
batches gather on top of it; a commit that did not happen is taken back together with all that was built on it; a
commit of unknown outcome ends this leadership. Reads (`view`) never wait for the store.

Called by sessions, dispatch and the APIs, on one event loop. Must not decide anything about runners: the core does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final

import structlog

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.ids import random_suffix
from fal_scheduler.auditor import Auditor
from fal_scheduler.batch import Batch, did_nothing, durable_runner, encode_changes, outcome_unknown, were_on
from fal_scheduler.core import log_entries as entries
from fal_scheduler.core.events import (
    Command,
    Effect,
    Event,
    Logged,
    Moment,
    News,
    NodeHello,
    Outcome,
    Proceed,
    Reply,
    Tick,
)
from fal_scheduler.core.invariants import Violation
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import Runner
from fal_scheduler.core.state import State
from fal_scheduler.core.step import BrokenInvariant, Core
from fal_scheduler.core.suspicion import term_needed
from fal_scheduler.engine_port import EngineOptions, EnginePort, Listener
from fal_scheduler.event_log import EventLog
from fal_scheduler.random_ids import RandomIds
from fal_scheduler.recovery import first_meta, recover, suspect_foreign
from fal_scheduler.replay_file import write_replay
from fal_scheduler.store.interface import Guard, Store

INBOX_EVENTS_MAX: Final = 20_000  # then commands are refused (BUSY)
BATCHES_READY_MAX: Final = 4  # then events wait in the inbox
SLICE_S: Final = 0.005  # longest run of steps before others get the loop
RETRY_S: Final = 1.0  # after a commit that failed

_log = structlog.get_logger("fal.engine")


class Engine:
    """See the module. `start` before anything else; after `lost` returns, `stop` and make a new one."""

    def __init__(self, store: Store, *, clock: Clock, rng: Random, options: EngineOptions) -> None:
        self._store = store
        self._clock = clock
        self._rng = rng
        self._options = options
        self._ids = RandomIds(rng)
        self._core = Core(State(), Placer(State().fleet), self._ids)
        self._record: entries.Recorder = entries.NoRecorder()
        self._guard: Guard | None = None
        self._inbox: deque[tuple[Event, asyncio.Future[Reply] | None]] = deque()
        self._ready: deque[Batch] = deque()
        self._in_flight: Batch | None = None
        self._commit_task: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._listeners: list[Listener] = []
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._lost = asyncio.Event()
        self._lost_why = FalError(
            Code.NOT_LEADER, "this scheduler does not lead yet", remedy="Try again, or ask the leader."
        )
        self._paused_until_s = 0.0
        self._recheck = False
        self._last_tick_s = 0.0
        self._auditor = Auditor(interval_s=options.audit_interval_s, now_s=0.0)
        self._replays = 0
        self._counts = {"commits": 0, "events": 0, "failed": 0, "stall_s": 0.0}
        self.events = EventLog(None)

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, holder: str) -> None:
        """Open the store, wait for leadership, load, verify, make the cluster's first record where there is none.

        Raises CORRUPT or VERSION_MISMATCH (nothing was changed), UNAVAILABLE, or a store error. Records that break a
        rule are frozen and an alarm stands; in `strict` they raise INVARIANT.
        """
        await self._store.open()
        self._guard = await self._store.campaign(holder)
        loaded = await self._store.load()
        now_s = self._clock.monotonic_s()
        state, found = recover(loaded.records, term=self._guard.term, revision=loaded.revision, now_s=now_s)
        self._core = Core(state, Placer(state.fleet), self._ids)
        if self._options.recorder is not None:
            self._record = self._options.recorder()
        self._record.began(state, entries.Loaded(dict(loaded.records), self._guard.term, loaded.revision, now_s))
        self.events = EventLog(self._options.events_dir)
        self._last_tick_s = now_s
        self._auditor = Auditor(interval_s=self._options.audit_interval_s, now_s=now_s)
        if found:
            self._broken(found, None)
        await self._make_meta()
        self._tasks = [
            asyncio.create_task(self._run(), name="engine-writer"),
            asyncio.create_task(self._tick(), name="engine-tick"),
            asyncio.create_task(self._watch(), name="engine-leadership"),
        ]
        self._wake.set()

    async def _make_meta(self) -> None:
        """A new store gets its identity; a store of another cluster than our certificates' is suspected."""
        state, wall_s = self.view, self._clock.wall_s()
        if state.meta is None:
            change = first_meta(self._options.cluster_id, random_suffix(self._rng, 16), wall_s=wall_s)
            batch = Batch()
            batch.add([change], encode_changes([change]), [])
            assert self._guard is not None
            state.store_revision = await self._store.commit(self._guard, batch.operations())
            state.apply(change)
            self._record.note(entries.Founded(change, state.store_revision))
        else:
            self._record.note(entries.Suspected(self._options.cluster_id, wall_s))
            self._tell(suspect_foreign(state, self._options.cluster_id, wall_s=wall_s))

    async def stop(self) -> None:
        """End orderly: what waits is refused, leadership is given up, files are closed. The store stays open."""
        self._lose(FalError(Code.NOT_LEADER, "this scheduler stops", remedy="Ask the next leader."))
        self._record.close()
        tasks = [*self._tasks, *([self._commit_task] if self._commit_task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._guard is not None:
            try:
                await self._store.resign(self._guard)
            except FalError as error:
                _log.warning("leadership not given up", error=str(error))
        self.events.close()

    async def lost(self) -> FalError:
        """Return, with the reason, when this engine leads no longer."""
        await self._lost.wait()
        return self._lost_why

    def _lose(self, why: FalError, *, in_flight_known: bool = False) -> None:
        """Stop leading: everything not acknowledged is refused; NOT_LEADER says that it surely never happens."""
        if self._lost.is_set():
            return
        self._lost_why = why
        self._lost.set()
        if self._in_flight is not None:
            self._in_flight.fail(why if in_flight_known else outcome_unknown(why))
        why = did_nothing(why)
        for batch in self._ready:
            batch.fail(why)
        while self._inbox:
            _, future = self._inbox.popleft()
            if future is not None and not future.done():
                future.set_exception(why)
        self._wake.set()
        self._drained.set()

    async def _watch(self) -> None:
        while not self._lost.is_set():
            guard = self._guard
            assert guard is not None
            await self._store.lost(guard)
            if guard is self._guard:
                self._lose(FalError(Code.NOT_LEADER, "leadership was lost", remedy="Try again; ask the new leader."))

    # --- calls ------------------------------------------------------------------------------------------------------

    async def submit(self, event: Command | NodeHello) -> Reply:
        """See EnginePort."""
        if self._lost.is_set() or self._guard is None:
            raise did_nothing(self._lost_why)
        if len(self._inbox) >= INBOX_EVENTS_MAX:
            raise FalError(
                Code.BUSY, f"{len(self._inbox)} events wait for the store", remedy="Try again in a few seconds."
            )
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._inbox.append((event, future))
        self._wake.set()
        return await future

    def offer(self, event: News) -> None:
        """See EnginePort. Sessions bound what they take in, so news are never refused."""
        if not self._lost.is_set():
            self._inbox.append((event, None))
            self._wake.set()

    @property
    def view(self) -> State:
        """See EnginePort."""
        return self._core.state

    def assignments(self, node_id: str) -> tuple[Runner, ...]:
        """See EnginePort."""
        ids = {*self.view.runners_by_node.get(node_id, ()), *were_on(self._batches(), node_id)}
        found = (self.assignment(node_id, runner_id) for runner_id in sorted(ids))
        return tuple(runner for runner in found if runner is not None)

    def assignment(self, node_id: str, runner_id: str) -> Runner | None:
        """See EnginePort."""
        live = self.view.live.get(node_id)
        if live is not None and live.hold:
            return None
        runner = durable_runner(self._batches(), runner_id, self.view.runners.get(runner_id))
        return runner if runner is not None and runner.node == node_id else None

    def _batches(self) -> list[Batch]:
        """What is not acknowledged, the oldest first."""
        return [*([self._in_flight] if self._in_flight is not None else []), *self._ready]

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """See EnginePort."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def statistics(self) -> Mapping[str, float]:
        """Counters and gauges by name, for metrics; `store_…` are the store's."""
        own = {"inbox": len(self._inbox), "batches": len(self._batches()), **self._counts}
        return {**own, **{f"store_{name}": value for name, value in self._store.statistics().items()}}

    # --- the writer -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while not self._lost.is_set():
                await self._wake.wait()
                self._wake.clear()
                await self._pump()
        except Exception as error:  # whatever it was, a writer that is gone leads nobody
            _log.exception("engine failed")
            self._lose(
                FalError(Code.INTERNAL, f"the engine failed: {error!r}", remedy="Restart the scheduler; report this.")
            )
            raise

    async def _pump(self) -> None:
        """Step through what waits, as long as there is something and room for what it changes."""
        while not self._lost.is_set() and len(self._ready) < BATCHES_READY_MAX:
            needed = term_needed(self.view, self._inbox[0][0]) if self._inbox else 0
            if needed > self.view.term:
                await self._raise_term(needed)
                continue
            more = self._slice()
            self._start_commit()
            if not more:
                return
            await asyncio.sleep(0)

    def _slice(self) -> bool:
        """Steps until the time slice ends, room ends, or nothing waits; True where something still does."""
        until_s = self._clock.monotonic_s() + SLICE_S
        while len(self._ready) < BATCHES_READY_MAX and self._clock.monotonic_s() < until_s:
            if self._inbox:
                if term_needed(self.view, self._inbox[0][0]) > self.view.term:
                    return True
                self._step(*self._inbox.popleft())
            elif self.view.dirty and not self._paused():
                self._step(Proceed(), None)
            else:
                return False
        return bool(self._inbox) or bool(self.view.dirty and not self._paused())

    def _paused(self) -> bool:
        """After a failed commit nothing is started by itself for a moment."""
        return self._clock.monotonic_s() < self._paused_until_s

    def _step(self, event: Event, future: asyncio.Future[Reply] | None) -> None:
        now_s = self._clock.monotonic_s()
        if isinstance(event, Tick) and event.at_s is not None:
            now_s = event.at_s  # what arrived while it waited stands behind it in the inbox
        moment = Moment(now_s, self._clock.wall_s())
        self._counts["events"] += 1
        try:
            outcome = self._core.step(event, moment)
        except FalError as error:
            self._refuse(event, moment, error, future)
            return
        except BrokenInvariant as error:
            remedy = "The objects named are frozen; report the replay file."
            self._refuse(event, moment, FalError(Code.INVARIANT, str(error), remedy=remedy), future)
            effects = self._core.taken_back(moment).effects
            self._record.note(entries.TakenBack(moment.now_s, moment.wall_s, effects))
            self._tell(effects)
            self._broken(error.violations, event)
            return
        self._record.stepped(event, moment, self._ids.take_drawn(), outcome)
        self._take(outcome, event, future)

    def _refuse(self, event: Event, moment: Moment, error: FalError, future: asyncio.Future[Reply] | None) -> None:
        self._record.stepped(event, moment, self._ids.take_drawn(), None, error)
        if future is not None and not future.done():
            future.set_exception(error)

    def _take(self, outcome: Outcome, event: Event, future: asyncio.Future[Reply] | None) -> None:
        """Queue what must be committed; tell at once what needs no commit."""
        if outcome.changes:
            encoded = encode_changes(outcome.changes)
            # The batch in flight is closed; the last one that is ready takes more while it has room.
            if not self._ready or not self._ready[-1].takes(encoded):
                self._ready.append(Batch())
            self._ready[-1].add(outcome.changes, encoded, outcome.effects)
        else:
            self._tell(outcome.effects)
        if future is None:
            return
        assert outcome.reply is not None, f"{type(event).__name__} is submitted, so it is answered"
        batches = self._batches()
        if batches and not isinstance(event, NodeHello):
            # An answer may rest on what is not durable yet, also where it changed nothing itself.
            batches[-1].waiting.append((future, outcome.reply))
        elif not future.done():
            future.set_result(outcome.reply)

    def _start_commit(self) -> None:
        if self._in_flight is None and self._ready and not self._lost.is_set():
            self._in_flight = self._ready.popleft()
            self._commit_task = asyncio.create_task(self._commit_or_end(self._in_flight), name="engine-commit")

    async def _commit_or_end(self, batch: Batch) -> None:
        """Whatever else went wrong, an engine that can commit no more leads nobody."""
        try:
            await self._commit(batch)
        except Exception as error:
            _log.exception("commit failed")
            self._lose(
                FalError(Code.INTERNAL, f"a commit failed: {error!r}", remedy="Restart the scheduler; report this.")
            )
            raise

    async def _commit(self, batch: Batch) -> None:
        assert self._guard is not None
        try:
            revision = await self._store.commit(self._guard, batch.operations())
        except FalError as error:
            self._failed(error)
            return
        self._in_flight = None
        self.view.store_revision = revision
        self._record.note(entries.Committed(len(batch.changes), revision))
        self._counts["commits"] += 1
        batch.succeed()
        self._tell(batch.effects)
        self._start_commit()
        if self._in_flight is None:
            self._drained.set()
        self._wake.set()

    def _failed(self, error: FalError) -> None:
        """The commit in flight did not happen, or nobody knows."""
        self._counts["failed"] += 1
        if error.code in (Code.STORE_UNKNOWN, Code.NOT_LEADER):
            self._lose(error, in_flight_known=True)
            return
        batches = self._batches()
        undone = [change for batch in batches for change in batch.changes]
        for change in reversed(undone):
            self.view.apply(change.undone())
        self._in_flight = None
        self._ready.clear()
        for batch in batches:
            batch.fail(error)
        now_s, wall_s = self._clock.monotonic_s(), self._clock.wall_s()
        effects = self._core.taken_back(Moment(now_s, wall_s), undone).effects
        self._record.note(entries.Failed(len(undone), now_s, wall_s, effects))
        self._tell(effects)
        self._paused_until_s, self._recheck = now_s + RETRY_S, True
        self._tell([Logged("STORE_FAILED", "store", str(error), wall_s)])
        self._drained.set()
        self._wake.set()

    async def _raise_term(self, term: int) -> None:
        """A node has seen a higher term: ours rises above it, durable, before anything else is decided."""
        while self._batches() and not self._lost.is_set():
            self._drained.clear()
            self._start_commit()
            await self._drained.wait()
        if self._lost.is_set() or term <= self.view.term:
            return
        assert self._guard is not None
        try:
            self._guard = await self._store.raise_term(self._guard, term)
        except FalError as error:
            self._lose(error)
            return
        self.view.term = self._guard.term
        self._record.note(entries.TermRaised(self.view.term))
        message = f"a node has seen term {term - 1}; this leader's is {self.view.term} now"
        self._tell([Logged("TERM_RAISED", "cluster", message, self._clock.wall_s())])

    def _tell(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            told = self.events.append(effect) if isinstance(effect, Logged) else effect
            for listener in tuple(self._listeners):
                listener(told)
        self.events.flush()

    # --- time and rules ---------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """A tick a second, with how much later than that it comes to be handled: our own stall."""
        while not self._lost.is_set():
            await asyncio.sleep(self._options.tick_s)
            if any(isinstance(event, Tick) for event, _ in self._inbox):
                continue  # the writer is behind; its stall is counted when it comes to that tick
            now_s = self._clock.monotonic_s()
            stall_s = max(0.0, now_s - self._last_tick_s - 1.5 * self._options.tick_s)
            self._last_tick_s = now_s
            self._counts["stall_s"] += stall_s
            recheck = self._recheck and not self._paused()
            self._recheck = self._recheck and not recheck
            self.offer(Tick(stall_s, recheck=recheck, at_s=now_s))
            if found := self._auditor.slice(self.view, now_s):
                self._broken(found, None)

    def _broken(self, found: list[Violation], event: Event | None) -> None:
        """A rule would be, or is, broken: freeze, raise an alarm, leave a file; in tests be loud."""
        moment = Moment(self._clock.monotonic_s(), self._clock.wall_s())
        self._replays += 1
        write_replay(
            self._options.events_dir, self._replays, event=event, moment=moment, term=self.view.term, found=found
        )
        if self._options.strict:
            text = "; ".join(f"{one.rule}: {one.message}" for one in found)
            self._lose(FalError(Code.INVARIANT, text, remedy="Look at the replay file."))
            raise AssertionError(text)
        effects = self._core.freeze(found, moment).effects
        self._record.note(entries.Froze(tuple(found), moment.now_s, moment.wall_s, effects))
        self._tell(effects)


__all__ = ["Engine", "EngineOptions", "EnginePort", "Listener"]
