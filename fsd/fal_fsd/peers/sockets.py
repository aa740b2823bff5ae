"""Blocking byte streams over TCP and TLS, for one reading and one sending thread each.

Nothing here has a timeout of its own after the handshake: who watches the connection calls `shutdown`, which wakes both
threads. Plain: recv_into and sendfile on a blocking socket. TLS: OpenSSL must not read and write one connection at
once, so both sides take turns under a lock on a socket that never blocks, and wait for it outside the lock.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from fal_contract.identity import Identity, PeerIdentity, peer_of_der
from fal_contract.tls import client_context, replace_certificate, server_context
from fal_fsd.peers.wire import TLS_FIRST_BYTE

TLS_READ_BYTES: Final = 256 << 10  # read from disk at once
TLS_WRITE_BYTES: Final = 64 << 10  # given to OpenSSL at once: as long a reader of this connection waits
TLS_RECORD_BYTES: Final = 16 << 10  # what one SSL_read gives at most
UNSENT_BYTES_MAX: Final = 512 << 10  # in the kernel, not yet sent: what an urgent piece waits behind
Progress = Callable[[], None]


class Stream(Protocol):
    """A connection. `recv_into` by one thread, `send` and `send_file` by another, `shutdown` by any."""

    def recv_into(self, buffer: memoryview) -> int:
        """At least one byte; 0 at the end."""
        ...

    def send(self, data: bytes) -> None: ...

    def send_file(self, head: bytes, fd: int, offset: int, length: int, progress: Progress) -> None:
        """`head`, then so many bytes of a file. OSError when the file is shorter. `progress`: some bytes have left."""
        ...

    def bound_unsent(self, bytes_max: int) -> None:
        """So much may wait in the kernel to be sent: what is sent next waits behind it."""
        ...

    def shutdown(self) -> None: ...

    def close(self) -> None:
        """When no thread uses it any more."""
        ...


class PlainStream:
    """Over TCP."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(None)
        _tune(sock)

    def recv_into(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer)

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def send_file(self, head: bytes, fd: int, offset: int, length: int, progress: Progress) -> None:
        self._sock.sendall(head, socket.MSG_MORE)
        to, end = self._sock.fileno(), offset + length
        while offset < end:
            sent = os.sendfile(to, fd, offset, end - offset)
            if not sent:
                raise OSError("the file has become shorter")
            offset += sent
            progress()

    def bound_unsent(self, bytes_max: int) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, bytes_max)

    def shutdown(self) -> None:
        shut_down(self._sock)

    def close(self) -> None:
        self._sock.close()


class TlsStream:
    """Over TLS, after the handshake."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._buffer = memoryview(bytearray(TLS_READ_BYTES))
        _tune(sock)
        sock.setblocking(False)

    def recv_into(self, buffer: memoryview) -> int:
        at = 0
        while at < len(buffer):
            try:
                with self._lock:
                    count = self._sock.recv_into(buffer[at:])
            except ssl.SSLWantReadError:
                if at:
                    break
                self._wait(select.POLLIN)
                continue
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
                continue
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                break
            if not count:
                break
            at += count
        return at

    def send(self, data: bytes) -> None:
        self._send(memoryview(data))

    def send_file(self, head: bytes, fd: int, offset: int, length: int, progress: Progress) -> None:
        self._send(memoryview(head))
        end = offset + length
        while offset < end:
            count = os.preadv(fd, [self._buffer[: end - offset]], offset)
            if not count:
                raise OSError("the file has become shorter")
            self._send(self._buffer[:count])
            offset += count
            progress()

    def _send(self, view: memoryview) -> None:
        while view:
            block = view[:TLS_WRITE_BYTES]
            try:
                with self._lock:
                    sent = self._sock.send(block)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            else:
                view = view[sent:]

    def _wait(self, events: int) -> None:
        waiter = select.poll()
        waiter.register(self._sock.fileno(), events)
        waiter.poll()

    def bound_unsent(self, bytes_max: int) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, bytes_max)

    def shutdown(self) -> None:
        shut_down(self._sock)

    def close(self) -> None:
        self._sock.close()


class Contexts:
    """Our side of TLS. `identity` is asked each time: a renewed certificate is shown from the next handshake on."""

    def __init__(self, identity: Callable[[], Identity]) -> None:
        self._identity = identity
        self._lock = threading.Lock()
        self._made_of: Identity | None = None
        self._server: ssl.SSLContext | None = None
        self._client: ssl.SSLContext | None = None

    def server(self) -> ssl.SSLContext:
        return self._contexts()[0]

    def client(self) -> ssl.SSLContext:
        return self._contexts()[1]

    def _contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        identity = self._identity()
        with self._lock:
            if self._server is None or self._client is None:
                self._server, self._client = server_context(identity), client_context(identity)
            elif identity != self._made_of:
                replace_certificate(self._server, identity)
                replace_certificate(self._client, identity)
            self._made_of = identity
            return self._server, self._client


def starts_tls(sock: socket.socket) -> bool | None:
    """Whether the first byte is a TLS ClientHello's; None when the peer closed. The byte is left where it is."""
    first = sock.recv(1, socket.MSG_PEEK)
    return first[0] == TLS_FIRST_BYTE if first else None


def shake_hands(
    sock: socket.socket, context: ssl.SSLContext, *, server: bool, hold: Callable[[socket.socket], object]
) -> tuple[TlsStream, PeerIdentity]:
    """TLS over a connected socket, and who is there (of this CA; nothing else is checked).

    The socket is taken over; `hold` is told of the one that stands for it, so that another thread can shut it down.
    """
    secure = context.wrap_socket(sock, server_side=server, do_handshake_on_connect=False)
    hold(secure)
    try:
        secure.do_handshake()
        der = secure.getpeercert(binary_form=True)
        assert der is not None  # the contexts demand one
        return TlsStream(secure), peer_of_der(der)
    except BaseException:
        secure.close()
        raise


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)


def shut_down(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Wake every thread that waits on this socket; it ends. Any thread may call it, on a closed one too."""
    with suppress(OSError):  # not connected any more
        # Not SSLSocket's own method: it would drop the TLS state that the other threads are in.
        socket.socket.shutdown(sock, how)


__all__ = ["Contexts", "PlainStream", "Stream", "TlsStream", "shake_hands", "shut_down", "starts_tls"]
