"""The proxy's counters on the agent's /metrics: the proxy has no listener but the data path's.

A scrape reads what the proxy told last, at most a report's window old, and never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from fal_agent.proxy.messages import ProxyStats
from fal_agent.proxy.tally import BOUNDS_S

_METRICS = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class ProxyMetrics(Collector):
    """Made by the agent; `see` on its loop, `collect` on the scrape's thread."""

    def __init__(self) -> None:
        self._seen: ProxyStats | None = None

    def see(self, stats: ProxyStats) -> None:
        """The proxy told its counters."""
        self._seen = stats

    def collect(self) -> Iterator[_METRICS]:
        """Nothing before the proxy has spoken."""
        stats = self._seen
        if stats is None:
            return
        tally = stats.tally
        yield GaugeMetricFamily("fal_proxy_connections", "Connections from gateways.", value=stats.connections)
        in_flight = sum(runner.in_flight for runner in stats.runners)
        yield GaugeMetricFamily("fal_proxy_in_flight", "Requests under way.", value=in_flight)
        slots = sum(runner.max_multiplexing for runner in stats.runners if not runner.draining)
        yield GaugeMetricFamily("fal_proxy_slots", "Requests that all runners take at once.", value=slots)
        requests = CounterMetricFamily("fal_proxy_requests", "Admitted requests that ended.", labels=["outcome"])
        for outcome, count in sorted(tally.ended.items()):
            requests.add_metric([outcome], count)
        yield requests
        refused = CounterMetricFamily("fal_proxy_refused", "Requests that were not admitted.", labels=["code"])
        for code, count in sorted(tally.refused.items()):
            refused.add_metric([code], count)
        yield refused
        moved = CounterMetricFamily("fal_proxy_bytes", "Bytes of bodies in, of answers out.", labels=["direction"])
        moved.add_metric(["in"], tally.bytes_in)
        moved.add_metric(["out"], tally.bytes_out)
        yield moved
        ends = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
        buckets = list(zip(ends, map(float, accumulate(tally.counts)), strict=True))
        seconds = "Admission to end of answer."
        yield HistogramMetricFamily("fal_proxy_request_seconds", seconds, buckets=buckets, sum_value=tally.seconds)
