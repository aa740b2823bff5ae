"""The floor under a proxy: `python proxy_relay_child.py SOCKET` passes bytes between TCP and the worker's socket.

Knows no HTTP, checks nothing, has two blocking threads a connection. Prints its port once it listens.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

READ_BYTES = 128 << 10  # of those tried the size that costs the least


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Until either side ends."""
    view = memoryview(bytearray(READ_BYTES))
    with contextlib.suppress(OSError):
        while count := source.recv_into(view):
            sink.sendall(view[:count])
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def main(path: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            client, _ = server.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            worker = socket.socket(socket.AF_UNIX)
            worker.connect(path)
            for ends in ((client, worker), (worker, client)):
                threading.Thread(target=pump, args=ends, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
