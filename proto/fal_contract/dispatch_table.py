"""What a serving process holds: routes, leased slots, demand, refusals. Pure.

A slot in hand is used without asking. A lease that was used lately is prolonged, one that lies idle is given back. With
no leader, leases do not run out, and any runner of the last route table may be tried: its node admits or refuses.

Used by `dispatch`; `now_s` is monotonic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fal_contract.datapath import Address
from fal_contract.errors import Code, FalError

LEASE_IDLE_S: Final = 2.0  # an unused lease goes back after this
_RENEW_BELOW: Final = 0.5  # of its time to live


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """Where one runner is."""

    runner_id: str
    app: str  # team/name
    node_id: str
    addresses: tuple[Address, ...]
    open: bool  # takes requests
    max_multiplexing: int
    request_timeout_s: float
    any_path: bool = False  # a server of its own, not our worker
    shared: tuple[tuple[str, str], ...] = ()  # apps that share it, each with the model that its requests name

    @property
    def apps(self) -> tuple[str, ...]:
        """Every app that it serves."""
        return tuple(app for app, _ in self.shared) or (self.app,)


@dataclass(frozen=True, slots=True)
class LeaseEntry:
    """Slots of one runner, as they arrive."""

    lease_id: str
    runner_id: str
    node_id: str
    app: str
    slots: int
    term: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Slot:
    """The right to send one request; of no lease (empty id) when no leader answers."""

    runner_id: str
    node_id: str
    app: str
    lease_id: str
    term: int


@dataclass(frozen=True, slots=True)
class Update:
    """What became of one lease."""

    lease_id: str
    returned: int
    renew: bool
    served: int
    failed: int


@dataclass(slots=True)
class _Lease:
    entry: LeaseEntry
    expires_s: float
    used_s: float
    in_use: int = 0
    served: int = 0
    failed: int = 0
    renewing: bool = False

    @property
    def free(self) -> int:
        return self.entry.slots - self.in_use


class DispatchTable:
    """Routes and leases of one serving process."""

    def __init__(self) -> None:
        self._routes: dict[str, RouteEntry] = {}
        self._of_app: dict[str, set[str]] = {}
        self._leases: dict[str, _Lease] = {}
        self._in_use: dict[str, int] = {}  # runner id → our requests under way
        self._suspended: dict[str, float] = {}  # runner id → not before
        self._refusals: dict[str, FalError] = {}
        self._term = 0

    # What the scheduler tells.

    def put_routes(self, routes: Iterable[RouteEntry], removed: Iterable[str], *, complete: bool, term: int) -> None:
        """The whole table, or changes to it."""
        self._term = max(self._term, term)
        routes = list(routes)
        if complete:
            removed = set(self._routes) - {route.runner_id for route in routes}
        for runner_id in removed:
            self._forget_route(runner_id)
        for route in routes:
            self._forget_route(route.runner_id)
            self._routes[route.runner_id] = route
            for app in route.apps:
                self._of_app.setdefault(app, set()).add(route.runner_id)

    def _forget_route(self, runner_id: str) -> None:
        gone = self._routes.pop(runner_id, None)
        for app in gone.apps if gone is not None else ():
            self._of_app[app].discard(runner_id)

    def put_leases(self, leases: Iterable[LeaseEntry], revoked: Iterable[str], now_s: float) -> set[str]:
        """New and prolonged leases, and ids of those taken back; returns the apps that got slots."""
        apps = set()
        for entry in leases:
            self._term = max(self._term, entry.term)
            have = self._leases.get(entry.lease_id)
            if have is None:
                self._leases[entry.lease_id] = _Lease(entry, now_s + entry.ttl_s, now_s)
            else:
                have.entry, have.expires_s, have.renewing = entry, now_s + entry.ttl_s, False
            apps.add(entry.app)
            self._refusals.pop(entry.app, None)
        for lease_id in revoked:
            self._leases.pop(lease_id, None)
        return apps

    def put_refusal(self, app: str, why: FalError) -> None:
        """Why the app's want cannot be met now."""
        self._refusals[app] = why

    # What requests ask.

    def take(
        self, app: str, now_s: float, *, leaderless: bool, reachable: Callable[[str], bool] = lambda node_id: True
    ) -> Slot | None:
        """A slot to use now, on the runner that has the fewest of our requests; None when there is none."""
        usable = [
            lease
            for lease in self._leases.values()
            if lease.entry.app == app
            and lease.free > 0
            and (leaderless or lease.expires_s > now_s)
            and not self._is_suspended(lease.entry.runner_id, now_s)
            and reachable(lease.entry.node_id)
        ]
        if usable:
            lease = min(usable, key=lambda one: (self._in_use.get(one.entry.runner_id, 0), one.entry.lease_id))
            lease.in_use += 1
            lease.used_s = now_s
            self._count(lease.entry.runner_id, 1)
            return Slot(lease.entry.runner_id, lease.entry.node_id, app, lease.entry.lease_id, lease.entry.term)
        return self._take_unleased(app, now_s, reachable) if leaderless else None

    def _take_unleased(self, app: str, now_s: float, reachable: Callable[[str], bool]) -> Slot | None:
        routes = [
            self._routes[runner_id]
            for runner_id in self._of_app.get(app, ())
            if self._routes[runner_id].open
            and not self._is_suspended(runner_id, now_s)
            and reachable(self._routes[runner_id].node_id)
            and self._in_use.get(runner_id, 0) < self._routes[runner_id].max_multiplexing
        ]
        if not routes:
            return None
        route = min(routes, key=lambda one: (self._in_use.get(one.runner_id, 0), one.runner_id))
        self._count(route.runner_id, 1)
        return Slot(route.runner_id, route.node_id, app, "", self._term)

    def give_back(self, slot: Slot, now_s: float, *, served: bool | None) -> None:
        """The request ended; `served` None: it did not run."""
        self._count(slot.runner_id, -1)
        lease = self._leases.get(slot.lease_id)
        if lease is None or lease.in_use == 0:
            return  # taken back meanwhile (and perhaps granted anew), or none
        lease.in_use -= 1
        lease.used_s = now_s
        if served is not None:
            lease.served += served
            lease.failed += not served

    def suspend(self, runner_id: str, until_s: float) -> None:
        """Do not try the runner before this time."""
        self._suspended[runner_id] = until_s

    def drop_lease(self, lease_id: str) -> None:
        """The node does not honour it."""
        self._leases.pop(lease_id, None)

    def retry_at_s(self, app: str, now_s: float) -> float | None:
        """When the first suspended runner of the app may be tried again."""
        times = [
            until_s
            for runner_id, until_s in self._suspended.items()
            if until_s > now_s and runner_id in self._of_app.get(app, ())
        ]
        return min(times, default=None)

    # What is told to the scheduler.

    def updates(self, now_s: float) -> list[Update]:
        """Leases to prolong, to give back, and what was served with them; forgets what is given back or expired."""
        self._suspended = {one: until_s for one, until_s in self._suspended.items() if until_s > now_s}
        updates = []
        for lease_id, lease in list(self._leases.items()):
            idle = lease.in_use == 0 and now_s - lease.used_s >= LEASE_IDLE_S
            if lease.expires_s <= now_s and lease.in_use == 0:
                del self._leases[lease_id]
                continue
            near_end = lease.expires_s - now_s < lease.entry.ttl_s * _RENEW_BELOW
            renew = not idle and near_end and not lease.renewing
            if idle or renew or lease.served or lease.failed:
                returned = lease.entry.slots if idle else 0
                updates.append(Update(lease_id, returned, renew, lease.served, lease.failed))
                lease.served = lease.failed = 0
                lease.renewing = lease.renewing or renew
            if idle:
                del self._leases[lease_id]
        return updates

    def surrender(self) -> list[Update]:
        """Give back every lease, for a process that ends: others need not wait until they expire."""
        updates = [
            Update(lease_id, lease.entry.slots, renew=False, served=lease.served, failed=lease.failed)
            for lease_id, lease in self._leases.items()
        ]
        self._leases.clear()
        return updates

    def stream_broke(self) -> None:
        """What was asked for on the old stream has to be asked for again."""
        for lease in self._leases.values():
            lease.renewing = False
        self._refusals.clear()

    def held(self) -> list[LeaseEntry]:
        """For the hello on a new stream."""
        return [lease.entry for lease in self._leases.values()]

    # What others ask.

    @property
    def routes(self) -> tuple[RouteEntry, ...]:
        """The last route table."""
        return tuple(self._routes.values())

    def route(self, runner_id: str) -> RouteEntry | None:
        """Where a runner is, if the table says."""
        return self._routes.get(runner_id)

    def headers_for(self, slot: Slot) -> list[tuple[str, str]]:
        """What a request with this slot says: in a runner that apps share, which model it means."""
        route = self._routes.get(slot.runner_id)
        model = dict(route.shared).get(slot.app, "") if route is not None else ""
        return [("fal-model", model)] if model else []

    def path_refusal(self, slot: Slot) -> FalError | None:
        """Why its runner may not be asked by a path that a stranger chose."""
        route = self._routes.get(slot.runner_id)
        if route is None:
            return FalError(Code.UNAVAILABLE, f"runner {slot.runner_id} is not known here yet", remedy="Try again.")
        if route.any_path:
            return None
        return FalError(Code.NOT_FOUND, f"{slot.app} has no such path", remedy=f"POST to /v1/run/{slot.app}.")

    def refusal(self, app: str) -> FalError | None:
        """Why the scheduler has no runner for the app."""
        return self._refusals.get(app)

    def clear_refusal(self, app: str) -> None:
        """A new demand deserves a new answer."""
        self._refusals.pop(app, None)

    def why_nothing(self, app: str, waited_s: float, *, leaderless: bool, unreachable: str) -> FalError:
        """The error for a request that got no slot in time."""
        refusal = self._refusals.get(app)
        if refusal is not None:
            return refusal
        if leaderless:
            what = f"no scheduler answers, and no runner of {app} took the request within {waited_s:g} s"
            return FalError(Code.UNAVAILABLE, what, remedy="Check that the scheduler runs and can be reached.")
        if unreachable:
            what = f"runners of {app} exist, but cannot be reached: {unreachable}"
            return FalError(Code.UNAVAILABLE, what, remedy="Check the addresses of the nodes, or offer tunnels.")
        return FalError(
            Code.TIMEOUT, f"no runner of {app} became free within {waited_s:g} s", remedy="Try again, or scale it up."
        )

    def _is_suspended(self, runner_id: str, now_s: float) -> bool:
        return self._suspended.get(runner_id, now_s) > now_s

    def _count(self, runner_id: str, change: int) -> None:
        count = self._in_use.get(runner_id, 0) + change
        if count:
            self._in_use[runner_id] = count
        else:
            self._in_use.pop(runner_id, None)
