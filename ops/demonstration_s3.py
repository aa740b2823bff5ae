"""A real S3 server for the demonstration: rclone over a folder, on loopback, no faster than a distant bucket.

The limit is what makes weights take some seconds, so that a container can be seen to start while they arrive.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

ACCESS_KEY_ID: Final = "falctl-demo"
SECRET_ACCESS_KEY: Final = "falctl-demo-secret"  # of this server alone
RATE: Final = "400k"  # bytes per second, as rclone writes them
_START_TIMEOUT_S: Final = 20.0
_LISTENS: Final = re.compile(r"http://127\.0\.0\.1:(\d+)")


class S3Server:
    """Each folder below `folder` is a bucket. `close` ends it."""

    def __init__(self, folder: Path) -> None:
        program = Path(sys.executable).with_name("rclone")
        self._process = subprocess.Popen(
            [
                *(str(program), "serve", "s3", str(folder), "--config", "", "--addr", "127.0.0.1:0"),
                *("--auth-key", f"{ACCESS_KEY_ID},{SECRET_ACCESS_KEY}", "--bwlimit", RATE),
                *("--vfs-read-wait", "0s", "--dir-cache-time", "0s", "--vfs-cache-mode", "off"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: list[str] = []
        self._port = 0
        self._ready = threading.Event()
        # The pipe is read to its end, or the server would block once it is full.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(_START_TIMEOUT_S) or not self._port:
            self.close()
            raise SystemExit(f"demo: the S3 server did not start: {' '.join(self._said)[-400:]}")

    def credentials(self, file: Path) -> Path:
        """Write what reads from it."""
        file.touch(mode=0o600)
        file.write_text(
            f'[s3]\nendpoint = "http://127.0.0.1:{self._port}"\naccess_key_id = "{ACCESS_KEY_ID}"\n'
            f'secret_access_key = "{SECRET_ACCESS_KEY}"\nregion = "us-east-1"\nallow_http = true\n'
        )
        return file

    def close(self) -> None:
        """End the server that we started."""
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10.0)
        self._reader.join(5.0)
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said = [*self._said[-20:], line.strip()]
            if (found := _LISTENS.search(line)) and not self._port:
                self._port = int(found[1])
                self._ready.set()
        self._ready.set()
