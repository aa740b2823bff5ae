"""Which waiting demand a free runner serves, and whether it should load another model first. Pure.

Used by the slot book, which grants slots in this order, and by `falctl sim serve`. The order: who has waited or was
passed over too long, then higher priority, then the team and app that had least (start-time fair queueing, Goyal et
al. 1996), then what needs no load, shortest expected service first against age. A load is never tied to a request:
the runner loads, the queue stays, and whichever runner is ready first serves it.

Whether to load is one comparison in milliseconds. What the queue saves (its wait at the runners that have the model,
scheduled on their expected ends, against the same with one more) must exceed the price: `prefer_resident_ms`, more
where few runners are free, and what dropping a model costs. A copy's worth is the rate of requests that find it free
and every other copy busy, the difference of two Erlang loss values with rates and service times learnt so far.

Must not know the future: arrivals and services enter by `observe_*` when they happen.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fal_scheduler.core.dispatch_learnt import MICRO, MODELS_MAX, Learnt, erlang_b_micro

QUEUE_LOOKED_AT_MAX: Final = 64  # requests of one model that a load is weighed for


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queue of equal requests: one team, app, model and LoRA, and one size class where that is told."""

    key: str
    team: str
    app: str
    model: str  # "": any runner of the app will do
    priority: int  # higher first
    count: int  # requests, at least 1
    oldest_ms: int  # age of the oldest
    bypassed: int = 0  # times that a younger request was served while this one's oldest waited
    weight: int = 1  # share of its team, at least 1
    size: str = ""  # class of expected service, as `observe_done` is told it; "": unknown


@dataclass(frozen=True, slots=True)
class FreeRunner:
    """A runner that could take a request, or load a model, now."""

    id: str
    resident: tuple[str, ...]
    can_load: tuple[str, ...] | None = None  # None: any model
    idle_ms: int = 0
    apps: tuple[str, ...] = ()  # that it serves; empty: all
    room: bool = False  # another model fits beside those that it has


@dataclass(frozen=True, slots=True)
class BusyRunner:
    """A runner without a free slot: it serves since `busy_ms`, or loads for `loading_ms` more."""

    id: str
    resident: tuple[str, ...]  # while it loads: what it will have
    busy_ms: int
    loading_ms: int | None = None
    size: str = ""  # class of what it serves


@dataclass(frozen=True, slots=True)
class Decision:
    """Serve the oldest of `key` with `runner`; or, `load`, let the runner load `model` while all of them wait."""

    key: str
    runner: str
    load: bool
    model: str


@dataclass(frozen=True, slots=True)
class Settings:
    """How strongly resident models are preferred. Times in ms; defaults are for fewest loads at a moderate wait."""

    load_ms: int = 22_000  # until a load was seen
    prefer_resident_ms: int = 16_500  # total wait that a load must save
    busy_price_ms: int = 10_000  # the same on top where every other runner is busy; falls with the square of those free
    keep_milli: int = 700  # weight of what is dropped, 1000: its expected reload within `keep_horizon_ms`
    keep_horizon_ms: int = 95_000
    half_lives_ms: tuple[int, int, int] = (11_500, 280_000, 10_800_000)  # by which arrival rates are learnt
    ahead_milli: tuple[int, int, int] = (250, 1_190, 0)  # weights of those rates: what arrives while a model loads
    again_milli: tuple[int, int, int] = (0, 360, 2_460)  # the same: what a dropped model would be asked for
    residual_milli: int = 450  # share of a service that is expected to be left at any time in it
    age_milli: int = 90  # how much a waiting second counts against a second of service saved
    cold_milli: int = 2_500  # weight of a request whose model is nowhere
    bypass_ms: int = 205_000  # whoever waited so long is next
    bypass_max: int = 1_000  # or was passed over so many times
    fair_ms: int = 60_000  # runner time by which teams, or apps of one team, may be apart before the order heeds it


class Shares:
    """Who had how much runner time, by weight: start tags of teams and of apps in their team."""

    def __init__(self, quantum_ms: int) -> None:
        self._quantum_ms = max(1, quantum_ms)
        self._finish: dict[str, int] = {}
        self._now: dict[str, int] = {}  # team -> time among its apps; "": among teams

    def rank(self, team: str, app: str) -> tuple[int, int]:
        """Smaller is next; differences below the quantum do not show."""
        return self._start("", team) // self._quantum_ms, self._start(team, app) // self._quantum_ms

    def backlogged(self, pairs: Iterable[tuple[str, str]]) -> None:
        """These teams and apps wait. Who was away begins where the last of them stands, and catches up with nobody.

        The time moves to the least of their tags, not to the tag served last as in the paper: a runner that is warm for
        another may be served out of turn, and that must not cost whose turn it was.
        """
        least: dict[str, int] = {}
        for team, app in pairs:
            for flow, name in (("", team), (team, app)):
                start = self._start(flow, name)
                least[flow] = min(least.get(flow, start), start)
        self._now.update(least)

    def charge(self, team: str, app: str, weight: int, cost_ms: int) -> None:
        """One request of theirs began."""
        for flow, name, cost in (("", team, cost_ms // max(1, weight)), (team, app, cost_ms)):
            self._finish[f"{flow}\n{name}"] = self._start(flow, name) + cost
        if len(self._finish) > MODELS_MAX:  # who is not ahead of the others has nothing to remember
            self._finish = {key: end for key, end in self._finish.items() if end > self._now.get(key.split("\n")[0], 0)}

    def _start(self, flow: str, name: str) -> int:
        return max(self._now.get(flow, 0), self._finish.get(f"{flow}\n{name}", 0))


@dataclass(slots=True)
class _Queue:
    """All that waits for one model, as weighed for a load."""

    first: Waiting
    count: int
    oldest_ms: int
    work_ms: int  # expected services of all


class DispatchOrder:
    """What was learnt and who was served; `choose` decides, `took` tells that the decision was carried out."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.learnt = Learnt(self.settings.load_ms, self.settings.half_lives_ms)
        self.shares = Shares(self.settings.fair_ms)
        self._passed: dict[str, int] = {}  # key -> younger requests served while its oldest waited

    def observe_arrival(self, model: str, now_ms: int, count: int = 1) -> None:
        """Requests for the model arrived."""
        self.learnt.arrived(model, now_ms, count)

    def observe_done(self, model: str, took_ms: int, size: str = "") -> None:
        """A request of the model, of that size class ("": unknown), was served in so long."""
        self.learnt.served(model, took_ms, size)

    def observe_load(self, model: str, took_ms: int) -> None:
        """A load of the model took so long."""
        self.learnt.loaded(model, took_ms)

    def due(self, waiting: Waiting) -> bool:
        """Whether nobody younger of its priority, or lower, may be served before it any more."""
        passed = max(waiting.bypassed, self._passed.get(waiting.key, 0))
        return waiting.oldest_ms >= self.settings.bypass_ms or passed >= self.settings.bypass_max

    def level(self, waiting: Waiting) -> int:
        """Its priority, one higher for every `bypass_ms` waited: strict priorities, and still nobody waits for ever."""
        aged = waiting.oldest_ms // max(1, self.settings.bypass_ms)
        return waiting.priority + max(aged, 1 if self.due(waiting) else 0)

    def precedence(self, waiting: Waiting) -> tuple[int, int, int]:
        """The order among demands before residency is looked at; smaller is next."""
        return (-self.level(waiting), *self.shares.rank(waiting.team, waiting.app))

    def choose(
        self, now_ms: int, waiting: Sequence[Waiting], free: Sequence[FreeRunner], busy: Sequence[BusyRunner] = ()
    ) -> Decision | None:
        """What a free runner should do next; None: nothing now, ask again with the next event, or in some seconds."""
        if not waiting or not free:
            return None
        view = _View(self, now_ms, free, busy)
        groups: dict[tuple[int, int, int, int], list[Waiting]] = {}
        for one in waiting:
            level, team, app = self.precedence(one)
            # At one level those who are due go first, the oldest of all before fairness.
            key = (level, -one.oldest_ms, 0, 0) if self.due(one) else (level, 1, team, app)
            groups.setdefault(key, []).append(one)
        due_models = {one.model for one in waiting if self.due(one)}
        older: dict[str, None] = {}  # models of the overdue looked at so far
        last_team, last_app = (max(key[n] for key in groups) for n in (2, 3))
        for key in sorted(groups):
            if key[1] != 1:
                decision = None
                for one in sorted(groups[key], key=lambda x: x.key):
                    decision = decision or self._choose_due(view, one, older)
                    older[one.model] = None
            else:
                # Who is behind others by more than the quantum may load at a price that falls as it falls behind:
                # runners that are warm for the others only would else keep its share from it.
                behind = max(0, last_team - key[2] - 1) + max(0, last_app - key[3] - 1)
                view.behind_ms = behind * self.settings.fair_ms
                decision = self._serve(view, groups[key]) or self._load(view, groups[key], due_models)
            if decision is not None:
                return decision
        return None

    def took(self, decision: Decision, waiting: Iterable[Waiting]) -> None:
        """The decision was carried out; `waiting` is what it was chosen from."""
        if decision.load:
            return
        listed = list(waiting)
        served = next(x for x in listed if x.key == decision.key)
        self.shares.backlogged((x.team, x.app) for x in listed)
        self.shares.charge(served.team, served.app, served.weight, self.learnt.service_ms(served.model, served.size))
        passed = {}
        for one in listed:
            if one.key != served.key:
                count = self._passed.get(one.key, 0) + (1 if one.oldest_ms > served.oldest_ms else 0)
                if count:
                    passed[one.key] = count
        self._passed = passed

    # --- one group ---------------------------------------------------------------------------------------------------

    def _choose_due(self, view: _View, one: Waiting, older: Collection[str]) -> Decision | None:
        """The overdue one gets a runner that has its model, else the next that may load it."""
        decision = self._serve(view, [one])
        if decision is not None or view.is_loading(one.model):
            return decision
        # What is free with a model that an older one waits for is left to that one: else they would take turns at
        # loading, and neither be served.
        runner = view.cheapest(one, older)
        return Decision(one.key, runner.id, True, one.model) if runner is not None else None

    def _serve(self, view: _View, group: list[Waiting]) -> Decision | None:
        """No load needed: shortest expected service first, against age."""
        best: tuple[tuple[int, int, str], Decision] | None = None
        for one in group:
            runner = view.resident_for(one)
            if runner is None:
                continue
            index = self.learnt.service_ms(one.model, one.size) - one.oldest_ms
            rank = (index, -one.oldest_ms, one.key)
            if best is None or rank < best[0]:
                best = (rank, Decision(one.key, runner.id, False, one.model))
        return best[1] if best else None

    def _load(self, view: _View, group: list[Waiting], due_models: Collection[str]) -> Decision | None:
        """The load that saves most per second of the runner's time, if it is worth its price."""
        best: tuple[tuple[int, str], Decision] | None = None
        for model, queue in self._by_model(group).items():
            runner = view.cheapest(queue.first, due_models) if model else None
            if runner is None:
                continue
            saved = view.saved_ms(model, queue)
            if saved + view.behind_ms <= view.price_ms(runner):
                continue
            time_ms = self.learnt.load_ms(model) + queue.work_ms
            rank = (-saved * 1000 // time_ms, model)
            if best is None or rank < best[0]:
                best = (rank, Decision(queue.first.key, runner.id, True, model))
        return best[1] if best else None

    def _by_model(self, group: Iterable[Waiting]) -> Mapping[str, _Queue]:
        queues: dict[str, _Queue] = {}
        for one in sorted(group, key=lambda x: (-x.oldest_ms, x.key)):
            queue = queues.setdefault(one.model, _Queue(one, 0, one.oldest_ms, 0))
            queue.count += one.count
            queue.work_ms += one.count * self.learnt.service_ms(one.model, one.size)
        return queues


class _View:
    """Runners as one decision sees them."""

    def __init__(
        self, order: DispatchOrder, now_ms: int, free: Sequence[FreeRunner], busy: Sequence[BusyRunner]
    ) -> None:
        self._order = order
        self._learnt = order.learnt
        self._now_ms = now_ms
        self.behind_ms = 0  # runner time that those who are being looked at are behind others
        self._free = free
        self._busy_square_milli = (1000 * len(busy) // (len(free) + len(busy))) ** 2 // 1000
        self._copies: dict[str, int] = {}
        self._ends: dict[str, list[int]] = {}  # model -> expected ms until each busy runner that has it is free
        self._loading: dict[str, None] = {}
        for runner in free:
            for model in runner.resident:
                self._copies[model] = self._copies.get(model, 0) + 1
        for one in busy:
            for model in one.resident:
                self._copies[model] = self._copies.get(model, 0) + 1
                self._ends.setdefault(model, []).append(self._end_ms(model, one))
                if one.loading_ms is not None:
                    self._loading[model] = None
        self._lost: dict[str, int] = {}

    def _end_ms(self, model: str, one: BusyRunner) -> int:
        """Services vary about as much as they last: one that is under way has much of a mean before it."""
        if one.loading_ms is not None:
            return one.loading_ms
        service = self._learnt.service_ms(model, one.size)
        return max(service * self._order.settings.residual_milli // 1000, service - one.busy_ms)

    def is_loading(self, model: str) -> bool:
        """Whether a runner is about to have the model."""
        return model in self._loading

    def resident_for(self, one: Waiting) -> FreeRunner | None:
        """The runner with fewest other uses that can serve it without a load."""
        fits = [
            x for x in self._free if (not x.apps or one.app in x.apps) and (not one.model or one.model in x.resident)
        ]
        return min(fits, key=lambda x: (len(x.resident), len(x.apps), x.id)) if fits else None

    def cheapest(self, one: Waiting, spared: Collection[str]) -> FreeRunner | None:
        """The runner whose model is missed least, of those that may load this one's."""
        fits = [
            x
            for x in self._free
            if (not x.apps or one.app in x.apps)
            and (x.can_load is None or one.model in x.can_load)
            and one.model not in x.resident
            and not any(model in spared for model in x.resident)
        ]
        return min(fits, key=lambda x: (self._worth_lost(x), -x.idle_ms, x.id)) if fits else None

    def _worth_lost(self, runner: FreeRunner) -> int:
        """Requests per second, times 10^6, that lose their only free copy."""
        if runner.room or not runner.resident:
            return -1
        return min(self._worth(model) for model in runner.resident)

    def _worth(self, model: str) -> int:
        lost = self._lost.get(model)
        if lost is None:
            lost = self._lost[model] = self._learnt.worth_micro(
                model, self._copies.get(model, 1), self._now_ms, self._order.settings.again_milli
            )
        return lost

    def price_ms(self, runner: FreeRunner) -> int:
        """What a load on this runner must save."""
        settings = self._order.settings
        lost = max(0, self._worth_lost(runner))
        reload_micro = min(MICRO, lost * settings.keep_horizon_ms // 1000)
        keep_ms = max((self._learnt.load_ms(x) for x in runner.resident), default=0) * settings.keep_milli // 1000
        busy_ms = settings.busy_price_ms * self._busy_square_milli // 1000
        return settings.prefer_resident_ms + busy_ms + keep_ms * reload_micro // MICRO

    def saved_ms(self, model: str, queue: _Queue) -> int:
        """How much less the queue waits in all with one more runner that has the model."""
        settings = self._order.settings
        load_ms = self._learnt.load_ms(model)
        ahead_micro = self._learnt.per_s_micro(model, self._now_ms, settings.ahead_milli)
        count = queue.count + ahead_micro * load_ms // 1000 // MICRO
        ends = sorted(self._ends.get(model, ()))
        if not ends:
            weighed = load_ms + queue.oldest_ms * settings.age_milli // 1000
            return count * weighed * settings.cold_milli // 1000
        service = max(1, queue.work_ms // queue.count)
        return _waits_ms(ends, count, service) - _waits_ms([*ends, load_ms], count, service)


def _waits_ms(ends: Iterable[int], count: int, service_ms: int) -> int:
    """Total wait of a queue served by runners that become free at `ends`."""
    heap = list(ends)
    heapq.heapify(heap)
    total = 0
    for _ in range(min(count, QUEUE_LOOKED_AT_MAX)):
        total += heap[0]
        heapq.heapreplace(heap, heap[0] + service_ms)
    return total


__all__ = ["BusyRunner", "Decision", "DispatchOrder", "FreeRunner", "Settings", "Waiting", "erlang_b_micro"]
