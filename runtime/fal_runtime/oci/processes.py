"""Host processes of a container: running the runtime, signals by pidfd, waiting for an end. Called by the driver."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Final

from fal_runtime.driver import driver_failed
from fal_runtime.oci.record import alive

COMMAND_TIMEOUT_S: Final = 30.0
CONMON_END_TIMEOUT_S: Final = 5.0


async def run_command(command: tuple[str, ...], what: str) -> None:
    """Run a program to its end. DRIVER_FAILED with what it said."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise driver_failed(f"{what} failed: {command[0]}: {error.strerror}", remedy="Install it.") from error
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            _out, said = await process.communicate()
    except TimeoutError:
        raise driver_failed(f"{what} took more than {COMMAND_TIMEOUT_S:.0f} s", remedy="Try again.") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        message = said.decode("utf-8", "replace").strip() or f"exit code {process.returncode}"
        raise driver_failed(f"{what} failed: {message}", remedy="Look at the container's log.")


def send_signal(pid: int, ticks: int, signum: signal.Signals) -> None:
    """Signal this very process; nothing happens when it has gone."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            # Checked with the descriptor in hand: the pid cannot change its owner in between.
            if alive(pid, ticks):
                signal.pidfd_send_signal(pidfd, signum)
        finally:
            os.close(pidfd)


async def end_of(pid: int, ticks: int) -> None:
    """Wait until conmon has gone, so that it cannot write into what is removed; kill it if it lingers."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(pidfd, gone.set)
        try:
            if alive(pid, ticks):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CONMON_END_TIMEOUT_S):
                        await gone.wait()
                        return
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
