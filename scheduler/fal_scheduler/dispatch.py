"""The serving API: gateways' streams, the route table that they follow, and the slots that they hold.

Down goes the whole route table, then changes to it; leases, and refusals of wants that no runner can meet; each at
most once in 2 ms, the first at once. Up come wants (the whole list each time), returned and renewed leases, and
which nodes the gateway reaches. What waits to go down is a set of ids, so that it cannot grow without bound.

Requests never pass here. Transport-free like `sessions`. Must not decide who may run: routes follow the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Final, TypeVar

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.identity import Role
from fal_contract.limits import WANT_WINDOW_S
from fal_contract.v1 import agent_pb2, serving_pb2
from fal_contract.versions import agree
from fal_scheduler.core.events import AppChanged, Effect, GatewayReach, NodeChanged, RouteChanged
from fal_scheduler.core.serving import why_not_serving
from fal_scheduler.core.slots import Held, Lease, SlotBook, Want
from fal_scheduler.demand_teller import DemandTeller
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.leading_edge import LeadingEdge
from fal_scheduler.routes import RouteTable, apps_of
from fal_scheduler.stream_edges import first_message, send_bounded, until_first
from fal_scheduler.tunnels import PATHS, TunnelBook

GATEWAYS_MAX: Final = 1024
WANTS_MAX: Final = 1024
HELD_MAX: Final = 100_000
NODES_REACHED_MAX: Final = 20_000
EXPIRY_INTERVAL_S: Final = 1.0
# A message holds 4 MiB; a route or lease with long names and several addresses stays below 1 KiB.
ROUTES_PER_MESSAGE: Final = 2000
LEASES_PER_MESSAGE: Final = 4000

Send = Callable[[serving_pb2.DispatchMessage], Awaitable[None]]
_Refused = tuple[str, str]  # code, what
T = TypeVar("T")


@dataclass(eq=False)
class _Gateway:
    """One open stream. Everything but `apps` and `refused` is what waits to go down."""

    id: str
    peer: str
    apps: frozenset[str]  # empty: all
    signal: LeadingEdge
    closed: asyncio.Future[FalError]
    routes: dict[str, None] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    revoked: dict[str, None] = field(default_factory=dict)
    refused: dict[str, _Refused] = field(default_factory=dict)  # told already, by app
    check_refusals: bool = False

    def wants(self, app: str) -> bool:
        """Whether this gateway serves the app."""
        return not self.apps or app in self.apps


class Dispatcher:
    """All gateways of one leader. Make a new one for each term; `close` ends it."""

    def __init__(
        self,
        engine: EnginePort,
        *,
        clock: Clock,
        push: Callable[[str, agent_pb2.SchedulerMessage], bool],
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._gateways: dict[str, _Gateway] = {}
        self._served = self._failed = 0  # requests, as gateways tell
        self.book = SlotBook(engine.view.term)
        self._demand = DemandTeller(self.book, engine.offer, clock)
        self._table = RouteTable()
        self.tunnels = TunnelBook(push, now_s=clock.monotonic_s())
        for runner_id in list(engine.view.runners):
            self._refresh_route(runner_id)
        self._unsubscribe = engine.subscribe(self._on_effect)

    # --- one stream -------------------------------------------------------------------------------------------------

    async def run(
        self, peer_name: str, role: Role, incoming: AsyncIterator[serving_pb2.GatewayMessage], send: Send
    ) -> None:
        """Serve one stream until it ends. Returns when the gateway closed it; raises FalError to close it."""
        message = await first_message(incoming)
        hello = _hello_in(message, peer_name, role)
        version = agree(f"gateway {hello.gateway_id}", hello.versions.min, hello.versions.max)
        gateway = self._enter(hello, peer_name)
        try:
            view = self._engine.view
            assert view.meta is not None, "a leader has loaded its store"
            welcome = serving_pb2.DispatchWelcome(
                version=version, cluster_id=view.meta.cluster_id, epoch=view.meta.epoch, term=view.term
            )
            who = f"gateway {gateway.id}"
            await send_bounded(send, serving_pb2.DispatchMessage(welcome=welcome), who)
            gateway.routes.clear()
            for at, routes in enumerate(_chunks(self._table.all(gateway.apps), ROUTES_PER_MESSAGE) or [[]]):
                part = serving_pb2.Routes(complete=at == 0, routes=routes, term=view.term)
                await send_bounded(send, serving_pb2.DispatchMessage(routes=part), who)
            writer = asyncio.create_task(self._write(gateway, send))
            reader = asyncio.create_task(self._read(gateway, incoming))
            await until_first(gateway.closed, writer, reader)
        finally:
            self._leave(gateway)

    def _enter(self, hello: serving_pb2.GatewayHello, peer: str) -> _Gateway:
        older = self._gateways.get(hello.gateway_id)
        if older is None and len(self._gateways) >= GATEWAYS_MAX:
            raise FalError(Code.BUSY, f"{GATEWAYS_MAX} gateways are connected", remedy="Run fewer, larger gateways.")
        if older is not None and older.peer != peer:
            raise FalError(
                Code.PERMISSION_DENIED,
                f"gateway id {hello.gateway_id!r} is in use by {older.peer}",
                remedy="Give each gateway an id of its own.",
                field="gateway_id",
            )
        if older is not None and not older.closed.done():
            why = f"a newer stream of gateway {older.id} took this one's place"
            older.closed.set_result(FalError(Code.UNAVAILABLE, why, remedy="Give each gateway an id of its own."))
        gateway = _Gateway(
            hello.gateway_id,
            peer,
            frozenset(hello.apps),
            LeadingEdge(WANT_WINDOW_S),
            asyncio.get_running_loop().create_future(),
        )
        self._gateways[gateway.id] = gateway
        held = [Held(x.lease_id, x.runner_id, x.slots) for x in hello.held]
        kept, gone = self.book.take_over(gateway.id, held, self._clock.monotonic_s())
        self._tell(gateway, kept, gone)
        self.tunnels.enter(gateway.id, hello.tunnel_endpoints)
        return gateway

    def _leave(self, gateway: _Gateway) -> None:
        if self._gateways.get(gateway.id) is gateway:
            del self._gateways[gateway.id]
            self.book.close(gateway.id)
            self._demand.leave(gateway.id)
            self.tunnels.leave(gateway.id, self._clock.monotonic_s())
            self._engine.offer(GatewayReach(gateway.id, {}, self._clock.monotonic_s()))

    # --- up ---------------------------------------------------------------------------------------------------------

    async def _read(self, gateway: _Gateway, incoming: AsyncIterator[serving_pb2.GatewayMessage]) -> None:
        async for message in incoming:
            arrived_s = self._clock.monotonic_s()
            kind = message.WhichOneof("kind")
            if kind == "wants":
                self._take_wants(gateway, message.wants)
            elif kind == "updates":
                self._take_updates(gateway, message.updates, arrived_s)
            elif kind == "reached":
                self._take_reached(gateway, message.reached, arrived_s)
            elif kind == "hello":
                raise invalid("hello", gateway.id, "came twice in one stream", remedy="Open a new stream.")

    def _take_wants(self, gateway: _Gateway, wants: serving_pb2.Wants) -> None:
        if len(wants.wants) > WANTS_MAX:
            raise invalid("wants", len(wants.wants), "are too many", remedy=f"Tell at most {WANTS_MAX} at once.")
        now_s = self._clock.monotonic_s()
        mine = [_want_in(x, now_s) for x in wants.wants if gateway.wants(x.app)]
        self.book.want(gateway.id, mine)
        for want in mine:
            gateway.refused.pop(want.app, None)  # a want is answered each time it is told
        self._grant()
        self._demand.wants(gateway.id, [want for want in wants.wants if gateway.wants(want.app)])
        if any(not self.book.runners(want.app) for want in mine):
            gateway.check_refusals = True
            gateway.signal.set()

    def _take_updates(self, gateway: _Gateway, updates: serving_pb2.LeaseUpdates, now_s: float) -> None:
        for update in updates.updates:
            self._served += update.served
            self._failed += update.failed
            if (ended := update.served + update.failed) and (app := self.book.app_of(update.lease_id)):
                self._demand.ended(gateway.id, app, ended)
            if update.returned:
                self.book.give_back(gateway.id, update.lease_id, update.returned)
                self._demand.slots_changed(gateway.id)
            if update.renew:
                lease = self.book.renew(gateway.id, update.lease_id, now_s)
                self._tell(gateway, [lease] if lease else [], [] if lease else [update.lease_id])
        self._grant()

    def _take_reached(self, gateway: _Gateway, reached: serving_pb2.Reachability, now_s: float) -> None:
        if len(reached.nodes) > NODES_REACHED_MAX:
            raise invalid("nodes", len(reached.nodes), "are too many", remedy=f"At most {NODES_REACHED_MAX}.")
        for reach in reached.nodes:
            if reach.path not in PATHS:
                raise invalid("path", reach.path, "is no path", remedy="Tell direct, tunnel or none.")
            self.tunnels.reach(gateway.id, reach.node_id, reach.path, wants_tunnel=reach.wants_tunnel)
        self._engine.offer(GatewayReach(gateway.id, self.tunnels.reached_by(gateway.id), now_s))

    # --- down -------------------------------------------------------------------------------------------------------

    async def _write(self, gateway: _Gateway, send: Send) -> None:
        """Routes before leases, so that a lease never names a runner that the gateway does not know."""
        if gateway.routes or gateway.leases or gateway.revoked or gateway.check_refusals:
            gateway.signal.set()
        while True:
            await gateway.signal.wait()
            for message in self._messages(gateway):
                await send_bounded(send, message, f"gateway {gateway.id}")

    def _messages(self, gateway: _Gateway) -> Iterable[serving_pb2.DispatchMessage]:
        term = self._engine.view.term
        if gateway.routes:
            changed = list(gateway.routes)
            gateway.routes.clear()
            for ids in _chunks(changed, ROUTES_PER_MESSAGE):
                found = [(i, self._table.get(i)) for i in ids]
                present = [route for _, route in found if route is not None]
                removed = [i for i, route in found if route is None]
                routes = serving_pb2.Routes(routes=present, removed=removed, term=term)
                yield serving_pb2.DispatchMessage(routes=routes)
        if gateway.leases or gateway.revoked:
            leases = [self._lease_to(lease) for lease in gateway.leases.values()]
            revoked = list(gateway.revoked)
            gateway.leases.clear()
            gateway.revoked.clear()
            parts = zip_longest(_chunks(leases, LEASES_PER_MESSAGE), _chunks(revoked, LEASES_PER_MESSAGE), fillvalue=())
            for granted, ended in parts:
                yield serving_pb2.DispatchMessage(leases=serving_pb2.Leases(leases=granted, revoked=ended))
        if gateway.check_refusals:
            gateway.check_refusals = False
            refusals = self._refusals(gateway)
            if refusals:
                yield serving_pb2.DispatchMessage(refusals=serving_pb2.Refusals(refusals=refusals))

    def _lease_to(self, lease: Lease) -> serving_pb2.SlotLease:
        runner = self.book.runner(lease.runner_id)
        return serving_pb2.SlotLease(
            lease_id=lease.id,
            runner_id=lease.runner_id,
            node_id=runner.node_id if runner else "",
            app=lease.app,
            resident=runner.resident if runner else (),
            slots=lease.slots,
            term=self._engine.view.term,
            ttl_s=self.book.ttl_s,
        )

    def _refusals(self, gateway: _Gateway) -> list[serving_pb2.Refusal]:
        """Wants that no runner can meet, where that is news."""
        refusals = []
        for app in dict.fromkeys(want.app for want in self.book.unmet(gateway.id)):
            if self.book.runners(app):
                gateway.refused.pop(app, None)
                continue
            refusal = self._refusal(app)
            key = (refusal.code, refusal.what)
            if gateway.refused.get(app) != key:
                gateway.refused[app] = key
                refusals.append(refusal)
        return refusals

    def _refusal(self, app: str) -> serving_pb2.Refusal:
        record = self._engine.view.apps.get(app)
        if record is None:
            return serving_pb2.Refusal(
                app=app,
                code=Code.NOT_FOUND,
                what=f"app {app!r} does not exist",
                remedy="Deploy it with `falctl app apply`, or correct the name.",
            )
        return serving_pb2.Refusal(
            app=app,
            code=Code.NO_CAPACITY,
            what=f"no runner of {app} is ready: {why_not_serving(self._engine.view, app)}",
            remedy=f"Try again; `falctl explain {app}` tells more.",
        )

    # --- slots ------------------------------------------------------------------------------------------------------

    def _grant(self) -> None:
        """Meet what wants can be met; each gateway is told its own."""
        self.book.term = self._engine.view.term
        by_gateway: dict[str, list[Lease]] = {}
        for lease in self.book.grant(self._clock.monotonic_s()):
            by_gateway.setdefault(lease.gateway, []).append(lease)
        for gateway_id, leases in by_gateway.items():
            gateway = self._gateways.get(gateway_id)
            if gateway is not None:
                self._tell(gateway, leases, [])

    def _tell(self, gateway: _Gateway, leases: Collection[Lease], revoked: Collection[str]) -> None:
        for lease in leases:
            gateway.leases[lease.id] = lease
        for lease_id in revoked:
            gateway.leases.pop(lease_id, None)
            gateway.revoked[lease_id] = None
        if leases or revoked:
            self._demand.slots_changed(gateway.id, [lease.app for lease in leases])
            gateway.signal.set()

    async def expire(self, interval_s: float = EXPIRY_INTERVAL_S) -> None:
        """Take back what nobody renewed and drop gateways that stay away; run as a task."""
        while True:
            await asyncio.sleep(interval_s)
            now_s = self._clock.monotonic_s()
            expired = self.book.expire(now_s)
            for gateway_id in dict.fromkeys(lease.gateway for lease in expired):
                if gateway_id in self._gateways:
                    self._demand.slots_changed(gateway_id)
            if expired:
                self._grant()
            self.tunnels.tick(now_s)

    # --- from the engine ----------------------------------------------------------------------------------------------

    def _on_effect(self, effect: Effect) -> None:
        if isinstance(effect, RouteChanged):
            if self._refresh_route(effect.runner_id):
                self._grant()
        elif isinstance(effect, NodeChanged):
            runners = list(self._engine.view.runners_by_node.get(effect.node_id, ()))
            changed = [self._refresh_route(runner_id) for runner_id in runners]  # all of them, not up to the first
            if any(changed):
                self._grant()
        elif isinstance(effect, AppChanged):
            self._app_changed(effect.app_id)

    def _app_changed(self, app_id: str) -> None:
        """Whoever was refused may be told another reason now."""
        for gateway in self._gateways.values():
            if app_id in gateway.refused:
                gateway.check_refusals = True
                gateway.signal.set()

    def _refresh_route(self, runner_id: str) -> bool:
        """Bring table and book up to the engine's view of one runner; True when the route changed."""
        before = self._table.get(runner_id)
        if not self._table.refresh(self._engine.view, runner_id):
            return False
        slots = self._table.slots(runner_id)
        revoked = self.book.remove_runner(runner_id) if slots is None else self.book.put_runner(slots)
        for lease in revoked:
            gateway = self._gateways.get(lease.gateway)
            if gateway is not None:
                self._tell(gateway, [], [lease.id])
        routes = [one for one in (self._table.get(runner_id), before) if one is not None]
        apps = dict.fromkeys(app for route in routes for app in apps_of(route))
        for gateway in self._gateways.values():
            if any(gateway.wants(app) for app in apps):
                gateway.routes[runner_id] = None
                gateway.check_refusals = gateway.check_refusals or any(app in gateway.refused for app in apps)
                gateway.signal.set()
        return True

    def close(self, error: FalError) -> None:
        """End all streams: the leader is one no longer."""
        self._unsubscribe()
        self._demand.close()
        for gateway in list(self._gateways.values()):
            if not gateway.closed.done():
                gateway.closed.set_result(error)

    def statistics(self) -> dict[str, int]:
        """Gateways, leases and slots that are out."""
        leases = self.book.leases()
        return {
            "gateways": len(self._gateways),
            "leases": len(leases),
            "slots_leased": sum(x.slots for x in leases),
            "routes": len(self._table),
            "served": self._served,
            "failed": self._failed,
        }


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _want_in(want: serving_pb2.Want, now_s: float) -> Want:
    age_s = want.oldest_age_s if 0.0 < want.oldest_age_s < 86_400.0 else 0.0  # what is no number counts as new
    return Want(want.app, want.slots, want.model, want.priority, want.lora, want.queued, now_s - age_s)


def _hello_in(message: serving_pb2.GatewayMessage, peer_name: str, role: Role) -> serving_pb2.GatewayHello:
    if message.WhichOneof("kind") != "hello":
        raise invalid("kind", message.WhichOneof("kind"), "came before the hello", remedy="Send the hello first.")
    hello = message.hello
    if not hello.gateway_id or len(hello.gateway_id) > 128 or not hello.gateway_id.isprintable():
        raise invalid("gateway_id", hello.gateway_id[:128], "is no id", remedy="Use 1 to 128 printable characters.")
    if len(hello.held) > HELD_MAX:
        raise invalid("held", len(hello.held), "are too many", remedy=f"A gateway holds at most {HELD_MAX} leases.")
    if hello.tunnel_endpoints and (role is not Role.SERVING or hello.gateway_id != peer_name):
        raise FalError(
            Code.PERMISSION_DENIED,
            f"gateway {hello.gateway_id!r} may not take tunnels with the certificate of {role}/{peer_name}",
            remedy="Nodes dial a gateway by the name in its certificate: use role serving and that name as its id.",
            field="tunnel_endpoints",
        )
    return hello


__all__ = ["Dispatcher", "Send"]
