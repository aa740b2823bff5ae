"""What foresight is worth: orders for `falctl sim serve` that are told what an order in production cannot know. Pure.

`bound` has every model on every GPU and serves the shortest first, true services told: what the GPUs' number alone
costs. `told` loads models as ours does, but knows every service, and every request `told_ms` before it arrives; it may
load ahead of them. It improves each model's waits on their own, one load at a time, so the best that is possible with
that knowledge is not worse than it, and may be better.

Requests must name their service as their size (`sized`), so that a queue's service can be told.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from fal_scheduler.sim.serve_cluster import Cluster, Gpu, Outcome, Request

URGENT_MS: Final = 60_000  # how long a model that is nowhere is taken to stay away, unless it is loaded now
AGE_MILLI: Final = 300  # how much a waiting second counts against a second of service saved

Key = tuple[str, str]
Jobs = list[tuple[int, int]]  # (when, ms from now; service in ms)


def sized(requests: Iterable[Request]) -> list[Request]:
    """The same requests, with their true service as size."""
    return [request._replace(size=str(request.took_ms)) for request in requests]


def serve_bound(cluster: Cluster) -> Outcome:
    """Loads cost nothing, and the shortest goes first."""

    def dispatch() -> None:
        while cluster.queues:
            number = next((n for n, gpu in enumerate(cluster.gpus) if gpu.free), None)
            if number is None:
                return
            cluster.serve(number, min(cluster.queues, key=lambda key: (int(key[1]), cluster.queues[key][0].at_ms, key)))

    return cluster.run(dispatch)


def serve_told(cluster: Cluster, told_ms: int, price_ms: int, bypass_ms: int) -> Outcome:
    """A load must save `price_ms` of wait; whoever waited `bypass_ms` is next. Times in ms."""
    order = _Told(cluster, told_ms, price_ms, bypass_ms)
    cluster.on_arrival = order.arrived
    cluster.wakes_ms = deque(max(0, request.at_ms - told_ms) for request in cluster.requests)

    def dispatch() -> None:
        while order.step():
            pass

    return cluster.run(dispatch)


class _Told:
    """The order's view of one moment, made anew for every decision, and the list of what is to come."""

    def __init__(self, cluster: Cluster, told_ms: int, price_ms: int, bypass_ms: int) -> None:
        self._cluster = cluster
        self._told_ms = told_ms
        self._price_ms = price_ms
        self._bypass_ms = bypass_ms
        self._coming: dict[str, list[Request]] = {}
        for request in cluster.requests:
            self._coming.setdefault(request.model, []).append(request)
        self._arrived = dict.fromkeys(self._coming, 0)
        self._jobs: dict[str, Jobs] = {}
        self._ends: dict[str, list[int]] = {}

    def arrived(self, request: Request) -> None:
        """It waits now, and is no longer to come."""
        self._arrived[request.model] += 1

    def step(self) -> bool:
        """Carry out one decision; False: nothing to do now."""
        cluster = self._cluster
        free = [n for n, gpu in enumerate(cluster.gpus) if gpu.free]
        if not free or (self._arrived_all() and not cluster.queues):
            return False
        due = sorted((key for key in cluster.queues if self._age_ms(key) >= self._bypass_ms), key=self._age_key)
        spared: dict[str, None] = {}
        self._look()
        for key in due:
            if self._serve([key], free) or self._load_due(key[0], free, spared):
                return True
            spared[key[0]] = None
        return self._serve([key for key in cluster.queues if key not in due], free) or self._load(free, spared)

    def _arrived_all(self) -> bool:
        return all(count == len(self._coming[model]) for model, count in self._arrived.items())

    def _age_ms(self, key: Key) -> int:
        return self._cluster.now_ms - self._cluster.queues[key][0].at_ms

    def _age_key(self, key: Key) -> tuple[int, Key]:
        return -self._age_ms(key), key

    def _look(self) -> None:
        """Who has which model, and from when on; what waits for each, shortest first, and what comes."""
        now_ms = self._cluster.now_ms
        self._ends = {}
        for gpu in self._cluster.gpus:
            if gpu.model:
                self._ends.setdefault(gpu.model, []).append(0 if gpu.free else gpu.until_ms - now_ms)
        self._jobs = {}
        for model, size in sorted(self._cluster.queues, key=lambda key: (int(key[1]), key)):
            self._jobs.setdefault(model, []).extend([(0, int(size))] * len(self._cluster.queues[model, size]))
        for model, requests in self._coming.items():
            first = self._arrived[model]
            last = bisect_right(requests, now_ms + self._told_ms, lo=first, key=lambda x: x.at_ms)
            if last > first:
                coming = [(request.at_ms - now_ms, request.took_ms) for request in requests[first:last]]
                self._jobs.setdefault(model, []).extend(coming)

    # --- what may be done --------------------------------------------------------------------------------------------

    def _serve(self, keys: Sequence[Key], free: Sequence[int]) -> bool:
        gpus = self._cluster.gpus
        ready: dict[str, int] = {}
        for number in free:
            ready.setdefault(gpus[number].model, number)
        fit = [key for key in keys if key[0] in ready]
        if not fit:
            return False
        best = min(fit, key=lambda key: (int(key[1]) - self._age_ms(key) * AGE_MILLI // 1000, key))
        self._cluster.serve(ready[best[0]], best)
        return True

    def _load_due(self, model: str, free: Sequence[int], spared: Collection[str]) -> bool:
        if any(gpu.loading and gpu.model == model for gpu in self._cluster.gpus):
            return False
        dropped = self._dropped(free, spared)
        if dropped:
            self._cluster.load(dropped[0][1], model)
        return bool(dropped)

    def _load(self, free: Sequence[int], spared: Collection[str]) -> bool:
        dropped = self._dropped(free, spared)
        best: tuple[int, str, int] | None = None
        for model in self._jobs:
            number, loss = next(((n, ms) for ms, n in dropped if self._gpu(n).model != model), (None, 0))
            if number is None:
                continue
            ends = self._ends.get(model, [])
            gain = self._waits(model, ends) - self._waits(model, [*ends, self._cluster.load_ms])
            net = gain - loss - self._price_ms
            if net > 0:
                time_ms = self._cluster.load_ms + sum(took for at, took in self._jobs[model] if at == 0)
                best = max(best or (0, "", 0), (net * 1000 // max(1, time_ms), model, number))
        if best is None:
            return False
        self._cluster.load(best[2], best[1])
        return True

    def _gpu(self, number: int) -> Gpu:
        return self._cluster.gpus[number]

    def _dropped(self, free: Sequence[int], spared: Collection[str]) -> list[tuple[int, int]]:
        """The free GPU of each model that may be dropped, by what that costs: (ms of wait, GPU), cheapest first."""
        first: dict[str, int] = {}
        for number in free:
            first.setdefault(self._gpu(number).model, number)
        return sorted((self._loss_ms(model), number) for model, number in first.items() if model not in spared)

    def _loss_ms(self, model: str) -> int:
        """How much longer all wait for a model with one free GPU less that has it."""
        if not model or model not in self._jobs:
            return 0
        ends = self._ends[model]
        fewer = list(ends)
        fewer.remove(0)
        return self._waits(model, fewer) - self._waits(model, ends)

    def _waits(self, model: str, ends: Sequence[int]) -> int:
        """Total wait for the model, of those that wait and those that are told, on GPUs free at `ends`."""
        free_at = list(ends)
        total = 0
        for at, took in self._jobs[model]:
            if not free_at:
                free_at.append(at + self._cluster.load_ms + URGENT_MS)
            first = min(range(len(free_at)), key=free_at.__getitem__)
            begin = max(at, free_at[first])
            total += begin - at
            free_at[first] = begin + took
        return total


__all__ = ["serve_bound", "serve_told", "sized"]
