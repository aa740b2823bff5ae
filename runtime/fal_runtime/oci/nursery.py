"""One small shell that starts conmons: what it forks is born in conmon's cgroup, so no start waits for a move.

Moving a process between cgroups takes a lock that first waits for an RCU grace period of the kernel: 7 to 15 ms when
nobody moved one in the last moments, 0.1 ms after that (cgroup_attach_lock, rcu_sync in kernel/rcu/sync.c). The shell
is moved once, and `warm_up` pays the period for the runtime while other work is being done.

Invariants: the shell ends when its standard input does, that is with whoever holds this object; conmons live on. A
line to it is one command, written whole or not at all; what it starts is nobody's child, so that nothing has to be
reaped. Nothing here waits for a shell that does not read (somebody stopped it): it is replaced. Called by `conmon`, and
by `user_counts`: a process that the agent itself starts holds up its loop until that executes, and costs a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shlex
import signal
import threading
import weakref
from pathlib import Path
from typing import Final

from fal_runtime.driver import driver_failed
from fal_runtime.oci import cgroups

SYNC_FD: Final = 9  # the shell's syntax knows descriptors of one digit
_LOOP: Final = 'while IFS= read -r line; do eval "$line"; done'
_CPU_WEIGHT: Final = 16
_SHELL: Final = "/bin/sh"
_FULL_S: Final = 5.0  # for a shell to read some of a full pipe; it holds some fifty lines
_FULL_POLL_S: Final = 0.01
_ANSWER_BYTES_MAX: Final = 64 << 10


class Nursery:
    """See the module's docstring. Belongs to one event loop; the shell is started when it is first needed."""

    def __init__(self) -> None:
        self._pid = 0
        self._line_fd = -1
        self._starting: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[None] | None = None
        self._finalizer: weakref.finalize[..., Nursery] | None = None

    async def spawn(self, command: tuple[str, ...], directory: Path, sync_fifo: Path) -> None:
        """Start `command` in `directory`; it finds a FIFO to write to (the reader is open) as descriptor `SYNC_FD`.

        Nothing is awaited but the shell's own start; who reads the FIFO sees its end if the command cannot run.
        """
        words = shlex.join(command)
        line = (
            f"(cd {shlex.quote(str(directory))} && _OCI_SYNCPIPE={SYNC_FD} {words} "
            f"{SYNC_FD}>{shlex.quote(str(sync_fifo))} </dev/null >/dev/null 2>&1 &)"
        )
        data = line.encode() + b"\n"
        if "\n" in line:
            raise driver_failed("a path or an id holds a newline", remedy="Use another state directory.")
        if len(data) > select.PIPE_BUF:
            raise driver_failed(
                f"conmon's command line has {len(data)} bytes of at most {select.PIPE_BUF}",
                remedy="Use a state directory with a shorter path.",
            )
        for _ in range(2):
            try:
                await self._write(data)
            except BrokenPipeError:  # somebody killed it
                self.close()
                continue
            return
        raise driver_failed("the shell that starts conmon ends at once", remedy="Look at the machine's memory.")

    async def ask(self, command: tuple[str, ...], directory: Path, name: str, timeout_s: float) -> bytes:
        """The first line that `command`, started as `spawn` does, writes to its descriptor `SYNC_FD`.

        Without a newline, or empty, when it ended first. `name` is that of the FIFO in `directory`, for as long as
        this takes. TimeoutError; then the shell, which somebody may have stopped, is replaced.
        """
        fifo = directory / name
        os.mkfifo(fifo, 0o600)
        # Open before anybody writes: the writer's open then succeeds at once, and its end is seen as the file's end.
        answers = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            async with asyncio.timeout(timeout_s):
                await self.spawn(command, directory, fifo)
                return await _first_line(answers)
        except TimeoutError:
            self.close()
            raise
        finally:
            os.close(answers)
            fifo.unlink()

    async def _write(self, data: bytes) -> None:
        until_s = asyncio.get_running_loop().time() + _FULL_S
        while True:
            await self._started()
            try:
                os.write(self._line_fd, data)
                return
            except BlockingIOError:
                if asyncio.get_running_loop().time() > until_s:
                    self.close()
                    raise driver_failed(
                        f"the shell that starts conmon read nothing for {_FULL_S:g} s, and was ended",
                        remedy="Try again; look for who stops the agent's processes.",
                    ) from None
            await asyncio.sleep(_FULL_POLL_S)

    def warm_up(self) -> asyncio.Task[None]:
        """Make the next moves between cgroups quick; await the task before the event loop ends."""
        if self._warming is None or self._warming.done():
            self._warming = asyncio.create_task(self._warm_up())
        return self._warming

    async def _warm_up(self) -> None:
        # A best effort: the same write to where the shell is already.
        await self._started()
        hierarchies = cgroups.hierarchies()[:1]
        with contextlib.suppress(OSError):
            await asyncio.to_thread(cgroups.enter_some, self._pid, cgroups.CONMON_CGROUP, hierarchies)

    async def _started(self) -> None:
        while self._line_fd < 0 or self._starting is not None:  # its cgroup comes last
            starting = self._starting = self._starting or asyncio.create_task(self._start())
            try:
                await asyncio.shield(starting)
            finally:
                if starting.done() and self._starting is starting:
                    self._starting = None

    async def _start(self) -> None:
        self._pid, self._line_fd = _shell()
        self._finalizer = weakref.finalize(self, _end, self._pid, self._line_fd)
        try:
            # Conmon and the runtime under it work for milliseconds, and somebody waits: before what computes for hours.
            await asyncio.to_thread(cgroups.make_parent, cgroups.CONMON_CGROUP, weight=_CPU_WEIGHT)
            await asyncio.to_thread(cgroups.enter, self._pid, cgroups.CONMON_CGROUP)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the shell; what it started lives on, what it has not read yet is lost."""
        if self._finalizer is not None:
            self._finalizer()
        self._pid, self._line_fd, self._finalizer = 0, -1, None


async def _first_line(fd: int) -> bytes:
    """Up to a newline or the end; conmon keeps the pipe open after its one line.

    Before its first writer a FIFO reads as ended, but is not reported as readable: so wait first.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    data = b""
    try:
        while b"\n" not in data and len(data) < _ANSWER_BYTES_MAX:
            await readable.wait()
            readable.clear()
            try:
                piece = os.read(fd, 4096)
            except BlockingIOError:
                continue
            if not piece:
                break
            data += piece
    finally:
        loop.remove_reader(fd)
    return data


def _shell() -> tuple[int, int]:
    """A new shell's pid, and where it reads its lines."""
    lines, line_fd = os.pipe()
    try:
        pid = os.posix_spawn(
            _SHELL,
            (_SHELL, "-c", _LOOP),
            {"PATH": os.environ.get("PATH", os.defpath)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, lines, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
    except OSError as error:
        os.close(line_fd)
        raise driver_failed(f"{_SHELL}: {error.strerror}", remedy="Install a shell.") from error
    finally:
        os.close(lines)
    os.set_blocking(line_fd, False)
    return pid, line_fd


def _end(pid: int, line_fd: int) -> None:
    os.close(line_fd)
    with contextlib.suppress(ChildProcessError, RuntimeError):  # reaped by others; no more threads at our own end
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGKILL)  # also where it is stopped
            threading.Thread(target=_reap, args=(pid,), name="nursery's end", daemon=True).start()


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
