"""The bulk port's frames: codec and bounds. Pure.

A frame is a head of 48 bytes, little endian, and `length` bytes of body:

    magic u16 · type u8 · flags u8 · a u32 · b u32 · length u32 · artifact id (32 bytes, zeros: none)

Its first byte is never 0x16, so one port can serve TLS too. Pieces travel in DATA frames of at most 1 MiB: a = piece,
b = offset in it; other frames, and blocks of more urgent pieces, may come between two blocks. Texts are UTF-8.

The dialler says HELLO, the dialled side HELLO_OK or REFUSED; then both sides speak as equals. JOIN of one side and of
the other make a swarm's neighbours of them; a JOIN that is no reply is replied to. After that REQ, HAVE, LEASE … .

`Decoder` takes bytes as they come, however they are split, and gives frames; the bytes of DATA are given as views of
what was fed, uncopied. WireError: what came is no frame of ours, or beyond a bound; the connection has to be closed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Final

from fal_contract.pieces import BLAKE3_BYTES, PIECES_MAX
from fal_contract.ticket import TICKET_BYTES
from fal_fsd.core.messages import Claim, Lease
from fal_fsd.peers.frames import (
    Busy,
    Bye,
    Cancel,
    Cert,
    Claims,
    DataHead,
    Frame,
    Have,
    Hello,
    HelloOk,
    Join,
    LeaseTold,
    Leave,
    Meta,
    NotHere,
    Ping,
    Pong,
    Refused,
    Req,
)  # fmt: skip

VERSION: Final = 1
HEAD: Final = struct.Struct("<HBBIII32s")
MAGIC: Final = 0xFA1C
TLS_FIRST_BYTE: Final = 0x16
BLOCK_BYTES_MAX: Final = 1 << 20
META_BYTES_MAX: Final = 4 << 20
BODY_BYTES_MAX: Final = (64 << 10) + 64
TEXT_BYTES_MAX: Final = 512
NAME_BYTES_MAX: Final = 80
TICKETS_MAX: Final = 64
PIECES_PER_FRAME_MAX: Final = 4096
CLAIMS_PER_FRAME_MAX: Final = 256
CERT_BYTES_MAX: Final = 8 << 10
RETRY_MS_MAX: Final = 600_000
_NO_ARTIFACT: Final = bytes(32)
_CLAIM: Final = struct.Struct("<I32sBB")
_HELLO: Final = struct.Struct("<HHBBBB")


class WireError(Exception):
    """What came is no frame of ours."""


class Kind(IntEnum):
    """Types of frames. Numbers are never used again."""

    HELLO = 1
    HELLO_OK = 2
    REFUSED = 3
    JOIN = 4
    LEAVE = 5
    HAVE = 6
    REQ = 7
    DATA = 8
    BUSY = 9
    NOT_HERE = 10
    CANCEL = 11
    LEASE = 12
    CERT = 13
    CLAIM = 14
    META = 15
    PING = 16
    PONG = 17
    BYE = 18


_Head = tuple[Kind, int, int, int, str]  # type, flags, a, b, artifact id


def encode(frame: Frame) -> bytes:
    """The bytes of a frame; of DATA the head alone. ValueError beyond a bound."""
    match frame:
        case DataHead():
            flags = frame.last | frame.aborted << 1
            return _head(Kind.DATA, flags, frame.piece, frame.offset, frame.length, frame.artifact_id)
        case Have() | Req() | Busy() | NotHere() | Cancel():
            return _of_pieces(frame)
        case Hello():
            return _frame(Kind.HELLO, _hello_body(frame))
        case HelloOk():
            return _frame(Kind.HELLO_OK, _names(frame.node_id, frame.cache_id), a=frame.version)
        case Refused():
            return _frame(Kind.REFUSED, _text(frame.reason), artifact_id=frame.artifact_id)
        case Join():
            body = frame.ticket + frame.bitmap
            return _frame(Kind.JOIN, body, frame.reply, len(frame.ticket), artifact_id=frame.artifact_id)
        case LeaseTold(artifact_id, lease, ended):
            body = struct.pack("<Q", lease.epoch) + _name(lease.holder)
            return _frame(Kind.LEASE, body, ended, lease.first, lease.count, artifact_id)
        case Claims():
            return _frame(Kind.CLAIM, b"".join(map(_claim, frame.claims)), artifact_id=frame.artifact_id)
        case Meta():
            flags = (frame.body is not None) | (not frame.found) << 1
            return _frame(Kind.META, frame.body or b"", flags, frame.number, artifact_id=frame.id)
        case Leave():
            return _frame(Kind.LEAVE, artifact_id=frame.artifact_id)
        case Cert():
            return _frame(Kind.CERT, frame.der)
        case Ping():
            return _frame(Kind.PING)
        case Pong():
            return _frame(Kind.PONG)
        case Bye():
            return _frame(Kind.BYE, _text(frame.reason))


def _head(kind: Kind, flags: int, a: int, b: int, length: int, artifact_id: str) -> bytes:
    return HEAD.pack(MAGIC, kind, flags, a, b, length, bytes.fromhex(artifact_id) or _NO_ARTIFACT)


def _frame(kind: Kind, body: bytes = b"", flags: int = 0, a: int = 0, b: int = 0, artifact_id: str = "") -> bytes:
    if len(body) > (META_BYTES_MAX if kind is Kind.META else BODY_BYTES_MAX):
        raise ValueError(f"{kind.name} of {len(body)} bytes is too long")
    return _head(kind, flags, a, b, len(body), artifact_id) + body


def _of_pieces(frame: Have | Req | Busy | NotHere | Cancel) -> bytes:
    kind = _PIECE_KINDS[type(frame)]
    if not 0 < len(frame.pieces) <= PIECES_PER_FRAME_MAX:
        raise ValueError(f"{kind.name} of {len(frame.pieces)} pieces")
    body = struct.pack(f"<{len(frame.pieces)}I", *frame.pieces)
    urgent = isinstance(frame, Req) and frame.urgent
    a = frame.retry_ms if isinstance(frame, Busy) else 0
    return _frame(kind, body, urgent, a, artifact_id=frame.artifact_id)


_PIECE_KINDS: Final = {
    Have: Kind.HAVE, Req: Kind.REQ, Busy: Kind.BUSY, NotHere: Kind.NOT_HERE, Cancel: Kind.CANCEL,
}  # fmt: skip


def _hello_body(frame: Hello) -> bytes:
    names = [frame.cluster_id.encode(), frame.node_id.encode(), frame.cache_id.encode()]
    if len(frame.tickets) > TICKETS_MAX or max(map(len, names)) > NAME_BYTES_MAX:
        raise ValueError("HELLO is too long")
    head = _HELLO.pack(frame.version_min, frame.version_max, *map(len, names), len(frame.tickets))
    tickets = [bytes.fromhex(id) + ticket for id, ticket in frame.tickets if len(ticket) == TICKET_BYTES]
    if len(tickets) != len(frame.tickets):
        raise ValueError("a ticket has the wrong length")
    return b"".join([head, *names, *tickets])


def _names(*names: str) -> bytes:
    return b"".join(map(_name, names))


def _name(name: str) -> bytes:
    raw = name.encode()
    if len(raw) > NAME_BYTES_MAX:
        raise ValueError(f"{name[:80]!r} is too long")
    return bytes([len(raw)]) + raw


def _text(text: str) -> bytes:
    return text.encode()[:TEXT_BYTES_MAX].decode(errors="ignore").encode()


def _claim(claim: Claim) -> bytes:
    signer = claim.signer.encode()
    if len(signer) > NAME_BYTES_MAX or len(claim.digest) != BLAKE3_BYTES or len(claim.signature) > 255:
        raise ValueError("a claim is too long")
    return _CLAIM.pack(claim.piece, claim.digest, len(signer), len(claim.signature)) + signer + claim.signature


class Decoder:
    """Bytes in, frames out. `meta_allowed`: manifests are expected; else an answer with one is refused."""

    def __init__(self) -> None:
        self.meta_allowed = False
        self._held = bytearray()
        self._need = HEAD.size
        self._head: _Head | None = None
        self._data_left = 0

    def feed(self, data: memoryview) -> Iterator[Frame | memoryview]:
        """Frames, and views of the bytes that follow a DataHead. To be used up before the next `feed`."""
        at, end = 0, len(data)
        while at < end:
            if self._data_left:
                block = data[at : at + self._data_left]
                at += len(block)
                self._data_left -= len(block)
                yield block
                continue
            part = data[at : at + self._need - len(self._held)]
            at += len(part)
            self._held += part
            if len(self._held) == self._need:
                yield from self._whole()

    def _whole(self) -> Iterator[Frame]:
        """A head or a body is complete."""
        raw = bytes(self._held)
        self._held.clear()
        head = self._head
        if head is None:
            head, length = self._read_head(raw)
            if head[0] is Kind.DATA:
                self._data_left = length
                yield _data_head(*head[1:4], length, head[4])
                return
            if length:
                self._head, self._need = head, length
                return
            raw = b""
        self._head, self._need = None, HEAD.size
        try:
            yield _decode(*head, raw)
        except (struct.error, IndexError, UnicodeDecodeError):
            raise WireError(f"{head[0].name} of {len(raw)} bytes cannot be read") from None

    def _read_head(self, raw: bytes) -> tuple[_Head, int]:
        magic, number, flags, a, b, length, artifact = HEAD.unpack(raw)
        if magic != MAGIC:
            raise WireError("this is not the bulk port's protocol")
        try:
            kind = Kind(number)
        except ValueError:
            raise WireError(f"type {number} is no frame") from None
        if length > self._length_max(kind):
            raise WireError(f"{kind.name} of {length} bytes is too long")
        return (kind, flags, a, b, "" if artifact == _NO_ARTIFACT else artifact.hex()), length

    def _length_max(self, kind: Kind) -> int:
        if kind is Kind.META:
            return META_BYTES_MAX if self.meta_allowed else 0
        return {Kind.DATA: BLOCK_BYTES_MAX, Kind.CERT: CERT_BYTES_MAX}.get(kind, BODY_BYTES_MAX)


def _data_head(flags: int, piece: int, offset: int, length: int, artifact_id: str) -> DataHead:
    frame = DataHead(artifact_id, piece, offset, length, bool(flags & 1), bool(flags & 2))
    if piece >= PIECES_MAX or not artifact_id or frame.aborted == bool(length):
        raise WireError("DATA is of no piece")
    return frame


def _decode(kind: Kind, flags: int, a: int, b: int, artifact_id: str, body: bytes) -> Frame:
    if kind in _NEED_ARTIFACT and not artifact_id:
        raise WireError(f"{kind.name} names no artifact")
    if kind in _OF_PIECES:
        return _decode_pieces(kind, flags, a, artifact_id, body)
    match kind:
        case Kind.HELLO:
            return _decode_hello(body)
        case Kind.HELLO_OK:
            node_id, rest = _split_name(body)
            return HelloOk(node_id, _split_name(rest)[0], a)
        case Kind.REFUSED:
            return Refused(body[:TEXT_BYTES_MAX].decode(errors="replace"), artifact_id)
        case Kind.JOIN:
            if a > len(body) or a not in (0, TICKET_BYTES):
                raise WireError("JOIN has a wrong ticket")
            return Join(artifact_id, body[a:], body[:a], bool(flags & 1))
        case Kind.LEAVE:
            return Leave(artifact_id)
        case Kind.LEASE:
            if not 0 < b <= PIECES_MAX or a + b > PIECES_MAX:
                raise WireError("LEASE is of no pieces")
            (epoch,) = struct.unpack_from("<Q", body)
            return LeaseTold(artifact_id, Lease(a, b, epoch, _split_name(body[8:])[0]), bool(flags & 1))
        case Kind.CERT:
            return Cert(body)
        case Kind.CLAIM:
            return Claims(artifact_id, tuple(_decode_claims(body)))
        case Kind.META:
            answer = bool(flags & 1)
            return Meta(artifact_id, a, body if answer else None, not flags & 2)
        case Kind.PING:
            return Ping()
        case Kind.PONG:
            return Pong()
        case _:
            return Bye(body[:TEXT_BYTES_MAX].decode(errors="replace"))


_OF_PIECES: Final = frozenset(_PIECE_KINDS.values())
_NEED_ARTIFACT: Final = _OF_PIECES | {Kind.JOIN, Kind.LEAVE, Kind.LEASE, Kind.CLAIM, Kind.META}


def _decode_pieces(kind: Kind, flags: int, a: int, artifact_id: str, body: bytes) -> Frame:
    count = len(body) // 4
    pieces: Sequence[int] = struct.unpack(f"<{count}I", body)
    if not 0 < count <= PIECES_PER_FRAME_MAX or max(pieces) >= PIECES_MAX:
        raise WireError(f"{kind.name} of {count} pieces")
    numbers = tuple(pieces)
    match kind:
        case Kind.HAVE:
            return Have(artifact_id, numbers)
        case Kind.REQ:
            return Req(artifact_id, numbers, bool(flags & 1))
        case Kind.BUSY:
            return Busy(artifact_id, numbers, min(a, RETRY_MS_MAX))
        case Kind.NOT_HERE:
            return NotHere(artifact_id, numbers)
        case _:
            return Cancel(artifact_id, numbers)


def _decode_hello(body: bytes) -> Hello:
    low, high, *lengths, count = _HELLO.unpack_from(body)
    at = _HELLO.size
    names = []
    for length in lengths:
        names.append(body[at : at + length].decode())
        at += length
    size = BLAKE3_BYTES + TICKET_BYTES
    if len(body) != at + count * size or count > TICKETS_MAX or max(lengths) > NAME_BYTES_MAX:
        raise WireError("HELLO has the wrong length")
    tickets = tuple((body[n : n + 32].hex(), body[n + 32 : n + size]) for n in range(at, len(body), size))
    return Hello(names[0], names[1], names[2], tickets, low, high)


def _split_name(raw: bytes) -> tuple[str, bytes]:
    end = 1 + raw[0]
    if end > len(raw) or raw[0] > NAME_BYTES_MAX:
        raise WireError("a name is cut off")
    return raw[1:end].decode(), raw[end:]


def _decode_claims(body: bytes) -> Iterator[Claim]:
    at, count = 0, 0
    while at < len(body):
        piece, digest, signer_bytes, signature_bytes = _CLAIM.unpack_from(body, at)
        middle = at + _CLAIM.size + signer_bytes
        end = middle + signature_bytes
        count += 1
        if end > len(body) or piece >= PIECES_MAX or count > CLAIMS_PER_FRAME_MAX:
            raise WireError("a claim is cut off")
        yield Claim(piece, digest, body[at + _CLAIM.size : middle].decode(), body[middle:end])
        at = end
