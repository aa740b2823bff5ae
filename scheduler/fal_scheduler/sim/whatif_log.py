"""What a decision log tells of the world outside the scheduler: who asked for what and when, which machines were there,
what operators did, how long starts and requests took. The input of `falctl sim whatif`.

Pure. Times are seconds of the wall clock, so that terms of several leaders make one story. Requests are the arrivals
that gateways told; where none did (an older log) the requests that nodes told as served. What nodes and runners did by
themselves is not taken over: that is the model's part (`whatif_model`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from fal_contract.errors import Code, FalError
from fal_scheduler.core.demand_events import DemandTold
from fal_scheduler.core.events import (
    Confirm,
    Event,
    GatewayReach,
    NodeDisconnected,
    NodeHello,
    NodeReport,
    Proceed,
    RedeemToken,
    StopRunner,
    Tick,
)
from fal_scheduler.core.log_entries import Entry, Founded, Loaded, Stepped, Whole
from fal_scheduler.core.records import Node, Runner
from fal_scheduler.core.told import RunnerStatus

START_S: Final = 30.0  # of a runner of an app that the log never saw start
REQUEST_S: Final = 1.0  # of a request of an app that the log never saw end
ARRIVALS_APART_S: Final = 1.0  # gateways tell arrivals at least so often

# News are the model's to make; what names ids of the old run means nothing in another.
_NOT_TAKEN: Final = (
    Confirm, DemandTold, GatewayReach, NodeDisconnected, NodeHello, NodeReport, Proceed, RedeemToken, StopRunner, Tick,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """One request for an app."""

    at_s: float
    app: str


@dataclass(slots=True)
class Durations:
    """Seconds per app. `cold`: the app's first start on a node, `warm`: a later one there."""

    cold: dict[str, list[float]] = field(default_factory=dict)
    warm: dict[str, list[float]] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)  # request seconds
    served: dict[str, int] = field(default_factory=dict)

    def start_s(self, app: str, *, warm: bool) -> float:
        """How long a start takes: the median seen, of the other kind where this one was never seen."""
        kinds = (self.warm, self.cold) if warm else (self.cold, self.warm)
        seen = next((kind[app] for kind in kinds if app in kind), None)
        return median(seen) if seen is not None else START_S

    def request_s(self, app: str) -> float:
        """How long a request takes on a runner: the mean seen."""
        served = self.served.get(app, 0)
        return max(0.001, self.busy_s.get(app, 0.0) / served) if served else REQUEST_S


@dataclass(slots=True)
class Recorded:
    """See the module. `head`: the state at the begin; `founded`: the first record of a new store; `nodes`: joined on
    the way; `hellos`: the first of each node; `commands`: operators', and what caches told, in order."""

    head: Loaded | Whole
    offset_s: float = 0.0  # wall clock less monotonic reading, of the head's State
    start_s: float = 0.0
    end_s: float = 0.0
    founded: Founded | None = None
    nodes: list[tuple[float, Node]] = field(default_factory=list)
    hellos: dict[str, tuple[float, NodeHello]] = field(default_factory=dict)
    commands: list[tuple[float, Event]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    durations: Durations = field(default_factory=Durations)
    told_by: str = "gateways"


@dataclass(slots=True)
class _Seen:
    """A runner as its node told of it last."""

    app: str
    at_s: float
    served: int
    in_flight: int
    ready: bool


class _Reader:
    """Goes through the entries once."""

    def __init__(self) -> None:
        self.found: Recorded | None = None
        self._placed: dict[str, tuple[float, str, bool]] = {}  # runner -> when, app, whether its node had run the app
        self._warm: dict[tuple[str, str], None] = {}  # (node, app)
        self._seen: dict[str, _Seen] = {}
        self._last_word: dict[tuple[str, str], float] = {}  # (gateway, app)
        self._served: list[Request] = []

    def take(self, entry: Entry) -> None:
        match entry:
            case Loaded() | Whole():
                self.found = self.found or Recorded(entry)
            case Founded() if self.found is not None:
                self.found.founded = entry
            case Stepped() if self.found is not None:
                self._step(self.found, entry)

    def _step(self, found: Recorded, entry: Stepped) -> None:
        if not found.start_s:
            found.start_s, found.offset_s = entry.wall_s, entry.wall_s - entry.now_s
        found.end_s = max(found.end_s, entry.wall_s)
        for _, after in entry.changes:
            if isinstance(after, Runner) and after.node and after.id not in self._placed:
                warm = (after.node, after.app) in self._warm
                self._warm[after.node, after.app] = None
                self._placed[after.id] = entry.wall_s, after.app, warm
            elif isinstance(after, Node) and isinstance(entry.event, RedeemToken):
                found.nodes.append((entry.wall_s, after))
        self._event(found, entry.event, entry.wall_s, entry.wall_s - entry.now_s)

    def _event(self, found: Recorded, event: Event, wall_s: float, offset_s: float) -> None:
        match event:
            case NodeHello():
                found.hellos.setdefault(event.node_id, (wall_s, event))
                self._statuses(event.statuses, event.arrived_s + offset_s)
            case NodeReport():
                self._statuses(event.statuses, event.arrived_s + offset_s)
            case DemandTold():
                self._demand(found, event, event.arrived_s + offset_s)
            case _ if not isinstance(event, _NOT_TAKEN):
                found.commands.append((wall_s, event))

    def _demand(self, found: Recorded, event: DemandTold, at_s: float) -> None:
        for one in event.demands:
            key = event.gateway_id, one.app
            since_s = max(self._last_word.get(key, 0.0), at_s - ARRIVALS_APART_S)
            self._last_word[key] = at_s
            for number in range(one.arrived):
                found.requests.append(Request(since_s + (at_s - since_s) * (number + 1) / one.arrived, one.app))

    def _statuses(self, statuses: Iterable[RunnerStatus], at_s: float) -> None:
        assert self.found is not None
        durations = self.found.durations
        for status in statuses:
            before = self._seen.get(status.runner_id)
            if before is not None and status.served >= before.served:
                fresh = status.served - before.served
                busy_s = before.in_flight * max(0.0, at_s - before.at_s)
                durations.busy_s[status.app] = durations.busy_s.get(status.app, 0.0) + busy_s
                durations.served[status.app] = durations.served.get(status.app, 0) + fresh
                self._served += [Request(at_s, status.app)] * fresh
            if status.serves and (before is None or not before.ready):
                self._ready(status, at_s)
            ready = status.serves or (before is not None and before.ready)
            self._seen[status.runner_id] = _Seen(status.app, at_s, status.served, status.in_flight, ready)

    def _ready(self, status: RunnerStatus, at_s: float) -> None:
        placed = self._placed.get(status.runner_id)
        if placed is not None:
            assert self.found is not None
            since_s, app, warm = placed
            kind = self.found.durations.warm if warm else self.found.durations.cold
            kind.setdefault(app, []).append(max(0.0, at_s - since_s))

    def done(self) -> Recorded:
        found = self.found
        if found is None or not found.end_s:
            raise FalError(Code.CORRUPT, "the log holds no events", remedy="Take a longer one.")
        if not found.requests:
            found.requests, found.told_by = self._served, "nodes"
        found.requests.sort(key=lambda one: one.at_s)
        found.requests = [one for one in found.requests if found.start_s <= one.at_s <= found.end_s]
        if not found.requests:
            raise FalError(
                Code.FAILED_PRECONDITION,
                "the log tells of no request, so nothing can be compared",
                remedy="Take a log of a time in which requests came.",
            )
        return found


def read(entries: Iterable[Entry]) -> Recorded:
    """Everything that the model needs. Raises FalError where the log tells of nothing or of no request."""
    reader = _Reader()
    for entry in entries:
        reader.take(entry)
    return reader.done()


__all__ = ["REQUEST_S", "START_S", "Durations", "Recorded", "Request", "read"]
