"""Keeps the /dev/fuse descriptors of fsd's mounts over fsd's death. A program of its own; standard library only.

    python -I -S holder.py FOLDER [ORPHAN_S [KEEP_S]]

Serves a SOCK_SEQPACKET socket FOLDER/holder.sock: one JSON message each way, a descriptor beside it.

    {"op": "hello"}                     → {"ok": true, "version": 1, "pid": …}
    {"op": "put", "key": K, "about": …} + descriptor      keep it
    {"op": "list"}                      → {"ok": true, "held": {K: about, …}}
    {"op": "take", "key": K}            → {"ok": true} + descriptor; it is kept here, too
    {"op": "note", "key": K, "about": …}                  says something else about it
    {"op": "drop", "key": K}                              close it
    {"op": "lease"}                     this connection serves: while it is open, the holder touches no request
    {"op": "end"}                                         close all and end

Invariant: a dead fsd leaves no reader hanging. When nobody has held the lease for ORPHAN_S seconds, the kernel is asked
to send again what the dead one had taken, and every request is answered EIO until a lease is there again. Where the
kernel cannot, the descriptor is closed, which ends the connection and all its requests. After KEEP_S seconds without a
lease, or ORPHAN_S with nothing to keep, the holder ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass, field

VERSION = 1
SOCKET_NAME = "holder.sock"
ORPHAN_S = 20.0
KEEP_S = 3600.0
START_GRACE_S = 20.0  # more, until whoever started it has come
HELD_MAX = 1024
MESSAGE_BYTES_MAX = 60 << 10
ABOUT_CHARS_MAX = 512
_CLIENTS_MAX = 64
_CLIENT_TIMEOUT_S = 5.0
_REQUEST_BYTES = 64 << 10
_REQUESTS_PER_TURN = 64
_RESEND = struct.pack("=IiQ", 16, 7, 0)
_IN_HEADER = struct.Struct("=IIQ")
_OUT_HEADER = struct.Struct("=IiQ")
_UNANSWERED = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
_DESTROY = 38
_INIT = 26


def say(event: str, **more: object) -> None:
    """One line of JSON on stderr."""
    print(json.dumps({"event": event, "process": "fal-fsd-holder", **more}), file=sys.stderr, flush=True)


@dataclass
class Held:
    """A kept descriptor. `answered`: readers that got EIO from us."""

    fd: int
    about: object
    answered: int = 0


@dataclass
class Holder:
    """See the module."""

    folder: str
    orphan_s: float
    keep_s: float
    held: dict[str, Held] = field(default_factory=dict)
    lease: socket.socket | None = None
    since_s: float = field(default_factory=lambda: time.monotonic() + START_GRACE_S)  # when the lease was last held
    orphaned: bool = False
    ended: bool = False
    buffer: bytearray = field(default_factory=lambda: bytearray(_REQUEST_BYTES))
    poll: select.poll = field(default_factory=select.poll)
    clients: dict[int, socket.socket] = field(default_factory=dict)

    def run(self, listener: socket.socket) -> None:
        """Until ended."""
        self.poll.register(listener, select.POLLIN)
        while not self.ended:
            for fd, _ in self.poll.poll(self._wait_ms()):
                if fd == listener.fileno():
                    self._accept(listener)
                elif fd in self.clients:
                    self._client(self.clients[fd])
                else:
                    self._refuse_requests(fd)
            self._look_at_the_clock()
        for key in list(self.held):
            self._drop(key)

    def _wait_ms(self) -> float | None:
        if self.lease is not None:
            return None
        age_s = time.monotonic() - self.since_s
        until_s = self.orphan_s if age_s < self.orphan_s else self.keep_s
        return max(until_s - age_s, 0.0) * 1000 + 1

    def _look_at_the_clock(self) -> None:
        if self.lease is not None or self.ended:
            return
        age_s = time.monotonic() - self.since_s
        if age_s >= self.keep_s or (age_s >= self.orphan_s and not self.held):
            say("ends", why="nobody served for long", held=len(self.held))
            self.ended = True
        elif age_s >= self.orphan_s and not self.orphaned:
            self.orphaned = True
            say(
                "orphaned",
                why=f"no fsd took the mounts for {self.orphan_s:g} s: reads end with EIO",
                held=len(self.held),
            )
            for key in list(self.held):
                self._resend(key)

    def _resend(self, key: str) -> None:
        fd = self.held[key].fd
        try:
            os.write(fd, _RESEND)
        except OSError as exc:
            say("closed", key=key, why=f"requests cannot be sent again: {exc.strerror}")
            self._drop(key)
            return
        self.poll.register(fd, select.POLLIN)

    def _refuse_requests(self, fd: int) -> None:
        """Answer what waits on an orphan's descriptor with EIO."""
        key = next((key for key, held in self.held.items() if held.fd == fd), None)
        if key is None:
            self.poll.unregister(fd)
            return
        held = self.held[key]
        try:
            for _ in range(_REQUESTS_PER_TURN):
                count = os.readv(fd, [self.buffer])
                _, opcode, unique = _IN_HEADER.unpack_from(self.buffer)
                if opcode == _INIT:  # it never came up; fsd mounts it anew
                    self._drop(key)
                    return
                if opcode not in _UNANSWERED and count >= _IN_HEADER.size:
                    number = 0 if opcode == _DESTROY else -errno.EIO
                    with contextlib.suppress(FileNotFoundError):  # interrupted meanwhile
                        os.write(fd, _OUT_HEADER.pack(_OUT_HEADER.size, number, unique))
                    held.answered += 1
                    if held.answered == 1:
                        say("refused", key=key, why="fsd is away")
        except (BlockingIOError, FileNotFoundError):  # nothing more; or interrupted before we took it
            return
        except OSError as exc:  # unmounted and released, or aborted
            say("gone", key=key, why=exc.strerror)
            self._drop(key)

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        if len(self.clients) >= _CLIENTS_MAX:
            client.close()
            return
        client.settimeout(_CLIENT_TIMEOUT_S)
        self.clients[client.fileno()] = client
        self.poll.register(client, select.POLLIN)

    def _client(self, client: socket.socket) -> None:
        fds: list[int] = []
        try:
            raw, fds, _, _ = socket.recv_fds(client, MESSAGE_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
            if not raw:
                raise ConnectionResetError
            answer, fd = self._answer(client, json.loads(raw), fds)
            body = json.dumps(answer).encode()
            socket.send_fds(client, [body], [fd] if fd is not None else [])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._hang_up(client)
        finally:
            for fd in fds:
                os.close(fd)

    def _hang_up(self, client: socket.socket) -> None:
        self.poll.unregister(client)
        del self.clients[client.fileno()]
        client.close()
        if client is self.lease:
            self.lease, self.since_s = None, time.monotonic()
            say("fsd_left", held=len(self.held))

    def _answer(self, client: socket.socket, message: dict[str, object], fds: list[int]) -> tuple[object, int | None]:
        op, key = message["op"], str(message.get("key", ""))
        if op == "hello":
            return {"ok": True, "version": VERSION, "pid": os.getpid()}, None
        if op == "lease":
            return self._give_lease(client), None
        if op == "list":
            return {"ok": True, "held": {key: held.about for key, held in self.held.items()}}, None
        if op == "put":
            return self._put(key, message.get("about"), fds), None
        if op == "end":
            self.ended = True
            return {"ok": True}, None
        if key not in self.held:
            return {"ok": False, "why": "unknown"}, None
        if op == "take":
            return {"ok": True}, self.held[key].fd
        if op == "note":
            self.held[key].about = message.get("about")
        elif op == "drop":
            self._drop(key)
        else:
            return {"ok": False, "why": "no such op"}, None
        return {"ok": True}, None

    def _give_lease(self, client: socket.socket) -> object:
        if self.lease is not None and self.lease is not client:
            return {"ok": False, "why": "another fsd serves"}
        if self.orphaned:
            for held in self.held.values():
                with contextlib.suppress(KeyError):
                    self.poll.unregister(held.fd)
                held.answered = 0
        self.lease, self.orphaned = client, False
        return {"ok": True}

    def _put(self, key: str, about: object, fds: list[int]) -> object:
        if not fds or not key:
            return {"ok": False, "why": "no descriptor"}
        if len(self.held) >= HELD_MAX or len(json.dumps(about)) > ABOUT_CHARS_MAX:
            return {"ok": False, "why": "too much"}
        self._drop(key)
        self.held[key] = Held(os.dup(fds[0]), about)
        return {"ok": True}

    def _drop(self, key: str) -> None:
        held = self.held.pop(key, None)
        if held is not None:
            with contextlib.suppress(KeyError):
                self.poll.unregister(held.fd)
            os.close(held.fd)


def _another_is_here() -> bool:
    """Whether the socket answers; one that a dead holder left is removed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        try:
            other.connect(SOCKET_NAME)
        except FileNotFoundError:
            return False
        except ConnectionRefusedError:
            os.unlink(SOCKET_NAME)
            return False
    return True


def main(argv: list[str]) -> int:
    """0: ended in order; 1: another holder serves this folder."""
    folder = argv[1]
    orphan_s = float(argv[2]) if len(argv) > 2 else ORPHAN_S
    keep_s = float(argv[3]) if len(argv) > 3 else KEEP_S
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a stop of fsd's group is not ours; "end" is
    os.chdir(folder)  # a relative name is short enough for any folder
    os.umask(0o177)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        if _another_is_here():
            say("ends", why="another holder is here")
            return 1
        listener.bind(SOCKET_NAME)
        listener.listen(_CLIENTS_MAX)
        Holder(folder, orphan_s, keep_s).run(listener)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET_NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
