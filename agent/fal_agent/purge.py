"""Clear a machine: kill and remove every container of a state directory, end its proxy and its fsd.

Invariants: only with the state directory's lock held, so never under a running agent; what cannot be ended or taken
away is told at the end and keeps nothing else running. Identity, journal and models stay:
a later start tells that its runners are gone. Called by `fal-agent purge`, which falctl dev down uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from fal_agent import strangers
from fal_agent.layout import Layout
from fal_agent.proxy.control import ProxyControl
from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError, not_found
from fal_contract.telemetry import get_logger

_END_TIMEOUT_S: Final = 10.0
_LOCK_WAIT_S: Final = 5.0
_POLL_S: Final = 0.02
_log = get_logger("agent.purge")


class _Steps:
    """Does one thing after the other, whatever became of those before."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.errors: list[FalError] = []

    async def do(self, step: Awaitable[Sequence[str]], what: str) -> None:
        try:
            self.done += await step
        except FalError as exc:
            self.errors.append(exc)
        except Exception as exc:  # whatever it is, it must not keep the rest running
            _log.exception("not_purged", what=what)
            self.errors.append(FalError(Code.INTERNAL, f"{what}: {exc!r}", remedy="Purge once more."))


async def purge(state_dir: Path, *, tell: Callable[[str], None] = lambda word: None) -> list[str]:
    """What was ended, in words; `tell` hears each. An ExceptionGroup of FalErrors: what was not, all else was."""
    layout = Layout(state_dir.absolute())
    if not state_dir.is_dir():
        raise not_found("state directory", str(state_dir), remedy="Name the one given to fal-agent run.")
    lock = await _lock(layout)
    steps = _Steps()
    try:
        await _containers(layout, steps)
        await steps.do(_listening(layout.proxy_control, "fal-proxy", _stop_proxy), "fal-proxy")
        await steps.do(_listening(layout.fsd_socket, "fal-fsd"), "fal-fsd")
        await steps.do(asyncio.to_thread(_unfinished, layout), "mounts of fal-fsd")
    finally:
        os.close(lock)
        for word in steps.done:
            tell(word)
    if steps.errors:
        raise ExceptionGroup("not all was purged", steps.errors)
    return steps.done


async def _lock(layout: Layout) -> int:
    """An agent that was killed just now may have left a child that has not executed its program yet."""
    until_s = SystemClock().monotonic_s() + _LOCK_WAIT_S
    while True:
        try:
            return layout.lock()
        except FalError as exc:
            if exc.code is not Code.ALREADY_EXISTS or SystemClock().monotonic_s() >= until_s:
                raise
        await asyncio.sleep(_POLL_S)


async def _containers(layout: Layout, steps: _Steps) -> None:
    driver = layout.driver_as_left()
    if driver is None:
        return

    async def remove_all() -> list[str]:
        for status in await driver.list():
            await steps.do(remove(status.id), f"container {status.id}")
        return []

    async def remove(id: str) -> list[str]:
        await driver.remove(id)
        return [f"container {id}"]

    async def clean() -> list[str]:
        await driver.clean(frozenset())
        return []

    async def remove_folders() -> list[str]:
        places = layout.places(isolates=driver.isolates)
        for folder in (places.sockets, places.models, places.runners, layout.cdi):
            await asyncio.to_thread(strangers.remove, folder)
        if driver.isolates:  # else it is the state directory itself
            with contextlib.suppress(OSError):
                places.sockets.parent.rmdir()
        return []

    await steps.do(remove_all(), "containers")
    await steps.do(clean(), "what containers left")
    await steps.do(remove_folders(), "folders of runners")


async def _listening(
    path: Path, name: str, stop: Callable[[Path], Awaitable[None]] = lambda path: asyncio.sleep(0)
) -> list[str]:
    """End who listens at this socket: in its own way, or it is killed."""
    pid = await asyncio.to_thread(_listener, path)
    if pid is None:
        return []
    await stop(path)
    await _ended(pid, name)
    return [f"{name} {pid}"]


async def _stop_proxy(path: Path) -> None:
    """A proxy that does not answer is killed all the same."""
    with contextlib.suppress(FalError):
        control = await ProxyControl.connect(path, on_stats=lambda _: None)
        try:
            await control.stop()
        finally:
            await control.close()


def _unfinished(layout: Layout) -> list[str]:
    """The holder of fsd's mounts outlives fsd by design; with it go the mounts of what was not finished."""
    from fal_fsd.mount.keeper import Keeper
    from fal_runtime.oci import mounts

    folder = layout.fsd_socket.parent / "mounts"
    if not folder.is_dir():
        return []
    Keeper(folder, SystemClock()).end()
    return [f"mount {point}" for point in mounts.unmount_below(folder)]


async def _ended(pid: int, name: str) -> None:
    """Ask, wait, kill."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT_S):
                while _lives(pid):  # noqa: ASYNC110  (another process)
                    await asyncio.sleep(_POLL_S)
                return
    what = f"{name}, process {pid}, did not end within {_END_TIMEOUT_S:.0f} s of SIGKILL"
    raise FalError(Code.TIMEOUT, what, remedy="It waits in the kernel; look at /proc/PID/stack.")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _listener(path: Path) -> int | None:
    """The process that answers at a unix socket (SO_PEERCRED), or None."""
    import socket
    import struct

    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except OSError:
            return None
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid) or None
