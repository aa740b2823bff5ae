"""The bulk port's frames: round trips however the bytes are split, bounds, and garbage."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_contract.ticket import TICKET_BYTES
from fal_fsd.core.messages import Claim, Lease
from fal_fsd.peers import wire
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
)
from fal_fsd.peers.wire import HEAD, MAGIC, TLS_FIRST_BYTE, Decoder, Kind, WireError, encode

IDS = st.binary(min_size=32, max_size=32).filter(any).map(bytes.hex)
NAMES = st.text(st.characters(codec="utf-8"), max_size=16)
PIECE = st.integers(0, (1 << 19) - 1)
PIECES = st.lists(PIECE, min_size=1, max_size=20).map(tuple)
TICKETS = st.binary(min_size=TICKET_BYTES, max_size=TICKET_BYTES)
CLAIMS = st.builds(Claim, PIECE, st.binary(min_size=32, max_size=32), NAMES, st.binary(max_size=80))
LEASES = st.builds(Lease, st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 2**64 - 1), NAMES)
CONTROL: st.SearchStrategy[Frame] = st.one_of(
    st.builds(
        Hello,
        NAMES,
        NAMES,
        NAMES,
        st.lists(st.tuples(IDS, TICKETS), max_size=4).map(tuple),
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    st.builds(HelloOk, NAMES, NAMES, st.integers(0, 9)),
    st.builds(Refused, NAMES, st.one_of(st.just(""), IDS)),
    st.builds(Join, IDS, st.binary(max_size=40), st.one_of(st.just(b""), TICKETS), st.booleans()),
    st.builds(Leave, IDS),
    st.builds(Have, IDS, PIECES),
    st.builds(Req, IDS, PIECES, st.booleans()),
    st.builds(Busy, IDS, PIECES, st.integers(0, 600_000)),
    st.builds(NotHere, IDS, PIECES),
    st.builds(Cancel, IDS, PIECES),
    st.builds(LeaseTold, IDS, LEASES, st.booleans()),
    st.builds(Cert, st.binary(max_size=100)),
    st.builds(Claims, IDS, st.lists(CLAIMS, max_size=5).map(tuple)),
    st.builds(Meta, IDS, st.integers(0, 2**32 - 1)),
    st.builds(Meta, IDS, st.integers(0, 2**32 - 1), st.binary(max_size=100)),
    st.builds(Ping),
    st.builds(Pong),
    st.builds(Bye, NAMES),
)
DATA = st.tuples(IDS, PIECE, st.integers(0, 1 << 25), st.binary(min_size=1, max_size=50), st.booleans())


def _decode(raw: bytes, cuts: list[int]) -> list[Frame | bytes]:
    """All frames; the bytes of one DATA put together again."""
    decoder = Decoder()
    decoder.meta_allowed = True
    borders = [0, *sorted(cut % (len(raw) + 1) for cut in cuts), len(raw)]
    found: list[Frame | bytes] = []
    for begin, end in itertools.pairwise(borders):
        for item in decoder.feed(memoryview(raw)[begin:end]):
            if not isinstance(item, memoryview):
                found.append(item)
            elif found and isinstance(found[-1], bytes):
                found[-1] += bytes(item)
            else:
                found.append(bytes(item))
    return found


@settings(deadline=None)
@given(st.lists(st.one_of(CONTROL, DATA), max_size=6), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_gives_the_same_frames(
    told: list[Frame | tuple[str, int, int, bytes, bool]], cuts: list[int]
) -> None:
    raw, expected = b"", []
    for one in told:
        if isinstance(one, tuple):
            head = DataHead(one[0], one[1], one[2], len(one[3]), last=one[4])
            raw += encode(head) + one[3]
            expected += [head, one[3]]
        else:
            raw += encode(one)
            expected.append(one)
    assert _decode(raw, cuts) == expected


@settings(deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4))
def test_garbage_is_refused_or_waits_for_more(raw: bytes, cuts: list[int]) -> None:
    try:
        _decode(raw, cuts)
    except WireError:
        return
    assert len(raw) < HEAD.size or raw[:2] == MAGIC.to_bytes(2, "little")


@settings(deadline=None)
@given(
    st.sampled_from(sorted(Kind)),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=120),
    st.binary(min_size=32, max_size=32),
)
def test_a_well_formed_head_with_any_body_never_crashes(
    kind: Kind, flags: int, a: int, b: int, body: bytes, artifact: bytes
) -> None:
    with contextlib.suppress(WireError):
        _decode(HEAD.pack(MAGIC, kind, flags, a, b, len(body), artifact) + body, [])


@pytest.mark.parametrize(
    ("kind", "length", "meta"),
    [
        (Kind.DATA, wire.BLOCK_BYTES_MAX + 1, True),
        (Kind.HAVE, wire.BODY_BYTES_MAX + 1, True),
        (Kind.CERT, wire.CERT_BYTES_MAX + 1, True),
        (Kind.META, wire.META_BYTES_MAX + 1, True),
        (Kind.META, 1, False),
        (Kind.HELLO, 2**32 - 1, True),
    ],
)
def test_a_length_beyond_its_bound_is_refused_by_the_head_alone(kind: Kind, length: int, meta: bool) -> None:
    decoder = Decoder()
    decoder.meta_allowed = meta
    with pytest.raises(WireError, match="too long"):
        list(decoder.feed(memoryview(HEAD.pack(MAGIC, kind, 0, 0, 0, length, b"\x01" * 32))))


def test_what_may_not_be_said() -> None:
    id = "01" * 32
    with pytest.raises(ValueError, match="pieces"):
        encode(Have(id, ()))
    with pytest.raises(ValueError, match="pieces"):
        encode(Have(id, tuple(range(wire.PIECES_PER_FRAME_MAX + 1))))
    with pytest.raises(ValueError, match="too long"):
        encode(Join(id, bytes(wire.BODY_BYTES_MAX + 1)))
    with pytest.raises(ValueError, match="ticket"):
        encode(Hello("c", "n", "f", ((id, b"short"),)))
    assert len(encode(Bye("ä" * 1000))) == HEAD.size + wire.TEXT_BYTES_MAX


def test_the_first_byte_is_not_that_of_tls() -> None:
    assert encode(Ping())[0] != TLS_FIRST_BYTE
    assert HEAD.size == 48
