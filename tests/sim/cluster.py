"""A whole cluster in one virtual-time loop: real leaders, engines, sessions and agents; simulated machines and network.

    play(seed, tmp_path)        # raises Found with the broken rules and the last events

One seed decides everything. A play is: found the cluster, some minutes of faults and operators' commands, healing, and
the wait until everything is as it should be.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import structlog

from fal_agent.session import Link
from fal_contract.errors import Code, FalError
from fal_contract.limits import FAILOVER_GRACE_S, RPC_TIMEOUT_S
from fal_contract.v1 import agent_pb2
from fal_scheduler.core import tokens
from fal_scheduler.core.events import ApplyPool, Command, CreateToken, RedeemToken, Reply
from fal_scheduler.core.records import Pool
from fal_scheduler.decision_files import segments
from fal_scheduler.leadership import Leadership
from fal_scheduler.sim.replay import replay
from fal_scheduler.store.memory import MemoryBackend
from sim.checker import Checker
from sim.host import Host
from sim.network import Network, Stream, broken
from sim.process import install, outside
from sim.schedulers import Scheduler, memory_store
from virtual_time import run_virtually

CLUSTER = "c-510000000000"
ANSWER_S = 40.0
SETTLE_S = 120.0  # after healing, plus what crash backoff still lasts


@dataclass(frozen=True, slots=True)
class Profile:
    """What kind of play. `restore`: an older copy of the store is put in place once."""

    nodes: int = 4
    schedulers: int = 2
    chaos_s: float = 300.0
    restore: bool = False
    ghosts: bool = True


class Found(AssertionError):
    """The checker found broken rules."""


class _Records(dict[str, bytes]):
    """Records of the backend; the checker hears of each."""

    def __init__(self, checker: Checker) -> None:
        super().__init__()
        self._checker = checker

    def __setitem__(self, key: str, value: bytes) -> None:
        super().__setitem__(key, value)
        self._checker.committed(key, value)


class AgentLink:
    """The agent's end of a stream; `processed` is called when a message was dealt with."""

    def __init__(self, stream: Stream, host: Host, processed: Callable[[], None]) -> None:
        self._stream, self._host, self._processed = stream, host, processed
        self._process = host.process
        self._took = False

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        """See Link."""
        if self._process is not None and self._process.alive:
            self._stream.up.put(message.SerializeToString())

    async def receive(self) -> agent_pb2.SchedulerMessage:
        """See Link."""
        if self._took:
            self._processed()
        payload = await self._stream.down.get()
        if payload is None:
            raise self._stream.why
        self._took = True
        return agent_pb2.SchedulerMessage.FromString(payload)

    async def close(self) -> None:
        """See Link."""
        self._stream.leave(self._host.node_id)


class _Ghost:
    """A deposed leader that slept and does not know: it repeats what a session of an older term was sent."""

    def __init__(self, tape: list[bytes]) -> None:
        self._tape = list(tape)

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        """See Link."""

    async def receive(self) -> agent_pb2.SchedulerMessage:
        """See Link."""
        await asyncio.sleep(0.01)
        if not self._tape:
            await asyncio.sleep(1.0)
            raise broken("the deposed leader is gone")
        return agent_pb2.SchedulerMessage.FromString(self._tape.pop(0))

    async def close(self) -> None:
        """See Link."""


class SimCluster:
    """See the module. Everything that a nemesis or an operator needs is public."""

    def __init__(self, seed: int, root: Path, profile: Profile) -> None:
        self.seed, self.profile, self.root = seed, profile, root
        self.checker = Checker()
        self.backend = MemoryBackend()
        self.backend.records = _Records(self.checker)
        self.network = Network(self.rng("network"))
        self.hosts = {host.node_id: host for host in self._make_hosts()}
        self.schedulers = [self._make_scheduler(f"s{at}") for at in range(profile.schedulers)]
        self.checker.hosts, self.checker.schedulers = self.hosts, self.schedulers
        self.ghost_share = 0.0
        self._dials = self.rng("dials")
        self._background: set[asyncio.Task[Any]] = set()

    def rng(self, name: str) -> Random:
        """A source of randomness of its own for each part, so that one more draw here moves nothing there."""
        return Random(f"{self.seed}/{name}")

    def _make_hosts(self) -> list[Host]:
        rng = self.rng("hosts")
        return [
            Host(f"n-{at:012d}", self.root / f"n{at}", rng.choice((2, 2, 4)), Random(rng.getrandbits(64)), self.checker)
            for at in range(self.profile.nodes)
        ]

    def _make_scheduler(self, name: str) -> Scheduler:
        rng = self.rng(name)
        return Scheduler(
            name,
            cluster_id=CLUSTER,
            folder=self.root / name,
            rng=rng,
            hooks=self.checker,
            store_of=lambda: memory_store(self.backend, rng),
        )

    def spawn(self, job: Coroutine[Any, Any, Any]) -> None:
        """Something of the world, not of a process; ended by `close`."""
        task = outside(job)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ---- the network's view of both sides

    def start_agent(self, host: Host) -> None:
        """A new agent process on this machine."""
        turns = itertools.cycle(self.schedulers)

        async def dial() -> Link:
            return await self._dial(host, next(turns))

        host.start_agent(dial)

    async def _dial(self, host: Host, scheduler: Scheduler) -> Link:
        tapes = self.checker.recordings.get(host.node_id, {})
        old = [term for term in tapes if term < host.term_seen]
        if old and self._dials.random() < self.ghost_share:
            self.checker.note(f"{host.node_id} meets the ghost of term {old[-1]}")
            self.checker.count("ghosts")
            host.stream = None
            return _Ghost(tapes[old[-1]])
        await asyncio.sleep(self._dials.uniform(0.001, 0.05))
        if not self.network.reachable(host.node_id, scheduler.name):
            await asyncio.sleep(2 * RPC_TIMEOUT_S)
            raise broken("nothing answers")
        if scheduler.process is None:
            raise broken("connection refused")
        if scheduler.leadership is None:
            raise FalError(Code.NOT_LEADER, f"{scheduler.name} does not lead", remedy="Ask another.")
        stream = Stream(self.network, host.node_id, scheduler.name)
        host.stream = stream
        scheduler.serve(stream)
        return AgentLink(stream, host, lambda: self.checker.processed(host.node_id))

    def kill_scheduler(self, scheduler: Scheduler) -> None:
        """kill -9."""
        self.checker.note(f"{scheduler.name} is killed")
        scheduler.kill()
        self._cut_off(scheduler.name)

    def kill_agent(self, host: Host) -> None:
        """kill -9; containers go on."""
        self.checker.note(f"the agent of {host.node_id} is killed")
        host.kill_agent()
        self._cut_off(host.node_id)

    def power_off(self, host: Host) -> None:
        """The machine goes down."""
        self.checker.note(f"{host.node_id} loses power")
        host.power_off()
        self._cut_off(host.node_id)

    def _cut_off(self, end: str) -> None:
        for stream in self.network.streams_of(end):
            (stream.up if end == stream.node else stream.down).forget()
            stream.leave(end)

    # ---- operators

    async def submit(self, command: Command) -> Reply | None:
        """Give a command to the leader; None where it failed, perhaps after it was done."""
        leader = self.checker.leader()
        if leader is None:
            return None
        try:
            async with asyncio.timeout(ANSWER_S):
                return await leader.engine.submit(command)
        except (FalError, TimeoutError) as error:
            self.checker.note(f"refused {command}: {error}")
            return None

    # ---- life

    async def found(self) -> None:
        """Start everything; pools, nodes and their first sessions."""
        install(asyncio.get_running_loop())
        for scheduler in self.schedulers:
            scheduler.start()
        await self.until(lambda: self.checker.leader() is not None, "a leader", within_s=30.0)
        for name in ("p0", "p1"):
            await self.submit(ApplyPool(Pool(name, zone=name)))
            now_s = self.schedulers[0].clock.wall_s()
            token = tokens.create(f"t-{name}", "s", pool=name, ttl_s=3600.0, uses=99, created_by="", now_s=now_s)
            await self.submit(CreateToken(token))
        for at, host in enumerate(self.hosts.values()):
            await self.submit(RedeemToken(f"t-p{at % 2}", "s", host.node_id, f"node{at}"))
            self.start_agent(host)
        await self.until(self._all_ready, "all nodes ready", within_s=30.0)

    def _all_ready(self) -> bool:
        leader = self.checker.leader()
        return leader is not None and all(leader.view.health_of(node_id) == "ready" for node_id in self.hosts)

    async def until(self, what: Any, name: str, *, within_s: float) -> None:
        """Poll in virtual time; a broken rule or the deadline ends the play."""
        try:
            async with asyncio.timeout(within_s):
                while not what():
                    self.stop_if_broken()
                    await asyncio.sleep(0.25)
        except TimeoutError:
            self.checker.fail("liveness", f"no {name} within {within_s:g} s")
            self.stop_if_broken()

    def stop_if_broken(self) -> None:
        """Raise Found where a rule is broken."""
        if self.checker.broken:
            raise Found(self.report())

    def report(self) -> str:
        """The broken rules, the last events, and how to see them again."""
        lines = [*self.checker.broken[:10], "", "last events:", *list(self.checker.trace)[-120:]]
        return "\n".join([f"seed {self.seed} ({self.profile}): repeat with pytest --seed {self.seed}", *lines])

    async def settle(self) -> None:
        """After healing: everything is as it should be within the time promised."""
        self.checker.note("healed")
        await self._until_settled(SETTLE_S, exactly=False)
        await self._until_settled(FAILOVER_GRACE_S + SETTLE_S, exactly=True)
        self.checker.everything()
        self.stop_if_broken()

    async def _until_settled(self, within_s: float, *, exactly: bool) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        while found := self.checker.unsettled(exactly=exactly):
            self.stop_if_broken()
            until_s = max(until_s, loop.time() + self._backoff_s() + within_s if self._backoff_s() > 0.0 else 0.0)
            if loop.time() > until_s:
                for text in found:
                    self.checker.fail("liveness", f"{within_s:g} s after healing: {text}")
            await asyncio.sleep(1.0)

    def _backoff_s(self) -> float:
        """How long crash backoff may still hold an app back."""
        leader = self.checker.leader()
        if leader is None:
            return 0.0
        now_s = asyncio.get_running_loop().time()
        return max((backoff.until_s - now_s for backoff in leader.view.backoffs.values()), default=0.0)

    async def close(self) -> None:
        """End every process."""
        background = list(self._background)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        processes = [one.process for one in (*self.schedulers, *self.hosts.values()) if one.process is not None]
        for scheduler in self.schedulers:
            scheduler.kill()
        for host in self.hosts.values():
            host.kill_agent()
        for process in processes:
            await process.gone()


@dataclass
class Played:
    """What a play saw."""

    seed: int
    messages: int
    counts: dict[str, int] = field(default_factory=dict)
    virtual_s: float = 0.0
    replayed: int = 0  # decisions that came out the same from the schedulers' logs


def play(seed: int, root: Path, profile: Profile = Profile()) -> Played:
    """One seed from founding to rest. Raises Found."""
    from sim.nemesis import Nemesis, Operators

    quiet()

    async def main() -> Played:
        cluster = SimCluster(seed, root / f"seed-{seed}", profile)
        try:
            await cluster.found()
            nemesis, operators = Nemesis(cluster), Operators(cluster)
            await operators.first()
            cluster.spawn(operators.run())
            try:
                await nemesis.run(profile.chaos_s)
            finally:
                await nemesis.heal()
            await operators.settle()
            await cluster.settle()
        finally:
            await cluster.close()
        return Played(seed, cluster.checker.messages, cluster.checker.counts, asyncio.get_running_loop().time())

    played = run_virtually(main())
    played.replayed = _replay(seed, root / f"seed-{seed}", profile)
    return played


def _replay(seed: int, folder: Path, profile: Profile) -> int:
    """Do every term of every scheduler again from its decision log; how many decisions came out the same."""
    decisions = 0
    for log in sorted(folder.glob("*/decisions")):
        report = replay(segments(log))
        decisions += sum(run.decisions for run in report.runs)
        for run in report.runs:
            if run.difference is not None:
                raise Found(
                    f"seed {seed} ({profile}): a replay of {run.segment.path} differs: {run.view['difference']}"
                )
    return decisions


def quiet() -> None:
    """Thousands of expected warnings are no news."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


__all__ = ["CLUSTER", "AgentLink", "Found", "Leadership", "Played", "Profile", "SimCluster", "play", "quiet"]
