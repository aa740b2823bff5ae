"""Clear a machine: kill and remove every container of a state directory, end its proxy and its fsd.

Invariant: only with the state directory's lock held, so never under a running agent. Identity, journal and models stay:
a later start tells that its runners are gone. Called by `fal-agent purge`, which falctl dev down uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Final

from fal_agent import strangers
from fal_agent.layout import Layout
from fal_agent.proxy.control import ProxyControl
from fal_contract.clock import SystemClock
from fal_contract.errors import FalError, not_found

_END_TIMEOUT_S: Final = 10.0


async def purge(state_dir: Path) -> list[str]:
    """What was ended, in words."""
    layout = Layout(state_dir.absolute())
    if not state_dir.is_dir():
        raise not_found("state directory", str(state_dir), remedy="Name the one given to fal-agent run.")
    lock = layout.lock()
    try:
        done = await _containers(layout)
        done += await _proxy(layout)
        done += await _fsd(layout)
        done += await asyncio.to_thread(_unfinished, layout)
    finally:
        os.close(lock)
    return done


async def _containers(layout: Layout) -> list[str]:
    if not layout.driver.exists():
        return []
    driver, _ = await layout.open_driver("auto")
    found = [status.id for status in await driver.list()]
    for id in found:
        await driver.remove(id)
    await driver.clean(frozenset())
    places = layout.places(isolates=driver.isolates)
    for folder in (places.sockets, places.models, places.runners, layout.cdi):
        await asyncio.to_thread(strangers.remove, folder)
    if driver.isolates:  # else it is the state directory itself
        with contextlib.suppress(OSError):
            places.sockets.parent.rmdir()
    return [f"container {id}" for id in found]


async def _proxy(layout: Layout) -> list[str]:
    try:
        control = await ProxyControl.connect(layout.proxy_control, on_stats=lambda _: None)
    except FalError:
        return []
    pid = control.info.pid
    with contextlib.suppress(FalError):
        await control.stop()
    await control.close()
    await _ended(pid)
    return [f"fal-proxy {pid}"]


async def _fsd(layout: Layout) -> list[str]:
    pid = _listener(layout.fsd_socket)
    if pid is None:
        return []
    await _ended(pid)
    return [f"fal-fsd {pid}"]


def _unfinished(layout: Layout) -> list[str]:
    """The holder of fsd's mounts outlives fsd by design; with it go the mounts of what was not finished."""
    from fal_fsd.mount.keeper import Keeper
    from fal_runtime.oci import mounts

    folder = layout.fsd_socket.parent / "mounts"
    if not folder.is_dir():
        return []
    Keeper(folder, SystemClock()).end()
    return [f"mount {point}" for point in mounts.unmount_below(folder)]


async def _ended(pid: int) -> None:
    """Ask, wait, kill."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT_S):
                while _lives(pid):  # noqa: ASYNC110  (another process)
                    await asyncio.sleep(0.02)
                return


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
