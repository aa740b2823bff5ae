"""What comes while something starts from an artifact that arrives, and that all of it comes in the end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import Ask, Place, ReadOrigin
from fal_fsd.core.policy import Pieces, Policy
from fal_fsd.core.starting import Starting
from fal_fsd.core.swarm import Swarm

COUNT = 400
STEP_S = 0.01
BOUND_S = 60.0
POLICY = Policy()


def swarm_of(*, first: list[int], peer: bool = True) -> Swarm:
    """A node that has nothing; all of it is at a peer, or only at the origin, which it may read."""
    swarm = Swarm(Place("a", "p", "r"), [1 << 18] * COUNT, Bitmap(COUNT))
    swarm.prefer(first)
    if peer:
        swarm.origin_available(False)
        swarm.peer_up("b", Bitmap.full(COUNT), 0.0)
    else:
        swarm.set_members((), seed=True, region_members=1)
    return swarm


def play(swarm: Swarm, now_s: float, until_s: float, came: list[int]) -> float:
    """Let what is asked for come at once, and look on when the swarm says so; the time of the end."""
    while now_s < until_s and not swarm.complete:
        for action in swarm.decide(now_s):
            if isinstance(action, Ask | ReadOrigin):
                source = action.node_id if isinstance(action, Ask) else "origin"
                for piece in action.pieces:
                    swarm.arrived(piece, source, STEP_S, now_s)
                    came.append(piece)
                if isinstance(action, ReadOrigin):
                    swarm.origin_done(action.lease, now_s)
        now_s += STEP_S
    return now_s


@pytest.mark.parametrize("peer", [True, False])
def test_a_start_gets_what_it_reads_and_the_rest_waits_until_it_is_up(peer: bool) -> None:
    first = list(range(300, 200, -1))
    swarm, came = swarm_of(first=first, peer=peer), list[int]()
    swarm.start_begins(0.0, BOUND_S)
    now_s = play(swarm, 0.0, 2.0, came)
    assert set(first) <= set(came)
    assert len(came) <= len(first) + 2.0 / POLICY.start_trickle_s + 1
    assert "starts from it" in swarm.waits_for
    swarm.start_ends()
    assert play(swarm, now_s, now_s + 5.0, came) < now_s + 5.0
    assert sorted(came) == list(range(COUNT))


@pytest.mark.parametrize("peer", [True, False])
def test_a_start_that_is_never_told_to_be_over_ends_at_its_bound(peer: bool) -> None:
    swarm, came = swarm_of(first=[], peer=peer), list[int]()
    swarm.start_begins(0.0, 5.0)
    play(swarm, 0.0, 5.0, came)
    assert 0 < len(came) <= 5.0 / POLICY.start_trickle_s + 1
    assert play(swarm, 5.0, 10.0, came) < 10.0
    assert swarm.complete


def test_readers_get_more_the_longer_they_read_in_order() -> None:
    swarm, came = swarm_of(first=[]), list[int]()
    swarm.start_begins(0.0, BOUND_S)
    misses = []
    now_s = 0.0
    for piece in range(100, 300):
        if piece in came:
            continue
        misses.append(piece)
        swarm.wanted([piece], True)
        now_s = play(swarm, now_s, now_s + 3 * STEP_S, came)
        swarm.wanted([piece], False)
        assert piece in came
    gaps = [later - earlier for earlier, later in itertools.pairwise(misses)]
    assert gaps[0] == POLICY.start_ahead_pieces + 1
    assert max(gaps) >= 4 * gaps[0]
    assert len(misses) <= 10


def test_a_reader_here_and_there_brings_little_more_than_it_reads() -> None:
    swarm, came = swarm_of(first=[]), list[int]()
    swarm.start_begins(0.0, BOUND_S)
    now_s = 0.0
    for piece in (10, 390, 200):
        swarm.wanted([piece], True)
        now_s = play(swarm, now_s, now_s + 3 * STEP_S, came)
        swarm.wanted([piece], False)
    assert {10, 200, 390} <= set(came)
    assert len(came) <= 3 * (POLICY.start_ahead_pieces + 1) + now_s / POLICY.start_trickle_s + 1


@given(
    st.lists(st.integers(-5, COUNT + 5), max_size=50),
    st.lists(st.tuples(st.integers(0, COUNT - 1), st.floats(0.0, 5.0)), max_size=30),
)
def test_what_may_come_only_grows_and_is_all_of_it_in_the_end(first: list[int], reads: list[tuple[int, float]]) -> None:
    pieces = Pieces([1] * COUNT, (1 << COUNT) - 1)
    pieces.prefer(first)
    starting = Starting("a", pieces, POLICY)
    assert starting.allowed(0.0) == pieces.every
    starting.begin(0.0, 5.0)
    before = 0
    for piece, now_s in sorted(reads, key=lambda x: x[1]):
        starting.wanted([piece])
        now = starting.allowed(now_s)
        assert before & ~now == 0
        assert now & ~pieces.every == 0
        assert now >> piece & 1
        assert not pieces.first_bits & ~now
        before = now
    assert starting.allowed(5.0) == pieces.every
    assert starting.next_at_s is None
