"""What waits to be sent to a peer, and what was asked of it: order, bounds, withdrawals; routes and the gate."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_contract.ticket import make_ticket
from fal_fsd.peers import outbox as outboxes
from fal_fsd.peers.address import PeerAddress
from fal_fsd.peers.frames import Bye, DataHead, Frame, Have, Hello, HelloOk, Ping
from fal_fsd.peers.gate import Gate, Refusal
from fal_fsd.peers.inbox import UNASKED_BYTES_MAX, Came, Inbox, Outcome, Refused
from fal_fsd.peers.outbox import JOBS_MAX, Outbox, Overflow
from fal_fsd.peers.routes import BAN_S, LARGER_WAITS_S, Routes
from fal_fsd.peers.shared import LARGE, URGENT, SharedPart
from fal_fsd.peers.wire import Decoder, WireError, encode
from fsd_fakes import FakePart, make_artifact, piece_of

ARTIFACT, CONTENTS = make_artifact([8 << 16], seed=3)
ID = ARTIFACT.id


@pytest.fixture
def part() -> Iterator[FakePart]:
    made = FakePart(ARTIFACT)
    yield made
    made.close()


@pytest.fixture
def shared(part: FakePart) -> SharedPart:
    return SharedPart(part)


def _frames(raw: bytes) -> list[Frame]:
    return [x for x in Decoder().feed(memoryview(raw)) if not isinstance(x, memoryview)]


def _take(box: Outbox) -> tuple[list[Frame], outboxes.Job | None]:
    work = box.take()
    assert work is not None
    return _frames(work[0]), work[1]


# What is sent.


def test_frames_go_before_pieces_and_urgent_pieces_before_others(shared: SharedPart) -> None:
    box = Outbox(lambda: 0.0)
    for piece, rank in ((0, LARGE), (1, LARGE), (2, URGENT)):
        assert box.want(shared, piece, 100, rank)
    box.send(Ping())
    frames, job = _take(box)
    assert frames == [Ping()]
    order = []
    while job is not None:
        order.append((job.piece, job.sent))
        box.advance(job, 50)
        if len(order) == 3:
            box.want(shared, 1, 100, URGENT)  # asked again: somebody waits for it now
            box.want(shared, 3, 100, LARGE)
        if not box.jobs:
            break
        _, job = _take(box)
    assert order == [(2, 0), (2, 50), (0, 0), (1, 0), (1, 50), (0, 50), (3, 0), (3, 50)]


def test_what_is_here_is_announced_together(shared: SharedPart) -> None:
    box = Outbox(lambda: 0.0)
    box.have(ID, [1, 2])
    box.have(ID, [5])
    box.send(Ping())
    assert _take(box) == ([Ping(), Have(ID, (1, 2, 5))], None)


def test_the_end_of_a_cancelled_piece_is_told_once_it_has_begun(shared: SharedPart) -> None:
    box = Outbox(lambda: 0.0)
    for piece in (0, 1, 2):
        box.want(shared, piece, 100, LARGE)
    _, job = _take(box)
    assert job is not None
    assert job.piece == 0
    box.cancel(ID, [0, 1, 7])  # of 0 a block is on its way
    frames, after = _take(box)
    assert frames == [DataHead(ID, 0, 0, 0, aborted=True)]
    assert after is not None
    assert after.piece == 2
    box.advance(job, 100)  # the sender comes back from a block of a piece that was cancelled
    assert box.jobs == 1


def test_bounds_of_what_waits(shared: SharedPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "FRAME_BYTES_MAX", 1000)
    box = Outbox(lambda: 0.0)
    assert all(box.want(shared, piece, 1, LARGE) for piece in range(JOBS_MAX))
    assert not box.want(shared, JOBS_MAX, 1, LARGE)
    frames = 1000 // len(encode(Ping()))
    for _ in range(frames):
        box.send(Ping())
    with pytest.raises(Overflow):
        box.send(Ping())


def test_nothing_goes_after_the_last_word(shared: SharedPart) -> None:
    box = Outbox(lambda: 0.0)
    box.want(shared, 0, 1, LARGE)
    box.finish(Bye("so"))
    box.send(Ping())
    assert not box.want(shared, 1, 1, LARGE)
    assert _take(box) == ([Bye("so")], None)
    assert box.take() is None


def test_frames_go_on_while_a_piece_is_held_back() -> None:
    box = Outbox(lambda: 5.0)
    assert box.frames_until(5.0) == b""
    box.send(Ping())
    assert _frames(box.frames_until(5.0) or b"") == [Ping()]
    box.close()
    assert box.frames_until(6.0) is None


# What was asked for.


class _Asked:
    def __init__(self) -> None:
        self.told: list[Outcome] = []
        self.now_s = 0.0
        self.inbox = Inbox("p", self.told.append, lambda part, piece: (True, None), lambda: self.now_s)

    def send(self, piece: int, *, at: int = 0, data: bytes | None = None, split: int = 1000) -> None:
        data = piece_of(ARTIFACT, CONTENTS, piece)[at:] if data is None else data
        end = at + len(data) == ARTIFACT.layout.length(piece)
        self.inbox.head(DataHead(ID, piece, at, len(data), last=end))
        for begin in range(0, len(data), split):
            self.inbox.data(memoryview(data)[begin : begin + split])


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(4)), st.sets(st.integers(0, 3)), st.integers(5_000, 70_000))
def test_pieces_come_in_any_order_and_withdrawn_ones_do_not(order: list[int], gone: set[int], split: int) -> None:
    part = FakePart(ARTIFACT)
    try:
        asked = _Asked()
        assert asked.inbox.ask(SharedPart(part), range(4)) == [0, 1, 2, 3]
        assert set(asked.inbox.withdraw(ID, sorted(gone))) == gone
        for piece in order:
            asked.send(piece, split=split)
        assert [x.piece for x in asked.told if isinstance(x, Came)] == [x for x in order if x not in gone]
        assert set(part.have) == set(range(4)) - gone
        assert part.writing == frozenset()
    finally:
        part.close()


def test_what_is_left_of_a_withdrawn_request_does_not_disturb_the_next(part: FakePart, shared: SharedPart) -> None:
    asked = _Asked()
    data = piece_of(ARTIFACT, CONTENTS, 0)
    asked.inbox.ask(shared, [0])
    asked.send(0, data=data[:100])
    asked.inbox.withdraw(ID, [0])
    assert part.writing == frozenset()
    asked.inbox.ask(shared, [0])
    asked.send(0, at=100, data=data[100:200])  # of the first request
    asked.inbox.head(DataHead(ID, 0, 200, 0, aborted=True))
    asked.send(0)
    assert asked.told == [Came(ID, 0, 0.0)]
    asked.inbox.withdraw(ID, [0])
    asked.inbox.ask(shared, [1])
    asked.send(1, data=piece_of(ARTIFACT, CONTENTS, 1)[:100])  # of a request before: its first block, then its end
    asked.inbox.head(DataHead(ID, 1, 100, 0, aborted=True))
    asked.send(1)
    assert part.has(1)


def test_a_part_that_was_left_takes_nothing(part: FakePart, shared: SharedPart) -> None:
    asked = _Asked()
    asked.inbox.ask(shared, [0, 1])
    asked.send(0, data=piece_of(ARTIFACT, CONTENTS, 0)[:100])
    shared.leave()
    idle: list[bool] = []
    shared.when_idle(lambda: idle.append(True))
    assert idle == [True]
    asked.send(1)
    assert asked.told == [Refused(ID, 1, 0.0, stop=True)]
    asked.inbox.end()
    assert part.writing == frozenset()


def test_who_sends_what_nobody_asked_for_is_cut_off() -> None:
    asked = _Asked()
    block = memoryview(bytes(1 << 20))
    for _ in range(UNASKED_BYTES_MAX >> 20):
        asked.inbox.head(DataHead(ID, 9, 0, len(block)))
        asked.inbox.data(block)
    asked.inbox.head(DataHead(ID, 9, 0, 1))
    with pytest.raises(WireError, match="nobody asked"):
        asked.inbox.data(block[:1])


def test_how_long_nothing_came(shared: SharedPart) -> None:
    asked = _Asked()
    assert asked.inbox.silent_s() == 0.0
    asked.now_s = 5.0
    asked.inbox.ask(shared, [0])
    asked.now_s = 8.0
    assert asked.inbox.silent_s() == 3.0
    asked.send(0, data=piece_of(ARTIFACT, CONTENTS, 0)[:10])
    asked.now_s = 9.0
    assert asked.inbox.silent_s() == 1.0


# Whom to dial, whom to let in.


def _member(node_id: str, *, tls: bool = False, port: int = 1) -> PeerAddress:
    return PeerAddress(node_id, (("h", port),), b"t" * 40, 1.0, tls)


def _due(routes: Routes, now_s: float, connected: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    return [x.node_id for x in routes.due(now_s, connected.__contains__, {ID}.__contains__)]


def test_the_smaller_id_dials_first_and_failures_wait_longer() -> None:
    waits: list[float] = []
    routes = Routes("m", lambda a, b: waits.append(b) or b)  # type: ignore[func-returns-value]
    routes.set_members(ID, [_member("a"), _member("z"), _member("m")], 0.0)
    assert _due(routes, 0.0) == ["z"]
    assert _due(routes, LARGER_WAITS_S) == ["a", "z"]
    assert _due(routes, LARGER_WAITS_S, {"a"}) == ["z"]
    for _ in range(12):
        routes.ended("z", 0.0, dialled=True, reached=False, lived_s=0.0)
    assert waits[0] < waits[1] < waits[-1] <= 15.0
    assert routes.unreachable == ["z"]
    routes.set_members(ID, [_member("z", port=2)], 1.0)  # it has moved
    assert routes.unreachable == []
    assert _due(routes, 1.0) == ["z"]
    routes.ban("z", "why", 1.0)
    assert _due(routes, 1.0) == []
    assert not routes.lift_bans(1.0 + BAN_S - 1)
    assert routes.lift_bans(1.0 + BAN_S)
    assert _due(routes, 1.0 + BAN_S) == ["z"]
    routes.set_members(ID, [], 2.0)
    assert routes.route("z") is None


def _hello(cluster_id: str = "c", node_id: str = "n", version: int = 1) -> Hello:
    shown = make_ticket(b"k" * 32, caller=node_id, artifact_id=ID, expires_s=100)
    return Hello(cluster_id, node_id, "f", ((ID, shown),), version, version)


def test_who_is_let_in() -> None:
    gate = Gate("me", "c", tls="auto", identified=True)
    gate.keys = (b"k" * 32,)
    gate.trusted_network = True
    assert gate.admit(_hello(), None, now_s=50) == {ID: 100.0}
    for hello, why in (
        (_hello("other"), "cluster"),
        (_hello(node_id="me"), "itself"),
        (_hello(version=2), "versions"),
    ):
        with pytest.raises(Refusal, match=why):
            gate.admit(hello, None, now_s=50)
    with pytest.raises(Refusal, match="expired"):
        gate.admit(_hello(), None, now_s=101)
    gate.banned = {"n": "lied"}
    with pytest.raises(Refusal, match="lied"):
        gate.admit(_hello(), None, now_s=50)
    with pytest.raises(Refusal, match="is x"):
        gate.check_answer(HelloOk("x", "f"), None, "n", now_s=50)


@pytest.mark.parametrize(
    ("tls", "trusted", "member", "plain"),
    [
        ("auto", True, None, True),
        ("auto", False, None, False),
        ("auto", False, False, True),
        ("auto", True, True, False),
        ("always", True, False, False),
        ("never", False, True, True),
    ],
)
def test_when_clear_text_is_taken(tls: str, trusted: bool, member: bool | None, plain: bool) -> None:
    gate = Gate("me", "c", tls=tls, identified=True)  # type: ignore[arg-type]
    gate.keys = (b"k" * 32,)
    gate.trusted_network = trusted
    gate.members_tls = {} if member is None else {"n": member}
    if plain:
        assert gate.admit(_hello(), None, now_s=1)
    else:
        with pytest.raises(Refusal, match="TLS"):
            gate.admit(_hello(), None, now_s=1)
    assert gate.dials_tls(bool(member)) == (tls == "always" or (tls == "auto" and bool(member)))
