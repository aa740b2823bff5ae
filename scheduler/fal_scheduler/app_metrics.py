"""fal's metrics of apps, by fal's names: runners by state and machine type, requests that wait, requests under way.

Counted on the loop at most every 10 s, as fal's are, and given out from any thread; a standby has none. Must not decide
anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fal_scheduler.core.records import Runner
from fal_scheduler.core.state import State
from fal_scheduler.core.views import runner_phase

SAMPLED_EVERY_S: Final = 10.0


class AppMetrics(Collector):
    """One for the process; leaders come and go."""

    def __init__(self) -> None:
        self._families: tuple[GaugeMetricFamily, ...] = ()
        self._sampled_s = float("-inf")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Called by the registry."""
        yield from self._families

    def sample(self, state: State | None, now_s: float) -> None:
        """Count anew, if it is time; `state` None: this process does not lead. `now_s`: monotonic."""
        if state is None:
            self._families, self._sampled_s = (), float("-inf")
        elif now_s - self._sampled_s >= SAMPLED_EVERY_S:
            self._families, self._sampled_s = _families(state), now_s


def _families(state: State) -> tuple[GaugeMetricFamily, ...]:
    runners = GaugeMetricFamily(
        "fal_app_runners", "Runners of an app.", labels=["application", "state", "machine_type"]
    )
    queued = GaugeMetricFamily("fal_app_queue_size", "Requests that wait for a slot.", labels=["application"])
    busy = GaugeMetricFamily("fal_app_concurrent_requests", "Requests under way.", labels=["application"])
    for app_id in sorted(state.apps):
        counts: dict[tuple[str, str], int] = {}
        under_way = 0
        for runner_id in state.runners_by_app.get(app_id, ()):
            runner = state.runners[runner_id]
            key = (runner_phase(state, runner).state.name, _machine_type(state, runner))
            counts[key] = counts.get(key, 0) + 1
            status = state.status_of(runner)
            under_way += status.in_flight if status is not None else 0
        for (phase, machine_type), count in sorted(counts.items()):
            runners.add_metric([app_id, phase, machine_type], count)
        queued.add_metric([app_id], state.demand.queued(app_id))
        busy.add_metric([app_id], under_way)
    return runners, queued, busy


def _machine_type(state: State, runner: Runner) -> str:
    """The model of its GPUs; empty without any, or without a node."""
    facts = state.fleet.facts.get(runner.node)
    if facts is None or not runner.gpus:
        return ""
    return next((gpu.model for gpu in facts.gpus if gpu.id == runner.gpus[0]), "")


__all__ = ["AppMetrics"]
