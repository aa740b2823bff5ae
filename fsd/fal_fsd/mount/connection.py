"""One FUSE connection: the unfinished files of one artifact, and the reads that wait for its pieces.

Invariants: every request is answered once, by the thread that took it, or, while its read waits, by whoever takes it
out of `_waiting` (a piece came, INTERRUPT, time is up, cancelled, failed, closed). A waiting read holds no thread. The
descriptor is closed when the connection is over and no thread uses it. No method touches a path. Requests are taken by
`server`; pieces and orders come from the event loop. One lock guards the state, never held over a look at the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fal_contract.telemetry import get_logger
from fal_fsd.mount import wire
from fal_fsd.mount.access import Access
from fal_fsd.mount.sources import Kept, segments
from fal_fsd.mount.tree import Node, Tree
from fal_fsd.mount.window import AHEAD_BYTES_MAX, IMAGE_AHEAD_BYTES_MAX, Readers
from fal_fsd.mount.wire import Op, Request
from fal_fsd.ports import Part

WAITING_MAX: Final = 4096
_GONE: Final = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.EBADF})
_log = get_logger("fal.mount")
Tell = Callable[[str, Sequence[int], bool], None]


class Gone(Exception):
    """Unmounted and released, or aborted."""


@dataclass(slots=True)
class Read:
    """A read under way. `missing`: the pieces that it waits for. `pid`: the reading thread's."""

    unique: int
    node: Node
    offset: int
    size: int
    pieces: range
    pid: int
    missing: set[int]
    until_s: float = 0.0


class Scratch:
    """A thread's buffers."""

    def __init__(self) -> None:
        self.request = memoryview(bytearray(wire.REQUEST_BYTES_MAX))
        self.answer = memoryview(bytearray(wire.OUT_HEADER_BYTES + wire.READ_BYTES_MAX))


class Connection:
    """See the module. `tell` hears which pieces readers want; `wake(self)` when reads became answerable."""

    def __init__(
        self,
        fd: int,
        part: Part,
        number: int,
        *,
        read_timeout_s: float,
        allow_mmap: bool,
        tell: Tell,
        wake: Callable[[Connection], None],
        access: Access | None = None,
    ) -> None:
        self.fd = fd
        self.number = number
        self.artifact_id = part.artifact.id
        self.ready: deque[Read] = deque()  # all pieces are here; any thread answers
        self.answered_bytes = 0
        self._artifact = part.artifact
        self._source: Part | Kept = part
        self._layout = part.artifact.layout
        self._tree = Tree(part.artifact)
        self._read_timeout_s = read_timeout_s
        self._allow_mmap = allow_mmap
        self._tell, self._wake, self._access = tell, wake, access
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        ahead_bytes_max = IMAGE_AHEAD_BYTES_MAX if part.artifact.kind == "image" else AHEAD_BYTES_MAX
        self._readers = Readers(self._layout.piece_bytes, ahead_bytes_max)
        self._serving: dict[int, bool] = {}  # taken and not yet answered or waiting → interrupted meanwhile
        self._waiting: dict[int, Read] = {}  # oldest first
        self._by_piece: dict[int, set[int]] = {}
        self._refused = ""  # why absent pieces will not come
        self._users = 0
        self._over = False
        self._handle = 0

    # ---- threads of the server

    def enter(self) -> bool:
        """Use the descriptor until `leave`; False when it is over."""
        with self._lock:
            self._users += not self._over
            return not self._over

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._over and not self._users
        if last:
            self._close()

    def serve_one(self, scratch: Scratch, now_s: float) -> bool:
        """Take a request and answer it or let it wait; False when there is none. Raises Gone."""
        try:
            count = os.readv(self.fd, [scratch.request])
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno in _GONE:
                raise Gone(exc.strerror) from None
            if exc.errno in (errno.ENOENT, errno.EINTR):  # interrupted before we took it
                return True
            raise
        request = wire.parse(scratch.request[:count])
        with self._lock:
            self._serving[request.unique] = False
        try:
            waits = self._handle_request(request, scratch, now_s)
        except Exception:  # whatever it is, the reader gets an answer
            _log.exception("request_failed", artifact=self.artifact_id, opcode=request.opcode)
            waits = False
            self._send(wire.error(request.unique, errno.EIO))
        if not waits:
            self._done(request.unique)
        return True

    def answer_ready(self, scratch: Scratch) -> None:
        """Answer the reads whose pieces came."""
        while True:
            try:
                read = self.ready.popleft()
            except IndexError:
                return
            self._answer(read, scratch)
            self._done(read.unique)

    def expire(self, now_s: float) -> None:
        """End the reads whose time is up."""
        with self._lock:
            late = []
            for read in self._waiting.values():
                if read.until_s > now_s:
                    break
                late.append(read)
            for read in late:
                self._forget(read)
        for read in late:
            self._refuse(read, f"no piece came for {self._read_timeout_s:g} s")

    @property
    def waits(self) -> bool:
        """Whether a read waits."""
        return bool(self._waiting)

    # ---- the event loop (and its threads)

    def has(self, piece: int) -> bool:
        """Whether it is here."""
        return self._source.has(piece)

    def arrived(self, piece: int) -> None:
        """Reads that waited for nothing else go on."""
        with self._lock:
            come = False
            for unique in self._by_piece.pop(piece, ()):
                read = self._waiting[unique]
                read.missing.discard(piece)
                if not read.missing:
                    self._forget(read)
                    self._serving[unique] = False
                    self.ready.append(read)
                    come = True
        if come:
            self._wake(self)

    def renew(self, part: Part) -> None:
        """The artifact is being fetched again, into this part."""
        with self._lock:
            self._source, self._refused = part, ""
            wanted = set(self._by_piece)
        for piece in wanted:
            if part.has(piece):
                self.arrived(piece)

    def refuse(self, reason: str) -> None:
        """Absent pieces will not come: reads of them end with EIO, now and later."""
        with self._lock:
            self._refused = reason
            ended = self._take_all()
        for read in ended:
            self._refuse(read, reason)

    def cancel(self, of_reader: Callable[[int], bool]) -> int:
        """End the waits of the threads that `of_reader` picks with EINTR; how many."""
        with self._lock:
            asked = list(self._waiting.values())
        picked = [read for read in asked if of_reader(read.pid)]
        with self._lock:
            ended = [read for read in picked if read.unique in self._waiting]
            for read in ended:
                self._forget(read)
        for read in ended:
            self._send(wire.error(read.unique, errno.EINTR))
        return len(ended)

    def keep_bytes(self) -> None:
        """The part may go after this: read on what is here, from descriptors of our own. Blocks."""
        if isinstance(self._source, Kept):
            return
        try:
            kept = Kept(self._source)
        except OSError as exc:  # too many open files
            _log.error("bytes_not_kept", artifact=self.artifact_id, why=exc.strerror)
            kept = Kept(self._source, nothing=True)
        with self._lock:
            self._source = kept

    def quiet(self, timeout_s: float) -> bool:
        """Wait until no request is being answered; False: one hangs. Blocks."""
        with self._quiet:
            return self._quiet.wait_for(lambda: not self._serving, timeout_s)

    def end(self) -> None:
        """It is over: no thread takes more of it, the descriptor is closed once none uses it."""
        with self._lock:
            first, self._over = not self._over, True
            wanted = self._readers.wanted
            now = first and not self._users
        if first and wanted:
            self._tell(self.artifact_id, sorted(wanted), False)
        if now:
            self._close()

    def notify_resend(self) -> None:
        """Ask for what a dead server had taken. Raises OSError where the kernel cannot."""
        os.write(self.fd, wire.resend_notice())

    # ---- inside

    def _close(self) -> None:
        os.close(self.fd)
        if isinstance(self._source, Kept):
            self._source.close()

    def _done(self, unique: int) -> None:
        with self._lock:
            self._serving.pop(unique, None)
            if not self._serving:
                self._quiet.notify_all()

    def _handle_request(self, request: Request, scratch: Scratch, now_s: float) -> bool:
        """Answer it; True: it waits."""
        opcode, unique = request.opcode, request.unique
        if opcode == Op.READ:
            return self._read(request, scratch, now_s)
        if opcode == Op.INTERRUPT:
            self._interrupt(request)
        elif opcode in wire.UNANSWERED:
            pass
        elif opcode == Op.INIT:
            self._send(wire.init_reply(unique, wire.offer_of(request.body), allow_mmap=self._allow_mmap))
        elif opcode == Op.STATFS:
            bytes_total = self._artifact.bytes_total
            self._send(wire.statfs_reply(unique, bytes_total=bytes_total, files=len(self._tree)))
        elif opcode in (Op.RELEASE, Op.RELEASEDIR):
            self._release(wire.number_of(request.body))
            self._send(wire.reply(unique))
        elif opcode == Op.DESTROY:
            self._send(wire.reply(unique))
        elif opcode in (Op.LOOKUP, Op.GETATTR, Op.OPEN, Op.OPENDIR, Op.READDIR):
            node = self._tree.node(request.nodeid)
            self._send(wire.error(unique, errno.ESTALE) if node is None else self._about(node, request))
        else:
            self._send(wire.error(unique, wire.refusal(opcode)))
        return False

    def _about(self, node: Node, request: Request) -> bytes:
        """The answer to a question about a node."""
        unique = request.unique
        if request.opcode == Op.LOOKUP:
            child = self._tree.child(node.number, wire.name_of(request.body))
            return wire.error(unique, errno.ENOENT) if child is None else wire.entry_reply(unique, child.attr)
        if request.opcode == Op.GETATTR:
            return wire.attr_reply(unique, node.attr)
        if request.opcode == Op.READDIR:
            _, offset, size = wire.read_of(request.body)
            return wire.reply(unique, wire.listing(self._tree.listing(node), offset=offset, size=size))
        if request.opcode == Op.OPENDIR:
            return wire.open_reply(unique, 0, 0) if node.folder else wire.error(unique, errno.ENOTDIR)
        if node.folder:
            return wire.error(unique, errno.EISDIR)
        with self._lock:
            self._handle += 1
            # Low bits of the process keep handles of an earlier server's opens apart from ours.
            handle = self._handle << 24 | os.getpid() & 0xFFFFFF
        return wire.open_reply(unique, handle, wire.FOPEN_DIRECT_IO)

    def _release(self, handle: int) -> None:
        with self._lock:
            self._say(self._readers.release(handle), False)

    def _read(self, request: Request, scratch: Scratch, now_s: float) -> bool:
        node = self._tree.node(request.nodeid)
        if node is None or node.folder:
            self._send(wire.error(request.unique, errno.ESTALE if node is None else errno.EISDIR))
            return False
        handle, offset, size = wire.read_of(request.body)
        size = min(size, wire.READ_BYTES_MAX, max(node.size_bytes - offset, 0))
        if not size:
            self._send(wire.reply(request.unique))
            return False
        pieces = self._layout.covering(node.file, offset, size)
        self._follow(handle, pieces, self._layout.of_file(node.file))
        missing = {piece for piece in pieces if not self._source.has(piece)}
        read = Read(request.unique, node, offset, size, pieces, request.pid, missing)
        if missing and self._wait(read, now_s):
            return True
        if not missing:
            self._answer(read, scratch)
        return False

    def _follow(self, handle: int, pieces: range, of_file: range) -> None:
        with self._lock:  # told under the lock: in the order in which it happened
            wanted, gone = self._readers.read(handle, pieces, of_file)
            if self._access is not None:
                self._access.note(pieces)
            self._say(wanted, True)
            self._say(gone, False)

    def _say(self, pieces: Sequence[int], wanted: bool) -> None:
        if pieces:
            self._tell(self.artifact_id, pieces, wanted)

    def _wait(self, read: Read, now_s: float) -> bool:
        """Let it wait; False: it was answered with an error or its pieces have just come (`missing` is empty)."""
        with self._lock:
            interrupted = self._serving.get(read.unique, False)
            reason = self._refused or ("too many reads wait" if len(self._waiting) >= WAITING_MAX else "")
            if not interrupted and not reason:
                read.until_s = now_s + self._read_timeout_s
                self._serving.pop(read.unique, None)
                self._waiting[read.unique] = read
                self._say(self._readers.take(read.pieces), True)
                for piece in read.missing:
                    self._by_piece.setdefault(piece, set()).add(read.unique)
        if interrupted:
            self._send(wire.error(read.unique, errno.EINTR))
            return False
        if reason:
            self._refuse(read, reason)
            return False
        for piece in read.pieces:  # what came between the look and the entry
            if self._source.has(piece):
                self.arrived(piece)
        return True

    def _interrupt(self, request: Request) -> None:
        """The reader was killed or got a signal: its wait is over at once."""
        target = wire.number_of(request.body)
        with self._lock:
            read = self._waiting.get(target)
            if read is not None:
                self._forget(read)
            elif target in self._serving:
                self._serving[target] = True
                return
        # Unknown: another thread has taken it this moment. EAGAIN lets the kernel say it again, if it is still open.
        unique, number = (request.unique, errno.EAGAIN) if read is None else (read.unique, errno.EINTR)
        self._send(wire.error(unique, number))

    def _answer(self, read: Read, scratch: Scratch) -> None:
        """All its pieces are here: the bytes, straight from the file into our buffer and from there to the reader."""
        head, filled = wire.OUT_HEADER_BYTES, 0
        try:
            found = segments(self._source, read.pieces, read.offset, read.size)
            if found is None:
                self._refuse(read, "a piece was discarded: its bytes were wrong")
                return
            for fd, offset, size in found:
                while size:
                    count = os.preadv(fd, [scratch.answer[head + filled : head + filled + size]], offset)
                    if not count:
                        raise OSError(errno.EIO, "the file on disk is too short")
                    filled, offset, size = filled + count, offset + count, size - count
        except OSError as exc:
            self._refuse(read, f"the disk: {exc.strerror}")
            return
        wire.put_header(scratch.answer, read.unique, filled)
        self._send(scratch.answer[: head + filled])
        self.answered_bytes += filled

    def _refuse(self, read: Read, reason: str) -> None:
        path = self._artifact.files[read.node.file].path
        waited = sorted(read.missing)
        _log.warning(
            "read_ends_with_eio",
            artifact=self.artifact_id,
            file=path,
            offset=read.offset,
            size=read.size,
            pieces=waited[:8],
            pid=read.pid,
            why=reason,
        )
        self._send(wire.error(read.unique, errno.EIO))

    def _send(self, answer: bytes | memoryview) -> None:
        """A request that is not there any more (interrupted, aborted) needs no answer."""
        try:
            os.write(self.fd, answer)
        except OSError as exc:
            if exc.errno not in _GONE and exc.errno != errno.ENOENT:
                _log.error("answer_refused", artifact=self.artifact_id, why=exc.strerror)
                with contextlib.suppress(OSError):  # a reader's memory that cannot be written (EFAULT)
                    os.write(self.fd, wire.error(int.from_bytes(answer[8:16], "little"), errno.EIO))

    def _forget(self, read: Read) -> None:
        """Take it out of the tables. Under the lock."""
        del self._waiting[read.unique]
        self._say(self._readers.give_back(read.pieces), False)
        for piece in read.missing:
            found = self._by_piece[piece]
            found.discard(read.unique)
            if not found:
                del self._by_piece[piece]

    def _take_all(self) -> Iterable[Read]:
        taken = list(self._waiting.values())
        for read in taken:
            self._forget(read)
        return taken


__all__ = ["WAITING_MAX", "Connection", "Gone", "Scratch"]
