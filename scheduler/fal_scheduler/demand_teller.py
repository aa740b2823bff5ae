"""Tells the engine what gateways ask for: of each gateway the first change at once, later ones together.

What a gateway tells (requests that wait, slots wanted) is set against the slots that it was granted since, so that a
request is told as waiting only while no slot is on its way to it. Arrivals are counted from requests that ended and
requests that wait; the count may lag by those under way, and never runs ahead of them.

On the loop of the Dispatcher, which calls it. Must not decide anything, nor hold demand back for longer than a window.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from fal_contract.clock import Clock
from fal_contract.v1 import serving_pb2
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.slots import SlotBook

WINDOW_S: Final = 0.25  # between two words about one gateway
ARRIVALS_WINDOW_S: Final = 1.0  # where nothing but the count of arrivals changed
_AGE_STEP_MS: Final = 500  # the age of the oldest request is news when its start moved by this


@dataclass(slots=True)
class _App:
    """One gateway's demand for one app. `ended`: requests, ever; `counted`: of those and the waiting ones, told."""

    wants: tuple[serving_pb2.Want, ...] = ()
    told_at_s: float = 0.0
    ended: int = 0
    counted: int = 0


@dataclass(slots=True)
class _Gateway:
    apps: dict[str, _App] = field(default_factory=dict)
    told: tuple[AppDemand, ...] = ()
    plain: tuple[AppDemand, ...] = ()
    told_at_s: float = float("-inf")
    timer: asyncio.Handle | None = None
    due_s: float = 0.0


class DemandTeller:
    """See the module. `offer`: the engine's."""

    def __init__(self, book: SlotBook, offer: Callable[[DemandTold], None], clock: Clock) -> None:
        self._book = book
        self._offer = offer
        self._clock = clock
        self._gateways: dict[str, _Gateway] = {}

    def wants(self, gateway_id: str, wants: Iterable[serving_pb2.Want]) -> None:
        """The gateway told its whole list; what could be granted at once is granted."""
        gateway, now_s = self._gateways.setdefault(gateway_id, _Gateway()), self._clock.monotonic_s()
        groups: dict[str, list[serving_pb2.Want]] = {}
        for want in wants:
            groups.setdefault(want.app, []).append(want)
        for app_id, app in gateway.apps.items():
            app.wants = tuple(groups.pop(app_id, ()))
            app.told_at_s = now_s
        for app_id, group in groups.items():
            gateway.apps[app_id] = _App(tuple(group), now_s)
        self._soon(gateway_id, gateway)

    def ended(self, gateway_id: str, app_id: str, count: int) -> None:
        """So many requests ended."""
        gateway = self._gateways.setdefault(gateway_id, _Gateway())
        gateway.apps.setdefault(app_id, _App()).ended += count
        self._soon(gateway_id, gateway)

    def slots_changed(self, gateway_id: str, apps: Iterable[str] = ()) -> None:
        """Slots of a gateway were granted, given back or taken away. `apps`: that it may not have been told of yet."""
        gateway = self._gateways.get(gateway_id)
        if gateway is None:
            gateway = self._gateways[gateway_id] = _Gateway()
        for app_id in apps:
            gateway.apps.setdefault(app_id, _App())
        self._soon(gateway_id, gateway)

    def leave(self, gateway_id: str) -> None:
        """The gateway's stream ended: it asks for nothing more."""
        gateway = self._gateways.pop(gateway_id, None)
        if gateway is None:
            return
        if gateway.timer is not None:
            gateway.timer.cancel()
        if gateway.told:
            self._offer(DemandTold(gateway_id, (), self._clock.monotonic_s()))

    def close(self) -> None:
        """End: nothing is told any more."""
        for gateway in self._gateways.values():
            if gateway.timer is not None:
                gateway.timer.cancel()
        self._gateways.clear()

    def _soon(self, gateway_id: str, gateway: _Gateway, window_s: float = WINDOW_S) -> None:
        """Look at the gateway's demand when its window is over; the first time at the end of this turn of the loop."""
        loop = asyncio.get_running_loop()
        due_s = max(loop.time(), gateway.told_at_s + window_s)
        if gateway.timer is not None:
            if gateway.due_s <= due_s:
                return
            gateway.timer.cancel()
        gateway.due_s = due_s
        gateway.timer = loop.call_at(due_s, self._tell, gateway_id, gateway)

    def _tell(self, gateway_id: str, gateway: _Gateway) -> None:
        gateway.timer = None
        now_s = self._clock.monotonic_s()
        demands = tuple(self._demands(gateway_id, gateway, now_s))
        plain = _plain(demands, now_s)
        if plain == gateway.plain:
            if not any(one.arrived for one in demands):
                return
            if asyncio.get_running_loop().time() < gateway.told_at_s + ARRIVALS_WINDOW_S:
                self._soon(gateway_id, gateway, ARRIVALS_WINDOW_S)
                return
        for one in demands:
            gateway.apps[one.app].counted += one.arrived
        gateway.told, gateway.plain, gateway.told_at_s = demands, plain, asyncio.get_running_loop().time()
        self._forget(gateway)
        self._offer(DemandTold(gateway_id, demands, now_s))

    def _demands(self, gateway_id: str, gateway: _Gateway, now_s: float) -> Iterable[AppDemand]:
        unmet = {(want.app, want.model): want.slots for want in self._book.unmet(gateway_id)}
        for app_id in sorted(gateway.apps):
            app = gateway.apps[app_id]
            slots = self._book.held(app_id, gateway_id)
            waiting = list(_waiting(app, unmet, now_s))
            queued = sum(_queued(want) for want in app.wants)
            if not slots and not queued:
                app.counted = min(app.counted, app.ended)  # what gave up waiting is nobody's arrival any more
            arrived = max(0, app.ended + queued - app.counted)
            if not waiting and (slots or arrived or app_id in {one.app for one in gateway.told}):
                waiting = [AppDemand(app_id)]
            for at, one in enumerate(waiting):
                yield replace(one, in_flight=slots, arrived=arrived) if at == 0 else one

    def _forget(self, gateway: _Gateway) -> None:
        """Apps that are asked for no more; told once as such."""
        told = {one.app: one.in_flight or one.queued for one in gateway.told}
        for app_id in [app_id for app_id, app in gateway.apps.items() if not app.wants and not told.get(app_id)]:
            del gateway.apps[app_id]


def _waiting(app: _App, unmet: dict[tuple[str, str], int], now_s: float) -> Iterable[AppDemand]:
    """What waits for a slot that nobody has granted yet, by model and LoRA."""
    met: dict[tuple[str, str], int] = {}
    for want in app.wants:
        met[want.app, want.model] = met.get((want.app, want.model), 0) + want.slots
    met = {key: slots - unmet.get(key, 0) for key, slots in met.items()}
    since_ms = round((now_s - app.told_at_s) * 1000)
    for want in app.wants:
        key = (want.app, want.model)
        queued = _queued(want)
        taken = min(queued, max(0, met[key]))
        met[key] -= taken
        if left := queued - taken:
            age_ms = round(want.oldest_age_s * 1000) + since_ms
            yield AppDemand(want.app, want.model, want.lora, 0, left, max(0, age_ms), want.priority)


def _queued(want: serving_pb2.Want) -> int:
    """Requests that wait; slots are wanted for requests only."""
    return max(want.queued, want.slots)


def _plain(demands: tuple[AppDemand, ...], now_s: float) -> tuple[AppDemand, ...]:
    """Without what changes by itself: of the oldest request's age, in its place, when it came, in steps."""
    return tuple(
        replace(
            one, arrived=0, oldest_age_ms=(round(now_s * 1000) - one.oldest_age_ms) // _AGE_STEP_MS * bool(one.queued)
        )
        for one in demands
        if one.in_flight or one.queued
    )


__all__ = ["DemandTeller"]
