"""Demand as the core knows it: what gateways ask for, and how runners are used, by what their nodes tell.

Pure. One `Demand` is `State.demand`: never stored, told again after a failover by gateways (what waits) and by nodes
(requests under way and served, the last one's age). Changed by `core.demand_news` and `core.scaling` only. Times are
monotonic readings of the engine's clock, in seconds.

A request is counted once: as waiting while its gateway has no slot for it, then as under way. Gateways tell the slots
that they hold, nodes the requests. A slot may lie idle, and a node may tell of a request while its gateway's word of
the shorter queue is still on its way: so of both numbers the smaller counts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from fal_scheduler.core.forecast import Arrivals
from fal_scheduler.core.told import RunnerStatus

NEVER: Final = -1.0
_DONE_MAX: Final = 64


@dataclass(slots=True)
class GatewayLoad:
    """One gateway's demand for one app. `since_s`: when the oldest request that waits came."""

    slots: int = 0
    queued: int = 0
    since_s: float = 0.0
    priority: int = 0


@dataclass(slots=True)
class Usage:
    """How a runner is used. `ready_at_s`: seen ready first by this leader; `used_at_s`: last request, -1: none yet.

    `told_at_s`: when its node told of it last; from then on `in_flight` requests were under way, `served` were done.
    """

    ready_at_s: float
    used_at_s: float = NEVER
    told_at_s: float = NEVER
    in_flight: int = 0
    served: int = 0

    @property
    def unused(self) -> bool:
        """Whether it never had a request."""
        return self.used_at_s == NEVER

    @property
    def idle_since_s(self) -> float:
        """When its last request ended; of one that never had any, when it was ready."""
        return self.ready_at_s if self.unused else self.used_at_s


@dataclass(slots=True)
class RequestTime:
    """The mean time of an app's requests, by Little's law: time under way over requests done, of late ones mostly."""

    busy_ms: int = 0
    done: int = 0

    def note(self, busy_ms: int, done: int) -> None:
        """So much was under way, so many are done."""
        self.busy_ms += busy_ms
        self.done += done
        if self.done >= _DONE_MAX:
            self.busy_ms, self.done = self.busy_ms // 2, self.done // 2

    @property
    def mean_ms(self) -> int:
        """0 where nothing is known."""
        return self.busy_ms // self.done if self.done else 0


class Demand:
    """See the module. Tables hold apps, gateways and runners that exist, and nothing else."""

    def __init__(self) -> None:
        self.loads: dict[str, dict[str, GatewayLoad]] = {}  # app -> gateway
        self.apps_of: dict[str, dict[str, None]] = {}  # gateway -> apps
        self.usage: dict[str, Usage] = {}  # runner
        self.arrivals: dict[str, Arrivals] = {}  # app
        self.requests: dict[str, RequestTime] = {}  # app
        self.bring_back_ms: dict[str, int] = {}  # app -> how long its last runners took from their making to ready
        self.wanted: dict[str, int] = {}  # app -> runners that should be there, as reconcile found last
        self.look_at_s: dict[str, float] = {}  # app -> when time alone may change what it should have
        self.room_sought_s: dict[str, float] = {}  # app that waits -> when idle runners were looked at for it
        self.gave_way: dict[str, str] = {}  # runner that ends early -> app that waits for its place
        self.bound: dict[str, dict[str, Usage]] = {}  # runner that several apps share -> app

    def set_load(self, app_id: str, gateway_id: str, load: GatewayLoad | None) -> bool:
        """Replace one gateway's demand for one app; None: nothing any more. True where it changed."""
        before = self.loads.get(app_id, {}).get(gateway_id)
        if before == load:
            return False
        if load is None:
            del self.loads[app_id][gateway_id]
            if not self.loads[app_id]:
                del self.loads[app_id]
            self._leave(gateway_id, app_id)
            return True
        self.loads.setdefault(app_id, {})[gateway_id] = load
        self.apps_of.setdefault(gateway_id, {})[app_id] = None
        return True

    def _leave(self, gateway_id: str, app_id: str) -> None:
        apps = self.apps_of[gateway_id]
        del apps[app_id]
        if not apps:
            del self.apps_of[gateway_id]

    def note_status(self, app_id: str, status: RunnerStatus, now_s: float) -> None:
        """Take in how a runner is used. What was used once is never unused again."""
        have = self.usage.get(status.runner_id)
        if not status.serves:
            return
        if have is None:
            have = self.usage[status.runner_id] = Usage(now_s)
        self._note_time(app_id, have, status, now_s)
        if status.in_flight:
            have.used_at_s = now_s
        elif status.last_used_age_s >= 0.0:
            have.used_at_s = max(have.used_at_s, now_s - status.last_used_age_s)
        elif status.served and have.unused:
            have.used_at_s = now_s

    def _note_time(self, app_id: str, have: Usage, status: RunnerStatus, now_s: float) -> None:
        done = status.served - have.served
        if have.told_at_s != NEVER and (have.in_flight or done > 0):
            busy_ms = round(max(0.0, now_s - have.told_at_s) * 1000) * have.in_flight
            self.requests.setdefault(app_id, RequestTime()).note(busy_ms, max(0, done))
        have.told_at_s, have.in_flight, have.served = now_s, status.in_flight, status.served

    def note_shared(self, apps: Collection[str], status: RunnerStatus, served_before: int, now_s: float) -> None:
        """Take in which of the apps that share a runner use it: those that hold slots; all, where nobody knows."""
        bound = self.bound.get(status.runner_id)
        if bound is None or not status.serves or not (status.in_flight or status.served > served_before):
            return
        using = [app_id for app_id in apps if self.slots(app_id)]
        for app_id in using or apps:
            if app_id in bound:
                bound[app_id].used_at_s = now_s

    def begin_binding(self, runner_id: str, app_id: str, now_s: float) -> None:
        """An app got a place in a runner that serves another: from now on each app's use counts for itself."""
        self.bound.setdefault(runner_id, {})[app_id] = Usage(now_s)

    def end_binding(self, runner_id: str, app_id: str) -> None:
        """It gave its place up."""
        self.bound.get(runner_id, {}).pop(app_id, None)

    def note_ready(self, app_id: str, took_ms: int) -> None:
        """A runner took so long from its start to ready."""
        have = self.bring_back_ms.get(app_id)
        self.bring_back_ms[app_id] = took_ms if have is None else (have + took_ms) // 2

    def request_ms(self, app_id: str) -> int:
        """The mean time of one request; 0 where nothing is known."""
        have = self.requests.get(app_id)
        return have.mean_ms if have is not None else 0

    def rate(self, app_id: str, wall_s: float) -> int:
        """Millionths of a request per minute that come of late."""
        arrivals = self.arrivals.get(app_id)
        if arrivals is None:
            return 0
        arrivals.advance(wall_s)
        return arrivals.rate

    def usage_of(self, runner_id: str, now_s: float, app_id: str = "") -> Usage:
        """A runner's usage, or an app's in it; one of which nothing is known is taken for ready just now."""
        bound = self.bound.get(runner_id)
        if bound is not None and app_id:
            if app_id not in bound:  # it was there before the others
                have = self.usage.get(runner_id)
                bound[app_id] = replace(have) if have is not None else Usage(now_s)
            return bound[app_id]
        have = self.usage.get(runner_id)
        if have is None:
            have = self.usage[runner_id] = Usage(now_s)
        return have

    def queued(self, app_id: str) -> int:
        """Requests that wait for a slot."""
        return sum(load.queued for load in self.loads.get(app_id, {}).values())

    def slots(self, app_id: str) -> int:
        """Slots that gateways hold."""
        return sum(load.slots for load in self.loads.get(app_id, {}).values())

    def look(self, app_id: str, at_s: float) -> None:
        """Look at an app again then, or before."""
        have = self.look_at_s.get(app_id)
        if have is None or at_s < have:
            self.look_at_s[app_id] = at_s

    def forget_app(self, app_id: str) -> None:
        """The app is gone."""
        for gateway_id in list(self.loads.get(app_id, ())):
            self.set_load(app_id, gateway_id, None)
        for table in (
            self.arrivals,
            self.requests,
            self.bring_back_ms,
            self.wanted,
            self.look_at_s,
            self.room_sought_s,
        ):
            table.pop(app_id, None)

    def forget_runner(self, runner_id: str) -> None:
        """The runner is gone, or begins anew."""
        self.usage.pop(runner_id, None)
        self.gave_way.pop(runner_id, None)
        self.bound.pop(runner_id, None)


__all__ = ["NEVER", "Demand", "GatewayLoad", "Usage"]
