"""The agent's hold on the node's proxy: connect, start or replace it, tell it everything, hand calls on.

Invariant: while the proxy is away it serves on by itself, if it lives; calls fail with UNAVAILABLE and are tried again
by their callers, and on every new connection the whole truth (term, runners, gateways) is told again. Implements
`ports.ProxyPort`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from random import Random
from typing import Final

from fal_agent.ports import Usage
from fal_agent.proxy.control import ProxyControl
from fal_agent.proxy.messages import GatewayEntry, ProxyInfo, ProxyStats, RunnerEntry
from fal_agent.supervise import Daemon
from fal_contract.errors import Code, FalError
from fal_contract.revocation import RevokedPeer
from fal_contract.telemetry import get_logger

_BACKOFF_MAX_S: Final = 10.0
_SUCCESSION_TIMEOUT_S: Final = 30.0
_log = get_logger("fal.proxy-link")


class ProxyLink:
    """See the module's docstring.

    `entries` tells what should be served now, `kept` what a proxy that knows it may go on serving (runners that are
    being taken back after a restart); all else is taken out. `on_stats` is called for every push.
    """

    def __init__(
        self,
        control_path: Path,
        daemon: Daemon,
        *,
        software: str,
        rng: Random,
        entries: Callable[[], Sequence[RunnerEntry]],
        kept: Callable[[], Set[str]],
        on_stats: Callable[[ProxyStats], None],
        on_trouble: Callable[[FalError], None],
    ) -> None:
        self._path = control_path
        self._daemon = daemon
        self._software = software
        self._rng = rng
        self._entries = entries
        self._kept = kept
        self._on_stats = on_stats
        self._on_trouble = on_trouble
        self._control: ProxyControl | None = None
        self._term = 0
        self._gateways: Sequence[GatewayEntry] = ()
        self._revoked: Sequence[RevokedPeer] = ()
        self.connected = asyncio.Event()
        self.info: ProxyInfo | None = None

    async def run(self) -> None:
        """Keep it up and connected until cancelled."""
        failures = 0
        try:
            while True:
                try:
                    control = await self._connect()
                    failures = 0
                    await control.wait_closed()
                except FalError as exc:
                    failures = min(failures + 1, 16)
                    self._on_trouble(exc)
                self._control = None
                self.connected.clear()
                self._daemon.reap()
                await asyncio.sleep(self._rng.uniform(0, min(_BACKOFF_MAX_S, 0.1 * 2.0**failures)))
        finally:
            if self._control is not None:
                await self._control.close()

    async def _connect(self) -> ProxyControl:
        await self._daemon.ensure()
        control = await ProxyControl.connect(self._path, on_stats=self._on_stats)
        if control.info.software != self._software:
            control = await self._replace(control)
        self._control, self.info = control, control.info
        await self._tell_all(control)
        self.connected.set()
        return control

    async def _replace(self, old: ProxyControl) -> ProxyControl:
        """Another release: its successor takes listeners and slots over; requests under way are not touched."""
        _log.info("replacing", old=old.info.software, new=self._software, old_pid=old.info.pid)
        await old.close()
        await self._daemon.start([*self._daemon.argv, "--takeover"])
        async with asyncio.timeout(_SUCCESSION_TIMEOUT_S):
            while True:
                control = await ProxyControl.connect(self._path, on_stats=self._on_stats)
                if control.info.pid != old.info.pid:
                    return control
                await control.close()
                await asyncio.sleep(0.1)

    async def _tell_all(self, control: ProxyControl) -> None:
        """Term, gateways, and runners: what it holds too much is removed, after what it lacks was put."""
        if self._term:
            await control.set_term(self._term)
        wanted = {entry.runner_id: entry for entry in self._entries()}
        held = {entry.runner_id: entry for entry in await control.runners()}
        for runner_id, entry in wanted.items():
            if runner_id not in held:
                await control.put_runner(entry)
        for runner_id in held.keys() - wanted.keys() - self._kept():
            await control.remove_runner(runner_id)
        await control.set_gateways(self._gateways)
        if self._revoked:  # none told is not "none is": a proxy that came back remembers its own
            await control.set_revoked(self._revoked)
        self._on_stats(await control.stats())

    # ---- ports.ProxyPort

    async def put(self, entry: RunnerEntry) -> None:
        await self._now().put_runner(entry)

    async def drain(self, runner_id: str) -> None:
        with _unknown_is_fine():
            await self._now().drain_runner(runner_id)

    async def remove(self, runner_id: str) -> None:
        with _unknown_is_fine():
            await self._now().remove_runner(runner_id)

    async def usage(self, runner_id: str) -> Usage:
        stats = await self._now().stats()
        row = next((row for row in stats.runners if row.runner_id == runner_id), None)
        return Usage(row.in_flight, row.served, row.last_used_age_s, row.busy_s) if row else Usage()

    async def set_term(self, term: int) -> None:
        self._term = term
        await self._now().set_term(term)

    async def set_gateways(self, gateways: Sequence[GatewayEntry]) -> None:
        self._gateways = tuple(gateways)
        await self._now().set_gateways(gateways)

    async def set_revoked(self, peers: Sequence[RevokedPeer]) -> None:
        self._revoked = tuple(peers)
        await self._now().set_revoked(peers)

    async def reload_identity(self) -> None:
        """The node's certificate was renewed. Best effort: a proxy that is away reads it when it starts."""
        with contextlib.suppress(FalError):
            await self._now().reload_identity()

    def _now(self) -> ProxyControl:
        if self._control is None or self._control.closed:
            raise FalError(Code.UNAVAILABLE, "the proxy does not answer", remedy="It is started again by itself.")
        return self._control


async def proxy_answers(control_path: Path) -> bool:
    """True when a proxy says hello at this socket."""
    try:
        control = await ProxyControl.connect(control_path, on_stats=lambda _: None, timeout_s=2.0)
    except FalError as exc:
        # One of a release whose hello we do not speak is there too; it cannot be used, and is not to be started over.
        return exc.code not in (Code.UNAVAILABLE, Code.TIMEOUT)
    except TimeoutError:
        return False
    await control.close()
    return True


@contextlib.contextmanager
def _unknown_is_fine() -> Iterator[None]:
    try:
        yield
    except FalError as exc:
        if exc.code is not Code.NOT_FOUND:
            raise
