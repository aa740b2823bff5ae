"""HTTP/1.1 heads and message framing, as far as the data path needs them. Pure.

The proxy of a node reads a head, rewrites it and then pumps bytes; this module tells it where the head and the body
end. The serving client uses the same code from the other side. Input is hostile: everything is bounded, and what
two parsers could read differently (two lengths, folded lines, bare LF, unknown codings) is refused, because such
messages let a client smuggle a request past an admission.

Must not do I/O. Raises HttpError only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fal_contract.limits import REQUEST_HEAD_BYTES_MAX

Headers = tuple[tuple[bytes, bytes], ...]  # names in lower case, in the order given

HEADERS_MAX: Final = 128
CHUNK_LINE_BYTES_MAX: Final = 256
TRAILER_BYTES_MAX: Final = 8 << 10
_LENGTH_DIGITS_MAX: Final = 18
_CHUNK_DIGITS_MAX: Final = 15

_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET: Final = re.compile(rb"[\x21-\x7e]+")
# All header lines of a head and its empty line, at once: what is not of this form is looked at line by line.
_HEADER_BLOCK: Final = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
_FIELD: Final = re.compile(rb"([^:\r\n]+):([^\r\n]*)\r\n")  # of a block that matched
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
_HEX: Final = re.compile(rb"[0-9A-Fa-f]+")
_NO_OPTIONS: Final[frozenset[bytes]] = frozenset()
_HOP_BY_HOP: Final = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade"})


class HttpError(Exception):
    """The peer sent what is not, or not safely, HTTP/1.1; `status` is the answer it deserves."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status
        self.what = what


class BodyKind(Enum):
    """How the end of a body is told."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until close"  # responses only


@dataclass(frozen=True, slots=True)
class Framing:
    """Where a message's body ends; `length` in bytes, for LENGTH."""

    kind: BodyKind
    length: int = 0


NO_BODY: Final = Framing(BodyKind.NONE)


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request line and its headers."""

    method: bytes
    target: bytes
    headers: Headers
    framing: Framing

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants the connection afterwards."""
        return b"close" not in connection_options(self.headers)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A status line and its headers."""

    status: int
    reason: bytes
    headers: Headers
    framing: Framing
    minor_version: int = 1

    @property
    def keep_alive(self) -> bool:
        """Whether the connection can carry another request."""
        ends_itself = self.framing.kind is not BodyKind.UNTIL_CLOSE
        return ends_itself and self.minor_version == 1 and b"close" not in connection_options(self.headers)


def head_end(buffer: bytes | bytearray) -> int:
    """Index behind the empty line that ends a head, or -1; raises HttpError(431) when the head is too long."""
    end = buffer.find(b"\r\n\r\n", 0, REQUEST_HEAD_BYTES_MAX)
    if end >= 0:
        return end + 4
    if len(buffer) >= REQUEST_HEAD_BYTES_MAX:
        raise HttpError(431, f"the head is longer than {REQUEST_HEAD_BYTES_MAX} bytes")
    return -1


def parse_request_head(head: bytes) -> RequestHead:
    """`head` ends with its empty line."""
    line, headers = _split_head(head)
    parts = line.split(b" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or not _TARGET.fullmatch(parts[1]):
        raise HttpError(400, "the request line is malformed")
    method, target, version = parts
    if version != b"HTTP/1.1":
        raise HttpError(505, "only HTTP/1.1 is spoken here")
    return RequestHead(method, target, headers, _request_framing(headers))


def parse_response_head(head: bytes, *, method: bytes) -> ResponseHead:
    """`head` ends with its empty line; `method` is the request's."""
    line, headers = _split_head(head)
    match = _STATUS_LINE.fullmatch(line)
    if not match:
        raise HttpError(502, "the status line is malformed")
    status = int(match[2])
    framing = _response_framing(status, method, headers)
    return ResponseHead(status, match[3] or b"", headers, framing, int(match[1]))


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first value of `name` (lower case)."""
    for key, value in headers:
        if key == name:
            return value
    return None


def connection_options(headers: Headers) -> frozenset[bytes]:
    """The words of the Connection headers, lower case."""
    values = [value for key, value in headers if key == b"connection"]
    if not values:
        return _NO_OPTIONS
    return frozenset([word.strip() for value in values for word in value.lower().split(b",")])


def without_hop_by_hop(headers: Headers, *, but: tuple[bytes, ...] = ()) -> list[tuple[bytes, bytes]]:
    """Headers that may travel on, but those whose names begin with one of `but`.

    The framing headers stay, because the bytes are passed as they are.
    """
    named = connection_options(headers)
    dropped = _HOP_BY_HOP | (named - {b"content-length", b"transfer-encoding"}) if named else _HOP_BY_HOP
    return [item for item in headers if item[0] not in dropped and not item[0].startswith(but)]


def encode_head(first_line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A head with its empty line. The caller answers for the values (`is_header_value`)."""
    lines = [first_line, *[b"%b: %b" % item for item in headers], b"\r\n"]
    return b"\r\n".join(lines)


def is_header_value(value: bytes) -> bool:
    """Whether a value can stand in a head without changing its structure."""
    return _VALUE.fullmatch(value) is not None


def is_header_name(name: bytes) -> bool:
    """Whether a name is an HTTP token."""
    return _TOKEN.fullmatch(name) is not None


def is_target(target: bytes) -> bool:
    """Whether a path (with query) can stand in a request line."""
    return _TARGET.fullmatch(target) is not None and target.startswith(b"/")


class BodyScanner:
    """Follows a body through a stream of pieces and says which bytes belong to it."""

    __slots__ = ("_chunk", "_done", "_kind", "_left", "_line", "_trailer_bytes")

    def __init__(self, framing: Framing) -> None:
        self._kind = framing.kind
        self._left = framing.length
        self._done = framing.kind is BodyKind.NONE or (framing.kind is BodyKind.LENGTH and framing.length == 0)
        self._chunk = _Chunk.SIZE
        self._line = bytearray()
        self._trailer_bytes = 0

    @property
    def done(self) -> bool:
        """The last byte was seen."""
        return self._done

    @property
    def reads_content(self) -> bool:
        """The end stands among the bytes: `feed` needs them as `bytes`, not as a view."""
        return self._kind is BodyKind.CHUNKED

    def feed(self, data: bytes | memoryview, payload: list[bytes] | None = None) -> int:
        """How many bytes at the start of `data` belong to the body: all, unless it ends among them.

        Appends the decoded content to `payload` when one is given; `data` is of bytes then. Raises HttpError(400).
        """
        if self._done:
            return 0
        if self._kind is BodyKind.CHUNKED:
            return self._feed_chunked(bytes(data), payload)
        used = len(data) if self._kind is BodyKind.UNTIL_CLOSE else min(self._left, len(data))
        if payload is not None and used:
            payload.append(bytes(data) if used == len(data) else bytes(data[:used]))
        if self._kind is BodyKind.LENGTH:
            self._left -= used
            self._done = self._left == 0
        return used

    def closed(self) -> bool:
        """The peer closed; True when the body was whole."""
        if self._kind is BodyKind.UNTIL_CLOSE:
            self._done = True
        return self._done

    def _feed_chunked(self, data: bytes, payload: list[bytes] | None) -> int:
        at, size = 0, len(data)
        while at < size and not self._done:
            if self._chunk is _Chunk.DATA:
                taken = min(self._left, size - at)
                if payload is not None:
                    payload.append(data[at : at + taken])
                self._left -= taken
                at += taken
                if self._left == 0:
                    self._chunk = _Chunk.DATA_END
                continue
            newline = data.find(b"\n", at, at + CHUNK_LINE_BYTES_MAX + TRAILER_BYTES_MAX)
            piece = data[at:] if newline < 0 else data[at : newline + 1]
            at += len(piece)
            self._line += piece
            if len(self._line) > (TRAILER_BYTES_MAX if self._chunk is _Chunk.TRAILER else CHUNK_LINE_BYTES_MAX):
                raise HttpError(400, "a line of the chunked body is too long")
            if newline >= 0:
                if not self._line.endswith(b"\r\n"):
                    raise HttpError(400, "a line of the chunked body does not end in CRLF")
                line = bytes(self._line[:-2])
                self._line.clear()
                self._chunk_line(line)
        return at

    def _chunk_line(self, line: bytes) -> None:
        if self._chunk is _Chunk.DATA_END:
            if line:
                raise HttpError(400, "a chunk is longer than it said")
            self._chunk = _Chunk.SIZE
        elif self._chunk is _Chunk.SIZE:
            digits = line.split(b";", 1)[0].rstrip(b" \t")
            if not _HEX.fullmatch(digits) or len(digits) > _CHUNK_DIGITS_MAX or not _VALUE.fullmatch(line):
                raise HttpError(400, "a chunk's size is malformed")
            self._left = int(digits, 16)
            self._chunk = _Chunk.DATA if self._left else _Chunk.TRAILER
        elif not line:
            self._done = True
        else:
            _parse_header_line(line)
            self._trailer_bytes += len(line)
            if self._trailer_bytes > TRAILER_BYTES_MAX:
                raise HttpError(400, "the trailers are too long")


class _Chunk(Enum):
    SIZE = 0
    DATA = 1
    DATA_END = 2
    TRAILER = 3


def _split_head(head: bytes) -> tuple[bytes, Headers]:
    if len(head) > REQUEST_HEAD_BYTES_MAX:
        raise HttpError(431, f"the head is longer than {REQUEST_HEAD_BYTES_MAX} bytes")
    if not head.endswith(b"\r\n\r\n"):
        raise HttpError(400, "the head has no end")
    end = head.find(b"\r\n")
    first = head[:end]
    if head.count(b"\r\n") - 2 > HEADERS_MAX:
        raise HttpError(431, f"the head has more than {HEADERS_MAX} headers")
    if not _HEADER_BLOCK.fullmatch(head, end + 2):  # say what is wrong with which line
        lines = head[end + 2 : -4].split(b"\r\n") if len(head) > end + 4 else []
        return first, tuple([_parse_header_line(line) for line in lines])
    return first, tuple([(name.lower(), value.strip(b" \t")) for name, value in _FIELD.findall(head, end + 2)])


def _parse_header_line(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
        raise HttpError(400, "a header line is malformed")
    return name.lower(), value.strip(b" \t")


def _content_length(headers: Headers) -> int | None:
    values = [value for key, value in headers if key == b"content-length"]
    if not values:
        return None
    if len(values) > 1 or not values[0].isdigit() or len(values[0]) > _LENGTH_DIGITS_MAX:
        raise HttpError(400, "Content-Length is malformed")
    return int(values[0])


def _is_chunked(headers: Headers) -> bool:
    codings = [value.lower() for key, value in headers if key == b"transfer-encoding"]
    if not codings:
        return False
    if codings != [b"chunked"]:
        raise HttpError(501, "the only transfer coding spoken here is chunked")
    return True


def _length_and_chunked(headers: Headers) -> tuple[int | None, bool]:
    """What Content-Length and Transfer-Encoding say."""
    index = dict(headers)
    if len(index) == len(headers) and b"transfer-encoding" not in index:  # the usual: each name once
        value = index.get(b"content-length")
        if value is None:
            return None, False
        if value.isdigit() and len(value) <= _LENGTH_DIGITS_MAX:
            return int(value), False
    return _content_length(headers), _is_chunked(headers)


def _request_framing(headers: Headers) -> Framing:
    length, chunked = _length_and_chunked(headers)
    if chunked and length is not None:
        raise HttpError(400, "Content-Length and Transfer-Encoding exclude each other")
    if chunked:
        return Framing(BodyKind.CHUNKED)
    return Framing(BodyKind.LENGTH, length) if length else NO_BODY


def _response_framing(status: int, method: bytes, headers: Headers) -> Framing:
    if method == b"HEAD" or status < 200 or status in (204, 304):
        return NO_BODY
    length, chunked = _length_and_chunked(headers)
    if chunked and length is not None:
        raise HttpError(502, "Content-Length and Transfer-Encoding exclude each other")
    if chunked:
        return Framing(BodyKind.CHUNKED)
    return Framing(BodyKind.UNTIL_CLOSE) if length is None else Framing(BodyKind.LENGTH, length)
