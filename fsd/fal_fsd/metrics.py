"""`/metrics` and `/healthz` of fal-fsd. Counters are read when they are scraped; nothing here is on a data path."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fal_contract.telemetry import Health, LoopLag, TelemetryServer

if TYPE_CHECKING:
    from fal_fsd.assembly import Cache

_LAG_INTERVAL_S: Final = 0.05  # no stall over 50 ms passes unseen


class Metrics(Collector):
    """Of one cache. `start` returns the port; close it."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        registry.register(self)
        self._lag = LoopLag(registry, interval_s=_LAG_INTERVAL_S)
        self._server = TelemetryServer(registry, self._health)
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        self._task = asyncio.create_task(self._lag.run(), name="loop lag")
        return await self._server.start(host, port)

    async def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._server.close()

    def collect(self) -> Iterator[Metric]:
        """On a scraping thread; reads numbers only."""
        totals = self._cache.transfers.totals
        came = CounterMetricFamily("fal_fsd_bytes", "Bytes of pieces that were checked and kept", labels=["source"])
        came.add_metric(["origin"], totals.bytes_from_origin)
        came.add_metric(["peers"], totals.bytes_from_peers)
        yield came
        yield CounterMetricFamily(
            "fal_fsd_origin_read_bytes", "Bytes that left origins for this node, aborted ranges included",
            value=self._cache.origins.bytes_read,
        )  # fmt: skip
        yield CounterMetricFamily("fal_fsd_pieces_bad", "Pieces with a wrong digest", value=totals.pieces_bad)
        events = CounterMetricFamily("fal_fsd_events", "What operators are told", labels=["kind"])
        for kind, count in sorted(self._cache.news.counts.items()):
            events.add_metric([kind], count)
        yield events
        yield GaugeMetricFamily("fal_fsd_transfers", "Artifacts on their way", value=self._cache.transfers.count)
        yield GaugeMetricFamily(
            "fal_fsd_rate_bytes_per_second", "At which they arrive", value=self._cache.transfers.rate_bytes_s
        )
        yield GaugeMetricFamily("fal_fsd_peers", "Connected peers", value=self._cache.around.peers_up())
        yield GaugeMetricFamily(
            "fal_fsd_memory_locked_bytes", "Of finished files", value=self._cache.around.memory.bytes_locked
        )

    def _health(self) -> Health:
        link = self._cache.link
        scheduler = "none" if link is None else "ok" if link.connected else "not connected"
        return Health(ok=True, checks={"scheduler": scheduler})  # without a scheduler a cache still serves


__all__ = ["Metrics"]
