"""What goes wrong in the light fleet, and what operators do to it meanwhile.

Everything is drawn from the world's `Random`. Faults end by themselves or with `heal`; so do commands that would keep
something from coming to rest (drains, cordons, pauses).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fal_scheduler.core.events import (
    Confirm,
    CordonNode,
    DeleteApp,
    GatewayReach,
    ScaleApp,
    StopRunner,
)
from fal_scheduler.core.gpu_events import QuarantineGpu, ReleaseGpu
from fal_scheduler.core.node_events import CancelDrain, DrainNode, LabelNode, NodeNotice
from fal_scheduler.core.quota_events import SetQuota
from fal_scheduler.core.records import RolloutPolicy, ScaleOverride
from fal_scheduler.core.rollout_events import SetRevision, SetRollout
from sim.fleet_node import Box, FleetNode

if TYPE_CHECKING:
    from sim.fleet_world import App, FleetWorld

FAULT_EVERY_S: Final = 400.0
COMMAND_EVERY_S: Final = 300.0
CONFIRM_AFTER_S: Final = 240.0


class Faults:
    """See the module. `counts`: how often each thing happened."""

    def __init__(self, world: FleetWorld) -> None:
        self.world, self.rng = world, world.rng
        self.counts: Counter[str] = Counter()
        self.gpus: dict[tuple[str, str], None] = {}  # faulty or taken out, by node and GPU
        self.reached: dict[str, None] = {}  # machines that gateways reach though the scheduler does not
        self._told_reached: tuple[object, frozenset[str]] = (None, frozenset())  # the leader and what it was told
        self.store_stalled = self.stood_still = False
        self._confirming = False
        self._kinds: dict[str, tuple[int, Callable[[], None]]] = {
            "crash": (5, self._machine_crashes),
            "partition": (5, self._partition),
            "zone": (1, self._zone_falls_silent),
            "all silent": (1, self._all_silent),
            "asymmetric": (2, self._asymmetric),
            "agents restart": (2, self._agents_restart),
            "store stall": (2, self._store_stalls),
            "stand still": (2, self._stands_still),
            "leader": (3, self._leader_changes),
            "spot wave": (2, self._spot_wave),
            "container": (5, self._container_fails),
            "gpu": (3, self._gpu_fails),
        }
        self._commands: dict[str, tuple[int, Callable[[], None]]] = {
            "deploy": (6, self._deploy),
            "bad deploy": (2, self._bad_deploy),
            "steer": (3, self._steer),
            "drain": (4, self._drain),
            "cordon": (2, self._cordon),
            "scale": (3, self._scale),
            "quota": (2, self._quota),
            "take gpu": (1, self._take_gpu),
            "stop": (2, self._stop),
            "label": (1, self._label),
            "delete": (1, self._delete),
        }
        world.after(600.0, self._next_fault)
        world.after(600.0, self._next_command)

    # --- when -------------------------------------------------------------------------------------------------------

    def _next_fault(self) -> None:
        self.world.after(self.rng.expovariate(1 / FAULT_EVERY_S), self._next_fault)
        if self.world.chaos:
            self._one_of(self._kinds)

    def _next_command(self) -> None:
        self.world.after(self.rng.expovariate(1 / COMMAND_EVERY_S), self._next_command)
        if self.world.chaos and self.world.leader is not None:
            self._one_of(self._commands)

    def _one_of(self, kinds: dict[str, tuple[int, Callable[[], None]]]) -> None:
        name = self.rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        self.counts[name] += 1
        self.world.trace(f"-- {name}")
        kinds[name][1]()

    def heal(self) -> None:
        """Everything that is broken is mended, everything that an operator holds is let go."""
        world = self.world
        world.trace("-- healing")
        if self.store_stalled:
            self._store_goes_on()
        if self.stood_still:
            self._goes_on()
        if world.leader is None:
            world.take_over()
        self.reached.clear()
        self._told_reached = (None, frozenset())
        for node in world.nodes.values():
            node.agent_up = True
            world.mend(node)
            world.boot(node)
            world.connect(node.id)
        for node_id, gpu in list(self.gpus):
            self._gpu_returns(node_id, gpu)
        assert world.leader is not None
        for gateway in range(2):
            world.offer(GatewayReach(f"reach{gateway}", {}, world.leader.now_s))
        world.after(30.0, self._let_go)

    def _let_go(self) -> None:
        world = self.world
        leader = world.leader
        assert leader is not None
        for node in list(leader.state.nodes.values()):
            if node.drain is not None or node.cordoned:
                world.offer(CancelDrain(node.id))
        for app_id in list(leader.state.rolling):
            world.offer(SetRollout(app_id, "resume"))
        world.after(60.0, self._promote)

    def _promote(self) -> None:
        leader = self.world.leader
        assert leader is not None
        for app_id in list(leader.state.rolling):
            self.world.offer(SetRollout(app_id, "promote"))

    def mass_stop(self) -> None:
        """An operator is asked to confirm, and does some time later."""
        if not self._confirming:
            self._confirming = True
            self.world.after(CONFIRM_AFTER_S, self._confirm)

    def _confirm(self) -> None:
        self._confirming = False
        self.world.offer(Confirm("stops"))

    # --- machines and lines -----------------------------------------------------------------------------------------

    def _healthy(self) -> list[FleetNode]:
        return [node for node in self.world.nodes.values() if node.talks]

    def _some(self, most: int) -> list[FleetNode]:
        healthy = self._healthy()
        return self.rng.sample(healthy, min(len(healthy), self.rng.randrange(1, most + 1)))

    def _machine_crashes(self) -> None:
        for node in self._some(3):
            self.world.crash(node)
            self.world.after(self.rng.choice((40.0, 300.0, 3600.0)) + self.rng.uniform(0, 60), self._boot(node))

    def _boot(self, node: FleetNode) -> Callable[[], None]:
        return lambda: self.world.boot(node)

    def _silence(self, nodes: list[FleetNode], least_s: float, most_s: float) -> None:
        for node in nodes:
            self.world.cut(node, noticed=self.rng.random() < 0.5)
            self.world.after(self.rng.uniform(least_s, most_s), lambda node=node: self._back(node))

    def _back(self, node: FleetNode) -> None:
        self.reached.pop(node.id, None)
        self.world.mend(node)

    def _partition(self) -> None:
        self._silence(self._some(5), 3.0, self.rng.choice((14.0, 50.0, 400.0)))

    def _zone_falls_silent(self) -> None:
        zone = self.rng.choice(("z1", "z2", "z3"))
        least_s = self.rng.choice((10.0, 70.0, 200.0))
        self._silence([node for node in self._healthy() if node.zone == zone], least_s, least_s + 60.0)

    def _all_silent(self) -> None:
        least_s = self.rng.choice((20.0, 70.0, 150.0))
        self._silence(self._healthy(), least_s, least_s + 10.0)

    def _asymmetric(self) -> None:
        nodes = self._some(4)
        self.reached.update(dict.fromkeys(node.id for node in nodes))
        self._silence(nodes, 60.0, 300.0)
        self._reach()

    def reached_as_told(self, leader: object, node_id: str) -> bool:
        """Whether the last word that this leader had of a gateway is that it reaches the machine."""
        told_to, reached = self._told_reached
        return leader is told_to and node_id in reached and node_id in self.reached

    def _reach(self) -> None:
        """Gateways tell whom they reach, while it matters."""
        leader = self.world.leader
        if not self.reached:
            return
        if leader is not None:
            reached = {id_: "direct" for id_ in sorted(self.reached) if self.world.nodes[id_].up}
            self.world.offer(GatewayReach("reach0", reached, leader.now_s))
            self._told_reached = (leader, frozenset(reached))
        self.world.after(15.0, self._reach)

    def _agents_restart(self) -> None:
        for node in self._some(20):
            if self.world.leader is not None:
                self.world.leader.hear(node)
            node.agent_up = node.connected = False
            self.world.after(self.rng.uniform(1.0, 12.0), lambda node=node: self._agent_back(node))

    def _agent_back(self, node: FleetNode) -> None:
        node.agent_up = True
        self.world.connect(node.id)

    def _spot_wave(self) -> None:
        spot = [node for node in self._healthy() if node.pool == "spot" and node.connected]
        leader = self.world.leader
        if leader is None:
            return
        for node in self.rng.sample(spot, len(spot) // 3):
            live = leader.state.live.get(node.id)
            if live is None or live.session_id != node.session_id:
                continue
            self.world.offer(NodeNotice(node.id, node.session_id, "spot", 120.0, "reclaimed", leader.now_s))
            self.world.after(120.0, lambda node=node: self._reclaimed(node))
            self.world.after(self.rng.uniform(600.0, 3600.0), lambda node=node: self._spot_returns(node))

    def _reclaimed(self, node: FleetNode) -> None:
        if node.up and self.world.chaos:
            self.world.crash(node)

    def _spot_returns(self, node: FleetNode) -> None:
        self.world.boot(node)
        self.world.offer(CancelDrain(node.id))

    # --- schedulers -------------------------------------------------------------------------------------------------

    def _store_stalls(self) -> None:
        leader = self.world.leader
        if leader is None or self.store_stalled or self.stood_still:
            return
        leader.waits = self.store_stalled = True
        self.world.after(self.rng.uniform(1.0, 40.0), self._store_goes_on)

    def _store_goes_on(self) -> None:
        leader = self.world.leader
        if self.store_stalled and leader is not None and leader.waits:
            leader.store_answers(done=self.rng.random() < 0.6)
        self.store_stalled = False

    def _stands_still(self) -> None:
        leader = self.world.leader
        if leader is None or self.store_stalled or self.stood_still:
            return
        leader.stand_still()
        self.stood_still = True
        self.world.after(self.rng.choice((4.0, 17.0, 90.0)), self._goes_on)

    def _goes_on(self) -> None:
        if self.stood_still and self.world.leader is not None:
            self.stood_still = False
            self.world.leader.go_on(tick_first=self.rng.random() < 0.5)

    def _leader_changes(self) -> None:
        """The leader is killed, with what was on its way to the store; another takes over with another clock."""
        world = self.world
        if world.leader is None or self.stood_still:
            return
        world.leader = None
        self.store_stalled = False
        if self.rng.random() < 0.5:  # some nodes have heard of a leader that the store has never seen
            term = world.store.term + self.rng.randrange(2, 5)
            for node in self._some(10):
                node.term_seen = term
        skew_s = self.rng.uniform(-20.0, 20.0)
        world.after(self.rng.uniform(1.0, 9.0), lambda: world.take_over(skew_s=skew_s) if not world.leader else None)

    # --- containers and GPUs ----------------------------------------------------------------------------------------

    def _running(self) -> list[tuple[FleetNode, Box]]:
        return [(node, box) for node in self.world.nodes.values() if node.up for box in node.live()]

    def _container_fails(self) -> None:
        running = self._running()
        for node, box in self.rng.sample(running, min(len(running), self.rng.randrange(1, 4))):
            self.world.fail(node, box)

    def _gpu_fails(self) -> None:
        node = self.rng.choice(list(self.world.nodes.values()))
        gpu = self.rng.choice(node.inventory.gpus).id
        fault = self.rng.choice(("reset", "dead", "foreign", "slow"))
        node.judge(gpu, fault)
        self.gpus[node.id, gpu] = None
        if fault == "dead":
            for box in node.live():
                if gpu in box.status.gpus:
                    self.world.fail(node, box, "its GPU is dead")
        self.world.flush(node)
        self.world.after(self.rng.uniform(120.0, 3600.0), lambda: self._gpu_returns(node.id, gpu))

    def _gpu_returns(self, node_id: str, gpu: str) -> None:
        if (node_id, gpu) in self.gpus:
            del self.gpus[node_id, gpu]
            node = self.world.nodes[node_id]
            node.judge(gpu, "")
            self.world.flush(node)
            self.world.offer(ReleaseGpu(node_id, gpu))

    # --- operators --------------------------------------------------------------------------------------------------

    def _app(self) -> App:
        return self.world.apps[self.rng.choice(sorted(self.world.apps))]

    def _deploy(self, *, bad: bool = False) -> None:
        from sim.fleet_world import with_version

        app, rng = self._app(), self.rng
        app.version += 1
        if bad:
            app.bad[app.version] = None
        policy = RolloutPolicy(
            strategy="recreate" if rng.random() < 0.15 else "",
            canary_perc=rng.choice((0, 0, 20)),
            max_disturbed_perc=rng.choice((0, 0, 10, 50)),
            deadline_s=600.0,
            canary_hold_s=rng.choice((0.0, 120.0)),
        )
        app.spec = with_version(app.spec, app.version, policy)
        self.world.apply(app)

    def _bad_deploy(self) -> None:
        self._deploy(bad=True)

    def _steer(self) -> None:
        leader = self.world.leader
        assert leader is not None
        rolling = sorted(leader.state.rolling)
        if rolling and self.rng.random() < 0.8:
            action = self.rng.choice(("pause", "resume", "promote", "abort"))
            self.world.offer(SetRollout(self.rng.choice(rolling), action))
        else:
            self.world.offer(SetRevision(self._app().id))

    def _drain(self) -> None:
        rng = self.rng
        nodes = list(self.world.nodes.values())
        for node in rng.sample(nodes, min(len(nodes), rng.randrange(1, 6))):
            kind, deadline_s = rng.choice(("drain", "maintenance", "reboot")), rng.choice((None, 60.0, 600.0))
            force = rng.random() < 0.1
            self.world.offer(DrainNode(node.id, kind, deadline_s, force=force, uncordon=True))
            if rng.random() < 0.5:
                self.world.after(rng.uniform(30.0, 1800.0), lambda node=node: self.world.offer(CancelDrain(node.id)))

    def _cordon(self) -> None:
        nodes = list(self.world.nodes.values())
        for node in self.rng.sample(nodes, min(len(nodes), 3)):
            self.world.offer(CordonNode(node.id, True, "test"))
            wait_s = self.rng.uniform(60.0, 1800.0)
            self.world.after(wait_s, lambda node=node: self.world.offer(CordonNode(node.id, False)))

    def _scale(self) -> None:
        app = self._app()
        if self.rng.random() < 0.4:
            self.world.offer(ScaleApp(app.id, ScaleOverride(), reset=True))
        else:
            self.world.offer(ScaleApp(app.id, ScaleOverride(min_concurrency=self.rng.randrange(4)), reset=True))

    def _quota(self) -> None:
        team = self.rng.choice(("media", "batch", "strict"))
        slots = sum(len(node.inventory.gpus) for node in self.world.nodes.values())
        milli = int(slots * self.rng.uniform(0.05, 0.4)) * 1000
        self.world.offer(SetQuota(team, milli, team != "strict"))

    def _take_gpu(self) -> None:
        node = self.rng.choice(list(self.world.nodes.values()))
        gpu = self.rng.choice(node.inventory.gpus).id
        self.gpus[node.id, gpu] = None
        self.world.offer(QuarantineGpu(node.id, gpu, "test"))
        self.world.after(self.rng.uniform(300.0, 3600.0), lambda: self._gpu_returns(node.id, gpu))

    def _stop(self) -> None:
        leader = self.world.leader
        assert leader is not None
        if leader.state.runners:
            runner_id = self.rng.choice(sorted(leader.state.runners))
            self.world.offer(StopRunner(runner_id, kill=self.rng.random() < 0.5, actor="op"))

    def _label(self) -> None:
        node = self.rng.choice(list(self.world.nodes.values()))
        self.world.offer(LabelNode(node.id, {"rack": str(self.rng.randrange(5))}))

    def _delete(self) -> None:
        """An app goes, and comes back some time later."""
        app = self._app()
        self.world.offer(DeleteApp(app.id, actor="op"))
        self._comes_back(app)

    def _comes_back(self, app: App) -> None:
        def again() -> None:
            leader = self.world.leader
            if leader is None or app.id in leader.state.apps:
                self.world.after(60.0, again)
            else:
                app.bad.clear()
                self.world.apply(app)

        self.world.after(200.0, again)


__all__ = ["Faults"]
