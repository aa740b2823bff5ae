"""What stands for a model server in the bench of predictions: reads all of its model, then says that it is ready.

Serves FAL_SOCKET; /livez answers at once, /readyz 503 until every byte of FAL_MODEL_DIR was read and summed. It reads
as a loader does: in blocks, from start to end, from wherever the cache has put the bytes.
"""

from __future__ import annotations

import os
import socketserver
import threading
import zlib
from http.server import BaseHTTPRequestHandler
from pathlib import Path

BLOCK_BYTES = 4 << 20
READY = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """Two answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        ok = self.path == "/livez" or READY.is_set()
        self.send_response(200 if ok else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """One thread a probe."""

    daemon_threads = True


def main() -> None:
    with Server(os.environ["FAL_SOCKET"], Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for file in sorted(Path(os.environ["FAL_MODEL_DIR"]).rglob("*.safetensors")):
            total = 0
            with file.open("rb", buffering=0) as stream:
                while block := stream.read(BLOCK_BYTES):
                    total = zlib.crc32(block, total)
        READY.set()
        threading.Event().wait()


if __name__ == "__main__":
    main()
