"""One command in a runner's container, from the operator's side: input, output, signals, exit code.

Invariant: at most a window is on its way in either direction (fal_contract.exec_window), so a slow pipe here holds the
command back there; whatever ends this function ends the command. Called by `runner_exec`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any, Final

from fal_contract.errors import Code, FalError
from fal_contract.exec_window import ReceiveWindow, SendWindow
from fal_contract.limits import EXEC_DATA_BYTES_MAX
from fal_contract.v1 import agent_pb2, cluster_pb2
from falctl.terminal import Escape, raw_mode, size

_ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Streams:
    """File descriptors of this side; `terminal`: they are one, and the command gets one too."""

    stdin: int = 0
    stdout: int = 1
    stderr: int = 2
    terminal: bool = False


async def run_remote(stub: Any, runner_id: str, command: tuple[str, ...], streams: Streams) -> int:
    """The command's exit code. Errors of the cluster come as gRPC's, of the command's start as FalError."""
    opening = agent_pb2.ExecOpen(runner_id=runner_id, command=command, terminal=streams.terminal)
    if streams.terminal:
        opening.rows, opening.columns = size(streams.stdin)
        opening.term = os.environ.get("TERM", "")
    call = stub.ExecRunner()
    with contextlib.ExitStack() as stack:
        talk = _Talk(call, streams)
        try:
            await talk.send(cluster_pb2.ExecRequest(open=opening))
            first = await talk.next()  # it runs, or it does not: the terminal is touched after that
            if streams.terminal and not first.end:
                stack.enter_context(raw_mode(streams.stdin))
            return await talk.run(first)
        finally:
            call.cancel()


class _Talk:
    def __init__(self, call: Any, streams: Streams) -> None:
        self._call = call
        self._streams = streams
        self._writing = asyncio.Lock()
        self._sending = SendWindow()
        self._receiving = ReceiveWindow()
        self._room = asyncio.Event()
        self._resized = asyncio.Event()
        self._ended_by = ""

    async def send(self, request: cluster_pb2.ExecRequest) -> None:
        async with self._writing:
            await self._call.write(request)

    async def _input(self, **fields: object) -> None:
        """Input to a command that may have ended meanwhile: how it ended is for `next` to say."""
        import grpc

        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self.send(cluster_pb2.ExecRequest(input=agent_pb2.ExecInput(**fields)))  # type: ignore[arg-type]

    async def _end_of_input(self) -> None:
        """Nothing more is sent: the server ends the call then."""
        import grpc

        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            async with self._writing:
                await self._call.done_writing()

    async def next(self) -> agent_pb2.ExecOutput:
        import grpc

        reply = await self._call.read()
        if reply is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise FalError(Code.UNAVAILABLE, "the scheduler ended the stream", remedy="Try again.")
        return reply.output  # type: ignore[no-any-return]

    async def run(self, first: agent_pb2.ExecOutput) -> int:
        """Until the last message, or until this side is told to end."""
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        for number in _ENDING_SIGNALS:
            loop.add_signal_handler(number, self._end, number, main)
        if self._streams.terminal:
            loop.add_signal_handler(signal.SIGWINCH, self._resized.set)
        feeding = asyncio.create_task(self._feed())
        sizing = asyncio.create_task(self._follow_size())
        playing = asyncio.create_task(self._play(first))
        tasks = (playing, feeding, sizing)
        try:
            while not playing.done():
                done, _ = await asyncio.wait({t for t in tasks if not t.done()}, return_when=asyncio.FIRST_COMPLETED)
                if feeding in done and feeding.result():
                    raise FalError(Code.CANCELLED, "ended by Enter ~ .", remedy="The command was killed.")
            return playing.result()
        except asyncio.CancelledError:
            if not self._ended_by:
                raise
            raise FalError(Code.CANCELLED, f"ended by {self._ended_by}", remedy="The command was killed.") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for number in (*_ENDING_SIGNALS, signal.SIGWINCH):
                loop.remove_signal_handler(number)

    def _end(self, number: signal.Signals, main: asyncio.Task[Any]) -> None:
        self._ended_by = number.name
        main.cancel()

    async def _play(self, output: agent_pb2.ExecOutput) -> int:
        while not output.end:
            self._sending.taken(output.taken_bytes)
            self._room.set()
            if output.data:
                self._receiving.arrived(len(output.data))
                fd = self._streams.stderr if output.stream == "stderr" else self._streams.stdout
                await asyncio.to_thread(_write_all, fd, output.data)
                if self._receiving.took(len(output.data)):
                    await self._input(taken_bytes=self._receiving.taken_bytes)
            output = await self.next()
        await self._end_of_input()
        if output.error:
            remedy = "Look at `falctl runner show`." if output.exit_code != 126 else ""
            raise FalError(Code.RUNNER_FAILED, output.error.rstrip("."), remedy=remedy)
        return output.exit_code

    async def _feed(self) -> bool:
        """Input until its end; True when the operator typed the way out."""
        typed = _Typed(self._streams.stdin)
        escape = Escape() if self._streams.terminal else None
        while data := await typed.next():
            over = False
            if escape is not None:
                data, over = escape.feed(data)
            while data:
                self._room.clear()
                if not (room := self._sending.room_bytes):
                    await self._room.wait()
                    continue
                self._sending.sent(len(data[:room]))
                await self._input(data=data[:room])
                data = data[room:]
            if over:
                return True
        await self._input(end=True)
        return False

    async def _follow_size(self) -> None:
        while True:
            await self._resized.wait()
            self._resized.clear()
            rows, columns = size(self._streams.stdin)
            await self._input(rows=rows, columns=columns)


class _Typed:
    """Reads a descriptor of any kind in a thread, one piece ahead: files cannot be waited for by a loop."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self._wanted = threading.Semaphore(0)
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    async def next(self) -> bytes:
        """Some bytes; empty at the end."""
        self._wanted.release()
        return await self._pieces.get()

    def _read(self) -> None:
        data = b"-"
        while data:
            self._wanted.acquire()
            try:
                data = os.read(self._fd, EXEC_DATA_BYTES_MAX)
            except OSError:
                data = b""
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, data)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


__all__ = ["Streams", "run_remote"]
