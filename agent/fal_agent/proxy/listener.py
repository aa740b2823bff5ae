"""The TCP listener of the data path, and who may send requests over it.

Accepting can be paused, resumed and moved to a new TLS context without closing the socket: connections that arrive
meanwhile wait in the kernel's backlog. That is what makes renewal and hand-over free of refused connections.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_agent.proxy.datapath import DataPath
from fal_agent.proxy.pump import ClientConnection
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, Role
from fal_contract.limits import DATA_HEAD_TIMEOUT_S
from fal_contract.tcp import keep_alive
from fal_contract.tls import client_context, server_context, verify_peer

CALLERS: Final = frozenset({Role.SERVING, Role.OPERATOR, Role.ADMIN})
_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class Credentials:
    """The node's identity as TLS contexts, with the file's stamp to notice a renewal."""

    identity: Identity
    server: ssl.SSLContext
    client: ssl.SSLContext
    stamp: tuple[int, int]  # inode and modification time, ns

    @classmethod
    def load(cls, file: Path) -> Credentials:
        """Raises FalError when there is no usable identity."""
        stamp = stamp_of(file)
        identity = Identity.load(file)
        return cls(identity, server_context(identity), client_context(identity), stamp)


def stamp_of(file: Path) -> tuple[int, int]:
    """Changes whenever the file is replaced; zeros without one."""
    try:
        status = file.stat()
    except OSError:
        return (0, 0)
    return (status.st_ino, status.st_mtime_ns)


class DirectConnection(ClientConnection):
    """A connection that a gateway dialled; `credentials` None: plain TCP, anyone."""

    def __init__(self, path: DataPath, credentials: Credentials | None, clock: Clock) -> None:
        super().__init__(path)
        self._credentials = credentials
        self._clock = clock

    def check_peer(self, transport: asyncio.Transport) -> None:
        keep_alive(transport)
        if self._credentials is not None:
            cluster_id = self._credentials.identity.peer.cluster_id
            self.peer = verify_peer(transport, cluster_id=cluster_id, roles=CALLERS, now_s=self._clock.wall_s())
            self._path.revoked.check(self.peer)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. FalError names an address that is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"cannot listen on {host}:{port}: {os.strerror(exc.errno or 0)}",
            remedy="Choose another port, or stop the process that has it.",
            field="listen",
        ) from None
    return sock


class Listener:
    """Accepts connections on a socket that outlives pauses."""

    def __init__(self, sock: socket.socket, path: DataPath, clock: Clock) -> None:
        self.socket = sock
        self._path = path
        self._clock = clock
        self._credentials: Credentials | None = None
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that are listened on."""
        host, port = self.socket.getsockname()[:2]
        return str(host), int(port)

    async def accept(self, credentials: Credentials | None) -> None:
        """Begin, or go on with other credentials (None: plain TCP)."""
        self.pause()
        self._credentials = credentials
        self._server = await asyncio.get_running_loop().create_server(
            lambda: DirectConnection(self._path, credentials, self._clock),
            sock=self.socket.dup(),
            backlog=_BACKLOG,
            ssl=credentials.server if credentials else None,
            ssl_handshake_timeout=DATA_HEAD_TIMEOUT_S if credentials else None,
        )

    def pause(self) -> None:
        """Accept nothing; connections wait in the kernel."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def resume(self) -> None:
        """Accept again, with the credentials from before."""
        await self.accept(self._credentials)

    def close(self) -> None:
        """Let go of the socket; a successor that holds it goes on."""
        self.pause()
        self.socket.close()
