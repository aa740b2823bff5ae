"""The client of the scheduler's Dispatch stream: slots for requests, and the way to the runners that have them.

    client = DispatchClient(dial=…, gateway_id=…, paths=NodePaths(…), rng=…)
    await client.start()
    response = await client.request("default/digits", "POST", "/infer", headers, body, wait_s=60)

Used by `falctl run` and by gateways. Requests never pass through the scheduler: it leases slots, the node's proxy
admits. A request is tried again only when it surely did not run (no connection, or a refusal of the proxy); one that
may have run is reported failed. While no leader answers, what is held stays in use and any runner of the last route
table is tried. The stream's transport is a parameter, so that tests and simulations need no gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

from fal_contract import dispatch_wire
from fal_contract.datapath import NOT_RUN, Address
from fal_contract.dispatch_table import DispatchTable, RouteEntry, Slot
from fal_contract.errors import Code, FalError
from fal_contract.http_client import Body, HttpResponse, NotSent
from fal_contract.leader_search import pause_max_s, seeker_of
from fal_contract.limits import BUSY_RETRY_MAX, RPC_TIMEOUT_S, WANT_WINDOW_S
from fal_contract.node_paths import NodePath, NodePaths
from fal_contract.v1 import serving_pb2

WAITING_MAX: Final = 10_000
_REFUSAL_BYTES_MAX: Final = 64 << 10
_WANT_SLOTS_MAX: Final = 256
_TICK_S: Final = 0.5
_SURRENDER_S: Final = 1.0
_BUSY_PAUSE_S: Final = 0.01
_BUSY_PAUSE_MAX_S: Final = 0.25
_FINAL_REFUSALS: Final = frozenset({Code.NOT_FOUND, Code.INVALID, Code.PERMISSION_DENIED})


class DispatchLink(Protocol):
    """One Dispatch stream. Errors are FalErrors; the end of the stream too."""

    async def send(self, message: serving_pb2.GatewayMessage) -> None: ...
    async def receive(self) -> serving_pb2.DispatchMessage: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """For metrics and tests."""

    connected: bool
    routes: int
    leases: int
    waiting: int
    retries: int  # of requests that did not run


@dataclass(slots=True, eq=False)
class _Waiter:
    app: str
    model: str
    lora: str
    since_s: float
    wake: asyncio.Event


class DispatchClient:
    """One serving process's view of the cluster."""

    def __init__(
        self,
        *,
        dial: Callable[[], Awaitable[DispatchLink]],
        gateway_id: str,
        paths: Callable[[Callable[[], None]], NodePaths],
        rng: Random,
        tunnel_endpoints: Sequence[Address] = (),
        apps: Sequence[str] = (),
        software: str = "",
    ) -> None:
        """`paths` makes the NodePaths, given the callback for changes."""
        self._dial = dial
        self._seeker = seeker_of(dial)
        self._gateway_id = gateway_id
        self._rng = rng
        self._tunnel_endpoints = tuple(tunnel_endpoints)
        self._apps = tuple(apps)
        self._software = software
        self._table = DispatchTable()
        self._paths = paths(self._paths_changed)
        self._waiting: dict[str, deque[_Waiter]] = {}
        self._told: tuple[NodePath, ...] = ()
        self._connected = False
        self._closing = False
        self._wants_told = False
        self._to_send = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._retries = 0
        self._last_error: Exception | None = None

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        self._tasks = [
            asyncio.create_task(self._stay_connected(), name="dispatch-stream"),
            asyncio.create_task(self._tick(), name="dispatch-tick"),
        ]

    async def close(self) -> None:
        """Give the leases back, end the stream and all connections."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._paths.close()

    def statistics(self) -> ClientStatistics:
        """What it holds now."""
        waiting = sum(len(queue) for queue in self._waiting.values())
        return ClientStatistics(
            self._connected, len(self._table.routes), len(self._table.held()), waiting, self._retries
        )

    @property
    def last_error(self) -> Exception | None:
        """Why the stream, or the last attempt of a request, failed; for an operator who waits."""
        return self._last_error

    def routes(self) -> tuple[RouteEntry, ...]:
        """The last route table."""
        return self._table.routes

    async def request(
        self,
        app: str,
        method: str,
        path: str,
        headers: Iterable[tuple[str, str]] = (),
        body: Body = b"",
        *,
        wait_s: float,
        model: str = "",
        lora: str = "",
        chosen: bool = False,
    ) -> HttpResponse:
        """Send one request to a runner of `app` (team/name); `path` is the worker's, or `chosen` by a stranger: then
        NOT_FOUND where our worker would get it.

        Waits up to `wait_s` for a slot, then for the head of the answer as long as the node allows. The caller reads
        or closes the response; closing early cancels the request. Raises FalError: NOT_FOUND (no such app), what the
        scheduler says when it has no runner, UNAVAILABLE, TIMEOUT, BUSY; RUNNER_FAILED when it may have run.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + wait_s
        headers = list(headers)
        failures = 0
        while True:
            slot = await self._slot(app, model, lora, deadline_s, wait_s)
            if chosen and (refused := self._table.path_refusal(slot)):
                self._give_back(slot, served=None)
                raise refused
            try:
                response = await self._send(slot, method, path, headers, body)
            except NotSent as error:
                failures += 1
                self._not_run(slot, error, failures)
                if failures > BUSY_RETRY_MAX:
                    raise
                continue
            if response.header(b"fal-code") is None:
                return response
            failures += 1
            refused = await self._refused(slot, response, failures)
            again = refused.code in NOT_RUN and isinstance(body, bytes)
            if not again or (refused.code is not Code.BUSY and failures > BUSY_RETRY_MAX):
                raise refused

    # One attempt.

    async def _send(
        self, slot: Slot, method: str, path: str, headers: list[tuple[str, str]], body: Body
    ) -> HttpResponse:
        """Raises NotSent when it did not run. The slot goes back when the response ends."""
        try:
            response = await self._attempt(slot, method, path, headers, body, fresh=False)
            if response.header(b"fal-retry") == b"reconnect":
                # The proxy behind that connection has a successor; the same slot is good there.
                response.close()
                response = await self._attempt(slot, method, path, headers, body, fresh=True)
        except NotSent:
            self._give_back(slot, served=None)
            raise
        except FalError:
            self._give_back(slot, served=False)
            raise
        except BaseException:  # cancelled
            self._give_back(slot, served=None)
            raise
        if response.header(b"fal-code") is None:
            response.runner_id = slot.runner_id
            status = response.status
            response.on_end(lambda whole: self._give_back(slot, served=whole and status < 500))
        return response

    async def _attempt(
        self, slot: Slot, method: str, path: str, headers: list[tuple[str, str]], body: Body, *, fresh: bool
    ) -> HttpResponse:
        connection = await self._paths.connection(slot.node_id, fresh=fresh)
        ours = [("host", slot.runner_id.replace("/", ".")), ("fal-ticket", f"term={slot.term};lease={slot.lease_id}")]
        ours += self._table.headers_for(slot)
        return await connection.request(method, f"/v1/runners/{slot.runner_id}{path}", [*ours, *headers], body)

    async def _refused(self, slot: Slot, response: HttpResponse, failures: int) -> FalError:
        """The proxy answered for itself: remember what that says about the runner, and give the slot back."""
        raw, body = response.header(b"fal-code") or b"", b""
        try:
            with contextlib.suppress(FalError):
                body = await response.read(_REFUSAL_BYTES_MAX)
        finally:
            self._give_back(slot, served=None)
        error = dispatch_wire.proxy_refusal(slot, response.status, raw, body)
        if error.code in (Code.STALE_TERM, Code.NOT_FOUND, Code.DRAINING):
            self._table.drop_lease(slot.lease_id)
        if error.code in NOT_RUN:
            self._suspend(slot, failures)
        return error

    def _not_run(self, slot: Slot, error: FalError, failures: int) -> None:
        self._last_error = error
        self._suspend(slot, failures)

    def _suspend(self, slot: Slot, failures: int) -> None:
        """Others first; this runner again after a pause with jitter."""
        self._retries += 1
        pause_s = min(_BUSY_PAUSE_MAX_S, _BUSY_PAUSE_S * 2 ** min(failures, 10))
        now_s = asyncio.get_running_loop().time()
        self._table.suspend(slot.runner_id, now_s + self._rng.uniform(pause_s / 2, pause_s))

    def _give_back(self, slot: Slot, *, served: bool | None) -> None:
        self._table.give_back(slot, asyncio.get_running_loop().time(), served=served)
        self._wake(slot.app, 1)

    # Waiting for a slot.

    async def _slot(self, app: str, model: str, lora: str, deadline_s: float, wait_s: float) -> Slot:
        """A slot in hand, or the next one that comes. First come, first served."""
        loop = asyncio.get_running_loop()
        queue = self._waiting.setdefault(app, deque())
        if not queue:
            slot = self._take(app)
            if slot is not None:
                return slot
            self._table.clear_refusal(app)
        if sum(len(each) for each in self._waiting.values()) >= WAITING_MAX:
            raise FalError(Code.BUSY, f"{WAITING_MAX} requests are waiting here", remedy="Try again later.")
        waiter = _Waiter(app, model, lora, loop.time(), asyncio.Event())
        queue.append(waiter)
        self._to_send.set()
        try:
            while True:
                if queue[0] is waiter:
                    slot = self._take(app)
                    if slot is not None:
                        return slot
                refusal = self._table.refusal(app)
                if refusal is not None and refusal.code in _FINAL_REFUSALS:
                    raise refusal
                if loop.time() >= deadline_s:
                    raise self._why_nothing(app, wait_s)
                waiter.wake.clear()
                await self._wait(waiter, deadline_s)
        finally:
            queue.remove(waiter)
            self._to_send.set()
            if queue:
                queue[0].wake.set()
            elif self._waiting.get(app) is queue:
                del self._waiting[app]

    async def _wait(self, waiter: _Waiter, deadline_s: float) -> None:
        """Until something changed, a suspended runner may be tried again, or the deadline."""
        now_s = asyncio.get_running_loop().time()
        retry_s = self._table.retry_at_s(waiter.app, now_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(deadline_s, retry_s or deadline_s)):
                await waiter.wake.wait()

    def _take(self, app: str) -> Slot | None:
        now_s = asyncio.get_running_loop().time()
        return self._table.take(app, now_s, leaderless=not self._connected, reachable=self._paths.reachable)

    def _why_nothing(self, app: str, waited_s: float) -> FalError:
        nodes = {route.node_id for route in self._table.routes if app in route.apps and route.open}
        reasons = [reason for node_id in sorted(nodes) if (reason := self._paths.reason(node_id))]
        return self._table.why_nothing(
            app, waited_s, leaderless=not self._connected, unreachable="; ".join(reasons[:3])
        )

    def _wake(self, app: str, count: int) -> None:
        for waiter, _ in zip(self._waiting.get(app, ()), range(count), strict=False):
            waiter.wake.set()

    def _wake_all(self) -> None:
        for app, queue in self._waiting.items():
            self._wake(app, len(queue))

    # The stream.

    async def _stay_connected(self) -> None:
        attempt = 0
        while True:
            broke: Exception | None = None
            try:
                link = await self._dial()
                try:
                    await self._talk(link)
                finally:
                    await link.close()
            except (FalError, OSError) as error:
                self._last_error = broke = error
            attempt = 0 if self._connected else attempt
            cap_s = pause_max_s(self._seeker, broke, attempt)
            self._connected = False
            self._told = ()
            self._table.stream_broke()
            self._wake_all()  # what is held may now be used freely
            attempt += 1
            await asyncio.sleep(self._rng.uniform(0, cap_s))

    async def _talk(self, link: DispatchLink) -> None:
        """One stream, until it breaks (FalError)."""
        await link.send(
            dispatch_wire.hello(
                self._gateway_id, self._software, self._tunnel_endpoints, self._table.held(), self._apps
            )
        )
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                welcome = await link.receive()
        except TimeoutError:
            raise FalError(Code.TIMEOUT, "the scheduler sent no welcome", remedy="Try another one.") from None
        if welcome.WhichOneof("kind") != "welcome" or welcome.welcome.version != dispatch_wire.WIRE_VERSION:
            raise FalError(Code.VERSION_MISMATCH, "the scheduler's welcome is not understood", remedy="Upgrade.")
        self._connected = True
        self._seeker.connected()
        self._wants_told = False
        self._to_send.set()
        sending = asyncio.create_task(self._send_changes(link), name="dispatch-send")
        receiving = asyncio.create_task(self._receive(link), name="dispatch-receive")
        try:
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            receiving.cancel()
            results = await asyncio.gather(sending, receiving, return_exceptions=True)
            if self._closing:
                await self._surrender(link)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _surrender(self, link: DispatchLink) -> None:
        """Best effort: what does not arrive is given back by expiry.

        Wants end first: a slot given back while one is still wanted here would come back to a stream that ends.
        """
        messages = [serving_pb2.GatewayMessage(wants=serving_pb2.Wants())] if self._wants_told else []
        if updates := self._table.surrender():
            messages.append(dispatch_wire.updates(updates))
        with contextlib.suppress(FalError, TimeoutError):
            async with asyncio.timeout(_SURRENDER_S):
                for message in messages:
                    await link.send(message)

    async def _receive(self, link: DispatchLink) -> None:
        while True:
            self._apply(await link.receive())

    def _apply(self, message: serving_pb2.DispatchMessage) -> None:
        match message.WhichOneof("kind"):
            case "leases":
                now_s = asyncio.get_running_loop().time()
                entries = dispatch_wire.leases(message.leases)
                for app in self._table.put_leases(entries, message.leases.revoked, now_s):
                    self._wake(app, sum(entry.slots for entry in entries if entry.app == app))
            case "routes":
                told = message.routes
                entries_ = dispatch_wire.routes(told)
                self._table.put_routes(entries_, told.removed, complete=told.complete, term=told.term)
                self._paths.know({route.node_id: route.addresses for route in self._table.routes})
                self._wake_all()
            case "refusals":
                for refusal in message.refusals.refusals:
                    self._table.put_refusal(refusal.app, dispatch_wire.refusal(refusal))
                    self._wake(refusal.app, WAITING_MAX)

    async def _send_changes(self, link: DispatchLink) -> None:
        """At most one message of a kind per window; the first goes at once."""
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            wants = self._wants()
            if wants or self._wants_told:
                self._wants_told = True
                await link.send(serving_pb2.GatewayMessage(wants=serving_pb2.Wants(wants=wants)))
                self._wants_told = bool(wants)
            paths = tuple(self._paths.paths())
            if paths != self._told:
                changed = [path for path in paths if path not in self._told]
                self._told = paths
                if changed:
                    await link.send(dispatch_wire.reached(changed))
            updates = self._table.updates(asyncio.get_running_loop().time())
            if updates:
                await link.send(dispatch_wire.updates(updates))
            await asyncio.sleep(WANT_WINDOW_S)

    def _wants(self) -> list[serving_pb2.Want]:
        """The whole demand, by app and model."""
        now_s = asyncio.get_running_loop().time()
        groups: dict[tuple[str, str, str], list[_Waiter]] = {}
        for queue in self._waiting.values():
            for waiter in queue:
                groups.setdefault((waiter.app, waiter.model, waiter.lora), []).append(waiter)
        return [
            serving_pb2.Want(
                app=app,
                model=model,
                lora=lora,
                slots=min(len(waiters), _WANT_SLOTS_MAX),
                queued=len(waiters),
                oldest_age_s=now_s - min(waiter.since_s for waiter in waiters),
            )
            for (app, model, lora), waiters in sorted(groups.items())
        ]

    def _paths_changed(self) -> None:
        self._to_send.set()
        self._wake_all()

    async def _tick(self) -> None:
        """Prolong and return leases, close idle connections."""
        while True:
            await asyncio.sleep(_TICK_S)
            self._paths.sweep()
            if self._connected and self._table.held():
                self._to_send.set()
