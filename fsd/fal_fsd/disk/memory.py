"""The memory tier: finished files whose pages are locked, within a byte budget, by a process of its own (locker.py).

What counts here is in fsd's cgroup and stays when a container with a small memory limit reads it. Nothing survives fsd:
the locker ends with it, pages stay cached as long as nobody needs the room, and the node locks again after a restart.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, not_found

_LOCKER: Final = Path(__file__).with_name("locker.py")
_TIMEOUT_S: Final = 60.0
_SLOWEST_BYTES_S: Final = 20e6  # a disk that reads slower than this is as good as broken
_REPLY_BYTES_MAX: Final = 64 << 10


class MemoryTier:
    """Blocks (but for what is only asked), thread-safe; one request at a time. `bytes_max` 0: there is no such tier.

    `command`: what the locker's interpreter is started with, for tests.
    """

    def __init__(self, bytes_max: int, *, clock: Clock, command: Sequence[str] = ()) -> None:
        self.bytes_max = bytes_max
        self._clock = clock
        self._command = [*command, sys.executable, "-I", "-S", str(_LOCKER)]
        self._mutex = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._locked: dict[str, int] = {}
        self._why_not: str | None = None

    @property
    def available(self) -> str:
        """Empty when files can be locked here up to the budget, else why not. Tried once."""
        if self.bytes_max <= 0:
            return "no memory budget is set"
        with self._mutex:
            if self._why_not is None:
                reply = self._ask({"op": "probe", "bytes": self.bytes_max}, self.bytes_max)
                self._why_not = f"{self.bytes_max} bytes cannot be locked: {reply['error']}" if reply["error"] else ""
            return self._why_not

    @property
    def bytes_locked(self) -> int:
        """Of all artifacts. Does not wait, as `bytes_of`."""
        self._look()
        return sum(list(self._locked.values()))

    def bytes_of(self, id: str) -> int:
        """Locked bytes of an artifact. Never waits for a request that is under way, which may take minutes."""
        self._look()
        return self._locked.get(id, 0)

    def _look(self) -> None:
        if self._mutex.acquire(blocking=False):
            try:
                self._notice_death()
            finally:
                self._mutex.release()

    def lock(self, id: str, paths: Sequence[Path], *, fresh: bool = False) -> int:
        """Bring these finished files into memory and keep them; the bytes. Idempotent.

        `fresh`: fsd wrote them just now, so that it is charged already. Else what others are charged for is dropped
        from the page cache first, where nobody has it mapped. Raises NO_CAPACITY: over the budget, or not allowed;
        NOT_FOUND: a file is gone.
        """
        try:
            size = sum(path.stat().st_size for path in paths)
        except OSError:
            raise not_found("artifact", id, remedy="Stage it again.") from None
        if why := self.available:
            raise _refused(f"the memory tier does not work here: {why}")
        with self._mutex:
            self._notice_death()
            if id in self._locked:
                return self._locked[id]
            taken = sum(self._locked.values())
            if taken + size > self.bytes_max:
                raise _refused(f"{size} bytes do not fit into the memory tier, {taken} of {self.bytes_max} are taken")
            request = {"op": "lock", "id": id, "paths": [str(path) for path in paths], "drop": not fresh}
            reply = self._ask(request, size)
            if reply["error"]:
                raise _refused(f"{size} bytes cannot be locked: {reply['error']}")
            self._locked[id] = int(reply["bytes"])
            return self._locked[id]

    def unlock(self, id: str) -> int:
        """Let it go; the bytes. Unknown ids are fine."""
        with self._mutex:
            self._notice_death()
            size = self._locked.pop(id, 0)
            if size:
                self._ask({"op": "unlock", "id": id}, 0)
            return size

    def close(self) -> None:
        """Nothing is locked any more."""
        with self._mutex:
            self._end()

    # ---- inside; under the mutex

    def _notice_death(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        self._locked.clear()
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _ask(self, request: dict[str, Any], size: int) -> dict[str, Any]:
        """The answer; one with an error too when the locker died or does not answer in time."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True, bufsize=0
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            raw = _read_line(process.stdout.fileno(), self._clock, _TIMEOUT_S + size / _SLOWEST_BYTES_S)
        except OSError as exc:
            self._end()
            return {"bytes": 0, "error": f"the locker does not answer: {exc}"}
        reply: dict[str, Any] = json.loads(raw)
        return reply


def _read_line(fd: int, clock: Clock, timeout_s: float) -> bytes:
    raw, until_s = b"", clock.monotonic_s() + timeout_s
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not raw.endswith(b"\n"):
        left_s = until_s - clock.monotonic_s()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise TimeoutError(f"no answer in {timeout_s:.0f} s")
        chunk = os.read(fd, _REPLY_BYTES_MAX)
        if not chunk:
            raise BrokenPipeError("it died")
        raw += chunk
    return raw


def _refused(what: str) -> FalError:
    return FalError(
        Code.NO_CAPACITY,
        what,
        remedy="Raise memory_bytes_max or the limit of locked memory, or stage to tier disk.",
        field="memory_bytes_max",
    )
