"""Mounts of unfinished artifacts as they are in production: a serving process, readers, and a holder, each its own.

Nothing in the test's own process touches a mount: a reader that hangs can be killed, a test cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fal_contract.clock import SystemClock
from fal_fsd.mount import kernel
from fal_fsd.mount.keeper import Keeper
from mount_server import artifact_of, content_of

HERE = Path(__file__).parent
TIMEOUT_S = 60.0
_PATHS = os.pathsep.join(str(HERE.parent / root) for root in ("proto", "fsd", "tests"))


class Lines:
    """A child that answers a line with a line."""

    def __init__(self, log: Path) -> None:
        """Its ends of the pipes are `self.given`, to be closed once it has them."""
        given_in, self._in = os.pipe()
        self._out, given_out = os.pipe()
        self.given = (given_in, given_out, os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC))
        self._log = log
        self._rest = b""
        self._closed = False
        self.pid = 0
        self._pidfd = -1

    def born(self, pid: int) -> None:
        """It has started."""
        for fd in self.given:
            os.close(fd)
        self.pid, self._pidfd = pid, os.pidfd_open(pid)

    def send(self, message: object) -> None:
        os.write(self._in, json.dumps(message).encode() + b"\n")

    def answer(self, timeout_s: float = TIMEOUT_S) -> Any:
        """The next line. AssertionError when it does not come in time or the child ends."""
        while b"\n" not in self._rest:
            assert select.select([self._out], [], [], timeout_s)[0], f"no answer: {self.last_words()}"
            data = os.read(self._out, 1 << 16)
            assert data, f"it ended: {self.last_words()}"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def silent(self) -> bool:
        """Whether nothing was said since the last answer."""
        return not self._rest and not select.select([self._out], [], [], 0)[0]

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; one that ended is left alone."""
        if not self._closed:
            if not self._over(0):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self.end()

    def end(self) -> None:
        """Its input ends; wait for its end."""
        os.close(self._in)
        os.close(self._out)
        self._closed = True
        assert self._over(TIMEOUT_S), f"{self.pid} does not end: {self.last_words()}"
        os.close(self._pidfd)

    def _over(self, timeout_s: float) -> bool:
        return bool(select.select([self._pidfd], [], [], timeout_s)[0])

    def last_words(self) -> str:
        return self._log.read_text()[-3000:]


class Forks:
    """The process that serving processes are forked of."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "mount_server.py"), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": _PATHS},
            )
        self._control.settimeout(TIMEOUT_S)

    def fork(self, config: dict[str, Any], log: Path) -> Lines:
        made = Lines(log)
        socket.send_fds(self._control, [json.dumps(config).encode()], made.given)
        made.born(int(self._control.recv(100)))
        return made

    def close(self) -> None:
        self._control.close()
        self._process.wait(TIMEOUT_S)


class Reader(Lines):
    """See `mount_reader`."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        given_in, given_out, given_err = self.given
        argv = [sys.executable, "-I", "-S", str(HERE / "mount_reader.py")]
        self.process = subprocess.Popen(argv, stdin=given_in, stdout=given_out, stderr=given_err)
        self.born(self.process.pid)
        self.answer()  # from now on signals do not kill it

    def end(self) -> None:
        super().end()
        self.process.wait()

    def ask(self, **command: Any) -> dict[str, Any]:
        self.send(command)
        found: dict[str, Any] = self.answer()
        return found

    def do(self, **command: Any) -> Any:
        """The result; a failure is an AssertionError."""
        found = self.ask(**command)
        assert "result" in found, (command, found)
        return found["result"]


class Rig:
    """One folder of mounts. `artifacts`: specs as `mount_server.artifact_of` takes them."""

    def __init__(self, forks: Forks, root: Path, artifacts: list[dict[str, Any]], **options: Any) -> None:
        self._forks = forks
        self.root = root
        root.mkdir(exist_ok=True)
        self.folder = root / "mounts"
        self.specs = artifacts
        self.artifacts = [artifact_of(spec) for spec in artifacts]
        self.options = options  # of InFlightMounts
        self.readers: list[Reader] = []
        self.servers: list[Lines] = []
        self.status: dict[str, Any] = {}
        self.taken: list[str] = []

    def serve(self, **config: Any) -> None:
        """Start the serving process. `off`, `give`, `withheld`, `finished`, `cgroup`: see `mount_server`."""
        everything = {
            "folder": str(self.folder),
            "data": str(self.root / "data"),
            "artifacts": self.specs,
            "options": self.options,
            **config,
        }
        self.servers.append(self._forks.fork(everything, self.root / "server.log"))
        hello = self.server.answer()
        self.status, self.taken = hello["status"], hello["taken"]

    @property
    def server(self) -> Lines:
        """The last one started."""
        return self.servers[-1]

    def do(self, op: str, **words: Any) -> Any:
        """A command's result; AssertionError when it fails."""
        self.server.send({"op": op, **words})
        answer = self.server.answer()
        self.status = answer["status"]
        assert answer["ok"], answer["why"]
        return answer["result"]

    def wanted(self, artifact: int = 0) -> set[int]:
        """Pieces that readers want, by the last status."""
        return set(self.status["wanted"][self.artifacts[artifact].id])

    def reader(self) -> Reader:
        made = Reader(self.root / "readers.log")
        self.readers.append(made)
        return made

    def path(self, file: str, artifact: int = 0) -> str:
        return str(self.folder / self.artifacts[artifact].id / file)

    def content(self, file: str, artifact: int = 0) -> bytes:
        return content_of(self.specs[artifact], file)

    def log(self) -> list[dict[str, Any]]:
        """Events of the serving processes."""
        lines = (self.root / "server.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def holder_log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "holder.log").read_text().splitlines()]

    def clean(self) -> None:
        """No process and no mount is left."""
        for found in kernel.mounted_below(self.folder):
            kernel.abort(found.connection)  # a reader that hangs can be killed now
        for child in (*self.readers, *self.servers):
            child.kill()
        if self.folder.is_dir():
            Keeper(self.folder, SystemClock()).end()
        for found in kernel.mounted_below(self.folder):
            kernel.remove_mount_point(found.path)


@contextlib.contextmanager
def rig(forks: Forks, root: Path, artifacts: list[dict[str, Any]], **options: Any) -> Iterator[Rig]:
    """Cleaned up at its end, whatever hangs."""
    made = Rig(forks, root, artifacts, **options)
    try:
        yield made
    finally:
        made.clean()
