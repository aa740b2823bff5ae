"""Processes that outlive the agent: fal-proxy and fal-fsd.

Invariants: one that answers is used, whoever started it; one that does not is started detached, in a session and, where
cgroups can be made, in a cgroup of its own beside the agent's, so that killing everything of the agent (as systemd
does) misses it; it is never stopped because the agent ends. Called by fal_agent.main.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from fal_agent.departure import departed
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger

START_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.05
_CHECK_S: Final = 5.0
_BACKOFF_MAX_S: Final = 30.0
_SETTLED_AFTER_S: Final = 10.0  # who lived so long and then ends is started again without a wait
_AGAIN_BASE_S: Final = 0.05
_LOG_BYTES_MAX: Final = 8 << 20
_LAST_WORDS_BYTES: Final = 4096
_CODES_KEPT: Final = 4

_log = get_logger("fal.supervise")
Answers = Callable[[], Awaitable[bool]]


@dataclass(slots=True)
class Daemon:
    """One such process. `answers` asks it by its socket; `argv` starts it; `cgroup` is its place, empty: leave it.

    `socket`: the unix socket that it serves, by which `watch` notices its end at once; None: within _CHECK_S.
    """

    name: str
    argv: Sequence[str]
    answers: Answers
    log_file: Path
    cgroup: str = ""
    socket: Path | None = None
    _children: dict[int, int | None] = field(default_factory=dict, init=False)  # pid → exit code once it ended

    async def ensure(self) -> None:
        """Return once it answers. Raises UNAVAILABLE with its last words when it does not come up."""
        if not await self.answers():
            await self.start(self.argv)

    async def start(self, argv: Sequence[str]) -> None:
        """Start it (also as the successor of a running one) and wait until it answers."""
        pid = await asyncio.to_thread(self._spawn, argv)
        self._children[pid] = None
        _log.info("started", daemon=self.name, pid=pid)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + START_TIMEOUT_S
        while not await self.answers():
            self.reap()
            code = self._children.get(pid, 0)
            if code is not None or loop.time() > until_s:
                why = f"ended with code {code}" if code is not None else "does not answer"
                raise FalError(
                    Code.UNAVAILABLE, f"{self.name} {why}: {self._last_words()}", remedy=f"See {self.log_file}."
                )
            await asyncio.sleep(_POLL_S)

    async def watch(self, rng: Random, *, on_trouble: Callable[[FalError], None]) -> None:
        """Start it again whenever it stops answering; until cancelled.

        One that had run for a while is started at once: readers of its mounts wait for it. Ends in quick succession,
        and failed starts, are followed by growing waits.
        """
        loop = asyncio.get_running_loop()
        failures, ends, up_since_s = 0, 0, loop.time()
        while True:
            if failures:
                await asyncio.sleep(rng.uniform(0, min(_BACKOFF_MAX_S, 2.0**failures)))
            elif await self._ended():
                self.reap()
                _log.warning("ended", daemon=self.name, codes=[c for c in self._children.values() if c is not None])
                ends = ends + 1 if loop.time() - up_since_s < _SETTLED_AFTER_S else 0
                up_since_s = loop.time()
                await asyncio.sleep(rng.uniform(0, min(_BACKOFF_MAX_S, _AGAIN_BASE_S * 2.0**ends)) if ends else 0.0)
            self.reap()
            try:
                await self.ensure()
                failures = 0
            except FalError as exc:
                failures = min(failures + 1, 16)
                on_trouble(exc)

    async def _ended(self) -> bool:
        """Wait until it is time to ask again; True: it has ended."""
        if self.socket is None:
            await asyncio.sleep(_CHECK_S)
            return False
        return await departed(self.socket, within_s=_CHECK_S)

    def reap(self) -> None:
        """Collect the exit codes of children of ours that ended; the last few are remembered."""
        for pid in [pid for pid, code in self._children.items() if code is None]:
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended, status = pid, 0
            if ended:
                self._children[pid] = os.waitstatus_to_exitcode(status)
        for pid in [pid for pid, code in self._children.items() if code is not None][:-_CODES_KEPT]:
            del self._children[pid]

    def _spawn(self, argv: Sequence[str]) -> int:
        """In a session of its own. Not subprocess.Popen: the process is meant to outlive this one."""
        if self.log_file.exists() and self.log_file.stat().st_size > _LOG_BYTES_MAX:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        pid = os.posix_spawn(
            argv[0],
            list(argv),
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log_file), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        if self.cgroup:
            _enter(pid, self.cgroup)
        return pid

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
