"""A gateway's connection: reads heads, admits or refuses, and hands what is admitted to an `Exchange`.

After the two heads, bytes are passed as they come, both ways at once, and a reader waits when the other side's
writer is full. A client that goes away takes its worker connection with it: the worker sees the close and stops
within a step. Requests come one after the other; pipelining is refused, because it would have to be buffered.

Tunnels are the same connection, made in the other direction. Nothing here awaits.
"""

from __future__ import annotations

import asyncio
import os
from enum import Enum
from functools import partial
from typing import Final, cast

from fal_agent.proxy import pumping, routing
from fal_agent.proxy.datapath import DataPath
from fal_agent.proxy.exchange import Exchange
from fal_agent.proxy.lazy_timer import LazyTimer
from fal_agent.proxy.slots import Refused
from fal_agent.proxy.worker_pool import WRITE_BUFFER_BYTES_MAX
from fal_contract.errors import Code, FalError
from fal_contract.http1 import (
    BodyKind,
    BodyScanner,
    Framing,
    HttpError,
    RequestHead,
    head_end,
    parse_request_head,
)
from fal_contract.identity import PeerIdentity

_RECONNECT: Final = ((b"fal-retry", b"reconnect"),)
_ENDLESS: Final = Framing(BodyKind.UNTIL_CLOSE)


class _State(Enum):
    HEAD = "waits for a request"
    EXCHANGE = "a request is under way"
    DISCARD = "reads what is left of a refused request"
    CLOSED = "over"


class ClientConnection(asyncio.BufferedProtocol):
    """One connection from a gateway; requests come one after the other."""

    def __init__(self, path: DataPath) -> None:
        self._path = path
        self.peer: PeerIdentity | None = None  # once it has shown its certificate
        self._transport: asyncio.Transport | None = None
        self._send: pumping.Send | None = None  # None: TLS, which only the transport can write
        self._state = _State.HEAD
        self._buffer = bytearray()
        self._exchange: Exchange | None = None
        self._body: BodyScanner | None = None
        self._discarded_bytes = 0
        self._close_after_discard = False
        self._keep_alive = True
        self.timer = LazyTimer()  # of whoever has the connection now: this, or its exchange
        self._heard_s = 0.0

    # What the data path and tunnels know of it.

    @property
    def idle(self) -> bool:
        """No request is under way, nor begun."""
        return self._state is _State.HEAD and not self._buffer

    def abort(self) -> None:
        """End it now; a request under way is cancelled."""
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        """End it, unless a request is under way."""
        if self.idle:
            self._close()

    def check_peer(self, transport: asyncio.Transport) -> None:
        """Raise FalError when the peer may not send requests; the listener's subclass asks for a certificate."""

    def idle_timeout_s(self) -> float | None:
        """How long it may wait for a request; None: another keeps watch."""
        return self._path.bounds.idle_timeout_s

    def wait_for_request(self) -> None:
        """It became idle: close it when no request comes in time."""
        self._arm(self.idle_timeout_s())

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        sock = transport.get_extra_info("socket")
        if sock is not None and transport.get_extra_info("ssl_object") is None:
            self._send = partial(os.write, sock.fileno())
        self._heard_s = self._path.now_s()
        if len(self._path.connections) >= self._path.bounds.connections_max:
            full = Refused(Code.BUSY, f"the proxy has {self._path.bounds.connections_max} connections")
            transport.write(routing.refusal(full, keep_alive=False))
            self._close()
            return
        try:
            self.check_peer(transport)
        except FalError as error:
            transport.write(routing.refusal(Refused(error.code, str(error)), keep_alive=False))
            self._path.joined(self)
            self._close_after_reading()
            return
        self._path.joined(self)
        self.wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _State.CLOSED
        self._path.left(self)
        if self._exchange is not None:
            self._exchange.client_gone()
            self._exchange = None
        self.timer.stop()

    def get_buffer(self, sizehint: int) -> memoryview:
        return pumping.VIEW

    def buffer_updated(self, nbytes: int) -> None:
        if self._state is _State.EXCHANGE:
            self._heard_s = self._path.now_s()
            self._take_body(pumping.VIEW[:nbytes])
        else:
            self.received(bytes(pumping.VIEW[:nbytes]))

    def received(self, data: bytes) -> None:
        """Bytes came."""
        self._heard_s = self._path.now_s()
        match self._state:
            case _State.HEAD:
                if self._buffer:
                    data = bytes(self._buffer) + data
                    self._buffer.clear()
                self._next_request(data)
            case _State.EXCHANGE:
                self._take_body(data)
            case _State.DISCARD:
                self._discard(data)
            case _State.CLOSED:
                pass

    def pause_writing(self) -> None:
        if self._exchange is not None:
            self._exchange.pause_reading()

    def resume_writing(self) -> None:
        if self._exchange is not None:
            self._exchange.resume_reading()

    # What the exchange tells.

    @property
    def heard_s(self) -> float:
        """When bytes last came."""
        return self._heard_s

    @property
    def owes_body(self) -> bool:
        """The request's body is not here yet."""
        return self._body is not None and not self._body.done

    @property
    def may_keep_alive(self) -> bool:
        """Another request may follow."""
        return self._keep_alive and not self._path.handed_over

    def pause_reading(self) -> None:
        """The worker takes no more for now."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """The worker takes more."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def unsent_bytes(self) -> int:
        """What the client has not taken yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def write(self, data: bytes | memoryview) -> None:
        """Bytes of the answer; a view is good until this returns."""
        self._path.tally.bytes_out += len(data)
        if self._send is not None and self._transport is not None:
            pumping.write(self._transport, self._send, data)
        elif self._transport is not None:
            # Sealed before this returns: TLS 1.3, the least that we speak, never waits for the peer to write.
            self._transport.write(data)

    def exchange_ended(self, *, keep_alive: bool) -> None:
        """The answer is complete."""
        self._exchange = None
        self.resume_reading()
        self._finish_request(close=not keep_alive)

    def exchange_broken(self, answer: bytes | None) -> None:
        """There is no (whole) answer: send `answer` if nothing was sent before, else cut the connection."""
        self._exchange = None
        if answer is None:
            self.abort()
            return
        self.write(answer)
        self.resume_reading()
        self._finish_request(close=True)

    # Requests.

    def _next_request(self, data: bytes) -> None:
        """Start what `data` holds, if it holds a whole head; else keep it."""
        while data.startswith(b"\r\n"):  # empty lines between requests keep NATs awake
            data = data[2:]
        try:
            end = head_end(data)
            if end < 0:
                self._buffer += data
                if len(data) >= 2:
                    self._arm(self._path.bounds.head_timeout_s)
                return
            head = parse_request_head(data[:end])
            asked = routing.route(head)
        except HttpError as error:
            self.write(routing.http_error(error))
            self._close_after_reading()
            return
        rest = data[end:]
        self._arm(None)
        self._body = BodyScanner(head.framing)
        self._keep_alive = head.keep_alive
        if isinstance(asked, routing.Probe):
            self.write(routing.probe_answer(self._path.node_id, keep_alive=self.may_keep_alive))
            self._refuse_rest(rest)
        else:
            self._begin(head, asked, rest)

    def _begin(self, head: RequestHead, request: routing.RunnerRequest, rest: bytes) -> None:
        if self._path.handed_over:
            moved = Refused(Code.DRAINING, "this proxy has a successor; connect again")
            self.write(routing.refusal(moved, keep_alive=False, extra=_RECONNECT))
            self._refuse_rest(rest)
            return
        admitted = self._path.admit(request.runner_id, request.ticket_term)
        if isinstance(admitted, Refused):
            self.write(routing.refusal(admitted, keep_alive=self.may_keep_alive))
            self._refuse_rest(rest)
            return
        self._state = _State.EXCHANGE
        request_id = request.request_id or self._path.new_request_id()
        worker_head = routing.head_for_worker(head, request, request_id)
        self._exchange = Exchange(self._path, self, admitted, head.method, request_id)
        self._exchange.start(worker_head)
        if rest:
            self._take_body(rest)

    def _take_body(self, data: bytes | memoryview) -> None:
        assert self._body is not None
        if self._body.reads_content and not isinstance(data, bytes):
            data = bytes(data)
        assert self._exchange is not None
        try:
            used = self._body.feed(data)
        except HttpError:
            self.abort()  # the worker has a part of the body; there is no answer to give
            return
        if used < len(data):
            # A second request before the first was answered: nobody here needs it, and it would have to be kept.
            self.abort()
            return
        self._path.tally.bytes_in += used
        self._exchange.write(data)

    def _refuse_rest(self, rest: bytes) -> None:
        """The answer was sent without the body; read the body before the next request."""
        self._finish_request(close=not self.may_keep_alive)
        if self._state is _State.DISCARD:
            self._discard(rest)
        elif rest:
            self._close()  # a second request before the first was answered

    def _finish_request(self, *, close: bool) -> None:
        assert self._body is not None
        if not self._body.done:
            # Closing with unread bytes would reset the connection and take the answer with it.
            self._state = _State.DISCARD
            self._close_after_discard = close
            self._discarded_bytes = 0
            self._arm(self._path.bounds.discard_timeout_s)
        elif close:
            self._close()
        else:
            self._state = _State.HEAD
            self.wait_for_request()

    def _close_after_reading(self) -> None:
        """After an answer to what is no request: the client may still be sending, and must see the answer."""
        self._body = BodyScanner(_ENDLESS)
        self._finish_request(close=True)

    def _discard(self, data: bytes) -> None:
        assert self._body is not None
        self._discarded_bytes += len(data)
        try:
            used = self._body.feed(data)
        except HttpError:
            self._close()
            return
        if used < len(data) or self._discarded_bytes > self._path.bounds.discard_bytes_max:
            self._close()
        elif self._body.done:
            self._finish_request(close=self._close_after_discard)

    # Ends.

    def _close(self) -> None:
        self._state = _State.CLOSED
        self._arm(None)
        if self._transport is not None:
            self._transport.close()

    def _arm(self, delay_s: float | None) -> None:
        if delay_s is None:
            self.timer.clear()
        else:
            self.timer.set(self._path.now_s() + delay_s, self._expired)

    def _expired(self) -> None:
        if self._state is _State.HEAD and self._buffer:
            self.write(routing.http_error(HttpError(408, "the head took too long")))
        self._close()
