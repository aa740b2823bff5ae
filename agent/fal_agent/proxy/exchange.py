"""One admitted request and the worker's answer, on a connection to the worker that is new or was kept.

A slot is released before the last byte of its answer leaves, so that a client that has seen the end can use the slot
again, and exactly once however the request ends. Until the answer's head has left, every failure becomes an answer
of ours; after it, the connection is cut, so that a broken answer can never look whole.

The worker's connection is kept when the exchange was clean: a whole request taken, a whole answer, nothing else. A kept
one that the worker closed before it could read the request (nothing was written, or what was written came back unread
and had no body) is replaced by a new one; the request surely did not run. Anything else is the runner's failure.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from fal_agent.proxy import routing
from fal_agent.proxy.datapath import DataPath
from fal_agent.proxy.lazy_timer import LazyTimer
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.proxy.slots import Outcome, Refused
from fal_agent.proxy.worker_pool import WRITE_BUFFER_BYTES_MAX, WorkerConnection
from fal_agent.proxy.worker_socket import attach, connect_worker
from fal_contract.errors import Code, FalError
from fal_contract.http1 import BodyKind, BodyScanner, HttpError, ResponseHead, head_end, parse_response_head

_CHECKS_PER_STALL: Final = 4
_COPIED_BYTES_MAX: Final = 16 << 10  # more is written apart from its head


class Client(Protocol):
    """What an exchange needs of the client's connection."""

    @property
    def timer(self) -> LazyTimer:
        """The exchange's while it lasts."""
        ...

    @property
    def heard_s(self) -> float:
        """When bytes last came."""
        ...

    @property
    def owes_body(self) -> bool:
        """The request's body is not here yet."""
        ...

    @property
    def may_keep_alive(self) -> bool:
        """Another request may follow."""
        ...

    def pause_reading(self) -> None:
        """The worker takes no more for now."""
        ...

    def resume_reading(self) -> None:
        """The worker takes more."""
        ...

    def unsent_bytes(self) -> int:
        """What the client has not taken yet."""
        ...

    def write(self, data: bytes | memoryview) -> None:
        """Bytes of the answer; a view is good until this returns."""
        ...

    def exchange_ended(self, *, keep_alive: bool) -> None:
        """The answer is complete."""
        ...

    def exchange_broken(self, answer: bytes | None) -> None:
        """There is no whole answer: send `answer` if nothing was sent before (not None), else cut the connection."""
        ...

    def abort(self) -> None:
        """Cut the connection."""
        ...


class Exchange:
    """One admitted request and the worker's answer to it."""

    __slots__ = (
        "_answer", "_body", "_buffer", "_client", "_deadline_s", "_entry", "_head", "_heard_s", "_keep_alive",
        "_method", "_path", "_released", "_request_id", "_task", "_timer", "_unsent", "_worker",
    )  # fmt: skip

    def __init__(self, path: DataPath, client: Client, entry: RunnerEntry, method: bytes, request_id: bytes) -> None:
        self._path = path
        self._client: Client | None = client
        self._entry = entry
        self._method = method
        self._request_id = request_id
        self._worker: WorkerConnection | None = None
        self._head = b""  # while it may have to be sent again
        self._unsent: list[bytes] = []
        self._buffer = bytearray()
        self._answer: ResponseHead | None = None
        self._body: BodyScanner | None = None
        self._keep_alive = False
        self._released = False
        self._heard_s = 0.0
        self._deadline_s = 0.0
        self._timer: LazyTimer | None = client.timer
        self._task: asyncio.Task[None] | None = None

    # What the client's connection tells.

    def start(self, worker_head: bytes) -> None:
        """Send the head; bytes written before there is a connection wait."""
        self._heard_s = self._path.now_s()
        self._deadline_s = self._heard_s + self._entry.request_timeout_s
        worker = self._path.workers.take(self._entry, self._heard_s)
        if worker is not None:
            self._head = worker_head
            self._worker = worker
            worker.user = self
            worker.write(worker_head)
        else:
            self._unsent.append(worker_head)
            self._begin_connect()
        self._watch()

    def write(self, data: bytes | memoryview) -> None:
        """Bytes of the request's body; a view is good until this returns."""
        self._head = b""  # it had a body: not sent again
        if self._worker is None:
            self._unsent.append(bytes(data))
        else:
            self._worker.write(data)

    def pause_reading(self) -> None:
        """The client takes no more for now."""
        if self._worker is not None:
            self._worker.pause_reading()

    def resume_reading(self) -> None:
        """The client takes more."""
        if self._worker is not None:
            self._worker.resume_reading()

    def client_gone(self) -> None:
        """Cancel: the worker sees its connection close."""
        self._client = None
        self._release(Outcome.CANCELLED)
        self._end()

    # What the worker's connection tells.

    def worker_ready(self, worker: WorkerConnection) -> None:
        """A new connection stands."""
        self._worker = worker
        if self._client is None:  # it went away while we were connecting
            worker.user = None
            worker.abort()
            return
        unsent, self._unsent = self._unsent, []
        worker.write(b"".join(unsent))
        self._client.resume_reading()

    def worker_lost(self, exc: Exception | None) -> None:
        """Its connection ended."""
        worker, self._worker = self._worker, None
        if self._released:
            return
        if exc is None and self._body is not None and self._body.closed():
            self._complete(b"")
            return
        if worker is not None and worker.reused and self._answer is None and not self._buffer:
            self._path.workers.closed_under_request(self._entry)
            if self._head and isinstance(exc, ConnectionError) and self._client is not None:
                self._unsent.append(self._head)
                self._head = b""
                self._begin_connect()
                return
        self._fail(Refused(Code.RUNNER_FAILED, f"runner {self._entry.runner_id} ended without a whole answer"))

    def worker_full(self) -> None:
        """It takes no more for now."""
        if self._client is not None:
            self._client.pause_reading()

    def worker_takes(self) -> None:
        """It takes more."""
        if self._client is not None:
            self._client.resume_reading()

    def answer_received(self, data: memoryview) -> None:
        """Bytes of the answer, good until this returns."""
        if self._client is None or self._released:
            return
        self._heard_s = self._path.now_s()
        try:
            if self._body is not None:
                self._take_body(data)
                return
            begun = bytes(data)
            if self._buffer:
                begun = bytes(self._buffer) + begun
                self._buffer.clear()
            self._take_heads(begun)
        except HttpError as error:
            self._fail(Refused(Code.RUNNER_FAILED, f"runner {self._entry.runner_id}: {error.what}"))

    # The answer.

    def _take_heads(self, data: bytes) -> None:
        """Pass heads on as they become complete: any number of 1xx, then the answer's."""
        while self._client is not None:
            end = head_end(data)
            if end < 0:
                self._buffer += data
                return
            head = parse_response_head(data[:end], method=self._method)
            if head.status == 101:
                raise HttpError(502, "the worker switched protocols")
            if head.status == 503 and routing.refused_by_worker(head):
                busy = Refused(Code.BUSY, f"runner {self._entry.runner_id} has no room yet")
                self._fail(busy, Outcome.NOT_RUN)
                return
            data = data[end:]
            if head.status < 200:
                self._client.write(routing.head_for_client(head, self._request_id, keep_alive=True))
                continue
            ends_itself = head.framing.kind is not BodyKind.UNTIL_CLOSE
            self._keep_alive = self._client.may_keep_alive and ends_itself
            self._answer = head
            self._body = BodyScanner(head.framing)
            out = routing.head_for_client(head, self._request_id, keep_alive=self._keep_alive)
            self._take_body(data, out)
            return

    def _take_body(self, data: bytes | memoryview, before: bytes = b"") -> None:
        assert self._body is not None
        assert self._client is not None
        if self._body.reads_content and not isinstance(data, bytes):
            data = bytes(data)
        used = self._body.feed(data)
        clean = used == len(data)
        if not clean:
            data = data[:used]  # whatever follows the answer is not part of it
        if self._body.done:
            self._complete(before + data if before else data, clean=clean)
        elif before and len(data) > _COPIED_BYTES_MAX:
            self._client.write(before)
            self._client.write(data)
        else:
            self._client.write(before + data if before else data)

    def _complete(self, last: bytes | memoryview, *, clean: bool = False) -> None:
        """The answer's last bytes are here; `clean`: and nothing behind them."""
        assert self._answer is not None
        client, self._client = self._client, None
        self._release(Outcome.SERVED if self._answer.status < 500 else Outcome.FAILED)
        whole = clean and self._answer.keep_alive and client is not None and not client.owes_body
        self._end(keep=whole)
        if client is not None:
            if last:
                client.write(last)
            client.exchange_ended(keep_alive=self._keep_alive)

    def _fail(self, refused: Refused, outcome: Outcome = Outcome.FAILED) -> None:
        client, self._client = self._client, None
        self._release(outcome)
        self._end()
        if client is not None:
            client.exchange_broken(routing.refusal(refused, keep_alive=False) if self._answer is None else None)

    def _release(self, outcome: Outcome) -> None:
        if not self._released:
            self._released = True
            self._path.release(self._entry.runner_id, outcome, self._deadline_s - self._entry.request_timeout_s)

    def _end(self, *, keep: bool = False) -> None:
        if self._timer is not None:
            self._timer.clear()
            self._timer = None
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.user = None
            if keep and worker.clean:
                self._path.keep(worker)
            else:
                worker.abort()
        elif self._task is not None:
            self._task.cancel()

    def _begin_connect(self) -> None:
        assert self._client is not None
        self._client.pause_reading()
        self._task = asyncio.get_running_loop().create_task(self._connect(), name="worker-connect")

    async def _connect(self) -> None:
        try:
            sock = await connect_worker(self._entry, self._path.bounds.connect_timeout_s)
            worker = WorkerConnection(self._entry, sock, self, self._path.workers, self._path.now_s())
            await attach(sock, worker)
        except FalError as error:
            self._fail(Refused(Code.UNAVAILABLE, error.what))
        except OSError as exc:
            self._fail(Refused(Code.UNAVAILABLE, f"runner {self._entry.runner_id} cannot be reached: {exc.strerror}"))

    # Time.

    def _watch(self) -> None:
        """One timer for the request's deadline and for a client that neither sends nor takes what it owes."""
        if self._released or self._client is None or self._timer is None:
            return
        now_s, stall_s = self._path.now_s(), self._path.bounds.stall_timeout_s
        if now_s >= self._deadline_s:
            what = f"runner {self._entry.runner_id} took longer than {self._entry.request_timeout_s:g} s"
            self._fail(Refused(Code.TIMEOUT, what))
            return
        stalled_s = now_s - max(self._heard_s, self._client.heard_s)
        if stalled_s >= stall_s and self._client.owes_body and self._answer is None:
            self._fail(Refused(Code.TIMEOUT, f"the client sent nothing for {stall_s:g} s"))
            return
        if stalled_s >= stall_s and self._client.unsent_bytes() > WRITE_BUFFER_BYTES_MAX:
            self._client.abort()
            return
        self._timer.set(min(self._deadline_s, now_s + stall_s / _CHECKS_PER_STALL), self._watch)
