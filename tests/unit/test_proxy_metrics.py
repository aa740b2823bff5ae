"""The proxy's counters: what they count, how they travel, how they are exported."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from dataplane import RUNNER, TICKET, address_of, call, dial, entry, serving, working
from fal_agent.proxy.control import ProxyControl
from fal_agent.proxy.messages import ProxyStats, RunnerStats, stats_from_wire, stats_to_wire
from fal_agent.proxy.tally import BOUNDS_S, Tally
from fal_agent.proxy_metrics import ProxyMetrics


def test_requests_refusals_and_bytes_are_counted_and_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with working(tmp_path) as worker, serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry(worker))
            connection = await dial(address_of(proxy))
            for action, ticket in (("/infer", TICKET[1]), ("/fail", TICKET[1])):
                await (await call(connection, action, b"x" * 1000, ticket=ticket)).read(1000)
            await (await call(connection, "/infer", runner="default/none-1")).read(1000)
            connection.close()
            control = await ProxyControl.connect(tmp_path / "p" / "proxy.sock", on_stats=lambda _: None)
            tally = (await control.stats()).tally
            await control.close()
            assert tally.ended == {"served": 1, "failed": 1}
            assert tally.refused == {"NOT_FOUND": 1}
            assert tally.bytes_in == 2000
            assert tally.bytes_out > 0
            assert sum(tally.counts) == 2
            assert tally.seconds > 0

    asyncio.run(scenario())


def test_a_request_falls_into_the_bucket_that_it_does_not_exceed() -> None:
    tally = Tally()
    for seconds in (0.0, 0.001, 0.0011, 300.0, 301.0):
        tally.end("served", seconds)
    assert (tally.counts[0], tally.counts[1], tally.counts[-2], tally.counts[-1]) == (2, 1, 1, 1)
    assert Tally.from_wire(tally.to_wire()) == tally
    assert sum(Tally.from_wire({"counts": [1, 2]}).counts) == 0, "another release's buckets"


def test_an_older_proxy_tells_none() -> None:
    wire = stats_to_wire(ProxyStats("i", 0, (), ()))
    del wire["tally"]
    assert stats_from_wire(wire).tally == Tally()


def test_the_agent_exports_what_was_told_last() -> None:
    registry, metrics = CollectorRegistry(), ProxyMetrics()
    registry.register(metrics)
    assert b"fal_proxy" not in generate_latest(registry)
    tally = Tally(refused={"BUSY": 4}, bytes_in=10, bytes_out=20)
    tally.end("served", 0.02)
    rows = (RunnerStats(RUNNER, 4, False, 3, 1, 0, 0, 0.0), RunnerStats("default/b-1", 2, True, 1, 0, 0, 0, 0.0))
    metrics.see(ProxyStats("i", 5, rows, (), tally))
    text = generate_latest(registry).decode()
    for line in (
        "fal_proxy_connections 5.0",
        "fal_proxy_in_flight 4.0",
        "fal_proxy_slots 4.0",
        'fal_proxy_requests_total{outcome="served"} 1.0',
        'fal_proxy_refused_total{code="BUSY"} 4.0',
        'fal_proxy_bytes_total{direction="out"} 20.0',
        'fal_proxy_request_seconds_bucket{le="0.01"} 0.0',
        'fal_proxy_request_seconds_bucket{le="0.025"} 1.0',
        'fal_proxy_request_seconds_bucket{le="+Inf"} 1.0',
        "fal_proxy_request_seconds_count 1.0",
    ):
        assert line in text, line
    assert list(BOUNDS_S) == sorted(BOUNDS_S)
