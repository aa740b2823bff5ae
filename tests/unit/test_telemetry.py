"""Logs without secrets, metrics and health over real HTTP, loop lag."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import aiohttp
import pytest
import structlog
from prometheus_client import CollectorRegistry, Gauge

from fal_contract.clock import ManualClock
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import (
    Health,
    LogFormat,
    LoopLag,
    TelemetryServer,
    configure_logging,
    get_logger,
)


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def logging_to(stream: io.StringIO, *, level: str = "info", format: LogFormat = "auto") -> None:
    configure_logging("fal-test", level=level, format=format, stream=stream, clock=ManualClock(wall_s=0.5))  # type: ignore[arg-type]


def test_json_lines_carry_process_level_time_and_event() -> None:
    out = io.StringIO()
    logging_to(out)
    get_logger("x").info("runner_started", runner="default/a-1", seconds=1.5)
    assert lines(out) == [
        {
            "event": "runner_started",
            "runner": "default/a-1",
            "seconds": 1.5,
            "level": "info",
            "process": "fal-test",
            "time": "1970-01-01T00:00:00.500+00:00",
        }
    ]


def test_level_filters_and_the_standard_library_takes_the_same_path() -> None:
    out = io.StringIO()
    logging_to(out, level="warning")
    get_logger("x").info("quiet")
    logging.getLogger("lib").info("quiet too")
    logging.getLogger("lib").warning("loud %s", "falj1.abc.def.123")
    assert [(line["event"], line["level"]) for line in lines(out)] == [("loud (hidden)", "warning")]


def test_configuring_twice_does_not_double_lines() -> None:
    out = io.StringIO()
    logging_to(out)
    logging_to(out)
    get_logger("x").info("once")
    assert len(lines(out)) == 1


@pytest.mark.parametrize("format", ["json", "console"])
def test_secrets_never_reach_the_log(format: LogFormat) -> None:
    out = io.StringIO()
    logging_to(out, format=format)
    log = get_logger("x")
    pem = "-----BEGIN EC PRIVATE KEY-----\nhunter2\n-----END EC PRIVATE KEY-----"
    log.info("a", token="hunter2", nested={"password": "hunter2", "list": [{"api_key": "hunter2"}]}, text=pem)
    log.info(f"joining with falj1.id.hunter2.aa and Bearer hunter2 {pem}")
    try:
        raise ValueError(f"bad key {pem}")
    except ValueError:
        log.exception("failed", Authorization="Basic hunter2")
    assert "hunter2" not in out.getvalue()
    assert "failed" in out.getvalue()
    assert "ValueError" in out.getvalue()


def test_values_are_bounded_and_counts_under_secret_names_stay() -> None:
    out = io.StringIO()
    logging_to(out)
    get_logger("x").info("a", text="x" * 100_000, many=list(range(10_000)), uses_left_token=3)
    line = lines(out)[0]
    assert len(out.getvalue()) < 6000
    assert line["uses_left_token"] == 3


async def _with_server(server: TelemetryServer) -> None:
    port = await server.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession() as client:
            async with client.get(f"http://127.0.0.1:{port}/metrics") as answer:
                assert answer.status == 200
                assert "fal_sample 3.0" in await answer.text()
            async with client.get(f"http://127.0.0.1:{port}/healthz") as answer:
                assert answer.status == 503
                assert await answer.json() == {"ok": False, "checks": {"store": "stalled"}}
            async with client.get(f"http://127.0.0.1:{port}/other") as answer:
                assert answer.status == 404
        other = TelemetryServer(CollectorRegistry(), lambda: Health(True))
        with pytest.raises(FalError, match="cannot listen") as caught:
            await other.start("127.0.0.1", port)
        assert caught.value.code is Code.UNAVAILABLE
    finally:
        await server.close()
        await server.close()


def test_metrics_and_health_over_http() -> None:
    registry = CollectorRegistry()
    Gauge("fal_sample", "a sample", registry=registry).set(3)
    asyncio.run(_with_server(TelemetryServer(registry, lambda: Health(False, {"store": "stalled"}))))


def test_a_broken_collector_is_a_500_and_does_not_use_up_the_scrapes() -> None:
    class Broken:
        def collect(self) -> list[object]:
            raise RuntimeError("broken")

    async def scenario() -> list[int]:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Broken())  # type: ignore[arg-type]
        server = TelemetryServer(registry, lambda: Health(True))
        port = await server.start("127.0.0.1", 0)
        statuses = []
        try:
            async with aiohttp.ClientSession() as client:
                for _ in range(6):
                    async with client.get(f"http://127.0.0.1:{port}/metrics") as answer:
                        statuses.append(answer.status)
        finally:
            await server.close()
        return statuses

    assert asyncio.run(scenario()) == [500] * 6


def test_loop_lag_adds_up_stalls_only() -> None:
    registry = CollectorRegistry()
    lag = LoopLag(registry)
    for sample_s in (0.001, 2.0, 0.05, -0.001):
        lag.observe(sample_s)
    assert (lag.lag_s, lag.lag_max_s, lag.stalled_s) == (0.0, 2.0, 2.0)
    assert registry.get_sample_value("fal_event_loop_lag_max_seconds") == 2.0


def test_loop_lag_samples_a_running_loop() -> None:
    async def scenario() -> float:
        lag = LoopLag(CollectorRegistry(), interval_s=0.0)
        task = asyncio.create_task(lag.run())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        return lag.lag_max_s

    assert 0 < asyncio.run(scenario()) < 5
