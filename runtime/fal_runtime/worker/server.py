"""HTTP on the worker's unix socket: health, inference, cancellation, metrics.

Invariant: whatever a client sends, the process and the other requests go on; a client that disconnects, or is
cancelled, stops its inference within one step. The server knows the model only as an `Engine` behind a `Lane`;
`main` moves it through its phases. Nothing here blocks the loop.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from fal_contract.errors import Code, FalError, not_found
from fal_runtime.worker.engine import Output, Stopped
from fal_runtime.worker.lane import Job, Lane
from fal_runtime.worker.log import REQUEST, log
from fal_runtime.worker.metrics import Metrics
from fal_runtime.worker.request import BODY_BYTES_MAX, check_request_id, parse_request
from fal_runtime.worker.residents import CONTROL_HEADER, MODEL_HEADER, NotResident, Residents

SEED_DRAWN_MAX: Final = 2**32 - 1  # JSON readers with 64-bit floats keep it exact
REQUEST_ID_HEADER: Final = "x-fal-request-id"
NOT_RUN_HEADER: Final = "x-fal-not-run"  # the proxy may send such a request again: a place frees within a step
EVENT_STREAM: Final = "text/event-stream"
PING_INTERVAL_S: Final = 10.0  # a comment line, so that no middle box takes a waiting stream for dead
CLIENT_CLOSED_REQUEST: Final = 499  # nginx's word for a request that was cancelled
_STATUS: Final = {
    Code.INVALID: 400,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.CONFLICT: 409,
    Code.PERMISSION_DENIED: 403,
    Code.NO_CAPACITY: 507,
    Code.CANCELLED: CLIENT_CLOSED_REQUEST,
    Code.BUSY: 503,
    Code.UNAVAILABLE: 503,
    Code.TIMEOUT: 504,
    Code.OUT_OF_MEMORY: 507,
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WorkerServer:
    """The HTTP application and the phase it is in: start, import, load, warm, ready, draining."""

    def __init__(self, *, request_timeout_s: float, body_timeout_s: float, rng: random.Random) -> None:
        self._request_timeout_s = request_timeout_s
        self._body_timeout_s = body_timeout_s
        self._rng = rng
        self._metrics = Metrics()
        self._lane: Lane | None = None
        self._residents: Residents | None = None
        self._phase = ""
        self._phase_began_s = time.monotonic()
        self.enter("start")

    @property
    def phase(self) -> str:
        return self._phase

    def enter(self, phase: str) -> None:
        """Go to the next phase; the seconds of the last one are logged and counted."""
        now_s = time.monotonic()
        if self._phase:
            seconds = round(now_s - self._phase_began_s, 3)
            self._metrics.took(self._phase, seconds)
            log("phase", phase=self._phase, seconds=seconds, next=phase)
        self._phase, self._phase_began_s = phase, now_s
        self._metrics.entered(phase)

    def serve_model(self, lane: Lane, residents: Residents) -> None:
        """The first model is loaded and warm: be ready."""
        self._lane, self._residents = lane, residents
        self.enter("ready")

    def ended(self, job: Job, outcome: str, seconds: float) -> None:
        """Count and log a request that ended; a `Lane` calls it."""
        self._metrics.ended(outcome, seconds=seconds, steps=job.steps_done)
        log("request", request_id=job.request_id, outcome=outcome, seconds=round(seconds, 4), steps=job.steps_done)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors_as_json], client_max_size=BODY_BYTES_MAX)
        app.add_routes(
            [
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._show_metrics),
                web.post("/infer", self._infer),
                web.post("/cancel/{request_id}", self._cancel),
                web.post("/load", self._change),
                web.post("/unload", self._change),
            ]
        )
        return app

    async def _livez(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"live": True, "phase": self._phase})

    async def _readyz(self, _: web.Request) -> web.StreamResponse:
        ready = self._phase == "ready"
        seconds = round(time.monotonic() - self._phase_began_s, 3)
        body: dict[str, object] = {"ready": ready, "phase": self._phase, "seconds": seconds}
        if self._residents is not None:
            body["resident"] = self._residents.told()
        return web.json_response(body, status=200 if ready else 503)

    async def _show_metrics(self, _: web.Request) -> web.StreamResponse:
        text = self._metrics.text(in_flight=self._lane.in_flight if self._lane else 0)
        return web.Response(body=text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _cancel(self, http: web.Request) -> web.StreamResponse:
        request_id = http.match_info["request_id"]
        if self._lane is None or not self._lane.stop(request_id):
            raise not_found("request", request_id, remedy="It may have ended already.")
        return web.json_response({"cancelled": request_id}, status=202)

    async def _change(self, http: web.Request) -> web.StreamResponse:
        """`/load` and `/unload`: for the agent, whose proxy takes the header out of what others send."""
        if CONTROL_HEADER not in http.headers:
            what = f"{http.path} is for this node's agent only"
            raise FalError(Code.PERMISSION_DENIED, what, remedy="Deploy the app; the scheduler loads its model.")
        _, residents = self._serving()
        body = await self._body(http)
        return web.json_response(await (residents.load(body) if http.path == "/load" else residents.unload(body)))

    def _serving(self) -> tuple[Lane, Residents]:
        if self._phase != "ready" or self._lane is None or self._residents is None:
            raise FalError(Code.UNAVAILABLE, f"the worker is not ready (phase {self._phase})", remedy="Try again.")
        return self._lane, self._residents

    async def _infer(self, http: web.Request) -> web.StreamResponse:
        lane, residents = self._serving()
        request_id = check_request_id(http.headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex)
        REQUEST.set(request_id)
        body = await self._body(http)
        name, model = residents.find(http.headers.get(MODEL_HEADER), body)
        request = parse_request(body, model, seed_default=self._rng.randrange(SEED_DRAWN_MAX + 1), name=name)
        job = lane.submit(request_id, request)
        try:
            if EVENT_STREAM in http.headers.get("accept", ""):
                return await self._stream(http, job)
            return _answer(job, await self._result(job), accept=http.headers.get("accept", ""))
        finally:
            job.stop()  # the client has gone or the time is up; no effect on a job that has ended

    async def _body(self, http: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._body_timeout_s):
                return await http.read()
        except TimeoutError:
            what = f"the request's body did not arrive within {self._body_timeout_s:g} s"
            raise FalError(Code.TIMEOUT, what, remedy="Send the whole body at once.") from None

    async def _result(self, job: Job) -> Output:
        """The job's output within the request timeout; `Stopped` becomes CANCELLED."""
        left_s = job.submitted_s + self._request_timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                return await asyncio.shield(job.result)
        except TimeoutError:
            what = f"the request took longer than {self._request_timeout_s:g} s"
            raise FalError(Code.TIMEOUT, what, remedy="Use fewer steps, or raise request_timeout.") from None
        except Stopped:
            raise FalError(Code.CANCELLED, "the request was cancelled", remedy="") from None

    async def _stream(self, http: web.Request, job: Job) -> web.StreamResponse:
        """Server-sent events: start, step …, then output and completed, or error."""
        response = web.StreamResponse(
            headers={"content-type": EVENT_STREAM, "cache-control": "no-store", REQUEST_ID_HEADER: job.request_id}
        )
        await response.prepare(http)
        start = {"request_id": job.request_id, "seed": job.request.seed, "steps": job.request.steps}
        await response.write(event("start", start))
        try:
            async with asyncio.timeout(job.submitted_s + self._request_timeout_s - time.monotonic()):
                await self._stream_steps(response, job)
        except TimeoutError:
            pass  # _result says so
        try:
            output = await self._result(job)
        except FalError as error:
            await response.write(event("error", error_body(error)["error"]))
        else:
            await response.write(event("output", output_body(job, output)))
            total_s = round(time.monotonic() - job.submitted_s, 4)
            await response.write(event("completed", {"request_id": job.request_id, "seconds": total_s}))
        await response.write_eof()
        return response

    async def _stream_steps(self, response: web.StreamResponse, job: Job) -> None:
        while True:
            try:
                async with asyncio.timeout(PING_INTERVAL_S):
                    step = await job.events.get()
            except TimeoutError:
                await response.write(b": ping\n\n")
                continue
            if step is None:
                return
            done, steps = step
            await response.write(event("step", {"i": done, "n": steps}))


def event(name: str, data: dict[str, object]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def error_body(error: FalError) -> dict[str, dict[str, object]]:
    """The one JSON form of an error."""
    return {"error": {"code": error.code.value, "what": error.what, "remedy": error.remedy, "field": error.field}}


def output_body(job: Job, output: Output) -> dict[str, object]:
    """A picture as JSON."""
    return {
        "request_id": job.request_id,
        "image": base64.b64encode(output.png).decode("ascii"),
        "content_type": "image/png",
        "width": output.width_px,
        "height": output.height_px,
        "seed": job.request.seed,
        "timings": {
            "queue_s": round(job.queue_s, 4),
            "infer_s": round(output.infer_s, 4),
            "encode_s": round(output.encode_s, 4),
        },
    }


def _answer(job: Job, output: Output, *, accept: str) -> web.StreamResponse:
    """PNG, unless the request's format, or else its Accept header, says JSON."""
    headers = {REQUEST_ID_HEADER: job.request_id, "x-fal-seed": str(job.request.seed)}
    if (job.request.format or ("json" if "application/json" in accept else "png")) == "json":
        return web.json_response(output_body(job, output), headers=headers)
    return web.Response(body=output.png, content_type="image/png", headers=headers)


def _error_response(error: FalError) -> web.Response:
    status = _STATUS.get(error.code, 500)
    headers = {"retry-after": "1"} if status == 503 else {}
    if error.code is Code.BUSY or (isinstance(error, NotResident) and error.expected):
        headers[NOT_RUN_HEADER] = Code.BUSY.value
    return web.json_response(error_body(error), status=status, headers=headers)


@web.middleware
async def _errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every failure in the one JSON form; an unexpected one is logged and fails this request only."""
    try:
        return await handler(request)
    except FalError as error:
        return _error_response(error)
    except web.HTTPException as error:
        body = {
            "code": "INVALID",
            "what": f"{request.method} {request.path}: {error.reason}",
            "field": "",
            "remedy": "",
        }
        body["remedy"] = "The worker serves /livez, /readyz, /infer, /cancel/ID and /metrics."
        return web.json_response({"error": body}, status=error.status)
    except ConnectionError:
        raise  # the client went away while we wrote
    except Exception as error:
        log("failure", path=request.path, error=f"{type(error).__name__}: {error}")
        return _error_response(FalError(Code.INTERNAL, "the worker failed", remedy="See the runner's log."))
