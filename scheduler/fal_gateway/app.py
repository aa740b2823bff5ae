"""HTTP in front of the dispatch client.

    POST /v1/run/TEAM/APP   the body goes to a worker's /infer, its answer comes back as it is made
    any  /v1/run/TEAM/APP/PATH?QUERY   the same for a server of any kind: its own method, path and query; our worker
         (no command, image, port or socket of the app's own) has none but POST /infer
    GET  /healthz           200 while a scheduler answers or any route is known

A client that goes away cancels its request within a step. An answer that breaks off after it began ends the connection,
so that it cannot be taken for a whole one. Errors are JSON: {"error": {"code", "what", "remedy", "field"}}.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fal_contract.dispatch import DispatchClient
from fal_contract.errors import Code, FalError, invalid
from fal_contract.http_client import HttpResponse
from fal_contract.ids import app_id

_HTTP_STATUS: Final = {
    Code.INVALID: 400,
    Code.NOT_FOUND: 404,
    Code.UNAUTHENTICATED: 502,  # between us and the cluster; the client cannot help it
    Code.PERMISSION_DENIED: 502,
    Code.RUNNER_FAILED: 502,
    Code.NO_CAPACITY: 503,
    Code.BUSY: 503,
    Code.DRAINING: 503,
    Code.UNAVAILABLE: 503,
    Code.TIMEOUT: 504,
}
_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
_PASSED_TO_WORKER: Final = ("accept", "content-type", "x-fal-request-id")
_PASSED_TO_CLIENT: Final = (b"content-type", b"content-length", b"cache-control", b"x-fal-request-id")


class Gateway:
    """The handlers and what they count."""

    def __init__(
        self, client: DispatchClient, registry: CollectorRegistry, *, wait_s: float, body_bytes_max: int
    ) -> None:
        self._client = client
        self._wait_s = wait_s
        self._body_bytes_max = body_bytes_max
        self._requests = Counter("fal_gateway_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self._seconds = Histogram("fal_gateway_request_seconds", "Request to end of answer.", registry=registry)
        for name, help_text in (
            ("waiting", "Requests that wait for a slot."),
            ("leases", "Leases in hand."),
            ("routes", "Runners in the route table."),
            ("connected", "1 while a scheduler answers."),
            ("retries", "Attempts that surely did not run."),
        ):
            gauge = Gauge(f"fal_gateway_{name}", help_text, registry=registry)
            gauge.set_function(partial(self._statistic, name))

    def application(self) -> web.Application:
        """For an aiohttp runner with handler_cancellation=True."""
        application = web.Application(client_max_size=self._body_bytes_max)
        application.router.add_post("/v1/run/{team}/{app}", self._run)
        for method in _METHODS:
            application.router.add_route(method, "/v1/run/{team}/{app}/{path:.*}", self._run)
        application.router.add_get("/healthz", self._healthz)
        return application

    def _statistic(self, name: str) -> float:
        return float(getattr(self._client.statistics(), name))

    @property
    def healthy(self) -> bool:
        """It can serve something."""
        statistics = self._client.statistics()
        return statistics.connected or statistics.routes > 0

    async def _healthz(self, request: web.Request) -> web.Response:
        statistics = self._client.statistics()
        body = {"connected": statistics.connected, "routes": statistics.routes, "waiting": statistics.waiting}
        return web.json_response(body, status=200 if self.healthy else 503)

    async def _run(self, request: web.Request) -> web.StreamResponse:
        outcome = "cancelled"
        started_s = time.monotonic()
        try:
            answer = await self._ask(request)
            result = await _pass_on(request, answer)
            outcome = "served" if answer.status < 500 else "failed"
            return result
        except FalError as error:
            outcome = error.code.value.lower()
            return error_response(error)
        except web.HTTPRequestEntityTooLarge:
            outcome = "invalid"
            remedy = f"Send at most {self._body_bytes_max} bytes; give large inputs as URLs."
            return error_response(FalError(Code.INVALID, "the request body is too long", remedy=remedy))
        finally:
            self._requests.labels(outcome).inc()
            self._seconds.observe(time.monotonic() - started_s)

    async def _ask(self, request: web.Request) -> HttpResponse:
        app = app_id(request.match_info["team"], request.match_info["app"])
        body = await request.read()
        headers = [(name, request.headers[name]) for name in _PASSED_TO_WORKER if name in request.headers]
        method, path = "POST", "/infer"
        if "path" in request.match_info:
            method, path = request.method, "/" + _target(request).split("/", 5)[5]  # as it was written, query included
        chosen = (method, path) != ("POST", "/infer")
        return await self._client.request(app, method, path, headers, body, wait_s=self._wait(request), chosen=chosen)

    def _wait(self, request: web.Request) -> float:
        """A client may wait for less, by the header x-fal-wait-s."""
        text = request.headers.get("x-fal-wait-s")
        if text is None:
            return self._wait_s
        with contextlib.suppress(ValueError):
            if 0 <= float(text) <= self._wait_s:
                return float(text)
        raise invalid(
            "x-fal-wait-s", text, "is not a time to wait", remedy=f"Give seconds between 0 and {self._wait_s:g}."
        )


def _target(request: web.Request) -> str:
    """Path and query of the request line, also where that names the host (RFC 9112, 3.2.2)."""
    raw = request.raw_path
    return raw if raw.startswith("/") else "/" + raw.split("/", 3)[3]


async def _pass_on(request: web.Request, answer: HttpResponse) -> web.StreamResponse:
    """The worker's answer, piece by piece."""
    response = web.StreamResponse(status=answer.status)
    for name, value in answer.headers:
        if name in _PASSED_TO_CLIENT:
            response.headers[name.decode()] = value.decode("latin-1")
    try:
        await response.prepare(request)
        async with contextlib.aclosing(answer.chunks()) as pieces:
            async for piece in pieces:
                await response.write(piece)
        await response.write_eof()
    except FalError:
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        pass  # the client went away
    finally:
        answer.close()
    return response


def error_response(error: FalError) -> web.Response:
    """The JSON form of an error."""
    body = {"code": error.code.value, "what": error.what, "remedy": error.remedy, "field": error.field}
    return web.json_response({"error": body}, status=_HTTP_STATUS.get(error.code, 500))
