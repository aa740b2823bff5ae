"""Commands in the fake driver's containers: the words of a command say what it does, as in the contract suite.

say=TEXT  err=TEXT  cat (input back to output until its end)  size (the terminal's size, again after each resize)
exit=N    forever
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fal_contract.limits import EXEC_DATA_BYTES_MAX
from fal_runtime.exec_session import Terminal


class FakeExec:
    """See `ExecSession`. `ended` is set when its container ends."""

    def __init__(self, words: tuple[str, ...], terminal: Terminal | None, ended: asyncio.Event) -> None:
        self._words = words
        self._terminal = terminal
        self._ended = ended
        self._input: asyncio.Queue[bytes] = asyncio.Queue(16)
        self._output: asyncio.Queue[tuple[Literal["stdout", "stderr"], bytes] | None] = asyncio.Queue(16)
        self._sizes: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._over = False
        self._closing: asyncio.Task[None] | None = None
        self._program = asyncio.create_task(self._run(), name="fake exec")

    async def _run(self) -> None:
        code = 0
        watch = asyncio.create_task(self._ended.wait())
        program = asyncio.create_task(self._play())
        try:
            await asyncio.wait({watch, program}, return_when=asyncio.FIRST_COMPLETED)
            code = program.result() if program.done() and not program.cancelled() else 137
        except asyncio.CancelledError:
            code = 137
        finally:
            for task in (watch, program):
                task.cancel()
            if not self._exit.done():
                self._exit.set_result(code)
        if code != 137:
            await self._output.put(None)
        else:
            self._over = True
            while not self._output.empty():
                self._output.get_nowait()
            self._output.put_nowait(None)

    async def _play(self) -> int:
        line_end = b"\r\n" if self._terminal else b"\n"
        for word in self._words:
            key, _, value = word.partition("=")
            if key == "say" or (key == "err" and self._terminal):
                await self._output.put(("stdout", value.encode() + line_end))
            elif key == "err":
                await self._output.put(("stderr", value.encode() + line_end))
            elif key == "exit":
                return int(value)
            elif key == "cat":
                while data := await self._input.get():
                    for at in range(0, len(data), EXEC_DATA_BYTES_MAX):
                        await self._output.put(("stdout", data[at : at + EXEC_DATA_BYTES_MAX]))
            elif key == "size" and self._terminal is not None:
                rows, columns = self._terminal.rows, self._terminal.columns
                while True:
                    await self._output.put(("stdout", f"{rows} {columns}\r\n".encode()))
                    rows, columns = await self._sizes.get()
            elif key == "forever":
                await asyncio.Event().wait()
        return 0

    async def read(self) -> tuple[Literal["stdout", "stderr"], bytes] | None:
        if self._over and self._output.empty():
            return None
        got = await self._output.get()
        if got is None:
            self._over = True
        return got

    async def write(self, data: bytes) -> None:
        if data:
            await self._put(data)

    async def _put(self, data: bytes) -> None:
        if not self._exit.done():
            putting = asyncio.ensure_future(self._input.put(data))
            either: set[asyncio.Future[Any]] = {putting, self._exit}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            putting.cancel()

    def close_input(self) -> None:
        self._closing = asyncio.create_task(self._put(b""))

    def resize(self, rows: int, columns: int) -> None:
        if self._terminal is not None and rows > 0 and columns > 0:
            self._sizes.put_nowait((rows, columns))

    def kill(self) -> None:
        self._program.cancel()

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    async def close(self) -> None:
        self.kill()
        await asyncio.gather(self._program, *filter(None, (self._closing,)), return_exceptions=True)
