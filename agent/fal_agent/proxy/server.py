"""One proxy process: data path, listener, tunnels, control socket and state file put together.

Lives through three phases: *serving*; *handed over* (a successor accepts, this one finishes what it has); *stopping*
(asked to end: finishes what it has). It ends by itself when the last connection is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from random import Random
from typing import Any, Final

from fal_agent.proxy import state_file
from fal_agent.proxy.control_server import ControlServer
from fal_agent.proxy.datapath import Bounds, DataPath
from fal_agent.proxy.handover import Handed, Predecessor, Successor, handed_to_wire, send_listener, take_over
from fal_agent.proxy.listener import Credentials, Listener, bind, stamp_of
from fal_agent.proxy.messages import (
    CONTROL_VERSION,
    GatewayEntry,
    ProxyInfo,
    ProxyStats,
    RunnerEntry,
    encode,
    read_frame,
    take,
)
from fal_agent.proxy.options import ProxyOptions
from fal_agent.proxy.slots import SlotTable
from fal_agent.proxy.tunnels import Tunnels
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.ids import random_suffix
from fal_contract.limits import DATA_CONNECT_TIMEOUT_S
from fal_contract.revocation import RevokedPeer
from fal_contract.telemetry import get_logger

_IDENTITY_CHECK_S: Final = 60.0
_SERVING_TIMEOUT_S: Final = 10.0
_log = get_logger("proxy")


def software_version() -> str:
    """Of this distribution."""
    try:
        return version("falctl")
    except PackageNotFoundError:
        return "0"


class ProxyServer:
    """The whole process but its signals. `start`, then `wait_ended`, then `close`."""

    def __init__(self, options: ProxyOptions, *, clock: Clock, rng: Random, bounds: Bounds | None = None) -> None:
        self._options = options
        self._clock = clock
        self._rng = rng
        self._credentials = Credentials.load(options.identity) if options.identity and not options.insecure else None
        self._node_id = self._credentials.identity.peer.name if self._credentials else options.node_id
        self._slots = SlotTable()
        self._path = DataPath(
            node_id=self._node_id,
            slots=self._slots,
            rng=rng,
            bounds=bounds or Bounds(idle_timeout_s=options.idle_timeout_s),
            on_change=self._changed,
        )
        self._tunnels = Tunnels(
            self._path, credentials=lambda: self._credentials, clock=clock, rng=rng, on_change=self._changed
        )
        self._control = ControlServer(options.control_path, self, on_successor=self._hand_over)
        self._listener: Listener | None = None
        self._instance = random_suffix(rng, 12)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = asyncio.Event()
        self._ended = asyncio.Event()

    # Life.

    async def start(self, *, takeover: bool) -> None:
        """Serve. FalError when the port is taken, or when there is nobody to take over from."""
        if takeover:
            await self._take_over()
        else:
            await self._start_fresh()
        if self._credentials is not None:
            self._spawn(self._watch_identity())
        self._spawn(self._watch_end())
        _log.info("serving", listen=self.info().listen, runners=len(self._slots.entries()), takeover=takeover)

    async def wait_ended(self) -> None:
        """Until it was stopped or replaced, and its last request is done."""
        await self._ended.wait()

    async def close(self) -> None:
        """Let go of everything at once."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._tunnels.close()
        await self._control.close(successor=True)
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._path.connections):
            connection.abort()
        self._path.workers.close()

    async def _start_fresh(self) -> None:
        state = state_file.load(self._options.state_file)
        self._slots.set_terms(*state.terms)
        self._path.set_revoked(state.revoked)
        for entry in state.runners:
            self._slots.put(entry)
        self._listener = Listener(self._bind(state.port), self._path, self._clock)
        await self._control.start()
        await self._listener.accept(self._credentials)
        self._tunnels.set_gateways(state.gateways)
        self._save()

    def _bind(self, port_before: int) -> Any:
        host, port = self._options.host, self._options.port
        if port == 0 and port_before:
            # Gateways know this port; another one would be told by the agent only, and it may be away.
            with contextlib.suppress(FalError):
                return bind(host, port_before)
        return bind(host, port)

    async def _take_over(self) -> None:
        predecessor = await take_over(self._options.control_path, self._options.state_dir)
        handed = predecessor.handed
        self._instance = handed.instance
        self._path.set_revoked(handed.revoked)
        self._slots.set_terms(*handed.terms)
        for runner in handed.runners:
            self._slots.take_over(runner, self._path.now_s())
        self._listener = Listener(predecessor.listening, self._path, self._clock)
        try:
            await self._control.start()
            await self._listener.accept(self._credentials)
            await predecessor.confirm()
        except (OSError, FalError):
            predecessor.close()
            raise
        self._tunnels.set_gateways(handed.gateways)
        self._save()
        self._spawn(self._follow(predecessor))

    async def _follow(self, predecessor: Predecessor) -> None:
        """Count what ends over there, until it is gone."""
        try:
            while (finished := await predecessor.next_finished()) is not None:
                self._slots.release_inherited(*finished, self._path.now_s())
                self._changed()
        finally:
            predecessor.disconnect()
        self._slots.drop_inherited(self._path.now_s())
        self._changed()

    async def _hand_over(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request_id: int, message: Mapping[str, Any]
    ) -> None:
        """Serve a successor's `takeover`, then finish what is here."""
        if self._path.handed_over or self._ending.is_set() or self._listener is None:
            raise FalError(Code.FAILED_PRECONDITION, "the proxy is ending", remedy="Start without --takeover.")
        successor = Successor(writer)
        self._path.handed_over = True
        self._listener.pause()
        try:
            await send_listener(take(message, "fds", str), self._listener.socket)
            handed = Handed(
                self._instance,
                tuple(self._slots.hand_over(self._path.now_s())),
                self._slots.terms,
                self._tunnels.gateways,
                self._path.revoked.peers,
            )
            # From the snapshot to this write nothing awaits: each later end is told after it.
            writer.write(encode({"t": "ok", "id": request_id, **handed_to_wire(handed)}))
            self._path.on_finished = successor.finished
            async with asyncio.timeout(_SERVING_TIMEOUT_S):
                while (await read_frame(reader))["t"] != "serving":
                    pass
        except (OSError, asyncio.IncompleteReadError, TimeoutError, FalError) as exc:
            _log.warning("the successor did not begin to serve; going on", why=str(exc))
            self._path.handed_over = False
            self._path.on_finished = None
            await self._control.start()  # the successor may have taken the socket's name
            await self._listener.resume()
            raise
        _log.info("handed over", in_flight=self._slots.in_flight_total())
        self._listener.close()
        self._tunnels.retire()
        self._path.workers.close()
        self._spawn(self._control.close(successor=False))
        # Connections that were in their TLS handshake when we stopped accepting are in the data path by then.
        await asyncio.sleep(DATA_CONNECT_TIMEOUT_S)
        self._ending.set()
        await self._ended.wait()

    # What the control socket asks.

    def info(self) -> ProxyInfo:
        """For hello."""
        listen = (self._listener.address,) if self._listener and not self._path.handed_over else ()
        return ProxyInfo(CONTROL_VERSION, software_version(), os.getpid(), self._instance, self._node_id, listen)

    def stats(self) -> ProxyStats:
        """The counters now."""
        return ProxyStats(
            self._instance,
            len(self._path.connections),
            self._slots.stats(self._path.now_s()),
            self._tunnels.connected(),
            self._path.tally,
        )

    def runners(self) -> tuple[RunnerEntry, ...]:
        """What is served."""
        return self._slots.entries()

    def put_runner(self, entry: RunnerEntry) -> None:
        """Add or change a runner."""
        self._slots.put(entry)
        self._table_changed()

    def drain_runner(self, runner_id: str) -> bool:
        """Take nothing new; False when it is unknown."""
        known = self._slots.drain(runner_id)
        self._table_changed()
        return known

    def remove_runner(self, runner_id: str) -> bool:
        """Forget it; False when it is unknown."""
        known = self._slots.remove(runner_id)
        self._path.workers.drop(runner_id)
        self._table_changed()
        return known

    def set_term(self, term: int) -> None:
        """A leader's term was told."""
        if self._slots.set_term(term):
            self._save()

    def set_gateways(self, gateways: list[GatewayEntry]) -> None:
        """All gateways that want tunnels."""
        self._tunnels.set_gateways(gateways)
        self._save()

    def set_revoked(self, peers: list[RevokedPeer]) -> None:
        """All revocations of callers."""
        self._path.set_revoked(peers)
        self._save()

    async def reload_identity(self) -> None:
        """Use the renewed certificate for new connections."""
        if self._options.identity is None or self._credentials is None:
            return
        renewed = Credentials.load(self._options.identity)
        if renewed.identity.peer.name != self._node_id:
            raise FalError(
                Code.CONFLICT,
                f"the identity file is now of {renewed.identity.peer.subject}, this proxy is {self._node_id}",
                remedy="Restart the proxy.",
            )
        self._credentials = renewed
        if self._listener is not None and not self._path.handed_over:
            await self._listener.accept(renewed)

    def stop(self) -> None:
        """Take nothing new, finish what is here, end."""
        self._path.handed_over = True
        if self._listener is not None:
            self._listener.close()
        self._tunnels.retire()
        self._path.workers.close()
        for connection in list(self._path.connections):
            connection.close_if_idle()
        self._ending.set()

    # Inside.

    def _changed(self) -> None:
        self._control.changed()

    def _table_changed(self) -> None:
        self._tunnels.fit()
        self._save()
        self._changed()

    def _save(self) -> None:
        if self._path.handed_over or self._listener is None:
            return  # the file is the successor's
        state = state_file.ProxyState(
            self._slots.entries(),
            self._slots.terms,
            self._tunnels.gateways,
            self._listener.address[1],
            self._path.revoked.peers,
        )
        try:
            state_file.save(self._options.state_file, state)
        except OSError as exc:
            _log.error("state file not written; a restart would begin with an older one", why=str(exc))

    async def _watch_identity(self) -> None:
        """Notice a renewal that nobody told us of."""
        while True:
            await asyncio.sleep(_IDENTITY_CHECK_S)
            assert self._options.identity is not None
            assert self._credentials is not None
            if stamp_of(self._options.identity) != self._credentials.stamp:
                with contextlib.suppress(FalError):
                    await self.reload_identity()

    async def _watch_end(self) -> None:
        await self._ending.wait()
        await self._path.empty.wait()
        self._ended.set()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
