"""The sending process of `bench_fsd_transfer`: one folder, served by our bulk port and by a bare sendfile.

Arguments: the folder with file-0, its ticket key (hexadecimal), and an identity file or `-`. Prints one line of JSON:
{"peer": port, "bare": port}. Ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import sys
import threading
from pathlib import Path

from fsd_parts import FolderPart, artifact_of_folder

from fal_contract.clock import SystemClock
from fal_contract.identity import Identity
from fal_fsd.peers.net import PeerNet

REQUEST = struct.Struct("<QQ")


class NoEvents:
    """It only gives."""

    def __getattr__(self, name: str) -> object:
        return lambda *_, **__: None


def serve_bare(listener: socket.socket, fd: int) -> None:
    """To each caller the range that it asks for, by sendfile."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_give, args=(connection, fd), daemon=True).start()


def _give(connection: socket.socket, fd: int) -> None:
    with connection:
        offset, left = REQUEST.unpack(connection.recv(REQUEST.size, socket.MSG_WAITALL))
        while left:
            sent = os.sendfile(connection.fileno(), fd, offset, left)
            offset, left = offset + sent, left - sent


async def main(folder: Path, key: bytes, identity_file: str) -> None:
    """Serve until nobody is there any more."""
    identity = Identity.load(Path(identity_file)) if identity_file != "-" else None
    part = FolderPart(artifact_of_folder(folder), folder)
    net = PeerNet(
        node_id="holder",
        events=NoEvents(),  # type: ignore[arg-type]
        clock=SystemClock(),
        rng=random.Random(),
        identity=(lambda: identity) if identity is not None else None,
    )
    bound = await net.start()
    net.set_ticket_keys([key])
    net.set_trusted_network(True)
    net.join(part)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_bare, args=(listener, os.open(folder / "file-0", os.O_RDONLY)), daemon=True).start()
    print(json.dumps({"peer": bound[0].port, "bare": listener.getsockname()[1]}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await net.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3]))
