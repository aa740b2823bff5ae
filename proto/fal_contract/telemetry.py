"""Logs, metrics and health, the same in every daemon.

Logs are structlog events: JSON lines on stderr, or coloured text on a terminal. Values under secret-looking keys,
join tokens and private keys are blotted out wherever they stand, and long values are cut, so that a log line can
neither leak a credential nor grow without bound. Records of the standard library's loggers take the same path.

Metrics live in a registry that the process owns (never prometheus-client's global one) and are served with
`/healthz` by `TelemetryServer`. Nothing here is on a request path.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any, Final, Literal

import structlog

from fal_contract.clock import Clock, SystemClock
from fal_contract.errors import Code, FalError
from fal_contract.limits import LOG_LINE_BYTES_MAX

if TYPE_CHECKING:  # everybody logs; only who serves metrics waits 0.3 s for these
    from aiohttp import web
    from prometheus_client import CollectorRegistry

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]

_HIDDEN: Final = "(hidden)"
_SECRET_KEY: Final = re.compile(
    r"secret|passw|passphrase|authorization|cookie|private|credential|api_?key|key_pem|token$", re.IGNORECASE
)
_SECRET_TEXT: Final = re.compile(
    r"falj1\.[\w.-]+|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)|(?<=Bearer )\S+",
    re.DOTALL,
)
_DEPTH_MAX: Final = 6
_ITEMS_MAX: Final = 64
_SCRAPES_MAX: Final = 4
_HANDLER_TIMEOUT_S: Final = 5.0
_LAG_INTERVAL_S: Final = 0.25
_LATE_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)


def configure_logging(
    process: str,
    *,
    level: LogLevel = "info",
    format: LogFormat = "auto",
    stream: IO[str] | None = None,
    clock: Clock | None = None,
) -> None:
    """Send structlog and standard logging to `stream` (stderr). Call once, first thing in main; repeatable.

    Every line carries `process`, `level`, `time` (RFC 3339, UTC) and `event`.
    """
    out = sys.stderr if stream is None else stream
    console = format == "console" or (format == "auto" and out.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _Stamp(process, clock or SystemClock()),
        structlog.processors.format_exc_info,
        redact,
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty())
        if console
        else structlog.processors.JSONRenderer(default=str, ensure_ascii=False)
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "_fal", False):
            root.removeHandler(old)
    handler._fal = True  # type: ignore[attr-defined]  # marks ours, so that a second call replaces it
    root.addHandler(handler)
    root.setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # a later configure_logging, in tests above all, must take effect
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger called `name`; `log.info("runner_started", runner=id)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def redact(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The structlog processor that hides secrets and cuts long values."""
    for key, value in event.items():
        if key not in ("_record", "_from_structlog"):
            event[key] = _HIDDEN if _hides(key, value) else _safe(value, 0)
    return event


class _Stamp:
    """Adds process name and time."""

    def __init__(self, process: str, clock: Clock) -> None:
        self._process = process
        self._clock = clock

    def __call__(self, logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = self._process
        event["time"] = datetime.fromtimestamp(self._clock.wall_s(), UTC).isoformat(timespec="milliseconds")
        return event


def _hides(key: object, value: object) -> bool:
    return isinstance(key, str) and bool(_SECRET_KEY.search(key)) and not isinstance(value, bool | int | float | None)


def _safe(value: Any, depth: int) -> Any:
    if isinstance(value, bool | int | float | None):
        return value
    if depth >= _DEPTH_MAX:
        return "…"
    if isinstance(value, Mapping):
        items = list(value.items())[:_ITEMS_MAX]
        return {str(key): _HIDDEN if _hides(key, inner) else _safe(inner, depth + 1) for key, inner in items}
    if isinstance(value, list | tuple | set | frozenset):
        return [_safe(inner, depth + 1) for inner in list(value)[:_ITEMS_MAX]]
    text = _SECRET_TEXT.sub(_HIDDEN, value if isinstance(value, str) else str(value))
    return text if len(text) <= LOG_LINE_BYTES_MAX else text[: LOG_LINE_BYTES_MAX - 1] + "…"


@dataclass(frozen=True, slots=True)
class Health:
    """Answer of `/healthz`: `ok` decides the status, `checks` says per part what is wrong ("ok" when nothing)."""

    ok: bool
    checks: Mapping[str, str] = field(default_factory=dict)


class TelemetryServer:
    """`/metrics` and `/healthz` of one process over plain HTTP; bind it to loopback or a private network.

    At most four scrapes run at once; others are told 503. `/healthz` answers 200 or 503 with a JSON object.
    """

    def __init__(self, registry: CollectorRegistry, health: Callable[[], Health]) -> None:
        self._registry = registry
        self._health = health
        self._runner: web.AppRunner | None = None
        self._busy = 0

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (useful with 0). Raises FalError(UNAVAILABLE) when it cannot."""
        from aiohttp import web

        app = web.Application(client_max_size=1024)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=75.0, handle_signals=False)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, backlog=16, reuse_port=False).start()
        except OSError as exc:
            await runner.cleanup()
            raise FalError(
                Code.UNAVAILABLE,
                f"telemetry cannot listen on {host}:{port}: {exc.strerror or exc}",
                remedy="Stop what uses the port, or choose another one (0 for any).",
            ) from exc
        self._runner = runner
        return int(runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening; idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        from aiohttp import web
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        if self._busy >= _SCRAPES_MAX:
            return web.Response(status=503, text="too many scrapes at once; scrape less often\n")
        self._busy += 1
        try:
            async with asyncio.timeout(_HANDLER_TIMEOUT_S):
                body = await asyncio.to_thread(generate_latest, self._registry)
        finally:
            self._busy -= 1
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthz(self, request: web.Request) -> web.Response:
        from aiohttp import web

        health = self._health()
        status = 200 if health.ok else 503
        return web.json_response({"ok": health.ok, "checks": dict(health.checks)}, status=status)


class LoopLag:
    """How late the event loop runs its timers.

    `stalled_s` accumulates all lateness above the sampling interval's noise; deadlines for others' silence add it
    (a stalled process must not take its peers for dead). Run `run()` as a task for the life of the process. A stall is
    seen by what of it lies after a timer was due, so one shorter than `interval_s` may pass unseen.
    """

    def __init__(self, registry: CollectorRegistry, *, interval_s: float = _LAG_INTERVAL_S) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._interval_s = interval_s
        self._lag = Gauge("fal_event_loop_lag_seconds", "Lateness of the last timer", registry=registry)
        self._lag_max = Gauge("fal_event_loop_lag_max_seconds", "Greatest lateness so far", registry=registry)
        self._stalled = Counter("fal_event_loop_stalled_seconds", "Sum of latenesses above 0.1 s", registry=registry)
        self._late = Histogram(
            "fal_event_loop_late_seconds", "Lateness of all timers", buckets=_LATE_BUCKETS_S, registry=registry
        )
        self.lag_s = 0.0
        self.lag_max_s = 0.0
        self.stalled_s = 0.0

    def observe(self, lag_s: float) -> None:
        """Take one sample (the loop's, or a test's)."""
        self.lag_s = max(0.0, lag_s)
        self.lag_max_s = max(self.lag_max_s, self.lag_s)
        self._lag.set(self.lag_s)
        self._lag_max.set(self.lag_max_s)
        self._late.observe(self.lag_s)
        if self.lag_s > 0.1:
            self.stalled_s += self.lag_s
            self._stalled.inc(self.lag_s)

    async def run(self) -> None:
        """Sample until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + self._interval_s
            await asyncio.sleep(self._interval_s)
            self.observe(loop.time() - due_s)
