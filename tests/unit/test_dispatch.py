"""The Dispatch protocol over a link in memory: routes, leases, refusals, reachability and tunnels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from fake_engine import FakeEngine
from fal_contract.clock import ManualClock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Role
from fal_contract.limits import LEASE_TTL_S
from fal_contract.v1 import agent_pb2, serving_pb2, state_pb2
from fal_scheduler.core.events import AppChanged, GatewayReach, NodeChanged, RouteChanged
from fal_scheduler.core.records import Goal, RunnerState, Scaling, Spec
from fal_scheduler.core.told import Endpoint, Health, RunnerStatus
from fal_scheduler.dispatch import Dispatcher
from fal_scheduler.tunnels import QUIET_S
from virtual_time import run_virtually

END = object()


class Rig:
    """A dispatcher over a fake engine with two-slot runners."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.engine.deploy("t/a", Spec("host", command=("x",), scaling=Scaling(max_multiplexing=2, min_concurrency=1)))
        self.clock = ManualClock()
        self.pushed: list[tuple[str, agent_pb2.SchedulerMessage]] = []
        self.dispatcher = Dispatcher(self.engine, clock=self.clock, push=self.push)

    def push(self, node_id: str, message: agent_pb2.SchedulerMessage) -> bool:
        self.pushed.append((node_id, message))
        return True

    def serve(self, runner_id: str, node_id: str = "n1", state: RunnerState = RunnerState.IDLE) -> None:
        """A runner of t/a is on a node that tells `state`."""
        if runner_id not in self.engine.view.runners:
            self.engine.run(runner_id, node_id)
        live = self.engine.view.live_of(node_id)
        live.session_id, live.health = "s", Health.READY
        live.endpoints = (Endpoint("lan", "10.0.0.1", 7000),)
        live.statuses[runner_id] = RunnerStatus(runner_id, state, assignment_id=f"a-{runner_id}", max_multiplexing=2)
        self.engine.emit(RouteChanged(runner_id))

    def goal(self, runner_id: str, goal: Goal) -> None:
        self.engine.put(replace(self.engine.view.runners[runner_id], goal=goal))
        self.engine.emit(RouteChanged(runner_id))


class Link:
    """The gateway's end of one stream."""

    def __init__(self, rig: Rig, id_: str = "g1", *, peer: str = "", role: Role = Role.SERVING) -> None:
        self.id = id_
        self.up: asyncio.Queue[object] = asyncio.Queue()
        self.down: asyncio.Queue[serving_pb2.DispatchMessage] = asyncio.Queue()
        self.task = asyncio.create_task(rig.dispatcher.run(peer or id_, role, self._incoming(), self._send))

    async def _incoming(self) -> AsyncIterator[serving_pb2.GatewayMessage]:
        while (item := await self.up.get()) is not END:
            assert isinstance(item, serving_pb2.GatewayMessage)
            yield item

    async def _send(self, message: serving_pb2.DispatchMessage) -> None:
        self.down.put_nowait(message)

    async def next(self, kind: str) -> serving_pb2.DispatchMessage:
        async with asyncio.timeout(60):
            message = await self.down.get()
        assert message.WhichOneof("kind") == kind, message
        return message

    def hello(self, **more: object) -> None:
        hello = serving_pb2.GatewayHello(
            versions=agent_pb2.Versions(min=1, max=1),
            gateway_id=self.id,
            **more,  # type: ignore[arg-type]
        )
        self.up.put_nowait(serving_pb2.GatewayMessage(hello=hello))

    async def open(self, **more: object) -> serving_pb2.Routes:
        self.hello(**more)
        await self.next("welcome")
        return (await self.next("routes")).routes

    def want(self, *wants: tuple[str, int]) -> None:
        message = serving_pb2.Wants(wants=[serving_pb2.Want(app=app, slots=slots) for app, slots in wants])
        self.up.put_nowait(serving_pb2.GatewayMessage(wants=message))

    def update(self, lease_id: str, *, returned: int = 0, renew: bool = False) -> None:
        update = serving_pb2.LeaseUpdate(lease_id=lease_id, returned=returned, renew=renew)
        self.up.put_nowait(serving_pb2.GatewayMessage(updates=serving_pb2.LeaseUpdates(updates=[update])))

    def reach(self, node_id: str, path: str, *, wants_tunnel: bool = False) -> None:
        reach = serving_pb2.Reach(node_id=node_id, path=path, wants_tunnel=wants_tunnel)
        self.up.put_nowait(serving_pb2.GatewayMessage(reached=serving_pb2.Reachability(nodes=[reach])))

    async def leases(self) -> serving_pb2.Leases:
        return (await self.next("leases")).leases

    async def failure(self) -> FalError:
        with pytest.raises(FalError) as caught:
            async with asyncio.timeout(60):
                await self.task
        return caught.value

    async def close(self) -> None:
        self.up.put_nowait(END)
        await asyncio.gather(self.task, return_exceptions=True)


def dispatch_test(test: Callable[[Rig], Awaitable[None]]) -> None:
    async def body() -> None:
        await test(Rig())
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    run_virtually(body())


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        (Spec("host"), False),
        (Spec("host", model="t/m"), False),
        (Spec("host", command=("x",)), True),
        (Spec("host", port=8000), True),
        (Spec("host", socket="s"), True),
        (Spec("t/image"), True),
    ],
)
def test_only_our_worker_is_no_server_of_the_apps_own(spec: Spec, own: bool) -> None:
    assert spec.own_server is own


def test_the_whole_table_then_changes() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        link = Link(rig)
        routes = await link.open()
        assert routes.complete
        (route,) = routes.routes
        assert (route.runner_id, route.app, route.node_id, route.max_multiplexing) == ("t/a-1", "t/a", "n1", 2)
        assert (route.endpoints[0].host, route.endpoints[0].port) == ("10.0.0.1", 7000)
        assert route.any_path  # it has a command of its own
        rig.serve("t/a-2", "n2")
        change = (await link.next("routes")).routes
        assert not change.complete
        assert [x.runner_id for x in change.routes] == ["t/a-2"]
        rig.goal("t/a-1", Goal.DRAIN)
        assert list((await link.next("routes")).routes.removed) == ["t/a-1"]

    dispatch_test(test)


def test_idle_and_running_are_the_same_to_a_gateway() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        link = Link(rig)
        await link.open()
        rig.serve("t/a-1", state=RunnerState.RUNNING)
        await asyncio.sleep(1)
        assert link.down.empty()

    dispatch_test(test)


def test_a_silent_nodes_runners_keep_route_and_slots() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        link = Link(rig)
        await link.open()
        link.want(("t/a", 1))
        (lease,) = (await link.leases()).leases
        rig.engine.view.live["n1"].health = Health.UNKNOWN
        rig.engine.emit(NodeChanged("n1"))
        (route,) = (await link.next("routes")).routes.routes
        assert route.state == state_pb2.RUNNER_STATE_UNKNOWN
        link.update(lease.lease_id, renew=True)
        assert (await link.leases()).leases[0].lease_id == lease.lease_id
        link.want(("t/a", 1))
        assert (await link.leases()).leases[0].slots == 1

    dispatch_test(test)


def test_wants_are_met_and_a_freed_slot_goes_to_who_waits() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        one, two = Link(rig, "g1"), Link(rig, "g2")
        await one.open()
        await two.open()
        one.want(("t/a", 5))
        (lease,) = (await one.leases()).leases
        assert (lease.slots, lease.runner_id, lease.node_id, lease.term) == (2, "t/a-1", "n1", 3)
        two.want(("t/a", 1))
        await asyncio.sleep(1)
        assert two.down.empty()  # no refusal either: there is a runner, it is only busy
        one.want()
        one.update(lease.lease_id, returned=1)
        (second,) = (await two.leases()).leases
        assert (second.slots, second.runner_id) == (1, "t/a-1")
        assert one.down.empty()

    dispatch_test(test)


def test_drain_revokes_leases() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        link = Link(rig)
        await link.open()
        link.want(("t/a", 1))
        (lease,) = (await link.leases()).leases
        rig.goal("t/a-1", Goal.DRAIN)
        assert list((await link.next("routes")).routes.removed) == ["t/a-1"]
        assert list((await link.leases()).revoked) == [lease.lease_id]

    dispatch_test(test)


def test_refusals_say_why_and_change_with_the_reason() -> None:
    async def test(rig: Rig) -> None:
        link = Link(rig)
        await link.open()
        link.want(("t/nowhere", 1), ("t/a", 1))
        refusals = {x.app: x for x in (await link.next("refusals")).refusals.refusals}
        assert refusals["t/nowhere"].code == Code.NOT_FOUND
        assert refusals["t/a"].code == Code.NO_CAPACITY
        assert "no runner of t/a is ready" in refusals["t/a"].what
        rig.engine.emit(AppChanged("t/a"))
        await asyncio.sleep(1)
        assert link.down.empty()  # the same reason is no news
        rig.serve("t/a-1", state=RunnerState.SETUP)
        rig.engine.emit(AppChanged("t/a"))
        (again,) = (await link.next("refusals")).refusals.refusals
        assert "setup on name-n1" in again.what
        link.want(("t/a", 1))  # told again: answered again
        assert (await link.next("refusals")).refusals.refusals[0].app == "t/a"
        rig.serve("t/a-1")
        await link.next("routes")
        assert (await link.leases()).leases[0].slots == 1

    dispatch_test(test)


def test_a_gateway_sees_the_apps_that_it_serves_only() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        link = Link(rig)
        assert list((await link.open(apps=["t/b"])).routes) == []
        link.want(("t/a", 1))
        rig.serve("t/a-2")
        await asyncio.sleep(1)
        assert link.down.empty()

    dispatch_test(test)


def test_leases_survive_a_broken_stream() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        link = Link(rig)
        await link.open()
        link.want(("t/a", 2))
        (lease,) = (await link.leases()).leases
        await link.close()
        other = Link(rig, "g2")
        await other.open()
        other.want(("t/a", 1))
        await asyncio.sleep(1)
        assert other.down.empty()
        back = Link(rig)
        held = [
            serving_pb2.HeldLease(lease_id=lease.lease_id, runner_id="t/a-1", slots=2, term=3),
            serving_pb2.HeldLease(lease_id="1-1", runner_id="t/gone-1", slots=1, term=1),
        ]
        await back.open(held=held)
        told = await back.leases()
        assert [x.lease_id for x in told.leases] == [lease.lease_id]
        assert list(told.revoked) == ["1-1"]

    dispatch_test(test)


def test_a_dead_gateways_slots_come_back_after_their_time() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        expiry = asyncio.create_task(rig.dispatcher.expire())
        dead, alive = Link(rig, "dead"), Link(rig, "alive")
        await dead.open()
        await alive.open()
        dead.want(("t/a", 2))
        await dead.leases()
        await dead.close()
        alive.want(("t/a", 1))
        await asyncio.sleep(2)
        assert alive.down.empty()
        rig.clock.advance(LEASE_TTL_S + 5)
        assert (await alive.leases()).leases[0].slots == 1
        expiry.cancel()

    dispatch_test(test)


def test_reachability_reaches_the_core_and_node_views() -> None:
    async def test(rig: Rig) -> None:
        rig.serve("t/a-1")
        link = Link(rig)
        await link.open()
        link.reach("n1", "direct")
        link.reach("n2", "none")
        await asyncio.sleep(1)
        assert rig.engine.offered[-1] == GatewayReach("g1", {"n1": "direct"}, rig.clock.monotonic_s())
        assert rig.dispatcher.tunnels.paths("n1") == {"g1": "direct"}
        assert rig.dispatcher.tunnels.paths("n2") == {"g1": "none"}
        await link.close()
        assert rig.engine.offered[-1] == GatewayReach("g1", {}, rig.clock.monotonic_s())
        assert rig.dispatcher.tunnels.paths("n1") == {}

    dispatch_test(test)


def test_nodes_are_told_the_gateways_that_want_tunnels() -> None:
    async def test(rig: Rig) -> None:
        expiry = asyncio.create_task(rig.dispatcher.expire())
        endpoints = [agent_pb2.Endpoint(network="lan", host="10.9.9.9", port=9)]
        link = Link(rig)
        await link.open(tunnel_endpoints=endpoints)
        link.reach("n1", "none", wants_tunnel=True)
        await asyncio.sleep(1)
        assert rig.pushed == []  # a new leader does not know all gateways yet
        rig.clock.advance(QUIET_S)
        await asyncio.sleep(2)
        ((node, message),) = rig.pushed
        assert (node, [x.gateway_id for x in message.gateways.gateways]) == ("n1", ["g1"])
        assert rig.dispatcher.tunnels.gateway_set("n1") == message.gateways
        await link.close()
        await asyncio.sleep(2)
        assert len(rig.pushed) == 1  # it may come back
        rig.clock.advance(LEASE_TTL_S + 1)
        await asyncio.sleep(2)
        assert list(rig.pushed[-1][1].gateways.gateways) == []
        expiry.cancel()

    dispatch_test(test)


def test_tunnels_only_under_the_certificates_name() -> None:
    async def test(rig: Rig) -> None:
        endpoints = [agent_pb2.Endpoint(network="lan", host="10.9.9.9", port=9)]
        for link in (Link(rig, "g1", peer="other"), Link(rig, "g1", role=Role.OPERATOR)):
            link.hello(tunnel_endpoints=endpoints)
            assert (await link.failure()).code is Code.PERMISSION_DENIED

    dispatch_test(test)


def test_another_holder_cannot_take_a_gateways_place() -> None:
    async def test(rig: Rig) -> None:
        first = Link(rig)
        await first.open()
        thief = Link(rig, peer="other")
        thief.hello()
        assert (await thief.failure()).code is Code.PERMISSION_DENIED
        again = Link(rig)
        await again.open()
        assert "took this one's place" in (await first.failure()).what

    dispatch_test(test)


@pytest.mark.parametrize("path", ["", "carrier pigeon"])
def test_strange_paths_end_the_stream(path: str) -> None:
    async def test(rig: Rig) -> None:
        link = Link(rig)
        await link.open()
        link.reach("n1", path)
        assert (await link.failure()).code is Code.INVALID

    dispatch_test(test)


def test_messages_are_coalesced_in_two_milliseconds() -> None:
    async def test(rig: Rig) -> None:
        loop = asyncio.get_running_loop()
        link = Link(rig)
        await link.open()
        await asyncio.sleep(1)
        start_s = loop.time()
        for n in range(30):
            rig.serve(f"t/a-{n:02d}")
            await asyncio.sleep(0.0001)
        assert len((await link.next("routes")).routes.routes) == 1
        rest = (await link.next("routes")).routes.routes
        while len(rest) < 29:
            assert loop.time() - start_s <= 0.0061
            more = (await link.next("routes")).routes.routes
            rest = [*rest, *more]  # type: ignore[assignment]
        assert len(rest) == 29

    dispatch_test(test)
