"""The worker's Prometheus metrics, in a registry of their own (tests run many servers in one process)."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PHASES: Final = ("start", "import", "load", "warm", "ready", "draining")
_SECONDS_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fal_worker_requests", "Requests that ended, by outcome", ["outcome"], registry=self._registry
        )
        self._seconds = Histogram(
            "fal_worker_request_seconds",
            "Seconds from admission to end",
            ["outcome"],
            buckets=_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._steps = Counter("fal_worker_steps", "Denoising steps done", registry=self._registry)
        self._in_flight = Gauge("fal_worker_in_flight", "Requests that run or wait", registry=self._registry)
        self._phase = Gauge("fal_worker_phase", "1 for the phase the worker is in", ["phase"], registry=self._registry)
        self._phase_seconds = Gauge(
            "fal_worker_phase_seconds", "Seconds a phase took", ["phase"], registry=self._registry
        )

    def ended(self, outcome: str, *, seconds: float, steps: int) -> None:
        """A request ended."""
        self._requests.labels(outcome).inc()
        self._seconds.labels(outcome).observe(seconds)
        self._steps.inc(steps)

    def entered(self, phase: str) -> None:
        """The worker is in `phase`, and in no other."""
        for name in PHASES:
            self._phase.labels(name).set(name == phase)

    def took(self, phase: str, seconds: float) -> None:
        """`phase` is over."""
        self._phase_seconds.labels(phase).set(seconds)

    def text(self, *, in_flight: int) -> bytes:
        """The exposition format."""
        self._in_flight.set(in_flight)
        return generate_latest(self._registry)
