"""The machine is rebooted by order: by the operator's own command, once, when nothing runs on it any more.

The order names the boot that is to end, so that a repeated one never ends the next. Whoever asks while it is under way
joins. A machine that is still up REBOOT_PATIENCE_S after its command ended well was not rebooted.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
from collections.abc import Awaitable, Callable
from typing import Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import REBOOT_COMMAND_TIMEOUT_S, REBOOT_PATIENCE_S
from fal_contract.v1 import agent_pb2

FEATURE: Final = "reboot"  # told to the scheduler by an agent that may
_OUTPUT_BYTES_MAX: Final = 2048
_REMEDY: Final = "Look at the machine, and reboot it by hand."

Reboot = Callable[[], Awaitable[None]]
CarryOut = Callable[[str], Awaitable[None]]
Send = Callable[[agent_pb2.AgentMessage], Awaitable[None]]


async def never() -> None:
    """Where no command is set."""
    what = "its agent may not reboot the machine (reboot_command is not set)"
    raise FalError(Code.FAILED_PRECONDITION, what, remedy="Set reboot_command, or reboot it by hand.")


def check_command(text: str) -> tuple[str, ...]:
    """A command line as arguments; none: (). Raises INVALID."""
    try:
        arguments = tuple(shlex.split(text))
    except ValueError as error:
        raise invalid("reboot_command", text, f"is no command line: {error}", remedy="Quote it as a shell.") from None
    if arguments and shutil.which(arguments[0]) is None:
        raise invalid("reboot_command", text, "names no program", remedy="Write one like `systemctl reboot`.")
    return arguments


class Rebooter:
    """Runs `command`; none: refuses. A call joins one under way. Raises FalError when the machine is not rebooted."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._job: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        if not self._command:
            await never()
        if self._job is None or self._job.done():
            self._job = asyncio.create_task(self._reboot(), name="reboot")
        await asyncio.shield(self._job)

    async def close(self) -> None:
        """The agent ends, maybe because the machine goes down: the command goes on."""
        if self._job is not None:
            self._job.cancel()
            await asyncio.gather(self._job, return_exceptions=True)

    async def _reboot(self) -> None:
        code, output = await self._run()
        if code:
            what = f"its reboot command ended with {code}: {output or 'it said nothing'}"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy=_REMEDY)
        await asyncio.sleep(REBOOT_PATIENCE_S)
        raise FalError(Code.TIMEOUT, f"it is still up {REBOOT_PATIENCE_S:g} s after its reboot command", remedy=_REMEDY)

    async def _run(self) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # it outlives an agent that is told to end
        )
        try:
            async with asyncio.timeout(REBOOT_COMMAND_TIMEOUT_S):
                output, _ = await process.communicate()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            return 1, f"it did not end within {REBOOT_COMMAND_TIMEOUT_S:g} s"
        return process.returncode or 0, output[-_OUTPUT_BYTES_MAX:].decode(errors="replace").strip()


class Reboots:
    """Orders of one session; a refusal goes up it. `carry_out(boot_id)` raises FalError."""

    def __init__(self, carry_out: CarryOut, send: Send) -> None:
        self._carry_out = carry_out
        self._send = send
        self._job: asyncio.Task[None] | None = None

    def take(self, order: agent_pb2.RebootOrder) -> None:
        """Begin; a repeated order is under way."""
        if self._job is None or self._job.done():
            self._job = asyncio.create_task(self._answer(order.boot_id), name="reboot order")

    async def _answer(self, boot_id: str) -> None:
        try:
            await self._carry_out(boot_id)
        except FalError as error:
            refusal = agent_pb2.RebootRefusal(boot_id=boot_id, error=error.what, remedy=error.remedy)
            with contextlib.suppress(FalError):  # the session broke: the next one brings the order again
                await self._send(agent_pb2.AgentMessage(reboot_refusal=refusal))

    async def close(self) -> None:
        """Wait for no answer any more."""
        if self._job is not None:
            self._job.cancel()
            await asyncio.gather(self._job, return_exceptions=True)


__all__ = ["FEATURE", "Reboot", "Rebooter", "Reboots", "check_command", "never"]
