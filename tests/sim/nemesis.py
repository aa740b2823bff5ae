"""Who makes trouble: the nemesis breaks machines, network, processes and stores; operators give commands at random.

Everything that the nemesis does heals by itself or by `heal`. What operators ask for is noted as an excuse before it is
asked, because a command that failed may have been done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from core_world import GIB
from fal_agent.ports import Usage
from fal_scheduler.core.events import ApplyApp, Confirm, CordonNode, DeleteApp, ScaleApp, StopRunner
from fal_scheduler.core.records import Resources, ScaleOverride, Scaling, Spec
from fal_scheduler.store.faults import Fault, FaultKind
from fal_scheduler.store.memory import MemoryBackend
from sim.checker import Wish
from sim.cluster import SimCluster
from sim.host import runner_of
from sim.network import Weather
from sim.schedulers import Scheduler, inner_of

EVERY_S = 5.0  # seconds between two troubles, on average
APPS = 4


class Nemesis:
    """`run` for some time, then `heal`."""

    def __init__(self, cluster: SimCluster) -> None:
        self.cluster = cluster
        self.rng = cluster.rng("nemesis")
        self._healing = False
        self._heal: dict[int, Callable[[], None]] = {}
        self._number = 0

    async def run(self, for_s: float) -> None:
        """Trouble after trouble."""
        loop, cluster = asyncio.get_running_loop(), self.cluster
        until_s = loop.time() + for_s
        restore_s = loop.time() + for_s * self.rng.uniform(0.3, 0.6)
        backup = cluster.backend.copy()
        while (now_s := loop.time()) < until_s:
            cluster.stop_if_broken()
            if cluster.profile.restore and not cluster.checker.restored:
                if now_s >= restore_s:
                    await self._restore(backup)
                elif self.rng.random() < 0.15:
                    backup = cluster.backend.copy()
            else:
                self._trouble()
            await asyncio.sleep(self.rng.expovariate(1.0 / EVERY_S))

    def _trouble(self) -> None:
        kinds: list[tuple[int, Callable[[], None]]] = [
            (4, self._bad_weather), (3, self._partition), (3, self._break_streams), (3, self._kill_agent),
            (1, self._reboot), (2, self._kill_scheduler), (2, self._kill_at_commit), (3, self._store_fault),
            (1, self._cut_store), (3, self._crash_container), (4, self._break_gpu), (1, self._proxy_away),
            (2, self._requests), (1, self._skew), (1, self._journal_full), (2, self._kill_monitor),
        ]  # fmt: skip
        self.cluster.ghost_share = 0.1 if self.cluster.profile.ghosts else 0.0
        (trouble,) = self.rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
        self.cluster.checker.count(trouble.__name__.lstrip("_"))
        trouble()

    def _later(self, after_s: float, heal: Callable[[], None]) -> None:
        """Heal after some time, or when all is healed."""
        self._number += 1
        number = self._number
        self._heal[number] = heal

        async def wait() -> None:
            await asyncio.sleep(after_s)
            if number in self._heal:
                self._heal.pop(number)()

        self.cluster.spawn(wait())

    async def heal(self) -> None:
        """Everything works again, and goes on doing so."""
        cluster = self.cluster
        cluster.ghost_share = 0.0
        for host in cluster.hosts.values():
            host.moody = False
            host.mend_gpus()
        while self._heal:
            self._heal.pop(next(iter(self._heal)))()
        for scheduler in cluster.schedulers:
            if scheduler.faults is not None:
                scheduler.faults._script.clear()
        await asyncio.sleep(0)

    # ---- the network

    def _bad_weather(self) -> None:
        a = self.rng.choice(list(self.cluster.hosts))
        pair = frozenset((a, self.rng.choice(self.cluster.schedulers).name))
        share = self.rng.choice((0.05, 0.3))
        self.cluster.checker.note(f"bad weather between {sorted(pair)}")
        self.cluster.network.weather[pair] = Weather(
            delay_max_s=self.rng.choice((0.05, 0.5, 3.0)),
            drop=share * self.rng.random(),
            duplicate=share * self.rng.random(),
            overtake=share * self.rng.random(),
        )
        self._later(self.rng.uniform(10.0, 60.0), lambda: self._fair(pair))

    def _fair(self, pair: frozenset[str]) -> None:
        self.cluster.network.weather.pop(pair, None)

    def _partition(self) -> None:
        cluster, rng = self.cluster, self.rng
        nodes = rng.sample(list(cluster.hosts), rng.choice((1, 1, 1, 1, 2, 2, len(cluster.hosts))))
        names = [scheduler.name for scheduler in cluster.schedulers]
        schedulers = names if rng.random() < 0.6 else [rng.choice(names)]
        up = [(node, scheduler) for node in nodes for scheduler in schedulers]
        down = [(scheduler, node) for node, scheduler in up]
        ways = rng.choice((up, down, up + down, up + down))
        cluster.checker.note(f"partition {ways}")
        cluster.network.block(*ways)
        self._later(rng.choice((2.0, 10.0, 30.0, 50.0, 90.0)), lambda: self._join(ways))

    def _join(self, ways: list[tuple[str, str]]) -> None:
        self.cluster.checker.note(f"healed {ways}")
        self.cluster.network.unblock(*ways)

    def _break_streams(self) -> None:
        end = self.rng.choice([*self.cluster.hosts, *(scheduler.name for scheduler in self.cluster.schedulers)])
        for stream in self.cluster.network.streams_of(end):
            stream.break_off("connection reset")

    # ---- machines

    def _kill_agent(self) -> None:
        host = self.rng.choice(list(self.cluster.hosts.values()))
        if host.process is not None:
            self.cluster.kill_agent(host)
            self._later(self.rng.choice((0.1, 3.0, 20.0, 70.0)), lambda: self._start_agent(host.node_id))

    def _start_agent(self, node_id: str) -> None:
        host = self.cluster.hosts[node_id]
        if host.process is None:
            self.cluster.checker.note(f"the agent of {node_id} starts")
            self.cluster.start_agent(host)

    def _reboot(self) -> None:
        host = self.rng.choice(list(self.cluster.hosts.values()))
        if host.process is not None:
            self.cluster.power_off(host)
            self._later(self.rng.choice((10.0, 30.0, 90.0)), lambda: self._start_agent(host.node_id))

    def _crash_container(self) -> None:
        host = self.rng.choice(list(self.cluster.hosts.values()))
        running = host.machine.running()
        if running:
            id = self.rng.choice(running)
            self.cluster.checker.note(f"container {id} crashes")
            host.machine.exit(id, 139, "segmentation fault")

    def _kill_monitor(self) -> None:
        """A container runs on, and nobody holds its output and exit code: another may take its place."""
        host = self.rng.choice(list(self.cluster.hosts.values()))
        running = host.machine.running()
        if running:
            container = host.machine.containers[self.rng.choice(running)]
            self.cluster.checker.note(f"the monitor of {container.spec.id} dies")
            self.cluster.checker.wounded(runner_of(container.spec))
            container.status = replace(container.status, reason="log and exit code lost")

    def _break_gpu(self) -> None:
        host = self.rng.choice(list(self.cluster.hosts.values()))
        held = {gpu for gpus in host.live().values() for gpu in gpus}
        free = [gpu for gpu in (f"GPU-{at}" for at in range(host.gpus)) if gpu not in held]
        for gpu in free or [f"GPU-{self.rng.randrange(host.gpus)}"]:  # free ones may be promised at any moment
            self.cluster.checker.note(f"{gpu} of {host.node_id} breaks")
            host.break_gpu(gpu)
        self._later(self.rng.uniform(10.0, 40.0), host.mend_gpus)

    def _proxy_away(self) -> None:
        host = self.rng.choice(list(self.cluster.hosts.values()))
        host.proxy.away = True

        def back() -> None:
            host.proxy.away = False

        self._later(self.rng.uniform(1.0, 15.0), back)

    def _requests(self) -> None:
        """A long request runs in a container."""
        host = self.rng.choice(list(self.cluster.hosts.values()))
        serving = sorted(host.proxy.entries)
        if serving:
            runner_id = self.rng.choice(serving)
            host.proxy.usages[runner_id] = Usage(in_flight=1, served=1, last_used_age_s=0.0)

            def done() -> None:
                host.proxy.usages[runner_id] = Usage(served=2, last_used_age_s=0.0)

            self._later(self.rng.uniform(1.0, 40.0), done)

    def _skew(self) -> None:
        clocks = [one.clock for one in (*self.cluster.hosts.values(), *self.cluster.schedulers)]
        clock = self.rng.choice(clocks)
        clock.skew_s = self.rng.choice((-3600.0, -40.0, 5.0, 40.0, 86_400.0))

        def right() -> None:
            clock.skew_s = 0.0

        self._later(self.rng.uniform(10.0, 60.0), right)

    def _journal_full(self) -> None:
        host = self.rng.choice(list(self.cluster.hosts.values()))
        if host.node is None:
            return
        journal: Any = host.node._journal
        journal.full = True
        self.cluster.checker.note(f"the journal of {host.node_id} is full")

        def room() -> None:
            journal.full = False

        self._later(self.rng.uniform(1.0, 15.0), room)

    # ---- schedulers and their store

    def _kill_scheduler(self) -> None:
        self._down(self.rng.choice(self.cluster.schedulers))

    def _down(self, scheduler: Scheduler) -> None:
        if scheduler.process is not None:
            self.cluster.kill_scheduler(scheduler)
            self._later(self.rng.choice((0.5, 5.0, 20.0)), lambda: self._up(scheduler))

    def _up(self, scheduler: Scheduler) -> None:
        if scheduler.process is None:
            self.cluster.checker.note(f"{scheduler.name} starts")
            scheduler.start()

    def _kill_at_commit(self) -> None:
        """The leader dies right before, or right after, its next commit."""
        scheduler = self.rng.choice(self.cluster.schedulers)
        store, point = scheduler.faults, self.rng.choice(("before commit", "after commit"))
        if store is None:
            return

        def hook(reached: str) -> None:
            if reached == point and scheduler.faults is store and scheduler.process is not None:
                self._down(scheduler)

        store._hook = hook
        self._later(30.0, lambda: setattr(store, "_hook", lambda reached: None))

    def _store_fault(self) -> None:
        scheduler = self.rng.choice(self.cluster.schedulers)
        if scheduler.faults is not None:
            kind = self.rng.choice([kind for kind in FaultKind if kind is not FaultKind.NONE])
            seconds_s = self.rng.choice((0.0, 1.0, 20.0))
            self.cluster.checker.note(f"the next commit of {scheduler.name}: {kind} after {seconds_s:g} s")
            scheduler.faults.add(Fault(kind, seconds_s))

    def _cut_store(self) -> None:
        scheduler = self.rng.choice(self.cluster.schedulers)
        if scheduler.faults is None:
            return
        inner = inner_of(scheduler.faults)
        inner.cut = True
        self.cluster.checker.note(f"{scheduler.name} is cut off from the store")
        self._later(self.rng.uniform(3.0, 30.0), lambda: self._joined(scheduler, inner))

    def _joined(self, scheduler: Scheduler, inner: Any) -> None:
        if scheduler.faults is not None and inner_of(scheduler.faults) is inner:
            inner.cut = False

    async def _restore(self, backup: MemoryBackend) -> None:
        """All schedulers stop; an older copy of the store takes the place of the newest."""
        cluster = self.cluster
        await self.heal()
        for host in cluster.hosts.values():
            host.moody = True
        cluster.checker.note(f"the store is restored: revision {cluster.backend.revision} -> {backup.revision}")
        cluster.checker.count("restores")
        for scheduler in cluster.schedulers:
            cluster.kill_scheduler(scheduler)
        await asyncio.sleep(cluster.backend.lease_ttl_s + 1.0)
        cluster.checker.restored = True
        cluster.backend.records.clear()
        for key, value in backup.records.items():
            cluster.backend.records[key] = value
        cluster.backend.revision, cluster.backend.term = backup.revision, backup.term
        for scheduler in cluster.schedulers:
            scheduler.start()
        await asyncio.sleep(30.0)


class Operators:
    """People who deploy, scale, delete, cordon and stop; and who answer alarms."""

    def __init__(self, cluster: SimCluster) -> None:
        self.cluster = cluster
        self.rng = cluster.rng("operators")
        self._tag = 0

    async def first(self) -> None:
        """Something runs before trouble begins."""
        for at in range(2):
            await self._apply(f"default/app{at}", self._spec(least=2))
        await asyncio.sleep(20.0)

    async def run(self) -> None:
        """A command now and then, until cancelled."""
        while True:
            await asyncio.sleep(self.rng.expovariate(1.0 / 6.0))
            await self._command()

    async def settle(self) -> None:
        """Nothing is cordoned any more, and somebody answers alarms from now on."""
        self.cluster.spawn(self._answer_alarms())
        await self.cluster.until(lambda: self.cluster.checker.leader(), "a leader after healing", within_s=60.0)
        for node_id in self.cluster.hosts:
            await self._surely(lambda node_id=node_id: CordonNode(node_id, False))  # type: ignore[misc]
        for task in list(self.cluster._background):
            if task.get_coro().__qualname__ == "Operators.run":  # type: ignore[union-attr]
                task.cancel()

    async def _surely(self, command: Callable[[], Any]) -> None:
        for _ in range(10):
            if await self.cluster.submit(command()) is not None:
                return
            await asyncio.sleep(2.0)

    async def _answer_alarms(self) -> None:
        """What an operator does who reads the alarms' remedies."""
        while True:
            await asyncio.sleep(self.rng.uniform(3.0, 10.0))
            leader = self.cluster.checker.leader()
            kinds = sorted({kind for kind, _ in leader.view.alarms}) if leader is not None else []
            if "MASS_STOP" in kinds:
                await self.cluster.submit(Confirm("stops"))
            if any(kind.startswith("STORE_") for kind in kinds):
                await self.cluster.submit(Confirm("store"))
            elif "ORPHANS" in kinds and self.cluster.checker.restored:
                self.cluster.checker.excuses.orphans = True
                await self.cluster.submit(Confirm(self.rng.choice(("adopt", "stop"))))

    async def _command(self) -> None:
        rng = self.rng
        app_id = f"default/app{rng.randrange(APPS)}"
        choice: Coroutine[Any, Any, None]
        match rng.randrange(12):
            case 0 | 1 | 2:
                choice = self._apply(app_id, self._spec())
            case 3 | 4 | 5:
                choice = self._scale(app_id, rng.randrange(5))
            case 6:
                choice = self._delete(app_id)
            case 7 | 8:
                choice = self._stop()
            case 9:
                choice = self._cordon(cordon=True)
            case 10:
                choice = self._cordon(cordon=False)
            case _:
                choice = self._confirm()
        await choice

    def _spec(self, *, least: int | None = None) -> Spec:
        rng = self.rng
        self._tag += 1
        unplaceable = least is None and rng.random() < 0.15
        return Spec(
            image="host",
            env={"TAG": str(self._tag)},
            num_gpus=rng.choice((0, 1, 1, 1, 2)),
            machine_type=("B200-180GB",) if unplaceable else (),
            resources=Resources(1000, rng.choice((1, 8, 16)) * GIB),
            scaling=Scaling(
                min_concurrency=rng.randrange(4) if least is None else least,
                max_concurrency=5,
                startup_timeout_s=60.0,
                request_timeout_s=60.0,
            ),
        )

    async def _wish(self, app_id: str, wish: Wish, command: Any) -> None:
        self.cluster.checker.excuses.wishes.setdefault(app_id, []).append(wish)
        self.cluster.checker.note(f"operator: {wish.kind} {app_id} {wish.wanted}")
        if await self.cluster.submit(command) is not None:
            wish.done_s = asyncio.get_running_loop().time()

    async def _apply(self, app_id: str, spec: Spec) -> None:
        wish = Wish("apply", spec.scaling.min_concurrency, asyncio.get_running_loop().time())
        await self._wish(app_id, wish, ApplyApp(app_id, spec, f"digest {self._tag}", actor="operator"))

    async def _scale(self, app_id: str, least: int) -> None:
        wish = Wish("scale", least, asyncio.get_running_loop().time())
        await self._wish(app_id, wish, ScaleApp(app_id, ScaleOverride(min_concurrency=least), actor="operator"))

    async def _delete(self, app_id: str) -> None:
        await self._wish(
            app_id, Wish("delete", 0, asyncio.get_running_loop().time()), DeleteApp(app_id, actor="operator")
        )

    async def _stop(self) -> None:
        leader = self.cluster.checker.leader()
        if leader is not None and leader.view.runners:
            runner_id = self.rng.choice(sorted(leader.view.runners))
            self.cluster.checker.excuses.runners.add(runner_id)
            self.cluster.checker.note(f"operator: stop {runner_id}")
            await self.cluster.submit(StopRunner(runner_id, kill=self.rng.random() < 0.5, actor="operator"))

    async def _cordon(self, *, cordon: bool) -> None:
        node_id = self.rng.choice(list(self.cluster.hosts))
        await self.cluster.submit(CordonNode(node_id, cordon, "test", actor="operator"))

    async def _confirm(self) -> None:
        await self.cluster.submit(Confirm("stops", actor="operator"))
