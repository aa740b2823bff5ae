"""Keeps containers ready for what this node started last (`core.pool`), in the background.

Invariant: nothing is made while containers are being created or, for warm workers, while a runner is in set-up: what
somebody waits for goes first. A failure costs speed only. Run by fal_agent.agent, told by fal_agent.tools.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fal_agent.core import pool
from fal_contract.clock import Clock
from fal_contract.errors import FalError
from fal_contract.telemetry import get_logger
from fal_runtime.driver import ContainerSpec, Driver, Prepared

QUIET_S: Final = 0.3  # after the last creation
SETTLED_S: Final = 2.0  # after the last runner got READY: its first requests come now, and loading takes a whole CPU
SETUP_WAIT_MAX_S: Final = 60.0  # for runners in set-up, then warm workers are made all the same
RETRY_S: Final = 30.0  # also how often memory is looked at
RETRY_MAX_S: Final = 960.0  # after errors that nobody expects
_NOTHING: Final = MappingProxyType[str, str]({})
_SOME_SECRETS: Final = MappingProxyType({"none-yet": b""})
_SOMEWHERE: Final = Path("/")
_log = get_logger("agent.spares")


class Spares:
    """See the module's docstring. `in_setup`: is a runner on its way to READY?"""

    def __init__(self, driver: Driver, clock: Clock, *, prepared: int, warm: int, in_setup: Callable[[], bool]) -> None:
        self._driver = driver
        self._clock = clock
        self._prepared = prepared
        self._warm = warm
        self._in_setup = in_setup
        self._recent: tuple[ContainerSpec, ...] = ()
        self._used_s = clock.monotonic_s()
        self._news = asyncio.Event()

    def used(self, spec: ContainerSpec) -> None:
        """A container of this spec was created."""
        # Who it was makes no shape, and its secrets are not to be kept here.
        self._recent = pool.remembered(
            self._recent,
            replace(
                spec,
                id="shape",
                command=("shape",),
                env=_NOTHING,
                socket_dir=spec.socket_dir and _SOMEWHERE,
                models_dir=spec.models_dir and _SOMEWHERE,
                secrets=_SOME_SECRETS if spec.secrets else MappingProxyType({}),
            ),
        )
        self._used_s = self._clock.monotonic_s()
        self._news.set()

    async def run(self) -> None:
        """Until cancelled; then what was ready is taken away."""
        if not self._prepared and not self._warm:
            return
        retry_s = RETRY_S
        try:
            while True:
                try:
                    await self._round()
                    retry_s = RETRY_S
                except Exception:  # a mistake of ours must not end the agent
                    _log.exception("not_prepared", note="starts are slower", retry_s=retry_s)
                    await asyncio.sleep(retry_s)
                    retry_s = min(RETRY_MAX_S, 2 * retry_s)
        finally:
            try:
                await self._driver.prepare(())
            except Exception:  # the next agent clears it away
                _log.exception("prepared_left")

    async def _round(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY_S):
                await self._news.wait()
        await self._quiet()
        self._news.clear()
        await self._refill()

    async def _quiet(self) -> None:
        began_s, setup_s = self._clock.monotonic_s(), -SETTLED_S
        while True:
            now_s = self._clock.monotonic_s()
            if self._warm and self._in_setup() and now_s - began_s < SETUP_WAIT_MAX_S:
                setup_s = now_s
            left_s = max(self._used_s + QUIET_S, setup_s + SETTLED_S) - now_s
            if left_s <= 0:
                return
            await asyncio.sleep(min(max(left_s, 0.05), 0.25))

    async def _refill(self) -> None:
        wants = pool.wanted(
            self._recent,
            prepared=self._prepared,
            warm=self._warm,
            can_warm=[bool(spec.warm_command) for spec in self._recent],
            free_bytes=await asyncio.to_thread(free_bytes),
        )
        try:
            await self._driver.prepare([Prepared(want.shape, want.count, want.warm) for want in wants])
        except FalError as error:
            _log.warning("not_prepared", message=str(error), note="starts are slower")


def free_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that programs could get without anything being swapped; 0 when that cannot be read."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return 0
