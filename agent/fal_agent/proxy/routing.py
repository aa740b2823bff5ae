"""What a request asks of the proxy, the head that the worker gets, and the answers that the proxy gives itself. Pure.

    ANY  /v1/runners/TEAM/RUNNER/REST   to the worker, as /REST
    GET  /v1/probe                      the node's id, so that a gateway knows whom it reached

`fal-*` headers belong to gateway and proxy: workers neither see nor set them, so what a `fal-code` says is the
proxy's word. Codes that say that a request surely did not run are in `fal_contract.datapath.NOT_RUN`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fal_agent.proxy.slots import Refused
from fal_contract.errors import Code
from fal_contract.http1 import (
    HttpError,
    RequestHead,
    ResponseHead,
    encode_head,
    header,
    without_hop_by_hop,
)

_PATH: Final = re.compile(rb"/v1/runners/([a-z0-9-]{1,63})/([a-z0-9-]{1,127})(/[^?#]*)?(\?[^#]*)?")
_TICKET: Final = re.compile(rb"term=([0-9]{1,18});lease=([!-:<-~]{0,127})")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,127}")
# A worker that refuses a request before it began says so by this header, whose value is a code: it may be sent again.
_NOT_RUN_HEADER: Final = b"x-fal-not-run"
_OURS: Final = (b"fal-", b"x-fal-")
_STATUS: Final[Mapping[Code, tuple[int, bytes]]] = {
    Code.INVALID: (400, b"Bad Request"),
    Code.UNAUTHENTICATED: (401, b"Unauthorized"),
    Code.PERMISSION_DENIED: (403, b"Forbidden"),
    Code.NOT_FOUND: (404, b"Not Found"),
    Code.STALE_TERM: (412, b"Precondition Failed"),
    Code.RUNNER_FAILED: (502, b"Bad Gateway"),
    Code.BUSY: (503, b"Service Unavailable"),
    Code.DRAINING: (503, b"Service Unavailable"),
    Code.UNAVAILABLE: (503, b"Service Unavailable"),
    Code.TIMEOUT: (504, b"Gateway Timeout"),
}


@dataclass(frozen=True, slots=True)
class Probe:
    """Who is there?"""


@dataclass(frozen=True, slots=True)
class RunnerRequest:
    """A request for a worker."""

    runner_id: str
    target: bytes  # path and query as the worker gets them
    ticket_term: int
    request_id: bytes  # empty: the caller gave none


def route(head: RequestHead) -> Probe | RunnerRequest:
    """What is asked. Raises HttpError for what the proxy does not know, and for a missing or malformed ticket."""
    if head.target == b"/v1/probe" and head.method == b"GET":
        return Probe()
    match = _PATH.fullmatch(head.target)
    if not match:
        raise HttpError(404, "the proxy serves /v1/runners/TEAM/RUNNER/… and /v1/probe")
    ticket = header(head.headers, b"fal-ticket")
    if ticket is None:
        raise HttpError(401, "the header fal-ticket is missing; requests come through a gateway")
    term = _TICKET.fullmatch(ticket)
    if not term:
        raise HttpError(400, "the header fal-ticket is not term=N;lease=ID")
    request_id = header(head.headers, b"x-fal-request-id") or b""
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        raise HttpError(400, "x-fal-request-id is not 1 to 127 of letters, digits, '.', '_' and '-'")
    runner_id = f"{match[1].decode()}/{match[2].decode()}"
    return RunnerRequest(runner_id, (match[3] or b"/") + (match[4] or b""), int(term[1]), request_id)


def head_for_worker(head: RequestHead, request: RunnerRequest, request_id: bytes) -> bytes:
    """The rewritten head: own path, own headers; the connection may be kept, as HTTP/1.1 does without a word."""
    headers = without_hop_by_hop(head.headers, but=_OURS)
    headers += [
        (b"x-fal-request-id", request_id),
        (b"x-fal-runner", request.runner_id.encode()),
    ]
    if (model := header(head.headers, b"fal-model")) is not None:  # of a runner that apps share; the gateway's word
        headers.append((b"x-fal-model", model))
    return encode_head(head.method + b" " + request.target + b" HTTP/1.1", headers)


def head_for_client(head: ResponseHead, request_id: bytes, *, keep_alive: bool) -> bytes:
    """The worker's answer with the proxy's connection handling. 1xx heads carry no headers of ours."""
    headers = without_hop_by_hop(head.headers, but=_OURS)
    if head.status >= 200:
        headers.append((b"x-fal-request-id", request_id))
        headers.append((b"connection", b"keep-alive" if keep_alive else b"close"))
    return encode_head(b"HTTP/1.1 %d %s" % (head.status, head.reason), headers)


def refused_by_worker(head: ResponseHead) -> bool:
    """The worker had no room, although a slot was free: it still ends a request whose client went away."""
    return head.status in (503, 409) and header(head.headers, _NOT_RUN_HEADER) == Code.BUSY.value.encode()


def probe_answer(node_id: str, *, keep_alive: bool) -> bytes:
    """The answer to a Probe."""
    body = json.dumps({"node": node_id}).encode()
    return _answer(200, b"OK", body, [], keep_alive=keep_alive)


def refusal(refused: Refused, *, keep_alive: bool, extra: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """The answer to a request that was not admitted, or that the worker did not answer."""
    status, reason = _STATUS[refused.code]
    headers = [(b"fal-code", refused.code.value.encode()), *extra]
    if refused.code is Code.BUSY:
        headers.append((b"fal-free", b"%d" % refused.free))
    return _answer(status, reason, _error_body(refused.code.value, refused.what), headers, keep_alive=keep_alive)


def http_error(error: HttpError) -> bytes:
    """The answer to a malformed or unknown request; the connection ends with it."""
    code = {401: Code.UNAUTHENTICATED, 404: Code.NOT_FOUND}.get(error.status, Code.INVALID)
    headers = [(b"fal-code", code.value.encode())]
    return _answer(error.status, b"Refused", _error_body(code.value, error.what), headers, keep_alive=False)


def _error_body(code: str, what: str) -> bytes:
    return json.dumps({"error": {"code": code, "what": what, "remedy": "", "field": ""}}).encode()


def _answer(status: int, reason: bytes, body: bytes, headers: list[tuple[bytes, bytes]], *, keep_alive: bool) -> bytes:
    head = encode_head(
        b"HTTP/1.1 %d %s" % (status, reason),
        [
            *headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"keep-alive" if keep_alive else b"close"),
        ],
    )
    return head + body
