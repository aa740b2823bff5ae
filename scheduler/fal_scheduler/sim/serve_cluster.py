"""GPUs with one model each, queues and a virtual clock: what every policy of `falctl sim serve` runs on. Pure."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

ASK_AGAIN_MS: Final = 5_000  # where something waits and nothing happens


class Request(NamedTuple):
    """One request of the trace."""

    at_ms: int
    took_ms: int
    model: str
    size: str = ""  # what it tells of its work on arrival


@dataclass(slots=True)
class Gpu:
    """One GPU with a model; `until_ms` is when its service or load ends."""

    model: str = ""
    since_ms: int = 0
    until_ms: int = 0
    loading: bool = False
    free: bool = True
    size: str = ""  # of what it serves


@dataclass(slots=True)
class Outcome:
    """What became of a trace."""

    loads: int = 0
    waits_ms: list[int] = field(default_factory=list)

    def as_json(self, policy: str) -> dict[str, Any]:
        """The figures; seconds."""
        waits = sorted(self.waits_ms)
        count = len(waits)
        return {
            "policy": policy,
            "loads_per_request": round(self.loads / count, 4),
            "mean_wait_s": round(sum(waits) / count / 1000, 2),
            "p95_wait_s": round(waits[int(0.95 * count)] / 1000, 1),
            "max_wait_s": round(waits[-1] / 1000, 1),
            "requests": count,
        }


class Cluster:
    """GPUs, the queue of each model and size, and the virtual clock."""

    def __init__(self, requests: Sequence[Request], gpus: int, load_ms: int) -> None:
        self.requests = requests
        self.gpus = [Gpu() for _ in range(gpus)]
        self.load_ms = load_ms
        self.queues: dict[tuple[str, str], deque[Request]] = {}
        self.now_ms = 0
        self.outcome = Outcome()
        self.on_arrival: Callable[[Request], None] = lambda _: None
        self.on_end: Callable[[Gpu], None] = lambda _: None
        self.wakes_ms: deque[int] = deque()  # when to ask besides events, in order
        self._ends: list[tuple[int, int]] = []

    def run(self, dispatch: Callable[[], None]) -> Outcome:
        """Serve everything; `dispatch` is called after every event."""
        at = 0
        while at < len(self.requests) or self.queues or self._ends:
            arrival = self.requests[at].at_ms if at < len(self.requests) else None
            end = self._ends[0][0] if self._ends else None
            wake = self.wakes_ms[0] if self.wakes_ms else None
            times = [x for x in (arrival, end, wake) if x is not None]
            upcoming = min(times, default=0)
            if self.queues and (not times or upcoming > self.now_ms + ASK_AGAIN_MS):
                self.now_ms += ASK_AGAIN_MS
            elif arrival is not None and arrival == upcoming:
                self.now_ms = arrival
                request = self.requests[at]
                self.queues.setdefault((request.model, request.size), deque()).append(request)
                self.on_arrival(request)
                at += 1
            elif wake is not None and wake == upcoming:
                self.now_ms = max(self.now_ms, self.wakes_ms.popleft())
            else:
                self.now_ms, number = heapq.heappop(self._ends)
                gpu = self.gpus[number]
                self.on_end(gpu)
                gpu.free, gpu.loading, gpu.since_ms = True, False, self.now_ms
            dispatch()
        return self.outcome

    def serve(self, number: int, key: tuple[str, str], *, after_ms: int = 0) -> None:
        """The oldest of the queue begins on this GPU, after a load that it waits for."""
        queue = self.queues[key]
        request = queue.popleft()
        if not queue:
            del self.queues[key]
        self.outcome.waits_ms.append(self.now_ms + after_ms - request.at_ms)
        self._busy(number, key, after_ms, request.took_ms, loading=False)

    def load(self, number: int, model: str) -> None:
        """The GPU loads the model, and is free with it then."""
        self.outcome.loads += 1
        self._busy(number, (model, ""), 0, self.load_ms, loading=True)

    def _busy(self, number: int, key: tuple[str, str], after_ms: int, took_ms: int, *, loading: bool) -> None:
        gpu = self.gpus[number]
        gpu.model, gpu.size = key
        gpu.free, gpu.loading, gpu.since_ms = False, loading, self.now_ms + after_ms
        gpu.until_ms = self.now_ms + after_ms + took_ms
        heapq.heappush(self._ends, (gpu.until_ms, number))


__all__ = ["Cluster", "Gpu", "Outcome", "Request"]
