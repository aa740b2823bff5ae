"""A real etcd for tests and benchmarks: loopback, ephemeral ports, its data under a folder that the caller gives.

fsync stays on. The process is ended by its own pid; `stop`, `kill`, `pause` and `restart` are for fault tests.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

START_TIMEOUT_S = 30.0
START_ATTEMPTS_MAX = 5


def why_no_etcd() -> str:
    """Why etcd tests cannot run here, empty where they can."""
    return "" if shutil.which("etcd") else "the etcd binary is not installed (Debian: apt install etcd-server)"


def free_ports(count: int) -> list[int]:
    """Loopback ports that were free a moment ago; another process may take one, so callers try again."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


class EtcdServer:
    """One etcd member. `with EtcdServer(folder) as etcd: etcd.endpoint` is "127.0.0.1:PORT"."""

    def __init__(self, folder: Path, *, options: tuple[str, ...] = (), scheme: str = "http") -> None:
        """`options`: further flags of etcd; `scheme` "https" where they turn TLS on."""
        self._folder = folder
        self._options = options
        self._scheme = scheme
        self._process: subprocess.Popen[bytes] | None = None
        self._client_port = self._peer_port = 0

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._client_port}"

    def __enter__(self) -> EtcdServer:
        self._folder.mkdir(parents=True, exist_ok=True)
        for _ in range(START_ATTEMPTS_MAX):
            self._client_port, self._peer_port = free_ports(2)
            if self._start():
                return self
            shutil.rmtree(self._folder / "data", ignore_errors=True)
        raise RuntimeError(f"etcd does not start; its log ends:\n{self._log_tail()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def restart(self) -> None:
        """Start again on the same data and ports."""
        self.kill()
        if not self._start():
            raise RuntimeError(f"etcd does not start again; its log ends:\n{self._log_tail()}")

    def kill(self) -> None:
        """kill -9."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=START_TIMEOUT_S)

    def pause(self) -> None:
        """Answer nothing until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _start(self) -> bool:
        client, peer = f"{self._scheme}://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        command = [
            "etcd",
            f"--data-dir={self._folder / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            *self._options,
        ]
        with (self._folder / "etcd.log").open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            if b"ready to serve client requests" in (self._folder / "etcd.log").read_bytes()[begin:]:
                return True
            time.sleep(0.02)
        self.kill()
        return False

    def _log_tail(self) -> str:
        return (self._folder / "etcd.log").read_text(errors="replace")[-2000:]
