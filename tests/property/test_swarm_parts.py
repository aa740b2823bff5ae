"""The parts of a swarm's decisions: sets and counters of pieces, shares, leases, rates."""

from __future__ import annotations

from collections import Counter as Tally

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_contract.pieces import Bitmap
from fal_fsd.core import leases
from fal_fsd.core.bits import Counter, bits_of, each, first_from, hash_of, lowest, mix, run_at, span
from fal_fsd.core.leases import EPOCH_MAX, LeaseBook, stronger
from fal_fsd.core.messages import ORIGIN, Ask, DropPeer, Lease, Member, Place, ReadOrigin, Tell, Withdraw
from fal_fsd.core.sharing import SHARES_MAX, Shares
from fal_fsd.core.sources import Sources
from fal_fsd.core.swarm import Policy, Swarm

SETS = st.sets(st.integers(0, 200))


@settings(deadline=None, max_examples=50)
@given(SETS, st.integers(0, 200))
def test_sets(pieces: set[int], start: int) -> None:
    bits = bits_of(pieces)
    assert list(each(bits)) == sorted(pieces)
    assert bits == int.from_bytes(bytes(Bitmap(201, pieces)), "little")
    if pieces:
        assert lowest(bits) == min(pieces)
        assert first_from(bits, start) == min(pieces, key=lambda x: (x < start, x))
        run = run_at(bits, min(pieces), 5)
        assert set(range(min(pieces), min(pieces) + run)) <= pieces
        assert 1 <= run <= 5
        assert run == 5 or min(pieces) + run not in pieces
    assert list(each(span(start, 3))) == [start, start + 1, start + 2]


@settings(deadline=None, max_examples=50)
@given(st.lists(SETS, max_size=12), st.data())
def test_counters_count(sets: list[set[int]], data: st.DataObject) -> None:
    counter, tally, kept = Counter(), Tally[int](), []
    for pieces in sets:
        counter.add(bits_of(pieces))
        if data.draw(st.booleans()):
            counter.remove(bits_of(pieces))
        else:
            tally.update(pieces)
            kept.append(pieces)
    assert set(each(counter.held)) == set(tally)
    assert all(counter.count(piece) == tally[piece] for piece in range(201))
    for power in range(4):
        assert set(each(counter.at_least(power))) == {x for x, n in tally.items() if n >= 1 << power}
    some = data.draw(SETS)
    least = min((tally[x] for x in some), default=0)
    assert set(each(counter.least(bits_of(some)))) == {x for x in some if tally[x] == least}
    for pieces in kept:
        counter.remove(bits_of(pieces))
    assert counter.held == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 20))
def test_shares_divide_all_pieces_and_move_little(pieces: int, stripe: int, count: int) -> None:
    shares, nodes = Shares(pieces, stripe), [f"n{n}" for n in range(count)]
    assert shares.count <= SHARES_MAX
    owned = shares.owned(nodes)
    assert sum(x.bit_count() for x in owned.values()) == pieces
    assert sum(owned.values()) == (1 << pieces) - 1  # disjoint
    after = shares.owned([*nodes, "newcomer"])
    for node in nodes:
        assert after[node] & ~owned[node] == 0  # only the newcomer gains
    ranked = shares.ranked(nodes, 2)
    assert all(ranked[node][0] == owned[node] for node in nodes)
    first, length = shares.stripe_of(pieces - 1)
    assert first <= pieces - 1 < first + length == first + stripe


LEASES = st.builds(
    Lease, st.integers(0, 30), st.integers(1, 6), st.integers(1, 5), st.sampled_from(["a", "b", "c", "me"])
)


@settings(deadline=None, max_examples=50)
@given(LEASES, LEASES)
def test_of_two_leases_one_is_stronger(one: Lease, other: Lease) -> None:
    same = one.epoch == other.epoch and one.holder == other.holder and one.first == other.first
    assert stronger(one, other) + stronger(other, one) == (0 if same else 1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(LEASES, st.booleans()), max_size=30), st.integers(0, 30))
def test_a_new_lease_is_stronger_than_all_that_were_told(told: list[tuple[Lease, bool]], first: int) -> None:
    book = LeaseBook("me")
    for lease, ended in told:
        book.told(lease, ended, 0.0)
    mine = book.take(first, 4, 1.0)
    assert book.own() == span(first, 4)
    overlapping = [x.lease for x in book.quiet() if x.bits & book.own()]
    assert all(stronger(mine, lease) for lease in overlapping)
    # One that overlaps it afterwards either fences it or is fenced by it.
    for epoch in (mine.epoch, mine.epoch + 1):
        news, fenced, fences = book.told(Lease(first + 1, 1, epoch, "z"), False, 2.0)
        assert (fenced == [mine]) == stronger(Lease(first + 1, 1, epoch, "z"), mine) == news
        assert (fences == [mine]) == (not news)


def test_leases_end_with_their_holder_their_pieces_and_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASES_MAX", 32)
    book = LeaseBook("me")
    assert book.told(Lease(0, 4, 1, "a"), False, 0.0) == (True, [], [])
    assert book.told(Lease(0, 4, 1, "a"), False, 0.0) == (False, [], [])
    assert book.told(Lease(0, 4, EPOCH_MAX, "b"), False, 0.0) == (False, [], [])
    assert book.told(Lease(0, 4, 7, "me"), False, 0.0) == (False, [], [])
    assert book.others() == span(0, 4)
    book.holder_gone("a")
    assert book.others() == 0
    assert book.take(0, 2, 1.0).epoch == 2  # the dead one may still send
    book.prune(0)
    for first in range(42):
        book.told(Lease(first, 1, 1, "a"), False, 0.0)
    assert len(book.quiet()) == 32


def test_rates_count_a_queue_once() -> None:
    sources = Sources(Place("me"), [1000] * 8)
    peer = sources.up("a", 255)
    for piece in range(4):
        sources.ask(peer, piece, 0.0)
    assert sources.bytes_asked == peer.bytes_asked == 4000
    for piece in range(4):
        sources.arrived(peer, piece, 1.0 + piece, 1.0 + piece)
    assert peer.rate == pytest.approx(1000.0)  # not 1000 bytes in 4 seconds
    assert sources.bytes_asked == 0
    assert sources.asked == 0


def asks(actions: list[object]) -> dict[int, str]:
    return {piece: x.node_id for x in actions if isinstance(x, Ask) for piece in x.pieces}


def swarm_of(count: int = 40, **named: object) -> Swarm:
    return Swarm(Place("me", "p", "eu", "a"), [4 << 20] * count, Bitmap(count), policy=Policy(**named))  # type: ignore[arg-type]


def test_the_rarest_comes_first() -> None:
    swarm = swarm_of()
    for node_id in ("a", "b", "c"):
        swarm.peer_up(node_id, Bitmap(40, range(20) if node_id != "c" else range(22)), 0.0)
    asked = asks(swarm.decide(0.0))
    assert asked[20] == asked[21] == "c"


def test_a_stuck_peer_keeps_only_what_nobody_else_has() -> None:
    swarm = swarm_of(4)
    swarm.peer_up("a", Bitmap(4, range(3)), 0.0)
    first = asks(swarm.decide(0.0))
    assert set(first.values()) == {"a"}
    swarm.peer_up("b", Bitmap(4, range(1, 4)), 1.0)
    swarm.decide(1.0)
    actions = swarm.decide(60.0)
    withdrawn = {piece for x in actions if isinstance(x, Withdraw) for piece in x.pieces}
    assert 0 not in withdrawn
    assert withdrawn <= asks(actions).keys() | {1, 2}


def test_what_a_reader_waits_for_goes_first_to_the_fastest() -> None:
    swarm = swarm_of()
    swarm.peer_up("slow", Bitmap.full(40), 0.0)
    swarm.peer_up("fast", Bitmap.full(40), 0.0)
    now_s = 0.0
    swarm.decide(now_s)
    for _ in range(4):  # to learn who is fast
        now_s += 0.1
        for piece, node_id in list(asked_now(swarm).items()):
            if node_id == "fast":
                swarm.arrived(piece, "fast", 0.1, now_s)
        swarm.decide(now_s)
    outstanding = asked_now(swarm)
    wanted = next(piece for piece in range(39, 0, -1) if piece not in outstanding)
    swarm.wanted([wanted], True)
    urgent = [x for x in swarm.decide(now_s + 0.01) if isinstance(x, Ask) and x.urgent]
    assert urgent == [Ask("fast", (wanted,), urgent=True)]


def asked_now(swarm: Swarm) -> dict[int, str]:
    return {piece: source.node_id for source in swarm._sources for piece in source.queue}


def test_a_bad_peer_is_dropped_and_stays_out() -> None:
    swarm = swarm_of()
    swarm.peer_up("a", Bitmap.full(40), 0.0)
    piece = next(iter(asks(swarm.decide(0.0))))
    swarm.bad(piece, "a", 1.0)
    assert [x for x in swarm.decide(1.0) if isinstance(x, DropPeer)]
    swarm.peer_up("a", Bitmap.full(40), 2.0)
    actions = swarm.decide(2.0)
    assert [x for x in actions if isinstance(x, DropPeer)]
    assert not asks(actions)
    swarm.peer_up("a", Bitmap.full(40), 1000.0)
    assert asks(swarm.decide(1000.0))


def test_the_origins_second_wrong_answer_is_the_last() -> None:
    swarm = swarm_of(2)
    swarm.set_members((), seed=True, region_members=1)
    now_s = 0.0
    for _ in range(2):
        lease = read_of(swarm.decide(now_s), 0)
        swarm.bad(0, ORIGIN, now_s)
        swarm.origin_done(lease, now_s)
        now_s += 20.0
    assert swarm.refused_pieces == (0,)
    for _ in range(5):
        now_s += 20.0
        reads = [x for x in swarm.decide(now_s) if isinstance(x, ReadOrigin)]
        assert all(0 not in x.pieces for x in reads)
        for x in reads:
            swarm.arrived(1, ORIGIN, 1.0, now_s)
            swarm.origin_done(x.lease, now_s)
    assert "1 pieces with wrong bytes" in swarm.waits_for


def read_of(actions: list[object], piece: int) -> Lease:
    return next(x.lease for x in actions if isinstance(x, ReadOrigin) and piece in x.pieces)


def test_other_regions_are_asked_by_the_importer_only() -> None:
    """Of three seeds of a region each piece is asked for abroad by one."""
    places = [Place(f"n{n}", "p", "eu", "a") for n in range(3)]
    far = Place("far", "q", "us", "a")
    asked: list[dict[int, str]] = []
    for place in places:
        swarm = Swarm(place, [1 << 20] * 60, Bitmap(60), policy=Policy(total_pieces=60, window_pieces=60))
        others = [Member(x, seed=True) for x in (*places, far) if x is not place]
        swarm.set_members(others, seed=True, region_members=3)
        for member in others:
            swarm.peer_up(member.node_id, Bitmap.full(60) if member.place is far else Bitmap(60), 0.0)
        asked.append(asks(swarm.decide(0.0)))
    assert sorted(piece for x in asked for piece in x) == list(range(60))
    assert all(asked)


def test_a_lone_node_reads_the_origin_and_an_idle_one_waits_its_turn() -> None:
    alone = swarm_of(3)
    alone.set_members((), seed=True, region_members=1)
    assert any(isinstance(x, ReadOrigin) for x in alone.decide(0.0))
    untold = swarm_of(3)
    assert untold.decide(0.0) == []
    assert "not among those that read the origin" in untold.waits_for
    assert any(isinstance(x, ReadOrigin) for x in untold.decide(30.0))
    elsewhere = swarm_of(3)
    elsewhere.origin_available(False)
    assert elsewhere.decide(100.0) == []
    assert elsewhere.waits_for == "no peer is connected and the origin cannot be read from here"


def test_leases_are_told_before_they_are_read_and_again_to_who_comes_late() -> None:
    swarm = swarm_of()
    swarm.set_members([Member(Place("a", "p", "eu", "a"), seed=True)], seed=True, region_members=2)
    actions = [x for x in swarm.decide(0.0) if isinstance(x, Tell | ReadOrigin)]
    assert [type(x) for x in actions] == [Tell, ReadOrigin]
    swarm.peer_up("a", Bitmap(40), 1.0)
    assert actions[0] in swarm.decide(1.0)


@pytest.mark.parametrize(("region_members", "brings"), [(2, True), (500, False)])
def test_in_a_large_region_a_node_that_meets_no_seed_brings_nothing_in(region_members: int, brings: bool) -> None:
    """Most nodes of a large region are linked to no seed; each of them would bring everything in again."""
    first, second = sorted("ab", key=lambda name: mix(hash_of(name)))
    swarm = Swarm(Place(first, region="r1"), [4] * 8, Bitmap(8))
    members = [Member(Place(second, region="r1")), Member(Place("far", region="r2"))]
    swarm.set_members(members, seed=False, region_members=region_members)
    swarm.peer_up(second, Bitmap(8), 0.0)
    swarm.peer_up("far", Bitmap.full(8), 0.0)
    asked = {action.node_id for at in range(10) for action in swarm.decide(float(at)) if isinstance(action, Ask)}
    assert asked == ({"far"} if brings else set())
