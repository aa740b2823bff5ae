"""Processes that outlive the agent: fal-proxy and fal-fsd.

Invariants: one that answers is used, whoever started it; one that does not is started detached, in a session and, where
cgroups can be made, in a cgroup of its own beside the agent's, so that killing everything of the agent (as systemd
does) misses it; it is never stopped because the agent ends. Called by fal_agent.main.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger

START_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.05
_CHECK_S: Final = 5.0
_BACKOFF_MAX_S: Final = 30.0
_LOG_BYTES_MAX: Final = 8 << 20
_LAST_WORDS_BYTES: Final = 4096

_log = get_logger("fal.supervise")
Answers = Callable[[], Awaitable[bool]]


@dataclass(slots=True)
class Daemon:
    """One such process. `answers` asks it by its socket; `argv` starts it; `cgroup` is its place, empty: leave it."""

    name: str
    argv: Sequence[str]
    answers: Answers
    log_file: Path
    cgroup: str = ""
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    async def ensure(self) -> None:
        """Return once it answers. Raises UNAVAILABLE with its last words when it does not come up."""
        if not await self.answers():
            await self.start(self.argv)

    async def start(self, argv: Sequence[str]) -> None:
        """Start it (also as the successor of a running one) and wait until it answers."""
        process = self._process = await asyncio.to_thread(self._spawn, argv)
        _log.info("started", daemon=self.name, pid=process.pid)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + START_TIMEOUT_S
        while not await self.answers():
            if process.poll() is not None or loop.time() > until_s:
                why = f"ended with code {process.returncode}" if process.returncode is not None else "does not answer"
                raise FalError(
                    Code.UNAVAILABLE, f"{self.name} {why}: {self._last_words()}", remedy=f"See {self.log_file}."
                )
            await asyncio.sleep(_POLL_S)

    async def watch(self, rng: Random, *, on_trouble: Callable[[FalError], None]) -> None:
        """Start it again whenever it stops answering; until cancelled."""
        failures = 0
        while True:
            await asyncio.sleep(_CHECK_S if not failures else rng.uniform(0, min(_BACKOFF_MAX_S, 2.0**failures)))
            self.reap()
            try:
                await self.ensure()
                failures = 0
            except FalError as exc:
                failures = min(failures + 1, 16)
                on_trouble(exc)

    def reap(self) -> None:
        """Collect its exit code, if it is a child of ours that ended."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None

    def _spawn(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        if self.log_file.exists() and self.log_file.stat().st_size > _LOG_BYTES_MAX:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        with self.log_file.open("ab") as log:
            process = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )
        if self.cgroup:
            _enter(process.pid, self.cgroup)
        return process

    def _last_words(self) -> str:
        try:
            with self.log_file.open("rb") as log:
                log.seek(max(0, self.log_file.stat().st_size - _LAST_WORDS_BYTES))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else ""


def _enter(pid: int, cgroup: str) -> None:
    """Beside the agent's cgroup, where this machine lets us; a laptop without root has no such choice."""
    from fal_runtime.oci import cgroups

    try:
        cgroups.enter(pid, cgroup)
    except (FalError, OSError) as exc:
        level = _log.warning if os.geteuid() == 0 else _log.info
        level("no_cgroup_of_its_own", pid=pid, cgroup=cgroup, why=str(exc))
