"""The kernel's side of FUSE: requests in, replies out, as bytes. Pure.

Written from the kernel's protocol header, `include/uapi/linux/fuse.h` (protocol 7.31 and later; structures of a fixed
length in native byte order, padded to 64 bits). Only what a read-only file system of regular files needs is here; all
other requests are known by number and answered with an error number. Nothing is read from or written to anything.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

ROOT_NODE: Final = 1
MINOR: Final = 41  # of protocol 7; the kernel uses the smaller of its own and this
MINOR_MIN: Final = 31
READ_BYTES_MAX: Final = 1 << 20
WRITE_BYTES_MAX: Final = 4096  # nobody writes; the least that the kernel takes
REQUEST_BYTES_MAX: Final = 64 << 10  # a buffer to read requests into: names have at most 1 KiB, batches are cut to fit
NAME_BYTES_MAX: Final = 1024
PAGE_BYTES: Final = 4096
BACKGROUND_MAX: Final = 64  # reads ahead of a mapping under way at once
NOTIFY_RESEND: Final = 7

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_CACHE_DIR: Final = 1 << 3

INIT_ASYNC_READ: Final = 1 << 0
INIT_PARALLEL_DIROPS: Final = 1 << 18
INIT_ABORT_ERROR: Final = 1 << 21
INIT_MAX_PAGES: Final = 1 << 22
INIT_EXT: Final = 1 << 30
INIT_DIRECT_IO_ALLOW_MMAP: Final = 1 << 36
INIT_HAS_RESEND: Final = 1 << 39
_WANTED: Final = INIT_ASYNC_READ | INIT_PARALLEL_DIROPS | INIT_ABORT_ERROR | INIT_MAX_PAGES | INIT_EXT | INIT_HAS_RESEND

MODE_FILE: Final = 0o100444
MODE_FOLDER: Final = 0o040555
_TYPE_FOLDER: Final = 4
_TYPE_FILE: Final = 8

_IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_INIT_IN: Final = struct.Struct("=IIII")
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHII24x")
_READ_IN: Final = struct.Struct("=QQIIQII")
_U64: Final = struct.Struct("=Q")
_ATTR: Final = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY_OUT: Final = struct.Struct("=QQQQII")
_ATTR_OUT: Final = struct.Struct("=QII")
_OPEN_OUT: Final = struct.Struct("=QII")
_STATFS_OUT: Final = struct.Struct("=QQQQQIIII24x")
_DIRENT: Final = struct.Struct("=QQII")
OUT_HEADER_BYTES: Final = _OUT_HEADER.size


class Op(IntEnum):
    """Requests that are answered with more than an error number, or with none."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


# Requests that would change something; the mount is read-only, so only a kernel that changed its mind sends them.
_CHANGES: Final = frozenset((4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51))
UNANSWERED: Final = frozenset((Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT))


class WireError(ValueError):
    """These bytes are no request of the kernel's."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `pid` is the thread's. `body` is a view of the buffer that it was read into."""

    opcode: int
    unique: int
    nodeid: int
    pid: int
    body: memoryview


@dataclass(frozen=True, slots=True)
class Attr:
    """What stat() shows of a node."""

    nodeid: int
    size_bytes: int
    folder: bool

    def pack(self) -> bytes:
        """struct fuse_attr."""
        mode, links = (MODE_FOLDER, 2) if self.folder else (MODE_FILE, 1)
        blocks = -(-self.size_bytes // 512)
        return _ATTR.pack(self.nodeid, self.size_bytes, blocks, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, PAGE_BYTES, 0)


@dataclass(frozen=True, slots=True)
class Offer:
    """What the kernel says in INIT."""

    minor: int
    readahead_bytes: int
    flags: int

    @property
    def resend(self) -> bool:
        """It can send again what a dead server had taken."""
        return bool(self.flags & INIT_HAS_RESEND)

    @property
    def allow_mmap(self) -> bool:
        """Files past the page cache may be mapped MAP_SHARED."""
        return bool(self.flags & INIT_DIRECT_IO_ALLOW_MMAP)


def parse(raw: memoryview) -> Request:
    """The request in exactly these bytes. Raises WireError."""
    if len(raw) < _IN_HEADER.size:
        raise WireError(f"{len(raw)} bytes are no request")
    length, opcode, unique, nodeid, _uid, _gid, pid, extension, _ = _IN_HEADER.unpack_from(raw)
    end = length - 8 * extension
    if length != len(raw) or end < _IN_HEADER.size:
        raise WireError(f"a request of {len(raw)} bytes says {length}")
    return Request(opcode, unique, nodeid, pid, raw[_IN_HEADER.size : end])


def read_of(body: memoryview) -> tuple[int, int, int]:
    """(handle, offset, size in bytes) of READ and READDIR. Raises WireError."""
    handle, offset, size, _, _, _, _ = _unpack(_READ_IN, body)
    return handle, offset, size


def name_of(body: memoryview) -> str:
    """The name in LOOKUP. Raises WireError."""
    raw = bytes(body[: NAME_BYTES_MAX + 1])
    end = raw.find(0)
    if end < 0:
        raise WireError("a name has no end")
    return raw[:end].decode(errors="surrogateescape")


def number_of(body: memoryview) -> int:
    """The first 64 bits: the handle in RELEASE, the request that INTERRUPT means. Raises WireError."""
    return int(_unpack(_U64, body)[0])


def offer_of(body: memoryview) -> Offer:
    """INIT. Raises WireError, also for a protocol that is too old or another."""
    major, minor, readahead_bytes, flags = _unpack(_INIT_IN, body)
    if major != 7 or minor < MINOR_MIN:
        raise WireError(f"the kernel speaks FUSE {major}.{minor}; 7.{MINOR_MIN} is needed")
    if flags & INIT_EXT and len(body) >= _INIT_IN.size + 4:
        flags |= int.from_bytes(body[_INIT_IN.size : _INIT_IN.size + 4], "little" if _LITTLE else "big") << 32
    return Offer(minor, readahead_bytes, flags)


_LITTLE: Final = struct.pack("=H", 1) == b"\x01\x00"


def init_reply(unique: int, offer: Offer, *, allow_mmap: bool = True) -> bytes:
    """What we want of what is offered: reads of 1 MiB, mappings of unfinished files, nothing cached by itself."""
    flags = offer.flags & (_WANTED | (INIT_DIRECT_IO_ALLOW_MMAP if allow_mmap else 0))
    body = _INIT_OUT.pack(
        7,
        min(MINOR, offer.minor),
        READ_BYTES_MAX,
        flags & 0xFFFFFFFF,
        BACKGROUND_MAX,
        BACKGROUND_MAX * 3 // 4,
        WRITE_BYTES_MAX,
        1,
        READ_BYTES_MAX // PAGE_BYTES,
        0,
        flags >> 32,
        0,
    )
    return reply(unique, body)


def reply(unique: int, body: bytes = b"") -> bytes:
    """A good answer."""
    return _OUT_HEADER.pack(OUT_HEADER_BYTES + len(body), 0, unique) + body


def error(unique: int, number: int) -> bytes:
    """An answer with an error number (`errno`, positive)."""
    return _OUT_HEADER.pack(OUT_HEADER_BYTES, -number, unique)


def put_header(buffer: memoryview, unique: int, body_bytes: int) -> None:
    """Head of an answer whose body stands at `buffer[OUT_HEADER_BYTES:]` already."""
    _OUT_HEADER.pack_into(buffer, 0, OUT_HEADER_BYTES + body_bytes, 0, unique)


def entry_reply(unique: int, attr: Attr) -> bytes:
    """LOOKUP. Nothing is kept by the kernel: an artifact's tree goes when it is finished."""
    return reply(unique, _ENTRY_OUT.pack(attr.nodeid, 0, 0, 0, 0, 0) + attr.pack())


def attr_reply(unique: int, attr: Attr) -> bytes:
    """GETATTR."""
    return reply(unique, _ATTR_OUT.pack(0, 0, 0) + attr.pack())


def open_reply(unique: int, handle: int, flags: int) -> bytes:
    """OPEN and OPENDIR."""
    return reply(unique, _OPEN_OUT.pack(handle, flags, 0))


def statfs_reply(unique: int, *, bytes_total: int, files: int) -> bytes:
    """STATFS: all taken, nothing free."""
    blocks = -(-bytes_total // PAGE_BYTES)
    return reply(unique, _STATFS_OUT.pack(blocks, 0, 0, files, 0, PAGE_BYTES, 255, PAGE_BYTES, 0))


def listing(entries: Iterable[tuple[int, bool, str]], *, offset: int, size: int) -> bytes:
    """READDIR's body: (node, is a folder, name) from entry number `offset` on, as many as fit into `size` bytes."""
    out = bytearray()
    for number, (nodeid, folder, name) in enumerate(entries):
        if number < offset:
            continue
        raw = name.encode(errors="surrogateescape")
        row = _DIRENT.pack(nodeid, number + 1, len(raw), _TYPE_FOLDER if folder else _TYPE_FILE) + raw
        row += bytes(-len(row) % 8)
        if len(out) + len(row) > size:
            break
        out += row
    return bytes(out)


def resend_notice() -> bytes:
    """Asks the kernel to send all requests again that were taken and not answered (Linux 6.9)."""
    return _OUT_HEADER.pack(OUT_HEADER_BYTES, NOTIFY_RESEND, 0)


def refusal(opcode: int) -> int:
    """The error number for a request that we do not serve."""
    return errno.EROFS if opcode in _CHANGES else errno.ENOSYS


def _unpack(shape: struct.Struct, body: memoryview) -> tuple[int, ...]:
    if len(body) < shape.size:
        raise WireError(f"a body of {len(body)} bytes is too short")
    return shape.unpack_from(body)
