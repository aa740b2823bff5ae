"""Schedulers of the simulation: the real leader, engine and sessions, each in a process that can be killed.

The backend of the store outlives them all. Several compete for leadership through its lease; sessions come in over the
simulated network.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

from fal_contract.errors import FalError
from fal_contract.v1 import agent_pb2
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.leader import Leader
from fal_scheduler.leadership import CurrentLeadership, Leadership
from fal_scheduler.revocations import RevocationIndex
from fal_scheduler.store.faults import FaultStore
from fal_scheduler.store.interface import Store
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from sim.network import Stream
from sim.process import Process
from virtual_time import LoopClock


@functools.cache
def authority(cluster_id: str) -> CertificateAuthority:
    """One for all plays: certificates are not simulated, signatures and what is derived from the key are real."""
    with tempfile.TemporaryDirectory() as folder:
        return CertificateAuthority.create(Path(folder) / "ca", cluster_id=cluster_id, now_s=LoopClock().wall_s())


class Watched(CurrentLeadership):
    """Tells when a term begins."""

    def __init__(self, on_term: Callable[[Leadership], None]) -> None:
        super().__init__()
        self._on_term = on_term

    def set(self, leadership: Leadership | None) -> None:
        """See CurrentLeadership."""
        super().set(leadership)
        if leadership is not None:
            self._on_term(leadership)


class SchedulerHooks:
    """What the checker hears from a scheduler; the default hears nothing."""

    def term_began(self, scheduler: Scheduler, leadership: Leadership) -> None:
        """A leader has loaded its store."""

    def sent(self, scheduler: Scheduler, stream: Stream, message: agent_pb2.SchedulerMessage) -> None:
        """A message leaves for a node."""

    def heard(self, scheduler: Scheduler, node_id: str) -> None:
        """A node's message was taken from its stream."""

    def processed(self, node_id: str) -> None:
        """A message was dealt with, by a scheduler or an agent."""


class Scheduler:
    """One scheduler: `start`, `kill`, `start` again. `store_of` makes a handle on what survives."""

    def __init__(
        self,
        name: str,
        *,
        cluster_id: str,
        folder: Path,
        rng: Random,
        hooks: SchedulerHooks,
        store_of: Callable[[], Store],
    ) -> None:
        self.name = name
        self.clock = LoopClock()
        self.process: Process | None = None
        self.store: Store | None = None
        self.failed: BaseException | None = None  # what ended the process by itself
        self._cluster_id = cluster_id
        self._folder = folder
        self._rng = rng
        self._hooks = hooks
        self._store_of = store_of
        self._current: Watched | None = None

    @property
    def faults(self) -> FaultStore | None:
        """The store of the process that runs, where it can be made to fail."""
        return self.store if isinstance(self.store, FaultStore) else None

    @property
    def leadership(self) -> Leadership | None:
        """The term under way, as this scheduler believes."""
        return self._current.get() if self._current is not None and self._current.leads else None

    def start(self) -> None:
        """A new process on the store."""
        assert self.process is None
        self.store = self._store_of()
        self._current = Watched(lambda leadership: self._hooks.term_began(self, leadership))
        leader = Leader(
            store=self.store,
            ca=authority(self._cluster_id),
            clock=self.clock,
            data_dir=self._folder,
            model_roots=(),
            holder=self.name,
            current=self._current,
            revocations=RevocationIndex(),
            cut_revoked=lambda: None,
            rng=Random(self._rng.getrandbits(64)),
        )
        self.process = Process(self.name)
        self.process.spawn(self._run(leader), name="leader")

    async def _run(self, leader: Leader) -> None:
        try:
            await leader.run()
        except Exception as error:
            self.failed = error

    def kill(self) -> None:
        """kill -9: the lease runs out by itself, streams are reset by the kernel."""
        if self.process is None:
            return
        if isinstance(self.store, FaultStore):
            vanish(self.store)
        self.process.kill()
        self.process = self._current = None

    # ---- sessions

    def serve(self, stream: Stream) -> None:
        """A node has dialled."""
        assert self.process is not None
        self.process.spawn(self._session(stream, self.process), name=f"session of {stream.node}")

    async def _session(self, stream: Stream, process: Process) -> None:
        leadership = self.leadership

        async def incoming() -> AsyncIterator[agent_pb2.AgentMessage]:
            seq = 0
            while (payload := await stream.up.get()) is not None:
                message = agent_pb2.AgentMessage.FromString(payload)
                if message.seq == seq + 1:  # else it is a repetition or a gap, from which nothing is learnt
                    seq = message.seq
                    self._hooks.heard(self, stream.node)
                yield message
                self._hooks.processed(stream.node)

        async def send(message: agent_pb2.SchedulerMessage) -> None:
            if process.alive:
                self._hooks.sent(self, stream, message)
                stream.down.put(message.SerializeToString())

        try:
            if leadership is not None:
                await leadership.sessions.run(stream.node, incoming(), send)
        except FalError as error:
            stream.why = error
        finally:
            stream.leave(self.name)


def memory_store(backend: MemoryBackend, rng: Random) -> FaultStore:
    """A handle whose commits take a few milliseconds."""
    return FaultStore(MemoryStore(backend, commit_s=rng.uniform(0.001, 0.01)))


def inner_of(store: FaultStore) -> MemoryStore:
    """The store under the faults."""
    inner = store._inner  # the nemesis reaches through
    assert isinstance(inner, MemoryStore)
    return inner


def vanish(store: FaultStore) -> None:
    """Nothing of this process reaches the backend any more."""
    inner = inner_of(store)
    inner.cut = True
    inner.crash()


__all__ = ["Scheduler", "SchedulerHooks", "inner_of", "memory_store", "vanish"]
