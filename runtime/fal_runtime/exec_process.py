"""The caller's end of `exec_helper`: a command's input, output and exit code for one event loop.

Invariant: whatever happens to this object or its process, the helper sees the end of the control socket and kills the
command. Used by the oci and the process driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fal_contract.errors import FalError
from fal_contract.limits import EXEC_DATA_BYTES_MAX
from fal_runtime.driver import driver_failed
from fal_runtime.exec_session import Terminal

_HELPER: Final = Path(__file__).with_name("exec_helper.py")
_START_TIMEOUT_S: Final = 45.0
_END_TIMEOUT_S: Final = 10.0
_MESSAGE_BYTES_MAX: Final = 64 << 10
_LATE_BYTES_MAX: Final = 256 << 10  # what pipes may hold at a command's end; more is written by what it left behind
_END_OF_FILE: Final = b"\x04"

StreamName = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class Request:
    """What the helper is to start: `process` by `runtime` in `container`, or `argv` as a plain process.

    `bound_to`: a process whose end is the command's too; 0: none.
    """

    argv: tuple[str, ...] = ()
    env: dict[str, str] | None = None
    cwd: str = "/"
    runtime: tuple[str, ...] = ()
    container: str = ""
    process: dict[str, Any] | None = None
    bound_to: int = 0


class HelperExec:
    """See the module's docstring; `ExecSession` says what the methods do. Made by `start`."""

    def __init__(self, what: str, control: socket.socket, work_dir: Path) -> None:
        self._what = what
        self._control = control
        self._work_dir = work_dir
        self._helper: asyncio.subprocess.Process | None = None
        self._outputs: dict[int, StreamName] = {}
        self._input = -1
        self._terminal = False
        self._late_bytes = 0
        self._readable = asyncio.Event()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exit.add_done_callback(lambda _: self._readable.set())

    # ---- the beginning

    @classmethod
    async def start(
        cls,
        what: str,
        request: Request,
        work_dir: Path,
        *,
        terminal: Terminal | None,
        owner_uid: int | None = None,
        enter: Callable[[int], None] = lambda pid: None,
    ) -> HelperExec:
        """Start it; DRIVER_FAILED with the runtime's words when it does not. `work_dir` is made, gone after `close`.

        `owner_uid`: who may give the pipes to the command's user, who may then open them by their names in /proc.
        `enter` moves the helper to its cgroup.
        """
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        session = cls(what, control, work_dir)
        try:
            with theirs:
                await session._launch(theirs, owner_uid, terminal is not None)
            assert session._helper is not None
            await asyncio.to_thread(enter, session._helper.pid)
            work_dir.mkdir(parents=True, mode=0o700)
            size = [terminal.rows, terminal.columns] if terminal else None
            text = json.dumps({**_fields(request), "terminal": size})
            (work_dir / "request.json").write_text(text)
            await asyncio.get_running_loop().sock_sendall(control, json.dumps({"work_dir": str(work_dir)}).encode())
            async with asyncio.timeout(_START_TIMEOUT_S):
                await session._started()
        except TimeoutError:
            await session.close()
            raise driver_failed(f"{what} did not start in time", remedy="Look at the node's load.") from None
        except OSError as error:
            await session.close()
            raise driver_failed(f"{what} did not start: {error.strerror}", remedy="Try again.") from error
        except BaseException:
            await session.close()
            raise
        return session

    async def _launch(self, theirs: socket.socket, owner_uid: int | None, terminal: bool) -> None:
        given: list[int] = []
        try:
            if terminal:
                given = [os.open(os.devnull, os.O_RDWR)] * 3
            else:
                for reads in (True, False, False):  # as the command sees them
                    read, write = os.pipe()
                    mine, its = (write, read) if reads else (read, write)
                    given.append(its)
                    os.set_blocking(mine, False)
                    if reads:
                        self._input = mine
                    else:
                        self._outputs[mine] = "stdout" if not self._outputs else "stderr"
                    if owner_uid is not None:
                        os.fchown(its, owner_uid, owner_uid)
            self._helper = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_HELPER), str(theirs.fileno())),
                stdin=given[0], stdout=given[1], stderr=given[2],
                pass_fds=(theirs.fileno(),), start_new_session=True, cwd="/",
            )  # fmt: skip
        finally:
            for fd in set(given):
                os.close(fd)

    async def _started(self) -> None:
        said, descriptors = await self._receive()
        if "pid" not in said:
            why = str(said.get("error") or "its helper died")
            raise driver_failed(f"{self._what} did not start: {why}", remedy=remedy_of(why))
        if descriptors:
            (self._input,) = descriptors
            os.set_blocking(self._input, False)
            self._outputs, self._terminal = {self._input: "stdout"}, True
        loop = asyncio.get_running_loop()
        for fd in self._outputs:
            loop.add_reader(fd, self._readable.set)
        loop.add_reader(self._control, self._ended)

    async def _receive(self) -> tuple[dict[str, Any], list[int]]:
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        loop.add_reader(self._control, arrived.set)
        try:
            await arrived.wait()
        finally:
            loop.remove_reader(self._control)
        data, descriptors, _flags, _address = socket.recv_fds(self._control, _MESSAGE_BYTES_MAX, 1)
        return (json.loads(data) if data else {}), descriptors

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control)
        said: dict[str, Any] = {}
        for _ in range(2):  # a word of ours that came too late resets the connection: the helper's word is behind that
            with contextlib.suppress(OSError, ValueError):
                said = json.loads(self._control.recv(_MESSAGE_BYTES_MAX))
                break
        if not self._exit.done():
            self._exit.set_result(int(said.get("exit", -1)))

    # ---- what ExecSession says

    async def read(self) -> tuple[StreamName, bytes] | None:
        while True:
            over = self._exit.done()  # before reading: what was written before the end is then read
            self._readable.clear()
            for fd, name in list(self._outputs.items()):
                try:
                    data = os.read(fd, EXEC_DATA_BYTES_MAX)
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno != errno.EIO:  # a terminal that nobody holds any more
                        raise
                    data = b""
                if data and over:
                    self._late_bytes += len(data)
                    if self._late_bytes > _LATE_BYTES_MAX:
                        return None
                if data:
                    # Take turns, so that one stream cannot starve the other.
                    self._outputs[fd] = self._outputs.pop(fd)
                    return name, data
                self._drop_output(fd)
            if over:  # others that it left behind may hold its output still: its own end is the end
                return None
            await self._readable.wait()

    def _drop_output(self, fd: int) -> None:
        del self._outputs[fd]
        asyncio.get_running_loop().remove_reader(fd)
        if fd != self._input:
            os.close(fd)

    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and self._input >= 0 and not self._exit.done():
            try:
                rest = rest[os.write(self._input, rest) :]
            except BlockingIOError:
                await self._writable()
            except OSError:  # EPIPE, EIO: nobody reads any more
                if not self._terminal:
                    self._drop_input()
                return

    async def _writable(self) -> None:
        loop, room, fd = asyncio.get_running_loop(), asyncio.Event(), self._input
        loop.add_writer(fd, room.set)
        waiting: asyncio.Future[Any] = asyncio.ensure_future(room.wait())
        either: set[asyncio.Future[Any]] = {waiting, self._exit}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_writer(fd)
            waiting.cancel()

    def close_input(self) -> None:
        if self._terminal:
            with contextlib.suppress(OSError):
                os.write(self._input, _END_OF_FILE)
        else:
            self._drop_input()

    def _drop_input(self) -> None:
        if self._input >= 0:
            fd, self._input = self._input, -1
            asyncio.get_running_loop().remove_writer(fd)
            os.close(fd)

    def resize(self, rows: int, columns: int) -> None:
        if self._terminal and rows > 0 and columns > 0:
            with contextlib.suppress(OSError):
                size = struct.pack("HHHH", min(rows, 0xFFFF), min(columns, 0xFFFF), 0, 0)
                fcntl.ioctl(self._input, termios.TIOCSWINSZ, size)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._control.send(b"kill")

    async def wait(self) -> int:
        code = await asyncio.shield(self._exit)
        if code < 0:
            raise driver_failed(f"{self._what}: its exit code was lost", remedy="Look at the node; its helper died.")
        return code

    async def close(self) -> None:
        if self._control.fileno() < 0:
            return
        self.kill()
        try:
            if self._helper is not None:
                if not self._exit.done():
                    # It ends by itself once the command is dead; a command stuck in the kernel is left to it.
                    self._control.shutdown(socket.SHUT_WR)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_END_TIMEOUT_S):
                        await self._helper.wait()
        finally:  # also when this is cancelled halfway
            self._release()
            await asyncio.to_thread(shutil.rmtree, self._work_dir, ignore_errors=True)

    def _release(self) -> None:
        """All descriptors of ours."""
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        for fd in list(self._outputs):
            self._drop_output(fd)
        self._drop_input()
        if not self._exit.done():
            self._exit.set_result(-1)


def _fields(request: Request) -> dict[str, Any]:
    return {
        "argv": list(request.argv),
        "env": request.env or {},
        "cwd": request.cwd,
        "runtime": list(request.runtime),
        "container": request.container,
        "process": request.process,
        "bound_to": request.bound_to,
    }


def remedy_of(why: str) -> str:
    """What to do about a command that did not start."""
    if is_missing(why):
        return "Check the command's path and, for a script or a dynamic program, its interpreter inside the image."
    if "permission denied" in why.lower():
        return "Make the file executable in the image."
    return "Check the command; `falctl runner show` tells the container's state."


def is_missing(why: str | FalError) -> bool:
    """True when the program does not exist inside."""
    text = (why.what if isinstance(why, FalError) else why).lower()
    return "no such file or directory" in text or "executable file not found" in text
